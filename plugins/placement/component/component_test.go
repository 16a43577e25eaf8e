package component

import (
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/placement/solver"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
	"github.com/coppice-project/coppice/plugins/sdk/sdktest"
)

func request() *placementv1.SolveRequest {
	snap := &placementv1.Snapshot{Components: []*placementv1.Component{{Key: "a/x", Count: 1, Instances: []*placementv1.Instance{{Name: "a/x-0"}}}}}
	for _, id := range []string{"n1", "n2", "n3", "n4"} {
		snap.Nodes = append(snap.Nodes, &placementv1.Node{Id: id, State: "alive"})
	}
	return &placementv1.SolveRequest{Snapshot: snap}
}

func TestItSolvesAsTheSolverDoes(t *testing.T) {
	r := sdktest.Start(t, New("1.0.0"))
	client := placementv1.NewPlacementClient(r.Conn)
	got, err := client.Solve(t.Context(), request())
	if err != nil {
		t.Fatal(err)
	}
	want, err := solver.Solve(request())
	if err != nil || !proto.Equal(got, want) || len(got.GetAssignments()[0].GetSuccessors()) != 3 {
		t.Errorf("got %v\nwant %v, %v", got, want, err)
	}
	if _, err := client.Solve(t.Context(), &placementv1.SolveRequest{}); status.Code(err) != codes.InvalidArgument {
		t.Errorf("a request without a snapshot: %v", err)
	}
}

func TestItsAttributesAreThePolicy(t *testing.T) {
	r := sdktest.Start(t, New("1.0.0"))
	set := func(name, value string) error {
		_, err := r.Control.SetAttributes(t.Context(), &componentv1.SetAttributesRequest{Json: map[string][]byte{name: []byte(value)}})
		return err
	}
	if err := set("successors", "1"); err != nil {
		t.Fatal(err)
	}
	client := placementv1.NewPlacementClient(r.Conn)
	plan, err := client.Solve(t.Context(), request())
	if err != nil || len(plan.GetAssignments()[0].GetSuccessors()) != 1 {
		t.Errorf("with one successor: %v, %v", plan, err)
	}
	req := request()
	req.Policy = solver.DefaultPolicy()
	if plan, err = client.Solve(t.Context(), req); err != nil || len(plan.GetAssignments()[0].GetSuccessors()) != 3 {
		t.Errorf("the policy of the request does not hold: %v, %v", plan, err)
	}
	for name, value := range map[string]string{"move_cost": "-1", "successors": "99", "max_moves": `"many"`} {
		if err := set(name, value); err == nil {
			t.Errorf("%s=%s is taken", name, value)
		}
	}
	d, err := r.Control.Describe(t.Context(), &componentv1.DescribeRequest{})
	if err != nil || d.GetType() != Type || len(d.GetAttributes()) != 8 || d.GetState().GetStateful() {
		t.Errorf("description %v, %v", d, err)
	}
}
