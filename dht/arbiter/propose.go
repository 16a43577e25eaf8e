package arbiter

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/coppice-project/coppice/internal/planted"
)

// judge says what an answer means, and takes its hints.
func (a *Arbiter) judge(leader peer.ID, resp *wirev1.ArbiterResponse, err error) verdict {
	if err != nil {
		if peers.CodeOf(err) != wirev1.Failure_OK {
			a.where.lost(leader)
			return notDone // its handler did not get to it
		}
		a.disbelieve(leader)
		if planted.Bug("doubt-forgotten") {
			return notDone
		}
		// Even an unreachable peer may have got it: the call may have gone into a pooled stream first, and only then have dialled.
		return doubtful
	}
	inc := resp.GetWhere().GetIncarnation()
	a.raise(point{inc, resp.GetIndex()})
	switch resp.GetCode() {
	case wirev1.ArbiterResponse_OK:
		for _, r := range resp.GetResults() {
			a.raise(point{inc, r.GetIndex()})
		}
		return carried
	case wirev1.ArbiterResponse_DOUBT:
		return doubtful
	case wirev1.ArbiterResponse_FORMAT, wirev1.ArbiterResponse_INVALID:
		return rejected
	case wirev1.ArbiterResponse_NOT_LEADER:
		a.where.lost(leader)
		a.hear(resp.GetWhere())
	case wirev1.ArbiterResponse_BUSY:
	}
	return notDone
}

// disbelieve forgets a leader that did not answer, unless this node's own raft hears it.
func (a *Arbiter) disbelieve(leader peer.ID) {
	if r, member := a.inGroup(); member && a.leaderOf(r) == leader {
		return
	}
	a.where.lost(leader)
}

// findLeader waits a little for a leader to be known, asking others when this node's own raft does not know.
func (a *Arbiter) findLeader(ctx context.Context, changed <-chan struct{}) {
	if !a.machineCurrent() {
		a.seek(ctx)
	}
	t := time.NewTimer(20 * time.Millisecond)
	defer t.Stop()
	select {
	case <-changed:
	case <-t.C:
	case <-ctx.Done():
	}
}

// pause is a growing pause between tries.
type pause struct{ d time.Duration }

func newPause() *pause { return &pause{d: 2 * time.Millisecond} }

func (p *pause) wait(ctx context.Context) {
	sleep(ctx, p.d)
	p.d = min(2*p.d, 100*time.Millisecond)
}

// do brings one command to its end: OK, REFUSED or FENCED, with whether an earlier try may have been carried out.
func (a *Arbiter) do(ctx context.Context, cmd *wirev1.ArbiterCommand) (*wirev1.ArbiterResult, bool, error) {
	if err := checkCommand(cmd); err != nil {
		return nil, false, err
	}
	for {
		p, err := a.queue.add(ctx, cmd)
		if err != nil {
			return nil, false, err
		}
		var o outcome
		select {
		case o = <-p.done:
		case <-ctx.Done():
			if a.queue.withdraw(p) && !planted.Bug("doubt-as-failure") {
				return nil, true, &InDoubtError{Cause: context.Cause(ctx)}
			}
			return nil, false, fmt.Errorf("%w (%w)", ErrNoLeader, context.Cause(ctx))
		}
		switch {
		case o.err != nil && o.doubt:
			return nil, true, &InDoubtError{Cause: o.err}
		case o.err != nil:
			return nil, false, o.err
		case o.res.GetCode() == wirev1.ArbiterResult_TOO_OLD && o.doubt:
			return nil, true, &InDoubtError{Current: fromWire(o.res.GetRegister()), Cause: errors.New(o.res.GetReason())}
		case o.res.GetCode() == wirev1.ArbiterResult_TOO_OLD:
			continue // certainly not done; by now more of the log is known
		case o.res.GetCode() == wirev1.ArbiterResult_WAIT && o.doubt:
			return nil, true, &InDoubtError{Current: fromWire(o.res.GetRegister()), Cause: errors.New(o.res.GetReason())}
		}
		return o.res, o.doubt, nil
	}
}

func resultError(r *wirev1.ArbiterResult) error {
	cur, exists := value(fromWire(r.GetRegister()))
	switch r.GetCode() {
	case wirev1.ArbiterResult_OK:
		return nil
	case wirev1.ArbiterResult_FENCED:
		return &FencedError{Current: cur, Exists: exists, Reason: r.GetReason()}
	case wirev1.ArbiterResult_REFUSED:
		return &RefusedError{Current: cur, Exists: exists, Reason: r.GetReason()}
	case wirev1.ArbiterResult_WAIT:
		return &WaitError{For: time.Duration(r.GetWaitMs()) * time.Millisecond, Reason: r.GetReason()}
	case wirev1.ArbiterResult_UNSPECIFIED, wirev1.ArbiterResult_TOO_OLD:
	}
	return &InDoubtError{Cause: fmt.Errorf("the leader answered with code %s", r.GetCode())}
}

func inDoubt(r *wirev1.ArbiterResult) error {
	return &InDoubtError{Current: fromWire(r.GetRegister()), Cause: fmt.Errorf("an earlier try may have been carried out, and now: %s", r.GetReason())}
}

func result(r *wirev1.ArbiterResult) Register {
	v, _ := value(fromWire(r.GetRegister()))
	return v
}

// nonce draws one that is not 0.
func (a *Arbiter) nonce() uint64 {
	for {
		if n := a.cfg.Rand(); n != 0 {
			return n
		}
	}
}

// Claim takes the next epoch of a register. It is retried with the same nonce until the context ends. Errors: *RefusedError: another
// epoch than the expected one is current, and the claim was not carried out; ErrNoLeader: not carried out; ErrInDoubt: unknown.
func (a *Arbiter) Claim(ctx context.Context, r ClaimRequest) (Register, error) {
	if r.Nonce == 0 {
		r.Nonce = a.nonce()
	}
	res, doubt, err := a.do(ctx, &wirev1.ArbiterCommand{Kind: &wirev1.ArbiterCommand_Claim{Claim: claimCommand(&r)}})
	if err != nil {
		return Register{}, fmt.Errorf("claim %s: %w", r.Key, err)
	}
	if res.GetCode() == wirev1.ArbiterResult_REFUSED && doubt {
		// The claim made epoch expect+1 or nothing. If another nonce made that one, it was nothing.
		cur := res.GetRegister()
		if cur == nil || cur.GetEpoch() != r.Expect+1 {
			return Register{}, fmt.Errorf("claim %s: %w", r.Key, inDoubt(res))
		}
	}
	if err := resultError(res); err != nil {
		return Register{}, fmt.Errorf("claim %s: %w", r.Key, err)
	}
	return result(res), nil
}

// Commit acknowledges a checkpoint in the current epoch. Errors: *FencedError: another epoch is current; *RefusedError: the sequence
// has a gap or too few holders acknowledged; in both cases it was not carried out. ErrNoLeader and ErrInDoubt as for Claim.
func (a *Arbiter) Commit(ctx context.Context, r CommitRequest) (Register, error) {
	res, doubt, err := a.do(ctx, &wirev1.ArbiterCommand{Kind: &wirev1.ArbiterCommand_Commit{Commit: commitCommand(&r)}})
	if err != nil {
		return Register{}, fmt.Errorf("commit %s seq %d: %w", r.Key, r.Seq, err)
	}
	if res.GetCode() != wirev1.ArbiterResult_OK && doubt {
		// A seq never goes back: below ours, ours never was. It never will be only if its epoch is over: an earlier try that left a gap
		// may yet arrive when the gap is closed.
		cur := res.GetRegister()
		if cur == nil || cur.GetSeq() >= r.Seq || res.GetCode() == wirev1.ArbiterResult_REFUSED {
			return Register{}, fmt.Errorf("commit %s seq %d: %w", r.Key, r.Seq, inDoubt(res))
		}
	}
	if err := resultError(res); err != nil {
		return Register{}, fmt.Errorf("commit %s seq %d: %w", r.Key, r.Seq, err)
	}
	return result(res), nil
}

// SetHolders records who holds checkpoint seq by now. It is refused when another seq is current.
func (a *Arbiter) SetHolders(ctx context.Context, key string, seq uint64, holders []peer.ID) (Register, error) {
	c := &wirev1.ArbiterSetHolders{Key: key, Seq: seq, Holders: idsToWire(holders)}
	return a.simple(ctx, "set holders of "+key, &wirev1.ArbiterCommand{Kind: &wirev1.ArbiterCommand_SetHolders{SetHolders: c}})
}

// Release gives an epoch up: the register has no owner until the next claim. It is fenced when another epoch is current.
func (a *Arbiter) Release(ctx context.Context, key string, epoch, nonce uint64) (Register, error) {
	c := &wirev1.ArbiterRelease{Key: key, Epoch: epoch, Nonce: nonce}
	return a.simple(ctx, "release "+key, &wirev1.ArbiterCommand{Kind: &wirev1.ArbiterCommand_Release{Release: c}})
}

func (a *Arbiter) simple(ctx context.Context, what string, cmd *wirev1.ArbiterCommand) (Register, error) {
	res, doubt, err := a.do(ctx, cmd)
	if err == nil && res.GetCode() != wirev1.ArbiterResult_OK && doubt {
		err = inDoubt(res)
	}
	if err == nil {
		err = resultError(res)
	}
	if err != nil {
		return Register{}, fmt.Errorf("%s: %w", what, err)
	}
	return result(res), nil
}

// Txn carries out a transaction. A transaction whose compares fail is no error: see TxnResult. *RefusedError: neither branch could be
// done, and nothing was. ErrNoLeader and ErrInDoubt as for Claim; after the latter, the same request again tells.
func (a *Arbiter) Txn(ctx context.Context, r TxnRequest) (TxnResult, error) {
	if r.Nonce == 0 {
		r.Nonce = a.nonce()
	}
	c, err := txnCommand(&r)
	if err != nil {
		return TxnResult{}, fmt.Errorf("transaction: %w", err)
	}
	// The group remembers a transaction's first result, so a repetition leaves nothing in doubt.
	res, _, err := a.do(ctx, &wirev1.ArbiterCommand{Kind: &wirev1.ArbiterCommand_Txn{Txn: c}})
	if err == nil {
		err = resultError(res)
	}
	if err != nil {
		return TxnResult{}, fmt.Errorf("transaction: %w", err)
	}
	out := TxnResult{Succeeded: res.GetSucceeded(), Index: res.GetIndex()}
	for _, w := range res.GetRegisters() {
		out.Registers = append(out.Registers, *fromWire(w))
	}
	return out, nil
}
