package solver

import (
	"cmp"
	"math"
	"slices"
)

// A utility lies in (0,1): utilityFloor is the least, so that an instance that runs is always worth more than one that does not.
const (
	utilityFloor = 0.001
	utilitySpan  = 1 - 2*utilityFloor
)

// shared is the worth of balance on a node of k instances.
func (p *problem) shared(k int) float64 {
	return math.Max(0, 1-float64(k-1)/p.crowd)
}

// utility of instance i on node n when k instances run there with it, without what terms over group and link add.
func (p *problem) utility(i, n, k int) float64 {
	c := &p.comps[p.insts[i].comp]
	return utilityFloor + utilitySpan*(c.fixed*c.utility[n]+c.balance*p.shared(k))
}

// cost of instance i going to node n, scaled.
func (p *problem) cost(i, n int) float64 {
	in := &p.insts[i]
	if n == in.current {
		return 0
	}
	c := &p.comps[in.comp]
	v := 0.0
	if !in.free {
		v = c.moveCost
	}
	if !in.holders[n] {
		v += c.mibCost * in.mib
	}
	return v * p.scale
}

// gain is what the objective wins when instance i, nowhere now, goes to node n: its utility, what it takes from the others there, and
// the cost.
func (s *state) gain(i, n int) float64 {
	p := s.p
	c := &p.comps[p.insts[i].comp]
	k := s.count[n]
	u := c.fixed*c.utility[n] + (s.weight[n]+c.balance)*p.shared(k+1)
	if k > 0 {
		u -= s.weight[n] * p.shared(k)
	}
	return (utilityFloor+utilitySpan*(u+s.sway(i, n)))/float64(p.active) - p.cost(i, n)
}

// worth is what the objective wins when instance i, nowhere now, goes to node n: its gain, or where it may not stay only what it takes from the
// others.
func (s *state) worth(i, n int) float64 {
	if s.bad[i] == "" || n != s.p.insts[i].current {
		return s.gain(i, n)
	}
	if k := s.count[n]; k > 0 { // terms over group and link do not count what may not stay
		return utilitySpan * s.weight[n] * (s.p.shared(k+1) - s.p.shared(k)) / float64(s.p.active)
	}
	return 0
}

// result sums the objective up afresh.
func (s *state) result() result {
	var r result
	sum, costs := 0.0, 0.0
	for i := range s.p.insts {
		if s.p.insts[i].fixed {
			continue
		}
		n := s.at[i]
		if n < 0 || s.isBad(i) {
			r.unsatisfied++
			continue
		}
		sum += s.p.utility(i, n, s.count[n])
		costs += s.p.cost(i, n)
	}
	for d := range s.p.comps {
		if s.p.comps[d].dynamic > 0 {
			sum += utilitySpan * s.dynamicNow(d)
		}
	}
	if s.p.active > 0 {
		r.objective = sum/float64(s.p.active) - costs
	}
	return r
}

// best finds the node that wins most for instance i, which must be nowhere, among those but leaves; -1: none is feasible. Of equals the
// one with fewer instances, then the one of the smaller id.
func (s *state) best(i, but int) (int, float64) {
	in := &s.p.insts[i]
	found, value := -1, math.Inf(-1)
	for _, m := range s.p.comps[in.comp].open {
		n := int(m)
		if n == but || s.overMoves(i, n) || s.blocked(i, n) != allowed {
			continue
		}
		v := s.gain(i, n)
		if v > value+epsilon || v > value-epsilon && s.count[n] < s.count[found] {
			found, value = n, v
		}
	}
	return found, value
}

// overMoves tells whether putting instance i (nowhere now) on n would be one move too many in this round.
func (s *state) overMoves(i, n int) bool {
	return s.isMove(i, n) && s.moves >= int(s.p.policy.GetMaxMoves())
}

// construct places what has no node, then moves what may not stay.
func (s *state) construct() {
	s.placeAll()
	for _, i := range s.order(func(i int) bool { return s.must[i] && s.isBad(i) }) {
		a := s.at[i]
		s.put(i, -1)
		if n, _ := s.best(i, a); n >= 0 {
			s.put(i, n)
		} else {
			s.put(i, a)
		}
	}
	s.placeAll()
}

func (s *state) placeAll() {
	for _, i := range s.order(func(i int) bool { return s.at[i] < 0 && !s.p.insts[i].fixed }) {
		if n, _ := s.best(i, -1); n >= 0 {
			s.put(i, n)
		} else {
			s.eject(i)
		}
	}
}

// order lists instances for construction: what others want to be near first, then those with the fewest nodes, then the largest.
func (s *state) order(take func(i int) bool) []int {
	depth := s.p.depths()
	var out []int
	for i := range s.p.insts {
		if take(i) {
			out = append(out, i)
		}
	}
	slices.SortStableFunc(out, func(a, b int) int {
		ca, cb := s.p.insts[a].comp, s.p.insts[b].comp
		x, y := &s.p.comps[ca], &s.p.comps[cb]
		return cmp.Or(
			cmp.Compare(depth[ca], depth[cb]), cmp.Compare(len(x.open), len(y.open)),
			cmp.Compare(y.GetMemoryBytes(), x.GetMemoryBytes()), cmp.Compare(y.GetCpuMillis(), x.GetCpuMillis()),
			cmp.Compare(y.GetDiskBytes(), x.GetDiskBytes()), cmp.Compare(a, b))
	})
	return out
}

// deep is how many components that want to be near each other in a row are told apart.
const deep = 32

// depths counts, by component, how many others it wants to be near in a row, deep at most: more in a cycle, where the order says nothing.
func (p *problem) depths() []int {
	out := make([]int, len(p.comps))
	for changed, round := true, 0; changed && round < deep; round++ {
		changed = false
		for c := range p.comps {
			for _, r := range p.comps[c].nears {
				if out[c] <= out[r.to] {
					out[c], changed = out[r.to]+1, true
				}
			}
		}
	}
	return out
}

// eject places an instance that fits nowhere by sending one other elsewhere.
func (s *state) eject(i int) bool {
	for n := range s.p.nodes {
		if s.p.comps[s.p.insts[i].comp].static[n].constraint != "" || s.evals > s.budget {
			continue
		}
		for j := range s.p.insts {
			if s.at[j] != n || !s.movable(j) {
				continue
			}
			s.put(j, -1)
			if s.blocked(i, n) == allowed {
				s.put(i, n)
				if m, _ := s.best(j, n); m >= 0 {
					s.put(j, m)
					return true
				}
				s.put(i, -1)
			}
			s.put(j, n)
		}
	}
	return false
}

// holdsNear checks near of a placed instance and of those that want to be near it.
func (s *state) holdsNear(i int) bool {
	n := s.at[i]
	s.put(i, -1)
	b := s.blocked(i, n)
	s.put(i, n)
	return b == allowed
}

// movable tells whether the search may move a placed instance.
func (s *state) movable(i int) bool {
	in := &s.p.insts[i]
	if in.fixed || s.at[i] < 0 || in.pin >= 0 || s.p.comps[in.comp].GetEachNode() {
		return false
	}
	if in.free {
		return true
	}
	if s.at[i] == in.current {
		return !in.locked && s.bad[i] == ""
	}
	return true // moved in this round already: it may go elsewhere
}
