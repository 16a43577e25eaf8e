package members

import (
	"slices"
	"sync"
	"time"
)

// rttStats keeps the round trips to one member: a moving average (1/8 of each new one) and the last 64 for the tail.
type rttStats struct {
	mean   time.Duration
	window []time.Duration
	at     int
}

const rttWindow = 64

// measured notes a round trip to a node.
func (e *entry) measured(d time.Duration) {
	if e.rtt == nil {
		e.rtt = &rttStats{}
	}
	e.rtt.add(d)
}

func (r *rttStats) add(d time.Duration) {
	if r.mean == 0 {
		r.mean = d
	} else {
		r.mean += (d - r.mean) / 8
	}
	if len(r.window) < rttWindow {
		r.window = append(r.window, d)
		return
	}
	r.window[r.at] = d
	r.at = (r.at + 1) % rttWindow
}

// p99 returns the largest but the worst hundredth of the window, which is the largest of so few; 0 when nothing was measured. It is asked at
// each look for silence.
func (r *rttStats) p99() time.Duration {
	if r == nil || len(r.window) == 0 {
		return 0
	}
	return slices.Max(r.window)
}

// lateness remembers by how much the loop's tick came too late: the node's own scheduling delay.
type lateness struct {
	mu    sync.Mutex // guards the rest
	worst [lateWindow]time.Duration
	sec   [lateWindow]int64 // whose seconds
}

func (l *lateness) note(now time.Time, late time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := now.Unix()
	i := int(uint64(s) % lateWindow)
	if l.sec[i] != s {
		l.sec[i], l.worst[i] = s, 0
	}
	l.worst[i] = max(l.worst[i], late)
}

func (l *lateness) now() time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	var worst time.Duration
	s := time.Now().Unix()
	for i := range l.worst {
		if s-l.sec[i] < lateWindow {
			worst = max(worst, l.worst[i])
		}
	}
	return worst
}
