package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/coppice-project/coppice/internal/cluster"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// has says whether an identity is among the members as a node lists them.
func (g *grove) has(ctx context.Context, on *cluster.Node, id string) (bool, error) {
	c, err := on.Client()
	if err != nil {
		return false, err
	}
	res, err := c.Nodes(ctx, &apiv1.NodesRequest{})
	return slices.ContainsFunc(res.GetNodes(), func(x *apiv1.Node) bool { return x.GetId() == id }), err
}

// renewed waits until a node goes by another identity than old, has put its data aside, and says so.
func (g *grove) renewed(n *cluster.Node, old string) {
	g.t.Helper()
	g.wait(n.Name+" to have a new identity", func(ctx context.Context) error {
		if n.ID() == old {
			return errors.New("it goes by the old one")
		}
		st, err := g.status(ctx, n)
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(st.GetWarnings(), func(w string) bool { return strings.Contains(w, "new identity") && strings.Contains(w, old) }) {
			return fmt.Errorf("its warnings are %q", st.GetWarnings())
		}
		return nil
	})
	for _, name := range []string{"identity.key", "cluster.json", "raft"} {
		if kept, err := filepath.Glob(filepath.Join(n.Data, "lost+found", "*", name)); err != nil || len(kept) != 1 {
			g.t.Errorf("%s is not aside: %v, %v", name, kept, err)
		}
	}
	g.wait("an event that says so", func(context.Context) error {
		if out := g.do(n, "events", "/nodes/"+n.Name); !strings.Contains(out, "renewed") || !strings.Contains(out, old) {
			return fmt.Errorf("the events of %s:\n%s", n.Name, out)
		}
		return nil
	})
}

// An old copy of a voter's data folder is put back: the node finds out, puts it aside, and joins with a new identity by itself; the old one is expelled. What was
// answered is there.
func TestADataFolderThatWentBackGetsANewIdentity(t *testing.T) {
	t.Parallel() // it mostly waits
	g := plant(t, 3)
	g.waitVoters()
	n1, n3 := g.Nodes[0], g.Nodes[2]
	g.push(n1, component(t, "kv", "1.0.0"))
	g.deploy(n1, kvApp)
	copied := filepath.Join(g.Dir, "copy")
	_, err := n3.Kill()
	must(t, err)
	must(t, cluster.CopyFolder(n3.Data, copied))
	must(t, n3.Start(t.Context()))
	must(t, g.AllAlive(t.Context()))
	g.waitVoters()
	for i := range 5 {
		g.do(n1, "call", "data/kv", "Put", fmt.Sprintf(`{"key":"k%d","value":"v"}`, i))
	}
	old := n3.ID()
	_, err = n3.Kill()
	must(t, err)
	must(t, os.RemoveAll(n3.Data))
	must(t, cluster.CopyFolder(copied, n3.Data))
	must(t, n3.Start(t.Context()))
	g.renewed(n3, old)
	g.wait("the old identity to be expelled", func(ctx context.Context) error {
		if there, err := g.has(ctx, n1, old); err != nil || there {
			return fmt.Errorf("it is a member: %v (%w)", there, err)
		}
		return nil
	})
	must(t, g.AllAlive(t.Context())) // it votes when it has been up for a minute, as any newcomer of a cluster that is not new itself
	for i := range 5 {
		if out := g.do(n3, "call", "data/kv", "Get", fmt.Sprintf(`{"key":"k%d"}`, i)); !strings.Contains(out, `"v"`) {
			t.Errorf("k%d is %s", i, out)
		}
	}
	// From here on it is a member like any other.
	now := n3.ID()
	must(t, n3.Term(t.Context()))
	must(t, n3.Start(t.Context()))
	if n3.ID() != now {
		t.Errorf("after a restart it is %s, it was %s", n3.ID(), now)
	}
	must(t, g.AllAlive(t.Context()))
}

// A copy of a node's data folder is started as another node while the first one runs: the copy gets an identity of its own, and the first one goes on.
func TestACopiedDataFolderGetsItsOwnIdentity(t *testing.T) {
	t.Parallel() // it mostly waits
	g := seed(t, 4)
	n1, n2, n4 := g.Nodes[0], g.Nodes[1], g.Nodes[3]
	must(t, n1.Start(t.Context()))
	c, err := n1.Client()
	must(t, err)
	tok, err := c.Token(t.Context(), &apiv1.TokenRequest{})
	must(t, err)
	for _, n := range g.Nodes[1:3] {
		must(t, n.Start(t.Context(), "--join", tok.GetToken()))
	}
	must(t, g.AllAlive(t.Context()))
	g.waitVoters()
	must(t, n2.Term(t.Context()))
	must(t, os.RemoveAll(n4.Data))
	must(t, cluster.CopyFolder(n2.Data, n4.Data))
	must(t, n2.Start(t.Context()))
	must(t, g.AllAlive(t.Context()))
	first, pid := n2.ID(), n2.PID()
	must(t, n4.Start(t.Context()))
	g.renewed(n4, first)
	must(t, g.AllAlive(t.Context()))
	g.waitVoters()
	for _, on := range g.Nodes {
		for _, id := range []string{first, n4.ID()} {
			if there, err := g.has(t.Context(), on, id); err != nil || !there {
				t.Errorf("%s does not list %s as a member (%v)", on.Name, id, err)
			}
		}
	}
	if n2.ID() != first || n2.PID() != pid {
		t.Errorf("the first node is %s, process %d; it was %s, process %d", n2.ID(), n2.PID(), first, pid)
	}
}
