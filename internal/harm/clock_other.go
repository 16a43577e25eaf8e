//go:build harm && !(linux && amd64)

package harm

// setClock and installClock do nothing: elsewhere than on linux/amd64 the clock stays right, and what it does not break is not found.
func setClock(int64) {}
func installClock()  {}
