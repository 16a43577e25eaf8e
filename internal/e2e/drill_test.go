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

// drill runs the command and reads what it says.
func (g *grove) drill(n *cluster.Node, args ...string) *apiv1.DrillUpdate {
	g.t.Helper()
	out := &apiv1.DrillUpdate{}
	must(g.t, json.Unmarshal([]byte(g.do(n, append([]string{"drill", "-o", "json"}, args...)...)), out))
	return out
}

// moveTo has an instance run on a node.
func (g *grove) moveTo(via *cluster.Node, instance, node string) {
	g.t.Helper()
	if g.running(via, instance, nil).GetNode() == node {
		return
	}
	g.do(via, "move", instance, node)
	g.running(via, instance, func(in *apiv1.Instance) error {
		if in.GetNode() != node {
			return fmt.Errorf("on %s", in.GetNode())
		}
		return nil
	})
}

// Two zones, with two of three voters in one: it is said beforehand that the loss of that zone would stop writes, and that the loss of the
// other would not. Then the other is really killed, and what was predicted comes true.
func TestDrillOfAZone(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := seedIn(t, clustertest.Config{Nodes: 3, Args: func(i int) []string {
		return []string{"--zone", []string{"attic", "cellar"}[i/3]} // n3 is in the cellar
	}})
	must(t, g.Up(t.Context()))
	g.waitVoters()
	n1, n3 := g.Nodes[0], g.Nodes[2]
	g.push(n1, component(t, "counter", "1.0.0"))
	g.deploy(n1, counterApp)
	g.running(n1, "tally/counter-0", protected(3))
	g.counted(n1, 5)

	if d := g.drill(n1, "--zone", "attic"); !d.WritesStop || d.Cure == "" || d.VotersLeft != 1 || !slices.Equal(d.Lost, []string{"n1", "n2"}) {
		t.Errorf("the loss of the zone with two voters: %v", d)
	}
	for _, command := range []string{"status", "doctor"} {
		if out := g.run(n1, command).out; !strings.Contains(out, "zone attic") || strings.Contains(out, "zone cellar") {
			t.Errorf("%s does not say which zone's loss stops writes:\n%s", command, out)
		}
	}
	plan := g.do(n1, "plan", g.file("manifest.yaml", strings.Replace(counterApp, "each-call", "1s", 1)))
	if !strings.Contains(plan, "zone attic: 2 of 3 voters are in it: its loss would stop all writes") || strings.Contains(plan, "zone cellar") {
		t.Errorf("plan does not warn of the zone whose loss stops writes:\n%s", plan)
	}
	if d := g.drill(n1, "--zone", "cellar"); d.WritesStop || d.VotersLeft != 2 || !slices.Equal(d.Lost, []string{"n3"}) {
		t.Errorf("the loss of the zone with one voter: %v", d)
	}
	g.refused(n1, []string{"no node of that zone", "attic", "cellar"}, "drill", "--zone", "roof")
	g.refused(n1, []string{"no member has this name", "n1"}, "drill", "n9")
	if r := g.run(n1, "drill"); r.code != 2 {
		t.Errorf("drill of nothing: status %d %s", r.code, r.err)
	}
	if len(g.Alive()) != 3 {
		t.Fatal("a drill that was not for real killed somebody")
	}

	g.moveTo(n1, "tally/counter-0", "n3")
	g.running(n1, "tally/counter-0", protected(3))
	if out := g.do(n1, "move", "counter", "n3"); !strings.Contains(out, "runs on n3 already, and stays there") {
		t.Errorf("moved to where it is: %s", out)
	}
	for _, channel := range []string{"/apps/tally/counter", "/apps/tally/counter-0", "apps/tally"} {
		g.wait("the events of "+channel+" at n2", func(context.Context) error {
			if out := g.do(g.Nodes[1], "events", channel); !strings.Contains(out, "/apps/tally/counter-0 running") || strings.Contains(out, "/nodes/") {
				return errors.New(out)
			}
			return nil
		})
	}
	if out := g.do(g.Nodes[1], "events", "/apps/tally/count"); out != "" {
		t.Errorf("events of a component that is not there: %s", out)
	}
	g.refused(n3, []string{"n3, which is asked", "on n1"}, "drill", "--zone", "cellar", "--really") // who would tell?
	d := g.drill(n1, "--zone", "cellar", "--really")
	if n3.Running() {
		t.Error("n3 still runs")
	}
	if !d.Done || d.WritesStop || d.CommitMs == nil {
		t.Fatalf("for real: %v", d)
	}
	at := slices.IndexFunc(d.Instances, func(in *apiv1.DrillInstance) bool { return in.Instance == "tally/counter-0" })
	if at < 0 {
		t.Fatalf("the counter is not among the lost: %v", d)
	}
	in := d.Instances[at]
	if in.To == "" || in.CameTo != in.To || in.TookMs == nil || in.PredictedMs == nil || in.GetWouldLoseMs() != 0 {
		t.Errorf("the counter: %v", in)
	}
	g.shows(n1, 5)
	g.refused(n1, []string{"no node would be left to tell"}, "drill", "--zone", "attic", "--really")
	if len(g.Alive()) != 2 {
		t.Error("a refused drill killed somebody")
	}
}

// Three nodes are in one zone and two in another: wherever the component runs, a copy of its state is in the other zone, too, and it goes on there
// when all nodes of its own are killed.
func TestCopiesAreSpreadOverZones(t *testing.T) {
	t.Parallel() // it waits most of the time
	zones := map[string]string{"n1": "attic", "n2": "attic", "n3": "attic", "n4": "cellar", "n5": "cellar"}
	g := seedIn(t, clustertest.Config{Nodes: 5, Args: func(i int) []string { return []string{"--zone", zones[fmt.Sprint("n", i)]} }})
	must(t, g.Up(t.Context()))
	g.waitVoters()
	n1 := g.Nodes[0]
	g.push(n1, component(t, "counter", "1.0.0"))
	g.deploy(n1, counterApp)
	spread := func(in *apiv1.Instance) error {
		for _, h := range in.GetReplicas() {
			if zones[h] != zones[in.GetNode()] {
				return nil
			}
		}
		return fmt.Errorf("on %s with copies on %v", in.GetNode(), in.GetReplicas())
	}
	for i, node := range []string{"n1", "n4", "n2", "n5"} {
		g.moveTo(n1, "tally/counter-0", node)
		g.addAt(n1, fmt.Sprint("spread/", i), 1)
		g.running(n1, "tally/counter-0", spread)
	}
	g.moveTo(n1, "tally/counter-0", "n5")
	g.addAt(n1, "spread/last", 1)
	g.running(n1, "tally/counter-0", spread)
	must(t, cluster.Each(g.Nodes[3:], func(n *cluster.Node) error { _, err := n.Kill(); return err })) // two of five voters: the others decide
	g.shows(n1, 5)
}

// Of two nodes the loss of the primary's power would stop writes and that of the secondary's would not; a process that is killed is survived
// by either.
func TestDrillOfTwoNodes(t *testing.T) {
	g := plant(t, 2)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "counter", "1.0.0"))
	g.deploy(n1, counterApp+"  - name: each\n    artifact: counter\n    count: each-node\n    durable: none\n")
	g.running(n1, "tally/counter-0", protected(2))
	primary := g.Node(g.arbiter(n1).GetPrimary())
	secondary := g.others(primary)[0]
	if d := g.drill(n1, primary.Name); !d.WritesStop {
		t.Errorf("the loss of the primary: %v", d)
	}
	if d := g.drill(n1, secondary.Name); d.WritesStop {
		t.Errorf("the loss of the secondary: %v", d)
	}
	d := g.drill(secondary, primary.Name, "--really")
	if d.WritesStop || d.CommitMs == nil || primary.Running() {
		t.Errorf("the primary killed: %v", d)
	}
	for _, in := range d.Instances {
		if each := strings.Contains(in.Instance, "@"); each != (in.CameTo == "") || each != (in.Reason != "") {
			t.Errorf("%v", in)
		}
	}
}

// SIGTERM ends a node in order: what it ran is saved, however seldom its state is copied, the others know that it left, and go on with it.
func TestTerminatedNodeSavesAndSaysGoodbye(t *testing.T) {
	g := plant(t, 3)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "counter", "1.0.0"))
	g.deploy(n1, strings.Replace(counterApp, "durable: each-call", "durable: 1h", 1))
	g.moveTo(n1, "tally/counter-0", "n2")
	g.counted(n1, 6)
	must(t, g.Node("n2").Term(t.Context()))
	g.running(n1, "tally/counter-0", notOn("n2"))
	g.shows(n1, 6)
	g.wait("n1 to know why n2 is gone", func(ctx context.Context) error {
		if left := g.nodesInState(n1, "left"); !slices.Equal(left, []string{"n2"}) {
			return errors.New("left: " + strings.Join(left, " "))
		}
		return nil
	})
	if g.logged(g.Node("n2"), "level=ERROR") > 0 {
		t.Error("n2 ended with errors in its log")
	}
}

// TestTerminatedNodeUnderLoadLosesNothing: the same under load, with a state that is copied every five seconds. Calls are held before the last copy is made, so
// nothing that was answered is lost, and none fails.
func TestTerminatedNodeUnderLoadLosesNothing(t *testing.T) {
	g := plant(t, 3)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "kv", "1.0.0"))
	g.deploy(n1, strings.Replace(kvApp, "durable: each-call", "durable: 5s", 1))
	for _, end := range []func(n *cluster.Node){
		func(n *cluster.Node) { must(t, n.Term(t.Context())) },
		func(n *cluster.Node) {
			g.do(n, "down")
			_, err := n.Ended(t.Context())
			must(t, err)
		},
	} {
		in := g.running(n1, "data/kv-0", protected(3))
		owner := g.Node(in.GetNode())
		asked := g.others(owner)[0]
		p := g.press("data/kv", g.others(owner), 200, 3*time.Second)
		p.answered(200)
		end(owner)
		g.running(asked, "data/kv-0", notOn(owner.Name))
		p.answered(200)
		p.audit(false)
		must(t, owner.Start(t.Context()))
		g.wait(owner.Name+" to be back", func(ctx context.Context) error {
			st, err := g.status(ctx, asked)
			if err == nil && st.GetNodes().GetAlive() != 3 {
				err = fmt.Errorf("%d nodes are alive", st.GetNodes().GetAlive())
			}
			return err
		})
	}
}
