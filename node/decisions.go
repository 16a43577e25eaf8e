package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/coppice-project/coppice/dht/kb"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	"github.com/coppice-project/coppice/placement"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

const (
	protoReplay protocol.ID = "/coppice/replay/1"

	// toldDecisions is how many of a coordinator's newest decisions every node can read, in one record of toldBytes at most.
	toldDecisions = 32
	toldBytes     = 12 << 10
)

func decisionsKey(coordinator peer.ID) string { return "/kb/decisions/" + coordinator.String() }

// tellDecisions writes down what this node, as coordinator, decided lately.
func (n *Node) tellDecisions(ctx context.Context) error {
	all := n.decisions.List()
	all = all[:min(len(all), toldDecisions)]
	b, err := json.Marshal(all)
	for err == nil && len(b) > toldBytes && len(all) > 1 {
		all = all[:len(all)/2]
		b, err = json.Marshal(all)
	}
	if err == nil {
		_, _, err = n.records.Put(ctx, decisionsKey(n.id), b, 0)
	}
	return err
}

// deciders are the nodes that may have been coordinator lately: the voters, this node first where it has decided anything.
func (n *Node) deciders() []peer.ID {
	out := slices.Clone(n.arbiter.Status().Voters)
	out = slices.DeleteFunc(out, func(id peer.ID) bool { return id == n.id })
	return append([]peer.ID{n.id}, out...)
}

func (n *Node) decisionsTable() kb.Table {
	return kb.Table{
		Name: "decisions", Doc: "rounds of placement that decided something, of the voters and the node that answers; the coordinator itself tells 128, others 32 at most",
		Columns: []kb.Column{
			text("time", "RFC 3339, by the coordinator's clock"), text("coordinator", ""), text("digest", "of all that it was decided on; for plan --replay"), integer("feasible", "every instance has a node"),
			integer("optimal", "proven: no plan was better"), number("objective_before", ""), number("objective", ""), number("bound", "no plan was better"),
			integer("places", "instances placed"), integer("moves", ""), integer("others", "successors named, instances retired, …"), text("what", ""), text("problem", "why the round was skipped"),
			number("age_ms", ""), text("source", ""),
		},
		List: func(ctx context.Context, _ kb.Freshness) (kb.Rows, error) {
			out := kb.Rows{}
			for _, id := range n.deciders() {
				all, age, ok := n.decisionsOf(ctx, id)
				out.Asked++
				if !ok {
					continue
				}
				out.Answered++
				out.MaxAge = max(out.MaxAge, age)
				for _, e := range all {
					out.Rows = append(out.Rows, []any{
						e.Time.UTC().Format(time.RFC3339Nano), n.nameOf(id), e.Digest, e.Feasible, e.Optimal, e.Before, e.Objective, e.Bound, int64(e.Places), int64(e.Moves), int64(e.Others),
						n.named(e.What), e.Problem, ms(age), n.nameOf(id),
					})
				}
			}
			return out, nil
		},
	}
}

// decisionsOf is what a node decided lately. One that decided nothing has answered too.
func (n *Node) decisionsOf(ctx context.Context, id peer.ID) (all []placement.Entry, age time.Duration, ok bool) {
	if id == n.id {
		return n.decisions.List(), 0, true
	}
	rec, _, err := n.records.Get(ctx, decisionsKey(id))
	if err != nil {
		return nil, 0, true
	}
	if json.Unmarshal(rec.Value, &all) != nil {
		return nil, 0, false
	}
	return all, rec.Age, true
}

// named puts nodes' names in the place of their ids.
func (n *Node) named(text string) string {
	for _, m := range n.members.All() {
		if m.Name != "" {
			text = strings.ReplaceAll(text, m.ID.String(), m.Name)
		}
	}
	return text
}

func (n *Node) serveReplay(ctx context.Context, _ peer.ID, req *placementv1.ReplayRequest) (*placementv1.ReplayReply, error) {
	return n.decisions.Replay(ctx, req.GetDigest(), coordinator{n})
}

// replay has the node that keeps a decision solve it again.
func (n *Node) replay(ctx context.Context, digest string) (*apiv1.Replay, error) {
	what := "replay " + digest
	var errs []error
	for _, id := range n.deciders() {
		reply, err := n.askReplay(ctx, id, digest)
		switch {
		case err != nil:
			errs = append(errs, fmt.Errorf("%s: %w", n.nameOf(id), err))
			continue
		case len(reply.GetCandidates()) > 0:
			return nil, api.Fail(connect.CodeInvalidArgument, what, "several decisions begin so: "+strings.Join(reply.GetCandidates(), ", "), "")
		case !reply.GetFound():
			continue
		}
		return &apiv1.Replay{
			Digest: reply.GetDigest(), Node: n.nameOf(id), Same: reply.GetSame(), Time: timestamppb.New(time.UnixMilli(int64(reply.GetUnixMs()))), RequestBytes: reply.GetRequestBytes(),
			PlanBytes: reply.GetPlanBytes(), TookMs: reply.GetTookMs(), Objective: reply.GetObjective(),
		}, nil
	}
	if err := errors.Join(errs...); err != nil {
		return nil, api.Fail(connect.CodeUnavailable, what, strings.ReplaceAll(err.Error(), "\n", "; "), "coppice status")
	}
	return nil, api.Fail(connect.CodeNotFound, what, fmt.Sprintf("no coordinator keeps that decision: each keeps its last %d, as long as its process lives", placement.LedgerEntries),
		`coppice query "select time, digest, what from decisions"`)
}

func (n *Node) askReplay(ctx context.Context, id peer.ID, digest string) (*placementv1.ReplayReply, error) {
	req := &placementv1.ReplayRequest{Digest: digest}
	if id == n.id {
		return n.serveReplay(ctx, id, req)
	}
	reply := &placementv1.ReplayReply{}
	return reply, n.caller.Call(ctx, id, protoReplay, req, reply)
}
