package supervisor

import (
	"sync"
	"time"
)

// restoreCounts is the least state whose restore says how fast this node restores: of a smaller one most of the time is the call.
const restoreCounts = 1 << 20

// restoreSpeed is how fast processes of this node took their states. Newer restores count more: each halves the weight of all before it.
type restoreSpeed struct {
	mu             sync.Mutex // guards the rest
	bytes, seconds float64
}

// note takes in that so much state was given to a process.
func (r *restoreSpeed) note(bytes uint64, took time.Duration) {
	if bytes < restoreCounts || took <= 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.bytes, r.seconds = r.bytes/2+float64(bytes), r.seconds/2+took.Seconds()
}

// RestoreSpeed is how many bytes of a state a process of this node takes in a second, as measured; 0: nothing was measured yet.
func (s *Supervisor) RestoreSpeed() float64 {
	s.restored.mu.Lock()
	defer s.restored.mu.Unlock()
	if s.restored.seconds <= 0 {
		return 0
	}
	return s.restored.bytes / s.restored.seconds
}
