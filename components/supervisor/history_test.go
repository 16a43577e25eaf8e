package supervisor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/blobs"
)

// restore is the command: the version that the supervisor chose, with the desired state that says so.
func (w *world) restore(on *simNode, at components.Moment) (Replaced, error) {
	w.t.Helper()
	return on.sup.Restore(within(w.t, 60*time.Second), testInstance, at, Wish{Trigger: "operator", Cause: "test"}, func(digest string) (Wish, error) {
		return w.wish(strings.TrimPrefix(digest, "sha256:counter-"))
	})
}

func id(s string) components.Moment { return components.Moment{ID: s} }

// kept keeps a checkpoint by hand.
func (w *world) kept(on *simNode) string {
	w.t.Helper()
	_, id, err := on.sup.Keep(within(w.t, 30*time.Second), testInstance)
	if err != nil || id == "" {
		w.t.Fatalf("kept as %q: %v", id, err)
	}
	return id
}

// history reads the register through the log.
func (w *world) history() *componentsv1.History {
	w.t.Helper()
	reg, ok, err := w.up()[0].arb.Read(within(w.t, 20*time.Second), components.HistoryRegister(testInstance))
	if err != nil {
		w.t.Fatal(err)
	}
	if !ok {
		return &componentsv1.History{}
	}
	x, err := ReadHistory(reg)
	if err != nil {
		w.t.Fatal(err)
	}
	return x
}

func (w *world) raise(by *simNode, times int) int64 {
	w.t.Helper()
	var v int64
	for range times {
		var err error
		if v, err = by.add(within(w.t, 20*time.Second)); err != nil {
			w.t.Fatal(err)
		}
	}
	return v
}

func (w *world) shows(by *simNode, want int64) {
	w.t.Helper()
	if v, err := by.get(within(w.t, 20*time.Second)); err != nil || v != want {
		w.t.Fatalf("the counter says %d (%v), want %d", v, err, want)
	}
}

// A restore under load: every call that was answered is whole in the state that was left, or whole in the one that goes on, and none fails. The state that was
// left is kept, and undo returns to it.
func TestRestoreUnderLoadAndBack(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		w.raise(n, 5)
		c1 := w.kept(n)
		l := w.load(6, w.nodes...)
		l.more(100)
		out, err := w.restore(n, id(c1))
		if err != nil {
			w.t.Fatal(err)
		}
		if out.Kept == "" || out.Epoch != 2 || out.From != "1.0.0" || out.To != "1.0.0" || out.Pause > 100*time.Millisecond {
			w.t.Errorf("%+v", out)
		}
		l.more(100)
		l.cancel()
		l.goes.Wait()
		after, err := n.get(within(w.t, 10*time.Second))
		if err != nil || l.failed != 0 {
			w.t.Fatalf("%v; %d calls failed: %v", err, l.failed, l.last)
		}
		if _, err := w.restore(n, id(out.Kept)); err != nil {
			w.t.Fatal(err)
		}
		left, err := n.get(within(w.t, 10*time.Second))
		if answered := int64(len(l.answers)); err != nil || (left-5)+(after-5) != answered {
			w.t.Fatalf("%d calls answered; the state left holds %d of them and the one that went on %d (%v)", answered, left-5, after-5, err)
		}
		// Undo returns to what the last restore left, and undone again, to what that left.
		for _, want := range []int64{after, left, after} {
			was, _ := w.register()
			if out, err = w.undo(n); err != nil || out.Kept == "" {
				w.t.Fatal(out, err)
			}
			w.shows(w.nodes[1], want)
			if now, _ := w.register(); now.Seq < was.Seq+1 || now.Epoch != was.Epoch+1 {
				w.t.Errorf("seq %d after %d, epoch %d after %d", now.Seq, was.Seq, now.Epoch, was.Epoch)
			}
		}
		w.raise(w.nodes[2], 1)
		w.shows(n, after+1)
		w.one()
	})
}

func TestRestoreRefusesWhatIsNotKept(t *testing.T) {
	scene(t, 1, func(w *world) {
		n := w.nodes[0]
		if _, err := w.restore(n, id("c1")); !errors.Is(err, components.ErrNoCheckpoint) {
			w.t.Errorf("of an empty history: %v", err)
		}
		start := time.Now()
		w.raise(n, 3)
		w.kept(n)
		w.raise(n, 1)
		for _, at := range []components.Moment{id("c99"), id("yesterday"), {Time: start.Add(-time.Hour)}} {
			if _, err := w.restore(n, at); !errors.Is(err, components.ErrNoCheckpoint) {
				w.t.Errorf("at %s: %v", at, err)
			}
		}
		if reg, _ := w.register(); reg.Epoch != 1 {
			w.t.Errorf("epoch %d after nothing was done", reg.Epoch)
		}
		w.shows(n, 4)
		if _, err := w.restore(n, components.Moment{Time: time.Now()}); err != nil {
			w.t.Error(err)
		}
		w.shows(n, 3)
		time.Sleep(time.Second)
		if e, err := components.Find(w.history(), components.Moment{Time: time.Now()}); err != nil || e.GetNumber() != components.Newest(w.history()).GetThen() || e.GetWhy() != components.WhyByHand {
			w.t.Errorf("the state of now is %v, %v", e, err)
		}
	})
}

// By the clock one a minute is kept while something changes, and none when nothing does; swaps keep what they leave.
func TestWhatIsKeptByTheClockAndBySwaps(t *testing.T) {
	scene(t, 1, func(w *world) {
		n := w.nodes[0]
		w.shelf.add(&binary{name: "counter", version: "1.1.0"})
		for range 50 {
			w.raise(n, 1)
			time.Sleep(6 * time.Second)
		}
		x := w.history()
		if l := len(x.GetEntries()); l < 5 || l > 6 {
			w.t.Errorf("%d entries after five minutes: %v", l, x)
		}
		time.Sleep(3 * time.Minute)
		quiet := w.history()
		time.Sleep(10 * time.Minute)
		if now := w.history(); now.GetLast() != quiet.GetLast() {
			w.t.Errorf("%d entries were made while nothing changed", now.GetLast()-quiet.GetLast())
		}
		w.raise(n, 1)
		if _, err := w.swap(n, "1.1.0"); err != nil {
			w.t.Fatal(err)
		}
		e := components.Newest(w.history())
		if e.GetWhy() != components.WhyBeforeSwap || e.GetVersion() != "1.0.0" || e.GetSchema() != 1 || e.GetBytes() == 0 || e.GetEpoch() != 1 || len(e.GetHolders()) != 1 {
			w.t.Errorf("a swap left %v", e)
		}
		if _, err := w.restore(n, id(components.CheckpointID(quiet.GetLast()))); err != nil {
			w.t.Fatal(err)
		}
		w.shows(n, 50)
		w.running(n, "1.1.0") // it can read it
	})
}

// A state of a schema that today's version cannot read comes back with the version that wrote it.
func TestRestoreTakesTheVersionThatTheSchemaDemands(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		w.shelf.add(&binary{name: "counter", version: "2.0.0", schema: 2, reads: []uint32{1}})
		w.shelf.add(&binary{name: "counter", version: "3.0.0", schema: 3, reads: []uint32{2}})
		w.raise(n, 4)
		c1 := w.kept(n)
		for _, v := range []string{"2.0.0", "3.0.0"} {
			if _, err := w.swap(n, v); err != nil {
				w.t.Fatal(err)
			}
			w.raise(n, 1)
		}
		w.settled()
		out, err := w.restore(n, id(c1))
		if err != nil || out.To != "1.0.0" {
			w.t.Fatalf("%+v, %v", out, err)
		}
		w.shows(w.nodes[1], 4)
		w.running(n, "1.0.0")
		if v := w.app().GetOverlays()["store"].GetVersion(); v != "1.0.0" {
			w.t.Errorf("version %q is desired", v)
		}
		w.raise(n, 1)
		w.settled()
		n.kill() // what it committed since is one chain with one schema
		w.eventually(20*time.Second, "a successor runs it", func() bool { return w.nodes[1].runs("1.0.0") })
		w.shows(w.nodes[1], 5)
	})
}

// Whose epoch is over keeps nothing.
func TestAStaleOwnerKeepsNothing(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		w.raise(n, 1)
		i, err := n.sup.get(testInstance)
		n.must(err)
		p, ok := i.saver().point()
		if !ok {
			w.t.Fatal("nothing is saved")
		}
		c1 := w.kept(n)
		w.raise(n, 1)
		if _, err := w.restore(n, id(c1)); err != nil { // epoch 2
			w.t.Fatal(err)
		}
		was := w.history()
		if e, err := i.hist.note(within(w.t, 10*time.Second), p, components.Token{Incarnation: 1, Epoch: 1}, components.WhyByHand); !errors.Is(err, errFenced) {
			w.t.Errorf("epoch 1 kept %v: %v", e, err)
		}
		if now := w.history(); !proto.Equal(was, now) {
			w.t.Errorf("the history was %v and is %v", was, now)
		}
	})
}

// An instance that does not run goes back, too: its state may be what it does not start with.
func TestRestoreAndUndoAtRest(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		w.raise(n, 2)
		c1 := w.kept(n)
		w.raise(n, 5)
		w.overlay(func(o *componentsv1.Overlay) { o.Stopped = true })
		w.eventually(20*time.Second, "it is stopped", func() bool { return n.state() == components.Stopped })
		out, err := w.restore(n, id(c1))
		if err != nil || out.Kept == "" {
			w.t.Fatalf("%+v, %v", out, err)
		}
		if n.state() != components.Stopped {
			w.t.Errorf("it is %s", n.state())
		}
		if _, err := w.undo(n); err != nil {
			w.t.Fatal(err)
		}
		if _, err := w.undo(n); err != nil {
			w.t.Fatal(err)
		}
		w.overlay(func(o *componentsv1.Overlay) { o.Stopped = false })
		w.running(n, "1.0.0")
		w.shows(w.nodes[1], 2)
		if _, err := w.restore(n, id(out.Kept)); err != nil {
			w.t.Fatal(err)
		}
		w.shows(w.nodes[1], 7)
	})
}

// The copies of what is kept are those of the present checkpoint: holders that die are replaced, and after the death of the owner the next one goes on.
func TestCopiesOfWhatIsKeptAreMadeAnew(t *testing.T) {
	scene(t, 5, func(w *world) {
		n := w.nodes[0]
		w.raise(n, 3)
		c1 := w.kept(n)
		w.raise(n, 3)
		whole := func() bool {
			e, err := components.Find(w.history(), id(c1))
			if err != nil {
				w.t.Fatal(err)
			}
			alive := 0
			for _, h := range idsFrom(e.GetHolders()) {
				if x := w.node(h); x.sup != nil && x.blobs.Complete(hashFrom(e.GetRoot())) {
					alive++
				}
			}
			return alive == replicas && len(e.GetHolders()) == replicas
		}
		w.eventually(30*time.Second, "it is on three nodes", whole)
		w.nodes[1].kill()
		w.eventually(60*time.Second, "a third node holds it again", func() bool { return len(w.up()) == 4 && whole() })
		n.kill()
		var owner *simNode
		w.eventually(30*time.Second, "a successor runs it", func() bool {
			for _, x := range w.up() {
				if x.runs("") {
					owner = x
				}
			}
			return owner != nil
		})
		w.shows(owner, 6)
		w.eventually(60*time.Second, "a third node holds it once more", func() bool { return len(w.up()) == 3 && whole() })
		if _, err := w.restore(owner, id(c1)); err != nil {
			w.t.Fatal(err)
		}
		w.shows(w.nodes[4], 3)
	})
}

// live has a node's collector keep what the registers name, as a node does.
func (n *simNode) live() {
	n.blobs.SetLive(func() []blobs.Hash {
		out := []blobs.Hash{}
		for _, reg := range n.arb.List(components.InstancePrefix) {
			var body componentsv1.InstanceBody
			if err := proto.Unmarshal(reg.Body, &body); err != nil {
				panic(err)
			}
			out = append(out, hashFrom(reg.Root), hashFrom(body.GetPrevious().GetRoot()), hashFrom(body.GetFallback().GetRoot()))
		}
		for _, reg := range n.arb.List(components.HistoryPrefix) {
			roots, err := HistoryRoots(reg)
			if err != nil {
				panic(err)
			}
			out = append(out, roots...)
		}
		return out
	})
}

// Hours of changes, compactions and collections later what is kept is whole on its holders, what is not is gone, and while the collector runs nobody who goes
// back finds a page missing.
func TestCollectionsLeaveWhatIsKept(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		w.shelf.add(&binary{name: "counter", version: "1.1.0", ballast: 200 << 10})
		for _, x := range w.nodes {
			x.live()
		}
		if _, err := w.swap(n, "1.1.0"); err != nil {
			w.t.Fatal(err)
		}
		w.raise(n, 7)
		c1 := w.kept(n)
		var wg sync.WaitGroup
		ctx, cancel := context.WithCancel(context.Background())
		wg.Go(func() {
			for ctx.Err() == nil {
				if _, err := n.add(within(w.t, 20*time.Second)); err != nil {
					w.t.Error(err)
					return
				}
				if pause(ctx, 3*time.Second) != nil {
					return
				}
			}
		})
		ids := []string{c1}
		for i := range 4 {
			time.Sleep(11 * time.Minute)
			if _, err := w.restore(n, id(ids[len(ids)-1])); err != nil {
				w.t.Errorf("restore %d: %v", i, err)
			}
			ids = append(ids, w.kept(n))
		}
		cancel()
		wg.Wait()
		if sw := n.blobs.Usage().LastSweep; sw.Removed == 0 && sw.Live == 0 {
			w.t.Errorf("nothing was collected: %+v", sw)
		}
		for _, e := range w.history().GetEntries() {
			for _, h := range idsFrom(e.GetHolders()) {
				if bad, err := w.node(h).blobs.Verify(within(w.t, time.Minute), hashFrom(e.GetRoot())); err != nil || len(bad) > 0 {
					w.t.Errorf("c%d on %s: %d pages are missing, %v", e.GetNumber(), w.nameOf(h), len(bad), err)
				}
			}
		}
		if _, err := w.restore(n, id(ids[len(ids)-1])); err != nil {
			w.t.Error(err)
		}
	})
}

// The history goes with its instance.
func TestTheHistoryIsRemovedWithItsInstance(t *testing.T) {
	scene(t, 1, func(w *world) {
		n := w.nodes[0]
		w.raise(n, 1)
		w.kept(n)
		app := w.app()
		app.Removing = true
		w.putApp(app)
		w.eventually(30*time.Second, "nothing is left", func() bool {
			_, inst := n.arb.Get(testKey)
			return !inst
		})
		if x := w.history(); len(x.GetEntries()) != 0 {
			w.t.Errorf("left: %v", x)
		}
	})
}

// What a crash of every disk leaves of what was kept is whole.
func TestWhatIsKeptSurvivesACrashOfAll(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		w.raise(n, 9)
		c1 := w.kept(n)
		w.raise(n, 1)
		for _, x := range w.nodes {
			x.kill()
		}
		for _, x := range w.nodes {
			x.start(false)
		}
		var owner *simNode
		w.eventually(60*time.Second, "it runs again", func() bool {
			at := slices.IndexFunc(w.nodes, func(x *simNode) bool { return x.runs("") })
			if at >= 0 {
				owner = w.nodes[at]
			}
			return at >= 0
		})
		w.shows(owner, 10)
		if _, err := w.restore(owner, id(c1)); err != nil {
			w.t.Fatal(err)
		}
		w.shows(owner, 9)
		if got := fmt.Sprint(components.Newest(w.history()).GetWhy()); got != components.WhyBeforeRestore {
			w.t.Errorf("the newest is %s", got)
		}
	})
}
