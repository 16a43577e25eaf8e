package assign

import (
	"math"
	"math/rand/v2"
)

// annealer walks from placement to placement, towards better ones the more the colder it is.
type annealer struct {
	*state
	rng     *rand.Rand
	heat    float64 // temperature
	all     []who   // replicas that may move
	undo    []step
	change  []step // since the best placement was last written down
	best    [][]int32
	top     rank // of best
	buildup *builder
}

type who struct{ comp, replica int32 }

type step struct {
	who
	from int32
}

func newAnnealer(s *state, rng *rand.Rand) *annealer {
	a := &annealer{state: s, rng: rng, buildup: newBuilder(s, rng)}
	for c := range s.at {
		for r := range s.at[c] {
			if !s.fixed[c][r] {
				a.all = append(a.all, who{int32(c), int32(r)})
			}
		}
	}
	return a
}

// restart begins from where the state is.
func (a *annealer) restart() {
	a.change = a.change[:0]
	a.best = a.snapshot(a.best)
	a.top = a.rank()
}

// note writes the placement down if it is better than the best.
func (a *annealer) note() {
	if !a.rank().above(a.top) {
		if len(a.change) > 4*len(a.all)+1000 { // as many as a whole copy: what changed is found by comparing
			a.compact()
		}
		return
	}
	a.top = a.rank()
	for _, c := range a.change {
		a.best[c.comp][c.replica] = a.at[c.comp][c.replica]
	}
	a.change = a.change[:0]
}

// compact leaves in change what differs from the best.
func (a *annealer) compact() {
	a.change = a.change[:0]
	for _, w := range a.all {
		if a.at[w.comp][w.replica] != a.best[w.comp][w.replica] {
			a.change = append(a.change, step{who: w})
		}
	}
}

// gainful is the least gain that counts, above what sums of floats are off.
const gainful = 1e-11

// to makes a step that can be undone.
func (a *annealer) to(w who, n int32) float64 {
	a.undo = append(a.undo, step{w, a.at[w.comp][w.replica]})
	return a.move(int(w.comp), int(w.replica), n)
}

// back undoes all steps since the last settle. Places that were full before are so again.
func (a *annealer) back() {
	for i := len(a.undo) - 1; i >= 0; i-- {
		u := a.undo[i]
		a.move(int(u.comp), int(u.replica), u.from)
	}
	a.undo = a.undo[:0]
}

func (a *annealer) settle() {
	a.change = append(a.change, a.undo...)
	a.undo = a.undo[:0]
	a.note()
}

// accepts tells whether a step of gain v is taken: losses the likelier the hotter it is.
func (a *annealer) accepts(v float64) bool {
	return v >= 0 || v > -20*a.heat && v > a.heat*math.Log(a.rng.Float64())
}

// try makes one step.
func (a *annealer) try() {
	if len(a.all) == 0 {
		return
	}
	switch x := a.rng.IntN(100); {
	case x < 72:
		a.relocate()
	case x < 92:
		a.swap()
	case x < 97:
		a.transplant()
	default:
		a.evacuate()
	}
}

func (a *annealer) relocate() {
	w := a.all[a.rng.IntN(len(a.all))]
	c, r := int(w.comp), int(w.replica)
	from := a.at[c][r]
	to := a.target(c, from)
	if to < 0 || to == from || !a.fits(c, from, to) {
		return
	}
	if !a.accepts(a.gain(c, r, to)) {
		return
	}
	a.to(w, to)
	a.settle()
}

// target is a node to try for a replica of c.
func (a *annealer) target(c int, from int32) int32 {
	k := &a.p.parts[c]
	switch x := a.rng.IntN(20); {
	case x < 11 && len(a.used) > 0:
		return a.used[a.rng.IntN(len(a.used))]
	case x < 15 && len(k.out)+len(k.in) > 0:
		return a.partner(k)
	case x < 16 && len(k.old) > 0:
		return k.old[a.rng.IntN(len(k.old))].node
	}
	region := -1
	if from >= 0 && a.rng.IntN(4) > 0 {
		region = int(a.p.a.Nodes.Region[from])
	}
	return a.promising(region)
}

// partner is a node where c calls or is called.
func (a *annealer) partner(k *part) int32 {
	i := a.rng.IntN(len(k.out) + len(k.in))
	var list []int32
	if i < len(k.out) {
		list = a.at[a.p.links[k.out[i]].to]
	} else {
		list = a.at[a.p.links[k.in[i-len(k.out)]].from]
	}
	if len(list) == 0 {
		return -1
	}
	return list[a.rng.IntN(len(list))]
}

// promising is a node of a region, -1: of any; those that promise much are likelier.
func (a *annealer) promising(region int) int32 {
	if region < 0 {
		region = a.rng.IntN(len(a.p.rank))
	}
	list := a.p.rank[region]
	if len(list) == 0 {
		return -1
	}
	x := a.rng.Float64()
	return list[int(x*x*x*float64(len(list)))]
}

// swap moves a replica to where another one is, which makes room by going where the first was, or anywhere.
func (a *annealer) swap() {
	w := a.all[a.rng.IntN(len(a.all))]
	c, r := int(w.comp), int(w.replica)
	from := a.at[c][r]
	if from < 0 {
		return
	}
	to := a.used[a.rng.IntN(len(a.used))]
	if a.rng.IntN(3) == 0 && len(a.p.parts[c].out)+len(a.p.parts[c].in) > 0 {
		to = a.partner(&a.p.parts[c])
	}
	if to < 0 || to == from || !a.p.parts[c].Regions[a.p.a.Nodes.Region[to]] || len(a.on[to]) == 0 {
		return
	}
	d := int(a.on[to][a.rng.IntN(len(a.on[to]))].comp)
	q := a.loose(d, to)
	if d == c || q < 0 {
		return
	}
	// what does not fit even without the other is not worth undoing
	k, o := &a.p.parts[c], &a.p.parts[d]
	if a.cpu[to]+o.CPU < k.CPU || a.memory[to]+o.Memory < k.Memory {
		return
	}
	away := from
	if a.rng.IntN(2) == 0 {
		away = a.target(d, to)
	}
	if away < 0 || away == to || away == from && (a.cpu[from]+k.CPU < o.CPU || a.memory[from]+k.Memory < o.Memory) {
		return
	}
	other := who{int32(d), int32(q)}
	v := a.to(other, -1)
	if a.fits(c, from, to) {
		v += a.to(w, to)
		if a.fits(d, -1, away) {
			if v += a.to(other, away); a.accepts(v) {
				a.settle()
				return
			}
		}
	}
	a.back()
}

// transplant moves all that is on a node to one that is not used.
func (a *annealer) transplant() {
	if len(a.used) == 0 {
		return
	}
	from := a.used[a.rng.IntN(len(a.used))]
	region := int(a.p.a.Nodes.Region[from])
	if a.rng.IntN(4) == 0 {
		region = -1
	}
	to := a.promising(region)
	if to < 0 || a.tenants[to] > 0 {
		return
	}
	if v, ok := a.clear(from, func(who) int32 { return to }); !ok || !a.accepts(v) {
		a.back()
		return
	}
	a.settle()
}

// evacuate spreads all that is on a node over other used ones.
func (a *annealer) evacuate() {
	if len(a.used) < 2 {
		return
	}
	from := a.used[a.rng.IntN(len(a.used))]
	v, ok := a.clear(from, func(w who) int32 {
		best, value := int32(-1), math.Inf(-1)
		for range 6 {
			n := a.used[a.rng.IntN(len(a.used))]
			if n == from || !a.fits(int(w.comp), from, n) {
				continue
			}
			if g := a.gain(int(w.comp), int(w.replica), n); g > value {
				best, value = n, g
			}
		}
		return best
	})
	if !ok || !a.accepts(v) {
		a.back()
		return
	}
	a.settle()
}

// clear moves all that is on a node to where choose says.
func (a *annealer) clear(from int32, choose func(w who) int32) (v float64, ok bool) {
	for len(a.on[from]) > 0 {
		c := int(a.on[from][0].comp)
		r := a.loose(c, from)
		if r < 0 {
			return 0, false
		}
		w := who{int32(c), int32(r)}
		to := choose(w)
		if to < 0 || !a.fits(c, from, to) {
			return 0, false
		}
		v += a.to(w, to)
	}
	return v, true
}

// descend moves single replicas to where they win most until none wins, over the nodes that construction would look at.
func (a *annealer) descend(ended func() bool) {
	for improved := true; improved; {
		improved = false
		for _, w := range a.all {
			if ended() {
				return
			}
			c, r := int(w.comp), int(w.replica)
			found, value := int32(-1), gainful
			a.buildup.turn++
			a.buildup.candidates(c, func(n int32) {
				if n < 0 || n == a.at[c][r] || a.buildup.seen[n] == a.buildup.turn {
					return
				}
				a.buildup.seen[n] = a.buildup.turn
				if a.fits(c, a.at[c][r], n) {
					if v := a.gain(c, r, n); v > value {
						found, value = n, v
					}
				}
			})
			if found >= 0 {
				a.to(w, found)
				a.settle()
				improved = true
			}
		}
	}
}
