package e2e

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
)

// A voter that dies again and again is quarantined, and its vote is given to another node while it is; readmitted through any node it is alive for all and may vote again.
func TestAFlappingVoterLosesItsVote(t *testing.T) {
	t.Parallel() // it mostly waits
	g := plant(t, 4)
	g.waitVoters()
	voters := func(on *cluster.Node) ([]string, int) {
		st, err := g.status(t.Context(), on)
		must(t, err)
		return st.GetArbiter().GetVoters(), int(st.GetNodes().GetQuarantined())
	}
	var flapping, other *cluster.Node
	first, _ := voters(g.Nodes[0])
	for _, n := range g.Nodes {
		switch {
		case !slices.Contains(first, n.Name):
		case flapping == nil:
			flapping = n
		default:
			other = n
		}
	}
	quarantined := false
	for range 12 { // more than it takes
		_, err := flapping.Kill()
		must(t, err)
		g.wait(flapping.Name+" to be missed", func(ctx context.Context) error {
			st, err := g.status(ctx, other)
			if err != nil {
				return err
			}
			if n := st.GetNodes(); int(n.GetAlive()) >= len(g.Nodes) || n.GetDead() == 0 {
				return fmt.Errorf("%d are alive, %d dead", n.GetAlive(), n.GetDead())
			}
			return nil
		})
		must(t, flapping.Start(t.Context()))
		g.wait(flapping.Name+" to be back", func(ctx context.Context) error {
			st, err := g.status(ctx, other)
			if err != nil {
				return err
			}
			quarantined = st.GetNodes().GetQuarantined() > 0
			if !quarantined && int(st.GetNodes().GetAlive()) < len(g.Nodes) {
				return fmt.Errorf("%d are alive, %d dead", st.GetNodes().GetAlive(), st.GetNodes().GetDead())
			}
			return nil
		})
		if quarantined {
			break
		}
	}
	if !quarantined {
		t.Fatalf("%s died again and again and is not quarantined", flapping.Name)
	}
	began := time.Now()
	g.wait("its vote to be given to another node", func(context.Context) error {
		if v, n := voters(other); slices.Contains(v, flapping.Name) || len(v) != 3 || n != 1 {
			return fmt.Errorf("the voters are %v, %d nodes are quarantined", v, n)
		}
		return nil
	})
	t.Logf("its vote was given to another node after %s", time.Since(began).Round(time.Millisecond))
	// Any node takes it back for all: here one that neither leads nor places.
	st, err := g.status(t.Context(), other)
	must(t, err)
	a := st.GetArbiter()
	plain := slices.DeleteFunc(g.others(flapping), func(n *cluster.Node) bool { return n.Name == a.GetLeader() || n.Name == a.GetCoordinator() })
	via := plain[0]
	if out := g.do(via, "readmit", flapping.Name); !strings.Contains(out, flapping.Name+" is alive") {
		t.Errorf("readmit: %s", out)
	}
	for _, n := range g.Nodes {
		if alive := g.nodesInState(n, "alive"); len(alive) != len(g.Nodes) {
			t.Errorf("after the readmission by %s, %s holds %v to be alive", via.Name, n.Name, alive)
		}
	}
	// It may vote for all again: when another voter is drained its vote is the only one that can take the place.
	voting, _ := voters(via)
	leaves := voting[slices.IndexFunc(voting, func(v string) bool { return v != flapping.Name && v != via.Name })]
	began = time.Now()
	g.do(via, "drain", leaves)
	g.wait("its vote to come back", func(context.Context) error {
		if v, _ := voters(via); !slices.Contains(v, flapping.Name) || slices.Contains(v, leaves) || len(v) != 3 {
			return fmt.Errorf("the voters are %v, %s is drained", v, leaves)
		}
		return nil
	})
	t.Logf("it voted in place of %s after %s", leaves, time.Since(began).Round(time.Millisecond))
}
