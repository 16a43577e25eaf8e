package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster/clustertest"
	"github.com/coppice-project/coppice/internal/load"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

// The owner's machine dies under load: another node answers, every answered write is there once, and no call fails. Started again, the
// machine is a member like any other and passes calls on to the new owner.
func TestOwnerKilledUnderLoad(t *testing.T) {
	g := plant(t, 3)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "kv", "1.0.0"))
	g.deploy(n1, kvApp)
	in := g.running(n1, "data/kv-0", protected(3))
	owner := g.Node(in.GetNode())
	t.Logf("%s runs it in epoch %d", owner.Name, in.GetEpoch())
	p := g.press("data/kv", g.Nodes, 200, 2*time.Second)
	at, err := owner.Kill()
	must(t, err)
	first := p.answeredBy(load.FirstQuery{After: at, Component: "data/kv", NotNode: owner.Name, Writes: true})
	t.Logf("%s answered %s after the kill", first.Node, first.Time.Sub(at).Round(time.Millisecond))
	p.answered(50)

	survivor := g.others(owner)[0]
	after := g.running(survivor, "data/kv-0", notOn(owner.Name))
	if after.GetEpoch() <= in.GetEpoch() {
		t.Errorf("epoch %d on %s, then %d on %s", in.GetEpoch(), in.GetNode(), after.GetEpoch(), after.GetNode())
	}
	ev := g.event(survivor, "/apps/data", "taken over", func(ev *apiv1.Event) bool { return ev.GetType() == "failover" })
	if ev.GetTrigger() != "neighbour" {
		t.Errorf("the take-over was triggered by %q, want neighbour: %s", ev.GetTrigger(), ev.GetMessage())
	}

	must(t, owner.Start(t.Context()))
	g.wait(owner.Name+" to be alive for all", func(ctx context.Context) error {
		for _, n := range g.Nodes {
			st, err := g.status(ctx, n)
			if err != nil || st.GetNodes().GetAlive() != 3 {
				return errors.Join(err, fmt.Errorf("%s: %v", n.Name, st.GetNodes()))
			}
		}
		return nil
	})
	p.answered(50)
	p.audit(false)
	// The one that came back sees the same owner, and what it answers is what the owner has.
	back := g.running(owner, "data/kv-0", nil)
	if back.GetEpoch() < after.GetEpoch() {
		t.Errorf("%s came back with epoch %d, it is %d", owner.Name, back.GetEpoch(), after.GetEpoch())
	}
	g.do(survivor, "call", "data/kv", "Put", `{"key":"after","value":"the return"}`)
	if out := g.do(owner, "call", "data/kv", "Get", `{"key":"after"}`); !strings.Contains(out, "the return") {
		t.Errorf("the node that came back answers %s", out)
	}
}

// A node that stood still for longer than the others wait is no owner any more when it goes on: it serves nothing of its own and commits
// nothing, and through its gateway one reads what the new owner has.
func TestSleeperDoesNotServeWhenItWakes(t *testing.T) {
	t.Parallel() // it waits most of the time
	sleeper(t, 5*time.Second)
}

// TestLongSleeperDoesNotServeWhenItWakes is the same for ten seconds.
func TestLongSleeperDoesNotServeWhenItWakes(t *testing.T) {
	long(t)
	sleeper(t, 10*time.Second)
}

func sleeper(t *testing.T, sleep time.Duration) {
	g := plant(t, 3)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "counter", "1.0.0"))
	g.deploy(n1, counterApp)
	in := g.running(n1, "tally/counter-0", protected(3))
	owner := g.Node(in.GetNode())
	survivor := g.others(owner)[0]
	for i := range 5 {
		g.wait("the counter to count", func(ctx context.Context) error {
			_, _, err := bump(ctx, survivor, fmt.Sprintf("before/%d", i))
			return err
		})
	}
	pid := g.pid("tally/counter", "tally/counter-0")
	at, err := owner.Stop()
	must(t, err)
	// Another owner answers while it sleeps, with nothing lost. The first attempt may still have reached the old one: then this repeats it.
	var epoch string
	g.wait("another owner to count", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
		defer cancel()
		value, e, err := bump(ctx, survivor, "asleep/1")
		if err != nil {
			return err
		}
		if value != "6" {
			t.Errorf("five were answered before and this is the sixth: the new owner says %s", value)
		}
		epoch = e
		if n, err := strconv.ParseUint(epoch, 10, 64); err != nil || n <= in.GetEpoch() {
			return fmt.Errorf("answered in epoch %q; the sleeper owns epoch %d", epoch, in.GetEpoch())
		}
		return nil
	})
	t.Logf("answered %s after the node fell asleep, in epoch %s", time.Since(at).Round(time.Millisecond), epoch)
	time.Sleep(time.Until(at.Add(sleep)))
	awake, err := owner.Cont()
	must(t, err)
	// From the first moment on, whatever its gateway answers is the new owner's.
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		value, e, err := count(ctx, owner)
		cancel()
		if err == nil && (value != "6" || e != epoch) {
			t.Fatalf("after it woke, %s answers %s in epoch %s; the owner has 6 in epoch %s", owner.Name, value, e, epoch)
		}
	}
	// A write through it is the new owner's too, and is counted once.
	g.wait("a write through the node that woke", func(ctx context.Context) error {
		value, e, err := bump(ctx, owner, "awake/1")
		if err == nil && (value != "7" || e != epoch) {
			t.Errorf("a write through the node that woke: %s in epoch %s", value, e)
		}
		return err
	})
	t.Logf("a write through the node that woke was answered %s after it did", time.Since(awake).Round(time.Millisecond))
	g.wait("the process that slept to end", func(context.Context) error {
		if alive(pid) {
			return fmt.Errorf("process %d runs", pid)
		}
		return nil
	})
	now := g.running(owner, "tally/counter-0", notOn(owner.Name))
	if fmt.Sprint(now.GetEpoch()) != epoch {
		t.Errorf("epoch %d now, %s when it was taken over: the node that woke took it back", now.GetEpoch(), epoch)
	}
}

// The process of a component dies under load: it answers again on the same node, with its state; no call fails or needs a second attempt.
func TestComponentProcessKilled(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 3)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "kv", "1.0.0"))
	g.deploy(n1, kvApp)
	in := g.running(n1, "data/kv-0", protected(3))
	p := g.press("data/kv", g.Nodes, 200, 20*time.Second)
	for range 2 {
		pid := g.pid("data/kv", "data/kv-0")
		must(t, syscall.Kill(pid, syscall.SIGKILL))
		at := time.Now()
		p.answeredBy(load.FirstQuery{After: at.Add(50 * time.Millisecond), Component: "data/kv", Node: in.GetNode(), Writes: true})
		g.wait("another process", func(context.Context) error {
			if now := g.pid("data/kv", "data/kv-0"); now == pid || now == 0 {
				return fmt.Errorf("pid %d", now)
			}
			return nil
		})
		p.answered(50)
	}
	p.audit(true)
	after := g.running(n1, "data/kv-0", nil)
	if after.GetNode() != in.GetNode() || after.GetEpoch() != in.GetEpoch() {
		t.Errorf("it ran on %s in epoch %d, now on %s in epoch %d: a crash is no reason to go elsewhere", in.GetNode(), in.GetEpoch(), after.GetNode(), after.GetEpoch())
	}
	g.event(n1, "/apps/data", "crashed", func(ev *apiv1.Event) bool { return ev.GetType() == "crashed" && ev.GetTrigger() == "crash" })
}

// pid of an instance's process.
func (g *grove) pid(component, instance string) int {
	g.t.Helper()
	res, err := g.api(g.Alive()[0]).Inspect(g.t.Context(), &apiv1.InspectRequest{Component: component})
	must(g.t, err)
	for _, in := range res.GetInstances() {
		if in.GetInstance() == instance {
			return int(in.GetPid())
		}
	}
	g.t.Fatalf("there is no %s", instance)
	return 0
}

// The link of the owner's machine is cut: on the other side another node answers, with nothing lost. On the cut side the old owner serves and
// commits nothing, and says why. When the link is back it is fenced, and the two sides are one cluster again.
func TestOwnerCutOff(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := seedIn(t, clustertest.Config{Nodes: 3, Namespaces: true})
	clustertest.Cuttable(t, g.Cluster)
	must(t, g.Up(t.Context()))
	g.waitVoters()
	n1 := g.Nodes[0]
	g.push(n1, component(t, "counter", "1.0.0"))
	g.deploy(n1, strings.Replace(counterApp, "    expose: {http: /}\n", "", 1))
	in := g.running(n1, "tally/counter-0", protected(3))
	owner := g.Node(in.GetNode())
	survivor := g.others(owner)[0]
	for i := range 5 {
		g.do(survivor, "call", "tally/counter", "Add", `{"n":1}`, "--key", fmt.Sprintf("before/%d", i))
	}
	must(t, owner.Cut())
	at := time.Now()
	g.wait("another owner to count", func(ctx context.Context) error {
		value, err := add(ctx, g.api(survivor), "cut/1")
		if err == nil && value != "6" {
			t.Errorf("five were answered before and this is the sixth: the new owner says %s", value)
		}
		return err
	})
	t.Logf("answered %s after the cut", time.Since(at).Round(time.Millisecond))
	// The cut side answers no write from here on; what it says is why.
	for end := time.Now().Add(2 * time.Second); time.Now().Before(end); {
		if value, err := add(t.Context(), g.api(owner), "alone/1"); err == nil {
			t.Fatalf("the node that was cut off answered a write with %s", value)
		}
	}
	g.wait("the cut-off node to say that nothing can be decided there", func(ctx context.Context) error {
		st, err := g.status(ctx, owner)
		if err == nil && (st.GetArbiter().GetLeader() != "" || len(st.GetWarnings()) == 0) {
			err = fmt.Errorf("leader %q, warnings %v", st.GetArbiter().GetLeader(), st.GetWarnings())
		}
		return err
	})
	must(t, owner.Heal())
	g.wait("all to see all again", func(ctx context.Context) error {
		for _, n := range g.Nodes {
			if a := g.nodesInState(n, "alive"); len(a) != 3 {
				return fmt.Errorf("%s sees %v", n.Name, a)
			}
		}
		return nil
	})
	var value string
	g.wait("the count through the node that was cut off", func(ctx context.Context) (err error) {
		value, err = add(ctx, g.api(owner), "cut/1") // a repeat, answered as before
		return err
	})
	if value != "6" {
		t.Errorf("the repeat of an answered call, through the node that was cut off: %s", value)
	}
	now := g.running(owner, "tally/counter-0", notOn(owner.Name))
	if out := g.do(owner, "call", "tally/counter", "Get"); now.GetEpoch() <= in.GetEpoch() || !strings.Contains(out, `"6"`) && !strings.Contains(out, `"7"`) {
		t.Errorf("in epoch %d after %d, the count is %s", now.GetEpoch(), in.GetEpoch(), out)
	}
}

// add adds one to the counter, with an idempotency key and one second's time.
func add(ctx context.Context, c apiv1connect.ControlClient, key string) (string, error) {
	res, err := c.Call(ctx, &apiv1.CallRequest{Component: "tally/counter", Method: "counter.v1.Counter/Add", Json: `{"n":1}`, IdempotencyKey: key, TimeoutMs: 1000})
	if err != nil {
		return "", err
	}
	var v struct{ Value string }
	err = json.Unmarshal([]byte(res.GetJson()), &v)
	return v.Value, err
}
