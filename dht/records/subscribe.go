package records

import (
	"context"
	"strings"
	"sync"
)

// subscribers are told of new records here, on one goroutine, in the order in which they came. A subscriber that is slow loses no
// key: while it lags, of several records of one key it gets the last.
type subscribers struct {
	mu      sync.Mutex // guards all below
	next    int
	list    []subscriber
	pending map[string]Record
	order   []string
	wake    chan struct{}
}

type subscriber struct {
	id     int
	prefix string
	f      func(Record)
}

func newSubscribers() *subscribers {
	return &subscribers{pending: map[string]Record{}, wake: make(chan struct{}, 1)}
}

// Subscribe calls f for each record under the prefix that is new at this node, its deletion included, while Run runs. What is here
// already is not told (see Local), nor that a record expired. Calls come one after the other, in order for each key; f may call
// Records, but what takes long in it delays all subscribers.
func (r *Records) Subscribe(prefix string, f func(Record)) (cancel func()) {
	s := r.subs
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next++
	id := s.next
	s.list = append(s.list, subscriber{id, prefix, f})
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		kept := make([]subscriber, 0, len(s.list))
		for _, sub := range s.list {
			if sub.id != id {
				kept = append(kept, sub)
			}
		}
		s.list = kept
	}
}

// tell queues a record. It does not block.
func (s *subscribers) tell(r Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	wanted := false
	for _, sub := range s.list {
		wanted = wanted || strings.HasPrefix(r.Key, sub.prefix)
	}
	if !wanted {
		return
	}
	if _, ok := s.pending[r.Key]; !ok {
		s.order = append(s.order, r.Key)
	}
	s.pending[r.Key] = r
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

func (s *subscribers) take() (Record, []subscriber, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.order) == 0 {
		return Record{}, nil, false
	}
	key := s.order[0]
	s.order = s.order[1:]
	r := s.pending[key]
	delete(s.pending, key)
	return r, s.list, true
}

func (s *subscribers) run(ctx context.Context) {
	for {
		for ctx.Err() == nil {
			r, list, ok := s.take()
			if !ok {
				break
			}
			for _, sub := range list {
				if strings.HasPrefix(r.Key, sub.prefix) {
					sub.f(r)
				}
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-s.wake:
		}
	}
}
