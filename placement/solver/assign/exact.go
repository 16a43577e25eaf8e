package assign

import (
	"math"

	"github.com/coppice-project/coppice/placement/solver/instance"
)

// exactMost is the number of placements up to which all of them are gone through, less what bounds leave out.
const exactMost = 3e7

// exactSteps is how many steps that takes at most where no deadline ends it, or 50 times the steps of the search.
const exactSteps = 1_000_000

// exact goes through all placements, component by component, replicas on nodes in ascending order as they are alike.
type exact struct {
	*state
	s      *solver
	rest   []float64 // by component: what it and those after it can still win at most, and calls into them
	one    []float64 // by component: the most one replica can win
	order  []int32   // nodes
	index  []int32   // by node: its place in order
	levels []who
	chosen []int32 // by level: the place in order that was chosen
}

// small tells whether going through all placements is worth trying.
func (p *problem) small() bool {
	ways := 0.0
	for c := range p.parts {
		nodes := 0
		for i := range p.a.N {
			if p.mayHost(c, i) {
				nodes++
			}
		}
		for r := range p.parts[c].Replicas {
			if p.parts[c].MaxPerNode > 1 {
				ways += math.Log(float64(nodes+r)) - math.Log(float64(r+1))
			} else {
				ways += math.Log(math.Max(float64(nodes-r), 1)) - math.Log(float64(r+1))
			}
		}
	}
	return ways <= math.Log(exactMost)
}

// enumerate looks for the best placement until it is proven or the time is over, and tells which.
func (s *solver) enumerate(b *bounds) bool {
	p := s.p
	e := &exact{state: newState(p), s: s, rest: make([]float64, len(p.parts)+1), one: make([]float64, len(p.parts)), index: make([]int32, p.a.N)}
	for i, ok := range p.usable {
		if ok {
			e.index[i] = int32(len(e.order))
			e.order = append(e.order, int32(i))
		}
	}
	for c := len(p.parts) - 1; c >= 0; c-- {
		e.rest[c] = e.rest[c+1] + math.Max(b.component(c, false), 0)
		for i := range p.a.N {
			if p.mayHost(c, i) {
				e.one[c] = math.Max(e.one[c], b.replica(c, i, false))
			}
		}
	}
	for c := range p.parts {
		for r := range p.parts[c].Replicas {
			e.levels = append(e.levels, who{int32(c), int32(r)})
		}
	}
	e.chosen = make([]int32, len(e.levels))
	return s.Enumerate(e, max(exactSteps, 50*s.opt.Steps))
}

// Levels implements Tree: a replica each.
func (e *exact) Levels() int { return len(e.levels) }

// Choices implements Tree.
func (e *exact) Choices(level int) []int32 {
	if level > 0 && e.levels[level].replica > 0 {
		return e.order[e.chosen[level-1]:]
	}
	return e.order
}

// Put implements Tree.
func (e *exact) Put(level int, n int32) bool {
	w := e.levels[level]
	if !e.fits(int(w.comp), -1, n) {
		return false
	}
	e.chosen[level] = e.index[n]
	e.move(int(w.comp), int(w.replica), n)
	return true
}

// Take implements Tree.
func (e *exact) Take(level int) { e.move(int(e.levels[level].comp), int(e.levels[level].replica), -1) }

// Leaf implements Tree. Pinned nodes that lack a replica count as violations.
func (e *exact) Leaf() { e.s.take(e.state) }

// Hopeful implements Tree.
func (e *exact) Hopeful(level int) bool {
	w := e.levels[level]
	c := int(w.comp)
	if w.replica == 0 {
		for d := range c {
			for _, n := range e.p.parts[d].Pinned {
				if e.count(d, n) == 0 {
					return false
				}
			}
		}
		if !e.hopeful(c, 0) {
			return false
		}
	}
	return e.hopeful(c, e.p.parts[c].Replicas-int(w.replica))
}

// hopeful tells whether the placement can become better than the best when left replicas of c and all of those after it are missing.
func (e *exact) hopeful(c, left int) bool {
	v := e.value + e.penalty()
	next := c
	if left > 0 {
		v += float64(left) * e.one[c]
		next = c + 1
	}
	v += e.rest[min(next, len(e.p.parts))]
	for b, l := range e.p.links { // placed callers whose calls may become shorter yet
		if l.to < c {
			continue
		}
		for x, n := range e.at[l.from] {
			if n < 0 {
				continue
			}
			if d := e.near[b][x].distance; d < instance.None && d <= l.far {
				v += l.perUnit * float64(d)
			} else {
				v += l.worth
			}
		}
	}
	return e.s.top.broken > 0 || v > e.s.top.value+gainful
}
