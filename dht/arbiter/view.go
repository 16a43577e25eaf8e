package arbiter

import (
	"context"
	"errors"
	"slices"
	"sync"
	"sync/atomic"

	iradix "github.com/hashicorp/go-immutable-radix"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/internal/planted"
)

// maxRing bounds the changes kept for followers that come back.
const maxRing = 1 << 14

// point orders states: (incarnation, index), compared lexicographically.
type point struct{ inc, index uint64 }

func (p point) before(q point) bool { return p.inc < q.inc || p.inc == q.inc && p.index < q.index }

// view is the local state that Get, List and Watch show. It is fed by the node's own machine while that is current, and by a voter's
// feed otherwise; it never goes back.
type view struct {
	state atomic.Pointer[viewState]
	watch watchers

	mu       sync.Mutex    // guards the rest and serialises publication; watchers are called with it held
	advanced chan struct{} // closed and replaced at each publication
	ring     []change      // recent changes, while fromRaft
	base     uint64        // all changes after this index are in the ring
}

// viewState is one immutable state.
type viewState struct {
	tree     *iradix.Tree
	meta     meta
	at       point
	complete uint64 // no change up to here is missing; below at.index only on followers, for checkpoints held back
	fromRaft bool
	former   []peer.ID // that ever voted; of the own machine only
	voted    []peer.ID // that voted in this incarnation; likewise
}

func newView() *view {
	v := &view{advanced: make(chan struct{})}
	v.state.Store(&viewState{tree: iradix.New()})
	return v
}

func (v *view) now() *viewState { return v.state.Load() }

func (v *view) get(key string) *Register { return treeGet(v.now().tree, key) }

func (v *view) list(prefix string) []Register {
	var out []Register
	v.now().tree.Root().WalkPrefix([]byte(prefix), func(_ []byte, r any) bool {
		out = append(out, *r.(*Register))
		return false
	})
	return out
}

// machineState is what a machine shows.
func machineState(m *machine) *viewState {
	return &viewState{tree: m.tree, meta: m.meta, at: point{m.meta.Incarnation, m.index}, complete: m.index, fromRaft: true, former: m.former, voted: m.voted}
}

// fromMachine shows what the machine applied. changes are those of the entries between the previous call and this one.
func (v *view) fromMachine(next *viewState, changes []change) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if st := v.now(); st.fromRaft {
		if !st.at.before(next.at) {
			return // takeMachine was faster, and has told of these changes
		}
		v.remember(changes)
		v.publish(next, changes)
		return
	}
	v.takeLocked(next)
}

// takeMachine shows a whole state of the machine: one that was installed, or that is current again.
func (v *view) takeMachine(next *viewState) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.takeLocked(next)
}

func (v *view) takeLocked(next *viewState) {
	st := v.now()
	if (next.at.before(st.at) || st.fromRaft && next.at == st.at) && !planted.Bug("view-goes-back") {
		return // the machine is still catching up with what is known already
	}
	v.ring, v.base = nil, next.at.index
	v.publish(next, difference(st, next))
}

// fromDisk shows what is known to have been committed, before raft is heard.
func (v *view) fromDisk(m *machine) {
	v.mu.Lock()
	defer v.mu.Unlock()
	next := &viewState{tree: m.tree, meta: m.meta, at: point{m.meta.Incarnation, m.index}, complete: m.index}
	v.publish(next, difference(v.now(), next))
}

// leaveMachine stops showing the machine's state, which is no longer current.
func (v *view) leaveMachine() {
	v.mu.Lock()
	defer v.mu.Unlock()
	st := *v.now()
	if !st.fromRaft {
		return
	}
	st.fromRaft = false
	v.ring = nil
	v.publish(&st, nil)
}

// outrank has whatever comes of a higher lineage count as newer: of two incarnations of the same number the log indices do not tell. It
// may be called again for the same one.
func (v *view) outrank(in incarnation) {
	v.mu.Lock()
	defer v.mu.Unlock()
	st := *v.now()
	if at := st.meta.incarnation(); at.number != in.number || !at.before(in) {
		return
	}
	st.at, st.complete, st.fromRaft = point{in.number - 1, st.at.index}, 0, false
	v.ring = nil
	v.publish(&st, nil)
}

// errOtherLife is returned for changes of another incarnation than the one shown. Nothing of two is ever mixed: the whole is needed.
var errOtherLife = errors.New("the feed's changes are of another incarnation than what is shown")

// fromFeed shows a feed's update.
func (v *view) fromFeed(u *feedUpdate) error {
	v.mu.Lock()
	defer v.mu.Unlock()
	st := v.now()
	if st.fromRaft {
		return nil // the machine has caught up meanwhile
	}
	if u.whole == nil && u.life != st.meta.incarnation() {
		return errOtherLife
	}
	next := *st
	if u.whole != nil && u.at.before(st.at) {
		// From a feeder that is behind with what is told at once. What an earlier feeder held back it may have, and does not send again: it takes this for
		// the follower's state.
		if u.life == st.meta.incarnation() && u.complete > st.complete {
			changes := caughtUp(st, u.whole)
			next.tree, next.complete = edited(st.tree, changes), u.complete
			v.publish(&next, changes)
		}
		return nil
	}
	switch {
	case u.meta != nil && u.meta.incarnation() == u.life: // else it was read after another one began
		next.meta = *u.meta
	case u.whole != nil:
		next.meta = meta{Cluster: st.meta.Cluster, Format: st.meta.Format, Incarnation: u.life.number, Lineage: u.life.lineage}
	}
	var changes []change
	if u.whole != nil {
		next.tree, next.at, next.complete = u.whole, u.at, u.complete
		changes = difference(st, &next)
	} else {
		changes = newer(st, u.registers)
		next.tree = edited(st.tree, changes)
		if st.at.before(u.at) {
			next.at = u.at
		}
		if u.at.inc >= st.at.inc {
			next.complete = max(st.complete, u.complete)
		}
	}
	v.publish(&next, changes)
	return nil
}

// newer turns a feed's registers into changes, leaving out what is known: what is not newer than the register here, and what is not
// here although everything up to then is: it was deleted since.
func newer(st *viewState, regs []*Register) []change {
	var out []change
	for _, r := range regs {
		old := treeGet(st.tree, r.Key)
		known := point{st.at.inc, st.complete}
		if old != nil {
			known = point{old.Incarnation, old.Index}
		}
		if !known.before(point{r.Incarnation, r.Index}) {
			continue
		}
		if r.Deleted {
			if old != nil {
				out = append(out, change{key: r.Key, old: old, index: r.Index})
			}
			continue
		}
		out = append(out, change{key: r.Key, old: old, new: r, index: r.Index})
	}
	return out
}

// caughtUp is what a whole state that is behind knows better: newer versions of registers that are here. What is not here is no news, it was deleted since; nor
// is what is there no more, for deletions are never held back.
func caughtUp(st *viewState, whole *iradix.Tree) []change {
	var out []change
	it := whole.Root().Iterator()
	for _, v, ok := it.Next(); ok; _, v, ok = it.Next() {
		r := v.(*Register)
		if old := treeGet(st.tree, r.Key); old != nil && (point{old.Incarnation, old.Index}).before(point{r.Incarnation, r.Index}) {
			out = append(out, change{key: r.Key, old: old, new: r, index: r.Index})
		}
	}
	return out
}

func edited(t *iradix.Tree, changes []change) *iradix.Tree {
	if len(changes) == 0 {
		return t
	}
	x := t.Txn()
	for _, c := range changes {
		if c.new == nil {
			x.Delete([]byte(c.key))
		} else {
			x.Insert([]byte(c.key), c.new)
		}
	}
	return x.CommitOnly()
}

// difference lists what differs between two states, ordered by key.
func difference(from, to *viewState) []change {
	var out []change
	a, b := from.tree.Root().Iterator(), to.tree.Root().Iterator()
	// Of two lineages, number and index do not tell whether a register is the same one.
	strangers := from.meta.incarnation() != to.meta.incarnation()
	_, av, aok := a.Next()
	_, bv, bok := b.Next()
	for aok || bok {
		var x, y *Register
		if aok {
			x = av.(*Register)
		}
		if bok {
			y = bv.(*Register)
		}
		switch {
		case y == nil || x != nil && x.Key < y.Key:
			out = append(out, change{key: x.Key, old: x, index: x.Index})
			_, av, aok = a.Next()
		case x == nil || y.Key < x.Key:
			out = append(out, change{key: y.Key, new: y, index: y.Index})
			_, bv, bok = b.Next()
		default:
			if x != y && (strangers || x.Index != y.Index || x.Incarnation != y.Incarnation) {
				out = append(out, change{key: x.Key, old: x, new: y, index: y.Index})
			}
			_, av, aok = a.Next()
			_, bv, bok = b.Next()
		}
	}
	return out
}

func (v *view) remember(changes []change) {
	v.ring = append(v.ring, changes...)
	if n := len(v.ring) - maxRing; n > maxRing/4 { // a quarter at a time
		v.base = v.ring[n-1].index
		v.ring = slices.Clone(v.ring[n:])
	}
}

// publish makes next current and tells everybody. The caller holds mu.
func (v *view) publish(next *viewState, changes []change) {
	v.state.Store(next)
	close(v.advanced)
	v.advanced = make(chan struct{})
	for _, f := range v.watch.all() {
		for _, c := range changes {
			f(c.old, c.new)
		}
	}
}

// since returns the changes after index with the state that they lead to; false when they are not kept any more, or when the view is
// not the machine's. The channel closes at the next publication.
func (v *view) since(index uint64) ([]change, *viewState, <-chan struct{}, bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	st := v.now()
	if !st.fromRaft || index < v.base {
		return nil, st, v.advanced, false
	}
	i, _ := slices.BinarySearchFunc(v.ring, index+1, func(c change, want uint64) int {
		if c.index < want {
			return -1
		}
		return 1
	})
	return v.ring[i:len(v.ring):len(v.ring)], st, v.advanced, true
}

// changedSignal returns the channel that closes at the next publication.
func (v *view) changedSignal() <-chan struct{} {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.advanced
}

// wait returns when the view holds everything up to p.
func (v *view) wait(ctx context.Context, p point) error {
	for {
		next := v.changedSignal()
		st := v.now()
		if st.at.inc > p.inc || st.at.inc == p.inc && st.complete >= p.index {
			return nil
		}
		select {
		case <-next:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// watchers is a list of callbacks.
type watchers struct {
	mu   sync.Mutex // guards next and changes of list
	next uint64
	list atomic.Pointer[[]watcher]
}

type watcher struct {
	id uint64
	f  func(old, new *Register)
}

func (w *watchers) add(f func(old, new *Register)) (cancel func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.next++
	id := w.next
	var list []watcher
	if p := w.list.Load(); p != nil {
		list = slices.Clone(*p)
	}
	list = append(list, watcher{id, f})
	w.list.Store(&list)
	return func() { w.remove(id) }
}

func (w *watchers) remove(id uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	list := slices.DeleteFunc(slices.Clone(*w.list.Load()), func(x watcher) bool { return x.id == id })
	w.list.Store(&list)
}

func (w *watchers) all() []func(old, new *Register) {
	p := w.list.Load()
	if p == nil {
		return nil
	}
	out := make([]func(old, new *Register), len(*p))
	for i, x := range *p {
		out[i] = x.f
	}
	return out
}
