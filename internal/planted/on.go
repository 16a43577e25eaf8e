//go:build planted

package planted

import (
	"os"
	"sync/atomic"
)

var current atomic.Pointer[string]

func init() { Set(os.Getenv("COPPICE_PLANTED")) }

// Set switches one bug on, and all others off; "" switches all off.
func Set(name string) { current.Store(&name) }

// Bug says whether a bug is switched on.
func Bug(name string) bool { return *current.Load() == name }
