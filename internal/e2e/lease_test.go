package e2e

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/cluster/clustertest"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

const lampApp = `application: light
components:
  - name: lamp
    artifact: lamp@^1
    guarantee: exactly-one
    env: {LAMP_STORE: "%s"}
`

// The node that is the arbiter's leader and owns an exactly-one component stands still (SIGSTOP), is taken over from, and goes on: at no moment two
// processes act on the outside world, and the acts of the next owner carry a greater token.
func TestLeaderAndOwnerStandStill(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 3)
	g.waitVoters()
	store := clustertest.OpenOutside(t, nil)
	n1 := g.Nodes[0]
	g.push(n1, testProgram(t, "lamp", ""))
	g.deploy(n1, fmt.Sprintf(lampApp, store.Addr()))
	g.running(n1, "light/lamp-0", nil)
	for round := range 2 {
		at := g.Alive()[0]
		_, err := cluster.Calm(t.Context(), at, "light/lamp")
		must(t, err)
		leader := g.leader(at)
		in := g.running(at, "light/lamp-0", nil)
		if in.GetNode() != leader.Name {
			g.do(at, "move", "light/lamp", leader.Name)
			in = g.running(at, "light/lamp-0", func(in *apiv1.Instance) error {
				if in.GetNode() != leader.Name {
					return fmt.Errorf("it is on %s", in.GetNode())
				}
				return nil
			})
			_, err = cluster.Calm(t.Context(), at, "light/lamp")
			must(t, err)
		}
		before := store.Token()
		stopped, err := leader.Stop()
		must(t, err)
		g.wait("the next owner to act", func(context.Context) error {
			if now := store.Token(); now <= before {
				return fmt.Errorf("the store has seen nothing newer than token %d", now)
			}
			return nil
		})
		took := time.Since(stopped)
		if took < 2*time.Second {
			t.Errorf("the next owner acted after %s: the lease of the one before may have lasted longer", took)
		}
		if round == 1 { // as long again: what it was told to do before it stood still must not come through
			time.Sleep(took)
		}
		_, err = leader.Cont()
		must(t, err)
		t.Logf("round %d: %s, leader and owner in epoch %d, stood still; the next owner acted after %s", round, leader.Name, in.GetEpoch(), took.Round(time.Millisecond))
		must(t, g.AllAlive(t.Context()))
		g.running(at, "light/lamp-0", nil)
	}
	store.Check(t)
}

// The owner's daemon alone is killed: its component acts on as an orphan until its last grant has run out, and the next owner does not act before that,
// although the dead node's host refuses connections.
func TestOrphanOfADeadNodeIsWaitedFor(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 3)
	g.waitVoters()
	store := clustertest.OpenOutside(t, nil)
	n1 := g.Nodes[0]
	g.push(n1, testProgram(t, "lamp", ""))
	g.deploy(n1, fmt.Sprintf(lampApp, store.Addr()))
	for range 2 {
		at := g.Alive()[0]
		in, err := cluster.Calm(t.Context(), at, "light/lamp")
		must(t, err)
		owner := g.Node(in.GetNode())
		g.wait("it to act", func(context.Context) error {
			if store.Token()&(1<<32-1) != in.GetEpoch() {
				return fmt.Errorf("the store has seen token %d, it is in epoch %d", store.Token(), in.GetEpoch())
			}
			return nil
		})
		before := store.Token()
		killed := time.Now()
		g.killProcess(owner)
		g.wait("the next owner to act", func(context.Context) error {
			if now := store.Token(); now <= before {
				return fmt.Errorf("the store has seen nothing newer than token %d", now)
			}
			return nil
		})
		t.Logf("the next owner acted %s after the death of %s's daemon", time.Since(killed).Round(time.Millisecond), owner.Name)
		must(t, owner.Start(t.Context()))
		must(t, g.AllAlive(t.Context()))
	}
	store.Check(t)
}

// A planned end gives the lease up: the next owner acts as soon as the last one has ended, and not before. It seldom has to wait for the lease's end.
func TestAPlannedEndHandsTheLeaseOver(t *testing.T) {
	t.Parallel() // it mostly waits
	g := plant(t, 3)
	store := clustertest.OpenOutside(t, nil)
	n1 := g.Nodes[0]
	g.push(n1, testProgram(t, "lamp", ""))
	g.deploy(n1, fmt.Sprintf(lampApp, store.Addr()))
	var slow []string
	for _, end := range []struct {
		how string
		do  func(owner, other *cluster.Node)
	}{
		{"SIGTERM", func(owner, _ *cluster.Node) { must(t, owner.Term(t.Context())) }},
		{"coppice down", func(owner, _ *cluster.Node) {
			g.do(owner, "down") // which answers before the process has ended
			g.wait("its process to end", func(context.Context) error {
				if owner.Running() {
					return fmt.Errorf("%s runs", owner.Name)
				}
				return nil
			})
		}},
		{"coppice drain", func(owner, other *cluster.Node) { g.do(other, "drain", owner.Name) }},
	} {
		in, err := cluster.Calm(t.Context(), g.Alive()[0], "light/lamp")
		must(t, err)
		owner := g.Node(in.GetNode())
		g.wait("it to act", func(context.Context) error {
			if store.Token()&(1<<32-1) != in.GetEpoch() {
				return fmt.Errorf("the store has seen token %d, it is in epoch %d", store.Token(), in.GetEpoch())
			}
			return nil
		})
		before := store.Token()
		end.do(owner, g.Nodes[owner.Index%len(g.Nodes)])
		g.wait("the next owner to act", func(context.Context) error {
			if now := store.Token(); now <= before {
				return fmt.Errorf("the store has seen nothing newer than token %d", now)
			}
			return nil
		})
		for _, h := range store.Handovers() {
			if h.From != before {
				continue
			}
			t.Logf("%s of %s: %s", end.how, owner.Name, h)
			if h.Gap > 2*time.Second { // a lease that is not given up lasts for 2.5 s after the goodbye, and more
				slow = append(slow, fmt.Sprintf("%s of %s: %s", end.how, owner.Name, h.Gap))
			}
		}
		if !owner.Running() {
			must(t, owner.Start(t.Context()))
		}
		must(t, g.AllAlive(t.Context()))
	}
	// What was given up only the arbiter's leader knows, and the leadership may move on just then: so it is once, not again and again.
	if len(slow) > 1 {
		t.Errorf("the next owner had to wait for the end of the lease: %s", strings.Join(slow, "; "))
	}
	store.Check(t)
}
