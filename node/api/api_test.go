package api

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"connectrpc.com/connect"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

// verbs is a node with a few verbs.
type verbs struct {
	apiv1connect.UnimplementedControlHandler
	name    string
	peers   Peers
	forward string // node that owns every component
}

func (v *verbs) Nodes(context.Context, *apiv1.NodesRequest) (*apiv1.NodesResponse, error) {
	return &apiv1.NodesResponse{Nodes: []*apiv1.Node{{Name: v.name, CpuMillis: 1 << 60}}}, nil
}

func (v *verbs) Doctor(context.Context, *apiv1.DoctorRequest) (*apiv1.DoctorResponse, error) {
	panic("planted")
}

func (v *verbs) Why(context.Context, *apiv1.WhyRequest) (*apiv1.WhyResponse, error) {
	return nil, errors.New("disk\nfull")
}

func (v *verbs) Inspect(_ context.Context, r *apiv1.InspectRequest) (*apiv1.InspectResponse, error) {
	return nil, Ambiguous("inspect "+r.Component, r.Component, []string{"a/store", "b/store"})
}

func (v *verbs) Checkpoint(ctx context.Context, r *apiv1.CheckpointRequest) (*apiv1.CheckpointResponse, error) {
	if v.forward == "" {
		return &apiv1.CheckpointResponse{Component: r.Component + "@" + v.name + " for " + ForwardedFrom(ctx)}, nil
	}
	c, err := Forward(ctx, v.peers, v.forward)
	if err != nil {
		return nil, err
	}
	return c.Checkpoint(ctx, r)
}

func (v *verbs) Events(ctx context.Context, r *apiv1.EventsRequest, s *connect.ServerStream[apiv1.Event]) error {
	if v.forward != "" {
		c, err := Forward(ctx, v.peers, v.forward)
		if err != nil {
			return err
		}
		from, err := c.Events(ctx, r)
		if err != nil {
			return err
		}
		return Relay(from, s)
	}
	for range 3 {
		if err := s.Send(&apiv1.Event{Channel: r.Channel, Node: v.name}); err != nil {
			return err
		}
	}
	return Fail(connect.CodeUnavailable, "events", "the end", "coppice nodes")
}

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

const testToken = "0123456789abcdef0123456789abcdef"

func serve(t *testing.T, v *verbs) *Server {
	t.Helper()
	s, err := NewServer(Config{Control: v, Token: testToken, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// node runs a server on the socket of a new data directory and returns the directory and the address.
func node(t *testing.T, v *verbs) (data, addr string) {
	t.Helper()
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	data = t.TempDir()
	tok, err := EnsureToken(data)
	if err != nil {
		t.Fatal(err)
	}
	s, err := NewServer(Config{Control: v, Token: tok, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	ln, addr, err := Listen(data, "")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, ln, s.Handler(), quiet) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return data, addr
}

func TestSocketAndTokenArePrivate(t *testing.T) {
	data, addr := node(t, &verbs{name: "n1"})
	for file, want := range map[string]os.FileMode{"": 0o700, SocketFile: 0o600, TokenFile: 0o600} {
		st, err := os.Stat(filepath.Join(data, file))
		if err != nil {
			t.Fatal(err)
		}
		if st.Mode().Perm() != want {
			t.Errorf("%q has mode %v, want %v", file, st.Mode().Perm(), want)
		}
	}
	c, err := Dial(Target{Addr: addr})
	if err != nil {
		t.Fatal(err)
	}
	res, err := c.Nodes(t.Context(), &apiv1.NodesRequest{})
	if err != nil || res.Nodes[0].Name != "n1" {
		t.Fatal(res, err)
	}
	if _, _, err := Listen(data, ""); err == nil || !strings.Contains(err.Error(), "another process answers") {
		t.Errorf("a second node over the same socket: %v", err)
	}
}

func TestNoTokenNoAnswer(t *testing.T) {
	_, addr := node(t, &verbs{})
	for _, token := range []string{"wrong", strings.Repeat("x", 32)} {
		c, err := Dial(Target{Addr: addr, Token: token})
		if err != nil {
			t.Fatal(err)
		}
		_, err = c.Nodes(t.Context(), &apiv1.NodesRequest{})
		if p, ok := ProblemOf(err); connect.CodeOf(err) != connect.CodeUnauthenticated || !ok || p.Why == "" {
			t.Errorf("token %q: %v (%v)", token, err, p)
		}
		st, err := c.Events(t.Context(), &apiv1.EventsRequest{})
		if err == nil {
			for st.Receive() {
				t.Error("an event without a token")
			}
			err = st.Err()
		}
		if connect.CodeOf(err) != connect.CodeUnauthenticated {
			t.Errorf("stream with token %q: %v", token, err)
		}
	}
	srv := httptest.NewServer(serve(t, &verbs{}).Handler())
	defer srv.Close()
	res, err := http.Get(srv.URL + "/anything")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusUnauthorized {
		t.Errorf("plain GET: %s", res.Status)
	}
}

func TestErrorsCarryAProblem(t *testing.T) {
	_, addr := node(t, &verbs{})
	c, err := Dial(Target{Addr: addr})
	if err != nil {
		t.Fatal(err)
	}
	ctx := t.Context()
	_, panicked := c.Doctor(ctx, &apiv1.DoctorRequest{})
	_, plain := c.Why(ctx, &apiv1.WhyRequest{})
	_, missing := c.Apps(ctx, &apiv1.AppsRequest{})
	_, ambiguous := c.Inspect(ctx, &apiv1.InspectRequest{Component: "store"})
	for _, x := range []struct {
		err  error
		code connect.Code
		line string
	}{
		{panicked, connect.CodeInternal, "doctor: a fault in this node, its log has the details"},
		{plain, connect.CodeInternal, "why: disk full"},
		{missing, connect.CodeUnimplemented, "apps: this node's version has no such command"},
		{ambiguous, connect.CodeInvalidArgument, `inspect store: "store" names several: a/store, b/store`},
	} {
		p, ok := ProblemOf(x.err)
		if !ok || connect.CodeOf(x.err) != x.code || p.What+": "+p.Why != x.line {
			t.Errorf("got %v with %v, want %v %q", x.err, p, x.code, x.line)
		}
	}
	if _, err := c.Nodes(ctx, &apiv1.NodesRequest{}); err != nil {
		t.Errorf("after a panic: %v", err)
	}
}

// net joins nodes by their peer doors.
type mesh map[string]*Server

func (m mesh) Transport(node string) http.RoundTripper { return meshTransport{m, node} }

type meshTransport struct {
	mesh mesh
	node string
}

func (t meshTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	s, ok := t.mesh[t.node]
	if !ok {
		return nil, errors.New("no route to " + t.node)
	}
	rec := httptest.NewRecorder()
	s.PeerHandler("n1").ServeHTTP(rec, r)
	return rec.Result(), nil
}

func TestForwardReachesTheOwner(t *testing.T) {
	m := mesh{}
	m["n2"] = serve(t, &verbs{name: "n2"})
	_, addr := node(t, &verbs{name: "n1", peers: m, forward: "n2"})
	c, err := Dial(Target{Addr: addr})
	if err != nil {
		t.Fatal(err)
	}
	res, err := c.Checkpoint(t.Context(), &apiv1.CheckpointRequest{Component: "shop/store"})
	if err != nil || res.Component != "shop/store@n2 for n1" {
		t.Errorf("got %v, %v", res, err)
	}
	st, err := c.Events(t.Context(), &apiv1.EventsRequest{Channel: "/x"})
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for st.Receive() {
		n++
	}
	if p, ok := ProblemOf(st.Err()); n != 3 || !ok || p.Why != "the end" {
		t.Errorf("relayed %d events, then %v", n, st.Err())
	}
}

func TestForwardDoesNotGoRound(t *testing.T) {
	m := mesh{}
	m["n1"] = serve(t, &verbs{name: "n1", peers: m, forward: "n2"})
	m["n2"] = serve(t, &verbs{name: "n2", peers: m, forward: "n1"})
	_, addr := node(t, &verbs{name: "n1", peers: m, forward: "n2"})
	c, err := Dial(Target{Addr: addr})
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Checkpoint(t.Context(), &apiv1.CheckpointRequest{})
	if p, ok := ProblemOf(err); connect.CodeOf(err) != connect.CodeUnavailable || !ok || !strings.Contains(p.Why, "disagree") {
		t.Errorf("got %v", err)
	}
}

func TestDeadlineTravels(t *testing.T) {
	v := &slow{}
	s, err := NewServer(Config{Control: v, Token: testToken, Log: quiet})
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(s.Handler())
	defer srv.Close()
	c, err := Dial(Target{Addr: srv.URL, Token: testToken})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := c.Status(ctx, &apiv1.StatusRequest{}); err != nil {
		t.Fatal(err)
	}
	if v.left > time.Minute || v.left < 50*time.Second {
		t.Errorf("the verb had %v", v.left)
	}
	if _, err := c.Status(t.Context(), &apiv1.StatusRequest{}); err != nil {
		t.Fatal(err)
	}
	if v.left > MaxUnary || v.left < MaxUnary-10*time.Second {
		t.Errorf("without a deadline the verb had %v", v.left)
	}
}

type slow struct {
	apiv1connect.UnimplementedControlHandler
	left time.Duration
}

func (s *slow) Status(ctx context.Context, _ *apiv1.StatusRequest) (*apiv1.StatusResponse, error) {
	d, _ := ctx.Deadline()
	s.left = time.Until(d)
	return &apiv1.StatusResponse{}, nil
}

func TestCurlGetsTheShapesOfTheCommandLine(t *testing.T) {
	srv := httptest.NewServer(serve(t, &verbs{name: "n1"}).Handler())
	defer srv.Close()
	for _, prefix := range []string{"", "/api"} {
		req, err := http.NewRequest(http.MethodPost, srv.URL+prefix+apiv1connect.ControlNodesProcedure, strings.NewReader("{}"))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/json")
		req.Header.Set("Authorization", "Bearer "+testToken)
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(res.Body)
		if err != nil || res.StatusCode != 200 || !strings.Contains(string(body), `"cpu_millis":1152921504606846976`) {
			t.Errorf("%s: %s %s %v", prefix, res.Status, body, err)
		}
		res.Body.Close()
	}
}

func TestDialRefusesWhatWouldLeakTheToken(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	for _, addr := range []string{"http://10.0.0.1:80", "http://example.com", "ftp://x", "n1:7400", "", "unix:///nowhere/api.sock"} {
		if _, err := Dial(Target{Addr: addr}); err == nil {
			t.Errorf("%q was accepted", addr)
		}
	}
	for _, addr := range []string{"http://127.0.0.1:80", "http://[::1]:80", "http://localhost:1", "https://example.com"} {
		if _, err := Dial(Target{Addr: addr, Token: "t"}); err != nil {
			t.Errorf("%q: %v", addr, err)
		}
	}
}

func TestTokenFileOthersCanReadIsRefused(t *testing.T) {
	dir := t.TempDir()
	tok, err := EnsureToken(dir)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := EnsureToken(dir); err != nil || again != tok {
		t.Errorf("the second start has another token: %v", err)
	}
	path := filepath.Join(dir, TokenFile)
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := EnsureToken(dir); err == nil {
		t.Error("a token that others can read was accepted")
	}
	if err := os.WriteFile(path, []byte("short\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := EnsureToken(dir); err == nil {
		t.Error("a short token was accepted")
	}
}

func TestLongDataDirectory(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	data := filepath.Join(t.TempDir(), strings.Repeat("long", 30))
	ln, addr, err := Listen(data, "")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	tok, err := EnsureToken(data)
	if err != nil {
		t.Fatal(err)
	}
	unregister, err := Register(Entry{Name: "n1", API: addr, Data: data})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unregister(); err != nil {
			t.Error(err)
		}
	}()
	if got, ok := registeredToken(addr); !ok || got != tok {
		t.Errorf("the token of a node whose socket lies elsewhere was not found")
	}
}
