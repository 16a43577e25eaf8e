package blobs

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cockroachdb/pebble/v2"
)

// Complete reports whether the node and everything below it is here and on disk. Where that is known it costs two look-ups; else the
// part not known to be complete is walked, and what is found is kept.
func (s *Store) Complete(root Hash) bool {
	if !s.work.enter() {
		return false
	}
	defer s.work.leave()
	ok, err := s.complete(root)
	if err != nil {
		s.cfg.Log.Error("blobs: cannot tell whether a root is complete", "root", root.String(), "err", err)
	}
	return ok && err == nil
}

func (s *Store) complete(root Hash) (bool, error) {
	ok, err := s.rely(root, false)
	if err == nil && !ok {
		ok, _, err = s.settle(root, 1)
	}
	if err != nil || !ok {
		return false, err
	}
	return true, s.durable(s.wal.now())
}

// rely reports whether h is known to be complete, and keeps it from a collection under way; with pin, for longer.
func (s *Store) rely(h Hash, pin bool) (bool, error) {
	s.sweeping.RLock()
	defer s.sweeping.RUnlock()
	ok, err := s.isComplete(h)
	if err != nil || !ok {
		return false, err
	}
	if pin {
		s.pins.pin(h)
	} else {
		s.pins.touch(h)
	}
	return true, nil
}

// relyOn reports whether h is here and whether it is known to be complete, and pins it where it is complete.
func (s *Store) relyOn(h Hash) (here, complete bool, err error) {
	s.sweeping.RLock()
	defer s.sweeping.RUnlock()
	here, complete, err = s.standing(h)
	if err == nil && complete {
		s.pins.pin(h)
	}
	return here, complete, err
}

// isComplete reports what is known: a node without links is complete when it is here, another when it is marked.
func (s *Store) isComplete(h Hash) (bool, error) {
	_, ok, err := s.standing(h)
	return ok, err
}

// standing is isComplete, and whether the node itself is here.
func (s *Store) standing(h Hash) (here, complete bool, err error) {
	leaf := false
	here, err = s.lookup(s.key(headKey, h), func(b []byte) error {
		leaf = isLeafHead(b)
		return nil
	})
	if err != nil || !here || leaf {
		return here, here, err
	}
	complete, err = s.flagged(h)
	return here, complete, err
}

// isLeafHead reports whether a stored head has no links. An unreadable one has, so that it is never taken for complete.
func isLeafHead(b []byte) bool {
	if len(b) < 9 {
		return false
	}
	b = b[9:]
	if _, n := binary.Uvarint(b); n > 0 {
		b = b[n:]
	} else {
		return false
	}
	kind, n := binary.Uvarint(b)
	if n <= 0 || uint64(len(b)-n) < kind {
		return false
	}
	count, n := binary.Uvarint(b[n+int(kind):])
	return n > 0 && count == 0
}

// settle walks what is below root as far as it is not known to be complete, marks what is, and returns up to limit nodes that are
// missing, the ones nearest to the root first on each path.
func (s *Store) settle(root Hash, limit int) (complete bool, missing []Hash, err error) {
	type frame struct {
		hash  Hash
		links []Link
		next  int
	}
	var stack []frame
	seen := map[Hash]struct{}{}
	visit := func(h Hash) error {
		if _, ok := seen[h]; ok {
			return nil
		}
		done, err := s.isComplete(h)
		if err != nil || done {
			return err
		}
		seen[h] = struct{}{}
		hd, ok, err := s.headOf(h)
		if err != nil {
			return err
		}
		if !ok {
			missing = append(missing, h)
		} else {
			stack = append(stack, frame{hash: h, links: hd.links})
		}
		return nil
	}
	err = visit(root)
	for err == nil && len(stack) > 0 && len(missing) < limit {
		top := &stack[len(stack)-1]
		if top.next < len(top.links) {
			top.next++
			err = visit(top.links[top.next-1].Hash)
			continue
		}
		done := *top
		stack = stack[:len(stack)-1]
		err = s.mark(done.hash, done.links)
	}
	if err != nil {
		return false, nil, fmt.Errorf("walk below %s: %w", root.Short(), err)
	}
	if len(missing) > 0 {
		return false, missing, nil
	}
	complete, err = s.rely(root, false)
	return complete, nil, err
}

// mark notes that h is complete, where all its links are.
func (s *Store) mark(h Hash, links []Link) error {
	s.sweeping.RLock()
	defer s.sweeping.RUnlock()
	if ok, err := s.has(h); err != nil || !ok {
		return err
	}
	for _, l := range links {
		if ok, err := s.isComplete(l.Hash); err != nil || !ok {
			return err
		}
	}
	if _, err := s.wal.apply(func() error { return s.db.Set(s.key(completeKey, h), nil, pebble.NoSync) }); err != nil {
		return err
	}
	s.pins.put(h, links, true)
	return nil
}

// discard removes a node that cannot be read and the marks of all nodes above it, in one piece and at once on disk.
func (s *Store) discard(bad Hash) error {
	s.sweeping.Lock()
	defer s.sweeping.Unlock()
	parents, err := s.parents()
	if err != nil {
		return err
	}
	here, err := s.has(bad)
	if err != nil {
		return err
	}
	b := s.db.NewBatch()
	for _, kind := range []byte{headKey, dataKey, completeKey} {
		if err := b.Delete(s.key(kind, bad), nil); err != nil {
			return errors.Join(err, b.Close())
		}
	}
	seen := map[Hash]struct{}{bad: {}}
	for todo := []Hash{bad}; len(todo) > 0; {
		h := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		for _, p := range parents[h] {
			if _, ok := seen[p]; ok {
				continue
			}
			seen[p] = struct{}{}
			todo = append(todo, p)
			if err := b.Delete(s.key(completeKey, p), nil); err != nil {
				return errors.Join(err, b.Close())
			}
		}
	}
	if err := b.Commit(pebble.Sync); err != nil {
		return errors.Join(err, b.Close())
	}
	if here {
		s.stats.sub(1, 0)
	}
	return b.Close()
}

// parents returns, for each node linked to, the nodes that link to it.
func (s *Store) parents() (map[Hash][]Hash, error) {
	up := map[Hash][]Hash{}
	err := s.eachHead(s.db, func(h Hash, hd head) error {
		for _, l := range hd.links {
			up[l.Hash] = append(up[l.Hash], h)
		}
		return nil
	})
	return up, err
}

// eachHead calls f for each node here, in order of hash. An unreadable head is passed over: whoever gets it discards it.
func (s *Store) eachHead(db pebble.Reader, f func(Hash, head) error) error {
	lo := append([]byte(s.cfg.Prefix), headKey)
	it, err := db.NewIter(&pebble.IterOptions{LowerBound: lo, UpperBound: append([]byte(s.cfg.Prefix), headKey+1)})
	if err != nil {
		return err
	}
	for it.First(); it.Valid() && err == nil; it.Next() {
		var h Hash
		if len(it.Key()) != len(lo)+len(h) {
			continue
		}
		copy(h[:], it.Key()[len(lo):])
		var v []byte
		if v, err = it.ValueAndErr(); err != nil {
			break
		}
		hd, bad := decodeHeadValue(v)
		if bad == nil {
			err = f(h, hd)
		}
	}
	return errors.Join(err, it.Error(), it.Close())
}
