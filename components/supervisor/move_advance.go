package supervisor

import (
	"context"
	"errors"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
)

// Between the preparation of a move and its pause the target catches up: what was committed while the state was copied and restored is fetched and restored
// while the source goes on serving, in rounds that get shorter. What is left for the pause is what happened in the last of them.

const (
	protoAdvance protocol.ID = "/coppice/move-advance/1"
	// advanceRounds at most; one that took no longer than advanceEnough is the last.
	advanceRounds   = 6
	advanceEnough   = 25 * time.Millisecond
	advanceDeadline = time.Minute
)

// advance brings the target of a move up to what is committed here. The error says that the target has given the move up. A target that does not know of
// this, or that cannot be reached now, is no error: it gets everything at the end, or does not answer then either.
func (i *instance) advance(ctx context.Context, to peer.ID, name string) error {
	if sv := i.gen.saver; sv == nil || !sv.cfg.incremental || sv.cfg.mode == componentsv1.Durability_DURABILITY_NONE {
		return nil // each round would copy all of it
	}
	for range advanceRounds {
		begin := time.Now()
		if err := i.flush(ctx); err != nil {
			return err
		}
		saved, _ := i.gen.saver.Saved()
		actx, cancel := context.WithTimeout(ctx, advanceDeadline)
		var reply componentsv1.FinishMoveReply
		err := i.sup.cfg.Caller.Call(actx, to, protoAdvance, &componentsv1.FinishMoveRequest{
			Instance: i.name, Move: name, Root: rootBytes(saved.Root), Holders: idStrings(saved.Holders),
		}, &reply)
		cancel()
		if err != nil {
			i.sup.cfg.Log.Debug("the target of a move does not catch up before the pause", "instance", i.name, "error", err)
			return nil
		}
		if reply.GetRefused() != "" {
			return errors.New(reply.GetRefused())
		}
		if time.Since(begin) <= advanceEnough {
			return nil
		}
	}
	return nil
}

// advanceMove gives a prepared process what was committed since. When that fails, what was prepared is ended: nobody knows how much of it the process has.
func (s *Supervisor) advanceMove(ctx context.Context, from peer.ID, req *componentsv1.FinishMoveRequest) (*componentsv1.FinishMoveReply, error) {
	name := req.GetInstance()
	s.mu.Lock()
	p := s.moves[name]
	if p == nil || p.standby || p.move != req.GetMove() || p.from != from || p.ending || p.finish {
		s.mu.Unlock()
		return &componentsv1.FinishMoveReply{Refused: "nothing is prepared here for this move"}, nil
	}
	p.timer.Reset(preparedFor + advanceDeadline)
	s.mu.Unlock()
	if err := s.bringTo(ctx, p, hashFrom(req.GetRoot()), components.InstanceRegister(name), idsFrom(req.GetHolders())); err != nil {
		s.forgetMove(name, p, true)
		return &componentsv1.FinishMoveReply{Refused: err.Error()}, nil
	}
	return &componentsv1.FinishMoveReply{}, nil
}

// bringTo gives a prepared process the state of a root.
func (s *Supervisor) bringTo(ctx context.Context, p *prepared, root blobs.Hash, key string, holders []peer.ID) error {
	p.restore.Lock()
	defer p.restore.Unlock()
	if root.IsZero() || root == p.root {
		return nil
	}
	if err := s.fetch(ctx, root, key, holders); err != nil {
		return err
	}
	if err := s.restore(ctx, p.gen, root, p.root); err != nil {
		return err
	}
	p.root = root
	return nil
}

// lostOwnership asks the log whether the target has claimed although its answer did not arrive. Not knowing counts as yes: a second
// owner must not serve.
func (i *instance) lostOwnership(ctx context.Context, reg arbiter.Register) bool {
	rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), finishDeadline)
	defer cancel()
	defer context.AfterFunc(i.sup.ctx, cancel)()
	now, ok, err := i.sup.cfg.Arbiter.Read(rctx, i.key)
	if err != nil {
		return true
	}
	if ok {
		i.sup.adopt(now)
	}
	return !ok || now.Epoch != reg.Epoch
}
