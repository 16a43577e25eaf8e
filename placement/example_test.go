package placement

import (
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/placement/solver"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// planet is a view of machines round the world: four regions, ten nodes in each, round trips by distance.
func planet() View {
	v := View{Self: "a0", Incarnation: 1}
	regions := []string{"na", "eu", "as", "sa"}
	between := [4][4]float64{{40, 147, 212, 204}, {147, 40, 302, 295}, {212, 302, 40, 396}, {204, 295, 396, 40}}
	for i := range 40 {
		name := fmt.Sprint("a", i)
		v.Nodes = append(v.Nodes, Node{Node: &placementv1.Node{
			Id: name, Name: name, State: "alive", Role: "full", Platform: "linux/amd64", CpuMillis: 4000, MemoryBytes: 8 << 30, DiskBytes: 9 << 30,
			Labels: map[string]string{"region": regions[i%4]},
			Facts: map[string]float64{
				"load5": float64(i%7) * 2, "free_mib": 4096, "live_slices": float64(i % 5), "clock_ghz": 2 + float64(i%3), "free_cpu": 100 - float64(i%9)*10,
			},
		}})
		for j := range i {
			v.Links = append(v.Links, &placementv1.Link{From: name, To: fmt.Sprint("a", j), RttMs: between[i%4][j%4] + math.Abs(float64(i-j))})
		}
	}
	return v
}

// The program of the Rhizoma paper's Figure 1: 25 lines at most, and it means what the figure says.
func TestPsEPR(t *testing.T) {
	data, err := os.ReadFile("../docs/examples/psepr.yaml")
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(data), "\n"); n > 25 {
		t.Errorf("%d lines", n)
	}
	all, err := components.ParseManifests("psepr.yaml", data)
	if err != nil {
		t.Fatal(err)
	}
	v := planet()
	v.Applications = []*componentsv1.Application{{Name: "psepr", Version: 1, Manifest: all[0], Pinned: []*componentsv1.Pinned{{Component: "router", Digest: "sha256:1"}}}}
	snap, expected, problems := Snapshot(v, Memory{Now: time.Unix(0, 0)})
	if len(problems) > 0 || len(expected) != 8 {
		t.Fatal(problems, len(expected))
	}
	req := &placementv1.SolveRequest{Snapshot: snap, Policy: solver.DefaultPolicy()}
	plan, err := solver.Solve(req)
	if err != nil || !plan.GetFeasible() || solver.Verify(req, plan) != nil {
		t.Fatalf("%v %v", plan, err)
	}
	nodes, regions := map[string]bool{}, map[string]int{}
	for _, a := range plan.GetAssignments() {
		k := slices.IndexFunc(v.Nodes, func(n Node) bool { return n.GetId() == a.GetNode() })
		n := v.Nodes[k]
		nodes[a.GetNode()] = true
		regions[n.GetLabels()["region"]]++
		if f := n.GetFacts(); f["load5"] > 10 || f["clock_ghz"]*f["free_cpu"]/100 <= 1.5 {
			t.Errorf("%s is on %s with %v", a.GetInstance(), a.GetNode(), f)
		}
	}
	if len(nodes) != 8 || len(regions) != 4 {
		t.Errorf("%d nodes in regions %v", len(nodes), regions)
	}
	for r, n := range regions {
		if n != 2 {
			t.Errorf("%d in %s", n, r)
		}
	}
	t.Logf("objective %.4f, no plan is better than %.4f, optimal=%v", plan.GetObjective(), plan.GetBound(), plan.GetOptimal())
}

// A deploy of a changed manifest is a changed policy: what runs follows it, within the moves of a round, and then rests.
func TestPoliciesChangeWhileRunning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, 6)
		for i, n := range w.nodes {
			n.Labels = map[string]string{"region": []string{"eu", "us"}[(i[1]-'1')%2]}
		}
		defer w.run()()
		w.deploy("application: a\ncomponents:\n- {name: x, artifact: x, count: 3, within: {label: region, of: [eu]}, apart: [x]}\n")
		time.Sleep(5 * time.Minute)
		in := func() (out []string) {
			for i := range 3 {
				owner := w.register(fmt.Sprint("a/x-", i)).Owner
				out = append(out, read(w, func() string { return w.nodes[owner].GetLabels()["region"] }))
			}
			return out
		}
		if got := in(); !slices.Equal(got, []string{"eu", "eu", "eu"}) {
			t.Fatalf("regions %v", got)
		}
		w.deploy("application: a\ncomponents:\n- {name: x, artifact: x, count: 3, within: {label: region, of: [us]}, apart: [x]}\n")
		time.Sleep(5 * time.Second)
		if got, most := in(), read(w, func() int { return w.mostMoves }); !slices.Equal(got, []string{"us", "us", "us"}) || most != 2 {
			t.Errorf("regions %v, %d moves at once", got, most)
		}
		n := len(w.notes())
		time.Sleep(10 * time.Minute)
		if len(w.notes()) != n {
			t.Errorf("it does not rest: %v", w.notes()[n:])
		}
		before := read(w, func() *componentsv1.Application { return proto.CloneOf(w.apps["a"]) })
		if before.GetManifest().GetComponents()[0].GetWithin().GetOf()[0] != "us" {
			t.Error("the deploy did not take")
		}
	})
}
