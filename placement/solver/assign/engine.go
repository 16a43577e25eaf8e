package assign

import (
	"context"
	"math"
	"time"
)

// Walk is a placement under search, as the engine sees it: it takes random steps from placement to placement and remembers the best.
// Package solver has one of its own, with the constraints of the platform.
type Walk interface {
	// Size is how many things may move; 0: there is nothing to search.
	Size() int
	// Begin goes back to the best placement of all.
	Begin()
	// Step tries a random change. One for the worse is taken the likelier the hotter it is; heat is a share of what one thing is worth.
	Step(heat float64)
	// End goes from the best placement since Begin on to where no single change wins, and remembers it when it is the best of all.
	End(over func() bool)
}

// Tree is a set of placements that can be gone through level by level.
type Tree interface {
	Levels() int
	// Choices are the nodes to try at a level, given those put before, the most promising first.
	Choices(level int) []int32
	// Put makes a choice, or says that it cannot be. Take takes it back.
	Put(level int, node int32) bool
	Take(level int)
	// Hopeful tells whether what was put before the level can become better than the best placement yet.
	Hopeful(level int) bool
	// Leaf is called when each level has its choice.
	Leaf()
}

// Engine drives searches within one budget.
type Engine struct {
	opt   Options
	ctx   context.Context
	clock func() time.Duration
	cut   float64 // share of the deadline that the search may take
	ended bool
	ticks int
	steps int
}

// NewEngine begins a budget: opt.Steps or opt.Deadline, and ctx.
func NewEngine(ctx context.Context, opt Options) *Engine {
	e := &Engine{opt: opt, ctx: ctx, clock: opt.Clock, cut: 1}
	if e.clock == nil {
		begun := time.Now()
		e.clock = func() time.Duration { return time.Since(begun) }
	}
	return e
}

// Steps made so far.
func (e *Engine) Steps() int { return e.steps }

// over tells whether the time is used up; it asks the clock now and then only.
func (e *Engine) over() bool {
	if e.ticks++; !e.ended && e.ticks&63 == 0 {
		e.ended = e.late()
	}
	return e.ended
}

func (e *Engine) late() bool {
	return e.ctx.Err() != nil || e.opt.Deadline > 0 && e.clock() >= time.Duration(e.cut*float64(e.opt.Deadline))
}

// Temperatures are shares of the worth of a replica, so that they mean the same in small and large problems. Annealings begin with heats in
// turn: the second forgets nearly everything.
var heats = []float64{0.2, 0.4, 0.1}

// cold is where annealings end.
const cold = 0.004

// stepsEach is how many steps for each replica the first annealings take where there is time for several; each time that all heats had
// their turn they take twice as many.
const stepsEach = 10_000

// Anneal anneals again and again, rounds times at most, each time from the best placement.
func (e *Engine) Anneal(w Walk, rounds int) {
	for round := 0; round < rounds && !e.ended && w.Size() > 0; round++ {
		w.Begin()
		e.cool(w, heats[round%len(heats)], stepsEach*w.Size()<<min(round/len(heats), 20))
		w.End(e.over)
		if e.opt.Steps > 0 && e.steps >= e.opt.Steps {
			return
		}
	}
}

// cool is one annealing, as long as the rest of the budget or a part of it where that is long enough for several.
func (e *Engine) cool(w Walk, from float64, whole int) {
	begun, first, heat := e.clock(), e.steps, from
	for done := 0; !e.over(); done++ {
		if done&255 == 0 {
			x := e.progress(done, first, whole, begun)
			if x >= 1 {
				return
			}
			heat = from * math.Pow(cold/from, x)
		}
		w.Step(heat)
		e.steps++
	}
}

// progress tells how much of an annealing that began at begun with step first is over after done steps.
func (e *Engine) progress(done, first, whole int, begun time.Duration) float64 {
	if e.opt.Steps > 0 {
		if left := e.opt.Steps - first; left < 2*whole {
			whole = left
		}
		return float64(done) / float64(max(whole, 1))
	}
	now := e.clock()
	left, spent := (e.cut*float64(e.opt.Deadline)-float64(begun))*0.97, float64(now-begun) // a little is for the last descent
	if done > 2000 && left*float64(done)/max(spent, 1) > 2*float64(whole) {
		return float64(done) / float64(whole)
	}
	return spent / max(left, 1)
}

// Enumerate goes through a tree until that is done, or the budget is used up, and tells which. most bounds how many places of the tree
// are looked at where there is no deadline.
func (e *Engine) Enumerate(t Tree, most int) bool {
	x := enumeration{Engine: e, t: t, most: most, levels: t.Levels()}
	return x.from(0)
}

type enumeration struct {
	*Engine
	t            Tree
	most, levels int
	looked       int
}

func (x *enumeration) from(level int) bool {
	if x.looked++; x.looked&255 == 0 && (x.late() || x.opt.Deadline <= 0 && x.looked > x.most) {
		x.ended = true
	}
	if x.ended {
		return false
	}
	if level == x.levels {
		x.t.Leaf()
		return true
	}
	if !x.t.Hopeful(level) {
		return true
	}
	for _, n := range x.t.Choices(level) {
		if !x.t.Put(level, n) {
			continue
		}
		done := x.from(level + 1)
		x.t.Take(level)
		if !done {
			return false
		}
	}
	return true
}
