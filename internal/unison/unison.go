// Package unison makes tickers of one owner tick together. A process that wakes sixty times a second for as many small things costs several times what one
// does that wakes ten times and does six things each: the Go runtime wakes two threads for every timer that falls alone. Owners are told apart by a key,
// a node's name or id, so that those of several nodes, on several machines or in one simulation, do not beat in step.
package unison

import (
	"hash/fnv"
	"time"
)

// Ticker ticks on C where the ticks of its grid fall: the points that are a whole number of periods from the key's origin. Who receives a tick calls Next to
// have the next one. Grids of one key fall together where one period is a multiple of the other.
type Ticker struct {
	C      <-chan time.Time
	timer  *time.Timer
	every  time.Duration
	origin int64 // ns
}

// originWithin is how far the origins of keys lie apart at most: longer than any period.
const originWithin = time.Hour

// New returns a ticker of a period > 0. The first tick comes after half a period at least, and one and a half at most.
func New(every time.Duration, key string) *Ticker {
	h := fnv.New64a()
	h.Write([]byte(key)) // never fails (hash.Hash)
	t := &Ticker{every: every, origin: int64(h.Sum64() % uint64(originWithin))}
	t.timer = time.NewTimer(t.until())
	t.C = t.timer.C
	return t
}

// Next has the ticker tick again. It is called after a tick was received, and only then: ticks that nobody waits for are left out, none are made up for.
func (t *Ticker) Next() { t.timer.Reset(t.until()) }

// Stop ends it. C is not closed.
func (t *Ticker) Stop() { t.timer.Stop() }

// until is how long it is to the next point of the grid that is not so near that it may be the one which has just been.
func (t *Ticker) until() time.Duration {
	in := time.Duration((time.Now().UnixNano() - t.origin) % int64(t.every))
	if in < 0 {
		in += t.every
	}
	left := t.every - in
	if left < t.every/2 {
		left += t.every
	}
	return left
}
