package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/cluster/clustertest"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// patient is how long a call of the tests waits before it tries another node: longer than any pause, so that no call may need it.
const patient = 20 * time.Second

type replaced struct {
	Component string  `json:"component"`
	From      string  `json:"from"`
	To        string  `json:"to"`
	PauseMs   float64 `json:"pause_ms"`
}

func (g *grove) replace(n *cluster.Node, args ...string) replaced {
	g.t.Helper()
	var r replaced
	must(g.t, json.Unmarshal([]byte(g.do(n, append(args, "-o", "json")...)), &r))
	g.t.Logf("%s: %+v", strings.Join(args, " "), r)
	return r
}

// A version is swapped under load and back again: the state stays, no call fails and none needs a second attempt. A version that never
// becomes healthy returns by itself, and then too no call fails.
func TestSwapUndoAndBrokenVersionUnderLoad(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 3)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "kv", "1.0.0"), component(t, "kv", "1.1.0"), component(t, "kv", "1.2.0", "-X main.broken=never-ready"))
	g.deploy(n1, kvApp)
	in := g.running(n1, "data/kv-0", protected(3))
	p := g.press("data/kv", g.Nodes, 200, patient)

	if r := g.replace(g.Nodes[1], "swap", "data/kv@1.1.0"); r.From != "1.0.0" || r.To != "1.1.0" || r.Component != "data/kv" {
		t.Errorf("swap: %+v", r)
	}
	p.answered(50)
	version := func(v string) func(*apiv1.Instance) error {
		return func(in *apiv1.Instance) error {
			if in.GetVersion() != v {
				return fmt.Errorf("it is at version %s, not %s", in.GetVersion(), v)
			}
			return nil
		}
	}
	g.running(n1, "data/kv-0", version("1.1.0"))
	if r := g.replace(g.Nodes[2], "undo", "data/kv"); r.From != "1.1.0" || r.To != "1.0.0" {
		t.Errorf("undo: %+v", r)
	}
	p.answered(50)
	g.running(n1, "data/kv-0", version("1.0.0"))

	// The broken one, by a command: the command says why and the old version goes on.
	g.refused(n1, []string{"1.2.0"}, "swap", "data/kv@1.2.0")
	p.answered(50)
	g.running(n1, "data/kv-0", version("1.0.0"))
	p.audit(true)
	if now := g.running(n1, "data/kv-0", nil); now.GetNode() != in.GetNode() {
		t.Errorf("it was on %s and is on %s: a swap does not move it", in.GetNode(), now.GetNode())
	}
}

// The broken version comes by a deploy: the deploy says what it waited for, an event says what was done, and the version before goes on.
func TestBrokenVersionDeployedUnderLoad(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 3)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "kv", "1.0.0"), component(t, "kv", "1.2.0", "-X main.broken=never-ready"))
	g.deploy(n1, kvApp)
	g.running(n1, "data/kv-0", protected(3))
	p := g.press("data/kv", g.Nodes, 200, patient)
	broken := g.file("broken.yaml", strings.Replace(kvApp, "kv@1.0.0", "kv@1.2.0", 1))
	g.refused(n1, []string{"data/kv-0"}, "deploy", "--wait", "--timeout", "8s", broken)
	ev := g.event(n1, "/apps/data", "the swap failed", func(ev *apiv1.Event) bool { return ev.GetType() == "swap-failed" })
	if !strings.Contains(ev.GetMessage(), "1.0.0") || ev.GetCause() == "" {
		t.Errorf("the event does not say that 1.0.0 goes on, and why: %s, %s", ev.GetMessage(), ev.GetCause())
	}
	p.answered(50)
	p.audit(true)
	in, err := g.instance(t.Context(), n1, "data/kv-0")
	must(t, err)
	if in.GetVersion() != "1.0.0" || in.GetState() != "degraded" || !strings.Contains(in.GetReason(), "1.2.0") {
		t.Errorf("it is at %s, %s: %s", in.GetVersion(), in.GetState(), in.GetReason())
	}
}

// A component moves under load, its node is drained, and leaves: no call fails and none needs a second attempt.
func TestMoveDrainLeaveUnderLoad(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 3)
	stays := g.Nodes[0]
	g.push(stays, component(t, "kv", "1.0.0"))
	g.deploy(stays, kvApp)
	in := g.running(stays, "data/kv-0", protected(3))
	to := g.others(stays, g.Node(in.GetNode()))[0]
	p := g.press("data/kv", []*cluster.Node{stays}, 200, patient)

	if r := g.replace(stays, "move", "data/kv", to.Name); r.From != in.GetNode() || r.To != to.Name {
		t.Errorf("move: %+v", r)
	}
	p.answered(50)
	moved := g.running(stays, "data/kv-0", nil)
	if moved.GetNode() != to.Name || moved.GetEpoch() <= in.GetEpoch() {
		t.Errorf("after the move it is on %s in epoch %d", moved.GetNode(), moved.GetEpoch())
	}
	g.do(stays, "unpin", "data/kv")

	g.do(stays, "drain", to.Name)
	p.answered(50)
	if now := g.running(stays, "data/kv-0", nil); now.GetNode() == to.Name {
		t.Errorf("%s is drained and still runs it", to.Name)
	}
	g.do(to, "leave")
	g.wait(to.Name+" to be gone", func(context.Context) error {
		if to.Running() {
			return errors.New("its process runs")
		}
		return nil
	})
	g.wait(to.Name+" to have left", func(context.Context) error {
		if left := g.nodesInState(stays, "left"); len(left) != 1 || left[0] != to.Name {
			return fmt.Errorf("left: %v", left)
		}
		return nil
	})
	p.answered(50)
	p.audit(true)
}

// The leader of the arbiter, which runs a component that is used, is drained: it hands the leadership over first, and when the command is done it neither
// leads nor votes nor runs anything. No call fails and none needs a second attempt. Readmitted it may vote again.
func TestDrainOfTheLeaderUnderLoad(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 4)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "kv", "1.0.0"))
	g.deploy(n1, kvApp)
	leader := g.leader(n1)
	g.moveTo(n1, "data/kv-0", leader.Name)
	g.running(n1, "data/kv-0", protected(3))
	if overlay := g.run(n1, "unpin", "data/kv"); overlay.code != 0 {
		t.Logf("it was there already: %s", overlay.err)
	}
	rest := g.others(leader)
	p := g.press("data/kv", rest, 50, patient)
	r := g.run(rest[0], "drain", leader.Name)
	handed, moved := strings.Index(r.err, "handed the leadership over"), strings.Index(r.err, "data/kv-0 moved")
	if strings.Contains(r.out, "0 instances moved") { // placement, which was let again, had moved it before
		moved = handed
	}
	if r.code != 0 || handed < 0 || moved < handed || !strings.Contains(r.out, "moved") || strings.Contains(r.out, "voting") {
		t.Errorf("drain: status %d\n%s%s", r.code, r.err, r.out)
	}
	for _, n := range g.Nodes {
		// What a node says of the group is a hint, its own too: its raft, to which nobody talks any more, may have the last word for a moment.
		g.wait(n.Name+" to know", func(context.Context) error {
			if a := g.arbiter(n); a.GetLeader() == "" || a.GetLeader() == leader.Name || slices.Contains(a.GetVoters(), leader.Name) || len(a.GetVoters()) != 3 {
				return fmt.Errorf("%s leads, %v vote", a.GetLeader(), a.GetVoters())
			}
			return nil
		})
	}
	p.answered(50)
	if in := g.running(rest[0], "data/kv-0", nil); in.GetNode() == leader.Name {
		t.Errorf("%s is drained and runs it", leader.Name)
	}
	p.audit(true)

	g.do(rest[0], "readmit", leader.Name)
	_, err := rest[0].Kill()
	must(t, err)
	g.wait("its vote to be the third again", func(context.Context) error {
		if a := g.arbiter(rest[1]); len(a.GetVoters()) != 3 || !slices.Contains(a.GetVoters(), leader.Name) {
			return fmt.Errorf("%v vote", a.GetVoters())
		}
		return nil
	})
}

// A node that alone may vote is emptied and goes on voting; it does not leave.
func TestDrainOfTheOnlyVoter(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := seedIn(t, clustertest.Config{Nodes: 2, Args: func(i int) []string {
		return []string{"--role", []string{"full", "worker"}[i-1]}
	}})
	must(t, g.Up(t.Context()))
	n1, n2 := g.Nodes[0], g.Nodes[1]
	g.push(n1, component(t, "counter", "1.0.0"))
	g.deploy(n1, counterApp)
	g.moveTo(n1, "tally/counter-0", "n1")
	g.running(n1, "tally/counter-0", protected(2))
	g.counted(n1, 3)
	if r := g.run(n1, "unpin", "tally/counter"); r.code != 0 {
		t.Logf("it was there already: %s", r.err)
	}
	if out := g.do(n2, "drain", "n1"); !strings.Contains(out, "1 instance moved") || !strings.Contains(out, "n1: it goes on voting, for no other node may") {
		t.Errorf("drain: %s", out)
	}
	g.running(n2, "tally/counter-0", notOn("n1"))
	g.shows(n2, 3)
	g.refused(n1, []string{"no other node may vote", "\ntry: "}, "leave")
	if a := g.arbiter(n2); a.GetLeader() != "n1" || !n1.Running() {
		t.Errorf("%s leads", a.GetLeader())
	}
}

// A node that has components leaves while they are used: they move with their state first.
func TestLeaveOfTheOwnerUnderLoad(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 3)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "kv", "1.0.0"))
	g.deploy(n1, kvApp)
	in := g.running(n1, "data/kv-0", protected(3))
	owner := g.Node(in.GetNode())
	rest := g.others(owner)
	p := g.press("data/kv", rest, 200, patient)
	g.do(owner, "leave")
	p.answered(50)
	after := g.running(rest[0], "data/kv-0", notOn(owner.Name))
	p.answered(50)
	p.audit(true)
	if after.GetEpoch() <= in.GetEpoch() {
		t.Errorf("epoch %d, then %d", in.GetEpoch(), after.GetEpoch())
	}
}
