package blobs

import (
	"context"
	"errors"
	"time"

	"github.com/cockroachdb/pebble/v2"

	"github.com/coppice-project/coppice/internal/planted"
)

const (
	sweepChunk = 256                  // nodes removed, or read, between two pauses
	sweepPause = 2 * time.Millisecond // leaves the disk and the lock to others
)

// sweepLoop collects now and then, never for more than a fiftieth of the time.
func (s *Store) sweepLoop(ctx context.Context) {
	if err := s.recount(ctx); err != nil && ctx.Err() == nil {
		s.cfg.Log.Error("blobs: cannot count what is stored", "err", err)
	}
	for {
		began := time.Now()
		if began.Sub(s.opened) >= s.cfg.PinFor {
			s.sweepAndReport(ctx)
		}
		s.pins.expire()
		wait := max(s.cfg.SweepEvery, 50*time.Since(began))
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
	}
}

func (s *Store) sweepAndReport(ctx context.Context) {
	sw, err := s.sweep(ctx)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		s.cfg.Log.Error("blobs: collection failed", "err", err)
	}
	s.stats.swept(sw, err)
}

// Sweep is what a collection did.
type Sweep struct {
	At       time.Time
	Took     time.Duration
	Live     int // nodes kept because something reaches them
	Young    int // nodes kept although nothing does
	Removed  int
	Freed    int64 // bytes of removed nodes
	Skipped  bool  // the live roots were not known
	Failures int   // collections that failed since the start
}

// sweep marks what the live roots and pins reach and removes the rest. What is relied on in the meantime is logged by pins and spared,
// with all below it: the marks of completeness of all doomed nodes go first, so nobody can begin to rely on a doomed tree as a whole,
// and every removal happens under the lock after a look at the log.
func (s *Store) sweep(ctx context.Context) (Sweep, error) {
	sw := Sweep{At: time.Now()}
	pinned := s.pins.begin()
	defer s.pins.end()
	if planted.Bug("collect-pinned") {
		pinned = nil
	}
	var live []Hash
	if f := s.live.Load(); f != nil {
		live = (*f)()
	}
	if live == nil {
		sw.Skipped = true
		return sw, nil
	}
	marked, err := s.reach(ctx, append(pinned, live...))
	if err != nil {
		return sw, err
	}
	sw.Live = len(marked)
	d, err := s.doom(ctx, marked)
	if err != nil {
		return sw, err
	}
	sw.Young = len(d.young)
	err = s.remove(ctx, d, &sw)
	sw.Took = time.Since(sw.At)
	return sw, err
}

// reach returns the nodes here that roots reach.
func (s *Store) reach(ctx context.Context, roots []Hash) (map[Hash]struct{}, error) {
	marked := map[Hash]struct{}{}
	for n := 0; len(roots) > 0; n++ {
		if err := pause(ctx, n); err != nil {
			return nil, err
		}
		h := roots[len(roots)-1]
		roots = roots[:len(roots)-1]
		if _, ok := marked[h]; ok {
			continue
		}
		hd, ok, err := s.headOf(h)
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		marked[h] = struct{}{}
		if planted.Bug("collect-reachable") {
			continue
		}
		for _, l := range hd.links {
			if _, ok := marked[l.Hash]; !ok {
				roots = append(roots, l.Hash)
			}
		}
	}
	return marked, nil
}

// doomed nodes are reached by nothing: the old ones are to be removed, the young ones only lose their mark, since something below
// them may be old.
type doomed struct {
	old   map[Hash]int64 // size
	young map[Hash]struct{}
}

func (d *doomed) has(h Hash) bool {
	_, old := d.old[h]
	_, young := d.young[h]
	return old || young
}

func (d *doomed) spare(h Hash) {
	delete(d.old, h)
	delete(d.young, h)
}

func (s *Store) doom(ctx context.Context, marked map[Hash]struct{}) (*doomed, error) {
	d := &doomed{old: map[Hash]int64{}, young: map[Hash]struct{}{}}
	horizon := time.Now().Add(-s.cfg.PinFor)
	n := 0
	err := s.eachHead(s.db, func(h Hash, hd head) error {
		n++
		if err := pause(ctx, n); err != nil {
			return err
		}
		if _, ok := marked[h]; ok {
			return nil
		}
		if hd.stored.After(horizon) {
			d.young[h] = struct{}{}
		} else {
			d.old[h] = int64(hd.size)
		}
		return nil
	})
	return d, err
}

func pause(ctx context.Context, n int) error {
	if n%sweepChunk != 0 {
		return nil
	}
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(sweepPause):
		return nil
	}
}

// remove takes the marks off all doomed nodes, then removes the old ones, a chunk at a time.
func (s *Store) remove(ctx context.Context, d *doomed, sw *Sweep) error {
	if err := s.exclusively(d, func(b *pebble.Batch) error {
		for h := range d.old {
			if err := b.Delete(s.key(completeKey, h), nil); err != nil {
				return err
			}
		}
		for h := range d.young {
			if err := b.Delete(s.key(completeKey, h), nil); err != nil {
				return err
			}
		}
		return nil
	}); err != nil {
		return err
	}
	for len(d.old) > 0 {
		if err := pause(ctx, 0); err != nil {
			return err
		}
		removed, freed := 0, int64(0)
		if err := s.exclusively(d, func(b *pebble.Batch) error {
			for h, size := range d.old {
				for _, kind := range []byte{headKey, dataKey, completeKey} {
					if err := b.Delete(s.key(kind, h), nil); err != nil {
						return err
					}
				}
				delete(d.old, h)
				removed++
				freed += size
				if removed == sweepChunk {
					break
				}
			}
			return nil
		}); err != nil {
			return err
		}
		s.stats.sub(int64(removed), freed)
		sw.Removed += removed
		sw.Freed += freed
	}
	return nil
}

// exclusively spares what was relied on lately and then commits what f puts into the batch, while nobody can come to rely on more.
// Most of the sparing is done before the lock is taken.
func (s *Store) exclusively(d *doomed, f func(*pebble.Batch) error) error {
	if err := s.spare(d); err != nil {
		return err
	}
	s.sweeping.Lock()
	defer s.sweeping.Unlock()
	if err := s.spare(d); err != nil {
		return err
	}
	b := s.db.NewBatch()
	if err := f(b); err != nil {
		return errors.Join(err, b.Close())
	}
	// Not synced: the log keeps the order, so a crash brings back the last removals only, never a mark without its nodes.
	if b.Empty() {
		return b.Close()
	}
	return errors.Join(s.lazily(b), b.Close())
}

// spare takes everything off the list that is below a node relied on since the collection began.
func (s *Store) spare(d *doomed) error {
	todo := s.pins.logged()
	for len(todo) > 0 {
		h := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		d.spare(h)
		hd, ok, err := s.headOf(h)
		if err != nil {
			return err
		}
		if !ok {
			continue
		}
		for _, l := range hd.links {
			if d.has(l.Hash) {
				todo = append(todo, l.Hash)
			}
		}
	}
	return nil
}

// recount counts what was stored before the start, once, in the background.
func (s *Store) recount(ctx context.Context) (err error) {
	s.sweeping.Lock() // nothing is added between the snapshot and the look at what was added before it
	snapshot := s.db.NewSnapshot()
	nodes, bytes := -s.stats.nodes.Load(), -s.stats.bytes.Load()
	s.sweeping.Unlock()
	defer func() { err = errors.Join(err, snapshot.Close()) }()
	n := 0
	err = s.eachHead(snapshot, func(_ Hash, hd head) error {
		n++
		nodes++
		bytes += int64(hd.size)
		return pause(ctx, n)
	})
	if err == nil {
		s.stats.counted(nodes, bytes)
	}
	return err
}
