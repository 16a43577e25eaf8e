package solver

import (
	"cmp"
	"fmt"
	"maps"
	"math"
	"slices"
)

// state is one arrangement of the instances, with sums kept as it changes.
type state struct {
	p              *problem
	at             []int    // by instance: its node, -1: none
	bad            []string // by instance: why where it runs now is not acceptable; "" = it is
	must           []bool   // by instance: it should leave where it runs now
	cpu, mem, disk []uint64 // by node: taken
	count          []int    // by node: instances
	weight         []float64
	values         [][]int       // by component: instances by spread value
	spent          []float64     // by application: what the nodes that it uses cost
	uses           []map[int]int // by application with a budget: instances by node
	dyn            []float64     // by component: its dynamic, where dynKnown
	dynKnown       []bool
	scratch        []int
	moves          int
	movers         []int // instances that move
	evals, budget  int
	explained      int // nodes that were looked at to say why an instance has none
}

// newState is the current plan: each instance where it runs, and which of them may not stay.
func newState(p *problem) *state {
	n := len(p.nodes)
	s := &state{
		p: p, at: make([]int, len(p.insts)), bad: make([]string, len(p.insts)), must: make([]bool, len(p.insts)),
		cpu: make([]uint64, n), mem: make([]uint64, n), disk: make([]uint64, n), count: make([]int, n), weight: make([]float64, n),
		values: make([][]int, len(p.comps)), spent: make([]float64, len(p.apps)), uses: make([]map[int]int, len(p.apps)),
		dyn: make([]float64, len(p.comps)), dynKnown: make([]bool, len(p.comps)),
	}
	for i := range s.uses {
		s.uses[i] = map[int]int{}
	}
	budget := uint64(p.policy.GetBudgetMs())
	if budget == 0 {
		budget = uint64(DefaultPolicy().GetBudgetMs())
	}
	s.budget = int(min(budget, 60_000) * evaluationsPerMs)
	for c := range p.comps {
		if p.comps[c].limit > 0 {
			s.values[c] = make([]int, slices.Max(append([]int{0}, p.comps[c].value...))+1)
		}
	}
	for i := range p.insts {
		in := &p.insts[i]
		s.at[i] = -1
		switch {
		case in.fixed && in.current >= 0 && p.comps[in.comp].GetSystem() && !in.GetStopped():
			s.take(i, in.current, 1)
		case !in.fixed && in.current >= 0:
			s.bad[i], s.must[i] = in.why, in.must
			s.put(i, in.current)
		}
	}
	s.findOvercommitted()
	s.findCrowded()
	s.findFar()
	s.findUnfit()
	return s
}

// take adds (or with sign -1 gives back) an instance's demand.
func (s *state) take(i, n, sign int) {
	c := &s.p.comps[s.p.insts[i].comp]
	if sign > 0 {
		s.cpu[n] += c.GetCpuMillis()
		s.mem[n] += c.GetMemoryBytes()
		s.disk[n] += c.GetDiskBytes()
		return
	}
	s.cpu[n] -= c.GetCpuMillis()
	s.mem[n] -= c.GetMemoryBytes()
	s.disk[n] -= c.GetDiskBytes()
}

// put moves an instance to a node, -1: to none.
func (s *state) put(i, n int) {
	in := &s.p.insts[i]
	c := &s.p.comps[in.comp]
	for _, d := range c.sways {
		s.dynKnown[d] = false
	}
	if a := s.at[i]; a >= 0 {
		s.take(i, a, -1)
		s.count[a]--
		if !s.isBad(i) {
			s.weight[a] -= c.balance
			s.pay(c, a, -1)
		}
		if c.limit > 0 {
			s.values[in.comp][c.value[a]]--
		}
		if s.isMove(i, a) {
			s.moves--
			k := slices.Index(s.movers, i)
			last := len(s.movers) - 1
			s.movers[k] = s.movers[last]
			s.movers = s.movers[:last]
		}
	}
	s.at[i] = n
	if n < 0 {
		return
	}
	s.take(i, n, 1)
	s.count[n]++
	if !s.isBad(i) {
		s.weight[n] += c.balance
		s.pay(c, n, 1)
	}
	if c.limit > 0 {
		s.values[in.comp][c.value[n]]++
	}
	if s.isMove(i, n) {
		s.moves++
		s.movers = append(s.movers, i)
	}
}

// pay counts the nodes that an application with a budget uses.
func (s *state) pay(c *comp, n, sign int) {
	if c.budget == nil {
		return
	}
	uses := s.uses[c.app]
	before := uses[n]
	if uses[n] += sign; uses[n] == 0 {
		delete(uses, n)
	}
	switch {
	case before == 0:
		s.spent[c.app] += s.p.nodes[n].price
	case before == 1 && sign < 0:
		s.spent[c.app] = 0 // sums of floats, and prices that are no numbers, are not undone by a difference
		for _, m := range slices.Sorted(maps.Keys(uses)) {
			s.spent[c.app] += s.p.nodes[m].price
		}
	}
}

// isBad tells whether an instance is still where it may not stay.
func (s *state) isBad(i int) bool {
	return s.bad[i] != "" && s.at[i] == s.p.insts[i].current
}

func (s *state) isMove(i, n int) bool {
	in := &s.p.insts[i]
	return !in.free && n != in.current
}

// mark says that an instance may not stay where it runs. It has to leave when it has settled; else it waits.
func (s *state) mark(i int, why string) {
	n := s.at[i]
	s.put(i, -1)
	s.bad[i] = why
	s.must[i] = s.must[i] || s.p.insts[i].GetSettledMs() >= s.p.policy.GetMinSettledMs()
	s.put(i, n)
}

// victims lists instances in the order in which they have to give way: the smallest state first, then the last by name. Pinned ones and
// those that belong to their node never do.
func (s *state) victims(keep func(i int) bool) []int {
	var out []int
	for i := range s.p.insts {
		in := &s.p.insts[i]
		if s.at[i] >= 0 && !s.isBad(i) && in.pin < 0 && !s.p.comps[in.comp].GetEachNode() && keep(i) {
			out = append(out, i)
		}
	}
	slices.SortFunc(out, func(a, b int) int {
		return cmp.Or(cmp.Compare(s.p.insts[a].mib, s.p.insts[b].mib), cmp.Compare(b, a))
	})
	return out
}

func (s *state) findOvercommitted() {
	for n := range s.p.nodes {
		node := &s.p.nodes[n]
		over := func(cpu, mem, disk uint64) bool {
			return cpu > node.GetCpuMillis() || mem > node.GetMemoryBytes() || disk > node.GetDiskBytes()
		}
		cpu, mem, disk := s.cpu[n], s.mem[n], s.disk[n]
		if !over(cpu, mem, disk) {
			continue
		}
		for i := range s.p.insts { // those that leave anyhow
			if c := &s.p.comps[s.p.insts[i].comp]; s.at[i] == n && s.isBad(i) {
				cpu, mem, disk = cpu-c.GetCpuMillis(), mem-c.GetMemoryBytes(), disk-c.GetDiskBytes()
			}
		}
		for _, i := range s.victims(func(i int) bool { return s.at[i] == n }) {
			c := &s.p.comps[s.p.insts[i].comp]
			if !over(cpu, mem, disk) {
				break
			}
			if c.GetCpuMillis() == 0 && c.GetMemoryBytes() == 0 && c.GetDiskBytes() == 0 {
				continue
			}
			cpu, mem, disk = cpu-c.GetCpuMillis(), mem-c.GetMemoryBytes(), disk-c.GetDiskBytes()
			s.mark(i, "capacity: "+node.name+" no longer has room for all that runs there")
		}
	}
}

func (s *state) findCrowded() {
	for ci := range s.p.comps {
		c := &s.p.comps[ci]
		if c.limit == 0 {
			continue
		}
		good := make([]int, len(s.values[ci]))
		for _, i := range c.insts {
			if s.at[i] >= 0 && !s.isBad(i) {
				good[c.value[s.at[i]]]++
			}
		}
		for _, i := range s.victims(func(i int) bool { return s.p.insts[i].comp == ci }) {
			if v := c.value[s.at[i]]; good[v] > c.limit {
				good[v]--
				s.mark(i, fmt.Sprintf("spread: more than %d of %s share a %s", c.limit, c.GetKey(), c.GetSpread()))
			}
		}
	}
}

func (s *state) findFar() {
	for ci := range s.p.comps {
		c := &s.p.comps[ci]
		for k := range c.nears {
			for _, i := range c.insts {
				if s.at[i] >= 0 && !s.isBad(i) && s.p.insts[i].pin < 0 && !c.GetEachNode() && !s.reaches(&c.nears[k], s.at[i]) {
					s.mark(i, s.far(&c.nears[k]))
				}
			}
		}
	}
}

func (s *state) far(r *near) string {
	if r.same {
		return "together: no " + s.p.comps[r.to].GetKey() + " runs there"
	}
	return "near: " + s.p.comps[r.to].GetKey() + " is farther than " + millis(r.limit)
}

// reaches tells whether an instance of what is to be near is near enough to node n; where there is none yet, anything is.
func (s *state) reaches(r *near, n int) bool {
	any := false
	for _, j := range s.p.comps[r.to].insts {
		if m := s.at[j]; m >= 0 {
			any = true
			if r.within(s.p, n, m) {
				return true
			}
		}
	}
	return !any
}

func millis(v float64) string { return fmt.Sprintf("%g ms", math.Round(v*100)/100) }

// distance is from a node to the nearest instance of a component (without instance but), in ms: 0 where there is no instance at all,
// infinite where no round trip is known.
func (s *state) distance(comp, n, but int) float64 {
	best, any := math.Inf(1), false
	for _, j := range s.p.comps[comp].insts {
		m := s.at[j]
		if m < 0 || j == but {
			continue
		}
		any = true
		best = math.Min(best, s.p.between(n, m))
	}
	if !any {
		return 0
	}
	return best
}

func (p *problem) between(a, b int) float64 {
	if a == b {
		return 0
	}
	if v, ok := p.rtt[[2]int{a, b}]; ok {
		return v
	}
	return math.Inf(1)
}

// block is why an instance may not go to a node; allowed: it may.
type block uint8

const (
	allowed block = iota
	byStatic
	byAvoid
	byPin
	byNode // belongs to another node
	byCPU
	byMemory
	byDisk
	bySpread
	byNear
	byNearOf
	byApart
	byDiameter
	byBudget
	byCount
	byGroup
)

// never checks the hard constraints of instance i on node n that hold wherever the others are.
func (s *state) never(i, n int) block {
	in := &s.p.insts[i]
	c := &s.p.comps[in.comp]
	switch {
	case in.pin >= 0 && in.pin != n:
		return byPin
	case c.GetEachNode() && in.GetPinned() != "" && in.GetPinned() != s.p.nodes[n].GetId():
		return byNode
	case c.static[n].constraint != "":
		return byStatic
	case in.avoid[n]:
		return byAvoid
	}
	return allowed
}

// blocked checks the hard constraints of instance i on node n. i must be nowhere in the state.
func (s *state) blocked(i, n int) block {
	s.evals++
	if b := s.never(i, n); b != allowed {
		return b
	}
	in := &s.p.insts[i]
	c := &s.p.comps[in.comp]
	node := &s.p.nodes[n]
	switch {
	case s.cpu[n]+c.GetCpuMillis() > node.GetCpuMillis() && c.GetCpuMillis() > 0:
		return byCPU
	case s.mem[n]+c.GetMemoryBytes() > node.GetMemoryBytes() && c.GetMemoryBytes() > 0:
		return byMemory
	case s.disk[n]+c.GetDiskBytes() > node.GetDiskBytes() && c.GetDiskBytes() > 0:
		return byDisk
	case c.limit > 0 && s.values[in.comp][c.value[n]] >= c.limit:
		return bySpread
	}
	for k := range c.nears {
		if !s.reaches(&c.nears[k], n) {
			return byNear
		}
	}
	for _, d := range c.nearOf {
		if s.left(d, in.comp, n) >= 0 {
			return byNearOf
		}
	}
	return s.crowded(i, n)
}

// left is the first wish of component d to be near to component to that does not hold any more once another one of to runs on node n; -1: all hold.
func (s *state) left(d, to, n int) int {
	c := &s.p.comps[d]
	for k := range c.nears {
		r := &c.nears[k]
		if r.to != to {
			continue
		}
		for _, x := range c.insts {
			m := s.at[x]
			if m < 0 || s.isBad(x) || r.within(s.p, m, n) {
				continue
			}
			others := false
			for _, j := range s.p.comps[to].insts {
				if s.at[j] >= 0 && r.within(s.p, m, s.at[j]) {
					others = true
					break
				}
			}
			if !others {
				return k
			}
		}
	}
	return -1
}

// feasible is blocked with words.
func (s *state) feasible(i, n int) (refusal, bool) {
	b := s.blocked(i, n)
	return s.phrase(b, i, n), b == allowed
}

// phrase says in words what blocks instance i (nowhere now) on node n.
func (s *state) phrase(b block, i, n int) refusal {
	in := &s.p.insts[i]
	c := &s.p.comps[in.comp]
	node := &s.p.nodes[n]
	left := func(offered, taken uint64) uint64 {
		if taken > offered {
			return 0
		}
		return offered - taken
	}
	switch b {
	case allowed:
		return refusal{}
	case byStatic:
		return c.static[n]
	case byAvoid:
		return refusal{"excluded", "it failed there lately"}
	case byPin:
		return refusal{"pinned", "it is pinned to " + s.p.nodes[in.pin].name}
	case byNode:
		return refusal{"each-node", "it belongs to another node"}
	case byCPU:
		return refusal{"capacity", fmt.Sprintf("cpu: %s wanted, %s left", cores(c.GetCpuMillis()), cores(left(node.GetCpuMillis(), s.cpu[n])))}
	case byMemory:
		return refusal{"capacity", fmt.Sprintf("memory: %s wanted, %s left", mibs(c.GetMemoryBytes()), mibs(left(node.GetMemoryBytes(), s.mem[n])))}
	case byDisk:
		return refusal{"capacity", fmt.Sprintf("disk: %s wanted, %s left", mibs(c.GetDiskBytes()), mibs(left(node.GetDiskBytes(), s.disk[n])))}
	case bySpread:
		return refusal{"spread", fmt.Sprintf("%d of %s on the same %s already", c.limit, c.GetKey(), c.GetSpread())}
	case byNear:
		for k := range c.nears {
			r := &c.nears[k]
			if s.reaches(r, n) {
				continue
			}
			if r.same {
				return refusal{"together", "no " + s.p.comps[r.to].GetKey() + " runs there"}
			}
			d := s.distance(r.to, n, -1)
			if math.IsInf(d, 1) {
				return refusal{"near", "no round trip to " + s.p.comps[r.to].GetKey() + " is known"}
			}
			return refusal{"near", fmt.Sprintf("%s to %s, at most %s wanted", millis(d), s.p.comps[r.to].GetKey(), millis(r.limit))}
		}
	case byApart, byDiameter, byBudget, byCount, byGroup:
		return s.word(b, i, n)
	}
	for _, d := range c.nearOf {
		if k := s.left(d, in.comp, n); k >= 0 {
			if s.p.comps[d].nears[k].same {
				return refusal{"together", s.p.comps[d].GetKey() + " would be left alone"}
			}
			return refusal{"near", s.p.comps[d].GetKey() + " wants to be near and would be too far"}
		}
	}
	return refusal{"near", "what wants to be near would be too far"}
}
