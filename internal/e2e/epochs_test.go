package e2e

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// chronicle is what all nodes ever said about who owned an instance in which epoch.
type chronicle struct {
	g *grove

	mu     sync.Mutex        // guards the fields below
	owners map[string]string // "instance epoch" -> node
	last   map[string]uint64 // "node instance" -> the epoch it said last
	wrong  []string
}

// watch asks every node all the time who owns what, until the returned function is called. That reads what was told in events, too.
func (g *grove) watch() (*chronicle, func()) {
	c := &chronicle{g: g, owners: map[string]string{}, last: map[string]uint64{}}
	ctx, cancel := context.WithCancel(g.t.Context())
	var wg sync.WaitGroup
	for _, n := range g.Nodes {
		wg.Go(func() {
			for ctx.Err() == nil {
				c.look(ctx, n)
				select {
				case <-ctx.Done():
				case <-time.After(20 * time.Millisecond):
				}
			}
		})
	}
	return c, func() {
		cancel()
		wg.Wait()
		for _, n := range g.Alive() {
			list, err := g.events(g.t.Context(), n, "/apps/")
			must(g.t, err)
			for _, ev := range list {
				if e := ev.GetFields()["epoch"]; e != "" && (ev.GetType() == "running" || ev.GetType() == "swapped") {
					c.see(ev.GetChannel(), e, ev.GetNode(), "an event at "+n.Name)
				}
			}
		}
	}
}

// look asks one node. One that is dead or asleep says nothing.
func (c *chronicle) look(ctx context.Context, n *cluster.Node) {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	cl, err := n.Client()
	if err != nil {
		return
	}
	boot := n.PID()
	ps, err := cl.Ps(ctx, &apiv1.PsRequest{})
	if err != nil || n.PID() != boot {
		return
	}
	for _, in := range ps.GetInstances() {
		if in.GetEpoch() == 0 || in.GetNode() == "" {
			continue
		}
		c.see("/apps/"+in.GetInstance(), fmt.Sprint(in.GetEpoch()), in.GetNode(), "ps at "+n.Name)
		c.mu.Lock()
		key := fmt.Sprintf("%s(%d) %s", n.Name, boot, in.GetInstance())
		if was := c.last[key]; in.GetEpoch() < was {
			c.wrong = append(c.wrong, fmt.Sprintf("%s said epoch %d of %s after epoch %d", n.Name, in.GetEpoch(), in.GetInstance(), was))
		}
		c.last[key] = in.GetEpoch()
		c.mu.Unlock()
	}
}

func (c *chronicle) see(instance, epoch, node, by string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	key := instance + " in epoch " + epoch
	if was, ok := c.owners[key]; ok && was != node {
		c.wrong = append(c.wrong, fmt.Sprintf("%s was owned by %s, and by %s as %s says", key, was, node, by))
	}
	c.owners[key] = node
}

// check fails the test if an epoch had two owners, or a node saw an epoch fall.
func (c *chronicle) check() {
	c.g.t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, w := range c.wrong[:min(len(c.wrong), 10)] {
		c.g.t.Error(w)
	}
	c.g.t.Logf("seen: %v", slices.Sorted(maps.Keys(c.owners)))
}

// Whatever dies, sleeps and returns: an epoch of an instance has one owner, each next owner has a greater one, and the ledger adds up.
func TestEpochsHaveOneOwner(t *testing.T) {
	t.Parallel() // it waits most of the time
	storm(t, 3, 4, 1)
}

// TestLongEpochsHaveOneOwner is a hundred rounds of it on five nodes.
func TestLongEpochsHaveOneOwner(t *testing.T) {
	long(t)
	storm(t, 5, 100, uint64(time.Now().UnixNano()))
}

func storm(t *testing.T, nodes, rounds int, seed uint64) {
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	g := plant(t, nodes)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "kv", "1.0.0"))
	g.deploy(n1, kvApp)
	g.running(n1, "data/kv-0", protected(3))
	c, end := g.watch()
	p := g.press("data/kv", g.Nodes, 100, 2*time.Second)
	ways := []string{"node", "process", "sleep", "component"}
	for round := range rounds {
		at := g.Alive()[rng.IntN(len(g.Alive()))]
		in, err := cluster.Calm(t.Context(), at, "data/kv") // two deaths right after a start would quarantine it
		must(t, err)
		owner, way := g.Node(in.GetNode()), ways[round%len(ways)]
		switch way {
		case "node":
			_, err = owner.Kill()
		case "process": // the component goes on as an orphan
			g.killProcess(owner)
		case "sleep":
			_, err = owner.Stop()
		case "component":
			err = syscall.Kill(int(in.GetPid()), syscall.SIGKILL)
		}
		must(t, err)
		p.answered(30)
		t.Logf("round %d: %s of %s, then on %s", round, way, owner.Name, g.running(g.others(owner)[0], "data/kv-0", nil).GetNode())
		switch way {
		case "node", "process":
			must(t, owner.Start(t.Context()))
		case "sleep":
			_, err = owner.Cont()
			must(t, err)
		}
		must(t, g.AllAlive(t.Context()))
	}
	p.answered(30)
	p.audit(false)
	end()
	c.check()
}
