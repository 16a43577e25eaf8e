package solver

import (
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/coppice-project/coppice/components"
)

// What depends on where several instances are: constraints and terms over group and link, apart, max_diameter, budget, and how many share a node.

// dynamic is what the terms over group and link win for all instances of component d that have an acceptable node: their share of the utility of each.
func (s *state) dynamic(d int) float64 {
	if !s.dynKnown[d] {
		s.dyn[d], s.dynKnown[d] = s.dynamicNow(d), true
	}
	return s.dyn[d]
}

func (s *state) dynamicNow(d int) float64 {
	c := &s.p.comps[d]
	if c.dynamic == 0 {
		return 0
	}
	nodes := s.members(d)
	return c.dynamic * float64(len(nodes)) * s.groupWorth(d, nodes)
}

// members are the nodes of the instances of a component that have an acceptable one.
func (s *state) members(d int) []int {
	out := s.scratch[:0]
	for _, i := range s.p.comps[d].insts {
		if n := s.at[i]; n >= 0 && !s.isBad(i) && !s.p.insts[i].fixed {
			out = append(out, n)
		}
	}
	s.scratch = out
	return out
}

// groupWorth is the weighted mean of the terms over group and link, in [0,1]. What is unknown counts as the worst.
func (s *state) groupWorth(d int, nodes []int) float64 {
	c := &s.p.comps[d]
	sum := 0.0
	if len(c.terms) > 0 {
		g := s.group(d, nodes, c.terms, nil)
		for _, t := range c.terms {
			if v, err := t.expr.ValueFor(g, c.facts); err == nil {
				sum += t.weight * deviation(v, t.from, t.to, t.high)
			}
		}
	}
	if c.nearer > 0 && len(c.nears) > 0 && len(nodes) > 0 {
		near := 0.0
		for _, n := range nodes {
			near += deviation(s.distance(c.nears[0].to, n, -1), 0, math.Max(c.nears[0].limit, 1e-9), false)
		}
		sum += c.nearer * near / float64(len(nodes))
	}
	return sum
}

// sway is what terms over group and link win when instance i, nowhere now, goes to node n.
func (s *state) sway(i, n int) float64 {
	sways := s.p.comps[s.p.insts[i].comp].sways
	if len(sways) == 0 {
		return 0
	}
	v := 0.0
	for _, d := range sways {
		v -= s.dynamic(d)
	}
	s.at[i] = n
	for _, d := range sways {
		v += s.dynamicNow(d)
	}
	s.at[i] = -1
	return v
}

// with is the worth of the terms over group and link of instance i's component, with i, nowhere now, on node n.
func (s *state) with(i, n int) float64 {
	d := s.p.insts[i].comp
	if s.p.comps[d].dynamic == 0 {
		return 0
	}
	s.at[i] = n
	v := s.groupWorth(d, s.members(d))
	s.at[i] = -1
	return v
}

// group is what expressions see of instances on nodes; only what they mention is worked out.
func (s *state) group(d int, nodes []int, terms []term, grouped []constraint) *components.GroupFacts {
	p := s.p
	inf := math.Inf(1)
	g := &components.GroupFacts{Size: len(nodes), Diameter: inf, Anchor: inf, Price: inf, Link: inf}
	g.Count = func(label string) int { return p.values(nodes, label) }
	mentions := func(field string) bool {
		return slices.ContainsFunc(terms, func(t term) bool { return strings.Contains(t.expr.Source(), field) }) ||
			slices.ContainsFunc(grouped, func(r constraint) bool { return strings.Contains(r.expr.Source(), field) })
	}
	if mentions("diameter_ms") {
		g.Diameter = p.diameter(nodes)
	}
	if mentions("anchor_ms") {
		g.Anchor = p.anchored(p.comps[d].anchors, nodes)
	}
	if mentions("price") {
		g.Price = p.priceOf(nodes)
	}
	if mentions("rtt_ms") {
		g.Link = s.linked(d, nodes)
	}
	return g
}

// values counts the values of a label that nodes have.
func (p *problem) values(nodes []int, label string) int {
	seen := map[string]bool{}
	for _, n := range nodes {
		if v, ok := spreadValue(&p.nodes[n], label); ok {
			seen[v] = true
		}
	}
	return len(seen)
}

// relays is the number of nodes up to which a diameter is that of the shortest ways over instances; above it, of the direct ones.
const relays = 24

// diameter is the longest of the shortest ways between nodes, over the others: infinite where there is none.
func (p *problem) diameter(nodes []int) float64 {
	at := slices.Clone(nodes)
	slices.Sort(at)
	at = slices.Compact(at)
	k := len(at)
	d := make([]float64, k*k)
	for a := range at {
		for b := range a {
			v := p.between(at[a], at[b])
			d[a*k+b], d[b*k+a] = v, v
		}
	}
	if k <= relays {
		for m := range at {
			for a := range at {
				for b := range at {
					d[a*k+b] = math.Min(d[a*k+b], d[a*k+m]+d[m*k+b])
				}
			}
		}
	}
	longest := 0.0
	for _, v := range d {
		longest = math.Max(longest, v)
	}
	return longest
}

// anchored is the way from the worst served anchor to the nearest node.
func (p *problem) anchored(anchors, nodes []int) float64 {
	if len(anchors) == 0 {
		return math.Inf(1)
	}
	worst := 0.0
	for _, a := range anchors {
		nearest := math.Inf(1)
		for _, n := range nodes {
			if a >= 0 {
				nearest = math.Min(nearest, p.between(a, n))
			}
		}
		worst = math.Max(worst, nearest)
	}
	return worst
}

// priceOf is what nodes cost together, each once; infinite where one has no price.
func (p *problem) priceOf(nodes []int) float64 {
	at := slices.Clone(nodes)
	slices.Sort(at)
	sum := 0.0
	for _, n := range slices.Compact(at) {
		if math.IsNaN(p.nodes[n].price) {
			return math.Inf(1)
		}
		sum += p.nodes[n].price
	}
	return sum
}

// linked is the mean way from nodes to the nearest instances of what a component calls.
func (s *state) linked(d int, nodes []int) float64 {
	calls := s.p.comps[d].calls
	if len(calls) == 0 || len(nodes) == 0 {
		return math.Inf(1)
	}
	sum := 0.0
	for _, n := range nodes {
		for _, to := range calls {
			sum += s.distance(to, n, -1)
		}
	}
	return sum / float64(len(nodes)*len(calls))
}

// crowded checks apart, max_diameter, budget, how many may share a node, and constraints over the group, for instance i (nowhere now) on node n.
func (s *state) crowded(i, n int) block {
	for _, b := range crowding {
		if s.crowds(i, n, b) {
			return b
		}
	}
	return allowed
}

// crowding is what crowded looks at, in this order.
var crowding = [...]block{byApart, byDiameter, byBudget, byCount, byGroup}

// crowds checks one of them.
func (s *state) crowds(i, n int, b block) bool {
	p := s.p
	in := &p.insts[i]
	c := &p.comps[in.comp]
	switch b {
	case byApart:
		return slices.ContainsFunc(c.apart, func(d int) bool { return s.runs(d, n) })
	case byDiameter:
		return c.GetMaxDiameterMs() > 0 && slices.ContainsFunc(c.insts, func(j int) bool {
			return s.at[j] >= 0 && !s.isBad(j) && p.between(n, s.at[j]) > c.GetMaxDiameterMs()
		})
	case byBudget:
		return c.budget != nil && !(s.costs(c.app, n) <= *c.budget+epsilon) // so that no price is too much
	case byCount:
		most := 0
		if len(p.limiting) > 0 {
			most = s.mostOn(n, in.comp)
		}
		return most > 0 && s.count[n] >= most
	}
	return len(c.grouped) > 0 && s.broken(i, n) >= 0
}

// costs is what the nodes that an application uses come to with node n among them.
func (s *state) costs(app, n int) float64 {
	if s.uses[app][n] > 0 {
		return s.spent[app]
	}
	return s.spent[app] + s.p.nodes[n].price
}

// runs tells whether an instance of component d is on node n that may stay there.
func (s *state) runs(d, n int) bool {
	for _, j := range s.p.comps[d].insts {
		if s.at[j] == n && !s.isBad(j) {
			return true
		}
	}
	return false
}

// mostOn is how many instances node n may have when one of component d is there, by the strictest of those there; 0: any number.
func (s *state) mostOn(n, d int) int {
	most := int(s.p.comps[d].GetMaxInstances())
	for _, e := range s.p.limiting {
		if k := int(s.p.comps[e].GetMaxInstances()); (most == 0 || k < most) && s.runs(e, n) {
			most = k
		}
	}
	return most
}

// broken is the first constraint over the group that does not hold with instance i (nowhere now) on node n; -1: none. They are looked at when each instance
// has a node: until then a group is not what it is going to be.
func (s *state) broken(i, n int) int {
	d := s.p.insts[i].comp
	c := &s.p.comps[d]
	s.at[i] = n
	defer func() { s.at[i] = -1 }()
	nodes := s.members(d)
	if len(nodes) < c.running {
		return -1
	}
	g := s.group(d, nodes, nil, c.grouped)
	return slices.IndexFunc(c.grouped, func(r constraint) bool {
		ok, err := r.expr.HoldsFor(g, c.facts)
		return err != nil || !ok
	})
}

// findUnfit marks what may not stay where it is by constraints that depend on several instances: as few as are needed, those first that give way.
func (s *state) findUnfit() {
	s.findDear()
	for _, i := range s.victims(func(i int) bool {
		c := &s.p.comps[s.p.insts[i].comp]
		return len(c.apart) > 0 || c.GetMaxDiameterMs() > 0 || len(s.p.limiting) > 0 || len(c.grouped) > 0
	}) {
		n := s.at[i]
		s.put(i, -1)
		b := s.crowded(i, n)
		r := s.word(b, i, n)
		s.put(i, n)
		if b != allowed && b != byBudget {
			s.mark(i, r.constraint+": "+r.detail)
		}
	}
}

// findDear marks the instances of the dearest nodes of applications that are over their budget.
func (s *state) findDear() {
	for app := range s.spent {
		for {
			dear := -1
			var budget float64
			for i := range s.p.insts {
				c := &s.p.comps[s.p.insts[i].comp]
				if c.app != app || c.budget == nil || s.at[i] < 0 || s.isBad(i) || s.p.insts[i].fixed || s.spent[app] <= *c.budget+epsilon {
					continue
				}
				budget = *c.budget
				if dear < 0 || s.p.nodes[s.at[i]].price > s.p.nodes[dear].price || math.IsNaN(s.p.nodes[s.at[i]].price) {
					dear = s.at[i]
				}
			}
			if dear < 0 {
				break
			}
			for i := range s.p.insts {
				if c := &s.p.comps[s.p.insts[i].comp]; s.at[i] == dear && c.app == app && c.budget != nil && !s.isBad(i) && !s.p.insts[i].fixed {
					s.mark(i, fmt.Sprintf("budget: the nodes of the application cost more than %g", budget))
				}
			}
		}
	}
}

// word says in words why instance i (nowhere now) may not go to node n, for what crowded finds.
func (s *state) word(b block, i, n int) refusal {
	p := s.p
	c := &p.comps[p.insts[i].comp]
	switch b {
	case byApart:
		for _, d := range c.apart {
			if s.runs(d, n) {
				return refusal{"apart", p.comps[d].GetKey() + " runs there"}
			}
		}
	case byDiameter:
		for _, j := range c.insts {
			if m := s.at[j]; m >= 0 && !s.isBad(j) && p.between(n, m) > c.GetMaxDiameterMs() {
				if math.IsInf(p.between(n, m), 1) {
					return refusal{"max_diameter", "no round trip to " + p.insts[j].GetName() + " is known"}
				}
				return refusal{"max_diameter", fmt.Sprintf("%s to %s, at most %s wanted", millis(p.between(n, m)), p.insts[j].GetName(), millis(c.GetMaxDiameterMs()))}
			}
		}
	case byBudget:
		if math.IsNaN(p.nodes[n].price) {
			return refusal{"budget", "it has no price: no label or fact price"}
		}
		return refusal{"budget", fmt.Sprintf("with it the nodes of the application cost %.4g, at most %.4g wanted", s.costs(c.app, n), *c.budget)}
	case byCount:
		return refusal{"light_load", fmt.Sprintf("%d instances run there, at most %d wanted", s.count[n], s.mostOn(n, p.insts[i].comp))}
	case byGroup:
		if k := s.broken(i, n); k >= 0 {
			return refusal{c.grouped[k].name, "it would be false of the instances together"}
		}
	}
	return refusal{}
}
