package e2e

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/coppice-project/coppice/dht"
	"github.com/coppice-project/coppice/internal/cluster"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// A token admits whom it should, and a refusal says why at both ends: to the newcomer on its standard error, to the cluster in the log of
// the node that was asked.
func TestJoin(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := seed(t, 6)
	other := seed(t, 1)
	must(t, cluster.Each([]*cluster.Node{g.Nodes[0], other.Nodes[0]}, func(n *cluster.Node) error { return n.Start(t.Context()) }))
	n1, n2, spare := g.Nodes[0], g.Nodes[1], g.Nodes[2]

	once := strings.TrimSpace(g.do(n1, "token", "--uses", "1"))
	if strings.ContainsAny(once, " \n") {
		t.Fatalf("a token is one word, for a script to take: %q", once)
	}
	must(t, n2.Start(t.Context(), "--join", once))
	g.wait("both to see both", func(ctx context.Context) error {
		for _, n := range g.Alive() {
			if st, err := g.status(ctx, n); err != nil || st.GetNodes().GetAlive() != 2 {
				return fmt.Errorf("%s: %v, %v", n.Name, st.GetNodes(), err)
			}
		}
		return nil
	})

	short := g.token(n1, "--ttl", "1s")
	revoked := g.token(n1)
	res, err := g.api(n2).RevokeToken(t.Context(), &apiv1.RevokeTokenRequest{Token: revoked})
	if err != nil || !res.GetRevoked() {
		t.Fatal(res, err)
	}
	// A token of the other cluster that leads to this one.
	foreign, err := dht.DecodeToken(other.token(other.Nodes[0]))
	must(t, err)
	ours, err := dht.DecodeToken(g.token(n1))
	must(t, err)
	foreign.Addrs = ours.Addrs
	misled, err := foreign.Encode()
	must(t, err)
	// A secret that nobody made.
	ours.Secret[0] ^= 1
	guessed, err := ours.Encode()
	must(t, err)
	time.Sleep(1100 * time.Millisecond) // the time to live of the short one

	for i, c := range []struct{ what, token, says string }{
		{"used up", once, "used up"},
		{"expired", short, "expired"},
		{"revoked", revoked, "revoked"},
		{"foreign", misled, "another cluster"},
		{"guessed", guessed, "not known"},
	} {
		said := g.refuseJoin(spare, c.token)
		if !strings.Contains(said, c.says) {
			t.Errorf("%s: the newcomer was told %q, not that the token is %s", c.what, said, c.says)
		}
		if g.says(n1, "refused a join", c.says) == 0 {
			t.Errorf("%s: the member says nothing", c.what)
		}
		if i == 0 {
			continue
		}
		if _, err := os.Stat(spare.Data + "/cluster.json"); err == nil {
			t.Errorf("%s: the refused node remembers the cluster as its own", c.what)
		}
	}
	for _, garbage := range []string{"hello", "coppice1" + strings.Repeat("A", 40), once[:len(once)-3], once + "x"} {
		if said := g.refuseJoin(spare, garbage); !strings.Contains(said, "token") {
			t.Errorf("the token %q: %s", garbage, said)
		}
	}
	// After all of that: the same folder joins with a good token, and two at once with one that has two uses.
	must(t, spare.Start(t.Context(), "--join", g.token(n2)))
	twice := g.token(spare, "--uses", "2")
	must(t, cluster.Each(g.Nodes[3:5], func(n *cluster.Node) error { return n.Start(t.Context(), "--join", twice) }))
	if said := g.refuseJoin(g.Nodes[5], twice); !strings.Contains(said, "used up") {
		t.Errorf("a third use of a token with two: %s", said)
	}
	if n := g.nodesInState(n1, "alive"); len(n) != 5 {
		t.Errorf("alive: %v", n)
	}
	// A member's folder with a token of another cluster: it is told, and stays what it is.
	must(t, spare.Term(t.Context()))
	if said := g.refuseJoin(spare, other.token(other.Nodes[0])); !strings.Contains(said, "another cluster") && !strings.Contains(said, "belongs to") {
		t.Errorf("a member that is told to join another cluster: %s", said)
	}
	must(t, spare.Start(t.Context()))
}

func (g *grove) token(n *cluster.Node, args ...string) string {
	g.t.Helper()
	return strings.TrimSpace(g.do(n, append([]string{"token"}, args...)...))
}

// refuseJoin starts a node that must not get in, and returns what it was told.
func (g *grove) refuseJoin(n *cluster.Node, token string) string {
	g.t.Helper()
	cmd := g.Command(append([]string{"up", "--name", n.Name, "--data", n.Data, "--join", token, "--log-level", "error"}, g.Network.Args(n.Index)...)...)
	stop := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Signal(os.Interrupt) }) // a node that came in runs until then
	r := g.exec(cmd)
	stop.Stop()
	if r.code == 0 || strings.Contains(r.out, "ready") {
		g.t.Fatalf("a node came in with %q: %s%s", token, r.out, r.err)
	}
	if !strings.HasPrefix(r.err, "coppice: ") || strings.Contains(r.err, "goroutine") {
		g.t.Errorf("want one line that begins with coppice: and a reason, got\n%s", r.err)
	}
	return r.err
}

// nodesInState lists the names of the members in a state, as n sees them.
func (g *grove) nodesInState(n *cluster.Node, state string) []string {
	g.t.Helper()
	res, err := g.api(n).Nodes(g.t.Context(), &apiv1.NodesRequest{})
	must(g.t, err)
	var out []string
	for _, m := range res.GetNodes() {
		if m.GetState() == state {
			out = append(out, m.GetName())
		}
	}
	return out
}
