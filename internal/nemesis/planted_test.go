//go:build planted

package nemesis

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/cluster/clustertest"
	"github.com/coppice-project/coppice/internal/harm"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

const (
	// standstillBudget is in how many cycles the planted bug must be found; without it as many pass.
	standstillBudget = 2
	// stillFor is how long the leader's process stands still: less than the owner's lease has left for certain (3 s, renewed each second, its process
	// ended half a second before), more than raft takes to depose a leader that does not stand still.
	stillFor = 1300 * time.Millisecond
	// hungFor is how long its disk does.
	hungFor = 9 * time.Second
	// together is how long the last owner is watched once the next one acts.
	together = time.Second
)

const lampApp = `application: light
components:
  - name: lamp
    artifact: %s
    guarantee: exactly-one
    env: {LAMP_STORE: "%s"}
`

// standstill is a cluster with an exactly-one component that acts on a store outside of it.
type standstill struct {
	t     *testing.T
	c     *cluster.Cluster
	store *clustertest.Outside
}

func newStandstill(t *testing.T, bug string) *standstill {
	t.Helper()
	begun := time.Now()
	s := &standstill{t: t, c: clustertest.New(t, clustertest.Config{Nodes: 4, Namespaces: true, Planted: true, Bug: bug})}
	clustertest.Cuttable(t, s.c)
	ln, err := s.c.Network.Listen()
	must(t, err)
	s.store = clustertest.OpenOutside(t, ln)
	must(t, s.c.Up(t.Context()))
	must(t, s.c.AllAlive(t.Context()))
	path := filepath.Join(s.c.Dir, "light.yaml")
	must(t, os.WriteFile(path, fmt.Appendf(nil, lampApp, clustertest.Build(t, "internal/e2e/testdata/lamp", "e2e/lamp"), s.store.Addr()), 0o600))
	must(t, s.c.Coppice(t.Context(), s.c.Nodes[0], nil, "deploy", path, "--wait", "--timeout", "60s"))
	t.Logf("four nodes after %s", time.Since(begun).Round(time.Millisecond))
	return s
}

// cast says who leads, who is no voter, and who the two other voters are, once all nodes agree about it: while one votes less the rule of two nodes
// holds, by which another side goes on.
func (s *standstill) cast(ctx context.Context) (leader, owner *cluster.Node, others []*cluster.Node, err error) {
	err = cluster.WaitFor(ctx, back, "three voters and a leader as all see it", func(ctx context.Context) (bool, error) {
		first := ""
		for _, n := range s.c.Nodes {
			c, err := n.Client()
			if err != nil {
				return false, err
			}
			st, err := c.Status(ctx, &apiv1.StatusRequest{})
			if err != nil {
				return false, err
			}
			a := st.GetArbiter()
			says := fmt.Sprintf("led by %q, voters %v", a.GetLeader(), a.GetVoters())
			if first == "" {
				first = says
			}
			if leader = s.c.Node(a.GetLeader()); leader == nil || len(a.GetVoters()) != 3 || a.GetPrimary() != "" || says != first {
				return false, fmt.Errorf("%s: %s, primary of two %q", n.Name, says, a.GetPrimary())
			}
			owner, others = nil, nil
			for _, x := range s.c.Nodes {
				switch {
				case !slices.Contains(a.GetVoters(), x.Name):
					owner = x
				case x != leader:
					others = append(others, x)
				}
			}
		}
		return owner != nil && len(others) == 2, nil
	})
	return leader, owner, others, err
}

// placed has the component run at a node, in an epoch that has settled.
func (s *standstill) placed(ctx context.Context, at *cluster.Node) error {
	if err := cluster.WaitFor(ctx, back, "the component to be on "+at.Name, func(ctx context.Context) (bool, error) {
		in, err := cluster.Instance(ctx, at, "light/lamp-0")
		if err != nil || in.GetNode() == at.Name && in.GetState() == "running" {
			return err == nil, err
		}
		return false, s.c.Coppice(ctx, at, nil, "move", "light/lamp", at.Name) // it fails while the leadership goes from one voter to another
	}); err != nil {
		return err
	}
	in, err := cluster.Calm(ctx, at, "light/lamp")
	if err == nil && in.GetNode() != at.Name {
		err = fmt.Errorf("it was moved to %s and is on %s", at.Name, in.GetNode())
	}
	return err
}

// errNotLed says that a node does not lead any more: it may have handed the leadership to the coordinator.
var errNotLed = errors.New("another node leads now")

// hang has the disk of a leader's raft log stand still, with a write on its way.
func (s *standstill) hang(ctx context.Context, leader *cluster.Node) error {
	if err := leader.Harm(harm.Orders{Slow: []string{"/raft/"}, SlowFor: hungFor}); err != nil {
		return err
	}
	c, err := leader.Client()
	if err != nil {
		return err
	}
	led := true
	if err := cluster.WaitFor(ctx, back, "a write to hang", func(ctx context.Context) (bool, error) {
		wctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
		defer cancel()
		_, werr := c.Token(wctx, &apiv1.TokenRequest{})
		st, err := c.Status(ctx, &apiv1.StatusRequest{})
		led = st.GetArbiter().GetLeader() == leader.Name
		return err == nil && (werr != nil && wctx.Err() != nil || !led), err
	}); err != nil {
		return err
	}
	if !led {
		return errors.Join(errNotLed, leader.Harm(harm.Orders{}))
	}
	return nil
}

// ready brings about that a leader's disk hangs and that the owner is no voter.
func (s *standstill) ready(ctx context.Context) (leader, owner *cluster.Node, others []*cluster.Node, err error) {
	for {
		if leader, owner, others, err = s.cast(ctx); err != nil {
			return
		}
		if err = s.placed(ctx, owner); err != nil {
			return
		}
		if err = s.hang(ctx, leader); !errors.Is(err, errNotLed) {
			return
		}
	}
}

// cycle has the arbiter's leader stand still, its disk for longer than its process, and cuts it off together with the component's owner; the two others elect
// another leader and take the component over. It returns the handover.
func (s *standstill) cycle(ctx context.Context) (h clustertest.Handover, err error) {
	leader, owner, others, err := s.ready(ctx)
	if err != nil {
		return h, err
	}
	before := s.store.Token()
	defer func() { err = errors.Join(err, s.mend(ctx, leader)) }()
	if _, err := leader.Stop(); err != nil {
		return h, err
	}
	for _, side := range []*cluster.Node{leader, owner} {
		for _, o := range others {
			if err := errors.Join(o.Deaf(side, false), side.Deaf(o, false)); err != nil {
				return h, err
			}
		}
	}
	err = cluster.Sleep(ctx, stillFor) // renewals wait in its sockets meanwhile
	if _, cont := leader.Cont(); err != nil || cont != nil {
		return h, errors.Join(err, cont)
	}
	if err := cluster.WaitFor(ctx, back, "the next owner to act", func(context.Context) (bool, error) { return s.store.Token() > before, nil }); err != nil {
		return h, err
	}
	err = cluster.Sleep(ctx, together)
	for _, h := range s.store.Handovers() {
		if h.From == before {
			s.t.Logf("leader %s, owner %s: %s", leader.Name, owner.Name, h)
			return h, err
		}
	}
	return h, errors.Join(err, errors.New("the last owner never acted"))
}

// mend ends the cut and the orders, and waits until all is as it was.
func (s *standstill) mend(ctx context.Context, leader *cluster.Node) error {
	err := leader.Harm(harm.Orders{})
	for _, n := range s.c.Nodes {
		err = errors.Join(err, n.Hear())
	}
	if err != nil {
		return err
	}
	return s.c.AllAlive(ctx)
}

// TestPlantedLeaseUnverified shows that a leader that renews leases without making sure that it still leads is found, and that the same faults find nothing
// in one that does. raft's own step-down, a timer in its main loop, does not help: the main loop waits for the disk.
func TestPlantedLeaseUnverified(t *testing.T) {
	for _, bug := range []string{"lease-unverified", ""} {
		name := bug
		if name == "" {
			name = "without"
		}
		t.Run(name, func(t *testing.T) {
			t.Parallel() // it mostly waits
			s := newStandstill(t, bug)
			for n := range standstillBudget {
				begun := time.Now()
				h, err := s.cycle(t.Context())
				must(t, err)
				t.Logf("cycle %d took %s", n+1, time.Since(begun).Round(time.Millisecond))
				if h.Gap > 0 {
					continue
				}
				if bug == "" {
					t.Fatalf("cycle %d: two owners acted at once: %s", n+1, h)
				}
				t.Logf("%s was found by cycle %d: both acted at once", bug, n+1)
				return
			}
			if bug != "" {
				t.Errorf("%s was not found in %d cycles", bug, standstillBudget)
			}
		})
	}
}

// rolledBack writes three drafts with a checkpoint after each, kills their owner, and returns the history with what is read afterwards, and that.
func rolledBack(t *testing.T, bug string) (*drafts, string) {
	t.Helper()
	c := clustertest.New(t, clustertest.Config{Nodes: 3, Planted: true, Bug: bug})
	must(t, c.Up(t.Context()))
	must(t, c.AllAlive(t.Context()))
	path := filepath.Join(c.Dir, "draft.yaml")
	kv := filepath.Join(filepath.Dir(clustertest.Binary(t)), "components", "kv")
	must(t, os.WriteFile(path, fmt.Appendf(nil, manifest, "draft", "kv", kv, "on-demand", "exactly-one"), 0o600))
	must(t, c.Coppice(t.Context(), c.Nodes[0], nil, "deploy", path, "--wait", "--timeout", "60s"))
	in, err := cluster.Calm(t.Context(), c.Nodes[0], draftsComponent)
	must(t, err)
	d := newDrafts()
	ask := func(n *cluster.Node, method, body string) (out string) {
		must(t, cluster.WaitFor(t.Context(), back, method+" "+body+" to be answered by "+n.Name, func(ctx context.Context) (bool, error) {
			api, err := n.Client()
			if err != nil {
				return false, err
			}
			res, err := api.Call(ctx, &apiv1.CallRequest{Component: draftsComponent, Method: method, Json: body, IdempotencyKey: method + body, TimeoutMs: 2000})
			out = res.GetJson()
			return err == nil, err
		}))
		return out
	}
	owner := c.Node(in.GetNode())
	api, err := owner.Client()
	must(t, err)
	for _, value := range []string{"a", "b", "c"} {
		at := d.now()
		ask(owner, "Put", fmt.Sprintf(`{"key":"k0","value":%q}`, value))
		d.add(0, put{"k0", value}, at, nil, d.now())
		at = d.now()
		_, err := api.Checkpoint(t.Context(), &apiv1.CheckpointRequest{Component: draftsComponent, TimeoutMs: 10_000})
		must(t, err)
		d.add(0, checkpoint{}, at, nil, d.now())
	}
	over := d.during()
	_, err = owner.Kill()
	must(t, err)
	reader := c.Alive()[0]
	ask(reader, "Get", `{"key":"k0"}`)
	over()
	at := d.now()
	var pair struct{ Value string }
	must(t, json.Unmarshal([]byte(ask(reader, "Get", `{"key": "k0"}`)), &pair))
	d.add(0, get{"k0"}, at, gotten{pair.Value, true}, d.now())
	return d, pair.Value
}

// TestPlantedRestoreOlder shows that the model of what is saved on demand notices real processes that go back behind the last acknowledged checkpoint, and has
// nothing against those that go back to it.
func TestPlantedRestoreOlder(t *testing.T) {
	for bug, want := range map[string]porcupine.CheckResult{"restore-older": porcupine.Illegal, "": porcupine.Ok} {
		t.Run("with "+bug, func(t *testing.T) {
			t.Parallel() // it mostly waits
			d, value := rolledBack(t, bug)
			if got := porcupine.CheckOperationsTimeout(draftModel.ToModel(), d.keyed("k0"), time.Minute); got != want {
				t.Errorf("after the failover %q was read of a, b and c, of which each was saved; the model says %s, want %s", value, got, want)
			}
		})
	}
}
