package supervisor

import (
	"context"
	"errors"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
)

func (w *world) move(from, to *simNode) (Replaced, error) {
	w.t.Helper()
	return from.sup.Move(within(w.t, 60*time.Second), testInstance, to.id, Wish{Trigger: "operator", Cause: "test"})
}

func TestMoveThereAndBackUnderLoad(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes
		l := w.load(6, n...)
		l.more(60)
		for i, way := range [][2]*simNode{{n[0], n[2]}, {n[2], n[0]}, {n[0], n[1]}} {
			out, err := w.move(way[0], way[1])
			if err != nil {
				w.t.Fatal(err)
			}
			if out.From != way[0].name || out.To != way[1].name || out.Epoch != uint64(i+2) || out.Pause > 200*time.Millisecond {
				w.t.Errorf("%+v", out)
			}
			w.running(way[1], "1.0.0")
			l.more(40)
		}
		l.end(n[2])
		w.one()
		for _, x := range n[:1] {
			w.eventually(5*time.Second, "nothing is left where it was", func() bool { _, here := x.sup.Info(testInstance); return !here && x.router.Local(testInstance) == nil })
		}
	})
}

func TestAMoveWhoseTargetDiesBeforeTheClaim(t *testing.T) {
	for _, at := range []string{"in its Start", "in its claim"} {
		t.Run(at, func(t *testing.T) {
			inWorldWith(t, 3, func(n *simNode, cfg *Config) {
				if n.name != "n3" || at != "in its claim" {
					return
				}
				cfg.Arbiter = &claimKiller{Arbiter: n.arb, kill: func() { n.w.net.Kill(n.id) }}
			}, func(w *world) {
				n := w.nodes
				w.deploy("1.0.0")
				w.place(n[0], n[1], n[2])
				w.running(n[0], "1.0.0")
				l := w.load(4, n[0], n[1])
				l.more(40)
				if at == "in its Start" {
					b, _ := w.shelf.get("sha256:counter-1.0.0")
					b.onStart = func(context.Context) error { w.net.Kill(n[2].id); return nil }
				}
				if out, err := w.move(n[0], n[2]); err == nil {
					w.t.Errorf("moved to a dead node: %+v", out)
				}
				w.eventually(20*time.Second, "it runs somewhere", func() bool { return n[0].runs("") || n[1].runs("") })
				l.more(40)
				l.end(n[1])
			})
		})
	}
}

// claimKiller ends the node's network at its first claim.
type claimKiller struct {
	*arbiter.Arbiter
	kill func()
	// after: the claim goes through first.
	after bool
	once  bool
}

func (a *claimKiller) Claim(ctx context.Context, r arbiter.ClaimRequest) (arbiter.Register, error) {
	if a.once {
		return a.Arbiter.Claim(ctx, r)
	}
	a.once = true
	if !a.after {
		a.kill()
		return arbiter.Register{}, errors.New("dead")
	}
	reg, err := a.Arbiter.Claim(ctx, r)
	a.kill()
	return reg, err
}

func TestAMoveWhoseTargetDiesRightAfterTheClaim(t *testing.T) {
	inWorldWith(t, 5, func(n *simNode, cfg *Config) {
		if n.name == "n3" {
			cfg.Arbiter = &claimKiller{Arbiter: n.arb, after: true, kill: func() { n.w.net.Kill(n.id) }}
		}
	}, func(w *world) {
		n := w.nodes
		w.deploy("1.0.0")
		w.place(n[0], n[1], n[2])
		w.running(n[0], "1.0.0")
		l := w.load(4, n[0], n[1])
		l.more(40)
		if out, err := w.move(n[0], n[2]); err == nil {
			w.t.Errorf("the target's answer was lost: %+v", out)
		}
		// The target owned it for a moment; the source is its first successor and takes it over as such, never as the old owner.
		w.eventually(20*time.Second, "a later epoch runs", func() bool { reg, _ := w.register(); return reg.Epoch == 3 && n[0].runs("") })
		l.more(40)
		l.end(n[1])
	})
}

func TestAMoveToANodeThatCannotStartIt(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes
		l := w.load(4, n...)
		b, _ := w.shelf.get("sha256:counter-1.0.0")
		b.onStart = func(context.Context) error { return errors.New("no such library here") }
		if _, err := w.move(n[0], n[1]); err == nil {
			w.t.Error("moved")
		}
		l.more(40)
		b.onStart = nil
		if reg, _ := w.register(); reg.Epoch != 1 || !n[0].runs("1.0.0") {
			w.t.Errorf("epoch %d, it is %s on n1", reg.Epoch, n[0].state())
		}
		if _, err := w.move(n[0], n[1]); err != nil {
			w.t.Error(err)
		}
		l.more(40)
		l.end(n[0])
		w.one()
	})
}

func TestAPreparedMoveThatIsNotFinishedIsEnded(t *testing.T) {
	scene(t, 2, func(w *world) {
		n := w.nodes
		reg, _ := w.register()
		if _, err := n[1].sup.prepareMove(within(w.t, 10*time.Second), n[0].id, &componentsv1.PrepareMoveRequest{
			Instance: testInstance, Epoch: reg.Epoch, Root: reg.Root, Holders: idStrings(reg.Holders), Move: "m",
		}); err != nil {
			w.t.Fatal(err)
		}
		if len(n[1].runner.running(testInstance)) != 1 {
			w.t.Fatal("nothing is prepared")
		}
		time.Sleep(preparedFor + time.Second)
		if len(n[1].runner.running(testInstance)) != 0 {
			w.t.Error("what was prepared runs for ever")
		}
		if r, err := n[1].sup.finishMove(within(w.t, 10*time.Second), n[0].id, &componentsv1.FinishMoveRequest{Instance: testInstance, Move: "m", Root: reg.Root}); err != nil || r.GetClaimed() {
			w.t.Errorf("finished: %v, %v", r, err)
		}
	})
}

// The source of a move is gone, and a third node has claimed: what was prepared for the move ends, long before its time is over.
func TestAPreparedMoveThatWasOvertakenIsEnded(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes
		reg, _ := w.register()
		ctx := within(w.t, 10*time.Second)
		if _, err := n[1].sup.prepareMove(ctx, n[0].id, &componentsv1.PrepareMoveRequest{
			Instance: testInstance, Epoch: reg.Epoch, Root: reg.Root, Holders: idStrings(reg.Holders), Move: "m",
		}); err != nil {
			w.t.Fatal(err)
		}
		if _, err := n[0].arb.Claim(ctx, arbiter.ClaimRequest{Key: testKey, Expect: reg.Epoch, Nonce: 99, Owner: n[2].id, Boot: n[2].boot, Body: reg.Body}); err != nil {
			w.t.Fatal(err)
		}
		w.eventually(preparedFor/4, "only the new owner runs it", func() bool {
			return len(n[0].runner.running(testInstance)) == 0 && len(n[1].runner.running(testInstance)) == 0 && len(n[2].runner.running(testInstance)) == 1
		})
	})
}

func TestStopSavesAndStartContinues(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		w.deploy("1.0.0", func(spec *componentsv1.ComponentSpec, _ *componentsv1.Application) { spec.Durable = "1h" })
		w.eventually(5*time.Second, "it is saved now and then", func() bool { info, _ := n.sup.Info(testInstance); return info.Durable == "1h0m0s" })
		ctx := within(w.t, 2*time.Minute)
		for range 7 {
			if _, err := n.add(ctx); err != nil {
				w.t.Fatal(err)
			}
		}
		for range 3 { // the local views lag with checkpoints: a start after a stop asks the log
			w.overlay(func(o *componentsv1.Overlay) { o.Stopped = true })
			w.eventually(10*time.Second, "it is stopped", func() bool { return n.state() == components.Stopped && len(n.runner.running(testInstance)) == 0 })
			w.overlay(func(o *componentsv1.Overlay) { o.Stopped = false })
			w.running(n, "1.0.0")
			if _, err := n.add(ctx); err != nil {
				w.t.Fatal(err)
			}
		}
		if v, err := w.nodes[1].get(ctx); err != nil || v != 10 {
			w.t.Errorf("it has %d (%v), want 10", v, err)
		}
		if reg, _ := w.register(); reg.Epoch != 1 {
			w.t.Errorf("epoch %d: a stop is no new ownership", reg.Epoch)
		}
	})
}

// A node that does not vote sees checkpoints late. Its next process is given what the log has all the same.
func TestAnOwnerOutsideTheGroupRestartsFromTheLog(t *testing.T) {
	inWorld(t, 4, func(w *world) {
		w.deploy("1.0.0")
		voters := w.nodes[0].arb.Status().Voters
		i := slices.IndexFunc(w.nodes, func(n *simNode) bool { return !slices.Contains(voters, n.id) })
		n := w.nodes[i]
		w.place(n)
		w.running(n, "1.0.0")
		w.settled()
		ctx := within(w.t, 2*time.Minute)
		for want := int64(1); want <= 12; want++ {
			if v, err := n.add(ctx); err != nil || v != want {
				w.t.Fatalf("%d (%v), want %d", v, err, want)
			}
			if want%3 != 0 {
				continue
			}
			if want%2 == 0 {
				n.runner.running(testInstance)[0].die("killed")
				if v, err := n.get(ctx); err != nil || v != want {
					w.t.Fatalf("after a crash it answers %d (%v), want %d", v, err, want)
				}
				continue
			}
			w.overlay(func(o *componentsv1.Overlay) { o.Stopped = true })
			w.eventually(10*time.Second, "it is stopped", func() bool { return n.state() == components.Stopped })
			w.overlay(func(o *componentsv1.Overlay) { o.Stopped = false })
			if v, err := n.get(ctx); err != nil || v != want {
				w.t.Fatalf("after a stop it answers %d (%v), want %d", v, err, want)
			}
		}
	})
}

// A stop whose state cannot be saved does not lose it, and can be called off.
func TestAStopThatCannotSaveIsCalledOff(t *testing.T) {
	sceneWith(t, func(w *world, a *faulty) {
		n := w.nodes[0]
		w.deploy("1.0.0", func(spec *componentsv1.ComponentSpec, _ *componentsv1.Application) { spec.Durable = "1h" })
		w.eventually(5*time.Second, "it is saved now and then", func() bool { info, _ := n.sup.Info(testInstance); return info.Durable == "1h0m0s" })
		if _, err := n.add(within(w.t, 5*time.Second)); err != nil {
			w.t.Fatal(err)
		}
		refuse := func(context.Context, arbiter.CommitRequest) (arbiter.Register, error) {
			return arbiter.Register{}, arbiter.ErrNoLeader
		}
		a.commit.Store(&refuse)
		w.overlay(func(o *componentsv1.Overlay) { o.Stopped = true })
		w.eventually(2*time.Minute, "it says why it does not stop", func() bool { return n.state() == components.Degraded })
		if len(n.runner.running(testInstance)) != 1 {
			w.t.Fatal("it was stopped with its state unsaved")
		}
		w.overlay(func(o *componentsv1.Overlay) { o.Stopped = false })
		if v, err := n.add(within(w.t, 2*time.Minute)); err != nil || v != 2 {
			w.t.Errorf("it does not go on: %d, %v", v, err)
		}
		w.overlay(func(o *componentsv1.Overlay) { o.Stopped = true })
		time.Sleep(time.Minute)
		a.commit.Store(nil)
		w.eventually(2*time.Minute, "it is stopped once it can be saved", func() bool { return n.state() == components.Stopped })
		w.overlay(func(o *componentsv1.Overlay) { o.Stopped = false })
		w.running(n, "1.0.0")
		if v, err := n.get(within(w.t, 5*time.Second)); err != nil || v != 2 {
			w.t.Errorf("it has %d (%v), want 2", v, err)
		}
	})
}

func TestRemoveAndScaleDown(t *testing.T) {
	for name, end := range map[string]func(w *world){
		"removed": func(w *world) {
			app := w.app()
			app.Removing = true
			w.putApp(app)
		},
		"scaled down": func(w *world) {
			w.deploy("1.0.0", func(spec *componentsv1.ComponentSpec, _ *componentsv1.Application) { spec.Count = "0" })
		},
	} {
		t.Run(name, func(t *testing.T) {
			scene(t, 3, func(w *world) {
				end(w)
				w.eventually(20*time.Second, "its register is gone", func() bool {
					_, there, err := w.nodes[0].arb.Read(within(w.t, 10*time.Second), testKey)
					return err == nil && !there
				})
				w.eventually(5*time.Second, "nothing of it is left", func() bool {
					for _, n := range w.nodes {
						if _, here := n.sup.Info(testInstance); here || len(n.runner.running(testInstance)) > 0 {
							return false
						}
					}
					return true
				})
				if len(w.nodes[0].published("removed")) != 1 {
					w.t.Error("no event")
				}
			})
		})
	}
}

// What the local view does not know yet must not cost a state: here the register is known from a claim before the application is.
func TestAnUnknownApplicationIsAskedForBeforeAnInstanceIsRemoved(t *testing.T) {
	var blind *blindView
	hide := func(n *simNode, cfg *Config) {
		blind = &blindView{Registers: n.arb}
		cfg.Arbiter = blind
	}
	inWorldWith(t, 1, hide, func(w *world) {
		n := w.nodes[0]
		w.deploy("1.0.0")
		hidden := components.ApplicationRegister(testApp)
		blind.hidden.Store(&hidden)
		w.place(n)
		time.Sleep(2 * time.Second)
		if _, there, err := n.arb.Read(within(w.t, 5*time.Second), testKey); err != nil || !there {
			w.t.Fatalf("the instance was removed: %v", err)
		}
	})
}

// blindView hides one register from the local view until Sync.
type blindView struct {
	Registers
	hidden atomic.Pointer[string]
}

func (v *blindView) Get(key string) (arbiter.Register, bool) {
	if h := v.hidden.Load(); h != nil && key == *h {
		return arbiter.Register{}, false
	}
	return v.Registers.Get(key)
}

func TestAFrozenInstanceStaysFrozenOverASwapAndAFailedOne(t *testing.T) {
	scene(t, 1, func(w *world) {
		n := w.nodes[0]
		w.shelf.add(&binary{name: "counter", version: "1.1.0"})
		w.shelf.add(&binary{name: "counter", version: "1.2.0", onStart: func(context.Context) error { return errors.New("no") }})
		ctx := within(w.t, time.Minute)
		if _, err := n.add(ctx); err != nil {
			w.t.Fatal(err)
		}
		w.overlay(func(o *componentsv1.Overlay) { o.Frozen = true })
		w.eventually(5*time.Second, "it is frozen", func() bool { return n.state() == components.Frozen })
		frozen := func(what string) {
			w.t.Helper()
			if v, err := n.add(within(w.t, 500*time.Millisecond)); err == nil {
				w.t.Errorf("%s: a frozen instance answered %d", what, v)
			}
		}
		frozen("frozen")
		swap := func(version string) error {
			wish, err := w.wish(version)
			if err != nil {
				return err
			}
			wish.App = nil // the overlay keeps it frozen
			_, err = n.sup.Swap(ctx, testInstance, wish)
			return err
		}
		if err := swap("1.2.0"); err == nil {
			w.t.Error("swapped")
		}
		frozen("after a swap that failed")
		if err := swap("1.1.0"); err != nil {
			w.t.Fatal(err)
		}
		frozen("after a swap")
		w.overlay(func(o *componentsv1.Overlay) {
			o.Frozen = false
			o.Digest, o.Version, o.ArtifactName = "sha256:counter-1.1.0", "1.1.0", "counter"
		})
		w.running(n, "1.1.0")
		if _, err := n.add(ctx); err != nil {
			w.t.Error(err)
		}
	})
}

func TestAnotherDurabilityContinuesTheSameCheckpoints(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		l := w.load(4, w.nodes[1], w.nodes[2])
		l.more(30)
		for _, durable := range []string{"100ms", "each-call", "on-demand", "each-call", "none", "each-call"} {
			w.deploy("1.0.0", func(spec *componentsv1.ComponentSpec, _ *componentsv1.Application) { spec.Durable = durable })
			w.eventually(5*time.Second, durable, func() bool { info, _ := n.sup.Info(testInstance); return info.Durable == durable })
			l.more(30)
		}
		if reg, _ := w.register(); reg.Epoch != 1 {
			w.t.Errorf("epoch %d", reg.Epoch)
		}
		n.kill()
		w.running(w.nodes[1], "1.0.0")
		l.more(30)
		l.end(w.nodes[2])
	})
}

func TestAStatelessInstanceIsJustRun(t *testing.T) {
	inWorld(t, 3, func(w *world) {
		n := w.nodes
		w.shelf.add(&binary{name: "counter", version: "3.0.0", stateless: true})
		w.shelf.add(&binary{name: "counter", version: "3.1.0", stateless: true})
		w.deploy("3.0.0")
		w.place(n[0], n[1], n[2])
		w.running(n[0], "3.0.0")
		if _, err := w.swap(n[0], "3.1.0"); err != nil {
			w.t.Error(err)
		}
		if _, err := w.move(n[0], n[1]); err != nil {
			w.t.Error(err)
		}
		w.running(n[1], "3.1.0")
		w.settled()
		n[1].runner.running(testInstance)[0].die("killed")
		time.Sleep(10 * time.Millisecond)
		w.running(n[1], "3.1.0")
		n[1].kill()
		w.eventually(10*time.Second, "it runs elsewhere", func() bool { return n[0].runs("") || n[2].runs("") })
		if reg, _ := w.register(); reg.Seq != 0 {
			w.t.Errorf("seq %d: it has no state", reg.Seq)
		}
	})
}
