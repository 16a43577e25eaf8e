package supervisor

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/runner"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
)

// swap is the command: a version with the desired state that says so.
func (w *world) swap(on *simNode, version string) (Replaced, error) {
	w.t.Helper()
	wish, err := w.wish(version)
	if err != nil {
		return Replaced{}, err
	}
	return on.sup.Swap(within(w.t, 30*time.Second), testInstance, wish)
}

func (w *world) wish(version string) (Wish, error) {
	w.t.Helper()
	b, err := w.shelf.get("sha256:counter-" + version)
	if err != nil {
		return Wish{}, err
	}
	reg, _, err := w.up()[0].arb.Read(within(w.t, 10*time.Second), components.ApplicationRegister(testApp))
	if err != nil {
		return Wish{}, err
	}
	app := w.app()
	if app.Overlays == nil {
		app.Overlays = map[string]*componentsv1.Overlay{}
	}
	app.Overlays["store"] = &componentsv1.Overlay{Digest: b.digest(), Version: version, ArtifactName: b.name}
	body, err := proto.Marshal(app)
	return Wish{Digest: b.digest(), App: body, Revision: reg.Revision, Trigger: "operator", Cause: "test"}, err
}

func (w *world) undo(on *simNode) (Replaced, error) {
	w.t.Helper()
	return on.sup.Undo(within(w.t, 30*time.Second), testInstance, func(prev *componentsv1.Previous) (Wish, error) { return w.wish(prev.GetVersion()) })
}

func (w *world) settled() {
	w.t.Helper()
	w.eventually(20*time.Second, "the epoch settles", func() bool { _, body := w.register(); return body.GetSettled() })
}

// one waits until exactly one process of the instance runs in the whole world.
func (w *world) one() *simProcess {
	w.t.Helper()
	var last *simProcess
	w.eventually(preparedFor+10*time.Second, "one process is left", func() bool {
		total := 0
		for _, n := range w.up() {
			for _, p := range n.runner.running(testInstance) {
				total++
				last = p
			}
		}
		return total == 1
	})
	return last
}

func TestSwapAndUndoUnderLoad(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		w.shelf.add(&binary{name: "counter", version: "1.1.0"})
		l := w.load(8, w.nodes...)
		l.more(80)
		out, err := w.swap(n, "1.1.0")
		if err != nil {
			w.t.Fatal(err)
		}
		if out.From != "1.0.0" || out.To != "1.1.0" || out.Epoch != 2 || out.Pause > 100*time.Millisecond {
			w.t.Errorf("%+v", out)
		}
		w.running(n, "1.1.0")
		l.more(80)
		w.settled()
		if out, err = w.undo(n); err != nil || out.To != "1.0.0" {
			w.t.Fatal(out, err)
		}
		l.more(80)
		l.end(w.nodes[2])
		w.running(n, "1.0.0")
		w.one()
		sh := n.sup.actors[testInstance].shell.(*testShell)
		w.eventually(5*time.Second, "only the running process may use the node socket", func() bool { return sh.allowed() == 1 })
	})
}

// What is wrong with a new version is found out before the switch: the old one goes on, and only the desired state that was asked for is not.
func TestASwapThatFailsLeavesTheOldOneServing(t *testing.T) {
	broken := []*binary{
		{name: "counter", version: "2.0.1", launch: fmt.Errorf("start: %w", runner.ErrNoHandshake)},
		{name: "counter", version: "2.0.2", onStart: func(context.Context) error { return errors.New("no configuration") }},
		{name: "counter", version: "2.0.3", onStart: func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }},
		{name: "counter", version: "2.0.4", schema: 2}, // cannot read schema 1
	}
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		l := w.load(4, w.nodes...)
		for _, b := range broken {
			w.shelf.add(b)
			l.more(50)
			if out, err := w.swap(n, b.version); err == nil {
				w.t.Errorf("%s: swapped: %+v", b.version, out)
			}
			if reg, body := w.register(); reg.Epoch != 1 || body.GetVersion() != "1.0.0" || len(w.app().GetOverlays()) != 0 {
				w.t.Errorf("%s: epoch %d, version %s, overlays %v", b.version, reg.Epoch, body.GetVersion(), w.app().GetOverlays())
			}
			w.running(n, "1.0.0")
		}
		l.more(50)
		l.end(n)
		w.one()
	})
}

func TestADeployedVersionThatDoesNotComeUpIsTriedOncePerDesiredState(t *testing.T) {
	scene(t, 1, func(w *world) {
		n := w.nodes[0]
		var starts atomic.Int32
		w.shelf.add(&binary{name: "counter", version: "2.0.0", onStart: func(context.Context) error { starts.Add(1); return errors.New("not today") }})
		w.deploy("2.0.0")
		w.eventually(10*time.Second, "it says that the new one does not come up", func() bool {
			info, _ := n.sup.Info(testInstance)
			return info.State == components.Degraded && strings.Contains(info.Reason, "not today") && info.Version == "1.0.0"
		})
		time.Sleep(time.Minute)
		if starts.Load() != 1 || len(n.published("swap-failed")) != 1 {
			w.t.Errorf("%d starts, %d events in a minute", starts.Load(), len(n.published("swap-failed")))
		}
		if _, err := n.add(within(w.t, 5*time.Second)); err != nil {
			w.t.Error(err)
		}
		w.deploy("2.0.0", func(spec *componentsv1.ComponentSpec, _ *componentsv1.Application) {
			spec.Env = map[string]string{"A": "b"}
		})
		w.eventually(10*time.Second, "it is tried again", func() bool { return starts.Load() == 2 })
	})
}

// faulty is the arbiter with faults on the way.
type faulty struct {
	*arbiter.Arbiter
	// deaf: nothing can be asked.
	deaf atomic.Bool
	// What answers instead of the arbiter, while set.
	txn    atomic.Pointer[func(ctx context.Context, r arbiter.TxnRequest, do func(context.Context, arbiter.TxnRequest) (arbiter.TxnResult, error)) (arbiter.TxnResult, error)]
	commit atomic.Pointer[func(ctx context.Context, r arbiter.CommitRequest) (arbiter.Register, error)]
}

var errDeaf = errors.New("the arbiter does not answer")

func (f *faulty) Txn(ctx context.Context, r arbiter.TxnRequest) (arbiter.TxnResult, error) {
	if txn := f.txn.Load(); txn != nil {
		return (*txn)(ctx, r, f.Arbiter.Txn)
	}
	return f.Arbiter.Txn(ctx, r)
}

func (f *faulty) Read(ctx context.Context, key string) (arbiter.Register, bool, error) {
	if f.deaf.Load() {
		return arbiter.Register{}, false, errDeaf
	}
	return f.Arbiter.Read(ctx, key)
}

func (f *faulty) Commit(ctx context.Context, r arbiter.CommitRequest) (arbiter.Register, error) {
	if commit := f.commit.Load(); commit != nil {
		return (*commit)(ctx, r)
	}
	return f.Arbiter.Commit(ctx, r)
}

func claims(r arbiter.TxnRequest) bool {
	for _, op := range r.Then {
		if op.Claim != nil {
			return true
		}
	}
	return false
}

// sceneWith is scene on one node whose arbiter is faulty.
func sceneWith(t *testing.T, f func(w *world, a *faulty)) {
	t.Helper()
	a := &faulty{}
	inWorldWith(t, 1, func(n *simNode, cfg *Config) { a.Arbiter = n.arb; cfg.Arbiter = a }, func(w *world) {
		w.deploy("1.0.0")
		w.place(w.nodes[0])
		w.running(w.nodes[0], "1.0.0")
		f(w, a)
	})
}

// The answer to the claim is lost. Whatever came of it, one process serves, and what was answered stays.
func TestASwapWhoseClaimIsInDoubt(t *testing.T) {
	for name, done := range map[string]bool{"done": true, "not done": false} {
		for _, blind := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, log readable %v", name, !blind), func(t *testing.T) {
				sceneWith(t, func(w *world, a *faulty) {
					n := w.nodes[0]
					w.shelf.add(&binary{name: "counter", version: "1.1.0"})
					l := w.load(4, n)
					l.more(50)
					lost := func(ctx context.Context, r arbiter.TxnRequest, do func(context.Context, arbiter.TxnRequest) (arbiter.TxnResult, error)) (arbiter.TxnResult, error) {
						if !claims(r) {
							return do(ctx, r)
						}
						a.txn.Store(nil)
						a.deaf.Store(blind)
						time.AfterFunc(3*time.Second, func() { a.deaf.Store(false) })
						if done {
							if _, err := do(ctx, r); err != nil {
								w.t.Error(err)
							}
						}
						return arbiter.TxnResult{}, &arbiter.InDoubtError{Cause: errDeaf}
					}
					a.txn.Store(&lost)
					_, err := w.swap(n, "1.1.0")
					if (err == nil) != (done && !blind) {
						w.t.Errorf("the swap: %v", err)
					}
					l.more(50)
					want := "1.0.0"
					if done { // desired state says so: it converges
						want = "1.1.0"
					}
					w.running(n, want)
					l.more(50)
					l.end(n)
					w.one()
				})
			})
		}
	}
}

func TestUndoToAVersionThatCannotReadTheStateReturnsToItsState(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		w.shelf.add(&binary{name: "counter", version: "2.0.0", schema: 2, reads: []uint32{1}})
		ctx := within(w.t, 30*time.Second)
		for range 5 {
			if _, err := n.add(ctx); err != nil {
				w.t.Fatal(err)
			}
		}
		if _, err := w.swap(n, "2.0.0"); err != nil {
			w.t.Fatal(err)
		}
		for range 3 {
			if _, err := n.add(ctx); err != nil {
				w.t.Fatal(err)
			}
		}
		if _, err := w.undo(n); err != nil {
			w.t.Fatal(err)
		}
		if v, err := n.get(ctx); err != nil || v != 5 {
			w.t.Errorf("it has %d (%v); the state that 1.0.0 left has 5", v, err)
		}
		if v, err := n.add(ctx); err != nil || v != 6 {
			w.t.Errorf("then %d (%v), want 6", v, err)
		}
		// And that is what a failover begins with.
		n.kill()
		w.running(w.nodes[1], "1.0.0")
		if v, err := w.nodes[2].get(ctx); err != nil || v != 6 {
			w.t.Errorf("after a failover %d (%v), want 6", v, err)
		}
	})
}

// The state that undo returns to has to be on enough nodes before it becomes the restore point, also when nothing is written any more.
func TestTheStateThatUndoReturnsToSurvivesTheOwner(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		w.shelf.add(&binary{name: "counter", version: "2.0.0", schema: 2, reads: []uint32{1}})
		ctx := within(w.t, 60*time.Second)
		if _, err := n.add(ctx); err != nil {
			w.t.Fatal(err)
		}
		if _, err := w.swap(n, "2.0.0"); err != nil {
			w.t.Fatal(err)
		}
		if _, err := w.undo(n); err != nil {
			w.t.Fatal(err)
		}
		n.kill()
		w.running(w.nodes[1], "1.0.0")
		if v, err := w.nodes[2].get(ctx); err != nil || v != 1 {
			w.t.Errorf("after a failover %d (%v), want 1", v, err)
		}
	})
}

// A version that is unhealthy only after the switch is returned from by itself, with everything that was answered meanwhile.
func TestAVersionThatHangsAfterTheSwitchIsReturnedFrom(t *testing.T) {
	testReturn(t, func(p *simProcess) { p.freeze() }, "hung")
}

func TestAVersionThatCrashesAfterTheSwitchIsReturnedFrom(t *testing.T) {
	testReturn(t, func(p *simProcess) { p.die("segmentation fault") }, "crashed")
}

func testReturn(t *testing.T, breaks func(p *simProcess), event string) {
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		w.shelf.add(&binary{name: "counter", version: "1.2.0"})
		w.settled()
		l := w.load(4, w.nodes...)
		l.more(50)
		if _, err := w.swap(n, "1.2.0"); err != nil {
			w.t.Fatal(err)
		}
		l.more(50)
		for _, p := range n.runner.running(testInstance) {
			if p.b.version == "1.2.0" {
				breaks(p)
			}
		}
		w.eventually(20*time.Second, "it returned", func() bool { _, body := w.register(); return body.GetVersion() == "1.0.0" })
		l.more(50)
		l.end(w.nodes[1])
		w.one()
		_, body := w.register()
		if len(n.published(event)) != 1 || len(n.published("returned")) != 1 || body.GetReturnedFrom() != "sha256:counter-1.2.0" {
			w.t.Errorf("events: %d %s, %d returned; returned from %q", len(n.published(event)), event, len(n.published("returned")), body.GetReturnedFrom())
		}
		// Nobody tries it again by itself, here or elsewhere, and it is said.
		time.Sleep(20 * time.Second)
		if info, _ := n.sup.Info(testInstance); info.State != components.Degraded || info.Version != "1.0.0" || !strings.Contains(info.Reason, "1.2.0") {
			w.t.Errorf("%s %s: %s", info.State, info.Version, info.Reason)
		}
		n.kill()
		w.eventually(20*time.Second, "it runs elsewhere", func() bool { return len(w.nodes[1].runner.running(testInstance)) == 1 })
		time.Sleep(10 * time.Second)
		if p := w.one(); p.b.version != "1.0.0" {
			w.t.Errorf("%s was tried again elsewhere", p.b.version)
		}
		// Until somebody asks for it.
		if _, err := w.swap(w.nodes[1], "1.2.0"); err != nil {
			w.t.Error(err)
		}
		w.running(w.nodes[1], "1.2.0")
	})
}

func TestAReturnToAVersionThatCannotReadTheNewStateTakesItsOwn(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		w.shelf.add(&binary{name: "counter", version: "2.0.0", schema: 2, reads: []uint32{1}})
		ctx := within(w.t, 60*time.Second)
		if _, err := n.add(ctx); err != nil {
			w.t.Fatal(err)
		}
		if _, err := w.swap(n, "2.0.0"); err != nil {
			w.t.Fatal(err)
		}
		if v, err := n.add(ctx); err != nil || v != 2 {
			w.t.Fatal(v, err)
		}
		n.kill() // within its settle time
		w.eventually(20*time.Second, "the version before is tried elsewhere", func() bool { return len(w.nodes[1].published("running")) > 0 })
		if ev := w.nodes[1].published("running")[0]; ev.Fields["version"] != "1.0.0" {
			w.t.Errorf("%v", ev)
		}
	})
}

func TestASettledProcessThatHangsIsStartedAgain(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		w.settled()
		l := w.load(4, w.nodes...)
		l.more(50)
		n.runner.running(testInstance)[0].freeze()
		w.eventually(20*time.Second, "it is restarted", func() bool { info, _ := n.sup.Info(testInstance); return info.Restarts == 1 && n.runs("") })
		l.more(50)
		l.end(w.nodes[1])
		if reg, _ := w.register(); reg.Epoch != 1 || len(n.published("hung")) != 1 {
			w.t.Errorf("epoch %d, %d events", reg.Epoch, len(n.published("hung")))
		}
		w.one()
	})
}

func TestAProcessThatCrashesAgainAndAgainIsBackedOffFrom(t *testing.T) {
	scene(t, 1, func(w *world) {
		n := w.nodes[0]
		w.settled()
		if _, err := n.add(within(w.t, 5*time.Second)); err != nil {
			w.t.Fatal(err)
		}
		begin := time.Now()
		for range 8 {
			var p *simProcess
			w.eventually(time.Minute, "it runs", func() bool {
				if ps := n.runner.running(testInstance); len(ps) == 1 && n.runs("") {
					p = ps[0]
				}
				return p != nil
			})
			p.die("killed")
			w.eventually(time.Second, "it is noticed", func() bool { return !n.runs("") })
		}
		if d := time.Since(begin); d < 5*time.Second {
			w.t.Errorf("eight crashes in %s: a hot loop", d)
		}
		w.running(n, "1.0.0")
		if v, err := n.get(within(w.t, 5*time.Second)); err != nil || v != 1 {
			w.t.Errorf("%d, %v", v, err)
		}
	})
}

// lateCommits has one commit arrive late, and its answer be lost.
type lateCommits struct {
	Registers
	next, underWay, through atomic.Bool
	arrive                  chan struct{} // closed: now
}

// Commit implements Registers.
func (l *lateCommits) Commit(ctx context.Context, r arbiter.CommitRequest) (arbiter.Register, error) {
	if !l.next.CompareAndSwap(true, false) {
		return l.Registers.Commit(ctx, r)
	}
	l.underWay.Store(true)
	go func() {
		<-l.arrive
		_, _ = l.Registers.Commit(context.Background(), r) // it counts, or it was done meanwhile
		l.through.Store(true)
	}()
	<-ctx.Done()
	return arbiter.Register{}, ctx.Err()
}

// A process dies while a commit of it is under way that comes through later. The next process is given what it was, and is not started a second time
// because the log has another state than it.
func TestARestartWaitsForTheCommitThatIsUnderWay(t *testing.T) {
	late := &lateCommits{}
	inWorldWith(t, 3, func(n *simNode, cfg *Config) {
		if n.name == "n1" {
			late.Registers, late.arrive, cfg.Arbiter = cfg.Arbiter, make(chan struct{}), late
		}
	}, func(w *world) {
		n := w.nodes
		// It arrives when the next process has its state, and has not answered anything yet.
		arrives := sync.OnceFunc(func() { close(late.arrive) })
		w.shelf.add(&binary{name: "counter", version: "1.0.0", onStart: func(context.Context) error {
			for late.underWay.Load() && !late.through.Load() {
				arrives()
				time.Sleep(time.Millisecond)
			}
			return nil
		}})
		w.deploy("1.0.0")
		w.place(n[0], n[1], n[2])
		w.running(n[0], "1.0.0")
		n[1].adds(3)
		started := func() (count int) {
			r := n[0].runner
			r.mu.Lock()
			defer r.mu.Unlock()
			for p := range r.procs {
				if p.spec.Instance == testInstance {
					count++
				}
			}
			return count
		}
		before := started()
		late.next.Store(true)
		called := make(chan error, 1)
		go func() {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			_, err := n[1].add(ctx)
			called <- err
		}()
		w.eventually(5*time.Second, "a commit is under way", late.underWay.Load)
		n[0].runner.running(testInstance)[0].die("killed")
		w.eventually(10*time.Second, "another process runs", func() bool { return len(n[0].runner.running(testInstance)) == 1 && n[0].runs("") })
		n[1].adds(5)
		if now := started(); now != before+1 {
			w.t.Errorf("%d processes were started after the death of one", now-before)
		}
		w.t.Logf("the call under way: %v", <-called)
	})
}
