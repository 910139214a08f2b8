// Command api lists what it would serve.
package main

import (
	"fmt"
	"os"
)

func main() {
	entries, err := os.ReadDir("public")
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	for _, entry := range entries {
		fmt.Println("serving", entry.Name())
	}
}
