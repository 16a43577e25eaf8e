//go:build harm && linux

package harm

import "sync/atomic"

// skew is added to CLOCK_REALTIME; clockGettime reads it.
var skew int64

func setClock(seconds int64) { atomic.StoreInt64(&skew, seconds) }

// installClock puts clockGettime in the place of the kernel's function that the runtime calls for the time.
func installClock()
