package sdk_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protodesc"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	counterv1 "github.com/coppice-project/coppice/plugins/counter/v1"
	"github.com/coppice-project/coppice/plugins/sdk"
	"github.com/coppice-project/coppice/plugins/sdk/sdktest"
	"github.com/coppice-project/coppice/plugins/sdk/state"
)

// probe is a counter whose calls a test can look into.
type probe struct {
	counterv1.UnimplementedCounterServer
	add func(ctx context.Context, n int64) error
	get func(ctx context.Context) error
	ran atomic.Int64
}

func (p *probe) Add(ctx context.Context, req *counterv1.AddRequest) (*counterv1.Value, error) {
	p.ran.Add(1)
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	v := tx.Uint64("value") + uint64(req.GetN())
	tx.PutUint64("value", v)
	if p.add != nil {
		if err := p.add(ctx, req.GetN()); err != nil {
			return nil, err
		}
	}
	return &counterv1.Value{Value: int64(v)}, nil
}

func (p *probe) Get(ctx context.Context, _ *counterv1.GetRequest) (*counterv1.Value, error) {
	if p.get != nil {
		if err := p.get(ctx); err != nil {
			return nil, err
		}
	}
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	return &counterv1.Value{Value: int64(tx.Uint64("value"))}, nil
}

func (p *probe) component() *sdk.Component {
	return &sdk.Component{
		Type: "probe", Version: "1.0.0", State: &sdk.State{Schema: 1},
		Register: func(r grpc.ServiceRegistrar) { counterv1.RegisterCounterServer(r, p) },
	}
}

// addOnce makes one call and returns the value and the mark in the trailer.
func addOnce(ctx context.Context, r *sdktest.Running, n int64) (int64, string, error) {
	var trailer metadata.MD
	v, err := counterv1.NewCounterClient(r.Conn).Add(ctx, &counterv1.AddRequest{N: n}, grpc.Trailer(&trailer))
	return v.GetValue(), strings.Join(trailer.Get(componentv1.MetaMark), ","), err
}

func mustGet(t *testing.T, r *sdktest.Running) int64 {
	t.Helper()
	v, err := counterv1.NewCounterClient(r.Conn).Get(t.Context(), &counterv1.GetRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return v.GetValue()
}

func wantCode(t *testing.T, err error, code codes.Code, part string) {
	t.Helper()
	if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), part) {
		t.Fatalf("got %v, want %v with %q", err, code, part)
	}
}

func TestCallIsOneTransactionWithItsReply(t *testing.T) {
	p := &probe{}
	r := sdktest.Start(t, p.component())
	ctx := sdktest.Key(t.Context(), "gate/1", "1")
	for range 3 {
		if v, mark, err := addOnce(ctx, r, 5); err != nil || v != 5 || mark != "1" {
			t.Fatalf("%d mark %s: %v", v, mark, err)
		}
	}
	if p.ran.Load() != 1 {
		t.Fatalf("ran %d times", p.ran.Load())
	}
	var trailer metadata.MD
	v, err := counterv1.NewCounterClient(r.Conn).Get(t.Context(), &counterv1.GetRequest{}, grpc.Trailer(&trailer))
	if err != nil || v.GetValue() != 5 || trailer.Get(componentv1.MetaMark)[0] != "1" {
		t.Fatalf("a read answers the mark it saw: %v %v %v", v, trailer, err)
	}
	_, err = counterv1.NewCounterClient(r.Conn).Add(ctx, &counterv1.AddRequest{N: 6}, grpc.Trailer(&trailer))
	wantCode(t, err, codes.Aborted, "different request")
	if len(trailer.Get(componentv1.MetaKeyReused)) != 1 {
		t.Fatalf("trailer %v", trailer)
	}
}

func TestFailedCallLeavesNoTrace(t *testing.T) {
	p := &probe{add: func(context.Context, int64) error { return status.Error(codes.NotFound, "not today") }}
	r := sdktest.Start(t, p.component())
	ctx := sdktest.Key(t.Context(), "gate/1", "")
	_, _, err := addOnce(ctx, r, 1)
	wantCode(t, err, codes.NotFound, "not today")
	p.add = func(context.Context, int64) error { panic("ouch") }
	_, _, err = addOnce(ctx, r, 1)
	wantCode(t, err, codes.Internal, "ouch")
	if v := mustGet(t, r); v != 0 {
		t.Fatalf("value %d", v)
	}
	p.add = nil
	if v, _, err := addOnce(ctx, r, 1); err != nil || v != 1 {
		t.Fatalf("an error is not remembered: %d %v", v, err)
	}
	p.get = func(ctx context.Context) error {
		tx, err := sdk.Tx(ctx)
		if err == nil {
			tx.Put("x", nil)
		}
		return err
	}
	_, err = counterv1.NewCounterClient(r.Conn).Get(t.Context(), &counterv1.GetRequest{})
	wantCode(t, err, codes.Internal, "read-only")
}

func TestRestoredInstanceAnswersRetries(t *testing.T) {
	p := &probe{}
	first := sdktest.Start(t, p.component())
	ctx := sdktest.Key(t.Context(), "gate/1", "")
	if _, _, err := addOnce(ctx, first, 5); err != nil {
		t.Fatal(err)
	}
	full := first.Checkpoint(0)
	if _, _, err := addOnce(sdktest.Key(t.Context(), "gate/2", ""), first, 7); err != nil {
		t.Fatal(err)
	}
	delta := first.Checkpoint(1)
	p2 := &probe{}
	second := sdktest.Start(t, p2.component(), sdktest.From(append(full, delta...)))
	if v, mark, err := addOnce(ctx, second, 5); err != nil || v != 5 || mark != "1" {
		t.Fatalf("%d mark %s: %v", v, mark, err)
	}
	if v, mark, err := addOnce(sdktest.Key(t.Context(), "gate/2", ""), second, 7); err != nil || v != 12 || mark != "2" {
		t.Fatalf("%d mark %s: %v", v, mark, err)
	}
	if p2.ran.Load() != 0 || mustGet(t, second) != 12 {
		t.Fatalf("ran %d, value %d", p2.ran.Load(), mustGet(t, second))
	}
}

func TestLifecycle(t *testing.T) {
	synced := make(chan struct{})
	release := make(chan struct{})
	p := &probe{add: func(_ context.Context, n int64) error {
		if n == 9 {
			close(synced)
			<-release
		}
		return nil
	}}
	runs := make(chan string, 10)
	c := p.component()
	c.Run = func(ctx context.Context, in *sdk.Instance) error {
		runs <- "runs " + in.Name()
		<-ctx.Done()
		runs <- "stops"
		return ctx.Err()
	}
	r := sdktest.Start(t, c, sdktest.Request(nil))
	ctx := t.Context()
	_, _, err := addOnce(ctx, r, 1)
	wantCode(t, err, codes.FailedPrecondition, "Start first")
	st, err := r.Control.Start(ctx, &componentv1.StartRequest{Instance: "app/p-3", Version: "7.7.7"})
	if err != nil || st.GetState() != componentv1.State_STARTED || <-runs != "runs app/p-3" {
		t.Fatal(st, err)
	}
	if r.Instance.Version() != "7.7.7" || r.Instance.ComponentName() != "app/p" {
		t.Fatal(r.Instance.Version(), r.Instance.ComponentName())
	}
	slow := make(chan error, 1)
	go func() { _, _, err := addOnce(ctx, r, 9); slow <- err }()
	<-synced
	_, err = r.Control.Quiesce(ctx, &componentv1.QuiesceRequest{DeadlineMs: 20})
	wantCode(t, err, codes.DeadlineExceeded, "1 calls did not end")
	if <-runs != "stops" || <-runs != "runs app/p-3" {
		t.Fatal("background work goes on after a freeze that failed")
	}
	close(release)
	if err := <-slow; err != nil {
		t.Fatal(err)
	}
	if st, err = r.Control.Quiesce(ctx, &componentv1.QuiesceRequest{}); err != nil || st.GetState() != componentv1.State_FROZEN || <-runs != "stops" {
		t.Fatal(st, err)
	}
	if st.GetInfo()[componentv1.InfoMark] != "1" {
		t.Fatal(st)
	}
	_, _, err = addOnce(ctx, r, 1)
	wantCode(t, err, codes.Unavailable, "frozen")
	if st, err = r.Control.Resume(ctx, &componentv1.ResumeRequest{}); err != nil || <-runs != "runs app/p-3" {
		t.Fatal(st, err)
	}
	if v, _, err := addOnce(ctx, r, 1); err != nil || v != 10 {
		t.Fatal(v, err)
	}
	if st, err = r.Control.Stop(ctx, &componentv1.StopRequest{}); err != nil || st.GetState() != componentv1.State_STOPPED || st.GetDetail() != "" {
		t.Fatal(st, err)
	}
}

// TestUpdateIsRefusedWhenFrozen: a stream or goroutine that goes on writing in a process whose state was taken elsewhere would write into nothing.
func TestUpdateIsRefusedWhenFrozen(t *testing.T) {
	c := (&probe{}).component()
	put := func(ctx context.Context, in *sdk.Instance) error {
		return in.Update(ctx, func(_ context.Context, tx *sdk.Txn) error { tx.PutUint64("value", tx.Uint64("value")+1); return nil })
	}
	c.OnStart = put
	r := sdktest.Start(t, c)
	if err := put(t.Context(), r.Instance); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Control.Quiesce(t.Context(), &componentv1.QuiesceRequest{}); err != nil {
		t.Fatal(err)
	}
	wantCode(t, put(t.Context(), r.Instance), codes.Unavailable, "frozen")
	if _, err := r.Control.Resume(t.Context(), &componentv1.ResumeRequest{}); err != nil {
		t.Fatal(err)
	}
	if err := put(t.Context(), r.Instance); err != nil || mustGet(t, r) != 3 {
		t.Fatal(mustGet(t, r), err)
	}
}

// TestStubbornBackgroundWork: work that does not return makes a freeze fail, and runs again once it has returned.
func TestStubbornBackgroundWork(t *testing.T) {
	c := (&probe{}).component()
	runs, release := make(chan int, 5), make(chan struct{})
	n := 0
	c.Run = func(ctx context.Context, _ *sdk.Instance) error {
		n++
		runs <- n
		<-ctx.Done()
		<-release
		return nil
	}
	r := sdktest.Start(t, c)
	<-runs
	_, err := r.Control.Quiesce(t.Context(), &componentv1.QuiesceRequest{DeadlineMs: 10})
	wantCode(t, err, codes.DeadlineExceeded, "Component.Run")
	close(release)
	if again := <-runs; again != 2 {
		t.Fatal(again)
	}
	if _, err := r.Control.Quiesce(t.Context(), &componentv1.QuiesceRequest{}); err != nil {
		t.Fatal(err)
	}
}

func TestDeltasFollowTheWriter(t *testing.T) {
	p := &probe{}
	r := sdktest.Start(t, p.component())
	stream, err := r.Control.Deltas(t.Context(), &componentv1.CheckpointFrom{})
	if err != nil {
		t.Fatal(err)
	}
	var frames []*componentv1.StateFrame
	for i := range 20 {
		if _, _, err := addOnce(sdktest.Key(t.Context(), fmt.Sprintf("g/%d", i+1), ""), r, 1); err != nil {
			t.Fatal(err)
		}
		f, err := stream.Recv()
		if err != nil || f.GetMark() != uint64(i+1) || !f.GetLast() {
			t.Fatal(f, err)
		}
		frames = append(frames, f)
	}
	standby := sdktest.Start(t, (&probe{}).component(), sdktest.From(frames))
	if v := mustGet(t, standby); v != 20 {
		t.Fatalf("value %d", v)
	}
	if _, err := r.Control.Stop(t.Context(), &componentv1.StopRequest{}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); !errors.Is(err, io.EOF) {
		t.Fatalf("the stream ends with the instance: %v", err)
	}
}

func TestBackpressure(t *testing.T) {
	p := &probe{}
	c := p.component()
	c.State.Limits = state.Limits{JournalBytes: 1, BacklogBytes: 64 << 10}
	p.add = func(ctx context.Context, _ int64) error {
		tx, err := sdk.Tx(ctx)
		if err == nil {
			tx.Put("blob", make([]byte, 32<<10))
		}
		return err
	}
	r := sdktest.Start(t, c)
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := r.Control.Deltas(ctx, &componentv1.CheckpointFrom{}); err != nil {
		t.Fatal(err)
	}
	refused := waitFor(t, func() bool { _, _, err := addOnce(t.Context(), r, 1); return status.Code(err) == codes.Unavailable })
	if !refused {
		t.Fatal("a consumer that does not read never made a write be refused")
	}
	mustGet(t, r) // reading goes on
	cancel()
	if !waitFor(t, func() bool { _, _, err := addOnce(t.Context(), r, 1); return err == nil }) {
		t.Fatal("writes stay refused after the consumer has gone")
	}
}

// waitFor polls a condition; it is for what another goroutine does without telling.
func waitFor(t *testing.T, cond func() bool) bool {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(time.Millisecond) {
		if cond() {
			return true
		}
	}
	return false
}

func TestSchemasAndMigration(t *testing.T) {
	old := sdktest.Start(t, (&probe{}).component())
	if _, _, err := addOnce(t.Context(), old, 5); err != nil {
		t.Fatal(err)
	}
	frames := old.Checkpoint(0)
	newer := (&probe{}).component()
	newer.State = &sdk.State{Schema: 2}
	r := sdktest.Start(t, newer, sdktest.Request(nil))
	stream, err := r.Control.Restore(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(frames[0]); err != nil {
		t.Fatal(err)
	}
	_, err = stream.CloseAndRecv()
	wantCode(t, err, codes.DataLoss, "reads [2]")

	reads := (&probe{}).component()
	reads.State = &sdk.State{Schema: 2, Reads: []uint32{1}, Migrate: func(from uint32, tx *sdk.Txn) error {
		tx.PutUint64("value", 100*uint64(from)+tx.Uint64("value"))
		return nil
	}}
	m := sdktest.Start(t, reads, sdktest.From(frames))
	if v := mustGet(t, m); v != 105 {
		t.Fatalf("value %d", v)
	}
	if h := m.Checkpoint(0)[0]; h.GetSchema() != 2 || h.GetMark() != 2 {
		t.Fatal(h)
	}
	aside, err := m.Control.Migrate(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range frames {
		if err := aside.Send(f); err != nil {
			t.Fatal(err)
		}
	}
	if err := aside.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if h, err := aside.Recv(); err != nil || h.GetSchema() != 2 {
		t.Fatal(h, err)
	}
}

// TestOlderVersionRefusesNewerState: going back needs a version that can read what was written since.
func TestOlderVersionRefusesNewerState(t *testing.T) {
	newer := (&probe{}).component()
	newer.State = &sdk.State{Schema: 2}
	m := sdktest.Start(t, newer)
	older := (&probe{}).component()
	back := sdktest.Start(t, older, sdktest.Request(nil))
	stream, err := back.Control.Restore(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range m.Checkpoint(0) {
		if err := stream.Send(f); err != nil {
			break
		}
	}
	_, err = stream.CloseAndRecv()
	wantCode(t, err, codes.DataLoss, "schema 2")
}

func TestDescribe(t *testing.T) {
	c := (&probe{}).component()
	c.HTTP = http.NotFoundHandler()
	c.Requires = []*sdk.Binding{sdk.Require("next", "counter.v1.Counter"), sdk.Wants("spare", "counter.v1.Counter")}
	c.Attributes = []sdk.Attr{sdk.NewAttribute("n", 1)}
	r := sdktest.Start(t, c, sdktest.Request(nil))
	d, err := r.Control.Describe(t.Context(), &componentv1.DescribeRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if len(d.GetProvides()) != 2 || d.GetProvides()[0].GetName() != "counter" || d.GetProvides()[1].GetKind() != componentv1.Kind_KIND_HTTP {
		t.Fatal(d.GetProvides())
	}
	if len(d.GetRequires()) != 2 || !d.GetRequires()[1].GetOptional() || d.GetState().GetWritesSchema() != 1 || len(d.GetFeatures()) != 3 {
		t.Fatal(d)
	}
	files, err := protodesc.NewFiles(d.GetServices())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := files.FindDescriptorByName("counter.v1.Counter.Get"); err != nil {
		t.Fatal(err)
	}
	if _, err := sdk.New(&sdk.Component{State: &sdk.State{}}, sdk.Env{}); err == nil || strings.Count(err.Error(), "\n") != 2 {
		t.Fatalf("all problems at once: %v", err)
	}
}
