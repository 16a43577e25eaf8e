package solver

import (
	"os"
	"testing"
	"time"
)

// The product's scale, for measuring: COPPICE_LONG=1 runs it.
func TestLongScale(t *testing.T) {
	if os.Getenv("COPPICE_LONG") == "" {
		t.Skip("COPPICE_LONG=1 runs it")
	}
	for _, size := range [][2]int{{5, 10}, {10, 30}, {40, 100}, {600, 50}, {600, 600}, {5000, 6000}} {
		req := large(size[0], size[1])
		for _, what := range []string{"first", "again", "after the death of a node"} {
			if what == "after the death of a node" {
				id := req.GetSnapshot().GetComponents()[0].GetInstances()[0].GetNode()
				for _, n := range req.GetSnapshot().GetNodes() {
					if n.GetId() == id {
						n.State = "dead"
					}
				}
			}
			p, err := newProblem(req)
			if err != nil {
				t.Fatal(err)
			}
			s := newState(p)
			s.construct()
			built := s.result().objective
			newWalk(s, 0).descend(func() bool { return false })
			climbed := s.result().objective
			start := time.Now()
			plan, err := Solve(req)
			if err != nil {
				t.Fatal(err)
			}
			moved := 0
			was := nodesOf(req)
			for _, a := range plan.GetAssignments() {
				if was[a.GetInstance()].GetNode() != a.GetNode() {
					moved++
				}
			}
			t.Logf("%d nodes, %d instances, %s: %s, feasible=%v objective %.4f of at most %.4f (built %.4f, then climbed %.4f), %d placed anew", size[0], size[1], what, time.Since(start), plan.GetFeasible(), plan.GetObjective(), plan.GetBound(), built, climbed, moved)
			apply(req, plan)
			for _, i := range nodesOf(req) {
				i.SettledMs = 1e6
			}
		}
	}
}
