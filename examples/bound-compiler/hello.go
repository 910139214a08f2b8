// Command hello is compiled by a compiler that was never installed.
package main

import "fmt"

func main() {
	fmt.Println("hello from a bound compiler")
}
