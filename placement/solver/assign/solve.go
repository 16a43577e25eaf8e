package assign

import (
	"context"
	"math"
	"math/rand/v2"
	"time"

	"github.com/coppice-project/coppice/placement/solver/instance"
)

// smallShare of the deadline at most goes to searching where the rest is enough to go through all placements.
const smallShare = 0.2

// Tolerance is how far above the result of a proven solution the best placement may be.
const Tolerance = 1e-9

// Options of a solver.
type Options struct {
	Seed uint64
	// Steps is the length of the search: the same problem, seed and steps give the same result. 0: the search is as long as Deadline,
	// and cools by the clock.
	Steps    int
	Deadline time.Duration
	// Clock is what the deadline is measured with; nil: time since the solver was made.
	Clock func() time.Duration
	// Repair ends the search when everything that must have a place has one: what runs and may stay is not touched.
	Repair bool
}

// Result of a search.
type Result struct {
	Feasible  bool // Placement violates nothing
	Placement [][]int32
	Objective float64
	Bound     float64 // no placement is worth more
	Proven    bool    // no placement is worth more than Objective + Tolerance
	First     time.Duration
	Best      time.Duration
	Steps     int
}

// solver is one search.
type solver struct {
	*Engine
	p    *problem
	rng  *rand.Rand
	res  Result
	best [][]int32
	top  rank // of best
}

// Solve looks for the best placement until the options or ctx end it.
func Solve(ctx context.Context, a *instance.Assignment, opt Options) Result {
	if opt.Steps <= 0 && opt.Deadline <= 0 {
		opt.Steps = 100_000 + 1000*a.Replicas()
	}
	s := &solver{Engine: NewEngine(ctx, opt), rng: rand.New(rand.NewPCG(opt.Seed, 0x2545f4914f6cdd1d)), top: rank{broken: 1 << 30}}
	s.p = newProblem(a)
	st := newState(s.p)
	s.start(st)
	if opt.Repair {
		s.finish(math.Inf(1), false)
		return s.res
	}
	b := newBounds(s.p)
	bound := b.all()
	if s.p.small() {
		s.cut = smallShare
		s.search(st, len(heats))
		s.cut = 1
		s.ended = s.late()
		if !s.ended && s.enumerate(b) {
			bound = s.top.value
			s.finish(bound, true)
			return s.res
		}
	} else {
		s.search(st, math.MaxInt)
	}
	s.finish(bound, false)
	return s.res
}

// start makes a first placement: what runs stays, what is missing is added; and where more than a repair is wanted another one from
// nothing.
func (s *solver) start(st *state) {
	st.keep()
	s.complete(st)
	s.take(st)
}

// complete places what is missing.
func (s *solver) complete(st *state) {
	st.pin()
	b := newBuilder(st, s.rng)
	if !b.build() {
		b.force(200+20*s.p.replicas, s.over)
	}
}

// take remembers a placement that is better than all before.
func (s *solver) take(st *state) bool {
	r := st.rank()
	r.broken += st.unpinned()
	if !r.above(s.top) {
		return false
	}
	s.top = r
	s.best = st.snapshot(s.best)
	s.res.Best = s.clock()
	if !s.res.Feasible && s.top.broken == 0 {
		s.res.Feasible, s.res.First = true, s.res.Best
	}
	return true
}

// search anneals again and again from the best placement, the first time from the better of the first one and one made afresh.
func (s *solver) search(st *state, rounds int) {
	if fresh := newState(s.p); !s.late() {
		s.complete(fresh)
		if s.take(fresh) {
			st = fresh
		}
	}
	s.Anneal(&walk{s, newAnnealer(st, s.rng)}, rounds)
}

// walk is an annealer as the engine sees it.
type walk struct {
	s *solver
	*annealer
}

// Size implements Walk.
func (w *walk) Size() int { return len(w.all) }

// Begin implements Walk.
func (w *walk) Begin() {
	w.restore(w.s.best)
	w.restart()
}

// Step implements Walk.
func (w *walk) Step(heat float64) {
	w.heat = heat / float64(w.p.replicas)
	w.try()
}

// End implements Walk.
func (w *walk) End(over func() bool) {
	w.restore(w.annealer.best)
	w.restart()
	w.descend(over)
	w.s.take(w.state)
	if w.s.top.broken > 0 {
		w.s.harder(w.state)
	}
}

// harder makes violations cost more.
func (s *solver) harder(st *state) {
	before := s.p.strict
	s.p.harden()
	st.value -= (s.p.strict - before) * float64(st.broken)
	s.top.value = math.Inf(-1) // it was compared by other costs
}

// finish makes the result; whole: everything was gone through.
func (s *solver) finish(bound float64, whole bool) {
	s.res.Bound, s.res.Steps = bound, s.steps
	if !s.res.Feasible {
		s.res.Proven = whole
		if whole {
			s.res.Bound = math.Inf(-1)
		}
		return
	}
	s.res.Placement = s.best
	score, wrong := s.p.a.Judge(s.best)
	if len(wrong) > 0 {
		panic("assign: the result violates " + wrong[0])
	}
	s.res.Objective = score.Objective
	switch {
	case whole:
		s.res.Proven, s.res.Bound = true, score.Objective
	default:
		s.res.Bound = max(bound, score.Objective)
		s.res.Proven = bound <= score.Objective+Tolerance
	}
}
