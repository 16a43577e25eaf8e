package membrane

import (
	"context"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/coppice-project/coppice/components/runner/runnertest"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// pair is two nodes: n1 serves the component, n2 calls it.
type pair struct {
	*world
	net *network
	r2  *Router
	d2  *directory
}

func newPair(t *testing.T, cfg Config) (*pair, *Membrane) {
	t.Helper()
	w := newWorld(t)
	p := &pair{world: w, net: &network{}, d2: newDirectory()}
	p.r2 = NewRouter(RouterConfig{Self: "n2", Caller: "n2-boot1", Directory: p.d2, Peers: p.net, Deadline: 5 * time.Second})
	m := w.serve(cfg)
	p.net.join(t, "n1", w.r)
	p.routeFrom2("n1", Token{1, 1})
	return p, m
}

func (p *pair) routeFrom2(node string, tok Token) {
	r := &Route{Instance: instance, Node: node, Token: tok, Methods: NewMethods(runnertest.Description(""))}
	p.d2.set("test/counter", r)
	p.d2.set(instance, r)
}

func TestCallToAnotherNode(t *testing.T) {
	p, m := newPair(t, Config{})
	v, err := addVia(t.Context(), p.r2, 7)
	if err != nil || v != 7 {
		t.Fatal(v, err)
	}
	var h metadata.MD
	var out wrapperspb.Int64Value
	err = p.r2.Conn("test/counter", "").Invoke(t.Context(), runnertest.Get, &emptypb.Empty{}, &out, grpc.Header(&h))
	if err != nil || out.GetValue() != 7 {
		t.Fatal(&out, err)
	}
	if code, v, err := httpGet(t.Context(), p.r2.HTTP("test/counter"), http.MethodPost, "/?n=1", nil); err != nil || v != 8 {
		t.Fatal(code, v, err)
	}
	if st := m.Stats(); st.Calls != 3 || st.Errors != 0 {
		t.Fatalf("%+v", st)
	}
}

func TestStaleOwnerRefuses(t *testing.T) {
	stale := make(chan Token, 10)
	p, m := newPair(t, Config{OnStale: func(tok Token) { stale <- tok }})
	if _, err := addVia(t.Context(), p.r2, 1); err != nil {
		t.Fatal(err)
	}
	// n2 learns of epoch 2 on n1 before n1's membrane does.
	p.routeFrom2("n1", Token{1, 2})
	if _, err := addVia(within(t, 100*time.Millisecond), p.r2, 1); err == nil {
		t.Fatal("a stale owner served")
	}
	if tok := <-stale; tok != (Token{1, 2}) {
		t.Fatal(tok)
	}
	// Even callers that know nothing of it get no answers any more.
	if _, err := getVia(within(t, 50*time.Millisecond), p.r); err == nil {
		t.Fatal("a stale owner answered")
	}
	// It was ours after all, under the new token.
	if err := m.SetToken(Token{1, 2}); err != nil {
		t.Fatal(err)
	}
	if v, err := addVia(t.Context(), p.r2, 1); err != nil || v > 3 {
		t.Fatal(v, err)
	}
	// A caller with an older token has found the owner all the same.
	p.routeFrom2("n1", Token{1, 1})
	if _, err := addVia(t.Context(), p.r2, 1); err != nil {
		t.Fatal(err)
	}
	select {
	case tok := <-stale:
		t.Fatalf("told twice: %s", tok)
	default:
	}
}

func TestHeldCallsAreNotStale(t *testing.T) {
	p, m := newPair(t, Config{OnStale: func(tok Token) { panic("stale " + tok.String()) }})
	// During a swap the claim is known to callers before the gate has switched: their calls wait, they are not refused.
	if err := m.Hold("swap"); err != nil {
		t.Fatal(err)
	}
	p.routeFrom2("n1", Token{1, 2})
	done := make(chan error, 1)
	go func() { _, err := addVia(context.Background(), p.r2, 1); done <- err }()
	eventually(t, "the call is held", func() bool { return m.Stats().Held == 1 })
	if err := m.Switch(m.Backend(), Token{1, 2}); err != nil {
		t.Fatal(err)
	}
	if err := m.Release(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestLeaseLostWithholdsAnswers(t *testing.T) {
	w := newWorld(t)
	var mu sync.Mutex
	serving := true
	set := func(v bool) { mu.Lock(); serving = v; mu.Unlock() }
	m := w.serve(Config{Serving: func() bool { mu.Lock(); defer mu.Unlock(); return serving }})
	done := make(chan error, 1)
	go func() {
		_, err := addVia(with(within(t, 2*time.Second), "test-delay", "100ms"), w.r, 1)
		done <- err
	}()
	eventually(t, "the call is inside", func() bool { return m.Stats().InFlight == 1 })
	set(false)
	if err := <-done; err == nil {
		t.Fatal("answered without the lease")
	}
	set(true)
	if v, err := getVia(t.Context(), w.r); err != nil || v != 1 {
		t.Fatal(v, err)
	}
}

// The instance moves from n1 to n3 while n2 calls; n2's directory is late, the redirect is not.
func TestMoveUnderLoad(t *testing.T) {
	p, m := newPair(t, Config{})
	d3 := newDirectory()
	r3 := NewRouter(RouterConfig{Self: "n3", Caller: "n3-boot1", Directory: d3})
	p.net.join(t, "n3", r3)
	l := startLoad(t, 6, func(ctx context.Context) error { _, err := addVia(ctx, p.r2, 1); return err })
	hl := startLoad(t, 2, func(ctx context.Context) error {
		_, _, err := httpGet(ctx, p.r2.HTTP("test/counter"), http.MethodPost, "/?n=1", nil)
		return err
	})
	l.until(t, 100)
	ctx := within(t, 10*time.Second)
	if err := m.Hold("move"); err != nil {
		t.Fatal(err)
	}
	if err := m.Drain(ctx); err != nil {
		t.Fatal(err)
	}
	m3 := New(Config{Instance: instance})
	b3, err := m3.Attach(p.process(), runnertest.Description("1.0"), Token{1, 2})
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := CopyState(ctx, m.Backend(), b3, 0); err != nil {
		t.Fatal(err)
	}
	if err := m3.Start(ctx, &componentv1.StartRequest{Instance: instance}); err != nil {
		t.Fatal(err)
	}
	defer m3.unwatch()
	r3.Add(m3)
	m.Close("moved to n3", &Redirect{Token{1, 2}, "n3"})
	l.until(t, 50)
	hl.until(t, 10)
	p.routeFrom2("n3", Token{1, 2})
	l.until(t, 50)
	total := l.end(t) + hl.end(t)
	got, err := getVia(t.Context(), p.r2)
	if err != nil {
		t.Fatal(err)
	}
	mustEqual(t, "counter after the move", got, total)
}

// n1 falls silent in the middle of calls (SIGSTOP, blackhole); when the route changes they are asked at the new owner.
func TestSilentNodeIsLeft(t *testing.T) {
	p, _ := newPair(t, Config{})
	silent := shortDir(t)
	l := listen(t, filepath.Join(silent, "s"))
	defer l.Close()
	conn, err := grpc.NewClient("unix:"+filepath.Join(silent, "s"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	hung := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", filepath.Join(silent, "s"))
	}}
	p.net.mu.Lock()
	p.net.conns["n9"], p.net.http["n9"] = conn, hung
	p.net.mu.Unlock()
	p.routeFrom2("n9", Token{1, 0})
	done := make(chan error, 2)
	go func() { _, err := addVia(within(t, 5*time.Second), p.r2, 1); done <- err }()
	go func() {
		_, _, err := httpGet(within(t, 5*time.Second), p.r2.HTTP("test/counter"), http.MethodPost, "/?n=1", nil)
		done <- err
	}()
	eventually(t, "both calls are on their way", func() bool { return p.r2.Stats().Calls.Load() == 2 })
	at := time.Now()
	p.routeFrom2("n1", Token{1, 1})
	for range 2 {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	if d := time.Since(at); d > 2*time.Second {
		t.Fatalf("took %s", d)
	}
	if v, err := getVia(t.Context(), p.r2); err != nil || v != 2 {
		t.Fatal(v, err)
	}
}

func TestCallsWaitForAnOwner(t *testing.T) {
	w := newWorld(t)
	done := make(chan error, 1)
	go func() { _, err := addVia(within(t, 5*time.Second), w.r, 1); done <- err }()
	eventually(t, "the call waits", func() bool { return w.r.Stats().Waited.Load() > 0 })
	w.serve(Config{})
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	err := w.r.Conn("nobody/here", "").Invoke(t.Context(), runnertest.Get, &emptypb.Empty{}, &emptypb.Empty{})
	if status.Code(err) != codes.NotFound {
		t.Fatal(err)
	}
	err = w.r.Conn("test/late", "").Invoke(within(t, 30*time.Millisecond), runnertest.Get, &emptypb.Empty{}, &emptypb.Empty{})
	if status.Code(err) != codes.DeadlineExceeded || !strings.Contains(err.Error(), "nobody serves it") {
		t.Fatal(err)
	}
}

func TestServerStreamFindsItsOwner(t *testing.T) {
	p, _ := newPair(t, Config{})
	dir := shortDir(t)
	l := listen(t, filepath.Join(dir, "c"))
	s := NewServer(p.r2.ClientHandler())
	go s.Serve(l) //nolint:errcheck // stopped below
	defer s.Stop()
	conn, err := grpc.NewClient("unix:"+filepath.Join(dir, "c"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	// n3 knows only that n1 has it: the stream is redirected before its first message.
	d3 := newDirectory()
	d3.set(instance, &Route{Instance: instance, Node: "n1", Token: Token{1, 1}})
	p.net.join(t, "n3", NewRouter(RouterConfig{Self: "n3", Caller: "x", Directory: d3}))
	p.routeFrom2("n3", Token{1, 0})
	ctx := with(within(t, 5*time.Second), componentv1.MetaTarget, "test/counter")
	st, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, runnertest.Watch)
	if err != nil {
		t.Fatal(err)
	}
	if err := st.SendMsg(&emptypb.Empty{}); err != nil {
		t.Fatal(err)
	}
	if err := st.CloseSend(); err != nil {
		t.Fatal(err)
	}
	for i := range int64(3) {
		var v wrapperspb.Int64Value
		if err := st.RecvMsg(&v); err != nil || v.GetValue() != i {
			t.Fatal(i, err)
		}
	}
	// Unary and bidirectional calls through the same door; a missing target is the caller's mistake.
	var out wrapperspb.Int64Value
	if err := conn.Invoke(ctx, runnertest.Add, wrapperspb.Int64(2), &out); err != nil || out.GetValue() != 2 {
		t.Fatal(&out, err)
	}
	if err := conn.Invoke(within(t, time.Second), runnertest.Add, wrapperspb.Int64(2), &out); status.Code(err) != codes.InvalidArgument {
		t.Fatal(err)
	}
	echo, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, runnertest.Echo)
	if err != nil {
		t.Fatal(err)
	}
	p.routeFrom2("n1", Token{1, 1})
	for i := range int64(3) {
		if err := echo.SendMsg(wrapperspb.Int64(i)); err != nil {
			break
		}
		if err := echo.RecvMsg(&out); err != nil {
			t.Log("a bidirectional stream through a redirect is not repeated:", err)
			break
		}
	}
}
