package supervisor

import (
	"math"
	"testing"
	"time"
)

// What is told of the speed of restores is measured: newer ones count more, and small states do not say how fast large ones are restored.
func TestTheSpeedOfRestoresIsMeasured(t *testing.T) {
	s := &Supervisor{}
	s.restored.note(1000, time.Second)
	if got := s.RestoreSpeed(); got != 0 {
		t.Errorf("nothing that counts is measured yet, and it says %f", got)
	}
	for range 20 {
		s.restored.note(64<<20, time.Second)
	}
	if got := s.RestoreSpeed(); math.Abs(got-64<<20) > 1 {
		t.Errorf("%f", got)
	}
	for range 5 {
		s.restored.note(16<<20, time.Second)
	}
	if got := s.RestoreSpeed(); got > 20<<20 {
		t.Errorf("it is slow now, and it says %.0f MiB/s", got/(1<<20))
	}
}
