//go:build harm && linux && amd64

package harm

import (
	"testing"
	"time"
)

// The wall clock jumps for all that asks; what is measured does not.
func TestTheClockJumps(t *testing.T) {
	installClock()
	defer setClock(0)
	before := time.Now()
	setClock(-int64(before.Unix()))
	after := time.Now()
	if y := after.Year(); y != 1970 {
		t.Errorf("the year is %d", y)
	}
	if d := after.Sub(before); d < 0 || d > time.Second {
		t.Errorf("between two looks at the clock passed %s", d)
	}
	if d := time.Since(before); d < 0 || d > time.Second {
		t.Errorf("since then passed %s", d)
	}
}
