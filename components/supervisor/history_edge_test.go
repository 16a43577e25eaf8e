package supervisor

import (
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
)

// With history: 0 nothing is kept, and a swap does not need it; a smaller number than before is heeded at once.
func TestNothingIsKeptWhereTheManifestSaysSo(t *testing.T) {
	scene(t, 1, func(w *world) {
		n := w.nodes[0]
		keep := func(count uint32) {
			w.deploy("1.0.0", func(spec *componentsv1.ComponentSpec, _ *componentsv1.Application) {
				spec.State = &componentsv1.State{History: proto.Uint32(count)}
			})
		}
		for range 5 {
			w.raise(n, 1)
			w.kept(n)
		}
		keep(2)
		w.eventually(20*time.Second, "two are left", func() bool { return len(w.history().GetEntries()) == 2 })
		keep(0)
		w.eventually(20*time.Second, "nothing is left", func() bool { return len(w.history().GetEntries()) == 0 })
		w.shelf.add(&binary{name: "counter", version: "1.1.0"})
		if out, err := w.swap(n, "1.1.0"); err != nil || out.Kept != "" {
			w.t.Errorf("%+v, %v", out, err)
		}
		if saved, id, err := n.sup.Keep(within(w.t, 10*time.Second), testInstance); err != nil || id != "" || saved.Seq == 0 {
			w.t.Errorf("kept as %q: %v", id, err)
		}
		if _, err := w.restore(n, id("c5")); !errors.Is(err, components.ErrNoCheckpoint) {
			w.t.Error(err)
		}
		time.Sleep(3 * time.Minute)
		if x := w.history(); len(x.GetEntries()) != 0 {
			w.t.Errorf("kept: %v", x)
		}
	})
}

// A restore that cannot be is said to be none, and the old process goes on: pages that nobody has, a history of a later version.
func TestARestoreThatFailsLeavesTheOldOneServing(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		w.raise(n, 3)
		w.kept(n)
		l := w.load(2, w.nodes...)
		l.more(20)
		forge := func(f func(x *componentsv1.History)) {
			x := w.history()
			f(x)
			body, err := proto.Marshal(x)
			if err == nil {
				_, err = n.arb.Txn(within(w.t, 10*time.Second), arbiter.TxnRequest{Then: []arbiter.Op{{Put: &arbiter.PutOp{Key: components.HistoryRegister(testInstance), Body: body}}}})
			}
			n.must(err)
		}
		forge(func(x *componentsv1.History) {
			x.Last++
			x.Entries = append(x.Entries, &componentsv1.HistoryEntry{Number: x.GetLast(), Seq: 99, Root: make32(9), Schema: 1, UnixMs: n.sup.date(), Holders: []string{n.id.String()}})
		})
		if _, err := w.restore(n, id("99")); err == nil || !strings.Contains(err.Error(), "fetch the state") {
			w.t.Errorf("without pages: %v", err)
		}
		forge(func(x *componentsv1.History) { x.Format = components.HistoryFormat + 1 })
		was := w.raw()
		if _, err := w.restore(n, id("c1")); !errors.Is(err, errNewerHistory) {
			w.t.Errorf("of a newer format: %v", err)
		}
		w.shelf.add(&binary{name: "counter", version: "1.1.0"})
		if _, err := w.swap(n, "1.1.0"); err != nil { // it stands in nobody's way
			w.t.Error(err)
		}
		if string(was) != string(w.raw()) {
			w.t.Error("a history of a newer format was changed")
		}
		l.more(20)
		l.cancel()
		l.goes.Wait()
		if l.failed != 0 {
			w.t.Errorf("%d calls failed: %v", l.failed, l.last)
		}
		w.shows(n, 3+int64(len(l.answers)))
		w.one()
	})
}

func make32(b byte) []byte {
	out := make([]byte, 32)
	for i := range out {
		out[i] = b
	}
	return out
}

// raw is the body of the history's register.
func (w *world) raw() []byte {
	w.t.Helper()
	reg, _, err := w.up()[0].arb.Read(within(w.t, 10*time.Second), components.HistoryRegister(testInstance))
	if err != nil {
		w.t.Fatal(err)
	}
	return reg.Body
}

// What runs under a lease goes back as anything else does, running or not, and two never run at once.
func TestRestoreUnderALease(t *testing.T) {
	inWorld(t, 3, func(w *world) {
		n := w.nodes[0]
		w.deploy("1.0.0", func(spec *componentsv1.ComponentSpec, _ *componentsv1.Application) {
			spec.Guarantee = components.ExactlyOne
		})
		w.place(n, w.nodes[1:]...)
		w.running(n, "1.0.0")
		w.raise(n, 2)
		c1 := w.kept(n)
		w.raise(n, 2)
		if _, err := w.restore(n, id(c1)); err != nil {
			w.t.Fatal(err)
		}
		w.shows(w.nodes[1], 2)
		w.overlay(func(o *componentsv1.Overlay) { o.Stopped = true })
		w.eventually(20*time.Second, "it is stopped", func() bool { return n.state() == components.Stopped })
		if _, err := w.undo(n); err != nil {
			w.t.Fatal(err)
		}
		w.overlay(func(o *componentsv1.Overlay) { o.Stopped = false })
		w.running(n, "1.0.0")
		w.shows(w.nodes[1], 4)
		w.one()
	})
}
