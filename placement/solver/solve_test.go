package solver

import (
	"testing"

	"google.golang.org/protobuf/proto"

	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// checkPlan holds for every plan of every test.
func checkPlan(t testing.TB, req *placementv1.SolveRequest, plan *placementv1.Plan) {
	t.Helper()
	if err := Verify(req, plan); err != nil {
		t.Errorf("%v", err)
	}
	if plan.GetObjective() > plan.GetBound()+1e-6 {
		t.Errorf("objective %v is above the bound %v", plan.GetObjective(), plan.GetBound())
	}
	again, err := Solve(proto.CloneOf(req))
	if err != nil {
		t.Fatal(err)
	}
	a, err := proto.MarshalOptions{Deterministic: true}.Marshal(plan)
	if err != nil {
		t.Fatal(err)
	}
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(again)
	if err != nil {
		t.Fatal(err)
	}
	if string(a) != string(b) {
		t.Errorf("the same request gave two plans:\n%s\n%s", planText(plan, true), planText(again, true))
	}
}
