package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
)

// counted makes the counter say n, by keyed calls, and waits until it does.
func (g *grove) counted(via *cluster.Node, n int) {
	g.t.Helper()
	for i := range n {
		g.wait("the counter to count", func(ctx context.Context) error {
			_, _, err := bump(ctx, via, fmt.Sprintf("count/%d", i+1))
			return err
		})
	}
}

// shows waits until the counter answers at a node's gateway and wants it to be n.
func (g *grove) shows(via *cluster.Node, n int) {
	g.t.Helper()
	g.wait("the counter to answer at "+via.Name, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
		defer cancel()
		value, _, err := count(ctx, via)
		if err == nil && value != fmt.Sprint(n) {
			g.t.Fatalf("the counter says %s at %s; %d were counted", value, via.Name, n)
		}
		return err
	})
}

// The whole cluster is put down and started again: each component is where it was, with its state, however seldom that is saved otherwise.
func TestDownAllAndUpAgain(t *testing.T) {
	t.Parallel() // it waits most of the time
	downAndUp(t, 3, "1h")
}

// TestTwoNodesDownAllAndUpAgain is the same with two, of which the one that goes down last may have gone on alone for a moment.
func TestTwoNodesDownAllAndUpAgain(t *testing.T) { downAndUp(t, 2, "each-call") }

func downAndUp(t *testing.T, nodes int, durable string) {
	g := plant(t, nodes)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "counter", "1.0.0"))
	g.deploy(n1, strings.Replace(counterApp, "durable: each-call", "durable: "+durable, 1))
	in := g.running(n1, "tally/counter-0", protected(nodes))
	g.counted(g.Nodes[nodes-1], 7)

	g.do(g.Nodes[1], "down", "--all")
	g.wait("every process to end", func(context.Context) error {
		if alive := g.Alive(); len(alive) > 0 {
			return fmt.Errorf("%d still run", len(alive))
		}
		return nil
	})
	for _, n := range g.Nodes {
		if g.logged(n, "level=ERROR") > 0 {
			t.Errorf("%s went down with errors in its log", n.Name)
		}
	}
	must(t, cluster.Each(g.Nodes, func(n *cluster.Node) error { return n.Start(t.Context()) }))
	g.waitVoters()
	for _, n := range g.Nodes {
		g.shows(n, 7)
	}
	if now := g.running(n1, "tally/counter-0", nil); now.GetNode() != in.GetNode() {
		t.Errorf("it was on %s and came back on %s", in.GetNode(), now.GetNode())
	}
	g.wait("the cluster to be no longer paused", func(ctx context.Context) error {
		st, err := g.status(ctx, n1)
		if err == nil && st.GetPaused() {
			err = errors.New("it is paused")
		}
		return err
	})
}

// Every node is killed at the same moment under load and started again: every answered write is there, once.
func TestAllKilledAtOnce(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 3)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "kv", "1.0.0"))
	g.deploy(n1, kvApp)
	in := g.running(n1, "data/kv-0", protected(3))
	p := g.press("data/kv", g.Nodes, 200, 2*time.Second)
	p.answered(50)
	must(t, cluster.Each(g.Nodes, func(n *cluster.Node) error { _, err := n.Kill(); return err }))
	begin := time.Now()
	must(t, cluster.Each(g.Nodes, func(n *cluster.Node) error { return n.Start(t.Context()) }))
	p.answered(50)
	t.Logf("answered again %s after all were started", time.Since(begin).Round(time.Millisecond))
	p.audit(false)
	g.waitVoters()
	if now := g.running(n1, "data/kv-0", nil); now.GetEpoch() <= in.GetEpoch() {
		t.Errorf("epoch %d before, %d now: an epoch must not be served by two processes of a node", in.GetEpoch(), now.GetEpoch())
	}
}

// One node alone is killed, its components left behind as orphans, and started again at once: no orphan serves beside the new process.
func TestOneNodeAloneKilledAndStartedAgain(t *testing.T) {
	g := plant(t, 1)
	n := g.Nodes[0]
	g.push(n, component(t, "counter", "1.0.0"))
	g.deploy(n, counterApp)
	g.counted(n, 4)
	orphan := g.pid("tally/counter", "tally/counter-0")
	g.killProcess(n)
	must(t, n.Start(t.Context()))
	g.shows(n, 4)
	if now := g.pid("tally/counter", "tally/counter-0"); now == orphan {
		t.Errorf("process %d of the killed node still serves", orphan)
	}
	g.wait("the orphan to end", func(context.Context) error {
		if alive(orphan) {
			return fmt.Errorf("process %d runs", orphan)
		}
		return nil
	})
	g.counted(n, 5) // four of them are repeats
	g.shows(n, 5)
}
