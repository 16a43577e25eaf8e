package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/load"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// goesOn commits something at a node and returns when it is acknowledged.
func (g *grove) goesOn(n *cluster.Node) time.Duration {
	g.t.Helper()
	begin := time.Now()
	g.wait(n.Name+" to commit", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
		defer cancel()
		c, err := n.Client()
		if err == nil {
			_, err = c.Token(ctx, &apiv1.TokenRequest{TtlMs: 60_000})
		}
		return err
	})
	return time.Since(begin)
}

func (g *grove) arbiter(n *cluster.Node) *apiv1.ArbiterStatus {
	g.t.Helper()
	st, err := g.status(g.t.Context(), n)
	must(g.t, err)
	return st.GetArbiter()
}

// leader waits until the node knows one: there is none for a moment when one has handed over, or was late.
func (g *grove) leader(n *cluster.Node) *cluster.Node {
	g.t.Helper()
	var leader *cluster.Node
	g.wait("a leader", func(ctx context.Context) error {
		st, err := g.status(ctx, n)
		if leader = g.Node(st.GetArbiter().GetLeader()); err == nil && leader == nil {
			err = fmt.Errorf("%s knows of none", n.Name)
		}
		return err
	})
	return leader
}

// Of two nodes either one is killed, under load: the other serves and commits on, nothing that was answered is lost, and the dead one
// returns, puts aside what it held, and votes again. Then the other one.
func TestTwoNodesKillEither(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 2)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "kv", "1.0.0"))
	g.deploy(n1, kvApp)
	g.running(n1, "data/kv-0", protected(2))
	p := g.press("data/kv", g.Nodes, 100, 2*time.Second)
	for round, who := range []string{"primary", "secondary", "primary"} {
		p.answered(30)
		_, err := cluster.Calm(t.Context(), n1, "data/kv")
		must(t, err)
		a := g.arbiter(n1)
		victim := g.Node(a.GetPrimary())
		if who == "secondary" {
			victim = g.others(victim)[0]
		}
		survivor := g.others(victim)[0]
		at, err := victim.Kill()
		must(t, err)
		took := g.goesOn(survivor)
		first := p.answeredBy(load.FirstQuery{After: at, Component: "data/kv", Node: survivor.Name, Writes: true})
		now := g.arbiter(survivor)
		t.Logf("round %d: the %s, %s, killed: %s commits after %s and answers after %s, in incarnation %d", round, who, victim.Name, survivor.Name,
			took.Round(time.Millisecond), first.Time.Sub(at).Round(time.Millisecond), now.GetIncarnation())
		if now.GetIncarnation() != a.GetIncarnation()+1 || now.GetLeader() != survivor.Name {
			t.Errorf("the arbiter was %v, and is %v", a, now)
		}
		must(t, victim.Start(t.Context()))
		g.waitVoters()
		if b := g.arbiter(victim); b.GetIncarnation() != now.GetIncarnation() || b.GetPrimary() != survivor.Name {
			t.Errorf("%s came back to %v", victim.Name, b)
		}
		file := filepath.Join(victim.Data, "lost+found", fmt.Sprintf("%d.json", a.GetIncarnation()))
		if raw, err := os.ReadFile(file); err != nil || !strings.Contains(string(raw), "inst/data/kv-0") {
			t.Errorf("%s does not tell what %s held: %v", file, victim.Name, err)
		}
		g.running(n1, "data/kv-0", protected(2))
	}
	p.answered(30)
	p.audit(false)
}

// Of two nodes one stands still for longer than the other waits. Silence is no proof: the primary goes on without the secondary, which follows
// when it wakes; the secondary waits for the primary, which finds everything as it was and does not go on from a peer that lives.
func TestTwoNodesSleep(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 2)
	primary := g.Node(g.arbiter(g.Nodes[0]).GetPrimary())
	secondary := g.others(primary)[0]
	_, err := secondary.Stop()
	must(t, err)
	t.Logf("the primary commits %s after the secondary fell asleep", g.goesOn(primary).Round(time.Millisecond))
	_, err = secondary.Cont()
	must(t, err)
	g.waitVoters()
	if a := g.arbiter(secondary); a.GetIncarnation() != 2 || a.GetPrimary() != primary.Name {
		t.Errorf("the secondary woke in %v", a)
	}

	_, err = primary.Stop()
	must(t, err)
	begin := time.Now()
	g.wait("the secondary to have found the primary dead, and no leader", func(ctx context.Context) error {
		st, err := g.status(ctx, secondary)
		if err == nil && (st.GetArbiter().GetLeader() != "" || st.GetNodes().GetAlive() != 1 || time.Since(begin) < 5*time.Second) {
			err = fmt.Errorf("leader %q, %v", st.GetArbiter().GetLeader(), st.GetNodes())
		}
		return err
	})
	if a := g.arbiter(secondary); a.GetIncarnation() != 2 || a.GetPaired() {
		t.Errorf("the secondary without a proof: %v", a)
	}
	_, err = primary.Cont()
	must(t, err)
	g.goesOn(secondary)
	g.waitVoters()
	if a := g.arbiter(secondary); a.GetIncarnation() != 2 {
		t.Errorf("the primary woke and went on without the secondary: %v", a)
	}
}

// Of three nodes two are killed at once: nothing is decided any more, and recover says so and why. It goes on from the survivor, with what
// it has; the dead return and follow.
func TestRecoverAfterTwoOfThree(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 3)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "kv", "1.0.0"))
	g.deploy(n1, kvApp)
	in := g.running(n1, "data/kv-0", protected(3))
	survivor := g.others(g.Node(in.GetNode()))[0]
	g.do(survivor, "call", "data/kv", "Put", `{"key":"before","value":"the loss"}`)
	g.refused(survivor, []string{"majority", "coppice status"}, "recover", "--yes")

	lost := g.others(survivor)
	must(t, cluster.Each(lost, func(n *cluster.Node) error { _, err := n.Kill(); return err }))
	g.wait("the arbiter to have no leader", func(ctx context.Context) error {
		st, err := g.status(ctx, survivor)
		if err == nil && (st.GetArbiter().GetLeader() != "" || st.GetNodes().GetAlive() != 1) {
			err = fmt.Errorf("leader %q, %d alive", st.GetArbiter().GetLeader(), st.GetNodes().GetAlive())
		}
		return err
	})
	g.refused(survivor, []string{"not confirmed", "recover --yes"}, "recover")
	if in := g.arbiter(survivor).GetIncarnation(); in != 1 {
		t.Fatalf("it was done without a yes: incarnation %d", in)
	}
	out := g.do(survivor, "recover", "--yes")
	t.Log(out)
	for _, want := range []string{survivor.Name + " *", "missing voter: " + lost[0].Name, "missing voter: " + lost[1].Name, "incarnation 2", "may be lost"} {
		if !strings.Contains(out, want) {
			t.Errorf("recover does not say %q", want)
		}
	}
	g.goesOn(survivor)
	g.running(survivor, "data/kv-0", notOn(in.GetNode()))
	if out := g.do(survivor, "call", "data/kv", "Get", `{"key":"before"}`); !strings.Contains(out, "the loss") {
		t.Errorf("after the recovery it answers %s", out)
	}

	must(t, cluster.Each(lost, func(n *cluster.Node) error { return n.Start(t.Context()) }))
	g.waitVoters()
	for _, n := range lost {
		if a := g.arbiter(n); a.GetIncarnation() != 2 {
			t.Errorf("%s is in incarnation %d", n.Name, a.GetIncarnation())
		}
		if _, err := os.Stat(filepath.Join(n.Data, "lost+found", "1.json")); err != nil {
			t.Errorf("%s put nothing aside: %v", n.Name, err)
		}
	}
	g.do(lost[0], "call", "data/kv", "Put", `{"key":"after","value":"the return"}`)
	g.wait("it to be protected again", func(ctx context.Context) error {
		in, err := g.instance(ctx, survivor, "data/kv-0")
		if err == nil && len(in.GetReplicas()) < 3 {
			err = errors.New("fewer than three holders")
		}
		return err
	})
}

// lastEntry is how far a survivor's log goes, by what recover prints.
func lastEntry(t *testing.T, out, node string) int {
	t.Helper()
	m := regexp.MustCompile(`(?m)^\s*` + node + `(?: \*)?\s+\w+\s+\d+\s+\d+\s+(\d+)\s`).FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("recover does not list %s:\n%s", node, out)
	}
	n, err := strconv.Atoi(m[1])
	must(t, err)
	return n
}

// The log that is recovered from lacks the last checkpoints of an instance, but a holder of them lives: they are adopted, and nothing that
// was answered is lost.
func TestRecoverAdoptsNewerCheckpoints(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 5)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "kv", "1.0.0"))
	g.deploy(n1, kvApp)
	in := g.running(n1, "data/kv-0", protected(3))
	laggard := g.others(g.Node(in.GetNode()))[0]
	for _, n := range g.others(g.Node(in.GetNode())) {
		if !slices.Contains(in.GetReplicas(), n.Name) {
			laggard = n
		}
	}
	_, err := laggard.Stop() // from here on it misses what is committed
	must(t, err)
	via := g.others(laggard)[0]
	for i := range 5 {
		g.do(via, "call", "data/kv", "Put", fmt.Sprintf(`{"key":"late","value":"the %d. write"}`, i))
	}
	var holder *cluster.Node
	g.wait("the index of the last checkpoint to name a holder besides the owner", func(ctx context.Context) error {
		now, err := g.instance(ctx, via, "data/kv-0")
		if err != nil {
			return err
		}
		res, err := g.api(via).DhtGet(ctx, &apiv1.DhtGetRequest{Key: "data/kv-0"})
		var x struct {
			Seq   uint64
			Nodes []string
		}
		if err == nil {
			err = json.Unmarshal(res.GetValue(), &x)
		}
		for _, name := range x.Nodes {
			if n := g.Node(name); name != now.GetNode() && name != laggard.Name {
				holder = n
			}
		}
		if err == nil && (now.GetCheckpointSeq() <= in.GetCheckpointSeq() || x.Seq < now.GetCheckpointSeq() || holder == nil) {
			err = fmt.Errorf("the index has %d at %v, the instance %d on %s", x.Seq, x.Nodes, now.GetCheckpointSeq(), now.GetNode())
		}
		return err
	})
	lost := g.others(laggard, holder)
	must(t, cluster.Each(lost, func(n *cluster.Node) error { _, err := n.Kill(); return err }))
	_, err = laggard.Cont()
	must(t, err)
	g.wait("the two that are left to see each other and no leader", func(ctx context.Context) error {
		for _, n := range []*cluster.Node{laggard, holder} {
			st, err := g.status(ctx, n)
			if err != nil || st.GetArbiter().GetLeader() != "" || st.GetNodes().GetAlive() != 2 {
				return errors.Join(err, fmt.Errorf("%s: leader %q, %v", n.Name, st.GetArbiter().GetLeader(), st.GetNodes()))
			}
		}
		return nil
	})
	out := g.do(holder, "recover", "--from", laggard.Name, "--yes")
	t.Log(out)
	for _, want := range []string{laggard.Name + " *", "recovered from " + laggard.Name} {
		if !strings.Contains(out, want) {
			t.Errorf("recover does not say %q", want)
		}
	}
	said := strings.Contains(out, "newer checkpoint: data/kv-0") || strings.Contains(out, "newer than the log: copies in the DHT") // whichever came first
	// What was sent to it while it stood still lay in its sockets, and it may have read all of that when it went on.
	if !said && lastEntry(t, out, laggard.Name) < lastEntry(t, out, holder.Name) {
		t.Error("recover does not say where the last checkpoint came from")
	}
	g.running(holder, "data/kv-0", func(now *apiv1.Instance) error {
		if slices.ContainsFunc(lost, func(n *cluster.Node) bool { return n.Name == now.GetNode() }) {
			return fmt.Errorf("it is on %s", now.GetNode())
		}
		return nil
	})
	if out := g.do(holder, "call", "data/kv", "Get", `{"key":"late"}`); !strings.Contains(out, "the 4. write") {
		t.Errorf("after the recovery it answers %s", out)
	}
	g.waitVoters()
}
