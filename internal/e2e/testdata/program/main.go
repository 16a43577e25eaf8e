// Command program is an ordinary program: it knows nothing of components.
package main

import "fmt"

func main() { fmt.Println("hello") }
