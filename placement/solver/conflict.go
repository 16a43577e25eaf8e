package solver

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// What is said of an instance that has no acceptable node is bounded: it is looked at nodes × instances of mostExplained at most.
const (
	mostExplained = 200_000
	mostRemedies  = 8
)

// conflict says why no node is for instance i, which is nowhere in the state: a set of constraints that no node holds together, from which none can be left
// out, and what would make a node feasible. Nodes that receive nothing now are no matter of constraints and are not looked at.
func (s *state) conflict(i int) (set, remedies []string) {
	var all [][]refusal
	var nodes []int
	count := map[string]int{}
	for n := range s.p.nodes {
		if !s.p.nodes[n].receives {
			continue
		}
		v := s.violations(i, n)
		if len(v) == 0 {
			return nil, nil // it may have this one: something else keeps it, such as the moves of a round
		}
		nodes, all = append(nodes, n), append(all, v)
		for _, r := range v {
			count[r.constraint]++
		}
	}
	if len(nodes) == 0 {
		return []string{"no node receives instances: all are dead, draining, quarantined or vote only"}, []string{"with another node, or after coppice readmit of one"}
	}
	names := make([]string, 0, len(count))
	for name := range count {
		names = append(names, name)
	}
	// those that refuse the fewest nodes are left out first: what remains is short
	slices.SortFunc(names, func(a, b string) int { return cmp.Or(cmp.Compare(count[a], count[b]), cmp.Compare(a, b)) })
	keep := map[string]bool{}
	for _, name := range names {
		keep[name] = true
	}
	for _, name := range names {
		keep[name] = false
		if slices.ContainsFunc(all, func(v []refusal) bool {
			return !slices.ContainsFunc(v, func(r refusal) bool { return keep[r.constraint] })
		}) {
			keep[name] = true
		}
	}
	for _, name := range names {
		if keep[name] {
			set = append(set, name)
		}
	}
	slices.Sort(set)
	return set, s.remedies(nodes, all)
}

// remedies says which single constraint keeps nodes away, else what all would have to change for the node that lacks least.
func (s *state) remedies(nodes []int, all [][]refusal) []string {
	single := map[string][]string{}
	var order []string
	least := 0
	for k, v := range all {
		if len(v) < len(all[least]) {
			least = k
		}
		if len(v) > 1 {
			continue
		}
		name := v[0].constraint
		if single[name] == nil {
			order = append(order, name)
		}
		if len(single[name]) < 3 {
			single[name] = append(single[name], fmt.Sprintf("%s (%s)", s.p.nodes[nodes[k]].name, v[0].detail))
		}
	}
	var out []string
	for _, name := range order {
		if len(out) < mostRemedies {
			out = append(out, fmt.Sprintf("without %s: %s", name, strings.Join(single[name], ", ")))
		}
	}
	if len(out) > 0 {
		return out
	}
	var parts []string
	for _, r := range all[least] {
		parts = append(parts, fmt.Sprintf("%s (%s)", r.constraint, r.detail))
	}
	return []string{fmt.Sprintf("on %s without all of %s", s.p.nodes[nodes[least]].name, strings.Join(parts, ", "))}
}

// violations are all constraints that instance i, nowhere now, would break on node n, which receives.
func (s *state) violations(i, n int) []refusal {
	p := s.p
	in := &p.insts[i]
	c := &p.comps[in.comp]
	node := &p.nodes[n]
	var out []refusal
	add := func(r refusal) {
		if r.constraint != "" {
			out = append(out, r)
		}
	}
	if in.pin >= 0 && in.pin != n {
		add(refusal{"pinned", "it is pinned to " + p.nodes[in.pin].name})
	}
	if c.GetEachNode() && in.GetPinned() != "" && in.GetPinned() != node.GetId() {
		add(refusal{"each-node", "it belongs to another node"})
	}
	add(platform(node, c.Component))
	for _, r := range c.requires {
		v := r.on(node.facts, c.facts)
		if v.constraint == "" {
			v = doubtful(node, []constraint{r}, c.facts)
		}
		add(v)
	}
	if in.avoid[n] {
		add(refusal{"excluded", "it failed there lately"})
	}
	for _, b := range s.lacks(i, n) {
		r := s.phrase(b, i, n)
		r.constraint = strings.TrimSuffix(r.constraint+" "+resource[b], " ")
		add(r)
	}
	if c.limit > 0 {
		if _, ok := spreadValue(node, c.GetSpread()); !ok {
			add(refusal{"spread", "it has no label " + c.GetSpread()})
		} else if s.values[in.comp][c.value[n]] >= c.limit {
			add(s.phrase(bySpread, i, n))
		}
	}
	for k := range c.nears {
		if !s.reaches(&c.nears[k], n) {
			add(s.phrase(byNear, i, n))
			break
		}
	}
	for _, d := range c.nearOf {
		if s.left(d, in.comp, n) >= 0 {
			add(s.phrase(byNearOf, i, n))
			break
		}
	}
	for _, b := range crowding {
		if s.crowds(i, n, b) {
			add(s.word(b, i, n))
		}
	}
	return out
}

// resource is what a node has too little of.
var resource = map[block]string{byCPU: "cpu", byMemory: "memory", byDisk: "disk"}

// lacks are the resources of which node n has too little left for instance i.
func (s *state) lacks(i, n int) []block {
	c := &s.p.comps[s.p.insts[i].comp]
	node := &s.p.nodes[n]
	var out []block
	if c.GetCpuMillis() > 0 && s.cpu[n]+c.GetCpuMillis() > node.GetCpuMillis() {
		out = append(out, byCPU)
	}
	if c.GetMemoryBytes() > 0 && s.mem[n]+c.GetMemoryBytes() > node.GetMemoryBytes() {
		out = append(out, byMemory)
	}
	if c.GetDiskBytes() > 0 && s.disk[n]+c.GetDiskBytes() > node.GetDiskBytes() {
		out = append(out, byDisk)
	}
	return out
}
