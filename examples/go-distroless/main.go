// Command app says for whom it runs.
package main

import (
	"fmt"
	"os"
	"runtime"
)

func main() {
	_, err := os.Stat("/bin/sh")
	fmt.Printf("static %s/%s, a shell: %t\n", runtime.GOOS, runtime.GOARCH, err == nil)
}
