package supervisor

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/members"
)

func TestTheFirstSuccessorTakesOverAndNothingAnsweredIsLost(t *testing.T) {
	scene(t, 3, func(w *world) {
		l := w.load(8, w.nodes[1], w.nodes[2])
		l.more(80)
		w.nodes[0].kill()
		took := w.running(w.nodes[1], "1.0.0")
		l.more(80)
		l.end(w.nodes[2])
		reg, _ := w.register()
		if reg.Epoch != 2 || reg.Owner != w.nodes[1].id {
			w.t.Errorf("epoch %d of %s, want 2 of n2", reg.Epoch, w.nameOf(reg.Owner))
		}
		if took > time.Second {
			w.t.Errorf("it took %s", took)
		}
	})
}

func TestDeadSuccessorsAreSkipped(t *testing.T) {
	inWorld(t, 5, func(w *world) {
		w.deploy("1.0.0")
		n := w.nodes
		w.place(n[0], n[1], n[2], n[3])
		w.running(n[0], "1.0.0")
		n[1].kill()
		w.eventually(5*time.Second, "n2 is dead to n3", func() bool { m, _ := n[2].members.Member(n[1].id); return m.State == members.Dead })
		n[0].kill()
		took := w.running(n[2], "1.0.0")
		if took >= rankDelay {
			w.t.Errorf("n3 took %s: it waited for the dead n2", took)
		}
	})
}

func TestTheNextTakesOverWhenTheFirstDiesWithTheOwner(t *testing.T) {
	inWorld(t, 5, func(w *world) {
		w.deploy("1.0.0")
		n := w.nodes
		w.place(n[0], n[1], n[2])
		w.running(n[0], "1.0.0")
		n[0].kill()
		n[1].kill()
		w.running(n[2], "1.0.0")
	})
}

func TestWithoutLivingSuccessorsTheClosestTakesOver(t *testing.T) {
	inWorld(t, 5, func(w *world) {
		w.deploy("1.0.0")
		n := w.nodes
		w.place(n[0], n[1])
		w.running(n[0], "1.0.0")
		n[1].kill()
		time.Sleep(time.Second)
		n[0].kill()
		w.eventually(10*time.Second, "one of the others runs it", func() bool { return n[2].runs("") || n[3].runs("") || n[4].runs("") })
		first := n[2].members.Closest(testKey, 1, func(m members.Member) bool { return m.State == members.Alive })
		if reg, _ := w.register(); reg.Owner != first[0].ID || reg.Epoch != 2 {
			w.t.Errorf("%s owns it in epoch %d, want %s, who is closest to its key, in 2", w.nameOf(reg.Owner), reg.Epoch, w.nameOf(first[0].ID))
		}
	})
}

func TestOfTwoClaimsAtOnceOneWins(t *testing.T) {
	scene(t, 3, func(w *world) {
		reg, body := w.register()
		d := death{node: reg.Owner, name: "n1", boot: reg.Boot, evidence: "refused", at: time.Now()}
		var won, refused atomic.Int32
		var goes sync.WaitGroup
		for _, n := range w.nodes[1:] {
			goes.Go(func() {
				_, err := n.sup.claimFromDead(within(w.t, 10*time.Second), reg, body, d)
				if _, no := errors.AsType[*arbiter.RefusedError](err); no {
					refused.Add(1)
				} else if err == nil {
					won.Add(1)
				}
			})
		}
		goes.Wait()
		if won.Load() != 1 || refused.Load() != 1 {
			w.t.Errorf("%d won, %d were refused", won.Load(), refused.Load())
		}
		now, _ := w.register()
		w.eventually(5*time.Second, "the winner alone runs it", func() bool {
			for _, n := range w.nodes {
				if n.runs("") != (n.id == now.Owner) || len(n.runner.running(testInstance)) > 1 {
					return false
				}
			}
			return true
		})
		if len(w.nodes[0].published("fenced")) != 1 {
			w.t.Error("the old owner did not say that it was fenced")
		}
	})
}

func TestANodeThatComesBackClaimsItsOwn(t *testing.T) {
	inWorld(t, 1, func(w *world) {
		w.deploy("1.0.0")
		n := w.nodes[0]
		w.place(n)
		w.running(n, "1.0.0")
		for range 10 {
			if _, err := n.add(within(w.t, 5*time.Second)); err != nil {
				w.t.Fatal(err)
			}
		}
		n.kill()
		time.Sleep(100 * time.Millisecond)
		n.start(false)
		w.running(n, "1.0.0")
		if v, err := n.get(within(w.t, 5*time.Second)); err != nil || v != 10 {
			w.t.Fatalf("it has %d (%v), 10 were answered", v, err)
		}
		if reg, body := w.register(); reg.Epoch != 2 || reg.Boot != n.boot || len(body.GetDeaths()) != 0 {
			w.t.Errorf("epoch %d, %d deaths counted; a reboot is epoch 2 and no death", reg.Epoch, len(body.GetDeaths()))
		}
	})
}

func TestAllAtOnceAndBackAgain(t *testing.T) {
	scene(t, 3, func(w *world) {
		l := w.load(4, w.nodes...)
		l.more(60)
		l.cancel()
		l.goes.Wait()
		for _, n := range w.nodes {
			n.kill()
		}
		time.Sleep(200 * time.Millisecond)
		for _, n := range w.nodes {
			n.start(false)
		}
		w.eventually(30*time.Second, "it runs again", func() bool { return w.nodes[0].runs("") || w.nodes[1].runs("") || w.nodes[2].runs("") })
		l.end(w.nodes[2])
	})
}

func TestTwoDeathsRightAfterTheStartQuarantineAndAStartLiftsIt(t *testing.T) {
	inWorld(t, 5, func(w *world) {
		w.deploy("1.0.0")
		n := w.nodes
		w.place(n[0], n[1], n[2])
		w.running(n[0], "1.0.0")
		n[0].kill()
		w.running(n[1], "1.0.0")
		n[1].kill()
		w.eventually(10*time.Second, "it is quarantined", func() bool { _, body := w.register(); return body.GetQuarantined() })
		reg, body := w.register()
		owner := w.node(reg.Owner)
		w.eventually(5*time.Second, "its owner says so and runs nothing", func() bool {
			return owner.state() == components.Failed && len(owner.runner.running(testInstance)) == 0
		})
		if len(body.GetDeaths()) != 2 || len(owner.published("quarantine")) != 1 {
			w.t.Errorf("%d deaths, %d events", len(body.GetDeaths()), len(owner.published("quarantine")))
		}
		time.Sleep(10 * time.Second)
		if len(owner.runner.running(testInstance)) != 0 {
			w.t.Error("it was started in quarantine")
		}
		body.Quarantined, body.Deaths = false, nil
		data, err := proto.Marshal(body)
		if err != nil {
			w.t.Fatal(err)
		}
		if _, err := owner.arb.Txn(within(w.t, 10*time.Second), arbiter.TxnRequest{Then: []arbiter.Op{{Put: &arbiter.PutOp{Key: testKey, Body: data}}}}); err != nil {
			w.t.Fatal(err)
		}
		w.running(owner, "1.0.0")
	})
}

func TestASettledInstanceIsNotBlamedForItsOwnersDeath(t *testing.T) {
	inWorld(t, 4, func(w *world) {
		w.deploy("1.0.0")
		n := w.nodes
		w.place(n[0], n[1], n[2])
		for _, owner := range n[:3] {
			w.running(owner, "1.0.0")
			w.eventually(20*time.Second, "it settles", func() bool { _, body := w.register(); return body.GetSettled() })
			if info, _ := owner.sup.Info(testInstance); !info.Settled {
				w.eventually(time.Second, "and says so", func() bool { info, _ := owner.sup.Info(testInstance); return info.Settled })
			}
			if owner != n[2] {
				owner.kill()
			}
		}
	})
}

func TestAnOwnerThatWasCutOffIsFencedWhenItIsBack(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes
		l := w.load(4, n[1], n[2])
		l.more(60)
		w.net.Isolate(n[0].id)
		w.running(n[1], "1.0.0")
		l.more(60)
		if v, err := n[0].add(within(w.t, time.Second)); err == nil {
			w.t.Errorf("the side without a majority answered a write: %d", v)
		}
		time.Sleep(outOfTouch)
		if v, err := n[0].get(within(w.t, time.Second)); err == nil {
			w.t.Errorf("the side without a majority answered %d, long after it lost touch", v)
		}
		w.net.Heal()
		w.eventually(15*time.Second, "n1 knows", func() bool { return len(n[0].published("fenced")) == 1 && len(n[0].runner.running(testInstance)) == 0 })
		l.more(60)
		l.end(n[0])
	})
}

func TestASuspendedOwnerServesNothingWhenItWakes(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes
		for range 5 {
			if _, err := n[1].add(within(w.t, 5*time.Second)); err != nil {
				w.t.Fatal(err)
			}
		}
		n[0].freeze()
		w.running(n[1], "1.0.0")
		for range 5 {
			if _, err := n[2].add(within(w.t, 10*time.Second)); err != nil {
				w.t.Fatal(err)
			}
		}
		n[0].thaw()
		// It still has its process and believes that it owns it: nothing of that may get out.
		for range 50 {
			if v, err := n[0].get(within(w.t, 10*time.Second)); err == nil && v != 10 {
				w.t.Fatalf("the woken owner answered %d; 10 were added", v)
			}
			time.Sleep(2 * time.Millisecond)
		}
		w.eventually(10*time.Second, "n1 has ended its process", func() bool { return len(n[0].runner.running(testInstance)) == 0 })
	})
}

func TestTheLeaseIsLostBySleepDoubtAndSilence(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		lease := n.sup.lease
		w.eventually(time.Second, "it holds", lease.holds)
		n.clock.mu.Lock()
		n.clock.start = n.clock.start.Add(-2 * time.Second) // the machine slept for 2 s
		n.clock.mu.Unlock()
		if lease.holds() {
			w.t.Error("it holds after a sleep, before anything was confirmed")
		}
		w.eventually(5*time.Second, "it is confirmed again", lease.holds)
		lease.doubt()
		if lease.holds() {
			w.t.Error("it holds in doubt")
		}
		w.eventually(5*time.Second, "it is confirmed again", lease.holds)
		w.net.Isolate(n.id)
		w.eventually(8*time.Second, "it is lost without the arbiter", func() bool { return !lease.holds() })
		w.net.Heal()
		w.eventually(15*time.Second, "it is confirmed again", lease.holds)
	})
}

func TestExactlyOneNeverRunsTwice(t *testing.T) {
	inWorld(t, 5, func(w *world) {
		n := w.nodes
		w.deploy("1.0.0", func(spec *componentsv1.ComponentSpec, _ *componentsv1.Application) {
			spec.Guarantee = components.ExactlyOne
		})
		w.place(n[0], n[1], n[2])
		w.running(n[0], "1.0.0")
		watch := func(what string, on *simNode) time.Duration {
			return w.eventually(20*time.Second, what, func() bool {
				total := 0
				for _, x := range w.up() {
					total += len(x.runner.running(testInstance))
				}
				if total > 1 {
					w.t.Fatalf("%s: two processes run", what)
				}
				return on.runs("")
			})
		}
		n[0].kill()
		if took := watch("taken over after a death", n[1]); took < 2*time.Second {
			w.t.Errorf("taken over after %s: a process of the dead node may have run for 2 s", took)
		}
		w.eventually(20*time.Second, "it settles", func() bool { _, body := w.register(); return body.GetSettled() })
		w.net.Isolate(n[1].id)
		watch("taken over after a cut", n[2])
	})
}

func TestAJudgementDuringASuspensionDoesNotCount(t *testing.T) {
	scene(t, 1, func(w *world) {
		lease := w.nodes[0].sup.lease
		slept := false
		lease.doubt()
		lost := lease.lost.Load()
		sleep := func() {
			slept = true
			c := w.nodes[0].clock
			c.mu.Lock()
			c.start = c.start.Add(-10 * time.Second)
			c.mu.Unlock()
		}
		lease.confirm(within(w.t, 5*time.Second), lost, sleep, func() {})
		if !slept || lease.holds() {
			w.t.Error("what was judged before a sleep of 10 s was taken for the present")
		}
	})
}

func TestRankDelaysAndEvidence(t *testing.T) {
	scene(t, 3, func(w *world) {
		_, body := w.register()
		for i, want := range []int{0, 1} {
			n := w.nodes[i+1]
			if r, ok := n.sup.rank(testKey, body, w.nodes[0].id); !ok || r != want {
				w.t.Errorf("%s has rank %d, %v, want %d", n.name, r, ok, want)
			}
		}
		w.nodes[1].members.UpdateSelf(func(i *members.Info) { i.Draining = true })
		w.eventually(5*time.Second, "a draining successor is passed over", func() bool {
			r, ok := w.nodes[2].sup.rank(testKey, body, w.nodes[0].id)
			return ok && r == 0
		})
		if fmt.Sprint(backoff(1), backoff(2), backoff(20)) != "100ms 200ms 30s" {
			w.t.Error(backoff(1), backoff(2), backoff(20))
		}
	})
}
