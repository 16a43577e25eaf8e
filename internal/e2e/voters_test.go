package e2e

import (
	"context"
	"fmt"
	"testing"

	"github.com/coppice-project/coppice/internal/cluster"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// Seven nodes of which seven may vote: all do, and the deaths of any three at once stop nothing. With the default five would, and three could be
// their majority.
func TestSevenVoters(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := seed(t, 7, "--voters", "7")
	must(t, g.Up(t.Context()))
	n1 := g.Nodes[0]
	var leader *cluster.Node
	g.wait("seven voters", func(context.Context) error {
		a := g.arbiter(n1)
		if leader = g.Node(a.GetLeader()); len(a.GetVoters()) != 7 || leader == nil {
			return fmt.Errorf("%v", a)
		}
		return nil
	})
	for _, n := range g.Nodes { // each watches some of the others; to the rest the round trip is measured
		g.wait(n.Name+" to know how far the others are", func(ctx context.Context) error {
			res, err := g.api(n).Nodes(ctx, &apiv1.NodesRequest{})
			if err != nil {
				return err
			}
			for _, m := range res.GetNodes() {
				if m.RttMs == nil {
					return fmt.Errorf("%s is %s, connected: %s", m.GetName(), m.GetState(), m.GetConnection())
				}
			}
			return nil
		})
	}
	victims := append([]*cluster.Node{leader}, g.others(leader)[:2]...)
	must(t, cluster.Each(victims, func(n *cluster.Node) error { _, err := n.Kill(); return err }))
	at := g.Alive()[0]
	t.Logf("next commit %s after three of seven voters were killed", g.goesOn(at))
	must(t, cluster.Each(victims, func(n *cluster.Node) error { return n.Start(t.Context()) }))
	g.wait("all to be back", func(context.Context) error {
		if a := g.arbiter(at); len(a.GetVoters()) != 7 {
			return fmt.Errorf("%v", a)
		}
		return nil
	})
}
