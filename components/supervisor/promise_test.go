package supervisor

import (
	"context"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// says waits until a node shows the instance in a state, with words in its reason.
func (w *world) says(on *simNode, st components.State, words string) {
	w.t.Helper()
	w.eventually(20*time.Second, string(st)+": "+words, func() bool {
		info, _ := on.sup.Info(testInstance)
		return info.State == st && strings.Contains(info.Reason, words)
	})
}

// stays watches for a while that the instance is shown as running and nothing else.
func (w *world) stays(on *simNode, d time.Duration) {
	w.t.Helper()
	for end := time.Now().Add(d); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if info, _ := on.sup.Info(testInstance); info.State != components.Running {
			w.t.Fatalf("it is shown as %s: %s", info.State, info.Reason)
		}
	}
}

// A holder that dies is replaced before anybody is told; where it cannot be, the instance is degraded and says how many copies live, until there are as many again.
func TestMissingCopiesAreShownWhenTheyLast(t *testing.T) {
	scene(t, 5, func(w *world) {
		n := w.nodes[0]
		w.raise(n, 3)
		w.settled()
		held := func(count int) func() bool {
			return func() bool { reg, _ := w.register(); return len(reg.Holders) == count }
		}
		w.eventually(10*time.Second, "it is on three nodes", held(3))
		w.nodes[1].kill()
		w.stays(n, 10*time.Second)
		w.eventually(time.Second, "it is on three living nodes", held(3))

		reg, _ := w.register()
		for _, x := range w.up() { // nobody takes a copy any more
			if !slices.Contains(reg.Holders, x.id) {
				x.blobs.Close() //nolint:errcheck // of a test
			}
		}
		var gone *simNode
		for _, h := range reg.Holders {
			if x := w.node(h); x != n {
				gone = x
			}
		}
		gone.kill()
		w.stays(n, promiseGrace)
		w.says(n, components.Degraded, "on 2 living nodes, 3 should")
		if v, err := n.add(within(w.t, 5*time.Second)); err != nil || v != 4 {
			w.t.Errorf("it does not serve: %d, %v", v, err)
		}
		gone.start(false)
		w.says(n, components.Running, "")
	})
}

// A version that cannot do what durable promises is shown as that, with what is done in fact; the version that can is well again.
func TestWhatIsShownOfDurabilityIsWhatHolds(t *testing.T) {
	scene(t, 3, func(w *world) {
		n := w.nodes[0]
		plain := w.shelf.add(&binary{name: "counter", version: "1.1.0"})
		plain.desc.Features = slices.DeleteFunc(plain.desc.Features, func(f string) bool { return f == componentv1.FeatureTxnCalls })
		w.raise(n, 3)
		if info, _ := n.sup.Info(testInstance); info.Durable != "each-call" || !info.TxnCalls {
			w.t.Errorf("durable %s, txn-calls %v", info.Durable, info.TxnCalls)
		}
		if _, err := w.swap(n, "1.1.0"); err != nil {
			w.t.Fatal(err)
		}
		w.says(n, components.Degraded, "each-call needs the feature txn-calls")
		if info, _ := n.sup.Info(testInstance); info.Durable != components.MinInterval.String() || info.TxnCalls {
			w.t.Errorf("durable %s, txn-calls %v", info.Durable, info.TxnCalls)
		}
		if _, err := w.undo(n); err != nil {
			w.t.Fatal(err)
		}
		w.says(n, components.Running, "")
		if info, _ := n.sup.Info(testInstance); info.Durable != "each-call" {
			w.t.Errorf("durable %s", info.Durable)
		}
		w.shows(n, 3)
	})
}

// A required interface that is bound to what nobody deploys is shown, once that lasts.
func TestARequiredInterfaceThatLeadsNowhereIsShown(t *testing.T) {
	inWorld(t, 3, func(w *world) {
		n := w.nodes[0]
		w.shelf.add(&binary{name: "counter", version: "1.0.0", requires: "next"})
		bound := func(to string) {
			w.deploy("1.0.0", func(spec *componentsv1.ComponentSpec, _ *componentsv1.Application) {
				spec.Bindings = map[string]string{"next": to}
			})
		}
		bound("shop/store")
		w.place(n, w.nodes[1:]...)
		w.running(n, "1.0.0")
		w.stays(n, 2*promiseGrace)
		bound("shop/nobody")
		w.stays(n, promiseGrace-time.Second)
		w.says(n, components.Degraded, "bound to shop/nobody, which does not exist")
		bound("shop/store")
		w.says(n, components.Running, "")
	})
}

// bind does what a node's shell does.
func (s *testShell) bind(eff *components.Effective) error {
	for name, target := range eff.Spec.GetBindings() {
		if err := s.m.Bind(context.Background(), name, target); err != nil {
			return err
		}
	}
	return nil
}
