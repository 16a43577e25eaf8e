package node

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/supervisor"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/kb"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

// historySync bounds the wait for the newest entries; a node that is cut off shows those that it knows.
const historySync = 2 * time.Second

// history is what is kept of an instance's earlier checkpoints, as this node knows it.
func (n *Node) history(instance string) (*componentsv1.History, error) {
	reg, ok := n.arbiter.Get(components.HistoryRegister(instance))
	if !ok {
		return &componentsv1.History{Instance: instance}, nil
	}
	return supervisor.ReadHistory(reg)
}

// Checkpoints lists what is kept, and the stored branches.
func (v *verbs) Checkpoints(ctx context.Context, r *apiv1.CheckpointsRequest) (*apiv1.CheckpointsResponse, error) {
	n := v.n
	s, err := n.find("checkpoints", r.GetComponent())
	if err != nil {
		return nil, err
	}
	sctx, cancel := context.WithTimeout(ctx, historySync)
	defer cancel()
	if err := n.arbiter.Sync(sctx); err != nil {
		n.log.Debug("checkpoints are listed as they are known here", "error", err)
	}
	kept := components.RetentionOf(s.eff.Spec)
	out := &apiv1.CheckpointsResponse{Component: s.component, History: uint32(kept.Count), HistoryAgeMs: uint64(kept.Age.Milliseconds())}
	for _, name := range s.instances {
		h, err := n.history(name)
		if err != nil {
			return nil, fail("checkpoints "+name, err)
		}
		for _, e := range h.GetEntries() {
			out.Checkpoints = append(out.Checkpoints, n.checkpointOut(name, supervisor.EarlierOf(e)))
		}
		for _, b := range supervisor.Branches(n.arbiter, name) {
			out.Checkpoints = append(out.Checkpoints, n.checkpointOut(name, b))
		}
	}
	return out, nil
}

func (n *Node) checkpointOut(instance string, e supervisor.Earlier) *apiv1.Checkpoint {
	at := time.UnixMilli(int64(e.GetUnixMs()))
	out := &apiv1.Checkpoint{
		Instance: instance, Id: e.Name, Seq: e.GetSeq(), Time: timestamppb.New(at), AgeMs: uint64(max(n.clusterNow().Sub(at).Milliseconds(), 0)),
		Version: e.GetVersion(), Digest: e.GetDigest(), Schema: e.GetSchema(), Bytes: e.GetBytes(), Why: e.GetWhy(), Epoch: e.GetEpoch(), Root: fmt.Sprintf("%x", e.GetRoot()),
	}
	if art, ok := n.registry.Artifact(e.GetDigest()); ok {
		out.Artifact = art.GetName()
	}
	for _, s := range e.GetHolders() {
		out.Holders = append(out.Holders, n.nameText(s))
		if n.isAliveText(s) {
			out.HoldersAlive++
		}
	}
	if e.IsBranch() {
		out.Branch = instance + e.Name
		if e.Outcome != "" {
			out.Why += ", " + e.Outcome
		}
	}
	if reg, ok := n.arbiter.Get(components.InstanceRegister(instance)); ok {
		out.Present = string(reg.Root) == string(e.GetRoot())
	}
	return out
}

// inspectHistory adds how far back an instance can go.
func (n *Node) inspectHistory(out *apiv1.InspectInstance) {
	h, err := n.history(out.GetInstance())
	if err != nil || len(h.GetEntries()) == 0 {
		return
	}
	out.EarlierCheckpoints = uint32(len(h.GetEntries()))
	out.OldestCheckpointAgeMs = proto.Uint64(n.checkpointOut(out.GetInstance(), supervisor.EarlierOf(h.GetEntries()[0])).GetAgeMs())
}

// moment is what a command means by --at.
func (n *Node) moment(what string, at *apiv1.Moment) (components.Moment, error) {
	switch {
	case at.GetId() != "":
		return components.Moment{ID: at.GetId()}, nil
	case at.GetTime().IsValid() && at.GetTime() != nil:
		return components.Moment{Time: at.GetTime().AsTime()}, nil
	case at != nil && at.AgoMs != nil:
		return components.Moment{Time: n.clusterNow().Add(-time.Duration(min(at.GetAgoMs(), uint64(1<<53))) * time.Millisecond)}, nil
	}
	return components.Moment{}, api.Fail(connect.CodeInvalidArgument, what, "it was not said which checkpoint", "coppice checkpoints")
}

// failHistory says how to find what there is.
func failHistory(what, component string, err error) error {
	if errors.Is(err, components.ErrNoCheckpoint) {
		return api.Fail(connect.CodeNotFound, what, err.Error(), "coppice checkpoints "+component)
	}
	return fail(what, err)
}

// Restore takes an instance back to an earlier checkpoint.
func (v *verbs) Restore(ctx context.Context, r *apiv1.RestoreRequest) (*apiv1.ReplaceResponse, error) {
	n, begin := v.n, time.Now()
	s, err := n.find("restore", r.GetComponent())
	if err != nil {
		return nil, err
	}
	name, err := s.one("restore")
	if err != nil {
		return nil, err
	}
	what := "restore " + name
	at, err := n.moment(what, r.GetAt())
	if err != nil {
		return nil, err
	}
	out, err := v.onOwner(ctx, what, name, r.GetTimeoutMs(), func(ctx context.Context) (supervisor.Replaced, error) {
		res, err := n.sup.Restore(ctx, name, at, supervisor.Wish{Trigger: "operator", Cause: restoreCause}, func(digest string) (supervisor.Wish, error) {
			return n.restoreWish(s, name, digest)
		})
		if err != nil {
			err = failHistory(what, name, err)
		}
		return res, err
	}, func(ctx context.Context, c apiv1connect.ControlClient) (*apiv1.ReplaceResponse, error) {
		return c.Restore(ctx, &apiv1.RestoreRequest{Component: name, At: r.GetAt(), TimeoutMs: r.GetTimeoutMs()})
	})
	if err != nil {
		return nil, err
	}
	out.Component, out.TookMs = s.component, ms(time.Since(begin))
	return out, nil
}

const restoreCause = "restored by a command"

// restoreWish is the desired state of a restore that takes another version.
func (n *Node) restoreWish(s subject, name, digest string) (supervisor.Wish, error) {
	art, ok := n.registry.Artifact(digest)
	switch {
	case !ok:
		return supervisor.Wish{}, fmt.Errorf("%s, which wrote that state, is no longer in the registry", digest)
	case len(n.instancesOf(s.component)) > 1:
		return supervisor.Wish{}, fmt.Errorf("it takes version %s to read that state, and a version holds for all instances of %s; fork %s instead", art.GetVersion(), s.component, name)
	}
	return n.wish(s, art, restoreCause)
}

func (n *Node) historyTable() kb.Table {
	return kb.Table{
		Name: "checkpoints_history", Doc: "earlier checkpoints that are kept, to go back to",
		Columns: []kb.Column{
			text("instance", ""), text("id", "as coppice restore --at takes it"), integer("seq", ""), text("time", "RFC 3339, of the state"), text("why", "by hand | before swap | before restore | before undo | periodic | branch"),
			text("version", ""), text("digest", ""), integer("schema", ""), integer("bytes", ""), integer("epoch", ""), text("root", "hex"), text("holders", "JSON list of nodes"),
			integer("holders_alive", ""), number("age_ms", "of the checkpoint"), text("source", ""),
		},
		List: func(ctx context.Context, f kb.Freshness) (kb.Rows, error) {
			if err := n.freshen(ctx, f); err != nil {
				return kb.Rows{}, err
			}
			out := kb.Rows{MaxAge: n.viewAge(), Asked: 1, Answered: 1}
			for _, reg := range n.arbiter.List(components.HistoryPrefix) {
				h, err := supervisor.ReadHistory(reg)
				if err != nil {
					return out, err
				}
				for _, e := range h.GetEntries() {
					c := n.checkpointOut(strings.TrimPrefix(reg.Key, components.HistoryPrefix), supervisor.EarlierOf(e))
					out.Rows = append(out.Rows, []any{
						c.GetInstance(), c.GetId(), int64(c.GetSeq()), c.GetTime().AsTime().Format(time.RFC3339Nano), c.GetWhy(), c.GetVersion(), c.GetDigest(), int64(c.GetSchema()),
						int64(c.GetBytes()), int64(c.GetEpoch()), c.GetRoot(), jsonList(c.GetHolders()), int64(c.GetHoldersAlive()), float64(c.GetAgeMs()), "arbiter",
					})
				}
			}
			return out, nil
		},
	}
}

func (n *Node) isAliveText(id string) bool {
	p, err := peer.Decode(id)
	return err == nil && n.isAlive(p)
}
