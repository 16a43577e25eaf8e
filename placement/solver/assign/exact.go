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
	s     *solver
	rest  []float64 // by component: what it and those after it can still win at most, and calls into them
	one   []float64 // by component: the most one replica can win
	order []int32   // nodes
	steps int
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
	e := &exact{state: newState(p), s: s, rest: make([]float64, len(p.parts)+1), one: make([]float64, len(p.parts))}
	for i, ok := range p.usable {
		if ok {
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
	return e.place(0, 0, 0)
}

// place puts replicas of c from r on, on nodes of the order from at on.
func (e *exact) place(c, r, at int) bool {
	if e.steps++; e.steps&255 == 0 && (e.s.late() || e.s.opt.Deadline <= 0 && e.steps > max(exactSteps, 50*e.s.opt.Steps)) {
		e.s.ended = true
	}
	if e.s.ended {
		return false
	}
	if c == len(e.p.parts) {
		e.s.take(e.state)
		return true
	}
	k := &e.p.parts[c]
	if r == k.Replicas {
		for _, n := range k.Pinned {
			if e.count(c, n) == 0 {
				return true
			}
		}
		return !e.hopeful(c+1, 0) || e.place(c+1, 0, 0)
	}
	if !e.hopeful(c, k.Replicas-r) {
		return true
	}
	for i := at; i < len(e.order); i++ {
		n := e.order[i]
		if !e.fits(c, -1, n) {
			continue
		}
		e.move(c, r, n)
		done := e.place(c, r+1, i)
		e.move(c, r, -1)
		if !done {
			return false
		}
	}
	return true
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
