package assign

import (
	"cmp"
	"math"
	"math/rand/v2"
	"slices"
)

// How many nodes construction looks at for a replica, besides those that its neighbours and it itself are on.
const (
	lookUsed = 48 // that have replicas
	lookNew  = 12 // of each region, that have none
)

// keep puts replicas where they are now, as far as they may be there; those on pinned nodes first.
func (s *state) keep() {
	for c := range s.p.parts {
		k := &s.p.parts[c]
		for _, o := range k.old {
			for range o.count {
				if r := s.missing(c); r >= 0 && s.fits(c, -1, o.node) {
					s.move(c, r, o.node)
				}
			}
		}
	}
}

// pin puts a replica on each pinned node and holds it there.
func (s *state) pin() {
	for c := range s.p.parts {
		for _, n := range s.p.parts[c].Pinned {
			r := -1
			for x, at := range s.at[c] {
				if at == n && !s.fixed[c][x] {
					r = x
					break
				}
			}
			if r < 0 && s.count(c, n) > 0 {
				continue // pinned twice
			}
			if r < 0 {
				if r = s.spare(c); r < 0 || !s.room(c, s.at[c][r], n) {
					continue
				}
				s.move(c, r, n)
			}
			s.fixed[c][r] = true
		}
	}
}

// unpinned counts pinned nodes without a replica.
func (s *state) unpinned() int {
	n := 0
	for c := range s.p.parts {
		for _, node := range s.p.parts[c].Pinned {
			if s.count(c, node) == 0 {
				n++
			}
		}
	}
	return n
}

// room makes room for a replica of c on node n by putting others nowhere.
func (s *state) room(c int, from, n int32) bool {
	for !s.fits(c, from, n) {
		d, r := s.victim(c, n)
		if d < 0 {
			return false
		}
		s.move(d, r, -1)
	}
	return true
}

// victim is a replica on node n that may go for one of c: what must not be beside it, else the largest.
func (s *state) victim(c int, n int32) (int, int) {
	found, size := -1, math.Inf(-1)
	for _, t := range s.on[n] {
		d := int(t.comp)
		v := float64(s.p.parts[d].CPU) + float64(s.p.parts[d].Memory)
		if s.p.areApart(c, d) {
			v = math.Inf(1)
		}
		if d != c && v > size && s.loose(d, n) >= 0 {
			found, size = d, v
		}
	}
	if found < 0 {
		return -1, -1
	}
	return found, s.loose(found, n)
}

// loose is a replica of c on node n that is not fixed, -1: none.
func (s *state) loose(c int, n int32) int {
	for r, at := range s.at[c] {
		if at == n && !s.fixed[c][r] {
			return r
		}
	}
	return -1
}

// missing is a replica of c that is nowhere, spare one that is or else one that is not fixed; -1: none.
func (s *state) missing(c int) int { return slices.Index(s.at[c], -1) }

func (s *state) spare(c int) int {
	if r := s.missing(c); r >= 0 {
		return r
	}
	return slices.Index(s.fixed[c], false)
}

// builder puts replicas that are nowhere where they win most.
type builder struct {
	*state
	rng   *rand.Rand
	noise float64
	next  []int   // by region: nodes of its rank before this one have replicas
	seen  []int32 // by node: the turn in which it was last looked at
	turn  int32
}

func newBuilder(s *state, rng *rand.Rand) *builder {
	return &builder{state: s, rng: rng, next: make([]int, s.p.a.Regions), seen: make([]int32, s.p.a.N)}
}

// build places all that is missing, the most demanding first, and tells whether everything found a place.
func (b *builder) build() bool {
	type want struct {
		comp  int
		worth float64
	}
	var list []want
	for c := range b.p.parts {
		if b.missing(c) >= 0 {
			list = append(list, want{c, b.demand(c) * (1 + b.noise*b.rng.Float64())})
		}
	}
	slices.SortStableFunc(list, func(x, y want) int { return cmp.Compare(y.worth, x.worth) })
	all := true
	for _, w := range list {
		for r := b.missing(w.comp); r >= 0; r = b.missing(w.comp) {
			n := b.best(w.comp, r)
			if n < 0 {
				all = false
				break
			}
			b.move(w.comp, r, n)
		}
	}
	return all
}

// demand is how hard a component is to place: what it takes of a usual node, and how many of the regions are closed to it.
func (b *builder) demand(c int) float64 {
	k := &b.p.parts[c]
	open := 0
	for r, ok := range k.Regions {
		if ok && len(b.p.rank[r]) > 0 {
			open++
		}
	}
	v := float64(k.CPU)/3000 + float64(k.Memory)/10000
	if k.apart {
		v *= 1.5
	}
	return v*float64(b.p.a.Regions)/float64(max(open, 1)) + float64(k.MinRegions)
}

// best is the node where replica r of c wins most: nodes that are near in any sense, and when none of them fits all.
func (b *builder) best(c, r int) int32 {
	b.turn++
	found, value := int32(-1), math.Inf(-1)
	try := func(n int32) {
		if n < 0 || b.seen[n] == b.turn {
			return
		}
		b.seen[n] = b.turn
		if !b.fits(c, b.at[c][r], n) {
			return
		}
		if v := b.amortised(c, r, n); v > value {
			found, value = n, v
		}
	}
	b.candidates(c, try)
	if found < 0 {
		for _, list := range b.p.rank {
			for _, n := range list {
				try(n)
			}
		}
	}
	return found
}

// amortised is the gain where a node that is not used yet costs only the part that the replica takes of it.
func (b *builder) amortised(c, r int, n int32) float64 {
	v := b.gain(c, r, n)
	if b.tenants[n] == 0 {
		k := &b.p.parts[c]
		nodes := &b.p.a.Nodes
		share := max(float64(k.CPU)/float64(max(nodes.CPU[n], 1)), float64(k.Memory)/float64(max(nodes.Memory[n], 1)))
		v += b.p.price[n] * (1 - share)
	}
	return v
}

func (b *builder) candidates(c int, try func(n int32)) {
	k := &b.p.parts[c]
	for _, o := range k.old {
		try(o.node)
	}
	for _, l := range k.out {
		for _, n := range b.at[b.p.links[l].to] {
			try(n)
		}
	}
	for _, l := range k.in {
		for _, n := range b.at[b.p.links[l].from] {
			try(n)
		}
	}
	if len(b.used) <= lookUsed {
		for _, n := range b.used {
			try(n)
		}
	} else {
		for range lookUsed {
			try(b.used[b.rng.IntN(len(b.used))])
		}
	}
	for region, ok := range k.Regions {
		if !ok {
			continue
		}
		list := b.p.rank[region]
		for b.next[region] < len(list) && b.tenants[list[b.next[region]]] > 0 {
			b.next[region]++
		}
		for i, left := b.next[region], lookNew; i < len(list) && left > 0; i++ {
			if b.tenants[list[i]] == 0 {
				try(list[i])
				left--
			}
		}
	}
}

// force places what found no place by putting others nowhere for it, which are placed again, until all are somewhere or tries run out.
func (b *builder) force(tries int, ended func() bool) bool {
	for ; tries > 0 && !ended(); tries-- {
		c := b.anyMissing()
		if c < 0 {
			return true
		}
		r := b.missing(c)
		region := b.rng.IntN(b.p.a.Regions)
		k := &b.p.parts[c]
		list := b.p.rank[region]
		if len(list) == 0 || !k.Regions[region] || int(b.areas[c][region]) >= k.MaxPerRegion {
			continue
		}
		n := list[b.rng.IntN(len(list))]
		if !b.possible(c, n) || !b.room(c, -1, n) {
			b.build()
			continue
		}
		b.move(c, r, n)
		b.build()
	}
	return b.anyMissing() < 0
}

// possible tells whether c could be on node n were it empty.
func (b *builder) possible(c int, n int32) bool {
	k := &b.p.parts[c]
	x := b.count(c, n)
	return b.p.usable[n] && b.p.a.Nodes.CPU[n] >= k.CPU && b.p.a.Nodes.Memory[n] >= k.Memory && int(x) < k.MaxPerNode &&
		(!b.p.a.Nodes.Quarantined[n] || x < k.was(n))
}

func (b *builder) anyMissing() int {
	at := b.rng.IntN(len(b.p.parts))
	for i := range b.p.parts {
		if c := (at + i) % len(b.p.parts); b.missing(c) >= 0 {
			return c
		}
	}
	return -1
}
