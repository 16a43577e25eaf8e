package replay

import (
	"context"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/coppice-project/coppice/placement/solver/group"
	"github.com/coppice-project/coppice/placement/solver/instance"
)

func drawn(seed uint64, event bool) *instance.Trace {
	return instance.NewTrace(instance.TraceSpec{Name: "t", N: 48, Steps: 12, Seed: seed, Event: event})
}

// The climber finds what trying all sets of one and two actions with the judge finds.
func TestTheClimberTriesEverything(t *testing.T) {
	for seed := range uint64(6) {
		g := instance.NewGroup(instance.GroupSpec{Name: "g", N: 18, Seed: seed, Least: 3, Most: 5})
		rng := rand.New(rand.NewPCG(seed, 1))
		set := rng.Perm(g.N)[:int(seed)%6]
		for _, i := range set {
			g.Current = append(g.Current, int32(i))
		}
		want := candidate{violations: 1 << 30}
		count := func(set []int) candidate {
			score, _ := g.Judge(set)
			c := candidate{value: score.Objective, violations: max(g.MinNodes-len(set), 0) + max(len(set)-g.MaxNodes, 0)}
			regions := make([]int, g.Regions)
			for _, i := range set {
				if _, ok := g.Eligible(i); !ok {
					c.violations++
				}
				regions[g.Nodes.Region[i]]++
			}
			for _, n := range regions {
				c.violations += max(n-g.RegionCap(max(len(set), 1)), 0)
			}
			if d, _ := g.Measure(set); d > g.Latency.Below(g.MaxDiameterMs, true) {
				c.violations++
			}
			return c
		}
		toggle := func(set []int, i int) []int {
			if at := slices.Index(set, i); at >= 0 {
				return slices.Delete(slices.Clone(set), at, at+1)
			}
			return append(slices.Clone(set), i)
		}
		see := func(set []int) {
			if c := count(set); c.violations < want.violations || c.violations == want.violations && c.value > want.value+1e-12 {
				want = c
			}
		}
		see(set)
		for i := range g.N {
			one := toggle(set, i)
			see(one)
			for j := range i {
				see(toggle(one, j))
			}
		}
		got := newClimb(g).step(t.Context(), slices.Clone(set), 2)
		if c := count(got); c.violations != want.violations || c.value < want.value-1e-9 {
			t.Errorf("seed %d: %v with %+v, the best is %+v", seed, got, c, want)
		}
	}
}

// The figures of a replay are what the judge says of each period.
func TestPlayKeepsTheBooks(t *testing.T) {
	tr := drawn(3, true)
	start := Bootstrap(t.Context(), tr, 1)
	if _, wrong := tr.At(0).Judge(start); len(wrong) > 0 {
		t.Fatalf("the bootstrap violates %v", wrong)
	}
	adds, redeploys, net, broken := 0, 0, 0.0, 0
	var last []int
	row, err := Play(t.Context(), tr, spy{&exact{1, time.Minute}, func(g *instance.Group, next []int) {
		if last != nil {
			alive := slices.DeleteFunc(slices.Clone(last), func(i int) bool { return !g.Nodes.Alive[i] })
			if !slices.Equal(alive, current(g)) {
				t.Errorf("%v is in force, and %v of it alive: the policy was shown %v", last, alive, current(g))
			}
		}
		score, wrong := g.Judge(next)
		net += score.Objective
		if len(wrong) > 0 {
			broken++
		}
		new := 0
		for _, i := range next {
			if !slices.Contains(current(g), i) {
				new++
			}
		}
		if adds += new; new > 0 || len(next) != len(g.Current) {
			redeploys++
		}
		last = slices.Clone(next)
	}}, start)
	if err != nil {
		t.Fatal(err)
	}
	if row.Adds != float64(adds) || row.Redeploys != float64(redeploys) || row.InfeasibleAfter != float64(broken) || row.Net-net/float64(tr.Steps) > 1e-9 || row.Net-net/float64(tr.Steps) < -1e-9 {
		t.Errorf("%+v; counted %d adds, %d redeploys, %d infeasible, net %g", row, adds, redeploys, broken, net/float64(tr.Steps))
	}
	if row.InEvent == nil || row.Recovery == nil || *row.GHzAtHit >= row.GHzBefore {
		t.Errorf("the event does not show: %+v", row)
	}
}

type spy struct {
	Policy
	saw func(*instance.Group, []int)
}

func (s spy) Decide(ctx context.Context, g *instance.Group) []int {
	next := s.Policy.Decide(ctx, g)
	s.saw(g, next)
	return next
}

// The exact policy is never infeasible where a feasible group exists, and the smoothed one neither: who is eligible is decided by the nodes as they are.
func TestPoliciesStayFeasible(t *testing.T) {
	for seed := range uint64(2) {
		tr := drawn(seed, true)
		possible := 0
		for step := range tr.Steps {
			if group.Solve(t.Context(), tr.At(step), group.Options{}).Feasible {
				possible++
			}
		}
		start := Bootstrap(t.Context(), tr, seed)
		for _, p := range Policies(time.Minute)[2:] {
			row, err := Play(t.Context(), tr, p.New(seed), start)
			if err != nil {
				t.Fatal(err)
			}
			if row.InfeasibleAfter > float64(tr.Steps-possible) {
				t.Errorf("seed %d, %s: %g infeasible periods, %d of %d have a solution", seed, p.Name, row.InfeasibleAfter, possible, tr.Steps)
			}
		}
	}
}

// A replay says the same each time.
func TestPlayRepeatsItself(t *testing.T) {
	tr := drawn(5, false)
	for _, p := range Policies(time.Minute) {
		var rows [2]Row
		for i := range rows {
			var err error
			if rows[i], err = Play(t.Context(), tr, p.New(2), Bootstrap(t.Context(), tr, 2)); err != nil {
				t.Fatal(err)
			}
			rows[i].SolveMean, rows[i].SolveMax = 0, 0
		}
		if rows[0] != rows[1] {
			t.Errorf("%s: %+v and %+v", p.Name, rows[0], rows[1])
		}
	}
}

func TestMeanOfRows(t *testing.T) {
	v := func(x float64) *float64 { return &x }
	one, none := 1, 0
	m := Mean([]Row{
		{Net: 1, Adds: 2, Starts: 1, InEvent: v(1), GHzAtHit: v(1), GHzEvent: v(1), Recovery: v(2), NotBack: &none, SolveMax: 3},
		{Net: 2, Adds: 5, Starts: 1, InEvent: v(3), GHzAtHit: v(2), GHzEvent: v(2), Recovery: v(4), NotBack: &one, SolveMax: 2},
	})
	if m.Net != 1.5 || m.Adds != 3.5 || m.Starts != 2 || *m.InEvent != 2 || *m.Recovery != 3 || *m.NotBack != 1 || m.SolveMax != 3 {
		t.Errorf("%+v", m)
	}
}
