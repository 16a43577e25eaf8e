package membrane

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
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
		_, err := addVia(with(within(t, 400*time.Millisecond), "test-delay", "100ms"), w.r, 1)
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
	p, m := newPair(t, Config{})
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
	time.Sleep(20 * time.Millisecond)
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
	_ = m
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

	lease, err := node.Lease(ctx)
	if err != nil {
		t.Fatal(err)
	}
	grant := func() (*componentv1.LeaseGrant, error) {
		if err := lease.Send(&componentv1.LeaseBeat{}); err != nil {
			return nil, err
		}
		return lease.Recv()
	}
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
	if fmt.Sprint(published) != "["+instance+" good]" {
		t.Fatal(published)
	}

	// A binding: the component's own stub on this socket reaches the target.
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

func TestHTTP(t *testing.T) {
	p, m := newPair(t, Config{})
	for name, h := range map[string]http.Handler{"local": p.r.HTTP("test/counter"), "remote": p.r2.HTTP("test/counter")} {
		t.Run(name, func(t *testing.T) {
			srv := httptest.NewServer(h)
			defer srv.Close()
			before := m.Stats()
			// The same key twice is one effect.
			post := func() string {
				req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, srv.URL+"/?n=5", strings.NewReader("body"))
				if err != nil {
					t.Fatal(err)
				}
				req.Header.Set("Idempotency-Key", "once-"+name)
				resp, err := http.DefaultClient.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				b, err := io.ReadAll(resp.Body)
				if err != nil || resp.StatusCode != 200 || resp.Header.Get("X-Version") != "1.0" {
					t.Fatal(resp.Status, string(b), err)
				}
				for k := range resp.Header {
					if strings.HasPrefix(k, "X-Coppice") {
						t.Errorf("%s leaked", k)
					}
				}
				return string(b)
			}
			if a, b := post(), post(); a != b {
				t.Fatalf("one key, two effects: %s and %s", a, b)
			}
			// Server-sent events come one by one.
			resp, err := http.Get(srv.URL + "/events")
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || strings.Count(string(b), "data:") != 3 {
				t.Fatal(string(b), err)
			}
			upgradeThrough(t, srv.Listener.Addr().String())
			eventually(t, "nothing is left inside", func() bool { s := m.Stats(); return s.InFlight == 0 && s.Streams == 0 })
			if after := m.Stats(); after.Calls != before.Calls+4 {
				t.Errorf("calls: %d, want %d", after.Calls, before.Calls+4)
			}
		})
	}
}

func upgradeThrough(t *testing.T, addr string) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET /upgrade HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	br := bufio.NewReader(conn)
	resp, err := http.ReadResponse(br, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatal(resp, err)
	}
	fmt.Fprint(conn, "hello")
	buf := make([]byte, 5)
	if _, err := io.ReadFull(br, buf); err != nil || string(buf) != "hello" {
		t.Fatal(string(buf), err)
	}
}

// Garbage on any socket is dropped, and the next caller is served.
func TestGarbageOnSockets(t *testing.T) {
	p, _ := newPair(t, Config{})
	s, err := p.r.ServeNode(p.r.Local(instance), NodeSocketConfig{Path: filepath.Join(p.dir, "n")})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, path := range []string{filepath.Join(p.dir, "n"), p.r.Local(instance).Backend().Process().Ident().Socket} {
		for _, junk := range []string{"\x00\xff\xfe", "GET / HTTP/1.1\r\n\r\n", strings.Repeat("A", 1<<16), "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff"} {
			conn, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			conn.Write([]byte(junk)) //nolint:errcheck // it may hang up at once
			conn.Close()
		}
	}
	if _, err := addVia(within(t, 5*time.Second), p.r2, 1); err != nil {
		t.Fatal(err)
	}
	for _, tok := range []string{"x", "1", "1.x", "-1.2"} {
		ctx := with(within(t, time.Second), componentv1.MetaTarget, instance, componentv1.MetaToken, tok)
		conn, err := p.net.Conn(ctx, "n1")
		if err != nil {
			t.Fatal(err)
		}
		if err := conn.Invoke(ctx, runnertest.Get, &emptypb.Empty{}, &wrapperspb.Int64Value{}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("token %q: %v", tok, err)
		}
	}
}
