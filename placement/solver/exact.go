package solver

import (
	"cmp"
	"context"
	"math"
	"slices"

	"github.com/coppice-project/coppice/placement/solver/assign"
)

// Going through all plans is tried when there are no more than exactWays of them, and given up after exactLooks looks.
const (
	exactWays  = 5e6
	exactLooks = 100_000
	exactTable = 200_000 // instances × nodes
)

// choice is what may become of an instance, whatever the others do.
type choice struct {
	inst  int
	nodes []int32 // home first; -1, nowhere, last
	move  bool    // a node that is not home is a move for a better objective
	least float64 // the most it wins without such a move
	more  float64 // and how much more with one, at most
	lost  bool    // it can have no acceptable node
}

// choices lists what may become of each instance that wants a node. Without nodes their numbers are left out, which take much memory, and of many it is
// only looked at what the best node of each component is worth.
func (s *state) choices(nodes bool) []choice {
	p := s.p
	var out []choice
	var best []float64
	if !nodes && len(p.insts)*len(p.nodes) > wide {
		best = p.bests()
	}
	for i := range p.insts {
		in := &p.insts[i]
		if in.fixed {
			continue
		}
		c := choice{inst: i, move: in.current >= 0 && !in.locked && s.bad[i] == "", lost: true}
		leaves := in.free || c.move || s.bad[i] != "" && s.must[i]
		if in.current >= 0 {
			c.nodes = append(c.nodes, int32(in.current))
			if s.bad[i] == "" {
				c.least, c.lost = s.alone(i, in.current), false
			}
		}
		top := math.Inf(-1)
		if best != nil && leaves {
			top = best[in.comp]
			c.lost = false
		}
		for n := range p.nodes {
			if best != nil || !leaves || n == in.current || s.never(i, n) != allowed {
				continue
			}
			if nodes {
				c.nodes = append(c.nodes, int32(n))
			}
			top = math.Max(top, s.alone(i, n))
			c.lost = false
		}
		if c.move {
			c.more = math.Max(0, top-c.least)
		} else {
			c.least = math.Max(c.least, top)
		}
		if in.free {
			c.nodes = append(c.nodes, -1)
		}
		out = append(out, c)
	}
	return out
}

// bests is, by component, what an instance of it wins at most wherever it goes.
func (p *problem) bests() []float64 {
	out := make([]float64, len(p.comps))
	for c := range p.comps {
		k := &p.comps[c]
		for n := range p.nodes {
			if k.static[n].constraint == "" {
				out[c] = math.Max(out[c], k.fixed*k.utility[n]+k.balance+k.dynamic)
			}
		}
		out[c] = (utilityFloor + utilitySpan*out[c]) / math.Max(float64(p.active), 1)
	}
	return out
}

// alone is what instance i wins on node n when nothing takes anything from it.
func (s *state) alone(i, n int) float64 {
	return (s.p.utility(i, n, 1)+utilitySpan*s.p.comps[s.p.insts[i].comp].dynamic)/float64(s.p.active) - s.p.cost(i, n)
}

// most bounds what choices can win together with a number of moves: each the best that it can have, alone where it is.
func most(all []choice, moves int) float64 {
	sum := 0.0
	var more []float64
	for _, c := range all {
		sum += c.least
		if c.more > 0 {
			more = append(more, c.more)
		}
	}
	slices.SortFunc(more, func(a, b float64) int { return cmp.Compare(b, a) })
	for _, v := range more[:min(moves, len(more))] {
		sum += v
	}
	return sum
}

// exact goes through all plans of a state, with assign.Engine.
type exact struct {
	*state
	levels []choice
	alike  []bool // by level: it is as the one before it, so that it takes the same node or a later one
	at     []int  // by level: the place in its nodes that was chosen
	won    []float64
	value  float64 // of what was put
	lost   int     // instances put where they may not stay, or nowhere
	rest   []float64
	owed   []int       // by level: from it on, instances that can have no acceptable node
	more   [][]float64 // by level, by number of moves: what moves from it on win at most
	top    []int       // the best plan: by instance its node
	peak   result
}

func newExact(s *state) *exact {
	x := &exact{state: s, top: slices.Clone(s.at), peak: s.result()}
	if len(s.p.insts)*len(s.p.nodes) > exactTable {
		return x
	}
	x.levels = s.choices(true)
	// what has no choice first, then what has to have a node, then what moves only for more
	slices.SortStableFunc(x.levels, func(a, b choice) int {
		class := func(c choice) int {
			switch {
			case len(c.nodes) == 1:
				return 0
			case !c.move:
				return 1
			}
			return 2
		}
		return cmp.Or(cmp.Compare(class(a), class(b)), cmp.Compare(b.more, a.more), cmp.Compare(len(a.nodes), len(b.nodes)),
			cmp.Compare(s.p.insts[a.inst].comp, s.p.insts[b.inst].comp), cmp.Compare(a.inst, b.inst))
	})
	return x
}

// ways is about how many plans there are; infinite where they are too many to say.
func (x *exact) ways() float64 {
	if len(x.levels) == 0 && x.p.active > 0 {
		return math.Inf(1)
	}
	ways, movable, nodes := 1.0, 0.0, 0.0
	for _, c := range x.levels {
		if c.move {
			movable++
			nodes = math.Max(nodes, float64(len(c.nodes)-1))
		} else {
			ways *= float64(len(c.nodes))
		}
	}
	sum, term := 1.0, 1.0
	for m := 1.0; m <= math.Min(float64(x.p.policy.GetMaxMoves()), movable) && sum < exactWays; m++ {
		term *= (movable - m + 1) / m * nodes
		sum += term
	}
	return ways * sum
}

// solve goes through all plans, and tells whether it came to the end of them. The best one is in top.
func (x *exact) solve(looks int) bool {
	x.prepare()
	for _, c := range x.levels {
		if x.state.at[c.inst] >= 0 {
			x.put(c.inst, -1)
		}
	}
	e := assign.NewEngine(context.Background(), assign.Options{Steps: 1})
	return e.Enumerate(x, looks)
}

func (x *exact) prepare() {
	k := len(x.levels)
	x.alike, x.at, x.won = make([]bool, k), make([]int, k), make([]float64, k)
	x.rest, x.owed, x.more = make([]float64, k+1), make([]int, k+1), make([][]float64, k+1)
	moves := 0
	for _, c := range x.levels {
		if c.more > 0 {
			moves++
		}
	}
	moves = min(moves, int(x.p.policy.GetMaxMoves()))
	x.more[k] = make([]float64, moves+1)
	var wins []float64 // of the levels so far, the highest first
	for l := k - 1; l >= 0; l-- {
		c := &x.levels[l]
		x.rest[l] = x.rest[l+1] + c.least
		if x.owed[l] = x.owed[l+1]; c.lost {
			x.owed[l]++
		}
		at, _ := slices.BinarySearchFunc(wins, c.more, func(v, more float64) int { return cmp.Compare(more, v) })
		wins = slices.Insert(wins, at, c.more)
		wins = wins[:min(len(wins), moves)]
		x.more[l] = make([]float64, moves+1)
		for m := range moves {
			x.more[l][m+1] = x.more[l][m]
			if m < len(wins) {
				x.more[l][m+1] += wins[m]
			}
		}
		x.alike[l] = l > 0 && x.same(x.levels[l-1].inst, c.inst)
	}
}

// same tells whether two instances are interchangeable.
func (x *exact) same(i, j int) bool {
	a, b := &x.p.insts[i], &x.p.insts[j]
	plain := func(in *inst) bool {
		return in.free && in.pin < 0 && len(in.holders) == 0 && len(in.avoid) == 0 && in.GetPinned() == ""
	}
	return a.comp == b.comp && plain(a) && plain(b) && a.mib == b.mib
}

// Levels implements assign.Tree: an instance each.
func (x *exact) Levels() int { return len(x.levels) }

// Choices implements assign.Tree.
func (x *exact) Choices(level int) []int32 {
	if x.alike[level] {
		return x.levels[level].nodes[x.at[level-1]:]
	}
	return x.levels[level].nodes
}

// Put implements assign.Tree.
func (x *exact) Put(level int, node int32) bool {
	c, n := &x.levels[level], int(node)
	home := n >= 0 && n == x.p.insts[c.inst].current
	v := 0.0
	switch {
	case n < 0:
		x.lost++
	case home:
		v = x.worth(c.inst, n)
		if x.bad[c.inst] != "" {
			x.lost++
		}
	default:
		if x.overMoves(c.inst, n) {
			return false
		}
		// near and constraints over the group may hold yet when more has been put
		if b := x.blocked(c.inst, n); b != allowed && b != byNear && b != byNearOf && b != byGroup {
			return false
		}
		v = x.worth(c.inst, n)
	}
	if k := &x.p.comps[x.p.insts[c.inst].comp]; n >= 0 && (len(k.sways) > 0) && (!home || x.bad[c.inst] == "") {
		// terms over group and link are at their best until all have been put
		v += utilitySpan * (k.dynamic - x.sway(c.inst, n)) / float64(x.p.active)
	}
	if n >= 0 {
		x.put(c.inst, n)
	}
	x.at[level] = slices.Index(c.nodes, node)
	x.won[level] = v
	x.value += v
	return true
}

// Take implements assign.Tree.
func (x *exact) Take(level int) {
	c := &x.levels[level]
	n := x.state.at[c.inst]
	if n < 0 || x.isBad(c.inst) {
		x.lost--
	}
	if n >= 0 {
		x.put(c.inst, -1)
	}
	x.value -= x.won[level]
}

// Hopeful implements assign.Tree.
func (x *exact) Hopeful(level int) bool {
	if lost := x.lost + x.owed[level]; lost != x.peak.unsatisfied {
		return lost < x.peak.unsatisfied
	}
	left := min(max(int(x.p.policy.GetMaxMoves())-x.moves, 0), len(x.more[level])-1)
	return x.value+x.rest[level]+x.more[level][left] > x.peak.objective+epsilon
}

// Leaf implements assign.Tree.
func (x *exact) Leaf() {
	r := x.result()
	if r.unsatisfied > x.peak.unsatisfied || r.unsatisfied == x.peak.unsatisfied && r.objective <= x.peak.objective+epsilon {
		return
	}
	for _, c := range x.levels {
		if n := x.state.at[c.inst]; n >= 0 && n != x.p.insts[c.inst].current && !x.holdsNear(c.inst) {
			return
		}
	}
	x.peak = r
	copy(x.top, x.state.at)
}
