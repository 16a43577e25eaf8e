package sdk_test

import (
	"context"
	"fmt"
	"testing"

	"google.golang.org/grpc"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	counterv1 "github.com/coppice-project/coppice/plugins/counter/v1"
	"github.com/coppice-project/coppice/plugins/sdk"
	"github.com/coppice-project/coppice/plugins/sdk/sdktest"
)

// database is a store outside of the cluster that can compare numbers. It keeps the greatest token that it has seen with a value and refuses changes
// with a smaller one: the owner that writes them was taken over from and does not know it yet.
type database struct {
	token uint64
	value int64
}

func (d *database) set(token uint64, value int64) error {
	if token < d.token {
		return fmt.Errorf("refused: token %d, and %d was seen", token, d.token)
	}
	d.token, d.value = token, value
	return nil
}

// valve keeps its value in the database, not in its own state.
type valve struct {
	counterv1.UnimplementedCounterServer
	db *database
}

func (v *valve) Add(ctx context.Context, req *counterv1.AddRequest) (*counterv1.Value, error) {
	if err := v.db.set(sdk.FencingToken(ctx), v.db.value+req.GetN()); err != nil {
		return nil, err
	}
	return &counterv1.Value{Value: v.db.value}, nil
}

func startValve(t *testing.T, db *database, incarnation, epoch uint64) counterv1.CounterClient {
	c := &sdk.Component{
		Type: "valve", Version: "1.0.0", Register: func(r grpc.ServiceRegistrar) { counterv1.RegisterCounterServer(r, &valve{db: db}) },
	}
	r := sdktest.Start(t, c, sdktest.Request(&componentv1.StartRequest{
		Instance: "plant/valve-0", Token: &componentv1.Token{Incarnation: incarnation, Epoch: epoch},
	}))
	return counterv1.NewCounterClient(r.Conn)
}

// A store outside that checks the fencing token refuses an owner that stood still while another took over, and an owner from before a recovery of
// the cluster, however high its epoch was.
func TestAStoreOutsideRefusesTheStaleOwner(t *testing.T) {
	db := &database{}
	one := &counterv1.AddRequest{N: 1}
	old := startValve(t, db, 1, 7)
	if v, err := old.Add(t.Context(), one); err != nil || v.GetValue() != 1 {
		t.Fatal(v, err)
	}
	next := startValve(t, db, 1, 8)
	if v, err := next.Add(t.Context(), one); err != nil || v.GetValue() != 2 {
		t.Fatal(v, err)
	}
	if v, err := old.Add(t.Context(), one); err == nil {
		t.Errorf("the stale owner wrote %d", v.GetValue())
	}
	recovered := startValve(t, db, 2, 1)
	if v, err := recovered.Add(t.Context(), one); err != nil || v.GetValue() != 3 {
		t.Fatal(v, err)
	}
	if v, err := next.Add(t.Context(), one); err == nil {
		t.Errorf("the owner from before the recovery wrote %d", v.GetValue())
	}
	if db.token != 2<<32|1 || db.value != 3 {
		t.Errorf("the store holds %d under token %d", db.value, db.token)
	}
}
