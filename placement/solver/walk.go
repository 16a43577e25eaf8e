package solver

import (
	"cmp"
	"context"
	"math"
	"math/rand/v2"
	"slices"

	"github.com/coppice-project/coppice/placement/solver/assign"
)

// walk is a state as the engine of package assign anneals it. Every placement on the way holds the hard constraints and the bound on moves, and leaves
// no more instances without an acceptable node than the one before.
type walk struct {
	*state
	rng   *rand.Rand
	items []int     // instances that may go elsewhere
	nodes [][]int32 // by component: nodes that are for it, those of the highest utility first
	value float64   // of the placement, from where the search began
	best  []int     // by instance: the best placement since Begin
	top   float64   // its value
	dirty []int     // instances that changed since best was written down
	all   []int     // the best placement of all
	peak  float64   // its value
}

func newWalk(s *state, seed uint64) *walk {
	w := &walk{state: s, rng: rand.New(rand.NewPCG(seed, 0x6a09e667f3bcc909)), all: slices.Clone(s.at), best: slices.Clone(s.at), nodes: make([][]int32, len(s.p.comps))}
	for i := range s.p.insts {
		in := &s.p.insts[i]
		open := !in.fixed && in.pin < 0 && !s.p.comps[in.comp].GetEachNode()
		if open && (s.at[i] < 0 || s.isBad(i) && s.must[i] || s.movable(i)) {
			w.items = append(w.items, i)
		}
	}
	ranked := map[*class][]int32{}
	for c := range s.p.comps {
		k := s.p.comps[c].class
		if ranked[k] == nil {
			ranked[k] = k.ranked()
		}
		w.nodes[c] = ranked[k]
	}
	return w
}

// ranked lists the nodes that are for the components of a class, those of the highest utility first.
func (k *class) ranked() []int32 {
	out := slices.Clone(k.open)
	slices.SortStableFunc(out, func(a, b int32) int { return cmp.Compare(k.utility[b], k.utility[a]) })
	return out
}

// Size implements assign.Walk.
func (w *walk) Size() int { return len(w.items) }

// Begin implements assign.Walk.
func (w *walk) Begin() { w.restore(w.all, w.peak) }

// End implements assign.Walk.
func (w *walk) End(over func() bool) {
	w.restore(w.best, w.top)
	w.descend(over)
	if w.value > w.peak+epsilon {
		w.peak = w.value
		copy(w.all, w.at)
	}
}

// restore goes to a placement that was looked at before.
func (w *walk) restore(to []int, value float64) {
	w.arrange(to)
	w.value, w.top, w.dirty = value, value, w.dirty[:0]
	copy(w.best, w.at)
}

// arrange puts every instance where a placement says.
func (s *state) arrange(to []int) {
	for i, n := range to {
		if s.at[i] != n && s.at[i] >= 0 {
			s.put(i, -1)
		}
	}
	for i, n := range to {
		if s.at[i] != n {
			s.put(i, n)
		}
	}
}

// note takes down that instances went elsewhere, for a gain.
func (w *walk) note(gain float64, changed ...int) {
	w.value += gain
	w.dirty = append(w.dirty, changed...)
	if w.value <= w.top+epsilon {
		if len(w.dirty) > 4*len(w.items)+64 {
			slices.Sort(w.dirty)
			w.dirty = slices.Compact(w.dirty)
		}
		return
	}
	w.top = w.value
	for _, i := range w.dirty {
		w.best[i] = w.at[i]
	}
	w.dirty = w.dirty[:0]
}

// satisfied is what an instance that has an acceptable node counts besides its utility: more than anything else can win.
const satisfied = 1e3

// accepts tells whether a change of gain v is made.
func (w *walk) accepts(v, heat float64) bool {
	return v >= 0 || v > -20*heat && v > heat*math.Log(w.rng.Float64())
}

// Step implements assign.Walk.
func (w *walk) Step(heat float64) {
	heat /= math.Max(float64(w.p.active), 1)
	i := w.items[w.rng.IntN(len(w.items))]
	switch x := w.rng.IntN(100); {
	case x < 70:
		if to := w.target(i); to >= 0 {
			w.relocate(i, to, heat)
		}
	case x < 92:
		w.exchange(i, w.items[w.rng.IntN(len(w.items))], heat)
	default:
		if home := w.p.insts[i].current; home >= 0 && !w.p.insts[i].free {
			w.relocate(i, home, heat)
		}
	}
}

// target is a node to try for instance i.
func (w *walk) target(i int) int {
	in := &w.p.insts[i]
	nodes := w.nodes[in.comp]
	if len(nodes) == 0 {
		return -1
	}
	switch x := w.rng.IntN(20); {
	case x < 2 && in.current >= 0:
		return in.current
	case x < 5:
		if n := w.partner(in.comp); n >= 0 {
			return n
		}
	case x < 12:
		x := w.rng.Float64()
		return int(nodes[int(x*x*x*float64(len(nodes)))])
	}
	return int(nodes[w.rng.IntN(len(nodes))])
}

// partner is a node of a component that this one has to be near to, or that has to be near to this one; -1: none.
func (w *walk) partner(c int) int {
	k := &w.p.comps[c]
	of := -1
	if len(k.nears) > 0 {
		of = k.nears[w.rng.IntN(len(k.nears))].to
	}
	if len(k.nearOf) > 0 && (of < 0 || w.rng.IntN(2) == 0) {
		of = k.nearOf[w.rng.IntN(len(k.nearOf))]
	}
	if of < 0 || len(w.p.comps[of].insts) == 0 {
		return -1
	}
	return w.at[w.p.comps[of].insts[w.rng.IntN(len(w.p.comps[of].insts))]]
}

// relocate puts instance i on another node. Where the moves are used up another instance goes home for it.
func (w *walk) relocate(i, to int, heat float64) {
	from := w.at[i]
	if to == from || w.p.comps[w.p.insts[i].comp].static[to].constraint != "" {
		return
	}
	v := w.out(i)
	j, back := -1, -1
	if w.overMoves(i, to) {
		if j = w.moved(i); j >= 0 {
			back = w.at[j]
			v += w.out(j)
			if home := w.p.insts[j].current; w.blocked(j, home) == allowed {
				v += w.in(j, home)
			} else {
				w.put(j, back)
				w.put(i, from)
				return
			}
		}
	}
	if !w.overMoves(i, to) && w.blocked(i, to) == allowed {
		if v += w.in(i, to); w.accepts(v, heat) && (j < 0 || w.holdsNear(j)) {
			if j >= 0 {
				w.note(v, i, j)
			} else {
				w.note(v, i)
			}
			return
		}
		w.put(i, -1)
	}
	if j >= 0 {
		w.put(j, -1)
		w.put(j, back)
	}
	w.put(i, from)
}

// out takes instance i from where it is, in puts it on a node; both tell what that wins.
func (w *walk) out(i int) float64 {
	n := w.at[i]
	if n < 0 {
		return 0
	}
	v := 0.0
	if !w.isBad(i) {
		v = -satisfied
	}
	w.put(i, -1)
	return v - w.worth(i, n)
}

func (w *walk) in(i, n int) float64 {
	v := w.worth(i, n)
	w.put(i, n)
	if !w.isBad(i) {
		v += satisfied
	}
	return v
}

// moved is an instance besides i that moves in this round and may as well stay; -1: none.
func (w *walk) moved(i int) int {
	if len(w.movers) == 0 {
		return -1
	}
	if j := w.movers[w.rng.IntN(len(w.movers))]; j != i && w.bad[j] == "" {
		return j
	}
	return -1
}

// exchange has two instances change places.
func (w *walk) exchange(i, j int, heat float64) {
	a, b := w.at[i], w.at[j]
	ci, cj := w.p.insts[i].comp, w.p.insts[j].comp
	if a < 0 || b < 0 || a == b || w.p.comps[ci].static[b].constraint != "" || w.p.comps[cj].static[a].constraint != "" {
		return
	}
	v := w.out(i) + w.out(j)
	if !w.overMoves(i, b) && w.blocked(i, b) == allowed {
		v += w.in(i, b)
		if !w.overMoves(j, a) && w.blocked(j, a) == allowed {
			if v += w.in(j, a); w.accepts(v, heat) && w.holdsNear(i) && w.holdsNear(j) {
				w.note(v, i, j)
				return
			}
			w.put(j, -1)
		}
		w.put(i, -1)
	}
	w.put(i, a)
	w.put(j, b)
}

// wide is the number of evaluations up to which a descent looks at every node for every instance; above it at the most promising ones.
const (
	wide       = 2_000_000
	lookNarrow = 64
)

// descend makes the single changes that win until none does.
func (w *walk) descend(over func() bool) {
	for improved := true; improved; {
		improved = false
		for _, i := range w.items {
			if over() {
				return
			}
			nodes := w.nodes[w.p.insts[i].comp]
			if len(w.items)*len(w.p.nodes) > wide {
				nodes = nodes[:min(len(nodes), lookNarrow)]
			}
			improved = w.climb(i, nodes) || improved
		}
	}
}

// climb puts instance i on the node where it wins most, if it wins at all.
func (w *walk) climb(i int, nodes []int32) bool {
	from := w.at[i]
	here := w.out(i)
	found, value := -1, epsilon
	for _, n := range nodes {
		n := int(n)
		if n == from || w.overMoves(i, n) || w.blocked(i, n) != allowed {
			continue
		}
		v := here + w.worth(i, n)
		if w.bad[i] == "" || n != w.p.insts[i].current {
			v += satisfied
		}
		if v > value {
			found, value = n, v
		}
	}
	if found < 0 {
		w.put(i, from)
		return false
	}
	w.put(i, found)
	w.note(value, i)
	return true
}

// search looks for a better placement than the one that the state is: it goes through all of them where they are few, and anneals else. It tells whether
// nothing is better than what it leaves the state in.
func (s *state) search(seed uint64) (optimal bool) {
	x := newExact(s)
	if ways := x.ways(); ways <= exactWays && x.solve(min(exactLooks, s.budget)) {
		s.arrange(x.top)
		return true
	}
	s.arrange(x.top)
	w := newWalk(s, seed)
	if len(w.items) == 0 {
		return false
	}
	e := assign.NewEngine(context.Background(), assign.Options{Seed: seed, Steps: min(stepsEach*len(w.items), s.budget/2)})
	e.Anneal(w, math.MaxInt)
	s.arrange(w.all)
	return false
}

// stepsEach is how many steps of annealing an instance gets at most; the policy's budget bounds them all.
const stepsEach = 2000
