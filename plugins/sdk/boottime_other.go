//go:build !linux

package sdk

import "time"

var started = time.Now()

// bootTime is Go's own clock, which stands still while the machine sleeps on some systems: there a component may act for up to one grant after its
// machine wakes.
func bootTime() time.Duration { return time.Since(started) }
