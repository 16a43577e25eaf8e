package solver

import (
	"math"
	"testing"

	"google.golang.org/protobuf/proto"

	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// A node that says it is ten times better than the best node could be wins no more by it than that best one would: terms are bounded. And when it begins to lie
// no more moves than a round has go there.
func TestALiarWinsNoMoreThanTheBest(t *testing.T) {
	honest := large(20, 40)
	first, err := Solve(honest)
	if err != nil || !first.GetFeasible() {
		t.Fatal(err, first.GetFeasible())
	}
	apply(honest, first)
	for _, i := range nodesOf(honest) {
		i.SettledMs = 1e9
	}
	said := func(facts map[string]float64) *placementv1.Plan {
		req := proto.CloneOf(honest)
		req.Snapshot.Nodes[3].Facts = facts
		plan, err := Solve(req)
		if err != nil {
			t.Fatal(err)
		}
		checkPlan(t, req, plan)
		checkMoves(t, req, plan)
		return plan
	}
	best := said(map[string]float64{"load5": 0, "free_mib": 8192})
	lie := said(map[string]float64{"load5": -10 * 8, "free_mib": 10 * 8192})
	if !proto.Equal(best, lie) {
		t.Errorf("a lie wins more than the truth could:\n%s\n%s", planText(lie, false), planText(best, false))
	}
	for i := range lie.GetAssignments() {
		if a := lie.GetAssignments()[i]; a.GetScore() <= 0 || a.GetScore() >= 1 {
			t.Errorf("%s has a utility of %v", a.GetInstance(), a.GetScore())
		}
	}
	unknown := said(nil)
	for _, v := range []float64{math.NaN(), math.Inf(1), math.Inf(-1)} {
		if wrong := said(map[string]float64{"load5": v, "free_mib": v}); !proto.Equal(wrong, unknown) {
			t.Errorf("%v counts for something", v)
		}
	}
}
