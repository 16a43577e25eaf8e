package blobs

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

const (
	// scrubBatch is how many nodes are looked at between two pauses; scrubShare is how many times as long as that took the pause is at least: a hundredth of one core.
	scrubBatch = 16
	scrubShare = 99
	// scrubIdle is how often an empty store looks whether it has anything to scrub; scrubStep bounds one pause, in which it may have grown.
	scrubIdle = time.Minute
	scrubStep = 10 * time.Minute
)

// Scrub is how far the store is with reading everything it holds, to find what has changed on the disk.
type Scrub struct {
	Since  time.Time // of the pass under way
	Last   time.Time // when the last pass was complete; zero: none since the start
	Nodes  uint64    // read since the start
	Bytes  uint64
	Passes uint64
}

// scrubLoop reads everything here, slowly and again and again, in the order of names from where the seed says: nodes that are started together do not read the same
// at the same time, and one that is started often comes to read everything.
func (s *Store) scrubLoop(ctx context.Context) {
	if s.cfg.ScrubEvery < 0 {
		return
	}
	var from Hash
	for i := 0; i < len(from); i += 8 {
		binary.BigEndian.PutUint64(from[i:], s.cfg.Rand())
	}
	for {
		begin := time.Now()
		s.stats.scrubs(func(x *Scrub) { x.Since = begin })
		some, err := s.scrubPass(ctx, from)
		if ctx.Err() != nil {
			return
		}
		if err != nil {
			s.cfg.Log.Error("what is kept could not be read through; it is tried again", "err", err)
		} else if some {
			s.stats.scrubs(func(x *Scrub) { x.Last, x.Passes = time.Now(), x.Passes+1 })
		}
		rest := scrubIdle
		if some && err == nil {
			rest = max(s.cfg.ScrubEvery-time.Since(begin), scrubIdle)
		}
		if wait(ctx, rest) != nil {
			return
		}
	}
}

// scrubPass reads everything once, spread over the time that a pass is to take, or longer where that is needed to leave the core to others. some says that there was
// anything.
func (s *Store) scrubPass(ctx context.Context, from Hash) (some bool, err error) {
	at, wrapped := from, false
	for {
		batch, err := s.headsFrom(at, scrubBatch)
		if err != nil {
			return some, err
		}
		end := len(batch) < scrubBatch
		begin := time.Now()
		for _, h := range batch {
			if wrapped && string(h[:]) >= string(from[:]) {
				return some, nil
			}
			some = true
			if err := s.scrub(h); err != nil {
				return some, err
			}
		}
		switch {
		case end && wrapped:
			return some, nil
		case end:
			at, wrapped = Hash{}, true
		default:
			at = following(batch[len(batch)-1])
		}
		pace := time.Duration(float64(s.cfg.ScrubEvery) * scrubBatch / float64(max(s.Usage().Nodes, 1)))
		if end {
			pace = 0
		}
		if err := wait(ctx, max(scrubShare*time.Since(begin), min(pace, scrubStep))); err != nil {
			return some, err
		}
	}
}

// following is the next name.
func following(h Hash) Hash {
	for i := len(h) - 1; i >= 0; i-- {
		if h[i]++; h[i] != 0 {
			break
		}
	}
	return h
}

// headsFrom lists the names of nodes that are here, in order.
func (s *Store) headsFrom(from Hash, n int) (out []Hash, err error) {
	it, err := s.db.NewIter(&pebble.IterOptions{LowerBound: s.key(headKey, from), UpperBound: append([]byte(s.cfg.Prefix), headKey+1)})
	if err != nil {
		return nil, fmt.Errorf("list nodes: %w", err)
	}
	for it.First(); it.Valid() && len(out) < n; it.Next() {
		var h Hash
		if k := it.Key(); len(k) == len(s.cfg.Prefix)+1+len(h) {
			out = append(out, Hash(k[len(s.cfg.Prefix)+1:]))
		}
	}
	return out, errors.Join(it.Error(), it.Close())
}

// scrub reads one node, and looks whether what it leads to is here where that was said. What is wrong is repaired.
func (s *Store) scrub(h Hash) error {
	n, enc, err := s.get(h)
	var missing *MissingError
	var corrupt *CorruptError
	switch {
	case errors.As(err, &missing): // it was collected meanwhile
		return nil
	case errors.As(err, &corrupt):
		return nil
	case err != nil:
		return err
	}
	s.stats.scrubs(func(x *Scrub) { x.Nodes, x.Bytes = x.Nodes+1, x.Bytes+uint64(len(enc)) })
	lost, err := s.lost(h, n.Links)
	if err != nil {
		return err
	}
	for _, l := range lost {
		if err := s.found(&CorruptError{Hash: l, Why: "it is not here, though a tree above it was complete"}); err != nil {
			return err
		}
	}
	return nil
}

// lost lists the links of a node that are not here although the node is marked complete.
func (s *Store) lost(h Hash, links []Link) (out []Hash, err error) {
	if len(links) == 0 {
		return nil, nil
	}
	s.sweeping.RLock()
	defer s.sweeping.RUnlock()
	if whole, err := s.flagged(h); err != nil || !whole {
		return nil, err
	}
	for _, l := range links {
		here, err := s.has(l.Hash)
		if err != nil {
			return nil, err
		}
		if !here {
			out = append(out, l.Hash)
		}
	}
	return out, nil
}

// wait pauses for d; its error is that of ctx, which ended before.
func wait(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
