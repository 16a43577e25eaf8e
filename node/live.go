package node

import (
	"time"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/supervisor"
	"github.com/coppice-project/coppice/dht/blobs"
)

// collectViewAge is how old the view may be by which pages are collected. What was acknowledged since is pinned for ten minutes, so it must be
// less: a node that is cut off for longer may be named as the holder of a checkpoint that its view has never shown. When the view is up to
// date again after it was not, as much time passes before anything is collected: what waited for the arbiter to come back, with pages that
// were pushed long ago, is committed first.
const collectViewAge = time.Minute

// liveRoots are the roots that garbage collection keeps: what the registers of instances and the registry name. Until this node has heard
// the arbiter nothing is known to be dead.
func (n *Node) liveRoots() []blobs.Hash {
	if age := n.arbiter.Status().FeedAge; age < 0 || age > collectViewAge {
		n.behind.Store(int64(n.cfg.BootTime()))
		return nil
	}
	if at := n.behind.Load(); at != 0 && n.cfg.BootTime()-time.Duration(at) < collectViewAge {
		return nil
	}
	out := n.registry.Roots()
	if out == nil {
		out = []blobs.Hash{}
	}
	add := func(b []byte) {
		if len(b) == len(blobs.Hash{}) {
			out = append(out, blobs.Hash(b))
		}
	}
	for _, reg := range n.arbiter.List(components.InstancePrefix) {
		add(reg.Root)
		if body, err := bodyOf(reg); err == nil {
			add(body.GetFallback().GetRoot())
			add(body.GetPrevious().GetRoot())
		}
	}
	for _, reg := range n.arbiter.List(components.BranchPrefix) {
		add(reg.Root)
	}
	for _, reg := range n.arbiter.List(components.HistoryPrefix) {
		roots, err := supervisor.HistoryRoots(reg)
		if err != nil {
			n.log.Error("nothing is collected: what is kept of earlier checkpoints is not known", "register", reg.Key, "error", err)
			return nil
		}
		out = append(out, roots...)
	}
	out = append(out, n.sup.BranchRoots()...)
	for _, in := range n.sup.Infos() {
		if !in.Saved.Root.IsZero() {
			out = append(out, in.Saved.Root)
		}
	}
	return out
}
