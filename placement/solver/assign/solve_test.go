package assign

import (
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/coppice-project/coppice/placement/solver/instance"
)

// small makes an assignment problem of few nodes with everything that can go wrong; not all have a solution.
func small(r *rand.Rand) *instance.Assignment {
	n, regions := 2+r.IntN(5), 1+r.IntN(3)
	a := &instance.Assignment{
		Name: "small", N: n, Regions: regions, Load5: instance.Term{Max: 10, Weight: 2}, LiveSlices: instance.Term{Max: 10, Weight: 1},
		FreeGHz: instance.Term{Min: 1, Max: 4, Weight: 3}, QualityWeight: float64(1 + r.IntN(4)), PriceCoef: []float64{0, 0.02}[r.IntN(2)],
	}
	l := instance.Latency{Unit: 0.01, Sites: n, Base: make([]int32, n*n), Site: make([]int32, n), Access: make([]int32, n)}
	nodes := &a.Nodes
	for i := range n {
		l.Site[i], l.Access[i] = int32(r.IntN(n)), int32(r.IntN(30))
		for j := range i {
			v := int32(r.IntN(5000))
			if r.IntN(8) == 0 {
				v = instance.None
			}
			l.Base[i*n+j], l.Base[j*n+i] = v, v
		}
		nodes.Region = append(nodes.Region, int32(r.IntN(regions)))
		nodes.Alive, nodes.Blacklisted = append(nodes.Alive, r.IntN(9) > 0), append(nodes.Blacklisted, r.IntN(12) == 0)
		nodes.Quarantined = append(nodes.Quarantined, r.IntN(6) == 0)
		nodes.Load5, nodes.LiveSlices = append(nodes.Load5, float64(r.IntN(22))/2), append(nodes.LiveSlices, float64(r.IntN(11)))
		nodes.CPUGHz, nodes.FreeCPU = append(nodes.CPUGHz, 2+float64(r.IntN(3))), append(nodes.FreeCPU, float64(r.IntN(21))*5)
		nodes.Price = append(nodes.Price, float64(r.IntN(5)))
		nodes.CPU, nodes.Memory = append(nodes.CPU, int64(r.IntN(8))), append(nodes.Memory, int64(2+r.IntN(6)))
	}
	a.Latency = l
	comps := 1 + r.IntN(3-n/6)
	for c := range comps {
		k := instance.Component{
			Name: fmt.Sprint(c), Replicas: 1 + r.IntN(3-min(c, 1)), CPU: int64(r.IntN(3)), Memory: int64(1 + r.IntN(2)), MaxPerNode: 1 + r.IntN(2),
			MaxPerRegion: 1 + r.IntN(3), MinRegions: r.IntN(regions + 1), Regions: make([]bool, regions), MoveCost: []float64{0, 0.02}[r.IntN(2)],
		}
		for i := range k.Regions {
			k.Regions[i] = r.IntN(7) > 0
		}
		if r.IntN(8) == 0 {
			k.Pinned = []int32{int32(r.IntN(n))}
		}
		a.Components = append(a.Components, k)
		var at []int32
		for range r.IntN(4) {
			at = append(at, int32(r.IntN(n)))
		}
		a.Current = append(a.Current, at)
		if to := r.IntN(comps); to != c {
			b := instance.Binding{From: c, To: to, Weight: float64(r.IntN(4)), XMaxMs: 30}
			if r.IntN(2) == 0 {
				b.MaxMs = float64(15 + r.IntN(60))
			}
			a.Bindings = append(a.Bindings, b)
			if r.IntN(3) == 0 {
				a.Apart = append(a.Apart, [2]int{c, to})
			}
		}
	}
	if r.IntN(4) == 0 {
		a.Current = nil
	}
	return a
}

// brute tries every placement.
func brute(a *instance.Assignment) (best float64, found bool) {
	best = math.Inf(-1)
	placement := make([][]int32, len(a.Components))
	var place func(c, r int, from int32)
	place = func(c, r int, from int32) {
		if c == len(a.Components) {
			if s, wrong := a.Judge(placement); len(wrong) == 0 && s.Objective > best {
				best, found = s.Objective, true
			}
			return
		}
		if r == a.Components[c].Replicas {
			place(c+1, 0, 0)
			return
		}
		for i := from; int(i) < a.N; i++ {
			placement[c] = append(placement[c], i)
			place(c, r+1, i)
			placement[c] = placement[c][:r]
		}
	}
	place(0, 0, 0)
	return best, found
}

func checkSmall(t *testing.T, seed uint64) (proven, feasible bool) {
	t.Helper()
	a := small(rand.New(rand.NewPCG(seed, 7)))
	want, feasible := brute(a)
	got := Solve(t.Context(), a, Options{Seed: seed, Steps: 2000})
	if got.Feasible {
		if s, wrong := a.Judge(got.Placement); len(wrong) > 0 || s.Objective != got.Objective {
			t.Fatalf("seed %d: %v, %v is %v", seed, wrong, got.Objective, s.Objective)
		}
		if !feasible || got.Bound < want-Tolerance {
			t.Fatalf("seed %d: bound %.12f, the best is %.12f (%v)", seed, got.Bound, want, feasible)
		}
	}
	if got.Proven && (got.Feasible != feasible || feasible && math.Abs(got.Objective-want) > Tolerance) {
		t.Fatalf("seed %d: proven %.12f (%v), the best is %.12f (%v)", seed, got.Objective, got.Feasible, want, feasible)
	}
	return got.Proven, feasible
}

func TestProvenIsNeverWrong(t *testing.T) {
	proven, feasible := 0, 0
	const all = 400
	for seed := range uint64(all) {
		p, f := checkSmall(t, seed)
		if p {
			proven++
		}
		if f {
			feasible++
		}
	}
	if proven < all*9/10 || feasible < all/4 {
		t.Fatalf("%d of %d were proven, %d have a solution: this says little", proven, all, feasible)
	}
}

func TestLongProvenIsNeverWrong(t *testing.T) {
	if os.Getenv("COPPICE_LONG") == "" {
		t.Skip("COPPICE_LONG=1 runs it")
	}
	for seed := range uint64(20_000) {
		checkSmall(t, 10_000+seed)
	}
}

func drawn(t *testing.T, spec instance.AssignmentSpec) *instance.Assignment {
	t.Helper()
	a, err := instance.NewAssignment(spec)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// What steps add up to is what the placement is worth from scratch.
func TestStepsAddUp(t *testing.T) {
	for seed := range uint64(20) {
		a := drawn(t, instance.AssignmentSpec{N: 30, Components: 8, Replicas: 5, Seed: seed})
		p := newProblem(a)
		s := newState(p)
		an := newAnnealer(s, rand.New(rand.NewPCG(seed, 1)))
		s.keep()
		an.restart()
		an.heat = 0.05
		for range 3000 {
			an.try()
		}
		score, wrong := a.Judge(s.at)
		if s.lost > 0 {
			t.Fatalf("seed %d: %d replicas got lost", seed, s.lost)
		}
		if got := s.value + s.penalty(); math.Abs(got-score.Objective) > 1e-9 || (s.broken == 0) != (len(wrong) == s.unpinned()) {
			t.Fatalf("seed %d: %.12f and %d violations, from scratch %.12f and %v", seed, got, s.broken, score.Objective, wrong)
		}
		fresh := newState(p)
		fresh.restore(s.at)
		if math.Abs(fresh.value-s.value) > 1e-9 || fresh.broken != s.broken {
			t.Fatalf("seed %d: %.12f, rebuilt %.12f", seed, s.value, fresh.value)
		}
	}
}

// Where there is a solution one is found, it is never worse than staying, more steps never make it worse, and the same steps the same.
func TestSearch(t *testing.T) {
	for seed := range uint64(4) {
		a := drawn(t, instance.AssignmentSpec{N: 60, Components: 9, Replicas: 6, Seed: seed})
		stay, wrong := a.Judge(a.Current)
		if len(wrong) > 0 {
			t.Logf("seed %d: the current placement violates %d", seed, len(wrong))
		}
		var last Result
		for _, steps := range []int{1000, 30_000} {
			got := Solve(t.Context(), a, Options{Seed: seed, Steps: steps})
			again := Solve(t.Context(), a, Options{Seed: seed, Steps: steps})
			if !got.Feasible {
				t.Fatalf("seed %d: no placement was found", seed)
			}
			if fmt.Sprint(got.Placement, got.Objective, got.Bound) != fmt.Sprint(again.Placement, again.Objective, again.Bound) {
				t.Fatalf("seed %d: twice the same search, two results", seed)
			}
			if len(wrong) == 0 && got.Objective < stay.Objective-Tolerance {
				t.Fatalf("seed %d: %.9f, staying is worth %.9f", seed, got.Objective, stay.Objective)
			}
			last = got
		}
		if first := Solve(t.Context(), a, Options{Seed: seed, Repair: true}); first.Objective > last.Objective+Tolerance {
			t.Fatalf("seed %d: %.9f after a search, the first one was %.9f", seed, last.Objective, first.Objective)
		}
	}
}

// When a node dies only what ran there is placed anew.
func TestRepairTouchesOnlyWhatItMust(t *testing.T) {
	a := drawn(t, instance.AssignmentSpec{N: 400, Components: 150, Replicas: 3, Plain: true, Seed: 3})
	before := Solve(t.Context(), a, Options{Steps: 5000})
	if !before.Feasible {
		t.Fatal("no placement was found")
	}
	for dead := range a.N {
		ran := 0
		for _, nodes := range before.Placement {
			ran += len(nodes) - len(slices.DeleteFunc(slices.Clone(nodes), func(n int32) bool { return int(n) == dead }))
		}
		if ran == 0 || dead%7 != 0 {
			continue
		}
		b := *a
		b.Nodes.Alive = slices.Clone(a.Nodes.Alive)
		b.Nodes.Alive[dead] = false
		b.Current = before.Placement
		after := Solve(t.Context(), &b, Options{Repair: true})
		if !after.Feasible {
			t.Fatalf("node %d: no placement was found", dead)
		}
		for c, nodes := range before.Placement {
			for _, n := range nodes {
				if int(n) != dead && count(after.Placement[c], n) < count(nodes, n) {
					t.Fatalf("node %d: component %d left node %d, which lives", dead, c, n)
				}
			}
		}
	}
}

func count(list []int32, n int32) (k int) {
	for _, v := range list {
		if v == n {
			k++
		}
	}
	return k
}

func TestDeadlineHolds(t *testing.T) {
	a := drawn(t, instance.AssignmentSpec{N: 300, Components: 20, Replicas: 8, Seed: 5})
	now := time.Duration(0)
	got := Solve(t.Context(), a, Options{Deadline: time.Second, Clock: func() time.Duration { now += time.Millisecond; return now }})
	if !got.Feasible || now > 2*time.Second {
		t.Fatalf("%v after %v", got.Feasible, now)
	}
}
