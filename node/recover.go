package node

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"connectrpc.com/connect"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/records"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

const (
	// lookupTime bounds the search for one newer checkpoint, adoptTime the fetching of one.
	lookupTime = 3 * time.Second
	adoptTime  = 2 * time.Minute
)

// Recover makes one survivor the only voter of the next incarnation after most voters were lost (consistency.md §3.7). What it does not
// really do it only describes.
func (v *verbs) Recover(ctx context.Context, r *apiv1.RecoverRequest) (*apiv1.RecoverResponse, error) {
	n, begin := v.n, time.Now()
	all := n.arbiter.Survivors(ctx)
	from, err := n.recoverFrom(r.GetFrom(), all)
	if err != nil {
		return nil, err
	}
	if from.ID != n.id { // it knows best what its own log lacks
		c, err := api.Forward(ctx, n, from.ID.String())
		if err != nil {
			return nil, err
		}
		return c.Recover(ctx, &apiv1.RecoverRequest{From: from.ID.String(), Really: r.GetReally(), KeepOlder: r.GetKeepOlder()})
	}
	out := n.recoverReport(from, all)
	var adopt []arbiter.Adoption
	if out.Possible {
		adopt, out.Adopted = n.newerCheckpoints(ctx, r.GetReally() && !r.GetKeepOlder())
		if r.GetKeepOlder() {
			for _, x := range out.Adopted {
				x.Reason = "newer checkpoints are not to be adopted"
			}
		}
	}
	if !r.GetReally() {
		out.TookMs = ms(time.Since(begin))
		return out, nil
	}
	if !out.Possible {
		return nil, api.Fail(connect.CodeFailedPrecondition, "recover", out.Reason, "coppice status")
	}
	inc, err := n.arbiter.Recover(ctx, adopt)
	switch {
	case errors.Is(err, arbiter.ErrMajority), errors.Is(err, arbiter.ErrNoLog):
		return nil, api.Fail(connect.CodeFailedPrecondition, "recover", err.Error(), "coppice recover")
	case err != nil:
		return nil, fail("recover", err)
	}
	out.Done, out.Incarnation, out.TookMs = true, inc, ms(time.Since(begin))
	n.log.Warn("recovered from the loss of most voters", "incarnation", inc, "adopted", len(adopt))
	return out, nil
}

// recoverFrom picks whose log is to count.
func (n *Node) recoverFrom(name string, all []arbiter.Survivor) (arbiter.Survivor, error) {
	if name == "" {
		return all[0], nil
	}
	m, err := n.findNode("recover from", name)
	if err != nil {
		return arbiter.Survivor{}, err
	}
	for _, s := range all {
		if s.ID == m.ID {
			return s, nil
		}
	}
	return arbiter.Survivor{}, api.Fail(connect.CodeFailedPrecondition, "recover from "+m.Name, "it does not answer", "coppice recover")
}

// recoverReport says what would be done with the log of from, and why not.
func (n *Node) recoverReport(from arbiter.Survivor, all []arbiter.Survivor) *apiv1.RecoverResponse {
	out := &apiv1.RecoverResponse{From: n.nameOf(from.ID), Incarnation: from.Incarnation}
	for _, s := range all {
		x := &apiv1.Survivor{
			Node: n.nameOf(s.ID), Id: s.ID.String(), Role: s.Role, Incarnation: s.Incarnation, Term: s.Term, LastIndex: s.Last, Committed: s.Committed,
			Applied: s.Applied, Registers: uint64(s.Registers), Halted: s.Halted,
		}
		for _, v := range s.Voters {
			x.Voters = append(x.Voters, n.nameOf(v))
		}
		if s.Leader != "" {
			x.Leader = n.nameOf(s.Leader)
		}
		out.Survivors = append(out.Survivors, x)
	}
	here, missing := arbiter.Reachable(from, all)
	for _, id := range missing {
		x := &apiv1.Missing{Node: n.nameOf(id), Id: id.String(), State: "unknown"}
		if m, ok := n.members.Member(id); ok {
			x.State, x.Since = m.State.String(), timestamppb.New(m.Since)
		}
		out.Missing = append(out.Missing, x)
	}
	best := all[0]
	leader, leads := arbiter.Leading(all)
	switch {
	case from.Incarnation == 0:
		out.Reason = out.From + " holds nothing of the arbiter's log"
	case from.Halted != "":
		out.Reason = out.From + " has stopped applying: " + from.Halted
	case from.Incarnation < best.Incarnation:
		out.Reason = fmt.Sprintf("%s is of incarnation %d, and %s of %d: nothing of a lower one may come back", out.From, from.Incarnation, n.nameOf(best.ID), best.Incarnation)
	case leads:
		out.Reason = fmt.Sprintf("%s leads the arbiter: a majority of the voters is there, and nothing needs to be recovered", n.nameOf(leader.ID))
	case len(here) > len(from.Voters)/2:
		out.Reason = fmt.Sprintf("%d of %d voters answer: that is a majority, and nothing needs to be recovered", len(here), len(from.Voters))
	default:
		out.Possible = true
		out.Lost = append(out.Lost, fmt.Sprintf("what the arbiter committed after entry %d, if anything: only the missing voters know", from.Last))
		if best.ID != from.ID && best.Last > from.Last {
			out.Lost = append(out.Lost, fmt.Sprintf("entries %d to %d, which %s has", from.Last+1, best.Last, n.nameOf(best.ID)))
		}
	}
	return out
}

// newerCheckpoints looks, for each instance, for an acknowledged checkpoint that its holders have and the log of this node does not know
// of: the checkpoint index in the DHT names it. With fetch what can be adopted is brought here first, so that its root is known to be whole.
func (n *Node) newerCheckpoints(ctx context.Context, fetch bool) (adopt []arbiter.Adoption, told []*apiv1.Adopted) {
	for _, reg := range n.arbiter.List(components.InstancePrefix) {
		name := components.InstanceOfKey(reg.Key)
		x, ok := n.checkpointIndexOf(ctx, name)
		if !ok || x.Seq <= reg.Seq {
			continue
		}
		a := arbiter.Adoption{Key: reg.Key, Seq: x.Seq}
		t := &apiv1.Adopted{Instance: name, RegisterSeq: reg.Seq, Seq: x.Seq}
		told = append(told, t)
		root, err := hex.DecodeString(x.Root)
		if err != nil || len(root) != len(blobs.Hash{}) {
			t.Reason = "the index names no root that can be read"
			continue
		}
		a.Root = root
		for _, s := range x.Holders {
			if id, err := peer.Decode(s); err == nil && id != n.id && n.isAlive(id) {
				a.Holders = append(a.Holders, id)
				t.Holders = append(t.Holders, n.nameOf(id))
			}
		}
		here := n.blobs.Complete(blobs.Hash(root))
		if !here && len(a.Holders) == 0 {
			t.Reason = "none of its holders is alive"
			continue
		}
		if fetch && !here {
			fctx, cancel := context.WithTimeout(ctx, adoptTime)
			err := n.blobs.Fetch(fctx, blobs.Hash(root), a.Holders)
			cancel()
			if err != nil {
				t.Reason = err.Error()
				continue
			}
			here = true
		}
		if here {
			a.Holders, t.Holders = append([]peer.ID{n.id}, a.Holders...), append([]string{n.cfg.Name}, t.Holders...)
		}
		adopt = append(adopt, a)
	}
	if !fetch {
		return nil, told
	}
	slices.SortFunc(told, func(a, b *apiv1.Adopted) int { return btoi(a.Reason != "") - btoi(b.Reason != "") })
	return adopt, told
}

// checkpointIndexOf reads where the DHT says that the last checkpoint of an instance lies.
func (n *Node) checkpointIndexOf(ctx context.Context, name string) (x checkpointIndex, ok bool) {
	ctx, cancel := context.WithTimeout(ctx, lookupTime)
	defer cancel()
	rec, _, err := n.records.Get(ctx, checkpointPrefix+name)
	if err != nil {
		if !errors.Is(err, records.ErrNotFound) {
			n.log.Warn("the checkpoint index cannot be read", "instance", name, "error", err)
		}
		return x, false
	}
	if err := json.Unmarshal(rec.Value, &x); err != nil {
		n.log.Warn("the checkpoint index cannot be read", "instance", name, "error", err)
		return x, false
	}
	return x, true
}
