package group

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"github.com/coppice-project/coppice/placement/solver/instance"
)

// small makes a group problem of few nodes with everything that can go wrong: shared sites, missing links, ties, tight diameters, prices,
// a current group with nodes that are not eligible.
func small(r *rand.Rand, n int) *instance.Group {
	sites := 1 + r.IntN(n)
	g := &instance.Group{
		Name: "small", N: n, Regions: 1 + r.IntN(4), MinNodes: 1 + r.IntN(3), MaxLoad5: 10, MaxSlices: 10, MaxMemory: 90, MinFreeGHz: 1.5,
		MaxDiameterMs: []float64{2, 5, 8, 1000}[r.IntN(4)], Balanced: r.IntN(3) > 0,
		Load5: instance.Term{Max: 10, Weight: 2}, LiveSlices: instance.Term{Max: 10, Weight: float64(r.IntN(2))}, FreeGHz: instance.Term{Min: 1, Max: 4, Weight: 3},
		Neighbour: instance.Term{Min: 0.1, Max: 10, Weight: []float64{0, 2, 16}[r.IntN(3)]}, Diameter: instance.Term{Min: 0.1, Max: 10, Weight: []float64{0, 2, 9}[r.IntN(3)]},
		AddCost: []float64{0, 0.012, 0.1}[r.IntN(3)], RemoveCost: []float64{0, 0.02}[r.IntN(2)], PriceOfAPrice: []float64{0, 0.01}[r.IntN(2)],
	}
	g.MaxNodes = g.MinNodes + r.IntN(4)
	l := instance.Latency{Unit: 0.01, Sites: sites, Base: make([]int32, sites*sites), Site: make([]int32, n), Access: make([]int32, n)}
	for a := range sites {
		for b := range a {
			v := int32(1 + r.IntN(800))
			if r.IntN(8) == 0 {
				v = instance.None
			}
			l.Base[a*sites+b], l.Base[b*sites+a] = v, v
		}
	}
	area := make([]int32, sites)
	for a := range area {
		area[a] = int32(r.IntN(g.Regions))
	}
	nodes := &g.Nodes
	for i := range n {
		l.Site[i], l.Access[i] = int32(r.IntN(sites)), int32(r.IntN(3)*r.IntN(60))
		nodes.Region = append(nodes.Region, area[l.Site[i]])
		nodes.Alive, nodes.Blacklisted = append(nodes.Alive, r.IntN(9) > 0), append(nodes.Blacklisted, r.IntN(12) == 0)
		nodes.Load5, nodes.LiveSlices = append(nodes.Load5, float64(r.IntN(22))/2), append(nodes.LiveSlices, float64(r.IntN(11)))
		nodes.CPUGHz, nodes.FreeCPU = append(nodes.CPUGHz, 2+float64(r.IntN(3))), append(nodes.FreeCPU, float64(r.IntN(21))*5)
		nodes.MemPressure, nodes.Price = append(nodes.MemPressure, float64(r.IntN(95))), append(nodes.Price, float64(r.IntN(5)))
	}
	g.Latency = l
	for range 1 + r.IntN(5) {
		g.Anchors = append(g.Anchors, int32(r.IntN(n)))
	}
	for i := range n {
		if r.IntN(3) == 0 {
			g.Current = append(g.Current, int32(i))
		}
	}
	return g
}

// brute tries every group.
func brute(g *instance.Group) (best float64, found bool) {
	best = math.Inf(-1)
	var eligible []int
	for i := range g.N {
		if _, ok := g.Eligible(i); ok {
			eligible = append(eligible, i)
		}
	}
	for mask := 1; mask < 1<<len(eligible); mask++ {
		var set []int
		for b, i := range eligible {
			if mask>>b&1 != 0 {
				set = append(set, i)
			}
		}
		if len(set) < g.MinNodes || len(set) > g.MaxNodes {
			continue
		}
		if s, wrong := g.Judge(set); len(wrong) == 0 && s.Objective > best {
			best, found = s.Objective, true
		}
	}
	return best, found
}

func checkSmall(t *testing.T, seed uint64, n int) {
	t.Helper()
	g := small(rand.New(rand.NewPCG(seed, 1)), n)
	want, feasible := brute(g)
	got := Solve(t.Context(), g, Options{Seed: seed})
	if !got.Proven {
		t.Fatalf("seed %d: not proven without a deadline", seed)
	}
	if got.Feasible != feasible {
		t.Fatalf("seed %d: feasible %v, want %v", seed, got.Feasible, feasible)
	}
	if feasible && math.Abs(got.Objective-want) > Tolerance {
		t.Fatalf("seed %d: proven %.12f, the best is %.12f", seed, got.Objective, want)
	}
}

func TestProvenIsNeverWrong(t *testing.T) {
	for seed := range uint64(3000) {
		checkSmall(t, seed, 2+int(seed%11))
	}
}

func TestLongProvenIsNeverWrong(t *testing.T) {
	if os.Getenv("COPPICE_LONG") == "" {
		t.Skip("COPPICE_LONG=1 runs it")
	}
	for seed := range uint64(60_000) {
		checkSmall(t, 10_000+seed, 2+int(seed%13))
	}
}

// A search that ends early says a bound that holds, and a group that is feasible.
func TestCutShort(t *testing.T) {
	for seed := range uint64(600) {
		g := small(rand.New(rand.NewPCG(seed, 2)), 11)
		want, feasible := brute(g)
		for _, checks := range []int{0, 1, 3, 10} {
			got := Solve(&countdown{Context: t.Context(), left: checks}, g, Options{Seed: seed})
			if got.Feasible {
				if _, wrong := g.Judge(got.Nodes); len(wrong) > 0 {
					t.Fatalf("seed %d: %v", seed, wrong)
				}
			}
			if feasible && got.Bound < want-Tolerance {
				t.Fatalf("seed %d after %d checks: bound %.12f, the best is %.12f", seed, checks, got.Bound, want)
			}
			if got.Proven && got.Feasible != feasible {
				t.Fatalf("seed %d after %d checks: proven %v", seed, checks, got.Feasible)
			}
		}
	}
}

// countdown is a context that ends when it was asked so often.
type countdown struct {
	context.Context //nolint:containedctx // it is one
	left            int
}

func (c *countdown) Err() error {
	if c.left--; c.left < 0 {
		return context.DeadlineExceeded
	}
	return nil
}

func TestNeverWorseThanStaying(t *testing.T) {
	stayed := 0
	for seed := range uint64(400) {
		g := small(rand.New(rand.NewPCG(seed, 3)), 12)
		first := Solve(t.Context(), g, Options{})
		if !first.Feasible {
			continue
		}
		g.Current = g.Current[:0]
		for _, i := range first.Nodes {
			g.Current = append(g.Current, int32(i))
		}
		for i := range g.Nodes.Load5 {
			g.Nodes.Load5[i] = min(9, g.Nodes.Load5[i]+float64(i%3))
		}
		stay, wrong := g.Judge(first.Nodes)
		got := Solve(&countdown{Context: t.Context()}, g, Options{}) // cut short at once
		if len(wrong) == 0 {
			stayed++
			if !got.Feasible || got.Objective < stay.Objective-Tolerance {
				t.Fatalf("seed %d: %.9f, staying is worth %.9f", seed, got.Objective, stay.Objective)
			}
		}
	}
	if stayed < 100 {
		t.Fatalf("only %d current groups were feasible", stayed)
	}
}

func TestSameSeedSameGroup(t *testing.T) {
	for seed := range uint64(50) {
		g := small(rand.New(rand.NewPCG(seed, 4)), 14)
		a, b := Solve(t.Context(), g, Options{Seed: 5}), Solve(t.Context(), g, Options{Seed: 5})
		if fmt.Sprint(a.Nodes, a.Objective, a.Bound, a.Steps, a.Boxes) != fmt.Sprint(b.Nodes, b.Objective, b.Bound, b.Steps, b.Boxes) {
			t.Fatalf("seed %d: %v and %v", seed, a, b)
		}
	}
}

// Local search only ever improves, and each improvement is what it says.
func TestImprovesMonotonically(t *testing.T) {
	for seed := range uint64(200) {
		g := small(rand.New(rand.NewPCG(seed, 5)), 14)
		p := newProblem(g)
		if p.most < p.least {
			continue
		}
		last := math.Inf(-1)
		newLocal(t.Context(), p, seed).search(-penalty/2, func(set []int32, value float64) {
			if value <= last {
				t.Fatalf("seed %d: %.9f after %.9f", seed, value, last)
			}
			last = value
			var nodes []int
			for _, c := range set {
				nodes = append(nodes, int(p.node[c]))
			}
			slices.Sort(nodes)
			if s, wrong := g.Judge(nodes); len(wrong) > 0 || math.Abs(s.Objective-value) > 1e-12 {
				t.Fatalf("seed %d: %.15f is %.15f, %v", seed, value, s.Objective, wrong)
			}
		})
	}
}
