package membrane

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/coppice-project/coppice/components/runner"
	"github.com/coppice-project/coppice/components/runner/runnertest"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// replace is what the supervisor does for a hot swap.
func replace(t *testing.T, w *world, m *Membrane, to Token, version string) (pause time.Duration) {
	t.Helper()
	ctx := within(t, 20*time.Second)
	old := m.Backend()
	next := m.Prepare(w.process(runnertest.EnvVersion+"="+version), runnertest.Description(version))
	_, mark, err := CopyState(ctx, old, next, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Hold("swap"); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	if err := m.Drain(ctx); err != nil {
		t.Fatal(err)
	}
	if err := old.Quiesce(ctx, componentv1.QuiesceRequest_SWAP); err != nil {
		t.Fatal(err)
	}
	_, mark, err = CopyState(ctx, old, next, mark)
	if err != nil {
		t.Fatal(err)
	}
	next.SetCommitted(mark)
	if err := m.StartBackend(ctx, next, &componentv1.StartRequest{Instance: instance, Version: version, Restored: true}); err != nil {
		t.Fatal(err)
	}
	if err := m.Switch(next, to); err != nil {
		t.Fatal(err)
	}
	if err := m.Release(); err != nil {
		t.Fatal(err)
	}
	pause = time.Since(began)
	if err := m.Retire(ctx, old, time.Second, 0); err != nil {
		t.Fatal(err)
	}
	return pause
}

func TestSwapUnderLoad(t *testing.T) {
	w := newWorld(t)
	m := w.serve(Config{OnEnd: func(b *Backend, e runner.ExitStatus) { t.Errorf("end of a replaced process was reported: %s", e) }})
	defer m.unwatch()
	grpcLoad := startLoad(t, 8, func(ctx context.Context) error { _, err := addVia(ctx, w.r, 1); return err })
	handler := w.r.HTTP("test/counter")
	httpLoad := startLoad(t, 4, func(ctx context.Context) error {
		_, _, err := httpGet(ctx, handler, http.MethodPost, "/?n=1", nil)
		return err
	})
	for i := range uint64(5) {
		grpcLoad.until(t, 100)
		httpLoad.until(t, 20)
		t.Logf("pause %s", replace(t, w, m, Token{1, i + 2}, "1.1"))
	}
	total := grpcLoad.end(t) + httpLoad.end(t)
	got, err := getVia(t.Context(), w.r)
	if err != nil {
		t.Fatal(err)
	}
	mustEqual(t, "counter after the swaps", got, total)
	if m.Token() != (Token{1, 6}) {
		t.Fatalf("token %s", m.Token())
	}
}

func TestFreezeHoldsAndThawReleases(t *testing.T) {
	w := newWorld(t)
	m := w.serve(Config{})
	l := startLoad(t, 4, func(ctx context.Context) error { _, err := addVia(ctx, w.r, 1); return err })
	l.until(t, 50)
	if err := m.Freeze(within(t, 5*time.Second), componentv1.QuiesceRequest_FREEZE); err != nil {
		t.Fatal(err)
	}
	eventually(t, "all callers held", func() bool { return m.Stats().Held == 4 })
	if s, why := m.State(); s != Frozen || why == "" {
		t.Fatal(s, why)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Millisecond)
	defer cancel()
	if _, err := addVia(ctx, w.r, 1); status.Code(err) != codes.DeadlineExceeded {
		t.Fatalf("held call with a short deadline: %v", err)
	}
	if err := m.Freeze(t.Context(), componentv1.QuiesceRequest_FREEZE); err != nil {
		t.Fatalf("again: %v", err)
	}
	if err := m.Thaw(within(t, 5*time.Second)); err != nil {
		t.Fatal(err)
	}
	l.until(t, 50)
	total := l.end(t)
	got, err := getVia(t.Context(), w.r)
	if err != nil {
		t.Fatal(err)
	}
	mustEqual(t, "counter", got, total)
}

func TestDrainDeadlineGoesBack(t *testing.T) {
	w := newWorld(t)
	m := w.serve(Config{})
	done := make(chan error, 1)
	go func() {
		_, err := addVia(with(context.Background(), "test-delay", "300ms"), w.r, 1)
		done <- err
	}()
	eventually(t, "the slow call is inside", func() bool { return m.Stats().InFlight == 1 })
	err := m.Freeze(within(t, 50*time.Millisecond), componentv1.QuiesceRequest_SWAP)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	if s, _ := m.State(); s != Running {
		t.Fatal(s)
	}
	if _, err := addVia(t.Context(), w.r, 1); err != nil {
		t.Fatalf("after the failed freeze: %v", err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// ledger is the committed state, as holders would have it.
type ledger struct {
	mu    sync.Mutex
	frame *componentv1.StateFrame
}

func (l *ledger) last() *componentv1.StateFrame {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.frame
}

// follow commits what the process's journal tells, until it ends.
func (l *ledger) follow(t *testing.T, b *Backend) {
	r, err := b.Deltas(context.Background(), &componentv1.CheckpointFrom{SinceMark: b.Committed()})
	if err != nil {
		t.Error(err)
		return
	}
	for {
		f, err := r.NextState()
		if err != nil {
			return
		}
		l.mu.Lock()
		l.frame = f
		l.mu.Unlock()
		b.SetCommitted(f.GetMark())
	}
}

// The process is killed under load, again and again: every answered call counts once, no call fails.
func TestCrashUnderLoad(t *testing.T) {
	w := newWorld(t)
	ended := make(chan *Backend, 10)
	m := w.serve(Config{OnEnd: func(b *Backend, _ runner.ExitStatus) { ended <- b }})
	m.SetDurable(true)

	var saved ledger
	go saved.follow(t, m.Backend())
	l := startLoad(t, 8, func(ctx context.Context) error { _, err := addVia(ctx, w.r, 1); return err })
	reads := startLoad(t, 2, func(ctx context.Context) error { _, err := getVia(ctx, w.r); return err })
	for range 4 {
		l.until(t, 100)
		at := time.Now()
		if err := unix.Kill(m.Backend().Process().Ident().Pid, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		<-ended
		if s, _ := m.State(); s != Failed {
			t.Fatal(s)
		}
		m.Backend().marks.discard() // the outstanding commit is settled; nothing more of that process becomes durable
		b, err := m.Attach(w.process(), runnertest.Description("1.0"), Token{1, 1})
		if err != nil {
			t.Fatal(err)
		}
		sw, err := b.Restore(within(t, 5*time.Second))
		if err != nil {
			t.Fatal(err)
		}
		if err := sw.Send(saved.last()); err != nil {
			t.Fatal(err)
		}
		reply, err := sw.Finish()
		if err != nil {
			t.Fatal(err)
		}
		b.SetCommitted(reply.GetMark())
		go saved.follow(t, b)
		if err := m.Start(within(t, 5*time.Second), &componentv1.StartRequest{Instance: instance, Restored: true}); err != nil {
			t.Fatal(err)
		}
		t.Logf("serving again after %s", time.Since(at))
	}
	l.until(t, 100)
	total := l.end(t)
	reads.end(t)
	got, err := getVia(t.Context(), w.r)
	if err != nil {
		t.Fatal(err)
	}
	mustEqual(t, "counter after the crashes", got, total)
}

// Without keys and without idempotency a call in doubt is not repeated.
func TestCallInDoubtIsNotRepeated(t *testing.T) {
	w := newWorld(t)
	desc := runnertest.Description("1.0")
	desc.Features = nil
	m := New(Config{Instance: instance})
	if _, err := m.Attach(w.process(), desc, Token{1, 1}); err != nil {
		t.Fatal(err)
	}
	if err := m.Start(t.Context(), &componentv1.StartRequest{Instance: instance}); err != nil {
		t.Fatal(err)
	}
	defer m.unwatch()
	w.r.Add(m)
	w.dirs.set("test/counter", &Route{Instance: instance, Node: "n1", Token: Token{1, 1}})
	_, err := addVia(with(within(t, 5*time.Second), "test-crash", "before"), w.r, 1)
	if status.Code(err) != codes.Unavailable {
		t.Fatalf("got %v", err)
	}
}

func TestMarkWait(t *testing.T) {
	w := newWorld(t)
	m := w.serve(Config{})
	m.SetDurable(true)
	done := make(chan error, 1)
	go func() {
		_, err := addVia(context.Background(), w.r, 1)
		done <- err
	}()
	eventually(t, "the answer waits", func() bool { return m.Stats().Waiting == 1 })
	// A read observed the uncommitted mark: it waits as well, and may give up.
	if _, err := getVia(within(t, 30*time.Millisecond), w.r); status.Code(err) != codes.DeadlineExceeded {
		t.Fatalf("a read of uncommitted state: %v", err)
	}
	select {
	case err := <-done:
		t.Fatalf("answered before it was committed: %v", err)
	default:
	}
	m.SetCommitted(1)
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if v, err := getVia(within(t, 5*time.Second), w.r); err != nil || v != 1 {
		t.Fatal(v, err)
	}
	// Fenced while it waits: the answer is never given; the caller learns that nobody serves it.
	go func() {
		_, err := addVia(within(t, 300*time.Millisecond), w.r, 1)
		done <- err
	}()
	eventually(t, "the answer waits", func() bool { return m.Stats().Waiting == 1 })
	m.Close("the epoch is over", nil)
	m.SetCommitted(2)
	if err := <-done; err == nil {
		t.Fatal("an answer of a fenced epoch was given")
	}
}

func TestMarksOfAnotherProcessDoNotCount(t *testing.T) {
	w := newWorld(t)
	m := w.serve(Config{})
	m.SetDurable(true)
	old := m.Backend()
	old.SetCommitted(1000)
	if err := m.Hold("swap"); err != nil {
		t.Fatal(err)
	}
	next := m.Prepare(w.process(), runnertest.Description("1.0"))
	if err := m.StartBackend(t.Context(), next, &componentv1.StartRequest{Instance: instance}); err != nil {
		t.Fatal(err)
	}
	if err := m.Switch(next, Token{1, 2}); err != nil {
		t.Fatal(err)
	}
	if err := m.Release(); err != nil {
		t.Fatal(err)
	}
	old.SetCommitted(2000) // late news of the old process
	if _, err := addVia(within(t, 50*time.Millisecond), w.r, 1); status.Code(err) != codes.DeadlineExceeded {
		t.Fatalf("a mark of the process before released an answer: %v", err)
	}
}

func TestStreams(t *testing.T) {
	w := newWorld(t)
	m := w.serve(Config{})
	conn := w.r.Conn("test/counter", "")
	echo, err := conn.NewStream(within(t, 10*time.Second), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, runnertest.Echo)
	if err != nil {
		t.Fatal(err)
	}
	exchange := func(v int64) {
		t.Helper()
		if err := echo.SendMsg(wrapperspb.Int64(v)); err != nil {
			t.Fatal(err)
		}
		var out wrapperspb.Int64Value
		if err := echo.RecvMsg(&out); err != nil || out.GetValue() != v {
			t.Fatal(out.GetValue(), err)
		}
	}
	exchange(1)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	watch, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, runnertest.Watch)
	if err != nil {
		t.Fatal(err)
	}
	if err := watch.SendMsg(&emptypb.Empty{}); err != nil {
		t.Fatal(err)
	}
	if err := watch.CloseSend(); err != nil {
		t.Fatal(err)
	}
	var v wrapperspb.Int64Value
	if err := watch.RecvMsg(&v); err != nil {
		t.Fatal(err)
	}
	if m.Stats().Streams != 2 {
		t.Fatalf("streams: %+v", m.Stats())
	}
	// Open streams do not hold up a drain, and go on beside a held gate.
	if err := m.Hold("swap"); err != nil {
		t.Fatal(err)
	}
	if err := m.Drain(within(t, time.Second)); err != nil {
		t.Fatal(err)
	}
	exchange(2)
	if err := m.Release(); err != nil {
		t.Fatal(err)
	}
	if err := echo.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if err := echo.RecvMsg(&v); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	cancel()
	eventually(t, "the streams are over", func() bool { return m.Stats().Streams == 0 })
}

func TestHeadersAndTrailersPass(t *testing.T) {
	w := newWorld(t)
	w.serve(Config{}, runnertest.EnvVersion+"=2.5")
	var out wrapperspb.Int64Value
	var h, tr metadata.MD
	err := w.r.Conn("test/counter", "").Invoke(t.Context(), runnertest.Add, wrapperspb.Int64(1), &out, grpc.Header(&h), grpc.Trailer(&tr))
	if err != nil {
		t.Fatal(err)
	}
	if got := h.Get("test-version"); len(got) != 1 || got[0] != "2.5" {
		t.Fatalf("header: %v", h)
	}
	if len(tr.Get(componentv1.MetaMark)) != 0 {
		t.Fatal("the mark leaked to the caller")
	}
}

func TestHungProcessIsReported(t *testing.T) {
	w := newWorld(t)
	hung := make(chan error, 5)
	m := w.serve(Config{
		HeartbeatEvery: 20 * time.Millisecond, HeartbeatTimeout: 20 * time.Millisecond, HeartbeatMisses: 3,
		OnHung: func(_ *Backend, err error) { hung <- err },
	})
	if err := unix.Kill(m.Backend().Process().Ident().Pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-hung:
		t.Log(err)
	case <-time.After(10 * time.Second):
		t.Fatal("nobody was told")
	}
	if err := m.Detach(within(t, 10*time.Second), 50*time.Millisecond, "it hangs", nil); err != nil {
		t.Fatal(err)
	}
	if s, _ := m.State(); s != Stopped {
		t.Fatal(s)
	}
}

func TestConcurrencyLimit(t *testing.T) {
	w := newWorld(t)
	desc := runnertest.Description("1.0")
	desc.Resources = &componentv1.ResourceHint{MaxConcurrentCalls: 2}
	m := New(Config{Instance: instance})
	b, err := m.Attach(w.process(), desc, Token{1, 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Start(t.Context(), &componentv1.StartRequest{Instance: instance}); err != nil {
		t.Fatal(err)
	}
	defer m.unwatch()
	w.r.Add(m)
	w.route("n1", Token{1, 1})
	l := startLoad(t, 8, func(ctx context.Context) error {
		if n := len(b.slots); n > 2 {
			t.Errorf("%d inside", n)
		}
		_, err := addVia(with(ctx, "test-delay", "1ms"), w.r, 1)
		return err
	})
	l.until(t, 100)
	l.end(t)
	if len(b.slots) != 0 || b.Inside() != 0 {
		t.Fatalf("left inside: %d slots, %d calls", len(b.slots), b.Inside())
	}
}

// The next daemon's membrane goes on with the process that the last one started.
func TestAdoptedProcessServes(t *testing.T) {
	w := newWorld(t)
	m := w.serve(Config{})
	if _, err := addVia(t.Context(), w.r, 4); err != nil {
		t.Fatal(err)
	}
	m.unwatch()
	w.r.Remove(m)
	id := m.Backend().Process().Ident()
	p, err := w.run.Adopt(t.Context(), id, runner.Spec{LogDir: w.dir})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	next := New(Config{Instance: instance, OnEnd: func(*Backend, runner.ExitStatus) { close(ended) }})
	if _, err := next.Attach(p, runnertest.Description("1.0"), Token{1, 1}); err != nil {
		t.Fatal(err)
	}
	if err := next.Adopted(within(t, 5*time.Second), "1.0"); err != nil {
		t.Fatal(err)
	}
	w.r.Add(next)
	if v, err := getVia(t.Context(), w.r); err != nil || v != 4 {
		t.Fatal(v, err)
	}
	if _, v, err := httpGet(t.Context(), next.HTTP(), http.MethodGet, "/", nil); err != nil || v != 4 {
		t.Fatalf("the http socket is told by the heartbeat: %d %v", v, err)
	}
	if err := unix.Kill(id.Pid, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-ended
	if held, why := next.Held(); !held || !strings.Contains(why, "ended") {
		t.Fatal(held, why)
	}
}

func TestForeignHTTPSocketIsRefused(t *testing.T) {
	w := newWorld(t)
	b := newBackend(w.process(), runnertest.Description("1.0"))
	for _, sock := range []string{"/run/coppice/control.sock", b.proc.Ident().SocketDir + "/../x", b.proc.Ident().SocketDir} {
		err := b.told(&componentv1.Status{Info: map[string]string{componentv1.InfoHTTPSocket: sock}})
		if err == nil || b.http.Load() != nil {
			t.Errorf("%s was accepted", sock)
		}
	}
}
