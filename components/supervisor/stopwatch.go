package supervisor

import (
	"fmt"
	"strings"
	"time"
)

// stopwatch notes how long the steps of a start take, for the log.
type stopwatch struct {
	last  time.Time
	steps []string
}

func newStopwatch() *stopwatch { return &stopwatch{last: time.Now()} }

func (w *stopwatch) lap(step string) {
	now := time.Now()
	w.steps = append(w.steps, fmt.Sprintf("%s %.1f ms", step, float64(now.Sub(w.last).Microseconds())/1000))
	w.last = now
}

func (w *stopwatch) String() string { return strings.Join(w.steps, ", ") }
