package arbiter

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/hashicorp/raft"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// enqueueTime bounds how long raft may take to accept a proposal.
const enqueueTime = 500 * time.Millisecond

// serveCall answers /coppice/arbiter/1. Everything that can be wrong stands in the answer, so that an error is one of the connection.
func (a *Arbiter) serveCall(ctx context.Context, from peer.ID, req *wirev1.ArbiterRequest) (*wirev1.ArbiterResponse, error) {
	return a.serve(ctx, from, req), nil
}

func (a *Arbiter) serve(ctx context.Context, from peer.ID, req *wirev1.ArbiterRequest) *wirev1.ArbiterResponse {
	var resp *wirev1.ArbiterResponse
	if err := ours(req.GetShard()); err != nil {
		resp = invalid("%v", err)
	} else {
		a.meet(incarnationOf(req.GetIncarnation()))
		resp = a.answer(ctx, from, req)
	}
	resp.Where = a.whereNow()
	return resp
}

func (a *Arbiter) answer(ctx context.Context, from peer.ID, req *wirev1.ArbiterRequest) *wirev1.ArbiterResponse {
	switch k := req.GetKind().(type) {
	case *wirev1.ArbiterRequest_Propose:
		return a.propose(ctx, k.Propose, req.GetSince())
	case *wirev1.ArbiterRequest_Read:
		resp := a.serveReadIndex(ctx)
		if resp.GetCode() == wirev1.ArbiterResponse_OK {
			st := a.fsm.shown.Load()
			if st == nil { // another incarnation begins just now
				return notLeader()
			}
			resp.Register, resp.Index = toWire(treeGet(st.tree, k.Read)), st.at.index
		}
		return resp
	case *wirev1.ArbiterRequest_ReadIndex:
		return a.serveReadIndex(ctx)
	case *wirev1.ArbiterRequest_Hello:
		return &wirev1.ArbiterResponse{RolledBack: a.vouch(from, k.Hello)}
	case *wirev1.ArbiterRequest_Status:
		return &wirev1.ArbiterResponse{Log: a.logState()}
	case *wirev1.ArbiterRequest_Lease:
		return a.serveLease(ctx, from, k.Lease)
	case *wirev1.ArbiterRequest_Beat:
		return a.two.serveBeat(from, incarnationOf(req.GetIncarnation()))
	case *wirev1.ArbiterRequest_Reach:
		return a.serveReach(ctx, peer.ID(k.Reach))
	case *wirev1.ArbiterRequest_StepDown:
		a.keeper.leave(from)
		return &wirev1.ArbiterResponse{}
	}
	return invalid("unknown request")
}

// serveReach says whether this node gets through to another one.
func (a *Arbiter) serveReach(ctx context.Context, to peer.ID) *wirev1.ArbiterResponse {
	ctx, cancel := context.WithTimeout(ctx, a.t.RPC/2)
	defer cancel()
	req := a.request(&wirev1.ArbiterRequest{Kind: &wirev1.ArbiterRequest_Status{Status: true}})
	if err := a.caller.Call(ctx, to, protoCall, req, new(wirev1.ArbiterResponse)); err != nil {
		return &wirev1.ArbiterResponse{Code: wirev1.ArbiterResponse_BUSY, Reason: err.Error()}
	}
	return &wirev1.ArbiterResponse{}
}

func notLeader() *wirev1.ArbiterResponse {
	return &wirev1.ArbiterResponse{Code: wirev1.ArbiterResponse_NOT_LEADER, Reason: "this node does not lead the arbiter"}
}

func invalid(format string, args ...any) *wirev1.ArbiterResponse {
	return &wirev1.ArbiterResponse{Code: wirev1.ArbiterResponse_INVALID, Reason: fmt.Sprintf(format, args...)}
}

// propose has an entry committed, if this node leads. since is the number of the incarnation whose log index stands in the entry.
func (a *Arbiter) propose(ctx context.Context, entry []byte, since uint64) *wirev1.ArbiterResponse {
	r := a.raft.Load()
	if r == nil || a.halted.Load() || r.State() != raft.Leader || a.superseded() || !a.serving.enter() {
		return notLeader()
	}
	defer a.serving.leave()
	e, err := decodeEntry(entry, a.cfg.Format)
	if err != nil {
		return &wirev1.ArbiterResponse{Code: wirev1.ArbiterResponse_FORMAT, Reason: fmt.Sprintf("the leader does not know what is proposed: %v; finish the upgrade first", err)}
	}
	if st := a.fsm.shown.Load(); st != nil && e.GetFormat() > max(1, st.meta.Format) {
		return &wirev1.ArbiterResponse{Code: wirev1.ArbiterResponse_FORMAT, Reason: fmt.Sprintf("entries of format %d are not agreed on yet", e.GetFormat())}
	}
	if err := checkEntry(e, len(entry)); err != nil {
		return invalid("%v", err)
	}
	if st := a.fsm.shown.Load(); st != nil && since != st.meta.Incarnation && e.GetSince() > 0 {
		// An index of another incarnation says nothing about this log.
		e.Since = 0
		if entry, err = proto.Marshal(e); err != nil {
			return invalid("%v", err)
		}
	}
	if err := a.leases.catchUp(ctx, r, e); err != nil {
		if errors.Is(err, raft.ErrNotLeader) {
			return notLeader()
		}
		return &wirev1.ArbiterResponse{Code: wirev1.ArbiterResponse_BUSY, Reason: err.Error()}
	}
	admitted, leads := a.leases.admit(r, e)
	if !leads {
		return notLeader()
	}
	resp := a.apply(r, entry, e, admitted)
	admitted.settle(resp.GetCode() == wirev1.ArbiterResponse_DOUBT)
	return resp
}

// apply has what was admitted of an entry committed.
func (a *Arbiter) apply(r *raft.Raft, entry []byte, e *wirev1.ArbiterEntry, admitted *admission) *wirev1.ArbiterResponse {
	if admitted.behind {
		return &wirev1.ArbiterResponse{Code: wirev1.ArbiterResponse_BUSY, Reason: "another claim of a register is being decided"}
	}
	rest, err := admitted.rest(entry, e)
	if err != nil {
		return invalid("%v", err)
	}
	if rest == nil {
		return &wirev1.ArbiterResponse{Results: admitted.merge(len(e.GetCommands()), nil)}
	}
	f := r.Apply(rest, enqueueTime)
	switch err := f.Error(); {
	case err == nil:
	case errors.Is(err, raft.ErrNotLeader):
		return notLeader()
	case errors.Is(err, raft.ErrEnqueueTimeout), errors.Is(err, raft.ErrLeadershipTransferInProgress):
		return &wirev1.ArbiterResponse{Code: wirev1.ArbiterResponse_BUSY, Reason: err.Error()}
	default: // leadership lost, disk failed, shut down: the entry may be in the log
		return &wirev1.ArbiterResponse{Code: wirev1.ArbiterResponse_DOUBT, Reason: err.Error()}
	}
	results, ok := f.Response().([]*wirev1.ArbiterResult)
	if !ok {
		return &wirev1.ArbiterResponse{Code: wirev1.ArbiterResponse_DOUBT, Reason: fmt.Sprint(f.Response())}
	}
	return &wirev1.ArbiterResponse{Results: admitted.merge(len(e.GetCommands()), results), Index: f.Index()}
}

func (a *Arbiter) logState() *wirev1.ArbiterLog {
	_, halted := a.failures.get()
	group, _ := a.disk.incarnations()
	l := &wirev1.ArbiterLog{
		Halted: halted, MaxFormat: a.cfg.Format, Open: a.trans.Load().layer.isOpen(), Applied: a.fsm.applied.Load(), Group: group.wire(),
	}
	if st := a.fsm.shown.Load(); st != nil {
		l.Registers = uint64(st.tree.Len())
	}
	if st := a.view.now(); st.complete > 0 {
		l.Shown, l.ShownIndex, l.ShownRegisters = st.meta.incarnation().wire(), st.complete, uint64(st.tree.Len())
	}
	if r := a.raft.Load(); r != nil {
		l.Term, l.Last, l.Committed = r.CurrentTerm(), r.LastIndex(), r.CommitIndex()
		l.LastTerm = a.disk.termOf(l.Last)
		voters, _ := a.configuration(r)
		l.Voters = idsToWire(voters)
	}
	return l
}
