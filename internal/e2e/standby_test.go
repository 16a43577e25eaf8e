package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/load"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// processesOf lists the processes of an instance on a node: their node socket has its name.
func processesOf(t *testing.T, n *cluster.Node, instance string) []int {
	t.Helper()
	pids, err := n.Components()
	must(t, err)
	sum := sha256.Sum256([]byte(instance))
	folder := []byte("/" + hex.EncodeToString(sum[:4]) + "/")
	return slices.DeleteFunc(pids, func(pid int) bool {
		env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		return err != nil || !bytes.Contains(env, folder) // it is gone, or another's
	})
}

const hotApp = kvApp + "    state: {standby: hot}\n"

// ready wants a standby on the node that would take the instance over.
func ready(in *apiv1.Instance) error {
	if in.GetStandbyNode() == "" || in.GetStandbyNode() != in.GetWouldRestartOn() {
		return fmt.Errorf("its standby is on %q, it would restart on %q", in.GetStandbyNode(), in.GetWouldRestartOn())
	}
	return nil
}

// The owner's machine dies under load, and the process that stood by elsewhere answers: every answered write is there once, no call fails. Then another one
// stands by. A standby whose process is killed is built again, and what is deployed as cold has none.
func TestAHotStandbyAnswers(t *testing.T) {
	g := plant(t, 3)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "kv", "1.0.0"))
	g.deploy(n1, hotApp)
	g.running(n1, "data/kv-0", ready)
	p := g.press("data/kv", g.Nodes, 200, 2*time.Second)
	p.answered(100)
	_, err := cluster.Calm(t.Context(), n1, "data/kv")
	must(t, err)
	in := g.running(n1, "data/kv-0", ready)
	owner, next := g.Node(in.GetNode()), g.Node(in.GetStandbyNode())
	if out := g.do(n1, "ps", "data"); !strings.Contains(out, next.Name+" (hot") {
		t.Errorf("ps does not show the standby:\n%s", out)
	}
	if out := g.do(n1, "inspect", "data/kv"); !strings.Contains(out, "hot on "+next.Name) {
		t.Errorf("inspect does not show the standby:\n%s", out)
	}
	g.do(n1, "call", "data/kv", "Put", `{"key":"twice","value":"first"}`, "--key", "one key")
	at, err := owner.Kill()
	must(t, err)
	first := p.answeredBy(load.FirstQuery{After: at, Component: "data/kv", NotNode: owner.Name, Writes: true})
	t.Logf("%s answered %s after the kill; %s had the standby", first.Node, first.Time.Sub(at).Round(time.Millisecond), next.Name)
	p.answered(50)
	survivor := g.others(owner)[0]
	// On a busy machine the first successor may be late, and the second one claims.
	to := g.event(survivor, "/apps/data", "failover", func(ev *apiv1.Event) bool { return ev.GetType() == "failover" }).GetFields()["to"]
	if to == next.Name {
		ev := g.event(survivor, "/apps/data", "running", func(ev *apiv1.Event) bool { return ev.GetType() == "running" && ev.GetNode() == to })
		if ev.GetFields()["standby"] != "hot" {
			t.Errorf("%s did not take over with its standby: %s", to, ev.GetMessage())
		}
	}
	// What was answered under a key went along: the same request gets the same answer, another one under that key is refused.
	g.do(survivor, "call", "data/kv", "Put", `{"key":"twice","value":"first"}`, "--key", "one key")
	g.refused(survivor, []string{"the key was used before for a different request"}, "call", "data/kv", "Put", `{"key":"twice","value":"second"}`, "--key", "one key")
	if out := g.do(survivor, "call", "data/kv", "Get", `{"key":"twice"}`); !strings.Contains(out, "first") {
		t.Errorf("under one key two requests had effects: %s", out)
	}
	must(t, owner.Start(t.Context()))
	again := g.running(survivor, "data/kv-0", ready)
	if again.GetNode() == owner.Name {
		t.Errorf("it runs on %s again: its death was no reason to come back", again.GetNode())
	}
	p.answered(50)
	p.audit(false)

	_, err = cluster.Calm(t.Context(), survivor, "data/kv")
	must(t, err)
	waiting := g.Node(g.running(survivor, "data/kv-0", ready).GetStandbyNode())
	one := func(not int) (pid int) {
		g.wait("one process that stands by", func(context.Context) error {
			now := processesOf(t, waiting, "data/kv-0")
			if len(now) != 1 || now[0] == not {
				return fmt.Errorf("processes %v on %s", now, waiting.Name)
			}
			pid = now[0]
			return nil
		})
		return pid
	}
	old := one(0)
	must(t, syscall.Kill(old, syscall.SIGKILL))
	one(old)
	g.deploy(n1, kvApp)
	g.wait("the standby to end", func(context.Context) error {
		if now := processesOf(t, waiting, "data/kv-0"); len(now) != 0 {
			return fmt.Errorf("processes %v", now)
		}
		return nil
	})
}

// With fewer living nodes than must keep a checkpoint no write is answered, and ps says why; with enough of them it is, once.
func TestBelowMinReplicasNothingIsAnswered(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 5)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "counter", "1.0.0"))
	g.deploy(n1, strings.Replace(counterApp, "    expose: {http: /}\n", "    state: {replicas: 4, min_replicas: 4}\n", 1))
	in := g.running(n1, "tally/counter-0", protected(4))
	owner := g.Node(in.GetNode())
	g.do(owner, "call", "tally/counter", "Add", `{"n":1}`, "--key", "before")
	lost := g.others(owner)[:2]
	for _, n := range lost {
		_, err := n.Kill()
		must(t, err)
	}
	g.wait("two deaths to be seen", func(ctx context.Context) error {
		st, err := g.status(ctx, owner)
		if err == nil && st.GetNodes().GetAlive() != 3 {
			err = fmt.Errorf("%v", st.GetNodes())
		}
		return err
	})
	if value, err := add(t.Context(), g.api(owner), "below"); err == nil {
		t.Errorf("with three living nodes a write was answered with %s, four have to keep it", value)
	}
	g.wait("ps to say that the promise does not hold", func(ctx context.Context) error {
		in, err := g.instance(ctx, owner, "tally/counter-0")
		if err == nil && (in.GetState() != "degraded" || !strings.Contains(in.GetReason(), "3 holders are alive, 4 must acknowledge")) {
			err = fmt.Errorf("it is %s: %s", in.GetState(), in.GetReason())
		}
		return err
	})
	must(t, lost[0].Start(t.Context()))
	g.running(owner, "tally/counter-0", protected(4))
	g.wait("the write to be answered", func(ctx context.Context) error {
		value, err := add(ctx, g.api(owner), "below")
		if err == nil && value != "2" {
			t.Errorf("the second write made it %s", value)
		}
		return err
	})
}
