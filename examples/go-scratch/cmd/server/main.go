// Command server says what it is and, asked to, whether its certificates are in place.
package main

import (
	"fmt"
	"os"

	"example.org/server/internal/greeting"
)

func main() {
	fmt.Println(greeting.For("scratch"))
	if info, err := os.Stat("/etc/ssl/certs/ca-certificates.crt"); err == nil && info.Size() > 0 {
		fmt.Println("certificates: yes")
	}
}
