package sim

import (
	"fmt"
	"slices"
	"sync"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/arbiter"
)

// observers look at everything that any node shows of the registers, and hold it against I1, I2, I8 and I9 (docs/testing.md).
type observers struct {
	w  *world
	mu sync.Mutex // guards the rest
	// owners is who made an epoch: by (incarnation, key, epoch). epochs is the other way round: by (key, nonce).
	owners map[string]string
	epochs map[string]string
	by     map[string]peer.ID // who owns: by (incarnation, key, epoch)
	roots  map[string]string  // by (incarnation, key, seq)
	acked  map[string]uint64  // by key: the highest seq that a client was told is committed
	newest map[string]uint64  // by key: the highest seq that any node showed
}

func newObservers(w *world) *observers {
	return &observers{w: w, owners: map[string]string{}, epochs: map[string]string{}, by: map[string]peer.ID{}, roots: map[string]string{}, acked: map[string]uint64{}, newest: map[string]uint64{}}
}

// sight is what one life of a node showed of a register last.
type sight struct{ inc, index, epoch uint64 }

// watch looks at what a life shows from now on, and at what it shows already.
func (o *observers) watch(l *life) {
	var mu sync.Mutex
	last := map[string]sight{}
	see := func(r *arbiter.Register) {
		mu.Lock()
		was, now := last[r.Key], sight{r.Incarnation, r.Index, r.Epoch}
		last[r.Key] = now
		mu.Unlock()
		if now.inc < was.inc || now.inc == was.inc && now.index < was.index {
			o.w.failf("I9: %s showed %s as of %d/%d after %d/%d", l.n.name, r.Key, now.inc, now.index, was.inc, was.index)
		}
		if now.inc == was.inc && now.epoch < was.epoch {
			o.w.failf("I1: %s showed %s in epoch %d after %d", l.n.name, r.Key, now.epoch, was.epoch)
		}
		o.saw(l.n, r)
	}
	l.arb.Watch(func(_, now *arbiter.Register) {
		if now != nil {
			see(now)
		}
	})
	for _, r := range l.arb.List("") {
		o.saw(l.n, &r)
	}
}

// saw holds one register against what was seen of it before, anywhere.
func (o *observers) saw(n *node, r *arbiter.Register) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if r.Epoch > 0 && r.Nonce != 0 {
		epoch := fmt.Sprintf("%d/%s/%d", r.Incarnation, r.Key, r.Epoch)
		maker := fmt.Sprintf("nonce %x", r.Nonce)
		if was, known := o.owners[epoch]; known && was != maker {
			o.w.failf("I1: %s shows epoch %s made by %s; it was made by %s", n.name, epoch, maker, was)
		}
		o.owners[epoch] = maker
		if r.Owner != "" {
			if was, known := o.by[epoch]; known && was != r.Owner {
				o.w.failf("I1: %s shows %s as the owner of epoch %s; it was %s", n.name, o.w.named(r.Owner), epoch, o.w.named(was))
			}
			o.by[epoch] = r.Owner
		}
		// A register keeps its epoch when the arbiter goes on in another incarnation.
		nonce, number := fmt.Sprintf("%s/%x", r.Key, r.Nonce), fmt.Sprint(r.Epoch)
		if was, known := o.epochs[nonce]; known && was != number {
			o.w.failf("I1: the claim %s made epoch %s and epoch %s", nonce, was, number)
		}
		o.epochs[nonce] = number
	}
	if r.Seq > 0 {
		seq := fmt.Sprintf("%d/%s/%d", r.Incarnation, r.Key, r.Seq)
		if was, known := o.roots[seq]; known && was != string(r.Root) {
			o.w.failf("I2: %s shows %s with the root %q; it was %q", n.name, seq, r.Root, was)
		}
		o.roots[seq] = string(r.Root)
		o.newest[r.Key] = max(o.newest[r.Key], r.Seq)
	}
	if r.W > 0 {
		distinct := slices.Compact(slices.Sorted(slices.Values(r.Holders)))
		if len(distinct) == 0 {
			o.w.failf("I6: %s shows %s seq %d without any holder", n.name, r.Key, r.Seq)
		}
	}
}

// acknowledged notes that a client was told that a checkpoint is committed, with so many holders where w were needed.
func (o *observers) acknowledged(key string, seq uint64, holders []peer.ID, w uint32) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.acked[key] = max(o.acked[key], seq)
	if n := len(slices.Compact(slices.Sorted(slices.Values(holders)))); n < int(w) || w == 0 {
		o.w.failf("I6: %s seq %d was acknowledged with %d holders of %d", key, seq, n, w)
	}
}

func (o *observers) lastAcked(key string) uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.acked[key]
}

// ownerAt is who owned an epoch.
func (o *observers) ownerAt(inc uint64, key string, epoch uint64) (peer.ID, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	id, known := o.by[fmt.Sprintf("%d/%s/%d", inc, key, epoch)]
	return id, known
}

// group holds the configurations of the group, as the logs on disk have them, against I7: one change at a time, and nobody votes who has not
// learned first. It is asked when everything has stopped.
func (o *observers) group() (longest []arbiter.GroupChange) {
	for _, n := range o.w.all() {
		if n.isLost() {
			continue
		}
		list, err := arbiter.GroupChanges(n.fs, "raft")
		if err != nil {
			o.w.failf("the log of %s cannot be read: %v", n.name, err)
			continue
		}
		for i := 1; i < len(list); i++ {
			o.step(n, list[i-1], list[i])
		}
		if len(list) > len(longest) {
			longest = list
		}
	}
	return longest
}

func (o *observers) step(n *node, was, now arbiter.GroupChange) {
	came := slices.DeleteFunc(slices.Clone(now.Voters), func(id peer.ID) bool { return slices.Contains(was.Voters, id) })
	went := slices.DeleteFunc(slices.Clone(was.Voters), func(id peer.ID) bool { return slices.Contains(now.Voters, id) })
	if len(came)+len(went) > 1 {
		o.w.failf("I7: in the log of %s the voters change at %d from %v to %v: more than one at a time", n.name, now.Index, o.w.names(was.Voters), o.w.names(now.Voters))
	}
	for _, id := range came {
		if !slices.Contains(was.Learners, id) {
			o.w.failf("I7: in the log of %s %s votes from %d on and had not learned before", n.name, o.w.named(id), now.Index)
		}
	}
}
