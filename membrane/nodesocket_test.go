package membrane

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/coppice-project/coppice/components/runner/runnertest"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

func TestNodeSocket(t *testing.T) {
	w := newWorld(t)
	m := w.serve(Config{})
	var published []string
	s, err := w.r.ServeNode(m, NodeSocketConfig{Path: filepath.Join(w.dir, "n"), LeaseTTL: 700 * time.Millisecond, Services: NodeServices{
		Publish: func(_ context.Context, inst string, ev *componentv1.Event) error {
			if ev.GetChannel() == "bad" {
				return errors.New("not yours")
			}
			published = append(published, inst+" "+ev.GetChannel())
			return nil
		},
	}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	conn, err := grpc.NewClient("unix:"+filepath.Join(w.dir, "n"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	node := componentv1.NewNodeClient(conn)
	cred := m.Backend().Process().Ident().Credential
	ctx := with(within(t, 10*time.Second), componentv1.MetaCredential, cred)
	if _, err := node.Assert(ctx, &componentv1.AssertRequest{}); status.Code(err) != codes.Unauthenticated {
		t.Fatalf("before it was allowed: %v", err)
	}
	s.Allow(cred)
	if _, err := node.Assert(ctx, &componentv1.AssertRequest{}); status.Code(err) != codes.Unimplemented {
		t.Fatalf("what the node does not offer: %v", err)
	}

	grant := leaseOn(t, ctx, node)
	g, err := grant()
	if err != nil || g.GetTtlMs() != 700 || g.GetToken().GetEpoch() != 1 || g.GetDrain() {
		t.Fatal(g, err)
	}
	if err := m.SetToken(Token{1, 5}); err != nil {
		t.Fatal(err)
	}
	s.SetDrain(true)
	if g, err = grant(); err != nil || g.GetToken().GetEpoch() != 5 || !g.GetDrain() {
		t.Fatal(g, err)
	}

	publishOn(t, ctx, node)
	if fmt.Sprint(published) != "["+instance+" good]" {
		t.Fatal(published)
	}
	callBinding(t, ctx, m, conn)

	s.Forbid(cred)
	if _, err := grant(); status.Code(err) != codes.PermissionDenied {
		t.Fatalf("lease of a forbidden process: %v", err)
	}
}

func TestWithheldLease(t *testing.T) {
	w := newWorld(t)
	m := New(Config{Instance: instance})
	s, err := w.r.ServeNode(m, NodeSocketConfig{Path: filepath.Join(w.dir, "n")})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.Allow("c")
	s.Withhold(true)
	conn, err := grpc.NewClient("unix:"+filepath.Join(w.dir, "n"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	lease, err := componentv1.NewNodeClient(conn).Lease(with(within(t, 50*time.Millisecond), componentv1.MetaCredential, "c"))
	if err != nil {
		t.Fatal(err)
	}
	if err := lease.Send(&componentv1.LeaseBeat{}); err != nil {
		t.Fatal(err)
	}
	if g, err := lease.Recv(); status.Code(err) != codes.DeadlineExceeded {
		t.Fatalf("granted: %v %v", g, err)
	}
}

// A process of a leased instance is granted no more than what is left of the lease, and nothing when nothing is.
func TestGrantsEndWithTheLease(t *testing.T) {
	w := newWorld(t)
	m := New(Config{Instance: instance})
	left := time.Hour
	s, err := w.r.ServeNode(m, NodeSocketConfig{Path: filepath.Join(w.dir, "n"), Lease: func() (time.Duration, bool) { return left, true }})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.Allow("c")
	conn, err := grpc.NewClient("unix:"+filepath.Join(w.dir, "n"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ask := leaseOn(t, with(within(t, 500*time.Millisecond), componentv1.MetaCredential, "c"), componentv1.NewNodeClient(conn))
	for _, c := range []struct {
		left time.Duration
		want uint32
	}{{time.Hour, 2000}, {1500 * time.Millisecond, 1500}, {20 * time.Millisecond, 20}} {
		left = c.left
		if g, err := ask(); err != nil || g.GetTtlMs() != c.want || !g.GetLeased() {
			t.Errorf("with %s left: %v, %v", c.left, g, err)
		}
	}
	left = 0
	if g, err := ask(); err == nil {
		t.Errorf("with nothing left: %v", g)
	}
}

func leaseOn(t *testing.T, ctx context.Context, node componentv1.NodeClient) func() (*componentv1.LeaseGrant, error) {
	t.Helper()
	lease, err := node.Lease(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return func() (*componentv1.LeaseGrant, error) {
		if err := lease.Send(&componentv1.LeaseBeat{}); err != nil {
			return nil, err
		}
		return lease.Recv()
	}
}

// publishOn publishes an event that is refused and one that is taken: the stream survives the first.
func publishOn(t *testing.T, ctx context.Context, node componentv1.NodeClient) {
	t.Helper()
	pub, err := node.Publish(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, ch := range []string{"bad", "good"} {
		if err := pub.Send(&componentv1.Event{Channel: ch, Seq: 4}); err != nil {
			t.Fatal(err)
		}
		ack, err := pub.Recv()
		if err != nil || ack.GetSeq() != 4 || (ack.GetError() != "") != (ch == "bad") {
			t.Fatal(ack, err)
		}
	}
}

// callBinding calls a required interface as the component's own stub does.
func callBinding(t *testing.T, ctx context.Context, m *Membrane, conn *grpc.ClientConn) {
	t.Helper()
	bound := with(ctx, componentv1.MetaBinding, "peer")
	var out wrapperspb.Int64Value
	if err := conn.Invoke(bound, runnertest.Add, wrapperspb.Int64(3), &out); status.Code(err) != codes.FailedPrecondition {
		t.Fatalf("not bound: %v", err)
	}
	if err := m.Bind(t.Context(), "peer", "test/counter"); err != nil {
		t.Fatal(err)
	}
	if err := conn.Invoke(bound, runnertest.Add, wrapperspb.Int64(3), &out); err != nil || out.GetValue() != 3 {
		t.Fatal(&out, err)
	}
	if err := conn.Invoke(with(within(t, time.Second), componentv1.MetaBinding, "peer"), runnertest.Add, wrapperspb.Int64(3), &out); status.Code(err) != codes.Unauthenticated {
		t.Fatalf("a binding without the credential: %v", err)
	}
}
