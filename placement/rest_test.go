package placement

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/placement/solver"
)

// After a step change of what is known of nodes the real coordinator follows it: every plan holds the constraints and is not worse than staying, no move is
// taken back more than once, and when facts are still nothing moves any more.
func TestAStepChangeIsFollowedOnce(t *testing.T) {
	stepChanges(t, 0, 10)
}

func TestLongAStepChangeIsFollowedOnce(t *testing.T) {
	if os.Getenv("COPPICE_LONG") == "" {
		t.Skip("COPPICE_LONG=1 runs it")
	}
	stepChanges(t, 10, 300)
}

func stepChanges(t *testing.T, from, to uint64) {
	for seed := from; seed < to; seed++ {
		synctest.Test(t, func(t *testing.T) { stepChange(t, seed) })
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

// variety is an application that cares for different things.
const variety = `
application: a
components:
- {name: plain, artifact: x, count: 3}
- {name: wide, artifact: x, count: 3, spread: zone}
- {name: alone, artifact: x, count: 2, apart: [alone]}
- {name: idle, artifact: x, count: 2, objective: [{value: node.load5, from: 0, to: 8, weight: 1, better: low}]}
- {name: cheap, artifact: x, price: {from: 0, to: 1, weight: 6}}
- {name: beside, artifact: x, together: [cheap]}
`

func stepChange(t *testing.T, seed uint64) {
	r := rand.New(rand.NewPCG(seed, 21))
	w := newWorld(t, seed, 4+r.IntN(4))
	facts := func() {
		for i := range len(w.nodes) {
			n := w.nodes[fmt.Sprint("n", i+1)]
			n.Node = proto.CloneOf(n.Node)
			n.Zone = fmt.Sprint("z", i%3)
			n.Facts = map[string]float64{"load5": r.Float64() * 10, "free_mib": r.Float64() * 8192, "price": float64(r.IntN(10)) / 10}
		}
	}
	facts()
	defer w.run()()
	w.deploy(variety)
	time.Sleep(10 * time.Minute)
	settled := len(w.notes())
	time.Sleep(5 * time.Minute)
	if n := w.notes(); len(n) != settled {
		t.Fatalf("facts are still, and yet: %v", n[settled:])
	}
	w.change(facts)
	time.Sleep(15 * time.Minute)
	after := w.notes()[settled:]
	visits := map[string]map[string]int{} // by instance, by node: how often it came there
	for _, line := range after {
		var instance, to string
		if _, err := fmt.Sscanf(strings.ReplaceAll(line, " to ", " "), "move %s %s", &instance, &to); err != nil {
			continue
		}
		if visits[instance] == nil {
			visits[instance] = map[string]int{}
		}
		if visits[instance][to]++; visits[instance][to] > 1 {
			t.Errorf("%s goes back and forth: %v", instance, after)
		}
	}
	time.Sleep(5 * time.Minute)
	if n := w.notes()[settled:]; len(n) != len(after) {
		t.Errorf("facts are still again, and yet: %v", n[len(after):])
	}
	if bad := w.unwell(); len(bad) > 0 && strings.Contains(strings.Join(bad, " "), "no owner") {
		t.Error(bad)
	}
	for _, d := range w.decisions {
		if d.Err != nil {
			t.Error(d.Err)
			continue
		}
		if err := solver.Verify(d.Request, d.Plan); err != nil {
			t.Error(err)
		}
		if d.Plan.GetFeasible() && d.Plan.GetObjective() < d.Plan.GetObjectiveBefore()-1e-9 && len(d.Plan.GetAssignments()) > 0 && wasFeasible(d) {
			t.Errorf("a plan of %v, staying is worth %v", d.Plan.GetObjective(), d.Plan.GetObjectiveBefore())
		}
		again, err := solver.Solve(proto.CloneOf(d.Request))
		if err != nil || len(d.Plan.GetAssignments()) > 0 && !proto.Equal(again, d.Plan) {
			t.Errorf("the same request, another plan: %v", err)
		}
	}
}

// wasFeasible tells whether everything could have stayed: then a plan is worth at least that.
func wasFeasible(d Decision) bool {
	for _, a := range d.Plan.GetAssignments() {
		if strings.HasPrefix(a.GetReason(), "leaves ") || strings.HasPrefix(a.GetReason(), "best of ") || strings.HasPrefix(a.GetReason(), "its owner ") {
			return false
		}
	}
	return true
}
