package e2e

import (
	"bufio"
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// outside is a store outside of the cluster. It takes acts with a fencing token and refuses those whose token is smaller than one it has seen.
type outside struct {
	ln net.Listener

	mu      sync.Mutex           // guards the fields below
	first   map[uint64]time.Time // by token: when the first act with it was made, by the machine's own clock
	last    map[uint64]time.Time
	highest uint64
	refused int
}

func openOutside(t *testing.T) *outside {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	o := &outside{ln: ln, first: map[uint64]time.Time{}, last: map[uint64]time.Time{}}
	t.Cleanup(func() { must(t, ln.Close()) })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return // closed
			}
			go o.serve(c)
		}
	}()
	return o
}

func (o *outside) serve(c net.Conn) {
	defer c.Close()
	for in := bufio.NewScanner(c); in.Scan(); {
		var token uint64
		var nanos int64
		if _, err := fmt.Sscan(in.Text(), &token, &nanos); err == nil {
			o.act(token, time.Unix(0, nanos))
		}
	}
}

func (o *outside) act(token uint64, at time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if token < o.highest {
		o.refused++
	}
	o.highest = max(o.highest, token)
	if first, ok := o.first[token]; !ok || at.Before(first) {
		o.first[token] = at
	}
	if at.After(o.last[token]) {
		o.last[token] = at
	}
}

func (o *outside) token() uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.highest
}

// check fails the test if acts under a greater token were made before the last one under a smaller token.
func (o *outside) check(t *testing.T) {
	t.Helper()
	o.mu.Lock()
	defer o.mu.Unlock()
	tokens := slices.Sorted(maps.Keys(o.first))
	for i, a := range tokens[:len(tokens)-1] {
		b := tokens[i+1]
		gap := o.first[b].Sub(o.last[a])
		t.Logf("token %d.%d acted until %s before token %d.%d began", a>>32, a&(1<<32-1), gap.Round(time.Millisecond), b>>32, b&(1<<32-1))
		if gap <= 0 {
			t.Errorf("acts under token %d began %s before the last one under token %d", b, -gap, a)
		}
	}
	t.Logf("%d acts reached the store late and were refused by their token", o.refused)
}

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
	store := openOutside(t)
	n1 := g.Nodes[0]
	g.push(n1, testProgram(t, "lamp", ""))
	g.deploy(n1, fmt.Sprintf(lampApp, store.ln.Addr()))
	g.running(n1, "light/lamp-0", nil)
	for round := range 2 {
		at := g.Alive()[0]
		_, err := cluster.Calm(t.Context(), at, "light/lamp")
		must(t, err)
		st, err := g.status(t.Context(), at)
		must(t, err)
		leader := g.Node(st.GetArbiter().GetLeader())
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
		before := store.token()
		stopped, err := leader.Stop()
		must(t, err)
		g.wait("the next owner to act", func(context.Context) error {
			if now := store.token(); now <= before {
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
	store.check(t)
}

// The owner's daemon alone is killed: its component acts on as an orphan until its last grant has run out, and the next owner does not act before that,
// although the dead node's host refuses connections.
func TestOrphanOfADeadNodeIsWaitedFor(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 3)
	g.waitVoters()
	store := openOutside(t)
	n1 := g.Nodes[0]
	g.push(n1, testProgram(t, "lamp", ""))
	g.deploy(n1, fmt.Sprintf(lampApp, store.ln.Addr()))
	for range 2 {
		at := g.Alive()[0]
		in, err := cluster.Calm(t.Context(), at, "light/lamp")
		must(t, err)
		owner := g.Node(in.GetNode())
		g.wait("it to act", func(context.Context) error {
			if store.token()&(1<<32-1) != in.GetEpoch() {
				return fmt.Errorf("the store has seen token %d, it is in epoch %d", store.token(), in.GetEpoch())
			}
			return nil
		})
		before := store.token()
		killed := time.Now()
		g.killProcess(owner)
		g.wait("the next owner to act", func(context.Context) error {
			if now := store.token(); now <= before {
				return fmt.Errorf("the store has seen nothing newer than token %d", now)
			}
			return nil
		})
		t.Logf("the next owner acted %s after the death of %s's daemon", time.Since(killed).Round(time.Millisecond), owner.Name)
		must(t, owner.Start(t.Context()))
		must(t, g.AllAlive(t.Context()))
	}
	store.check(t)
}
