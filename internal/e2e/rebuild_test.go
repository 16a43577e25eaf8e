package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/cluster/clustertest"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// withWorkers is a cluster of five: the last two never vote, and of the voters only the first runs components, so that copies of their state
// lie with those that never vote, too.
func withWorkers(t *testing.T) *grove {
	t.Helper()
	g := seedIn(t, clustertest.Config{Nodes: 5, Args: func(i int) []string {
		return []string{"--role", []string{"full", "voter", "voter", "worker", "worker"}[i-1]}
	}})
	must(t, g.Up(t.Context()))
	g.votersAre(g.Nodes[4], g.Nodes[:3])
	return g
}

// votersAre waits until a node says that these vote, and that there is a leader.
func (g *grove) votersAre(by *cluster.Node, nodes []*cluster.Node) {
	g.t.Helper()
	var want []string
	for _, n := range nodes {
		want = append(want, n.Name)
	}
	slices.Sort(want)
	g.wait(fmt.Sprintf("%v to vote", want), func(ctx context.Context) error {
		st, err := g.status(ctx, by)
		if err != nil {
			return err
		}
		if got := slices.Sorted(slices.Values(st.GetArbiter().GetVoters())); !slices.Equal(got, want) || st.GetArbiter().GetLeader() == "" {
			return fmt.Errorf("%v, leader %q", got, st.GetArbiter().GetLeader())
		}
		return nil
	})
}

// on waits until an instance runs on one of these.
func (g *grove) on(by *cluster.Node, name string, nodes ...*cluster.Node) *apiv1.Instance {
	g.t.Helper()
	return g.running(by, name, func(in *apiv1.Instance) error {
		if !slices.ContainsFunc(nodes, func(n *cluster.Node) bool { return n.Name == in.GetNode() }) {
			return fmt.Errorf("it is on %s", in.GetNode())
		}
		return nil
	})
}

// between moves the key-value store to a voter and the counter to a survivor, and waits until survivors have copies of both.
func (g *grove) between(voter, survivor *cluster.Node) (kv *apiv1.Instance) {
	g.t.Helper()
	for name, to := range map[string]*cluster.Node{"tally/kv": voter, "tally/counter": survivor} {
		g.wait(name+" to be on "+to.Name+", with copies", func(ctx context.Context) error {
			in, err := g.instance(ctx, survivor, name+"-0")
			switch {
			case err != nil:
				return err
			case in.GetNode() != to.Name:
				r := g.run(survivor, "move", name, to.Name)
				return fmt.Errorf("it was on %s: %s", in.GetNode(), r.err)
			case len(in.GetReplicas()) < 3:
				return fmt.Errorf("its copies are on %v", in.GetReplicas())
			case name == "tally/kv":
				kv = in
			}
			return nil
		})
	}
	return kv
}

// leaderless waits until these see each other, nobody else, and no leader.
func (g *grove) leaderless(nodes ...*cluster.Node) {
	g.t.Helper()
	g.wait("the survivors to see each other and no leader", func(ctx context.Context) error {
		for _, n := range nodes {
			st, err := g.status(ctx, n)
			if err != nil || st.GetArbiter().GetLeader() != "" || int(st.GetNodes().GetAlive()) != len(nodes) {
				return errors.Join(err, fmt.Errorf("%s: leader %q, %v", n.Name, st.GetArbiter().GetLeader(), st.GetNodes()))
			}
		}
		return nil
	})
}

// All voters are killed at once under load and their data folders removed. What they had committed is rebuilt on a survivor that never voted:
// ownership in a higher incarnation, desired state, registry; the components go on with all that was answered.
func TestRecoverWithAllVotersDisksDestroyed(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := withWorkers(t)
	voters, left := g.Nodes[:3], g.Nodes[3:]
	n4 := left[0]
	g.push(n4, component(t, "counter", "1.0.0"), component(t, "kv", "1.0.0"))
	g.deploy(n4, both)
	g.counted(n4, 7)
	before := g.between(g.Nodes[0], n4)
	p := g.press("tally/kv", left, 100, 2*time.Second)
	p.answered(30)
	// One that does not vote makes no backup itself, and has one made.
	var sum struct{ Node string }
	must(t, json.Unmarshal([]byte(g.do(n4, "backup", filepath.Join(g.Dir, "b"), "-o", "json")), &sum))
	if !slices.ContainsFunc(voters, func(n *cluster.Node) bool { return n.Name == sum.Node }) {
		t.Errorf("the backup was made by %s", sum.Node)
	}
	g.refused(n4, []string{"majority"}, "recover", "--yes")

	p.answered(30)
	g.wipe(voters...)
	g.leaderless(left...)
	shown := g.run(n4, "recover")
	if shown.code != 1 || !strings.Contains(shown.err, "not confirmed") || !strings.Contains(shown.out, "to be rebuilt: 2 applications") {
		t.Fatalf("what would be done: %s%s", shown.out, shown.err)
	}
	out := g.do(n4, "recover", "--yes")
	t.Log(out)
	for _, want := range []string{"missing voter: n1", "missing voter: n2", "missing voter: n3", "rebuilt", "may be lost", "incarnation 2"} {
		if !strings.Contains(out, want) {
			t.Errorf("recover does not say %q", want)
		}
	}
	g.on(n4, "tally/counter-0", left...)
	after := g.on(n4, "tally/kv-0", left...)
	if a := g.arbiter(n4); a.GetIncarnation() != 2 || after.GetEpoch() < before.GetEpoch() {
		t.Errorf("epoch %d in %v, after epoch %d of incarnation 1", after.GetEpoch(), a, before.GetEpoch())
	}
	for _, n := range left {
		g.shows(n, 7)
	}
	p.answered(30)
	p.audit(false)
	if list := g.do(n4, "registry", "list"); !strings.Contains(list, "counter") || !strings.Contains(list, "kv") {
		t.Errorf("the registry has %s", list)
	}
	// New machines take the places of the lost ones.
	g.join(n4, voters...)
	g.votersAre(n4, voters)
	g.counted(n4, 8)
	g.running(n4, "tally/kv-0", protected(3))
}

// The same, and the survivors lose power as well, and with it what they had kept of the arbiter: after they are back nobody remembers anything of it. The signed
// copies in the DHT are all there is, and enough.
func TestRecoverFromTheCopiesInTheDHT(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := withWorkers(t)
	voters, left := g.Nodes[:3], g.Nodes[3:]
	n4 := left[0]
	g.push(n4, component(t, "counter", "1.0.0"), component(t, "kv", "1.0.0"))
	g.deploy(n4, both)
	g.counted(n4, 7)
	g.do(n4, "call", "tally/kv", "Put", `{"key":"before","value":"the loss"}`)
	before := g.between(g.Nodes[0], n4)
	g.wait("the copies to be everywhere", func(ctx context.Context) error {
		res, err := g.api(n4).DhtGet(ctx, &apiv1.DhtGetRequest{Key: "/kb/own/tally/kv-0"})
		if err == nil && (!res.GetFound() || res.GetAgree() < 3) {
			err = fmt.Errorf("found %v, %d agree", res.GetFound(), res.GetAgree())
		}
		return err
	})
	g.wipe(voters...)
	must(t, cluster.Each(left, func(n *cluster.Node) error { _, err := n.Kill(); return err }))
	must(t, cluster.Each(left, func(n *cluster.Node) error { return os.RemoveAll(filepath.Join(n.Data, "raft")) }))
	must(t, cluster.Each(left, func(n *cluster.Node) error { return n.Start(t.Context()) }))
	g.leaderless(left...)
	out := g.do(n4, "recover", "--yes")
	t.Log(out)
	for _, want := range []string{"0 from what", "join tokens", "incarnation 2"} {
		if !strings.Contains(out, want) {
			t.Errorf("recover does not say %q", want)
		}
	}
	after := g.on(n4, "tally/kv-0", left...)
	if after.GetEpoch() < before.GetEpoch() {
		t.Errorf("epoch %d after %d", after.GetEpoch(), before.GetEpoch())
	}
	for _, n := range left {
		g.shows(n, 7)
		if v := g.value(n, "tally/kv", "before"); v != "the loss" {
			t.Errorf("%s has %q", n.Name, v)
		}
	}
	g.join(n4, voters...)
	g.votersAre(n4, voters)
	g.counted(n4, 8)
}
