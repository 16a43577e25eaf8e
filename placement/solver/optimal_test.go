package solver

import (
	"math/rand/v2"
	"os"
	"testing"

	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// smallRequest draws one of which every plan can be tried.
func smallRequest(seed uint64) *placementv1.SolveRequest {
	d := &drawing{Rand: rand.New(rand.NewPCG(seed, 11))}
	snap := &placementv1.Snapshot{}
	for i := range 1 + d.IntN(4) {
		n := d.node(i)
		if n.Labels == nil {
			n.Labels = map[string]string{}
		}
		n.Labels["price"] = []string{"0.1", "0.5", "1"}[d.IntN(3)]
		d.ids = append(d.ids, n.Id)
		snap.Nodes = append(snap.Nodes, n)
	}
	for range d.IntN(3 * len(d.ids)) {
		snap.Links = append(snap.Links, &placementv1.Link{From: d.id(), To: d.id(), RttMs: d.Float64() * 50})
	}
	left := 5
	for i := 0; i < 4 && left > 0; i++ {
		c := d.component(i)
		c.Count = uint32(min(int(c.Count), left))
		if c.EachNode {
			c.Count, c.EachNode = 1, false
		}
		left -= int(c.Count)
		d.instances(c)
		d.named(c, i)
		snap.Components = append(snap.Components, c)
	}
	oneBudget(snap.Components)
	policy := DefaultPolicy()
	policy.MaxMoves, policy.MinSettledMs = uint32(d.IntN(5)), 1000
	return &placementv1.SolveRequest{Snapshot: snap, Policy: policy}
}

// oneBudget gives all components of the application the budget of one, as a manifest does.
func oneBudget(all []*placementv1.Component) {
	for _, c := range all {
		if c.Budget != nil {
			for _, o := range all {
				o.Budget = c.Budget
			}
			return
		}
	}
}

// named gives a component some of the named constraints and terms.
func (d *drawing) named(c *placementv1.Component, i int) {
	other := func() []string { return []string{"app/c" + string(rune('0'+d.IntN(i+1)))} }
	if d.chance(0.2) {
		c.Apart = other()
	}
	if d.chance(0.1) && i > 0 {
		c.Together = other()
	}
	if d.chance(0.15) {
		c.MaxDiameterMs = 30
	}
	if d.chance(0.15) {
		c.MaxInstances = uint32(1 + d.IntN(3))
	}
	if d.chance(0.15) {
		c.Budget = new(0.1 + d.Float64()*2)
	}
	if d.chance(0.15) {
		c.Require = append(c.Require, `group.count("zone") >= 2 || group.size < 2`)
	}
	if d.chance(0.2) {
		c.Soft = append(c.Soft, &placementv1.Term{Value: "node.price", From: 0, To: 1, Weight: 3})
	}
	if d.chance(0.2) {
		c.Soft = append(c.Soft, &placementv1.Term{Value: "group.diameter_ms", From: 0, To: 50, Weight: 3})
	}
	if d.chance(0.2) {
		c.Anchors = []string{d.id(), d.id()}
		c.Soft = append(c.Soft, &placementv1.Term{Value: "group.anchor_ms", From: 0, To: 50, Weight: 2})
	}
	if d.chance(0.2) && i > 0 {
		c.Calls = other()
		c.Soft = append(c.Soft, &placementv1.Term{Value: "link.rtt_ms", From: 0, To: 50, Weight: 2})
	}
	if c.Near != "" && d.chance(0.5) {
		c.NearWeight = 2
	}
}

// brute tries every plan there is, and says what the best one is worth.
func brute(t *testing.T, req *placementv1.SolveRequest) result {
	t.Helper()
	p, err := newProblem(req)
	if err != nil {
		t.Fatal(err)
	}
	s := newState(p)
	all := s.choices(true)
	best := s.result()
	for _, c := range all {
		if s.at[c.inst] >= 0 {
			s.put(c.inst, -1)
		}
	}
	var place func(k int)
	place = func(k int) {
		if k < len(all) {
			for _, n := range all[k].nodes {
				if n >= 0 {
					s.put(all[k].inst, int(n))
				}
				place(k + 1)
				if n >= 0 {
					s.put(all[k].inst, -1)
				}
			}
			return
		}
		if s.moves > int(p.policy.GetMaxMoves()) {
			return
		}
		for _, c := range all {
			n := s.at[c.inst]
			if n < 0 || n == p.insts[c.inst].current {
				continue
			}
			s.put(c.inst, -1)
			_, ok := s.feasible(c.inst, n)
			s.put(c.inst, n)
			if !ok {
				return
			}
		}
		if r := s.result(); r.unsatisfied < best.unsatisfied || r.unsatisfied == best.unsatisfied && r.objective > best.objective {
			best = r
		}
	}
	place(0)
	return best
}

func checkOptimal(t *testing.T, seed uint64) (optimal bool) {
	t.Helper()
	req := smallRequest(seed)
	plan, err := Solve(req)
	if err != nil {
		t.Fatal(err)
	}
	checkPlan(t, req, plan)
	checkMoves(t, req, plan)
	best := brute(t, req)
	if plan.GetFeasible() && plan.GetBound() < best.objective-1e-8 {
		t.Errorf("seed %d: bound %v, the best plan is worth %v", seed, plan.GetBound(), best)
	}
	off := plan.GetObjective() - best.objective
	if plan.GetFeasible() != (best.unsatisfied == 0) || off > 1e-8 || off < -1e-8 {
		if plan.GetOptimal() {
			t.Errorf("seed %d: %v and feasible=%v is called optimal, the best is %v\n%s", seed, plan.GetObjective(), plan.GetFeasible(), best, planText(plan, true))
		}
	}
	return plan.GetOptimal()
}

// What a plan calls optimal is: every plan there is was tried.
func TestOptimalIsNeverWrong(t *testing.T) { checkAllOptimal(t, 0, 600) }

func TestLongOptimalIsNeverWrong(t *testing.T) {
	if os.Getenv("COPPICE_LONG") == "" {
		t.Skip("COPPICE_LONG=1 runs it")
	}
	checkAllOptimal(t, 600, 30_000)
}

func checkAllOptimal(t *testing.T, from, to uint64) {
	optimal := uint64(0)
	for seed := from; seed < to && !t.Failed(); seed++ {
		if checkOptimal(t, seed) {
			optimal++
		}
	}
	if optimal < (to-from)*9/10 {
		t.Errorf("%d of %d were optimal: this says little", optimal, to-from)
	}
}
