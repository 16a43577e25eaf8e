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
	p     *problem
	opt   Options
	ctx   context.Context
	clock func() time.Duration
	rng   *rand.Rand
	res   Result
	best  [][]int32
	top   rank // of best
	ended bool
	cut   float64 // share of the deadline that search may take
	ticks int
}

// Solve looks for the best placement until the options or ctx end it.
func Solve(ctx context.Context, a *instance.Assignment, opt Options) Result {
	begun := time.Now()
	s := &solver{cut: 1, opt: opt, ctx: ctx, clock: opt.Clock, rng: rand.New(rand.NewPCG(opt.Seed, 0x2545f4914f6cdd1d)), top: rank{broken: 1 << 30}}
	if s.clock == nil {
		s.clock = func() time.Duration { return time.Since(begun) }
	}
	if opt.Steps <= 0 && opt.Deadline <= 0 {
		s.opt.Steps = 100_000 + 1000*a.Replicas()
	}
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

// over tells whether the time is used up; it asks the clock now and then only.
func (s *solver) over() bool {
	if s.ticks++; !s.ended && s.ticks&63 == 0 {
		s.ended = s.late()
	}
	return s.ended
}

func (s *solver) late() bool {
	return s.ctx.Err() != nil || s.opt.Deadline > 0 && s.clock() >= time.Duration(s.cut*float64(s.opt.Deadline))
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

// Temperatures are shares of the worth of a replica, so that they mean the same in small and large problems. Annealings begin with heats in
// turn: the second forgets nearly everything.
var heats = []float64{0.2, 0.4, 0.1}

// cold is where annealings end.
const cold = 0.004

// search anneals again and again from the best placement, the first time from the better of the first one and one made afresh.
func (s *solver) search(st *state, rounds int) {
	if fresh := newState(s.p); !s.late() {
		s.complete(fresh)
		if s.take(fresh) {
			st = fresh
		}
	}
	a := newAnnealer(st, s.rng)
	for round := 0; round < rounds && !s.ended && len(a.all) > 0; round++ {
		st.restore(s.best)
		a.restart()
		heat := heats[round%len(heats)]
		long := stepsEach * len(a.all) << min(round/len(heats), 20)
		s.cool(a, heat/float64(s.p.replicas), cold/float64(s.p.replicas), long)
		st.restore(a.best)
		a.restart()
		a.descend(s.over)
		s.take(st)
		if s.top.broken > 0 {
			s.harder(st)
		}
		if s.opt.Steps > 0 && s.res.Steps >= s.opt.Steps {
			return
		}
	}
}

// harder makes violations cost more.
func (s *solver) harder(st *state) {
	before := s.p.strict
	s.p.harden()
	st.value -= (s.p.strict - before) * float64(st.broken)
	s.top.value = math.Inf(-1) // it was compared by other costs
}

// stepsEach is how many steps for each replica the first annealings take where there is time for several; each time that all heats had
// their turn they take twice as many.
const stepsEach = 10_000

// cool is one annealing, as long as the rest of the budget or a part of it where that is long enough for several.
func (s *solver) cool(a *annealer, from, to float64, whole int) {
	begun, first := s.clock(), s.res.Steps
	for done := 0; !s.over(); done++ {
		if done&255 == 0 {
			x := s.progress(done, first, whole, begun)
			if x >= 1 {
				return
			}
			a.heat = from * math.Pow(to/from, x)
		}
		a.try()
		s.res.Steps++
	}
}

// progress tells how much of an annealing that began at begun with step first is over after done steps.
func (s *solver) progress(done, first, whole int, begun time.Duration) float64 {
	if s.opt.Steps > 0 {
		if left := s.opt.Steps - first; left < 2*whole {
			whole = left
		}
		return float64(done) / float64(max(whole, 1))
	}
	now := s.clock()
	left, spent := (s.cut*float64(s.opt.Deadline)-float64(begun))*0.97, float64(now-begun) // a little is for the last descent
	if done > 2000 && left*float64(done)/max(spent, 1) > 2*float64(whole) {
		return float64(done) / float64(whole)
	}
	return spent / max(left, 1)
}

// finish makes the result; whole: everything was gone through.
func (s *solver) finish(bound float64, whole bool) {
	s.res.Bound = bound
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
