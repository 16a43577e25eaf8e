package membrane

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/coppice-project/coppice/components/runner"
	"github.com/coppice-project/coppice/components/runner/runnertest"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

func TestMain(m *testing.M) {
	runnertest.Main()
	code := m.Run()
	if built != "" {
		os.RemoveAll(built)
	}
	os.Exit(code)
}

const instance = "test/counter-0"

// directory is what the node knows of routes, changed by the tests.
type directory struct {
	mu      sync.Mutex
	routes  map[string]Route
	changed chan struct{}
}

func newDirectory() *directory {
	return &directory{routes: map[string]Route{}, changed: make(chan struct{})}
}

func (d *directory) set(target string, r *Route) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if r == nil {
		delete(d.routes, target)
	} else {
		d.routes[target] = *r
	}
	close(d.changed)
	d.changed = make(chan struct{})
}

func (d *directory) Resolve(target, _ string) (Route, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if r, ok := d.routes[target]; ok {
		return r, nil
	}
	if target == "nobody/here" {
		return Route{}, ErrUnknownTarget
	}
	return Route{}, ErrNoOwner
}

func (d *directory) Changed(string) <-chan struct{} {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.changed
}

// network connects the routers of a test by unix sockets. A node that is cut off accepts and answers nothing.
type network struct {
	mu    sync.Mutex
	conns map[string]*grpc.ClientConn
	http  map[string]http.RoundTripper
}

func (n *network) Conn(_ context.Context, node string) (grpc.ClientConnInterface, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if c := n.conns[node]; c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("no route to %s", node)
}

func (n *network) HTTP(_ context.Context, node string) (http.RoundTripper, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if rt := n.http[node]; rt != nil {
		return rt, nil
	}
	return nil, fmt.Errorf("no route to %s", node)
}

// join serves a router's inbound gates to the others.
func (n *network) join(t *testing.T, node string, r *Router) {
	t.Helper()
	dir := shortDir(t)
	l := listen(t, filepath.Join(dir, "g"))
	s := NewServer(r.PeerHandler())
	go s.Serve(l) //nolint:errcheck // stopped below
	t.Cleanup(s.Stop)
	conn, err := grpc.NewClient("unix:"+filepath.Join(dir, "g"), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	hl := listen(t, filepath.Join(dir, "h"))
	hs := &http.Server{Handler: r.PeerHTTP()}
	go hs.Serve(hl) //nolint:errcheck // stopped below
	t.Cleanup(func() { hs.Close() })
	rt := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", filepath.Join(dir, "h"))
	}}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.conns == nil {
		n.conns, n.http = map[string]*grpc.ClientConn{}, map[string]http.RoundTripper{}
	}
	n.conns[node], n.http[node] = conn, rt
}

func listen(t *testing.T, path string) net.Listener {
	t.Helper()
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func listenIn(dir string) (net.Listener, error) { return net.Listen("unix", filepath.Join(dir, "s")) }

func shortDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "cmt")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// world is one node with a runner, a router and a directory.
type world struct {
	t    *testing.T
	dir  string
	run  *runner.Local
	dirs *directory
	r    *Router
}

func newWorld(t *testing.T) *world {
	t.Helper()
	run, err := runner.New(runner.Config{})
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, dir: shortDir(t), run: run, dirs: newDirectory()}
	w.r = NewRouter(RouterConfig{Self: "n1", Caller: "n1-boot1", Directory: w.dirs})
	return w
}

// process starts a component process.
func (w *world) process(env ...string) runner.Process {
	w.t.Helper()
	p, err := w.run.Start(w.t.Context(), runner.Spec{
		Instance: instance, Exec: runner.ExecFile{Path: "/proc/self/exe"}, Env: append([]string{runnertest.EnvQuickExit}, env...),
		RunDir: filepath.Join(w.dir, "r"), LogDir: filepath.Join(w.dir, "l"), DataDir: filepath.Join(w.dir, "d"),
		NodeSocket: filepath.Join(w.dir, "n"),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		if err := p.Kill(); err != nil {
			w.t.Error(err)
		}
		<-p.Done()
	})
	return p
}

// serve returns a started membrane, routed as test/counter on this node.
func (w *world) serve(cfg Config, env ...string) *Membrane {
	w.t.Helper()
	cfg.Instance = instance
	m := New(cfg)
	if _, err := m.Attach(w.process(env...), runnertest.Description("1.0"), Token{1, 1}); err != nil {
		w.t.Fatal(err)
	}
	if err := m.Start(w.t.Context(), &componentv1.StartRequest{Instance: instance, Version: "1.0"}); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(m.unwatch)
	w.r.Add(m)
	w.route("n1", Token{1, 1})
	return m
}

func (w *world) route(node string, tok Token) {
	r := &Route{Instance: instance, Node: node, Token: tok, Methods: NewMethods(runnertest.Description(""))}
	w.dirs.set("test/counter", r)
	w.dirs.set(instance, r)
}

func addVia(ctx context.Context, r *Router, n int64) (int64, error) {
	var out wrapperspb.Int64Value
	err := r.Conn("test/counter", "").Invoke(ctx, runnertest.Add, wrapperspb.Int64(n), &out)
	return out.GetValue(), err
}

func getVia(ctx context.Context, r *Router) (int64, error) {
	var out wrapperspb.Int64Value
	err := r.Conn("test/counter", "").Invoke(ctx, runnertest.Get, &emptypb.Empty{}, &out)
	return out.GetValue(), err
}

func with(ctx context.Context, kv ...string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, kv...)
}

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// load calls Add with 1 from many callers until it is stopped, and keeps the ledger.
type load struct {
	stop   chan struct{}
	wg     sync.WaitGroup
	ok     atomic.Int64
	failed atomic.Int64
	last   atomic.Value
	worst  atomic.Int64
}

func startLoad(t *testing.T, callers int, call func(ctx context.Context) error) *load {
	t.Helper()
	l := &load{stop: make(chan struct{})}
	for range callers {
		l.wg.Go(func() {
			for {
				select {
				case <-l.stop:
					return
				default:
				}
				ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
				began := time.Now()
				err := call(ctx)
				cancel()
				if d := time.Since(began); d > time.Duration(l.worst.Load()) {
					l.worst.Store(int64(d))
				}
				if err != nil {
					l.failed.Add(1)
					l.last.Store(err.Error())
					continue
				}
				l.ok.Add(1)
			}
		})
	}
	return l
}

// until waits for n more answered calls.
func (l *load) until(t *testing.T, n int64) {
	t.Helper()
	want := l.ok.Load() + n
	for limit := time.Now().Add(15 * time.Second); l.ok.Load() < want; time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatalf("only %d calls were answered, want %d; failed %d: %v", l.ok.Load(), want, l.failed.Load(), l.last.Load())
		}
	}
}

func (l *load) end(t *testing.T) int64 {
	t.Helper()
	close(l.stop)
	l.wg.Wait()
	t.Logf("%d calls answered, %d failed, worst %s", l.ok.Load(), l.failed.Load(), time.Duration(l.worst.Load()).Round(time.Microsecond))
	if l.failed.Load() > 0 {
		t.Errorf("%d calls failed: %v", l.failed.Load(), l.last.Load())
	}
	return l.ok.Load()
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for limit := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(limit) {
			t.Fatal("waited in vain for: " + what)
		}
	}
}

func mustEqual(t *testing.T, what string, got, want int64) {
	t.Helper()
	if got != want {
		t.Fatalf("%s: got %d, want %d", what, got, want)
	}
}

func httpGet(ctx context.Context, h http.Handler, method, path string, header http.Header) (int, int64, error) {
	w := &recorder{header: http.Header{}}
	req, err := http.NewRequestWithContext(ctx, method, "http://shop.localhost"+path, nil)
	if err != nil {
		return 0, 0, err
	}
	for k, v := range header {
		req.Header[k] = v
	}
	h.ServeHTTP(w, req)
	if w.code != http.StatusOK {
		return w.code, 0, errors.New(string(w.body))
	}
	if w.header.Get(componentv1.HeaderMark) != "" {
		return w.code, 0, errors.New("the mark leaked")
	}
	v, err := strconv.ParseInt(string(w.body), 10, 64)
	return w.code, v, err
}

type recorder struct {
	header http.Header
	code   int
	body   []byte
}

func (r *recorder) Header() http.Header { return r.header }
func (r *recorder) WriteHeader(c int)   { r.code = c }
func (r *recorder) Flush()              {}
func (r *recorder) Write(b []byte) (int, error) {
	if r.code == 0 {
		r.code = 200
	}
	r.body = append(r.body, b...)
	return len(b), nil
}
