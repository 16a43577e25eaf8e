package records

import (
	"bytes"
	"math/bits"
	"slices"
	"sync"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/keys"
	"github.com/coppice-project/coppice/dht/members"
)

// View is what this package needs of the member view. Members are alive ones that may hold, this node included.
type View interface {
	// Alive returns the members that the view knows.
	Alive() []peer.ID
	// Closest returns the n members closest to the key of those that the view knows, closest first, and whether they are the closest
	// of all that there are. Where they may not be, Config.Route is asked.
	Closest(key string, n int) (ids []peer.ID, sure bool)
	// OnChange calls f, which does not block, after the set of such members may have changed.
	OnChange(f func()) (cancel func())
}

// FromMembers is the View of the member table: members that are alive, or merely suspect, and not told to hold nothing. It is whole, so
// it is always sure.
func FromMembers(m *members.Members) View { return memberView{m} }

type memberView struct{ m *members.Members }

func holds(m members.Member) bool { return !m.NoHolder }

func (v memberView) Alive() []peer.ID {
	var ids []peer.ID
	for _, m := range v.m.Alive() {
		if holds(m) {
			ids = append(ids, m.ID)
		}
	}
	return ids
}

func (v memberView) Closest(key string, n int) ([]peer.ID, bool) {
	list := v.m.Closest(key, n, holds)
	ids := make([]peer.ID, len(list))
	for i, m := range list {
		ids[i] = m.ID
	}
	return ids, true
}

func (v memberView) OnChange(f func()) (cancel func()) {
	return v.m.Subscribe(func(members.Change) { f() })
}

// MinView is the smallest cap of a view: all who hold a key must be among a node's neighbours, and every far part of the key space be
// known by one member at least.
const MinView = 16

// Cap limits a whole view to most members (MinView at least): three quarters are those closest to self, its neighbourhood, and the rest
// are spread over the other parts of the key space, so that a lookup has where to start. Such a view is sure of the keys that lie in its
// neighbourhood, which are those that the node itself holds, and of all keys while there are no more members than it may know.
func Cap(whole View, self peer.ID, most int) View {
	v := &capped{whole: whole, self: keys.OfPeer(self), most: max(most, MinView)}
	whole.OnChange(v.look) // for as long as the whole view lives
	v.look()
	return v
}

type capped struct {
	whole View
	self  keys.Point
	most  int

	mu     sync.Mutex // guards the rest
	known  []peer.ID  // closest to self first
	all    bool       // they are all
	prefix int        // every member whose point shares so many bits with self's is known …
	inside int        // … and these are so many
	subs   []*func()
}

func (v *capped) Alive() []peer.ID {
	v.mu.Lock()
	defer v.mu.Unlock()
	return slices.Clone(v.known)
}

func (v *capped) Closest(key string, n int) ([]peer.ID, bool) {
	target := keys.Of(key)
	v.mu.Lock()
	ids := slices.Clone(v.known)
	// Whoever shares more bits with the key than another is closer to it, so with n members in the neighbourhood nobody outside is
	// among the n closest to a key in it.
	sure := v.all || v.inside >= n && shared(keys.Distance(v.self, target)) >= v.prefix
	v.mu.Unlock()
	ids = keys.Sort(target, ids)
	return ids[:min(n, len(ids))], sure
}

func (v *capped) OnChange(f func()) (cancel func()) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.subs = append(v.subs, &f)
	return func() {
		v.mu.Lock()
		defer v.mu.Unlock()
		v.subs = slices.DeleteFunc(slices.Clone(v.subs), func(o *func()) bool { return o == &f })
	}
}

// look chooses anew whom to know, and tells of it where that differs.
func (v *capped) look() {
	ids := v.whole.Alive()
	v.mu.Lock()
	before, all := v.known, v.all
	v.choose(ids)
	var tell []*func()
	if all != v.all || !slices.Equal(before, v.known) {
		tell = slices.Clone(v.subs)
	}
	v.mu.Unlock()
	for _, f := range tell {
		(*f)()
	}
}

// shared returns how many leading bits two points at that distance have in common.
func shared(distance keys.Point) int {
	for i, b := range distance {
		if b != 0 {
			return 8*i + bits.LeadingZeros8(b)
		}
	}
	return 8 * len(distance)
}

// placed is a member and its distance from self.
type placed struct {
	id peer.ID
	d  keys.Point
}

// choose is called with mu held.
func (v *capped) choose(ids []peer.ID) {
	list := make([]placed, len(ids))
	for i, id := range ids {
		list[i] = placed{id, keys.Distance(v.self, keys.OfPeer(id))}
	}
	slices.SortFunc(list, func(a, b placed) int { return bytes.Compare(a.d[:], b.d[:]) })
	near := len(list)
	v.all, v.prefix, v.inside = near <= v.most, 0, near
	if !v.all {
		near = v.most - v.most/4
		for near > 5 && len(parts(list[near:])) > v.most-near { // to know somebody in each part comes next to the holders of one's own keys
			near--
		}
		v.prefix, v.inside = shared(list[near].d)+1, 0
		for v.inside < near && shared(list[v.inside].d) >= v.prefix {
			v.inside++
		}
	}
	v.known = make([]peer.ID, 0, min(len(list), v.most))
	for _, m := range list[:near] {
		v.known = append(v.known, m.id)
	}
	far := parts(list[near:])
	for len(v.known) < min(len(list), v.most) {
		for i, part := range slices.Backward(far) { // the far ones first: each of them stands for more
			if len(part) > 0 && len(v.known) < v.most {
				v.known, far[i] = append(v.known, part[0].id), part[1:]
			}
		}
	}
}

// parts divides members, which are in order of their distance, by how many bits they share with self.
func parts(list []placed) [][]placed {
	var out [][]placed
	last := -1
	for i, m := range list {
		if s := shared(m.d); s != last {
			out, last = append(out, nil), s
		}
		out[len(out)-1] = append(out[len(out)-1], list[i])
	}
	return out
}
