package membrane

import (
	"strconv"
	"sync"
)

// sequence numbers the unkeyed calls of one router to one target: its keys are "<name>/<n>". Numbers are never used twice, and low
// tells the callee which answers it may forget.
type sequence struct {
	name string

	mu   sync.Mutex // guards the fields below
	next uint64
	low  uint64
	out  map[uint64]struct{}
}

func newSequence(name string) *sequence {
	return &sequence{name: name, next: 1, low: 1, out: map[uint64]struct{}{}}
}

// take begins a call. done is to be called when its answer was given, or will not be asked for again.
func (s *sequence) take() (key string, done func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := s.next
	s.next++
	s.out[n] = struct{}{}
	return s.name + "/" + strconv.FormatUint(n, 10), func() { s.finish(n) }
}

func (s *sequence) finish(n uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.out, n)
	for s.low < s.next {
		if _, open := s.out[s.low]; open {
			return
		}
		s.low++
	}
}

// lowWater returns the number below which every call is over.
func (s *sequence) lowWater() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strconv.FormatUint(s.low, 10)
}

// sequences hands out one sequence per target: a slow call to one must not keep the answers of another from being forgotten, and two
// names of the same instance must not share numbers.
type sequences struct {
	base string

	mu       sync.Mutex // guards byTarget
	byTarget map[string]*sequence
}

func (s *sequences) of(target string) *sequence {
	s.mu.Lock()
	defer s.mu.Unlock()
	q := s.byTarget[target]
	if q == nil {
		q = newSequence(s.base + "." + strconv.Itoa(len(s.byTarget)))
		s.byTarget[target] = q
	}
	return q
}
