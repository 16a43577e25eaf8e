package node

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/records"
)

// recordsView is the view that records go by: the member table, or, with Config.View, a part of it.
func (n *Node) recordsView() records.View {
	v := records.FromMembers(n.members)
	if n.cfg.View == 0 {
		return v
	}
	v = records.Cap(v, n.id, n.cfg.View)
	n.view.Store(&v)
	return v
}

// routed are the members that kad-dht's routing table is to hold: those that records know. Others come into it as lookups meet them.
func (n *Node) routed() []peer.ID {
	if v := n.view.Load(); v != nil {
		return (*v).Alive()
	}
	return n.aliveIDs()
}

// include puts a member that is alive now into kad-dht's routing table, unless the view is capped and leaves it out.
func (n *Node) include(id peer.ID) {
	if n.view.Load() == nil || slices.Contains(n.routed(), id) {
		n.overlay.Kad().Include(id)
	}
}

// route finds the members closest to a key that may hold records, by kad-dht's lookup.
func (n *Node) route(ctx context.Context, key string, most int) ([]peer.ID, int, error) {
	ids, hops, err := n.overlay.Kad().Closest(ctx, key)
	if err != nil {
		return nil, 0, err
	}
	if len(ids) == 1 { // this node; its view knows of others
		return nil, 0, fmt.Errorf("look up %s: %w", key, errNobody)
	}
	ids = slices.DeleteFunc(ids, func(id peer.ID) bool {
		m, ok := n.members.Member(id)
		return !ok || m.NoHolder
	})
	return ids[:min(most, len(ids))], hops, nil
}

var errNobody = errors.New("no member in the routing table answered")
