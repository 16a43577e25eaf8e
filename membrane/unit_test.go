package membrane

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/coppice-project/coppice/components/runner"
	"github.com/coppice-project/coppice/components/runner/runnertest"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

func TestLifecycle(t *testing.T) {
	// Every state with every verb: the target, or - for refused, = for stays.
	table := map[State]string{
		//        start     ready    freeze  thaw     stop     fail
		Created:  "starting -        -       -        stopped  failed",
		Starting: "=        running  -       -        stopped  failed",
		Running:  "=        =        frozen  =        stopped  failed",
		Frozen:   "-        -        =       running  stopped  failed",
		Stopped:  "starting -        -       -        =        failed",
		Failed:   "starting -        -       -        stopped  =",
	}
	for s, line := range table {
		for v, want := range strings.Fields(line) {
			next, changed, err := Next(s, Verb(v))
			got := next.String()
			switch {
			case err != nil:
				got = "-"
				var te *ErrTransition
				if !errors.As(err, &te) || next != s {
					t.Errorf("%s %s: %v", s, Verb(v), err)
				}
			case !changed:
				got = "="
			}
			if got != want {
				t.Errorf("%s %s: got %s, want %s", s, Verb(v), got, want)
			}
		}
	}
}

func TestTokens(t *testing.T) {
	if (Token{1, 9}).Compare(Token{2, 1}) >= 0 || (Token{1, 2}).Compare(Token{1, 1}) <= 0 {
		t.Fatal("order")
	}
	r := Redirect{Token{3, 4}, "12D3KooW.with.dots"}
	got, err := ParseRedirect(r.String())
	if err != nil || got != r {
		t.Fatal(got, err)
	}
	for _, bad := range []string{"", "1.2", "1.2.", "a.b.c", "-1.2.n"} {
		if _, err := ParseRedirect(bad); err == nil {
			t.Errorf("%q", bad)
		}
	}
}

func FuzzRedirect(f *testing.F) {
	f.Add("1.2.node")
	f.Fuzz(func(t *testing.T, s string) {
		r, err := ParseRedirect(s)
		if err != nil {
			return
		}
		if again, err := ParseRedirect(r.String()); err != nil || again != r {
			t.Fatalf("%q: %v %v", s, again, err)
		}
	})
}

func TestMethods(t *testing.T) {
	m := NewMethods(runnertest.Description(""))
	if !m.TxnCalls || len(m.List()) != 5 {
		t.Fatal(m.List())
	}
	if md := m.Get(runnertest.Get); md.Kind != KindUnary || !md.NoSideEffects || !md.Idempotent {
		t.Fatal(md)
	}
	if m.Get(runnertest.Watch).Kind != KindServerStream || m.Get(runnertest.Echo).Kind != KindStream || m.Get("/x/Y").Kind != KindUnknown {
		t.Fatal("kinds")
	}
	for _, name := range []string{"Add", "Counter/Add", "runnertest.v1.Counter/Add", "/runnertest.v1.Counter/Add"} {
		if md, err := m.Find(name); err != nil || md.Name != runnertest.Add {
			t.Error(name, md, err)
		}
	}
	if _, err := m.Find("Nope"); err == nil || !strings.Contains(err.Error(), "Counter/Add") {
		t.Fatal(err)
	}
	md, err := m.Descriptor(runnertest.Add)
	if err != nil || string(md.Input().FullName()) != "google.protobuf.Int64Value" {
		t.Fatal(md, err)
	}
	// Broken descriptors cost JSON calls, not the component.
	d := runnertest.Description("")
	d.Services.File = d.Services.File[2:]
	broken := NewMethods(d)
	if broken.Get(runnertest.Add).Kind != KindUnary {
		t.Fatal("kinds need no linked descriptors")
	}
	if _, err := broken.Descriptor(runnertest.Add); err == nil {
		t.Fatal("linked without its imports")
	}
	var none *Methods
	if none.Get("/a/B").Kind != KindUnknown || none.List() != nil || none.Message("x") != nil {
		t.Fatal("nil")
	}
}

func TestSequence(t *testing.T) {
	s := newSequence("n1")
	k1, done1 := s.take()
	k2, done2 := s.take()
	_, done3 := s.take()
	if k1 != "n1/1" || k2 != "n1/2" || s.lowWater() != "1" {
		t.Fatal(k1, k2, s.lowWater())
	}
	done2()
	done3()
	if s.lowWater() != "1" {
		t.Fatal("an open call was given up")
	}
	done1()
	if s.lowWater() != "4" {
		t.Fatal(s.lowWater())
	}
	q := sequences{base: "b", byTarget: map[string]*sequence{}}
	first := q.of("a")
	if first != q.of("a") || first.name == q.of("a-0").name {
		t.Fatal("two names of one instance must not share numbers")
	}
}

func TestHistogram(t *testing.T) {
	var h histogram
	for i := 1; i <= 1000; i++ {
		h.add(time.Duration(i) * time.Millisecond)
	}
	for q, want := range map[float64]time.Duration{0.5: 500 * time.Millisecond, 0.99: 990 * time.Millisecond} {
		if got := h.quantile(q); got < want || got > want*9/8+time.Millisecond {
			t.Errorf("q%.2f: %s", q, got)
		}
	}
	for _, d := range []time.Duration{0, 1, time.Microsecond, 7 * time.Microsecond, time.Hour, 1 << 62} {
		if b := bucketOf(d); b < 0 || b >= 8*33 || (d < time.Hour && upper(b) < d) {
			t.Errorf("%s: bucket %d up to %s", d, b, upper(b))
		}
	}
}

// fakeProcess is a process without a process.
type fakeProcess struct {
	runner.Process
	conn *grpc.ClientConn
	done chan struct{}
}

func newFake(t *testing.T) *fakeProcess {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///nowhere", grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	return &fakeProcess{conn: conn, done: make(chan struct{})}
}

func (p *fakeProcess) Conn() *grpc.ClientConn  { return p.conn }
func (p *fakeProcess) Done() <-chan struct{}   { return p.done }
func (p *fakeProcess) Exit() runner.ExitStatus { return runner.ExitStatus{} }
func (p *fakeProcess) Ident() runner.Ident     { return runner.Ident{} }

// Callers come and go while the gate is held, drained, switched and released, by a seed: when a drain has returned nobody is inside until the
// release, no caller is lost, and each is with the backend of its time.
func TestGateRace(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 1))
	g := newGate(gateConfig{})
	desc := runnertest.Description("")
	backends := []*Backend{newBackend(newFake(t), desc), newBackend(newFake(t), desc)}
	if err := g.swap(backends[0], Token{1, 1}); err != nil {
		t.Fatal(err)
	}
	if err := g.release(); err != nil {
		t.Fatal(err)
	}
	var inside [2]atomic.Int64
	stop := make(chan struct{})
	var wg sync.WaitGroup
	var calls atomic.Int64
	for range 6 {
		wg.Go(func() { raceCaller(t, g, backends[1], &inside, &calls, stop) })
	}
	for n, limit := uint64(0), time.Now().Add(time.Second); n < 300 && time.Now().Before(limit); n++ {
		time.Sleep(time.Duration(rnd.IntN(200)) * time.Microsecond)
		if err := g.hold("test"); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		if err := g.drain(ctx); err != nil {
			t.Fatal(err)
		}
		cancel()
		for range 3 {
			if a, b := inside[0].Load(), inside[1].Load(); a+b != 0 {
				t.Fatalf("%d and %d inside a drained gate", a, b)
			}
		}
		if rnd.IntN(3) > 0 {
			tok := Token{1, g.cur.Load().token.Epoch + 1}
			if err := g.swap(backends[(tok.Epoch+1)%2], tok); err != nil {
				t.Fatal(n, err)
			}
		}
		if err := g.release(); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	wg.Wait()
	if calls.Load() == 0 || backends[0].Inside() != 0 || backends[1].Inside() != 0 {
		t.Fatal(calls.Load(), backends[0].Inside(), backends[1].Inside())
	}
}

// raceCaller passes the gate until stop, and says where it is meanwhile.
func raceCaller(t *testing.T, g *gate, second *Backend, inside *[2]atomic.Int64, calls *atomic.Int64, stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		default:
		}
		p, err := g.enter(context.Background())
		if err != nil {
			t.Error(err)
			return
		}
		i := 0
		if p.backend == second {
			i = 1
		}
		inside[i].Add(1)
		if (p.token.Epoch%2 == 0) != (i == 1) {
			t.Error("wrong backend for its epoch")
		}
		calls.Add(1)
		inside[i].Add(-1)
		g.exit(p)
		runtime.Gosched()
	}
}

func TestGateLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newGate(gateConfig{maxHeld: 2, holdLimit: 3 * time.Second})
		errs := make(chan error, 3)
		for range 2 {
			go func() { _, err := g.enter(context.Background()); errs <- err }()
		}
		synctest.Wait()
		if _, err := g.enter(context.Background()); statusOf(err).Code() != codes.ResourceExhausted {
			t.Fatal(err)
		}
		began := time.Now()
		for range 2 {
			if err := <-errs; statusOf(err).Code() != codes.DeadlineExceeded || !strings.Contains(err.Error(), "not started") {
				t.Fatal(err)
			}
		}
		if time.Since(began) != 3*time.Second {
			t.Fatal(time.Since(began))
		}
		// Closing tells the held ones where to go.
		go func() { _, err := g.enter(context.Background()); errs <- err }()
		synctest.Wait()
		g.close("moved", &Redirect{Token{1, 2}, "n2"})
		if o, moved := outcomeOf(<-errs); o != untouched || moved == nil || moved.Node != "n2" {
			t.Fatal(o, moved)
		}
		if g.hold("x") == nil || g.release() == nil {
			t.Fatal("a closed gate was moved")
		}
		g.reopen("again")
		if g.release() == nil {
			t.Fatal("released without a process")
		}
	})
}

func TestMarksRace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var m marks
		var early atomic.Int64
		var wg sync.WaitGroup
		rnd := rand.New(rand.NewPCG(7, 7))
		for range 200 {
			mark := uint64(rnd.IntN(100) + 1)
			timeout := time.Duration(rnd.IntN(300)) * time.Millisecond
			wg.Go(func() {
				ctx, cancel := context.WithTimeout(t.Context(), timeout)
				defer cancel()
				err := m.wait(ctx, mark)
				if err == nil && m.committed.Load() < mark {
					early.Add(1)
				}
			})
		}
		for i := uint64(1); i <= 90; i += uint64(rnd.IntN(4)) {
			time.Sleep(2 * time.Millisecond)
			m.set(i)
			m.set(i / 2) // late and reordered news never take it back
		}
		synctest.Wait()
		m.discard()
		wg.Wait()
		if early.Load() > 0 || m.pending() != 0 {
			t.Fatalf("%d early, %d left", early.Load(), m.pending())
		}
		if err := m.wait(t.Context(), 1000); !errors.Is(err, errDiscarded) {
			t.Fatal(err)
		}
		if err := m.wait(t.Context(), 90); err != nil {
			t.Fatalf("what was committed stays so: %v", err)
		}
	})
}

func TestRouterGivesUpWithTheReason(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDirectory()
		r := NewRouter(RouterConfig{Self: "n1", Caller: "x", Directory: d})
		began := time.Now()
		_, err := addVia(context.Background(), r, 1)
		if status.Code(err) != codes.DeadlineExceeded || time.Since(began) != defaultDeadline {
			t.Fatal(err, time.Since(began))
		}
		d.set("test/counter", &Route{Instance: instance, Node: "n1", Token: Token{1, 1}})
		ctx, cancel := context.WithCancel(context.Background())
		go func() { time.Sleep(time.Second); cancel() }()
		if _, err = addVia(ctx, r, 1); status.Code(err) != codes.Canceled || !strings.Contains(err.Error(), "starting on this node") {
			t.Fatal(err)
		}
	})
}

func TestAttributes(t *testing.T) {
	w := newWorld(t)
	m := w.serve(Config{})
	res, err := m.SetAttributes(t.Context(), map[string][]byte{"step": []byte(`"5"`), "mode": []byte(`{"a":1}`)}, 0, false)
	if err != nil || res.Revision != 1 || fmt.Sprint(res.Restart) != "[mode]" {
		t.Fatal(res, err)
	}
	list, rev, err := m.Attributes(t.Context())
	if err != nil || rev != 1 || len(list) != 3 || string(list[2].JSON) != `"5"` {
		t.Fatal(list, rev, err)
	}
	_, err = m.SetAttributes(t.Context(), map[string][]byte{"step": []byte(`"x"`), "fixed": []byte(`1`), "none": []byte(`1`), "mode": []byte(`oops`)}, 0, false)
	for _, want := range []string{"attribute step: ", "attribute fixed: it is read-only", "attribute none: there is none of that name; there are fixed, mode, step", "attribute mode: \"oops\" is not JSON"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q in: %v", want, err)
		}
	}
	var ae *AttributeError
	if !errors.As(err, &ae) {
		t.Error("not typed")
	}
	if _, err := m.SetAttributes(t.Context(), map[string][]byte{"step": []byte("6")}, 7, false); !errors.Is(err, ErrRevision) {
		t.Fatal(err)
	}
	if res, err = m.SetAttributes(t.Context(), map[string][]byte{"step": []byte("6")}, 1, true); err != nil || res.Revision != 1 {
		t.Fatal(res, err)
	}
}

func TestBindings(t *testing.T) {
	w := newWorld(t)
	desc := runnertest.Description("1.0")
	desc.Requires = []*componentv1.Interface{{Name: "store"}, {Name: "peer", Optional: true}, {Name: "news", Kind: componentv1.Kind_KIND_EVENT}}
	m := New(Config{Instance: instance})
	if _, err := m.Attach(w.process(), desc, Token{1, 1}); err != nil {
		t.Fatal(err)
	}
	defer m.unwatch()
	err := m.Start(t.Context(), &componentv1.StartRequest{Instance: instance})
	if err == nil || !strings.Contains(err.Error(), "not bound: store") || strings.Contains(err.Error(), "peer") {
		t.Fatal(err)
	}
	if s, why := m.State(); s != Failed || why == "" {
		t.Fatal(s)
	}
	if err := m.Bind(t.Context(), "store", "shop/store"); err != nil {
		t.Fatal(err)
	}
	if err := m.Start(t.Context(), &componentv1.StartRequest{Instance: instance}); err != nil {
		t.Fatal(err)
	}
	if err := m.Unbind(t.Context(), "store"); err == nil {
		t.Fatal("a mandatory interface of a running component was unbound")
	}
	if err := m.Bind(t.Context(), "store", "a/b", "a/c"); err == nil {
		t.Fatal("two targets for one")
	}
	if err := m.Bind(t.Context(), "nope", "a/b"); err == nil || !strings.Contains(err.Error(), "peer") {
		t.Fatal(err)
	}
	if err := m.Bind(t.Context(), "peer", "a/b"); err != nil {
		t.Fatal(err)
	}
	if b, ok := m.Lookup("peer"); !ok || b.Revision != 1 || b.Targets[0] != "a/b" {
		t.Fatal(b, ok)
	}
	if err := m.Unbind(t.Context(), "peer"); err != nil {
		t.Fatal(err)
	}
}

func TestCodecPassesBoth(t *testing.T) {
	var c Codec
	f := NewFrame([]byte("abc"))
	out, err := c.Marshal(f)
	if err != nil {
		t.Fatal(err)
	}
	var back Frame
	if err := c.Unmarshal(out, &back); err != nil {
		t.Fatal(err)
	}
	out.Free()
	if string(back.Bytes()) != "abc" || string(f.Bytes()) != "abc" {
		t.Fatal("frame")
	}
	msg := &componentv1.Token{Epoch: 4}
	if out, err = c.Marshal(msg); err != nil {
		t.Fatal(err)
	}
	var got componentv1.Token
	if err := c.Unmarshal(out, &got); err != nil || got.GetEpoch() != 4 {
		t.Fatal(&got, err)
	}
	md := passOn(metadata.Pairs("x-coppice-credential", "s", "traceparent", "t", ":authority", "a", "x-binding", "b"))
	if len(md) != 1 || md.Get("traceparent")[0] != "t" {
		t.Fatal(md)
	}
}
