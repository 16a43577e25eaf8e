package sdk

import (
	"time"

	"golang.org/x/sys/unix"
)

var started = time.Now()

// bootTime reads CLOCK_BOOTTIME: it goes on while the machine sleeps, where Go's own clock stands still.
func bootTime() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return time.Since(started)
	}
	return time.Duration(ts.Nano())
}
