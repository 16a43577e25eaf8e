package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/cluster/clustertest"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

const alwaysOnApp = `application: tally
components:
  - name: counter
    artifact: counter@^1
    guarantee: always-on
`

// addAt makes counted calls at a node, each repeated until it is answered, and returns the last answer.
func (g *grove) addAt(n *cluster.Node, key string, count int) string {
	g.t.Helper()
	var value string
	for i := range count {
		g.wait(fmt.Sprintf("%s to count %s/%d", n.Name, key, i), func(ctx context.Context) (err error) {
			value, err = add(ctx, g.api(n), fmt.Sprintf("%s/%d", key, i))
			return err
		})
	}
	return value
}

// The node of an always-on component is cut off: the component runs on both sides, on the cut-off node even after its process and the whole node were
// killed there. Nothing can be deployed on that side. When the link is back there is one owner again, and what was counted on either side counts.
func TestAlwaysOnRunsOnBothSidesOfACut(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := seedIn(t, clustertest.Config{Nodes: 3, Namespaces: true})
	clustertest.Cuttable(t, g.Cluster)
	must(t, g.Up(t.Context()))
	g.waitVoters()
	n1 := g.Nodes[0]
	g.push(n1, component(t, "counter", "1.0.0"))
	g.deploy(n1, alwaysOnApp)
	in := g.running(n1, "tally/counter-0", protected(3))
	owner := g.Node(in.GetNode())
	survivor := g.others(owner)[0]
	if v := g.addAt(survivor, "before", 5); v != "5" {
		t.Fatalf("five calls count %s", v)
	}
	must(t, owner.Cut())
	if v := g.addAt(survivor, "majority", 1); v != "6" {
		t.Errorf("the side of the majority counts %s, want 6", v)
	}
	if v := g.addAt(owner, "alone", 3); v != "8" {
		t.Errorf("the node that is cut off counts %s, want 8", v)
	}
	g.refused(owner, []string{"lost touch with the majority"}, "deploy", g.file("other.yaml", strings.ReplaceAll(alwaysOnApp, "tally", "other")))

	_, err := owner.Kill()
	must(t, err)
	must(t, owner.Start(t.Context()))
	if v := g.addAt(owner, "rebooted", 2); v != "10" {
		t.Errorf("restarted without an uplink the node counts %s, want 10", v)
	}
	if v := g.addAt(owner, "alone", 3); v != "8" {
		t.Errorf("a repeat of a call that was answered before the restart says %s, want 8 as then", v)
	}

	must(t, owner.Heal())
	g.wait("both sides' counts in one", func(ctx context.Context) error {
		for _, n := range g.Nodes {
			out, err := countAt(ctx, g, n)
			if err != nil || out != "11" {
				return fmt.Errorf("%s says %s, want 11 (%w)", n.Name, out, err)
			}
		}
		return nil
	})
	if v := g.addAt(survivor, "alone", 3); v != "8" {
		t.Errorf("a repeat of a call that the other side answered says %s, want 8 as there", v)
	}
	g.wait("the branch to be told of", func(context.Context) error {
		rows := g.query(survivor, "select branch, node, outcome, checkpoints from branches")
		if len(rows) != 1 || rows[0]["outcome"] != "merged" || rows[0]["node"] != owner.Name || rows[0]["branch"] != "tally/counter-0@branch-"+owner.Name+"-1" {
			return fmt.Errorf("branches: %v", rows)
		}
		return nil
	})
	g.event(survivor, "/apps/tally", "reconciled", func(ev *apiv1.Event) bool { return ev.GetType() == "reconciled" })
	if now := g.running(survivor, "tally/counter-0", notOn(owner.Name)); now.GetEpoch() <= in.GetEpoch() {
		t.Errorf("epoch %d after %d", now.GetEpoch(), in.GetEpoch())
	}
}

// onTheWorker is an application that only a worker runs, with each of the policies for a cut.
const onTheWorker = `application: tally
require: ["node.role == 'worker'"]
components:
  - {name: counter, artifact: counter@^1, guarantee: always-on}
  - {name: stops, artifact: counter@^1, guarantee: safe}
  - {name: alone, artifact: counter@^1, guarantee: exactly-one}
`

// A node that never votes, and so has no log of what was decided, loses power and comes back without its uplink. What its policy keeps it starts by itself, from
// what it remembers, with everything that was answered; what is to stop it does not start. With the uplink back all of it runs, and nothing is lost.
func TestAWorkerRebootedWithoutItsUplinkGoesOn(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := seedIn(t, clustertest.Config{Nodes: 4, Namespaces: true, Args: func(i int) []string {
		if i == 4 {
			return []string{"--role", "worker"}
		}
		return nil
	}})
	clustertest.Cuttable(t, g.Cluster)
	must(t, g.Up(t.Context()))
	g.waitVoters()
	n1, worker := g.Nodes[0], g.Nodes[3]
	g.push(n1, component(t, "counter", "1.0.0"))
	g.deploy(n1, onTheWorker)
	for _, name := range []string{"counter", "stops", "alone"} {
		if in := g.running(n1, "tally/"+name+"-0", nil); in.GetNode() != worker.Name {
			t.Fatalf("%s runs on %s", name, in.GetNode())
		}
	}
	g.running(n1, "tally/counter-0", func(in *apiv1.Instance) error {
		if len(in.GetReplicas()) < 2 {
			return fmt.Errorf("its checkpoint is on %v", in.GetReplicas())
		}
		return nil
	})
	if v := g.addAt(n1, "before", 5); v != "5" {
		t.Fatalf("five calls count %s", v)
	}
	g.wait("the worker to show what was decided", func(ctx context.Context) error {
		ps, err := g.api(worker).Ps(ctx, &apiv1.PsRequest{Application: "tally"})
		if err == nil && len(ps.GetInstances()) != 3 {
			err = fmt.Errorf("%d instances", len(ps.GetInstances()))
		}
		return err
	})

	// It writes down what it shows within a second or so: power that fails before takes that along.
	g.wait("the worker's disk to remember it", func(context.Context) error {
		logs, err := filepath.Glob(filepath.Join(worker.Data, "raft", "*.log"))
		for _, path := range logs {
			raw, rerr := os.ReadFile(path)
			if err = errors.Join(err, rerr); bytes.Contains(raw, []byte("inst/tally/counter-0")) && bytes.Contains(raw, []byte("inst/tally/alone-0")) {
				return nil
			}
		}
		return errors.Join(err, errors.New("it is not there"))
	})
	_, err := worker.Kill()
	must(t, err)
	must(t, worker.Cut())
	must(t, worker.Start(t.Context()))
	// What its disk remembers may be a second or two old: then the last calls are not in it yet.
	if v, err := strconv.Atoi(g.addAt(worker, "rebooted", 2)); err != nil || v < 2 || v > 7 {
		t.Errorf("restarted without an uplink the worker counts %d (%v), want 2 to 7", v, err)
	}
	ps, err := g.api(worker).Ps(t.Context(), &apiv1.PsRequest{Application: "tally"})
	must(t, err)
	for _, in := range ps.GetInstances() {
		if keeps := in.GetComponent() == "tally/counter"; keeps != (in.GetState() == "running") {
			t.Errorf("without an uplink %s is %s: %s", in.GetInstance(), in.GetState(), in.GetReason())
		}
	}

	must(t, worker.Heal())
	g.wait("every node to count what the worker did alone", func(ctx context.Context) error {
		for _, n := range g.Nodes {
			if out, err := countAt(ctx, g, n); err != nil || out != "7" {
				return fmt.Errorf("%s says %s, want 7 (%w)", n.Name, out, err)
			}
		}
		return nil
	})
	for _, name := range []string{"stops", "alone"} {
		g.running(n1, "tally/"+name+"-0", nil)
	}
	if v := g.addAt(n1, "after", 1); v != "8" {
		t.Errorf("the next call counts %s, want 8", v)
	}
}

// A branch that is stored beside the state that went on is listed, and is a way to what the cut-off node did: it can be copied beside, written into a
// file and gone back to.
func TestAStoredBranchIsGoneBackToAndForked(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := seedIn(t, clustertest.Config{Nodes: 3, Namespaces: true})
	if g.Network.Kind() == cluster.Loopback {
		t.Skip("links can be cut in network namespaces only, and those are not permitted here")
	}
	must(t, g.Up(t.Context()))
	g.waitVoters()
	n1 := g.Nodes[0]
	g.push(n1, component(t, "counter", "1.0.0"))
	g.deploy(n1, keepApp)
	in := g.running(n1, "tally/counter-0", nil)
	owner := g.Node(in.GetNode())
	survivor := g.others(owner)[0]
	g.addAt(survivor, "before", 5)
	g.do(survivor, "checkpoint", "tally/counter")
	g.running(survivor, "tally/counter-0", protected(2))
	must(t, owner.Cut())
	if v := g.addAt(survivor, "majority", 1); v != "6" {
		t.Errorf("the side of the majority counts %s, want 6", v)
	}
	if v := g.addAt(owner, "alone", 3); v != "8" {
		t.Errorf("the node that is cut off counts %s, want 8", v)
	}
	g.do(owner, "checkpoint", "tally/counter")
	must(t, owner.Heal())

	name := "@branch-" + owner.Name + "-1"
	g.wait("the branch to be listed", func(context.Context) error {
		ids, why := g.checkpoints(survivor, "tally/counter")
		if at := slices.Index(ids, name); at < 0 || why[at] != "branch, kept" {
			return fmt.Errorf("listed are %v: %v", ids, why)
		}
		return nil
	})
	g.event(survivor, "/apps/tally", "branch", func(ev *apiv1.Event) bool { return ev.GetType() == "branch" })
	g.counts(survivor, "tally/counter", "6")
	g.refused(survivor, []string{"@branch-n9-1 is no branch of it", "stored are " + name, "\ntry: coppice checkpoints"}, "restore", "tally/counter", "--at", "@branch-n9-1")

	t.Log(g.do(survivor, "fork", "tally/counter", "--at", name, "--as", "alone"))
	// What the other side had sent to the owner lies in its sockets and may arrive when the cut is over, before the owner hears that it is none any more: the 1 then
	// is in the branch, too.
	branch := g.countsOneOf(survivor, "tally/alone", "8", "9")
	g.counts(survivor, "tally/counter", "6")
	file := filepath.Join(g.Dir, "branch.coppice")
	if out := g.do(survivor, "fork", "tally/counter", "--at", name, "--export", file); !strings.Contains(out, name) {
		t.Errorf("the export does not say what it is of: %s", out)
	}
	t.Log(g.do(owner, "restore", "tally/counter", "--at", "tally/counter-0"+name))
	g.counts(survivor, "tally/counter", branch)
	t.Log(g.do(owner, "undo", "tally/counter"))
	g.counts(survivor, "tally/counter", "6")
}

// keepApp goes on in a cut, and what it did alone is stored beside.
const keepApp = `application: tally
components:
  - name: counter
    artifact: counter@^1
    durable: 1s
    on_partition: keep
    reconcile: keep_majority
`

// counts waits until a counter answers a value.
func (g *grove) counts(via *cluster.Node, component, want string) {
	g.t.Helper()
	g.countsOneOf(via, component, want)
}

// countsOneOf waits until a counter answers one of some values, and returns it.
func (g *grove) countsOneOf(via *cluster.Node, component string, want ...string) (got string) {
	g.t.Helper()
	g.wait(component+" to answer "+strings.Join(want, " or "), func(context.Context) error {
		r := g.run(via, "call", component, "Get")
		at := slices.IndexFunc(want, func(v string) bool { return strings.Contains(r.out, `"`+v+`"`) })
		if r.code != 0 || at < 0 {
			return fmt.Errorf("status %d: %s%s", r.code, r.out, r.err)
		}
		got = want[at]
		return nil
	})
	return got
}

// countAt reads the counter through a node.
func countAt(ctx context.Context, g *grove, n *cluster.Node) (string, error) {
	res, err := g.api(n).Call(ctx, &apiv1.CallRequest{Component: "tally/counter", Method: "counter.v1.Counter/Get", Json: `{}`, TimeoutMs: 1000})
	if err != nil {
		return "", err
	}
	return strings.Trim(strings.TrimPrefix(strings.ReplaceAll(res.GetJson(), " ", ""), `{"value":`), `"}`), nil
}
