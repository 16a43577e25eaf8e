package membrane

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coppice-project/coppice/components/runner"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	counterv1 "github.com/coppice-project/coppice/plugins/counter/v1"
)

// counterBinary builds the shipped counter, which is made with the SDK, once for all tests.
var counterBinary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("/tmp", "cmc") // removed by TestMain
	if err != nil {
		return "", err
	}
	built = dir
	path := filepath.Join(dir, "counter")
	if out, err := exec.Command("go", "build", "-o", path, "../plugins/counter").CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the counter: %w: %s", err, out)
	}
	return path, nil
})

// built is the folder of the binary, once there is one.
var built string

// sdkWorld runs the real counter, with a node socket and every journal entry saved.
type sdkWorld struct {
	*world
	path   string
	desc   *componentv1.Description
	m      *Membrane
	socket *NodeSocket
	ended  chan runner.ExitStatus

	mu    sync.Mutex
	saved []*componentv1.StateFrame // base and deltas of what is committed
}

func newSDKWorld(t *testing.T, ttl time.Duration) *sdkWorld {
	t.Helper()
	path, err := counterBinary()
	if err != nil {
		t.Fatal(err)
	}
	w := &sdkWorld{world: newWorld(t), path: path, ended: make(chan runner.ExitStatus, 10)}
	if w.desc, err = runner.Describe(t.Context(), runner.ExecFile{Path: w.path}, runner.Limits{}); err != nil {
		t.Fatal(err)
	}
	w.m = New(Config{Instance: instance, OnEnd: func(_ *Backend, e runner.ExitStatus) { w.ended <- e }})
	w.m.SetDurable(true)
	if w.socket, err = w.r.ServeNode(w.m, NodeSocketConfig{Path: filepath.Join(w.dir, "n"), LeaseTTL: ttl}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.m.unwatch(); w.socket.Close() })
	w.r.Add(w.m)
	w.dirs.set("test/counter", &Route{Instance: instance, Node: "n1", Token: Token{1, 1}, Methods: NewMethods(w.desc)})
	return w
}

func (w *sdkWorld) launch() *Backend {
	w.t.Helper()
	p, err := w.run.Start(w.t.Context(), runner.Spec{
		Instance: instance, Exec: runner.ExecFile{Path: w.path}, NodeSocket: filepath.Join(w.dir, "n"),
		RunDir: filepath.Join(w.dir, "r"), LogDir: filepath.Join(w.dir, "l"), DataDir: filepath.Join(w.dir, "d"),
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { p.Kill(); <-p.Done() })
	w.socket.Allow(p.Ident().Credential)
	return w.m.Prepare(p, w.desc)
}

// restore gives a process what is committed.
func (w *sdkWorld) restore(b *Backend) {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.saved) == 0 {
		return
	}
	sw, err := b.Restore(within(w.t, 5*time.Second))
	if err != nil {
		w.t.Fatal(err)
	}
	for _, f := range w.saved {
		if err := sw.Send(f); err != nil {
			break
		}
	}
	reply, err := sw.Finish()
	if err != nil {
		w.t.Fatal(err)
	}
	b.SetCommitted(reply.GetMark())
}

// serve puts a prepared process behind the gate.
func (w *sdkWorld) serve(b *Backend, t Token, restored bool) {
	w.t.Helper()
	req := &componentv1.StartRequest{Instance: instance, Token: t.Proto(), Version: w.desc.GetVersion(), Restored: restored}
	if err := w.m.StartBackend(within(w.t, 5*time.Second), b, req); err != nil {
		w.t.Fatal(err)
	}
	go w.save(b)
	if err := w.m.Hold("switch"); err != nil {
		w.t.Fatal(err)
	}
	if err := w.m.Switch(b, t); err != nil {
		w.t.Fatal(err)
	}
	if err := w.m.Release(); err != nil {
		w.t.Fatal(err)
	}
}

// save commits journal entries as they come: a frame belongs to the committed state when its entry is whole.
func (w *sdkWorld) save(b *Backend) {
	r, err := b.Deltas(context.Background(), &componentv1.CheckpointFrom{SinceMark: b.Committed()})
	if err != nil {
		w.t.Error(err)
		return
	}
	var entry []*componentv1.StateFrame
	for {
		f, err := r.NextState()
		if err != nil {
			return
		}
		if entry = append(entry, f); !f.GetLast() {
			continue
		}
		var mark uint64
		for _, f := range entry {
			mark = max(mark, f.GetMark())
		}
		w.mu.Lock()
		w.saved = append(w.saved, entry...)
		w.mu.Unlock()
		entry = nil
		b.SetCommitted(mark)
	}
}

func (w *sdkWorld) add(ctx context.Context) error {
	_, err := counterv1.NewCounterClient(w.r.Conn("test/counter", "")).Add(ctx, &counterv1.AddRequest{N: 1})
	return err
}

// swap replaces the serving process with its state.
func (w *sdkWorld) swap(to Token) *Backend {
	w.t.Helper()
	ctx := within(w.t, 10*time.Second)
	must := func(err error) {
		w.t.Helper()
		if err != nil {
			w.t.Fatal(err)
		}
	}
	old, next := w.m.Backend(), w.launch()
	_, mark, err := CopyState(ctx, old, next, 0)
	must(err)
	at := time.Now()
	must(w.m.Hold("swap"))
	must(w.m.Drain(ctx))
	must(old.Quiesce(ctx, componentv1.QuiesceRequest_SWAP))
	_, mark, err = CopyState(ctx, old, next, mark)
	must(err)
	next.SetCommitted(mark) // drained: everything the old one did is committed
	w.serve(next, to, true)
	w.t.Logf("swap: paused %s", time.Since(at))
	must(w.m.Retire(ctx, old, time.Second, 0))
	return next
}

// crash kills the serving process and starts another from what is committed.
func (w *sdkWorld) crash(b *Backend, to Token) {
	w.t.Helper()
	at := time.Now()
	if err := unix.Kill(b.Process().Ident().Pid, unix.SIGKILL); err != nil {
		w.t.Fatal(err)
	}
	<-w.ended
	b.marks.discard()
	again := w.launch()
	w.restore(again)
	w.serve(again, to, true)
	w.t.Logf("crash: serving again after %s", time.Since(at))
}

// The real SDK under load, over swaps and crashes: no call fails, none counts twice.
func TestCounterOverSwapsAndCrashes(t *testing.T) {
	w := newSDKWorld(t, 2*time.Second)
	b := w.launch()
	w.restore(b)
	w.serve(b, Token{1, 1}, false)
	l := startLoad(t, 6, w.add)
	handler := w.r.HTTP("test/counter")
	hl := startLoad(t, 2, func(ctx context.Context) error {
		rec := &recorder{header: http.Header{}}
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://x/?n=1", nil)
		if err != nil {
			return err
		}
		handler.ServeHTTP(rec, req)
		if rec.code != http.StatusOK {
			return fmt.Errorf("status %d: %s", rec.code, rec.body)
		}
		return nil
	})
	for i := range uint64(3) {
		l.until(t, 100)
		next := w.swap(Token{1, 2 * (i + 1)})
		l.until(t, 100)
		w.crash(next, Token{1, 2*(i+1) + 1})
	}
	l.until(t, 100)
	total := l.end(t) + hl.end(t)
	v, err := counterv1.NewCounterClient(w.r.Conn("test/counter", "")).Get(within(t, 5*time.Second), &counterv1.GetRequest{})
	if err != nil {
		t.Fatal(err)
	}
	mustEqual(t, "counter", v.GetValue(), total)
	if code, _, err := httpGet(t.Context(), w.r.HTTP("test/counter"), http.MethodGet, "/", nil); code != http.StatusOK {
		t.Fatal(code, err)
	}
}

// A component ends itself when the node stops granting its lease.
func TestCounterEndsWithoutLease(t *testing.T) {
	w := newSDKWorld(t, 300*time.Millisecond)
	b := w.launch()
	w.serve(b, Token{1, 1}, false)
	select {
	case e := <-w.ended:
		t.Fatalf("it ended though its lease was granted: %s", e)
	case <-time.After(900 * time.Millisecond):
	}
	w.socket.Withhold(true)
	select {
	case e := <-w.ended:
		if e.Code != componentv1.ExitLeaseLapsed {
			t.Fatal(e)
		}
	case <-time.After(5 * time.Second):
		t.Fatal("it lives on without a lease")
	}
}
