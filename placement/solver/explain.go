package solver

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"

	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// explain writes the plan down, with why.
func explain(p *problem, s *state, before result, optimal bool) *placementv1.Plan {
	after := s.result()
	bound := most(s.choices(false), int(p.policy.GetMaxMoves()))
	if after.objective >= bound-epsilon && after.unsatisfied == 0 {
		optimal = true
	}
	if optimal {
		bound = after.objective
	}
	plan := &placementv1.Plan{
		Feasible: after.unsatisfied == 0, Objective: round(after.objective), ObjectiveBefore: round(before.objective), Bound: round(math.Max(bound, after.objective)), Optimal: optimal,
	}
	heirs := map[[2]int]int{}
	for i := range p.insts {
		if !p.comps[p.insts[i].comp].GetSystem() {
			plan.Assignments = append(plan.Assignments, s.assignment(i, heirs))
		}
	}
	return plan
}

// round keeps what means something, so that plans read well.
func round(v float64) float64 { return math.Round(v*1e9) / 1e9 }

// assignment explains one instance. heirs counts, by owner and node, how often the node is named first to take over from that owner: the
// instances of a dead node should not all go to one other.
func (s *state) assignment(i int, heirs map[[2]int]int) *placementv1.Assignment {
	p, in := s.p, &s.p.insts[i]
	a := &placementv1.Assignment{Instance: in.GetName()}
	if in.fixed {
		a.Node, a.Successors, a.Reason = in.GetNode(), in.GetSuccessors(), "stopped by a command: it keeps its owner"
		if !in.GetStopped() {
			s.waits(a, in)
		}
		return a
	}
	at := s.at[i]
	eachNode := p.comps[in.comp].GetEachNode()
	if at >= 0 {
		a.Node = p.nodes[at].GetId()
		if !s.isBad(i) {
			a.Score = round(s.scored(i))
		}
		s.put(i, -1)
	}
	byConstraint := map[string]int{}
	second, secondScore := -1, 0.0
	var open []int
	limit := max(MaxRefusals/len(p.insts), leastRefusals)
	for n := range p.nodes {
		var r refusal
		b := s.blocked(i, n)
		ok := b == allowed
		switch {
		case b == byStatic:
			r = p.comps[in.comp].static[n]
		case !ok && len(a.Refused) < limit:
			r, _ = s.feasible(i, n)
		case !ok:
			r.constraint = s.constraint(b, i, n)
		}
		switch {
		case !ok && (eachNode && p.nodes[n].GetId() != in.GetPinned() || n == at && !s.bad2(i, at)):
			continue // not its node; or the node it rightly keeps though it would not receive it
		case !ok:
			byConstraint[r.constraint]++
			if len(a.Refused) < limit {
				a.Refused = append(a.Refused, &placementv1.Refusal{Node: p.nodes[n].GetId(), Constraint: r.constraint, Detail: r.detail})
			}
			continue
		case n == at:
			open = append(open, n)
			continue
		}
		open = append(open, n)
		if v := p.utility(i, n, s.count[n]+1) + utilitySpan*p.comps[in.comp].dynamic*s.with(i, n); v > secondScore+epsilon || second >= 0 && v > secondScore-epsilon && s.count[n] < s.count[second] {
			second, secondScore = n, v
		}
	}
	if second >= 0 {
		a.RunnerUp, a.RunnerUpScore = p.nodes[second].GetId(), round(secondScore)
	}
	if at >= 0 {
		if !eachNode {
			a.Successors = s.successors(i, at, heirs)
		}
		s.put(i, at)
	}
	a.Reason = s.reason(i, second, secondScore, len(open), byConstraint)
	if (at < 0 || s.isBad(i)) && second < 0 && s.explained < mostExplained {
		s.explained += len(p.nodes)
		s.put(i, -1)
		a.Conflict, a.Remedies = s.conflict(i)
		s.put(i, at)
	}
	return a
}

// constraint names what blocks an instance on a node, without the words.
func (s *state) constraint(b block, i, n int) string {
	switch b {
	case byAvoid:
		return "excluded"
	case byPin:
		return "pinned"
	case byNode:
		return "each-node"
	case byCPU, byMemory, byDisk:
		return "capacity"
	case bySpread:
		return "spread"
	case byApart:
		return "apart"
	case byDiameter:
		return "max_diameter"
	case byBudget:
		return "budget"
	case byCount:
		return "light_load"
	}
	r, _ := s.feasible(i, n)
	return r.constraint
}

// scored is the utility of an instance where it is.
func (s *state) scored(i int) float64 {
	d := s.p.insts[i].comp
	return s.p.utility(i, s.at[i], s.count[s.at[i]]) + utilitySpan*s.p.comps[d].dynamic*s.groupWorth(d, s.members(d))
}

// waits explains an instance that belongs to a node that is not for it now.
func (s *state) waits(a *placementv1.Assignment, in *inst) {
	n, ok := s.p.nodeOf[in.GetPinned()]
	if !ok {
		a.Reason = "it belongs to " + in.GetPinned() + ", which is no member"
		return
	}
	r := s.p.comps[in.comp].static[n]
	a.Refused = []*placementv1.Refusal{{Node: in.GetPinned(), Constraint: r.constraint, Detail: r.detail}}
	a.Reason = fmt.Sprintf("each node has its own, and %s is not for it: %s: %s", s.p.nodes[n].name, r.constraint, r.detail)
}

// bad2 is isBad for an instance that was taken out of the state for a moment.
func (s *state) bad2(i, at int) bool { return s.bad[i] != "" && at == s.p.insts[i].current }

func (s *state) reason(i, second int, secondScore float64, open int, refusedBy map[string]int) string {
	p, in := s.p, &s.p.insts[i]
	at := s.at[i]
	note := ""
	if in.pinNote != "" {
		note = "; " + in.pinNote
	}
	if at >= 0 {
		if aged := p.nodes[at].aged(); aged != "" {
			note += "; " + aged
		}
	}
	if at < 0 {
		if len(p.nodes) == 0 {
			return "no node is known" + note
		}
		return "no node is feasible: " + tally(refusedBy) + note
	}
	name := p.nodes[at].name
	next := "no other node is feasible"
	if second >= 0 {
		next = fmt.Sprintf("next is %s with %.3f", p.nodes[second].name, secondScore)
		if aged := p.nodes[second].aged(); aged != "" {
			next += " (" + aged + ")"
		}
	}
	score := s.scored(i)
	switch {
	case s.isBad(i) && second < 0:
		return fmt.Sprintf("should leave %s (%s), and no other node is feasible: %s%s", name, s.bad[i], tally(refusedBy), note)
	case s.isBad(i):
		return fmt.Sprintf("should leave %s (%s), and waits: %s%s", name, s.bad[i], s.obstacle(i), note)
	case p.comps[in.comp].GetEachNode():
		return "each node has its own" + note
	case in.pin == at:
		return "pinned to " + name + " by a command" + note
	case in.free && in.GetNode() != "":
		return fmt.Sprintf("its owner %s is gone; best of %d with %.3f, %s%s", p.nameOf(in.GetNode()), open, score, next, note)
	case in.free:
		return fmt.Sprintf("best of %d with %.3f, %s%s", open, score, next, note)
	case at != in.current && s.bad[i] != "":
		return fmt.Sprintf("leaves %s (%s); best of %d with %.3f, %s%s", p.nodes[in.current].name, s.bad[i], open, score, next, note)
	case at != in.current:
		return fmt.Sprintf("moves from %s: the objective wins more than the move costs; %.3f here, %s%s", p.nodes[in.current].name, score, next, note)
	case second >= 0 && secondScore > score+epsilon:
		return fmt.Sprintf("stays with %.3f: %s is better with %.3f, but %s%s", score, p.nodes[second].name, secondScore, s.obstacle(i), note)
	}
	return fmt.Sprintf("stays with %.3f, %s%s", score, next, note)
}

// obstacle is why an instance does not go where it would be better off.
func (s *state) obstacle(i int) string {
	switch {
	case s.p.insts[i].GetSettledMs() < s.p.policy.GetMinSettledMs():
		return "it settled too lately"
	case s.moves >= int(s.p.policy.GetMaxMoves()):
		return "the moves of this round are used up"
	case s.bad[i] != "":
		return "no move would leave the others well"
	}
	return "the plan wins less than the move costs"
}

func (p *problem) nameOf(id string) string {
	if n, ok := p.nodeOf[id]; ok {
		return p.nodes[n].name
	}
	return id
}

// tally counts refusals by constraint: "3 capacity, 1 require node.cpu > 2".
func tally(by map[string]int) string {
	keys := make([]string, 0, len(by))
	for k := range by {
		keys = append(keys, k)
	}
	slices.SortFunc(keys, func(a, b string) int { return cmp.Or(cmp.Compare(by[b], by[a]), cmp.Compare(a, b)) })
	for i, k := range keys {
		keys[i] = fmt.Sprintf("%d %s", by[k], k)
	}
	return strings.Join(keys, ", ")
}

// What a successor is worth besides its utility. Holders have the state already, and those named now have it soon: naming others would
// copy it for nothing, so noise in facts changes nobody.
const (
	holderBonus    = 0.15
	namedBonus     = 0.15
	otherZoneBonus = 1.0
	heirMalus      = 0.02
)

// successors names the nodes that take instance i over when its owner at dies: feasible for it, in other zones than the owner and each
// other where there are, holders of its state first. i must be nowhere in the state.
func (s *state) successors(i, at int, heirs map[[2]int]int) []string {
	p, in := s.p, &s.p.insts[i]
	want := int(p.policy.GetSuccessors())
	// as it will be when the owner is dead: a pin holds only while its node lives, and a spread value may be lost with the node
	c := &p.comps[in.comp]
	pin, limit := in.pin, c.limit
	in.pin = -1
	if c.limit > 0 {
		c.limit = c.limitWithout(at)
	}
	defer func() { in.pin, c.limit = pin, limit }()
	named := p.set(in.GetSuccessors())
	type candidate struct {
		node  int
		score float64
	}
	var all []candidate
	for _, m := range c.open {
		n := int(m)
		if n == at || s.blocked(i, n) != allowed {
			continue
		}
		score := utilitySpan*c.dynamic*s.with(i, n) + p.utility(i, n, s.count[n]+1+heirs[[2]int{at, n}]) - heirMalus*float64(heirs[[2]int{at, n}])
		if in.holders[n] {
			score += holderBonus
		}
		if named[n] {
			score += namedBonus
		}
		all = append(all, candidate{n, score})
	}
	zones := make([]bool, len(p.areas))
	zones[p.nodes[at].area] = true
	var out []string
	for len(out) < want && len(all) > 0 {
		best, bestScore := -1, math.Inf(-1)
		for k, c := range all {
			v := c.score
			if !zones[p.nodes[c.node].area] {
				v += otherZoneBonus
			}
			if v > bestScore+epsilon {
				best, bestScore = k, v
			}
		}
		n := all[best].node
		if len(out) == 0 {
			heirs[[2]int{at, n}]++
		}
		zones[p.nodes[n].area] = true
		out = append(out, p.nodes[n].GetId())
		all = slices.Delete(all, best, best+1)
	}
	return out
}
