//go:build planted

package planted

import (
	"os"
	"sync/atomic"
)

var current = fromEnvironment()

func fromEnvironment() *atomic.Pointer[string] {
	name := os.Getenv("COPPICE_PLANTED")
	p := &atomic.Pointer[string]{}
	p.Store(&name)
	return p
}

// Set switches one bug on, and all others off; "" switches all off.
func Set(name string) { current.Store(&name) }

// Bug says whether a bug is switched on.
func Bug(name string) bool { return *current.Load() == name }
