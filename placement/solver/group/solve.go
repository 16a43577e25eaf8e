package group

import (
	"container/heap"
	"context"
	"slices"
	"time"

	"github.com/coppice-project/coppice/placement/solver/instance"
)

// Tolerance is how far above the result of a proven solution the best group may be, and the least gain that counts.
const Tolerance = 1e-9

// pruned is the gain that branch and bound looks for: far below Tolerance, far above what sums of floats are off.
const pruned = 1e-11

// maxCandidates bounds the memory of branch and bound: a matrix of as many squared.
const maxCandidates = 3000

// Options of Solve.
type Options struct {
	Seed uint64
	// Clock is what First and Best are measured with; nil: time since Solve was called.
	Clock func() time.Duration
}

// Result of Solve.
type Result struct {
	Feasible  bool // Nodes is a group that violates nothing
	Nodes     []int
	Objective float64
	Bound     float64       // no group is worth more than Bound (by more than Tolerance when Proven)
	Proven    bool          // no group is worth more than Objective + Tolerance; without a group: there is none
	First     time.Duration // until the first feasible group
	Best      time.Duration // until the group that is the result
	Steps     int           // of depth-first search
	Boxes     int
}

// search is one call of Solve.
type search struct {
	p     *problem
	ctx   context.Context
	clock func() time.Duration
	best  float64
	group []int32
	res   Result
	steps int
	ended bool
	queue boxes
	left  float64 // bounds what was too large to search
}

// Solve looks for the best group until it is proven or ctx ends.
func Solve(ctx context.Context, g *instance.Group, opt Options) Result {
	clock := opt.Clock
	if clock == nil {
		begun := time.Now()
		clock = func() time.Duration { return time.Since(begun) }
	}
	s := &search{p: newProblem(g), ctx: ctx, clock: clock, best: -inf, left: -inf}
	p := s.p
	if p.most < p.least {
		s.res.Bound, s.res.Proven = -inf, true
		return s.res
	}
	l := newLocal(ctx, p, opt.Seed)
	l.search(-penalty/2, s.improve)
	s.roots()
	s.finish(max(s.prove(), s.left))
	return s.res
}

func (s *search) improve(set []int32, value float64) {
	s.best = value
	s.group = append(s.group[:0], set...)
	s.res.Best = s.clock()
	if !s.res.Feasible {
		s.res.Feasible, s.res.First = true, s.res.Best
	}
}

// finish makes the result, where open bounds what was not searched.
func (s *search) finish(open float64) {
	s.res.Steps = s.steps
	s.res.Bound = max(s.best, open)
	s.res.Proven = open <= s.best+pruned
	if !s.res.Feasible {
		return
	}
	nodes := make([]int, len(s.group))
	for i, c := range s.group {
		nodes[i] = int(s.p.node[c])
	}
	slices.Sort(nodes)
	score, wrong := s.p.g.Judge(nodes)
	if len(wrong) > 0 {
		panic("group: the result violates " + wrong[0])
	}
	s.res.Bound += score.Objective - s.best // the sum in another order
	s.res.Nodes, s.res.Objective = nodes, score.Objective
	if s.res.Proven {
		s.res.Bound = score.Objective
	}
}

func (s *search) check() {
	if !s.ended && s.ctx.Err() != nil {
		s.ended = true
	}
}

// boxes is a heap, highest bound first; of equals the one that came first.
type boxes []*box

func (q boxes) Len() int           { return len(q) }
func (q boxes) Less(i, j int) bool { return q[i].bound > q[j].bound }
func (q boxes) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }
func (q *boxes) Push(b any)        { *q = append(*q, b.(*box)) }
func (q *boxes) Pop() any {
	last := (*q)[len(*q)-1]
	*q = (*q)[:len(*q)-1]
	return last
}

// roots fills the queue with a box for each size.
func (s *search) roots() {
	p := s.p
	longest := int32(0)
	for _, dist := range p.anchor {
		for _, d := range dist {
			longest = max(longest, d)
		}
	}
	for size := p.least; size <= p.most; size++ {
		z := p.sized(size)
		b := &box{s: z, rhi: longest, dhi: p.limit, cands: slices.Clone(z.order), bound: inf}
		if p.limit >= 0 && b.narrow(p, s.best) {
			s.queue = append(s.queue, b)
		}
	}
	heap.Init(&s.queue)
}

// share makes the paths over the candidates of all boxes of the queue once for all of them.
func (s *search) share() {
	p := s.p
	at := make([]int32, len(p.node))
	var cands []int32
	longest := int32(0)
	for _, b := range s.queue {
		longest = max(longest, b.dhi)
		for _, c := range b.cands {
			if at[c] == 0 {
				cands = append(cands, c)
				at[c] = int32(len(cands))
			}
		}
	}
	if len(s.queue) < 2 || len(cands) > maxCandidates {
		return
	}
	near := makePaths(p, cands, longest)
	for _, b := range s.queue {
		b.near, b.at = near, make([]int32, len(b.cands))
		for i, c := range b.cands {
			b.at[i] = at[c] - 1
		}
	}
}

// prove takes the queue down and returns a bound of what it did not get to.
func (s *search) prove() float64 {
	place := make([]int32, len(s.p.node))
	for i := range place {
		place[i] = -1
	}
	dominators := map[int][][]int32{}
	s.share()
	for len(s.queue) > 0 {
		if s.check(); s.ended {
			return s.queue[0].bound
		}
		b := heap.Pop(&s.queue).(*box)
		if b.bound <= s.best+pruned {
			return -inf // so are all others
		}
		s.res.Boxes++
		if dominators[b.s.size] == nil {
			dominators[b.s.size] = b.s.dominators(s.p)
		}
		s.visit(b, dominators[b.s.size], place)
		if s.ended {
			bound := b.bound
			if len(s.queue) > 0 {
				bound = max(bound, s.queue[0].bound)
			}
			return bound
		}
	}
	return -inf
}

// visit narrows a box, and searches or splits it.
func (s *search) visit(b *box, dominators [][]int32, place []int32) {
	if !b.narrow(s.p, s.best) {
		return
	}
	if len(b.cands) > maxCandidates {
		s.halve(b)
		return
	}
	b.connect(s.p)
	a := newArena(s.p, b, dominators, place)
	cands, at := slices.Clone(b.cands), slices.Clone(b.at)
	if !a.peel(s.best) {
		return
	}
	if len(s.queue) > 0 && b.bound < s.queue[0].bound-requeue {
		heap.Push(&s.queue, b)
		return
	}
	budget := patience(s.p, b)
	if s.explore(a, cands, at, budget) || s.ended {
		return
	}
	s.halve(b)
}

// requeue is how far a box must have fallen behind the next one to wait for its turn again.
const requeue = 1e-3

// patience is how many steps a box is searched before it is split; 0: to the end.
func patience(p *problem, b *box) int {
	if b.rlo == b.rhi && b.dlo == b.dhi {
		return 0
	}
	if b.slack(p) < 0.001 {
		return 20_000
	}
	return 300
}

// halve puts both halves of a box into the queue.
func (s *search) halve(b *box) {
	low, high := b.split(s.p)
	if low == nil { // too many candidates of one radius and diameter
		s.left = max(s.left, b.bound)
		return
	}
	for _, half := range []*box{low, high} {
		if half.narrow(s.p, s.best) {
			heap.Push(&s.queue, half)
		}
	}
}
