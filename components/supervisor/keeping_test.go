package supervisor

import (
	"strings"
	"testing"
	"time"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
)

// state sets how the store's state is kept.
func keptBy(st *componentsv1.State) func(*componentsv1.ComponentSpec, *componentsv1.Application) {
	return func(spec *componentsv1.ComponentSpec, _ *componentsv1.Application) { spec.State = st }
}

// As many nodes keep each checkpoint as the manifest says, and another number takes effect with the next deploy: what is missing is made without a new checkpoint.
func TestAsManyKeepACheckpointAsTheManifestSays(t *testing.T) {
	inWorld(t, 5, func(w *world) {
		n := w.nodes
		w.deploy("1.0.0", keptBy(&componentsv1.State{Replicas: 1}))
		w.place(n[0], n[1], n[2])
		w.running(n[0], "1.0.0")
		ctx := within(w.t, time.Minute)
		for want := int64(1); want <= 3; want++ {
			if v, err := n[1].add(ctx); err != nil || v != want {
				w.t.Fatalf("%d, %v", v, err)
			}
		}
		if reg, _ := w.register(); len(reg.Holders) != 1 || reg.W != 1 || reg.Holders[0] != n[0].id {
			w.t.Errorf("%d holders, %d acknowledge: want the owner alone", len(reg.Holders), reg.W)
		}
		for _, c := range []struct{ replicas, least, acks int }{{5, 0, 3}, {4, 4, 4}, {2, 0, 2}, {3, 1, 1}} {
			w.deploy("1.0.0", keptBy(&componentsv1.State{Replicas: uint32(c.replicas), MinReplicas: uint32(c.least)}))
			w.eventually(20*time.Second, "its checkpoint has the copies", func() bool {
				reg, _ := w.register()
				return len(reg.Holders) >= c.replicas && w.heldBy(testKey, n[0], c.replicas)
			})
			if _, err := n[1].add(ctx); err != nil {
				w.t.Fatal(err)
			}
			if reg, _ := w.register(); len(reg.Holders) < c.acks || int(reg.W) != c.acks {
				w.t.Errorf("%+v: a checkpoint has %d holders, %d acknowledged it", c, len(reg.Holders), reg.W)
			}
		}
	})
}

// With fewer nodes than must keep it no write is answered, and what is shown says so. It goes on when there are enough again; nothing is lost or done twice.
func TestBelowMinReplicasWritesWaitAndThatIsShown(t *testing.T) {
	inWorld(t, 5, func(w *world) {
		n := w.nodes
		w.deploy("1.0.0", keptBy(&componentsv1.State{Replicas: 4, MinReplicas: 4}))
		w.place(n[0], n[1], n[2])
		w.running(n[0], "1.0.0")
		if v, err := n[0].add(within(w.t, 10*time.Second)); err != nil || v != 1 {
			w.t.Fatalf("%d, %v", v, err)
		}
		n[3].kill()
		w.eventually(10*time.Second, "its death is seen", func() bool { return len(n[0].members.Alive()) == 4 })
		if v, err := n[0].add(within(w.t, 10*time.Second)); err != nil || v != 2 {
			w.t.Fatalf("four of five live, which is enough: %d, %v", v, err)
		}
		w.eventually(20*time.Second, "the fifth keeps it instead", func() bool { return w.heldBy(testKey, n[4], 4) })
		n[4].kill()
		w.eventually(10*time.Second, "its death is seen", func() bool { return len(n[0].members.Alive()) == 3 })
		answered := make(chan int64, 1)
		go func() {
			v, err := n[0].add(within(w.t, 5*time.Minute))
			if err != nil {
				v = -1
			}
			answered <- v
		}()
		w.eventually(20*time.Second, "it says that its promise does not hold", func() bool { return n[0].state() == components.Degraded })
		if info, _ := n[0].sup.Info(testInstance); !strings.Contains(info.Reason, "3 holders are alive, 4 must acknowledge") {
			w.t.Errorf("it says %q", info.Reason)
		}
		select {
		case v := <-answered:
			w.t.Fatalf("answered %d with three nodes alive", v)
		default:
		}
		n[3].start(false)
		if v := <-answered; v != 3 {
			w.t.Errorf("answered %d once there were four again, want 3", v)
		}
		w.eventually(20*time.Second, "all is well", func() bool { return n[0].runs("1.0.0") })
		if v, err := n[0].get(within(w.t, 10*time.Second)); err != nil || v != 3 {
			w.t.Errorf("it has %d, %v", v, err)
		}
	})
}

// Fewer copies than the manifest says are shown although there are no nodes for more: the promise does not hold.
func TestFewerReplicasThanSaidAreShown(t *testing.T) {
	inWorld(t, 3, func(w *world) {
		n := w.nodes
		w.deploy("1.0.0", keptBy(&componentsv1.State{Replicas: 4}))
		w.place(n[0], n[1], n[2])
		w.eventually(20*time.Second, "it says so", func() bool {
			info, _ := n[0].sup.Info(testInstance)
			return info.State == components.Degraded && strings.Contains(info.Reason, "is on 3 living nodes, 4 should keep it")
		})
		if v, err := n[0].add(within(w.t, 10*time.Second)); err != nil || v != 1 {
			w.t.Errorf("it does not answer: %d, %v", v, err)
		}
	})
}

// With two copies one is in the other zone, whoever the successors are.
func TestTwoReplicasAreInTwoZones(t *testing.T) {
	inZones(t, []string{"a", "a", "a", "b"}, func(w *world) {
		n := w.nodes
		w.deploy("1.0.0", keptBy(&componentsv1.State{Replicas: 2}))
		w.place(n[0], n[1], n[2])
		w.running(n[0], "1.0.0")
		if _, err := n[0].add(within(w.t, 10*time.Second)); err != nil {
			w.t.Fatal(err)
		}
		w.eventually(20*time.Second, "the node of the other zone has it", func() bool { return w.heldBy(testKey, n[3], 2) })
	})
}
