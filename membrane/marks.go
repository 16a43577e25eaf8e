package membrane

import (
	"container/heap"
	"context"
	"errors"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// errDiscarded ends the wait of an answer whose effects will not be committed by this process.
var errDiscarded = errors.New("the instance is served by another process now")

// marks holds answers back until the journal mark they depend on is committed. Each process of an instance has marks of its own, so
// the marks of an earlier one are never taken for those of its successor.
type marks struct {
	committed atomic.Uint64 // read without the lock on the fast path

	mu      sync.Mutex // guards the fields below
	over    bool
	waiting waiters
}

type waiter struct {
	mark  uint64
	ready chan error // buffered
	index int
}

// wait returns when mark is committed, when ctx ends, or with errDiscarded.
func (m *marks) wait(ctx context.Context, mark uint64) error {
	if mark <= m.committed.Load() {
		return nil
	}
	m.mu.Lock()
	switch {
	case mark <= m.committed.Load():
		m.mu.Unlock()
		return nil
	case m.over:
		m.mu.Unlock()
		return errDiscarded
	}
	w := &waiter{mark: mark, ready: make(chan error, 1)}
	heap.Push(&m.waiting, w)
	m.mu.Unlock()
	select {
	case err := <-w.ready:
		return err
	case <-ctx.Done():
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if w.index >= 0 {
		heap.Remove(&m.waiting, w.index)
	}
	select {
	case err := <-w.ready:
		return err
	default:
	}
	return status.FromContextError(ctx.Err()).Err()
}

// set raises the committed mark and releases what has waited for it. It never goes back.
func (m *marks) set(mark uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if mark <= m.committed.Load() {
		return
	}
	m.committed.Store(mark)
	for len(m.waiting) > 0 && m.waiting[0].mark <= mark {
		heap.Pop(&m.waiting).(*waiter).ready <- nil
	}
}

// discard ends all waits, now and later, for marks that are not committed.
func (m *marks) discard() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.over = true
	for len(m.waiting) > 0 {
		heap.Pop(&m.waiting).(*waiter).ready <- errDiscarded
	}
}

// pending returns how many answers wait.
func (m *marks) pending() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.waiting)
}

// markError turns the failure of a wait into that of the call: the effects may yet be committed.
func markError(err error) error {
	if errors.Is(err, errDiscarded) {
		return refuse(doubt, codes.Unavailable, "the answer is discarded: %s", err)
	}
	return err
}

type waiters []*waiter

func (w waiters) Len() int           { return len(w) }
func (w waiters) Less(i, j int) bool { return w[i].mark < w[j].mark }
func (w waiters) Swap(i, j int) {
	w[i], w[j] = w[j], w[i]
	w[i].index, w[j].index = i, j
}

func (w *waiters) Push(x any) {
	e := x.(*waiter)
	e.index = len(*w)
	*w = append(*w, e)
}

func (w *waiters) Pop() any {
	old := *w
	e := old[len(old)-1]
	old[len(old)-1] = nil
	*w = old[:len(old)-1]
	e.index = -1
	return e
}
