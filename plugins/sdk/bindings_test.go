package sdk_test

import (
	"context"
	"errors"
	"strings"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	counterv1 "github.com/coppice-project/coppice/plugins/counter/v1"
	"github.com/coppice-project/coppice/plugins/sdk"
	"github.com/coppice-project/coppice/plugins/sdk/sdktest"
)

// front is a component that adds to two counters behind bindings for each call.
type front struct {
	counterv1.UnimplementedCounterServer
	next counterv1.CounterClient
	fail func() error // after the calls, before the end
}

func (f *front) Add(ctx context.Context, req *counterv1.AddRequest) (*counterv1.Value, error) {
	if _, err := f.next.Add(ctx, req); err != nil {
		return nil, err
	}
	v, err := f.next.Add(ctx, req)
	if err != nil {
		return nil, err
	}
	if f.fail != nil {
		if err := f.fail(); err != nil {
			return nil, err
		}
	}
	return v, nil
}

// start runs a front before back, as instance name.
func (f *front) start(t *testing.T, back grpc.ClientConnInterface, name string, stateful bool, opts ...sdktest.Option) *sdktest.Running {
	next := sdk.Require("next", "counter.v1.Counter")
	next.Use(back)
	f.next = counterv1.NewCounterClient(next)
	c := &sdk.Component{
		Type: "front", Version: "1.0.0", Requires: []*sdk.Binding{next},
		Register: func(r grpc.ServiceRegistrar) { counterv1.RegisterCounterServer(r, f) },
	}
	if stateful {
		c.State = &sdk.State{Schema: 1}
	}
	return sdktest.Start(t, c, append([]sdktest.Option{sdktest.Request(&componentv1.StartRequest{Instance: name})}, opts...)...)
}

// TestRetryThroughOtherInstance: a call that is retried at another instance of a stateless component acts once behind it.
func TestRetryThroughOtherInstance(t *testing.T) {
	back := sdktest.Start(t, (&probe{}).component())
	lost := errors.New("the process died here")
	a := (&front{fail: func() error { return lost }}).start(t, back.Conn, "shop/web-0", false)
	b := (&front{}).start(t, back.Conn, "shop/web-12", false)
	for _, key := range []string{"gateway/7", "a client's own key"} {
		before := mustGet(t, back)
		ctx := sdktest.Key(t.Context(), key, "")
		if _, _, err := addOnce(ctx, a, 1); err == nil {
			t.Fatal("it should have failed")
		}
		if v, _, err := addOnce(ctx, b, 1); err != nil || v != before+2 {
			t.Fatalf("%s: %d %v", key, v, err)
		}
	}
	if v := mustGet(t, back); v != 4 {
		t.Fatalf("2 calls made 4 additions of 1, the counter says %d", v)
	}
}

// TestReplayInAnotherOrder: a stateful component loses two calls in a crash; after the restore they come back in another order.
func TestReplayInAnotherOrder(t *testing.T) {
	back := sdktest.Start(t, (&probe{}).component())
	f := &front{fail: func() error { return errors.New("the process died here") }}
	first := f.start(t, back.Conn, "app/front-0", true)
	one, two := sdktest.Key(t.Context(), "gate/1", ""), sdktest.Key(t.Context(), "gate/2", "")
	_, _, err1 := addOnce(one, first, 10)
	_, _, err2 := addOnce(two, first, 100)
	if err1 == nil || err2 == nil {
		t.Fatal("they should have failed")
	}
	second := (&front{}).start(t, back.Conn, "app/front-0", true, sdktest.From(first.Checkpoint(0)))
	if _, _, err := addOnce(two, second, 100); err != nil {
		t.Fatal(err)
	}
	if _, _, err := addOnce(one, second, 10); err != nil {
		t.Fatal(err)
	}
	if v := mustGet(t, back); v != 220 {
		t.Fatalf("counter %d, want 220", v)
	}
}

// TestOwnAccountReplay: work on the component's own account is numbered by its state, and an abandoned past does not get in its way.
func TestOwnAccountReplay(t *testing.T) {
	back := sdktest.Start(t, (&probe{}).component())
	work := func(r *sdktest.Running, next counterv1.CounterClient, n int64, die bool) error {
		return r.Instance.Update(t.Context(), func(ctx context.Context, tx *sdk.Txn) error {
			if _, err := next.Add(ctx, &counterv1.AddRequest{N: n}); err != nil {
				return err
			}
			tx.PutUint64("done", tx.Uint64("done")+1)
			if die {
				return errors.New("the process died here")
			}
			return nil
		})
	}
	f := &front{}
	r := f.start(t, back.Conn, "app/front-0", true)
	if err := work(r, f.next, 1, true); err == nil {
		t.Fatal("it should have died")
	}
	if err := work(r, f.next, 1, false); err != nil || mustGet(t, back) != 1 {
		t.Fatalf("the same work again: %d %v", mustGet(t, back), err)
	}
	if err := work(r, f.next, 1, false); err != nil || mustGet(t, back) != 2 {
		t.Fatalf("new work: %d %v", mustGet(t, back), err)
	}
	if err := work(r, f.next, 5, true); err == nil {
		t.Fatal("it should have died")
	}
	if err := work(r, f.next, 70, false); err != nil || mustGet(t, back) != 77 {
		t.Fatalf("other work under the number of the abandoned: %d %v", mustGet(t, back), err)
	}
}

// recorder is a connection that notes the metadata of calls.
type recorder struct {
	grpc.ClientConnInterface
	seen []metadata.MD
	fail int // this many calls find nobody
}

func (r *recorder) Invoke(ctx context.Context, method string, args, reply any, opts ...grpc.CallOption) error {
	md, _ := metadata.FromOutgoingContext(ctx)
	r.seen = append(r.seen, md)
	if r.fail--; r.fail >= 0 {
		return status.Error(codes.Unavailable, "nobody there")
	}
	return nil
}

func TestBindingMetadata(t *testing.T) {
	rec := &recorder{}
	f := &front{}
	r := f.start(t, rec, "app/front-0", true)
	key := func(i int) string { return strings.Join(rec.seen[i].Get(componentv1.MetaKey), ",") }
	if _, _, err := addOnce(sdktest.Key(t.Context(), "gate/5", "4"), r, 1); err != nil {
		t.Fatal(err)
	}
	if key(0) != "gate:app/front:next.Add/5" || key(1) != "gate:app/front:next.Add.1/5" || rec.seen[0].Get(componentv1.MetaLow)[0] != "4" {
		t.Fatal(rec.seen)
	}
	if rec.seen[0].Get(componentv1.MetaBinding)[0] != "next" {
		t.Fatal(rec.seen[0])
	}
	if _, _, err := addOnce(t.Context(), r, 1); err != nil {
		t.Fatal(err)
	}
	if key(2) != "app/front-0/1" || key(3) != "app/front-0/2" || rec.seen[2].Get(componentv1.MetaLow)[0] != "1" {
		t.Fatal(rec.seen[2:])
	}
	rec.seen, rec.fail = nil, 3
	if _, err := f.next.Add(sdk.WithKey(t.Context(), "mine"), &counterv1.AddRequest{}); err != nil || len(rec.seen) != 4 || key(3) != "mine" {
		t.Fatal("a keyed call is made again while nobody is there", err, rec.seen)
	}
	rec.seen, rec.fail = nil, 3
	if _, err := f.next.Add(t.Context(), &counterv1.AddRequest{}); status.Code(err) != codes.Unavailable || len(rec.seen) != 1 {
		t.Fatal("a call without a key is not", err, rec.seen)
	}
	rec.seen, rec.fail = nil, 3
	if _, err := f.next.Get(t.Context(), &counterv1.GetRequest{}); err != nil || len(rec.seen) != 4 {
		t.Fatal("a read is made again", err, rec.seen)
	}
	if _, err := counterv1.NewCounterClient(sdk.Require("loose", "x")).Get(t.Context(), nil); status.Code(err) != codes.FailedPrecondition {
		t.Fatal(err)
	}
}
