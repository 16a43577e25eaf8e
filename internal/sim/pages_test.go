package sim

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/store"
)

// pagesKind is the blob stores alone: writers push trees that share parts to some of the others, which crash, are cut off and collect all the
// time. Whoever acknowledged a root must have all of it for as long as it is relied on, whatever its disk forgot.
var pagesKind = kind{"pages", func(s *schedule) { newPages(s).run() }}

// pinned is how long an acknowledgement holds in this kind: short, so that much is collected.
const pinned = 1500 * time.Millisecond

// pages is a world of blob stores.
type pages struct {
	*world

	stores sync.Map // *life -> *blobs.Store

	hist   sync.Mutex // guards the rest
	live   map[blobs.Hash]bool
	leaves []blobs.Link
	relied map[*node]map[blobs.Hash]time.Time // until when a node's acknowledgement holds
}

func newPages(s *schedule) *pages {
	g := &pages{world: newWorld(s), live: map[blobs.Hash]bool{}, relied: map[*node]map[blobs.Hash]time.Time{}}
	g.bare = g.open
	return g
}

// open makes a life that is a blob store and nothing else.
func (g *pages) open(n *node, l *life) error {
	disk, err := store.Open(n.fs, "db", store.Options{Log: l.log, CacheBytes: 1 << 20, MemTableBytes: 1 << 20})
	if err != nil {
		return err
	}
	b, err := blobs.Open(blobs.Config{Self: n.id, DB: disk.DB(), Peers: l.end, Log: l.log, PinFor: pinned, SweepEvery: 100 * time.Millisecond, Stall: 500 * time.Millisecond})
	if err != nil {
		return err
	}
	b.SetLive(g.liveRoots)
	g.stores.Store(l, b)
	l.runs = append(l.runs, b.Run)
	l.closes = append(l.closes, func() { _ = disk.Close() }, func() { _ = b.Close() }) // of a node that is gone
	return nil
}

func (g *pages) storeOf(n *node) *blobs.Store {
	if l := n.cur.Load(); l != nil && !l.frozen.Load() {
		if s, ok := g.stores.Load(l); ok {
			return s.(*blobs.Store)
		}
	}
	return nil
}

func (g *pages) liveRoots() []blobs.Hash {
	g.hist.Lock()
	defer g.hist.Unlock()
	out := []blobs.Hash{}
	for h := range g.live {
		out = append(out, h)
	}
	return out
}

func (g *pages) run() {
	defer g.close()
	g.net.SetTimeout(netTimeout)
	for range 3 + g.intn(2) {
		g.add()
	}
	for _, n := range g.all() {
		n.start(false)
	}
	end := time.Now().Add(g.between(4*time.Second, 8*time.Second))
	var writers sync.WaitGroup
	for i := range 2 {
		writers.Go(func() { g.write(i, end) })
	}
	g.goes.Go(g.look)
	f := newFaults(g.world, len(g.all()))
	f.choose("crash", "crash of all", "crash of some", "split", "isolation", "one way", "flapping", "loss", "delay", "freeze", "starvation")
	f.run(time.Until(end))
	writers.Wait()
	f.over()
	g.afterwards()
}

// write pushes trees until the end: each of some new pages, some that were written before, and perhaps the tree before.
func (g *pages) write(number int, end time.Time) {
	r := g.dice()
	var before []blobs.Link
	for time.Now().Before(end) && !g.failed() {
		time.Sleep(time.Duration(10+r.IntN(150)) * time.Millisecond)
		all := g.all()
		n := all[r.IntN(len(all))]
		s := g.storeOf(n)
		if s == nil {
			continue
		}
		var links []blobs.Link
		for range 1 + r.IntN(3) {
			l, err := s.Put(blobs.Node{Kind: "page", Data: fmt.Appendf(nil, "%d-%x", number, r.Uint64())})
			if err != nil {
				break
			}
			links = append(links, l)
		}
		g.hist.Lock()
		for _, l := range g.leaves {
			if r.IntN(4) == 0 {
				if ok, err := s.Has(l.Hash); err == nil && ok {
					links = append(links, l)
				}
			}
		}
		g.leaves = append(g.leaves, links...)
		if len(g.leaves) > 12 {
			g.leaves = g.leaves[len(g.leaves)-12:]
		}
		g.hist.Unlock()
		for _, l := range before {
			if s.Complete(l.Hash) && r.IntN(2) == 0 {
				links = append(links, l)
			}
		}
		root, err := s.Put(blobs.Node{Kind: "root", Links: links})
		if err != nil || !s.Complete(root.Hash) {
			continue
		}
		before = []blobs.Link{root}
		g.push(s, n, root.Hash, r.IntN(3) > 0)
	}
}

// push brings a root to all others and relies on those who acknowledge it.
func (g *pages) push(s *blobs.Store, from *node, root blobs.Hash, keep bool) {
	var to []peer.ID
	for _, n := range g.all() {
		if n != from {
			to = append(to, n.id)
		}
	}
	ctx, cancel := within(time.Second)
	defer cancel()
	began := time.Now() // the acknowledgement may be older than its arrival
	acked, err := s.Push(ctx, root, to, min(2, len(to)))
	g.logf("%s pushed %s: %v %v", from.name, root.Short(), g.names(acked), err)
	g.hist.Lock()
	defer g.hist.Unlock()
	if keep && len(acked) >= 2 && time.Since(began) < pinned/2 {
		g.live[root] = true
	}
	for _, id := range acked {
		n := g.of(id)
		if g.relied[n] == nil {
			g.relied[n] = map[blobs.Hash]time.Time{}
		}
		until := began.Add(pinned - 100*time.Millisecond)
		if g.live[root] {
			until = time.Now().Add(time.Hour)
		}
		g.relied[n][root] = until
	}
	for h := range g.live { // what was live long enough is let go, for the collector
		if len(g.live) > 4 && h != root {
			delete(g.live, h)
			for _, by := range g.relied {
				delete(by, h)
			}
		}
	}
}

// look asserts I6 on everybody who runs, again and again.
func (g *pages) look() {
	for {
		select {
		case <-time.After(150 * time.Millisecond):
		case <-g.ctx.Done():
			return
		}
		g.assert()
	}
}

func (g *pages) assert() {
	for _, n := range g.all() {
		s := g.storeOf(n)
		if s == nil {
			continue
		}
		g.hist.Lock()
		var roots []blobs.Hash
		for h, until := range g.relied[n] {
			if time.Now().Before(until) {
				roots = append(roots, h)
			} else {
				delete(g.relied[n], h)
			}
		}
		g.hist.Unlock()
		slices.SortFunc(roots, func(a, b blobs.Hash) int { return slices.Compare(a[:], b[:]) })
		for _, h := range roots {
			missing, err := lacks(s, h)
			if g.storeOf(n) != s {
				break
			}
			g.hist.Lock()
			until, still := g.relied[n][h]
			g.hist.Unlock()
			if err == nil && missing > 0 && still && time.Now().Before(until) {
				g.failf("I6: %s acknowledged %s and lacks %d nodes of it", n.name, h.Short(), missing)
				return
			}
		}
	}
}

// afterwards asserts that what is live can be fetched by everybody.
func (g *pages) afterwards() {
	begun := time.Now()
	g.hist.Lock()
	var roots []blobs.Hash
	for h := range g.live {
		roots = append(roots, h)
	}
	g.hist.Unlock()
	slices.SortFunc(roots, func(a, b blobs.Hash) int { return slices.Compare(a[:], b[:]) })
	var ids []peer.ID
	for _, n := range g.all() {
		ids = append(ids, n.id)
	}
	for _, n := range g.all() {
		s := g.storeOf(n)
		for _, h := range roots {
			ctx, cancel := within(healed)
			err := s.Fetch(ctx, h, ids)
			cancel()
			if missing, lerr := lacks(s, h); err != nil || lerr != nil || missing > 0 {
				g.failf("I10: %s cannot fetch %s after healing: %v, %d nodes are missing (%v)", n.name, h.Short(), err, missing, lerr)
				return
			}
			g.count.Answers++
		}
	}
	g.count.Heal = time.Since(begun)
	g.assert()
}
