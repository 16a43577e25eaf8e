package e2e

import (
	"context"
	"fmt"
	"os"
	"slices"
	"testing"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/keys"
	"github.com/coppice-project/coppice/internal/cluster"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// Twenty real nodes whose records know sixteen: each finds the index of a checkpoint, on the five that are closest of all, and when one of
// those dies there are five copies again.
func TestLongViewsOfSixteen(t *testing.T) {
	if os.Getenv("COPPICE_LONG") == "" {
		t.Skip("set COPPICE_LONG=1, or make test-long")
	}
	g := plant(t, 20, "--view", "16")
	n1 := g.Nodes[0]
	g.push(n1, component(t, "counter", "1.0.0"))
	g.deploy(n1, counterApp)
	in := g.running(n1, "tally/counter-0", protected(3))
	g.counted(n1, 3)
	g.foundEverywhere("tally/counter-0")
	closest := g.closestAlive("/kb/ckpt/tally/counter-0")
	victim := closest[0]
	if victim.Name == in.GetNode() {
		victim = closest[1]
	}
	_, err := victim.Kill()
	must(t, err)
	g.foundEverywhere("tally/counter-0")
	g.counted(g.Alive()[0], 2)
}

// closestAlive returns the five living nodes closest to a key.
func (g *grove) closestAlive(key string) []*cluster.Node {
	g.t.Helper()
	byID := map[peer.ID]*cluster.Node{}
	var ids []peer.ID
	for _, n := range g.Alive() {
		id, err := peer.Decode(n.ID())
		must(g.t, err)
		byID[id], ids = n, append(ids, id)
	}
	var out []*cluster.Node
	for _, id := range keys.Sort(keys.Of(key), ids)[:5] {
		out = append(out, byID[id])
	}
	return out
}

// foundEverywhere waits until every living node finds the index of an instance's checkpoint, in five copies, and names the five closest
// nodes as its holders.
func (g *grove) foundEverywhere(instance string) {
	g.t.Helper()
	var want []string
	for _, n := range g.closestAlive("/kb/ckpt/" + instance) {
		want = append(want, n.Name)
	}
	for _, n := range g.Alive() {
		g.wait(n.Name+" to find the index of "+instance, func(ctx context.Context) error {
			r, err := g.api(n).DhtGet(ctx, &apiv1.DhtGetRequest{Key: instance})
			if err != nil {
				return err
			}
			var holders []string
			for _, h := range r.GetHolders() {
				holders = append(holders, h.GetName())
			}
			if !r.GetFound() || r.GetHops() > 5 || r.GetAgree() < 3 || r.GetCopies() < 5 || !slices.Equal(holders, want) {
				return fmt.Errorf("found %v after %d hops, %d copies, %d agree, holders %v, want %v", r.GetFound(), r.GetHops(), r.GetCopies(), r.GetAgree(), holders, want)
			}
			return nil
		})
	}
}
