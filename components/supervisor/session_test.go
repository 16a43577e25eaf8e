package supervisor

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
)

func exactlyOne(spec *componentsv1.ComponentSpec, _ *componentsv1.Application) {
	spec.Guarantee = components.ExactlyOne
}

// believer says whether a node believes in its lease of the instance, and acts: a process that stands still does not.
func (n *simNode) believes() bool {
	l := n.life.Load()
	if l == nil || l.clock.stopped() {
		return false
	}
	st := &l.sup.service(testInstance).lease
	return st.leased.Load() && l.sup.left(st) > 0
}

// guard looks at every node each millisecond: of all nodes at most one believes in its lease (I3), and where none is believed in nothing is served.
type guard struct {
	w    *world
	stop chan struct{}
	done chan struct{}
	seen map[string]int // node -> looks at which it believed
}

func (w *world) guard() *guard {
	g := &guard{w: w, stop: make(chan struct{}), done: make(chan struct{}), seen: map[string]int{}}
	go func() {
		defer close(g.done)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-g.stop:
				return
			case <-tick.C:
				g.look()
			}
		}
	}()
	return g
}

func (g *guard) look() {
	var who []string
	for _, n := range g.w.nodes {
		if n.believes() {
			who = append(who, n.name)
			g.seen[n.name]++
		}
	}
	if len(who) > 1 {
		g.w.t.Errorf("at the same time %s believe in their leases", strings.Join(who, " and "))
	}
}

func (g *guard) end() {
	close(g.stop)
	<-g.done
	g.w.t.Logf("believed at so many looks: %v", g.seen)
}

// inRatedWorld is a world of five nodes whose clocks run at the limit of their rates.
func inRatedWorld(t *testing.T, seed uint64, f func(w *world)) {
	t.Helper()
	rates := []float64{0.99, 1.01, 0.99, 1.01, 1.01}
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, seed)
		defer w.close()
		for i, r := range rates {
			if seed%2 == 0 {
				r = 2 - r
			}
			w.nodes = append(w.nodes, &simNode{w: w, id: testID(i + 1), name: fmt.Sprintf("n%d", i+1), fs: vfs.NewCrashableMem(), rate: r})
		}
		w.meet()
		f(w)
	})
}

// Leaders and owners are cut off together, stand still, die and wake, and the instance moves, with clocks at the limit of their rates: at no moment do
// two nodes believe in their leases.
func TestLeasesOfDifferentEpochsNeverOverlap(t *testing.T) {
	seeds := []uint64{11, 12}
	if !testing.Short() {
		seeds = append(seeds, 13, 14)
	}
	for _, seed := range seeds {
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) { inRatedWorld(t, seed, leaseFaults) })
	}
}

func leaseFaults(w *world) {
	w.deploy("1.0.0", exactlyOne)
	w.place(w.nodes[0], w.nodes[1], w.nodes[2])
	w.running(w.nodes[0], "1.0.0")
	g := w.guard()
	defer g.end()
	for round := range 8 {
		w.eventually(60*time.Second, "its owner runs it", func() bool {
			reg, _ := w.register()
			n := w.node(reg.Owner)
			return n.sup != nil && n.runs("")
		})
		w.eventually(40*time.Second, "it settles", func() bool { _, body := w.register(); return body.GetSettled() })
		reg, _ := w.register()
		owner := w.node(reg.Owner)
		what := w.leaseFault(round, owner)
		w.t.Logf("round %d, epoch %d: %s", round, reg.Epoch, what)
		w.net.Heal()
		for _, n := range w.nodes {
			if n.sup == nil {
				n.start(false)
			}
		}
		w.eventually(40*time.Second, "all are members again", func() bool {
			for _, n := range w.nodes {
				if len(n.members.Alive()) != len(w.nodes) || n.arb.HeardLeader() > time.Second {
					return false
				}
			}
			return true
		})
	}
}

func (w *world) leaderNode() *simNode {
	for _, n := range w.up() {
		if n.arb.Status().Role == "leader" && !n.clock.stopped() {
			return n
		}
	}
	return w.nodes[0]
}

func (w *world) leaseFault(round int, owner *simNode) string {
	lead := w.leaderNode()
	other := w.nodes[w.rng.IntN(len(w.nodes))]
	for other == owner {
		other = w.nodes[w.rng.IntN(len(w.nodes))]
	}
	nap := time.Duration(500+w.rng.IntN(7000)) * time.Millisecond
	switch round % 8 {
	case 0: // the owner and the leader are cut off from the others, together
		for _, n := range w.nodes {
			if n != lead && n != owner {
				w.net.Cut(n.id, lead.id, true)
				w.net.Cut(n.id, owner.id, true)
			}
		}
		time.Sleep(nap)
		return fmt.Sprintf("%s (leader) and %s (owner) cut off together for %s", lead.name, owner.name, nap)
	case 1: // the same, and the leader stands still for a while in it
		for _, n := range w.nodes {
			if n != lead && n != owner {
				w.net.Cut(n.id, lead.id, true)
				w.net.Cut(n.id, owner.id, true)
			}
		}
		if lead != owner {
			lead.freeze()
			time.Sleep(nap / 2)
			lead.thaw()
		}
		time.Sleep(nap)
		return fmt.Sprintf("%s (leader) stood still, cut off with %s (owner)", lead.name, owner.name)
	case 2:
		owner.freeze()
		time.Sleep(nap)
		owner.thaw()
		return fmt.Sprintf("%s (owner) stood still for %s", owner.name, nap)
	case 3:
		lead.freeze()
		time.Sleep(nap)
		lead.thaw()
		return fmt.Sprintf("%s (leader) stood still for %s", lead.name, nap)
	case 4:
		if _, err := w.move(owner, other); err != nil {
			return fmt.Sprintf("a move to %s that failed: %v", other.name, err)
		}
		return "a move to " + other.name
	case 5:
		w.net.Isolate(owner.id)
		time.Sleep(nap)
		return fmt.Sprintf("%s (owner) cut off for %s", owner.name, nap)
	case 6:
		time.AfterFunc(time.Duration(w.rng.IntN(40))*time.Millisecond, func() { w.net.Isolate(other.id) })
		_, err := w.move(owner, other)
		time.Sleep(nap)
		return fmt.Sprintf("a move to %s, which is cut off meanwhile: %v", other.name, err)
	}
	owner.kill()
	if lead != owner && w.rng.IntN(2) == 0 {
		time.Sleep(time.Duration(w.rng.IntN(1500)) * time.Millisecond)
		lead.kill()
	}
	time.Sleep(nap)
	return fmt.Sprintf("the death of %s (owner)", owner.name)
}

// A node that cannot renew ends the process before its lease does, whatever it still hears.
func TestALeaseThatIsNotRenewedEndsTheProcess(t *testing.T) {
	inWorld(t, 3, func(w *world) {
		n := w.nodes
		w.deploy("1.0.0", exactlyOne)
		w.place(n[2], n[0], n[1])
		w.running(n[2], "1.0.0")
		st := &n[2].sup.service(testInstance).lease
		w.net.Isolate(n[2].id)
		w.eventually(10*time.Second, "its process has ended", func() bool {
			over := len(n[2].runner.running(testInstance)) == 0
			if !over && n[2].sup.left(st) <= 0 {
				w.t.Fatal("its process runs past the end of its lease")
			}
			return over
		})
		if v, err := n[2].get(within(w.t, 500*time.Millisecond)); err == nil {
			w.t.Errorf("it answers %d", v)
		}
		w.net.Heal()
	})
}

// A process may outlive the lease for a moment, when its node stood still: nothing of it is served any more.
func TestALeaseThatHasRunOutServesNothing(t *testing.T) {
	inWorld(t, 3, func(w *world) {
		n := w.nodes[2]
		w.deploy("1.0.0", exactlyOne)
		w.place(n, w.nodes[0], w.nodes[1])
		w.running(n, "1.0.0")
		st := &n.sup.service(testInstance).lease
		w.eventually(5*time.Second, "it may serve", func() bool { return n.sup.mayServe(st) && n.sup.lease.holds() })
		n.clock.mu.Lock()
		n.clock.start = n.clock.start.Add(-10 * time.Second) // the machine slept for 10 s
		n.clock.mu.Unlock()
		if n.sup.mayServe(st) {
			t.Error("it may serve after the end of the instance's lease")
		}
		if n.sup.lease.holds() {
			t.Error("it may serve before its ownership is confirmed")
		}
	})
}

// The grade is fixed for an epoch: changed in desired state it begins the next one, in which the process goes on.
func TestAnotherTakeoverBeginsAnotherEpoch(t *testing.T) {
	scene(t, 3, func(w *world) {
		l := w.load(4, w.nodes[1], w.nodes[2])
		l.more(40)
		before := w.nodes[0].runner.running(testInstance)
		for i, leased := range []bool{true, false} {
			app := w.app()
			app.Manifest.Components[0].Guarantee = map[bool]string{true: components.ExactlyOne, false: components.Safe}[leased]
			w.putApp(app)
			w.eventually(10*time.Second, "it runs in its next epoch", func() bool {
				reg, body := w.register()
				return body.GetLeased() == leased && reg.Epoch == uint64(i+2) && w.nodes[0].runs("") && w.nodes[0].believes() == leased || !leased && !body.GetLeased()
			})
			l.more(40)
		}
		if after := w.nodes[0].runner.running(testInstance); len(after) != 1 || after[0] != before[0] {
			w.t.Error("its process was started anew")
		}
		l.end(w.nodes[1])
	})
}

// A move of an exactly-one instance gives the lease up and does not wait for its end.
func TestAMoveHandsTheLeaseOver(t *testing.T) {
	inWorld(t, 3, func(w *world) {
		n := w.nodes
		w.deploy("1.0.0", exactlyOne)
		w.place(n[0], n[1], n[2])
		w.running(n[0], "1.0.0")
		g := w.guard()
		l := w.load(4, n[2])
		l.more(40)
		begin := time.Now()
		if _, err := w.move(n[0], n[1]); err != nil {
			w.t.Fatal(err)
		}
		w.running(n[1], "1.0.0")
		if took := time.Since(begin); took > 2*time.Second {
			w.t.Errorf("the move took %s: it waited for the lease", took)
		}
		l.more(40)
		l.end(n[2])
		g.end()
	})
}

// Claims of the arbiter that must wait are not failures.
func TestAClaimThatMustWaitSaysHowLong(t *testing.T) {
	inWorld(t, 3, func(w *world) {
		n := w.nodes
		w.deploy("1.0.0", exactlyOne)
		w.place(n[0], n[1], n[2])
		w.running(n[0], "1.0.0")
		reg, _ := w.register()
		_, err := n[1].sup.claimOver(within(w.t, 5*time.Second), reg, arbiter.ClaimRequest{Body: reg.Body})
		wait, ok := errors.AsType[*arbiter.WaitError](err)
		if !ok || wait.For <= 0 || wait.For > time.Second {
			w.t.Fatalf("%v", err)
		}
		time.Sleep(2 * time.Second)
		if now, _ := w.register(); now.Epoch != reg.Epoch || !n[0].runs("") || !n[0].believes() {
			w.t.Error("a claim that was not made again cost the owner its lease")
		}
	})
}
