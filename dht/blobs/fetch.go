package blobs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

const (
	// fetchBatch nodes, or fetchBytes by what their links say, are asked of a holder at a time.
	fetchBatch = 64
	fetchBytes = getAnswer
	// fetchLanes questions are under way to one holder.
	fetchLanes = 2
	// fetchFailures in a row make a fetch give up a holder.
	fetchFailures = 3
	fetchRounds   = 3
)

// Fetch brings everything below root here, from several holders at once, and returns when it is complete and on disk. What is here is
// not asked for, so a fetch that was interrupted goes on where it stopped. Each node is verified; one that a holder lacks or has
// corrupt is asked of the others. The error is a *MissingError where no holder has a node, or says why each holder failed.
func (s *Store) Fetch(ctx context.Context, root Hash, from []peer.ID) error {
	if !s.work.enter() {
		return ErrClosed
	}
	defer s.work.leave()
	ctx, cancel := s.work.join(ctx)
	defer cancel()
	name := "fetch/" + root.String()
	s.pins.hold(name, s.cfg.PinFor, []Hash{root})
	for range fetchRounds {
		ok, err := s.complete(root)
		if err != nil {
			return fmt.Errorf("fetch %s: %w", root.Short(), err)
		}
		if ok {
			s.pins.pin(root)
			s.pins.release(name)
			return nil
		}
		f := s.newFetch(from, true)
		f.renew = func() { s.pins.hold(name, s.cfg.PinFor, []Hash{root}) }
		if err := f.run(ctx, []Hash{root}); err != nil {
			return fmt.Errorf("fetch %s: %w", root.Short(), err)
		}
	}
	return fmt.Errorf("fetch %s: nodes below it keep getting lost here; see the log for corrupt nodes", root.Short())
}

// FetchPages brings single nodes here, without what is below them.
func (s *Store) FetchPages(ctx context.Context, hashes []Hash, from []peer.ID) error {
	if !s.work.enter() {
		return ErrClosed
	}
	defer s.work.leave()
	ctx, cancel := s.work.join(ctx)
	defer cancel()
	f := s.newFetch(from, false)
	if err := f.run(ctx, hashes); err != nil {
		return fmt.Errorf("fetch %d nodes: %w", len(hashes), err)
	}
	return s.durable(s.wal.now())
}

type wanted struct {
	hash Hash
	size uint64 // what a link said, for all below too; 0 where unknown
}

// fetching is one fetch: a stack of what is to be got, shared by the lanes of all holders.
type fetching struct {
	s     *Store
	from  []peer.ID
	deep  bool
	renew func()

	mu      sync.Mutex // guards all below
	todo    []wanted   // last first, so that memory stays small
	seen    map[Hash]struct{}
	without map[Hash][]peer.ID // holders that lack a node
	flying  int
	holders map[peer.ID]int // failures in a row of those still used
	why     map[peer.ID]error
	err     error
	change  chan struct{} // closed and replaced when something above changed
}

func (s *Store) newFetch(from []peer.ID, deep bool) *fetching {
	f := &fetching{
		s: s, deep: deep, renew: func() {}, seen: map[Hash]struct{}{}, without: map[Hash][]peer.ID{},
		holders: map[peer.ID]int{}, why: map[peer.ID]error{}, change: make(chan struct{}),
	}
	for _, id := range from {
		if _, ok := f.holders[id]; !ok && id != s.cfg.Self {
			f.holders[id] = 0
			f.from = append(f.from, id)
		}
	}
	return f
}

func (f *fetching) run(ctx context.Context, start []Hash) error {
	for _, h := range start {
		if err := f.need(wanted{hash: h}); err != nil {
			return err
		}
	}
	if len(f.todo) == 0 {
		return nil
	}
	if len(f.from) == 0 {
		return &MissingError{Hash: f.todo[0].hash}
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	for _, id := range f.from {
		for range fetchLanes {
			wg.Go(func() { f.lane(ctx, id) })
		}
	}
	wg.Wait()
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.err != nil {
		return f.err
	}
	if err := ctx.Err(); err != nil {
		return errors.Join(err, f.reasons())
	}
	if len(f.todo) > 0 || f.flying > 0 {
		return fmt.Errorf("all %d holders failed: %w", len(f.from), f.reasons())
	}
	return nil
}

func (f *fetching) reasons() error {
	var errs []error
	for _, id := range f.from {
		if err := f.why[id]; err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", id, err))
		}
	}
	return errors.Join(errs...)
}

// need notes what has to be got for a node to be complete: itself, or what is below it where it is here. Called under mu, or before
// the lanes run.
func (f *fetching) need(w wanted) error {
	for todo := []wanted{w}; len(todo) > 0; {
		w := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		if _, ok := f.seen[w.hash]; ok {
			continue
		}
		f.seen[w.hash] = struct{}{}
		hd, ok, err := f.s.headOf(w.hash)
		if err != nil {
			return err
		}
		if !ok {
			f.todo = append(f.todo, w)
			continue
		}
		if !f.deep || len(hd.links) == 0 {
			continue
		}
		if done, err := f.s.rely(w.hash, false); err != nil || done {
			if err != nil {
				return err
			}
			continue
		}
		for i := len(hd.links) - 1; i >= 0; i-- {
			todo = append(todo, wanted{hd.links[i].Hash, hd.links[i].Bytes})
		}
	}
	return nil
}

// lane gets from one holder until nothing is left, or the holder is given up.
func (f *fetching) lane(ctx context.Context, id peer.ID) {
	for {
		batch, wait := f.take(id)
		if batch == nil && wait == nil {
			return
		}
		if batch == nil {
			select {
			case <-wait:
			case <-ctx.Done():
				return
			}
			continue
		}
		got, err := f.get(ctx, id, batch)
		if !f.put(id, batch, got, err) || ctx.Err() != nil {
			return
		}
		if err != nil {
			select {
			case <-time.After(pushBackoff):
			case <-ctx.Done():
				return
			}
		}
	}
}

// take returns what to ask of a holder; or what to wait on; or neither, where it has nothing more to do.
func (f *fetching) take(id peer.ID) ([]wanted, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if _, ok := f.holders[id]; !ok || f.err != nil || (len(f.todo) == 0 && f.flying == 0) {
		return nil, nil
	}
	var batch []wanted
	var size uint64
	for i := len(f.todo) - 1; i >= 0 && len(batch) < fetchBatch && size < fetchBytes; i-- {
		w := f.todo[i]
		if slices.Contains(f.without[w.hash], id) {
			continue
		}
		f.todo = slices.Delete(f.todo, i, i+1)
		batch = append(batch, w)
		size += min(w.size, MaxData)
	}
	if batch == nil {
		return nil, f.change
	}
	f.flying += len(batch)
	return batch, nil
}

// get asks a holder and keeps what it has; the result tells for each of a prefix of the batch whether it did.
func (f *fetching) get(ctx context.Context, id peer.ID, batch []wanted) ([]bool, error) {
	f.renew()
	hashes := make([]Hash, len(batch))
	for i, w := range batch {
		hashes[i] = w.hash
	}
	x, _, err := f.s.pool.get(ctx, id, fetch)
	if err != nil {
		return nil, err
	}
	a, err := x.ask(ctx, &wirev1.BlobAsk{Body: &wirev1.BlobAsk_Get{Get: &wirev1.BlobGet{Hashes: packHashes(hashes)}}}, nil)
	if err != nil {
		return nil, err
	}
	nodes := a.GetGet().GetNodes()
	if len(nodes) == 0 || len(nodes) > len(batch) {
		err := fmt.Errorf("%d nodes in answer to %d", len(nodes), len(batch))
		x.fail(err)
		return nil, err
	}
	return f.keep(id, hashes, nodes)
}

func (f *fetching) keep(id peer.ID, hashes []Hash, nodes [][]byte) ([]bool, error) {
	got := make([]bool, len(nodes))
	f.s.sweeping.RLock()
	defer f.s.sweeping.RUnlock()
	st := f.s.newStager(!f.deep)
	for i, enc := range nodes {
		if len(enc) == 0 {
			continue
		}
		if hashOf(enc) != hashes[i] {
			f.s.stats.garbage.Add(1)
			f.s.cfg.Log.Warn("a holder sent a node that is not what it was asked for", "from", id, "node", hashes[i].String())
			continue
		}
		if _, _, err := st.add(enc); err != nil {
			continue // no valid node has this name: nobody can deliver it
		}
		got[i] = true
	}
	if err := st.applyLazily(); err != nil {
		st.drop()
		return nil, err
	}
	f.s.stats.received.Add(uint64(len(nodes)))
	return got, nil
}

// put takes the outcome of a batch; false: the holder is given up.
func (f *fetching) put(id peer.ID, batch []wanted, got []bool, err error) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer func() {
		close(f.change)
		f.change = make(chan struct{})
	}()
	f.flying -= len(batch)
	for i, w := range batch {
		switch {
		case i >= len(got):
			f.todo = append(f.todo, w)
		case !got[i]:
			f.without[w.hash] = append(f.without[w.hash], id)
			f.todo = append(f.todo, w)
			f.check(w.hash)
		case f.deep:
			delete(f.seen, w.hash)
			if err := f.need(w); err != nil {
				f.err = err
			}
		}
	}
	if err == nil {
		if _, ok := f.holders[id]; ok {
			f.holders[id] = 0
		}
		return true
	}
	f.why[id] = err
	if n, ok := f.holders[id]; ok && n+1 < fetchFailures && f.s.cfg.Alive(id) {
		f.holders[id]++
		return true
	}
	delete(f.holders, id)
	for _, w := range f.todo {
		f.check(w.hash)
	}
	return false
}

// check ends the fetch where none of the holders left has a node.
func (f *fetching) check(h Hash) {
	without := f.without[h]
	for id := range f.holders {
		if !slices.Contains(without, id) {
			return
		}
	}
	if f.err == nil && len(without) > 0 {
		f.err = &MissingError{Hash: h, Asked: without}
	}
}
