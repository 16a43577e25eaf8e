package node

import (
	"context"
	"errors"
	"os"
)

// Reasons to stop after which the others are to know that it was meant.
const (
	whyTold = "told to stop"
	whyDown = "down"
)

// shutdown ends everything in the order of who needs whom.
func (n *Node) shutdown(cancel context.CancelFunc) error {
	n.Stop("stopping")
	n.log.Info("stopping", "reason", n.why)
	if n.why == whyTold {
		sctx, done := context.WithTimeout(context.Background(), aheadWithin)
		n.finalCheckpoints(sctx)
		done()
	}
	if n.why == whyTold || n.why == whyDown {
		n.part()
	}
	for _, stop := range n.stops {
		stop()
	}
	cancel()
	n.goes.Wait()
	return n.close()
}

// part brings everything here to rest, saved, and says goodbye. Leases are given up to the leader before, so that nobody waits who claims at the goodbye; if this
// node is the leader, whose successor knows nothing of them, again to that.
func (n *Node) part() {
	led := n.arbiter.Status().Leader == n.id
	ctx, done := context.WithTimeout(context.Background(), saveWithin)
	defer done()
	if err := n.sup.Retire(ctx); err != nil {
		n.log.Error("not everything here ended in order: what is named goes on from its last acknowledged checkpoint, or after its lease", "error", err)
	}
	gctx, said := context.WithTimeout(context.Background(), goodbyeWithin)
	defer said()
	n.members.Goodbye(gctx)
	if !led {
		return
	}
	hctx, handed := context.WithTimeout(context.Background(), goodbyeWithin)
	defer handed()
	if err := errors.Join(n.arbiter.HandOver(hctx), n.sup.Relinquish(hctx)); err != nil {
		n.log.Warn("the leadership was not handed over in order: claims of what was exactly-one here wait", "error", err)
	}
}

// close gives back what New opened.
func (n *Node) close() error {
	var errs []error
	if n.links != nil {
		n.links.close()
	}
	if n.blobs != nil {
		errs = append(errs, n.blobs.Close())
	}
	if n.records != nil {
		errs = append(errs, n.records.Close())
	}
	if n.caller != nil {
		n.caller.Close()
	}
	if n.arbiter != nil {
		errs = append(errs, n.arbiter.Close())
	}
	if n.overlay != nil {
		errs = append(errs, n.overlay.Close())
	}
	if n.store != nil {
		errs = append(errs, n.store.Close())
	}
	if n.sup != nil {
		if err := os.RemoveAll(n.runDir()); err != nil {
			n.log.Warn("runtime folder", "error", err)
		}
	}
	return errors.Join(errs...)
}
