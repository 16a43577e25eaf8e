package sim

import (
	"sync"
	"time"
)

// maxRate is the error of a node's clock: within 1 % of the others', as the guarantees assume.
const maxRate = 0.01

// clock is a node's CLOCK_BOOTTIME: it runs a little too fast or too slow, stands still for its process while that is stopped, and has
// gone on when the process goes on.
type clock struct {
	rate  float64
	start time.Time

	mu     sync.Mutex // guards frozen
	frozen time.Duration
}

func newClock(rate float64) *clock { return &clock{rate: rate, start: time.Now(), frozen: -1} }

func (c *clock) now() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.nowLocked()
}

func (c *clock) nowLocked() time.Duration {
	if c.frozen >= 0 {
		return c.frozen
	}
	return time.Duration(float64(time.Since(c.start)) * c.rate)
}

func (c *clock) stop() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.frozen = c.nowLocked()
}

func (c *clock) cont() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.frozen = -1
}
