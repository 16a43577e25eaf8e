package supervisor

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/membrane"
)

func hot(spec *componentsv1.ComponentSpec, _ *componentsv1.Application) {
	spec.State = &componentsv1.State{Standby: components.StandbyHot}
}

// standsBy says whether a node keeps a standby of the instance, as the owner tells. Under load it lacks what was committed since it last asked.
func (w *world) standsBy(owner, n *simNode) bool {
	info, ok := owner.sup.Info(testInstance)
	return ok && info.Standby == n.id && info.StandbyBehind <= 60
}

// putBody commits another body of the instance's register, as placement does.
func (w *world) putBody(reg arbiter.Register, body *componentsv1.InstanceBody) {
	w.t.Helper()
	data, err := proto.Marshal(body)
	if err == nil {
		_, err = w.up()[0].arb.Txn(within(w.t, 20*time.Second), arbiter.TxnRequest{
			Compares: []arbiter.Compare{{Key: reg.Key, Field: "revision", Equal: reg.Revision}}, Then: []arbiter.Op{{Put: &arbiter.PutOp{Key: reg.Key, Body: data}}},
		})
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) standing(owner, n *simNode) {
	w.t.Helper()
	w.eventually(30*time.Second, n.name+" keeps a standby that keeps up", func() bool { return w.standsBy(owner, n) })
}

// hotScene is a world whose store runs on the first node, with a standby on the second.
func hotScene(t *testing.T, nodes int, f func(w *world)) {
	t.Helper()
	inWorld(t, nodes, func(w *world) {
		w.deploy("1.0.0", hot)
		w.place(w.nodes[0], w.nodes[1:min(3, nodes)]...)
		w.running(w.nodes[0], "1.0.0")
		w.standing(w.nodes[0], w.nodes[1])
		f(w)
	})
}

// The owner dies under load, again and again: the process that stood by goes on, with all that was answered, and the next one in line stands by.
func TestAHotStandbyTakesOver(t *testing.T) {
	hotScene(t, 5, func(w *world) {
		n := w.nodes
		w.settled()
		l := w.load(6, n[3], n[4])
		l.more(60)
		w.standing(n[0], n[1])
		pid := n[1].runner.running(testInstance)[0].pid
		began := time.Now()
		n[0].kill()
		w.running(n[1], "1.0.0")
		w.t.Logf("taken over after %s", time.Since(began))
		l.more(40)
		if p := n[1].runner.running(testInstance); len(p) != 1 || p[0].pid != pid {
			w.t.Errorf("%d processes: the standby was not the one that took over", len(p))
		}
		w.standing(n[1], n[2])
		w.settled()
		n[1].kill()
		w.running(n[2], "1.0.0")
		l.more(40)
		l.end(n[4])
		if reg, _ := w.register(); reg.Epoch != 3 {
			w.t.Errorf("epoch %d", reg.Epoch)
		}
	})
}

// A standby serves nobody: it was not started, has no token, and who calls its node is answered by the owner.
func TestAStandbyServesNobody(t *testing.T) {
	hotScene(t, 3, func(w *world) {
		n := w.nodes
		l := w.load(4, n[1]) // by the standby's own node
		l.more(60)
		p := n[1].runner.running(testInstance)
		if len(p) != 1 || n[1].router.Local(testInstance) == nil {
			w.t.Fatalf("%d processes on the standby's node", len(p))
		}
		if _, here := n[1].sup.Info(testInstance); here {
			w.t.Error("the standby is shown as an instance of its node")
		}
		if started := p[0].starts.Load(); started != 0 {
			w.t.Errorf("it was started %d times", started)
		}
		if tok := n[1].router.Local(testInstance).Token(); tok != (membrane.Token{}) {
			w.t.Errorf("its membrane has the token %s", tok)
		}
		l.end(n[2])
		if reg, _ := w.register(); reg.Epoch != 1 {
			w.t.Errorf("epoch %d", reg.Epoch)
		}
	})
}

// A compaction makes a new base. What stands by is not given the whole state again for that, and has the same state as the owner.
func TestAStandbyFollowsOverACompaction(t *testing.T) {
	inWorld(t, 3, func(w *world) {
		n := w.nodes
		w.shelf.add(&binary{name: "counter", version: "1.0.0", ballast: 4 << 20})
		w.deploy("1.0.0", hot)
		w.place(n[0], n[1], n[2])
		w.running(n[0], "1.0.0")
		w.standing(n[0], n[1])
		p := n[1].runner.running(testInstance)[0]
		given := p.restored.Load()
		base := func() uint64 {
			i, _ := n[0].sup.get(testInstance)
			sv := i.saver()
			sv.mu.Lock()
			defer sv.mu.Unlock()
			return sv.head.meta.GetChain()
		}
		w.net.SetDelay(func(_, _ peer.ID) time.Duration { return time.Millisecond }) // the base takes its time to its holders
		l := w.loadAt(8, 15*time.Second, time.Millisecond, n[2])
		long := uint64(0)
		w.eventually(10*time.Minute, "a new base is committed", func() bool {
			now := base()
			fell := now < long
			long = max(long, now)
			return fell
		})
		l.more(20)
		w.standing(n[0], n[1])
		if now := p.restored.Load(); p.over() || now-given > 2<<20 {
			w.t.Errorf("the standby was given %d bytes more, its state has 4 MiB; its process is over: %v", now-given, p.over())
		}
		w.settled()
		n[0].kill()
		w.running(n[1], "1.0.0")
		l.more(40)
		l.end(n[2])
	})
}

// A swap builds the standby anew, in the new version.
func TestAStandbyFollowsASwap(t *testing.T) {
	hotScene(t, 3, func(w *world) {
		n := w.nodes
		w.shelf.add(&binary{name: "counter", version: "1.1.0", schema: 2, reads: []uint32{1, 2}})
		l := w.load(4, n[2])
		l.more(40)
		if _, err := w.swap(n[0], "1.1.0"); err != nil {
			w.t.Fatal(err)
		}
		w.eventually(30*time.Second, "the new version stands by", func() bool {
			p := n[1].runner.running(testInstance)
			return len(p) == 1 && p[0].b.version == "1.1.0" && w.standsBy(n[0], n[1])
		})
		w.settled()
		l.more(40)
		n[0].kill()
		w.running(n[1], "1.1.0")
		l.more(40)
		l.end(n[2])
	})
}

// Nothing is left of a standby where there should be none: another successor is named, the manifest says cold, the component is stopped, or is removed.
func TestAStandbyEndsWithItsReason(t *testing.T) {
	for name, c := range map[string]struct {
		change func(w *world)
		next   int // who stands by then; 0: nobody
	}{
		"another successor": {func(w *world) {
			reg, body := w.register()
			body.Successors = []string{w.nodes[2].id.String(), w.nodes[1].id.String()}
			w.putBody(reg, body)
		}, 2},
		"cold":    {func(w *world) { w.deploy("1.0.0") }, 0},
		"stopped": {func(w *world) { w.overlay(func(o *componentsv1.Overlay) { o.Stopped = true }) }, 0},
		"removed": {func(w *world) {
			app := w.app()
			app.Removing = true
			w.putApp(app)
		}, 0},
	} {
		t.Run(name, func(t *testing.T) {
			hotScene(t, 3, func(w *world) {
				n := w.nodes
				c.change(w)
				w.eventually(20*time.Second, "it is ended", func() bool {
					return len(n[1].runner.running(testInstance)) == 0 && n[1].router.Local(testInstance) == nil
				})
				if c.next != 0 {
					w.standing(n[0], n[c.next])
				}
			})
		})
	}
}

// A move to the node that keeps the standby, and from there back: the standby makes room, and is built where the instance was.
func TestAMoveToTheStandbysNode(t *testing.T) {
	hotScene(t, 3, func(w *world) {
		n := w.nodes
		l := w.load(4, n...)
		l.more(40)
		for _, way := range [][2]*simNode{{n[0], n[1]}, {n[1], n[0]}} {
			if _, err := w.move(way[0], way[1]); err != nil {
				w.t.Fatal(err)
			}
			w.running(way[1], "1.0.0")
			w.standing(way[1], way[0])
			l.more(40)
		}
		l.end(n[2])
	})
}

// A standby whose process dies, or that was made for what is not wanted any more, is no reason to wait: another is built, and without one it starts as usual.
func TestWithoutAUsableStandbyItStartsAsUsual(t *testing.T) {
	hotScene(t, 3, func(w *world) {
		n := w.nodes
		w.settled()
		l := w.load(4, n[2])
		l.more(40)
		old := n[1].runner.running(testInstance)[0]
		old.die("killed")
		w.eventually(20*time.Second, "another stands by", func() bool {
			p := n[1].runner.running(testInstance)
			return len(p) == 1 && p[0] != old && w.standsBy(n[0], n[1])
		})
		n[1].runner.running(testInstance)[0].die("killed")
		n[0].kill()
		w.running(n[1], "1.0.0")
		l.more(40)
		l.end(n[2])
	})
}

// A component that refuses to start refuses as a standby, too: it is tried as any start is, and nothing is lost.
func TestAStandbyThatDoesNotStart(t *testing.T) {
	hotScene(t, 3, func(w *world) {
		n := w.nodes
		w.settled()
		l := w.loadAt(4, time.Minute, 20*time.Millisecond, n[2])
		l.more(40)
		b, _ := w.shelf.get("sha256:counter-1.0.0")
		b.onStart = func(context.Context) error { return errors.New("not now") }
		n[0].kill()
		w.eventually(20*time.Second, "its start fails", func() bool {
			info, _ := n[1].sup.Info(testInstance)
			return info.State == components.Failed && strings.Contains(info.Reason, "not now")
		})
		b.onStart = nil
		w.running(n[1], "1.0.0")
		l.more(40)
		l.end(n[2])
	})
}

// What is exactly-one stands by as well: the process waits, not started, until the last owner's lease is over.
func TestAStandbyOfWhatIsExactlyOneWaitsForTheLease(t *testing.T) {
	inWorld(t, 3, func(w *world) {
		n := w.nodes
		w.deploy("1.0.0", hot, func(spec *componentsv1.ComponentSpec, _ *componentsv1.Application) {
			spec.Guarantee = components.ExactlyOne
		})
		w.place(n[0], n[1], n[2])
		w.running(n[0], "1.0.0")
		w.standing(n[0], n[1])
		l := w.loadAt(4, time.Minute, 20*time.Millisecond, n[2])
		l.more(40)
		p := n[1].runner.running(testInstance)[0]
		w.net.Isolate(n[0].id)
		ended := w.eventually(20*time.Second, "the old owner's process is over", func() bool {
			if p.starts.Load() != 0 {
				w.t.Fatal("the standby was started before the old process was over")
			}
			return len(n[0].runner.running(testInstance)) == 0
		})
		w.t.Logf("the old process was over after %s", ended)
		w.running(n[1], "1.0.0")
		if p.over() || p.starts.Load() != 1 {
			w.t.Errorf("the standby was started %d times; over: %v", p.starts.Load(), p.over())
		}
		l.more(40)
		l.end(n[2])
	})
}

// Every successor has the pages of what is warm, whether it is one of the holders or not.
func TestWarmSuccessorsHaveThePages(t *testing.T) {
	inWorld(t, 5, func(w *world) {
		n := w.nodes
		w.deploy("1.0.0", keptBy(&componentsv1.State{Standby: components.StandbyWarm, Replicas: 1}))
		w.place(n[0], n[1], n[2], n[3])
		w.running(n[0], "1.0.0")
		if _, err := n[0].add(within(w.t, 10*time.Second)); err != nil {
			w.t.Fatal(err)
		}
		reg, _ := w.register()
		w.eventually(20*time.Second, "all successors have them", func() bool {
			for _, x := range n[1:4] {
				if !x.blobs.Complete(hashFrom(reg.Root)) {
					return false
				}
			}
			return true
		})
		for _, x := range n[1:] {
			if len(x.runner.running(testInstance)) != 0 {
				w.t.Error("a process waits for what is only warm")
			}
		}
	})
}
