package group

// arena is a box made ready for depth-first search: candidates by number, who fits with whom, who serves which anchor.
type arena struct {
	p      *problem
	b      *box
	n      int
	value  []float64
	fits   []bitset // by candidate: what may be in a group with it, itself included
	serves []bitset // by anchor: candidates within the box's radius
	region []bitset
	area   []int32
	alive  bitset
	upper  []float64 // by candidate: no group with it is worth more
	before [][]int32 // by candidate: its dominators
	count  []int     // scratch of rest
	union  bitset    // scratch of rest
	picked bitset    // scratch of rest
	served []serving // scratch of rest
}

type serving struct{ count, first, anchor int }

func newArena(p *problem, b *box, dominators [][]int32, place []int32) *arena {
	n := len(b.cands)
	a := &arena{
		p: p, b: b, n: n, value: make([]float64, n), fits: make([]bitset, n), area: make([]int32, n), alive: newBitset(n),
		upper: make([]float64, n), before: make([][]int32, n), count: make([]int, p.g.Regions), union: newBitset(n), picked: newBitset(n),
	}
	a.alive.fill(n)
	words := len(a.alive)
	all := make(bitset, n*words)
	for i, c := range b.cands {
		a.value[i], a.area[i] = b.s.value[c], p.region[c]
		row := b.near.d[int(b.at[i])*b.near.n:]
		fits := all[i*words : (i+1)*words]
		for j, at := range b.at {
			if row[at] <= b.dhi {
				fits[j>>6] |= 1 << (j & 63)
			}
		}
		a.fits[i] = fits
		place[c] = int32(i)
	}
	for _, dist := range p.anchor {
		s := newBitset(n)
		for i, c := range b.cands {
			if dist[c] <= b.rhi {
				s.set(i)
			}
		}
		a.serves = append(a.serves, s)
	}
	a.region = make([]bitset, p.g.Regions)
	for r := range a.region {
		a.region[r] = newBitset(n)
	}
	for i, r := range a.area {
		a.region[r].set(i)
	}
	for i, c := range b.cands {
		for _, d := range dominators[c] {
			if place[d] < 0 {
				a.alive.drop(i) // no winning group of the box has the dominator, so none has this one
				break
			}
			a.before[i] = append(a.before[i], place[d])
		}
	}
	for _, c := range b.cands {
		place[c] = -1
	}
	return a
}

// rest bounds what n more members out of avail can be worth when they must serve the anchors of open and count members of regions are
// there already; -inf: it is impossible. Of anchors that share no servers each takes its best one, the other members are the most
// valuable ones that regions have room for: a best set can be exchanged, member by member, into one of at most that worth.
func (a *arena) rest(avail bitset, n int, count []int, open []int32) float64 {
	sum := 0.0
	var picked bitset
	if len(open) > 0 {
		var ok bool
		if sum, n, ok = a.forced(avail, n, open); !ok {
			return -inf
		}
		picked = a.picked
	}
	copy(a.count, count)
	room := a.b.s.room
	for i := avail.next(0); i >= 0 && n > 0; i = avail.next(i + 1) {
		if picked != nil && picked.has(i) || a.count[a.area[i]] >= room {
			continue
		}
		a.count[a.area[i]]++
		sum += a.value[i]
		n--
	}
	if n > 0 {
		return -inf
	}
	return sum
}

// forced takes the best server of each of some anchors that share no servers, the hardest first.
func (a *arena) forced(avail bitset, n int, open []int32) (float64, int, bool) {
	list := a.served[:0]
	for _, p := range open {
		c, first := avail.common(a.serves[p])
		if c == 0 {
			return 0, 0, false
		}
		at := len(list)
		list = append(list, serving{})
		for ; at > 0 && list[at-1].count > c; at-- {
			list[at] = list[at-1]
		}
		list[at] = serving{c, first, int(p)}
	}
	a.served = list
	clear(a.union)
	clear(a.picked)
	sum := 0.0
	for _, s := range list {
		if clash(a.union, a.serves[s.anchor], avail) {
			continue
		}
		if n == 0 {
			return 0, 0, false
		}
		n--
		sum += a.value[s.first]
		a.picked.set(s.first)
		for i := range a.union {
			a.union[i] |= a.serves[s.anchor][i]
		}
	}
	return sum, n, true
}

func clash(union, serves, avail bitset) bool {
	for i, w := range union {
		if w&serves[i]&avail[i] != 0 {
			return true
		}
	}
	return false
}

// peel drops candidates that no group of the box above best has, until none is left to drop, and sets the bound of the box. It tells
// whether any group can be above best.
func (a *arena) peel(best float64) bool {
	ends := a.b.ends(a.p)
	avail := newBitset(a.n)
	count := make([]int, a.p.g.Regions)
	open := make([]int32, 0, len(a.serves))
	for changed, round := true, 0; changed && round < 4; round++ {
		changed = false
		for i := a.alive.next(0); i >= 0; i = a.alive.next(i + 1) {
			if a.upper[i] = a.ceiling(i, avail, count, open) + ends; a.upper[i] <= best+pruned || !a.complete(i) {
				a.alive.drop(i)
				changed = true
			}
		}
	}
	a.b.bound = min(a.b.bound, a.most())
	a.b.keep(func(i int) bool { return a.alive.has(i) })
	return a.b.bound > best+pruned
}

// complete tells whether all dominators of i are there still.
func (a *arena) complete(i int) bool {
	for _, d := range a.before[i] {
		if !a.alive.has(int(d)) {
			return false
		}
	}
	return true
}

// ceiling bounds the sum of values of groups with i.
func (a *arena) ceiling(i int, avail bitset, count []int, open []int32) float64 {
	avail.and(a.alive, a.fits[i])
	avail.drop(i)
	open = open[:0]
	for p, s := range a.serves {
		if !s.has(i) {
			open = append(open, int32(p))
		}
	}
	count[a.area[i]]++
	v := a.rest(avail, a.b.s.size-1, count, open)
	count[a.area[i]]--
	return a.value[i] + v
}

// most bounds the box by what is known of its candidates: a group has size members, so its worth is at most the size-th best ceiling,
// and it serves each anchor, so it is at most the best ceiling among that anchor's servers.
func (a *arena) most() float64 {
	size := a.b.s.size
	top := make([]float64, 0, size+1)
	for i := a.alive.next(0); i >= 0; i = a.alive.next(i + 1) {
		at := len(top)
		top = append(top, 0)
		for ; at > 0 && top[at-1] < a.upper[i]; at-- {
			top[at] = top[at-1]
		}
		top[at] = a.upper[i]
		top = top[:min(len(top), size)]
	}
	if len(top) < size {
		return -inf
	}
	bound := top[size-1]
	for _, s := range a.serves {
		best := -inf
		for i := a.alive.next(0); i >= 0; i = a.alive.next(i + 1) {
			if s.has(i) {
				best = max(best, a.upper[i])
			}
		}
		bound = min(bound, best)
	}
	return bound
}
