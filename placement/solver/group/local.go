package group

import (
	"context"
	"math/rand/v2"
	"slices"
)

// local is a group under local search with what is needed to evaluate its neighbours.
type local struct {
	p     *problem
	ctx   context.Context
	rng   *rand.Rand
	set   []int32
	in    []bool
	value float64

	// of the base: the group, or the group without one member, to which a candidate may be added
	base  []int32
	dist  []int32 // shortest paths inside the base
	reach []int32 // by anchor: nearest member of the base
	least int32   // radius with the best candidate for each anchor
	row   []int32
	// direct is the latency of a candidate to the base, row the shortest path
	direct []int32
	count  []int
	evals  int
	stop   bool
}

func newLocal(ctx context.Context, p *problem, seed uint64) *local {
	return &local{
		p: p, ctx: ctx, rng: rand.New(rand.NewPCG(seed, 0x9e3779b97f4a7c15)), in: make([]bool, len(p.node)),
		dist: make([]int32, (p.most+1)*(p.most+1)), reach: make([]int32, len(p.anchor)), row: make([]int32, p.most+1), direct: make([]int32, p.most+1),
		count: make([]int, p.g.Regions),
	}
}

// move is a neighbour: out leaves (-1: nobody), add comes (-1: nobody).
type move struct {
	out, add int32
	value    float64
}

func (l *local) start(set []int32) {
	clear(l.in)
	l.set = append(l.set[:0], set...)
	for _, c := range set {
		l.in[c] = true
	}
	l.value = l.evaluate(l.set)
}

// evaluate a group of an allowed size and balance; others are worth nothing.
func (l *local) evaluate(set []int32) float64 {
	if len(set) < l.p.least || len(set) > l.p.most {
		return -inf
	}
	clear(l.count)
	for _, c := range set {
		if l.count[l.p.region[c]]++; l.count[l.p.region[c]] > l.p.sized(len(set)).room {
			return -inf
		}
	}
	return l.p.score(l.p.measure(set))
}

// prepare makes the base of the group without out.
func (l *local) prepare(out int32) {
	p := l.p
	l.base = l.base[:0]
	clear(l.count)
	for _, c := range l.set {
		if c != out {
			l.base = append(l.base, c)
			l.count[p.region[c]]++
		}
	}
	k := len(l.base)
	for a, c := range l.base {
		for b, d := range l.base {
			l.dist[a*k+b] = p.between(c, d)
		}
	}
	for m := range k {
		for a := range k {
			am := l.dist[a*k+m]
			for b := range k {
				l.dist[a*k+b] = min(l.dist[a*k+b], am+l.dist[m*k+b])
			}
		}
	}
	l.least = 0
	for a := range p.anchor {
		near := noLink
		for _, c := range l.base {
			near = min(near, p.anchor[a][c])
		}
		l.reach[a] = near
		l.least = max(l.least, min(near, p.closest[a]))
	}
}

const noLink = int32(1) << 28

// radius of the base with candidate c.
func (l *local) radius(c int32) int32 {
	r := int32(0)
	for a, near := range l.reach {
		r = max(r, min(near, l.p.anchor[a][c]))
	}
	return r
}

// diameter of the base with candidate c.
func (l *local) diameter(c int32) int32 {
	k := len(l.base)
	row, direct := l.row[:k], l.direct[:k]
	for m, b := range l.base {
		direct[m] = l.p.between(c, b)
	}
	longest := int32(0)
	for b := range k {
		d := direct[b]
		for m := range k {
			d = min(d, direct[m]+l.dist[m*k+b])
		}
		row[b] = d
		longest = max(longest, d)
	}
	for a := range k {
		for b := range a {
			longest = max(longest, min(l.dist[a*k+b], row[a]+row[b]))
		}
	}
	return longest
}

// neighbours finds the best move for the base without out that is above than best.
func (l *local) neighbours(out int32, best move) move {
	p := l.p
	l.prepare(out)
	size := len(l.base) + 1
	if size > p.most || size < p.least {
		return best
	}
	s := p.sized(size)
	sum := 0.0
	for _, c := range l.base {
		sum += s.value[c]
	}
	ends := p.near(l.least) + p.wide(0) - p.fixed
	for r, list := range s.byArea {
		if l.count[r] >= s.room {
			continue
		}
		for _, c := range list {
			if sum+s.value[c]+ends <= best.value {
				break // the others of this region are worth less still
			}
			if l.in[c] {
				continue
			}
			l.evals++
			radius := l.radius(c)
			if p.score(sum+s.value[c], radius, 0) <= best.value {
				continue
			}
			if v := p.score(sum+s.value[c], radius, l.diameter(c)); v > best.value {
				best = move{out, c, v}
			}
		}
	}
	return best
}

// descend makes the best move until none wins.
func (l *local) descend() {
	for !l.ended() {
		best := l.neighbours(-1, move{-1, -1, l.value + Tolerance})
		for _, out := range l.set {
			best = l.neighbours(out, best)
			if v := l.evaluate(l.base); v > best.value {
				best = move{out, -1, v}
			}
		}
		if best.add < 0 && best.out < 0 {
			return
		}
		l.apply(best)
	}
}

func (l *local) apply(m move) {
	if m.out >= 0 {
		l.set = slices.DeleteFunc(l.set, func(c int32) bool { return c == m.out })
		l.in[m.out] = false
	}
	if m.add >= 0 {
		l.set = append(l.set, m.add)
		l.in[m.add] = true
	}
	l.value = m.value
}

func (l *local) ended() bool {
	if !l.stop && l.ctx.Err() != nil {
		l.stop = true
	}
	return l.stop
}

// greedy makes a group of the least size that is possible: members of set that fit, then the most valuable of regions that have room.
func (l *local) greedy(set []int32) []int32 {
	p := l.p
	for size := p.least; size <= p.most; size++ {
		s := p.sized(size)
		clear(l.count)
		out := make([]int32, 0, size)
		for _, c := range append(slices.Clone(set), s.order...) {
			if len(out) < size && l.count[p.region[c]] < s.room && !slices.Contains(out, c) {
				out = append(out, c)
				l.count[p.region[c]]++
			}
		}
		if len(out) == size {
			return out
		}
	}
	return nil
}

// disturb replaces a few members by others of their region, better ones rather than worse.
func (l *local) disturb(members int) {
	s := l.p.sized(len(l.set))
	for range members {
		at := l.rng.IntN(len(l.set))
		list := s.byArea[l.p.region[l.set[at]]]
		// the square makes the valuable ones likelier
		x := l.rng.Float64()
		c := list[int(x*x*float64(len(list)))]
		if l.in[c] {
			continue
		}
		l.in[l.set[at]], l.in[c] = false, true
		l.set[at] = c
	}
	l.value = l.evaluate(l.set)
}

// cover replaces the group by one that serves all anchors within radius if that is possible: for the anchor with the fewest servers one
// that serves many others too and is worth much, with noise; then the most valuable that regions have room for.
func (l *local) cover(radius int32) {
	p := l.p
	size := len(l.set)
	s := p.sized(size)
	set := make([]int32, 0, size)
	clear(l.count)
	clear(l.in)
	add := func(c int32) {
		set = append(set, c)
		l.in[c] = true
		l.count[p.region[c]]++
	}
	open := make([]int, 0, len(p.anchor))
	for a := range p.anchor {
		open = append(open, a)
	}
	for len(open) > 0 && len(set) < size {
		best, worth := int32(-1), -inf
		hard := l.hardest(open, radius)
		for c, d := range p.anchor[hard] {
			if d > radius || l.count[p.region[c]] >= s.room {
				continue
			}
			v := s.value[c] + 0.05*l.rng.Float64()
			for _, a := range open {
				if p.anchor[a][c] <= radius {
					v += 0.02
				}
			}
			if v > worth {
				best, worth = int32(c), v
			}
		}
		if best >= 0 {
			add(best)
		}
		open = slices.DeleteFunc(open, func(a int) bool { return a == hard || best >= 0 && p.anchor[a][best] <= radius })
	}
	for _, c := range s.order {
		if len(set) < size && !l.in[c] && l.count[p.region[c]] < s.room {
			add(c)
		}
	}
	l.start(set)
}

// hardest is the anchor of open with the fewest servers within radius.
func (l *local) hardest(open []int, radius int32) int {
	found, fewest := open[0], len(l.p.node)+1
	for _, a := range open {
		n := 0
		for _, d := range l.p.anchor[a] {
			if d <= radius {
				n++
			}
		}
		if n > 0 && n < fewest {
			found, fewest = a, n
		}
	}
	return found
}

// Local search ends when it was disturbed so often in a row in vain, or when that took so many evaluations.
const (
	kicks     = 80
	vainEvals = 300_000
)

// search runs local search from the current group and calls found with what is better than anything before.
func (l *local) search(best float64, found func(set []int32, value float64)) {
	p := l.p
	var current []int32
	for c, i := range p.node {
		if slices.Contains(p.g.Current, i) {
			current = append(current, int32(c))
		}
	}
	take := func() bool {
		if l.value <= best+Tolerance {
			return false
		}
		best = l.value
		found(l.set, l.value)
		return true
	}
	if l.start(current); l.value == -inf {
		l.start(l.greedy(current))
	}
	if len(l.set) == 0 {
		return
	}
	take()
	l.descend()
	take()
	home := slices.Clone(l.set)
	for vain, since := 0, l.evals; vain < kicks && l.evals-since < vainEvals && !l.ended(); vain++ {
		if l.start(home); vain%2 == 0 {
			l.disturb(2 + vain/2%3)
		} else {
			l.resize(vain / 2)
			_, radius, _ := p.measure(l.set)
			lo := p.tightest()
			l.cover(lo + int32(l.rng.Float64()*float64(max(radius-lo, 0)+1)))
		}
		l.descend()
		if take() {
			home = append(home[:0], l.set...)
			vain, since = -1, l.evals
		}
	}
}

// resize makes another size the one that cover builds: each in turn. The members that are too many leave, those that are missing are any.
func (l *local) resize(turn int) {
	size := l.p.least + turn%(l.p.most-l.p.least+1)
	set := slices.Clone(l.set[:min(len(l.set), size)])
	for _, c := range l.p.sized(size).order {
		if len(set) < size && !slices.Contains(set, c) {
			set = append(set, c)
		}
	}
	l.set = set
}
