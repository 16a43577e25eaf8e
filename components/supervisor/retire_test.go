package supervisor

import (
	"fmt"
	"testing"
	"time"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
)

// A node that is told to stop ends what is exactly-one, gives the lease up and says goodbye: its successor does not wait, and the state is what was answered. The
// same when it leads the arbiter: the next leader knows nothing of what was given up to it.
func TestAPlannedStopHandsTheLeaseOver(t *testing.T) {
	for _, leads := range []bool{false, true} {
		t.Run(fmt.Sprint("leads ", leads), func(t *testing.T) {
			inWorld(t, 4, func(w *world) {
				owner := w.nodes[0]
				for _, n := range w.nodes {
					if (n.arb.Status().Role == "leader") == leads {
						owner = n
					}
				}
				var others []*simNode
				for _, n := range w.nodes {
					if n != owner {
						others = append(others, n)
					}
				}
				plannedStop(w, owner, others, leads)
			})
		})
	}
}

func plannedStop(w *world, owner *simNode, others []*simNode, leads bool) {
	asks := others[2]
	w.deploy("1.0.0", exactlyOne)
	w.place(owner, others[0], others[1])
	w.running(owner, "1.0.0")
	w.settled()
	g := w.guard()
	defer g.end()
	v := asks.adds(7)
	begin := time.Now()
	if err := owner.sup.Retire(within(w.t, 5*time.Second)); err != nil {
		w.t.Fatal(err)
	}
	if len(owner.runner.running(testInstance)) != 0 || owner.believes() {
		w.t.Fatal("something of it runs on, or its lease is believed in")
	}
	owner.members.Goodbye(within(w.t, time.Second))
	if leads {
		owner.must(owner.arb.HandOver(within(w.t, time.Second)))
		owner.must(owner.sup.Relinquish(within(w.t, time.Second)))
	}
	owner.stop()
	// Whose turn comes when the next leader is told may be the second one's.
	w.eventually(20*time.Second, "a successor runs it", func() bool { return others[0].runs("1.0.0") || others[1].runs("1.0.0") })
	took := time.Since(begin)
	if took > time.Second {
		w.t.Errorf("the next owner ran after %s: it waited for the lease", took)
	}
	w.t.Logf("the next owner ran %s after the stop began", took)
	if got := asks.adds(1); got != v+1 {
		w.t.Errorf("the next answer is %d, want %d", got, v+1)
	}
}

// What a command stopped has no lease: another node may claim it at once. Started again where it was it waits for a lease of its own.
func TestAStopGivesTheLeaseUp(t *testing.T) {
	inWorld(t, 3, func(w *world) {
		n := w.nodes
		w.deploy("1.0.0", exactlyOne)
		w.place(n[0], n[1], n[2])
		w.running(n[0], "1.0.0")
		g := w.guard()
		n[1].adds(3)
		stop := func(yes bool) {
			w.overlay(func(o *componentsv1.Overlay) { o.Stopped = yes })
		}
		stop(true)
		w.eventually(10*time.Second, "it is stopped", func() bool { return n[0].state() == components.Stopped && !n[0].believes() })
		stop(false)
		w.running(n[0], "1.0.0")
		if v := n[1].adds(1); v != 4 {
			w.t.Errorf("after a stop and a start it counts %d, want 4", v)
		}
		stop(true)
		w.eventually(10*time.Second, "it is stopped again", func() bool { return n[0].state() == components.Stopped && !n[0].believes() })
		reg, _ := w.register()
		if _, err := n[1].sup.claimOver(within(w.t, 5*time.Second), reg, arbiter.ClaimRequest{Body: reg.Body}); err != nil {
			w.t.Errorf("another node claims it: %v", err)
		}
		stop(false)
		w.running(n[1], "1.0.0")
		if v := n[2].adds(1); v != 5 {
			w.t.Errorf("the next owner counts %d, want 5", v)
		}
		g.end()
	})
}

// A node that is told to stop holds the calls first, then saves: however seldom the state is saved otherwise, under load nothing that was answered is lost, and no
// call fails. What is frozen is saved, too.
func TestAPlannedStopLosesNothingThatWasAnswered(t *testing.T) {
	for _, frozen := range []bool{false, true} {
		t.Run(fmt.Sprint("frozen ", frozen), func(t *testing.T) {
			inWorld(t, 4, func(w *world) {
				n := w.nodes
				w.deploy("1.0.0", func(spec *componentsv1.ComponentSpec, _ *componentsv1.Application) { spec.Durable = "1h" })
				w.place(n[0], n[1], n[2])
				w.running(n[0], "1.0.0")
				w.settled()
				l := w.load(8, n[1:]...)
				l.more(200)
				if frozen {
					w.overlay(func(o *componentsv1.Overlay) { o.Frozen = true })
					w.eventually(5*time.Second, "it is frozen", func() bool { return n[0].state() == components.Frozen })
				}
				if err := n[0].sup.Retire(within(w.t, 5*time.Second)); err != nil {
					w.t.Fatal(err)
				}
				n[0].members.Goodbye(within(w.t, time.Second))
				n[0].stop()
				if frozen {
					w.overlay(func(o *componentsv1.Overlay) { o.Frozen = false })
				}
				w.eventually(20*time.Second, "a successor runs it", func() bool { return n[1].runs("1.0.0") || n[2].runs("1.0.0") })
				l.more(100)
				l.end(n[3])
			})
		})
	}
}

// A call that does not end in the time that a stop has is cut off, and what the others did is saved all the same.
func TestAPlannedStopDoesNotWaitForACallThatHangs(t *testing.T) {
	inWorld(t, 3, func(w *world) {
		n := w.nodes
		w.deploy("1.0.0", func(spec *componentsv1.ComponentSpec, _ *componentsv1.Application) { spec.Durable = "1h" })
		w.place(n[0], n[1], n[2])
		w.running(n[0], "1.0.0")
		w.settled()
		v := n[1].adds(5)
		hang := make(chan struct{})
		b, err := w.shelf.get("sha256:counter-1.0.0")
		if err != nil {
			w.t.Fatal(err)
		}
		b.hang.Store(&hang)
		done := make(chan error, 1)
		go func() {
			_, err := n[1].get(within(w.t, 20*time.Second))
			done <- err
		}()
		time.Sleep(100 * time.Millisecond) // it is inside
		if err := n[0].sup.Retire(within(w.t, 5*time.Second)); err != nil {
			w.t.Fatal(err)
		}
		b.hang.Store(nil)
		close(hang)
		n[0].members.Goodbye(within(w.t, time.Second))
		n[0].stop()
		<-done
		if got := n[2].adds(1); got != v+1 {
			w.t.Errorf("the next answer is %d, want %d", got, v+1)
		}
	})
}
