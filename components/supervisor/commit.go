package supervisor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/internal/planted"
	"github.com/coppice-project/coppice/internal/unison"
)

// readWithin bounds the asking of the log how a commit came out; it is asked again.
const readWithin = 2 * time.Second

// proposal is a commit that was handed to the arbiter.
type proposal struct {
	head *chainHead
	req  arbiter.CommitRequest
}

// commit makes head the instance's restore point: first on w holders' disks, then in the arbiter's log. It returns nil only when
// both are so (DESIGN.md §10 G3), errFenced or errForeign when it never will be, and otherwise keeps trying until ctx ends.
func (s *saver) commit(ctx context.Context, head *chainHead) error {
	if s.alone() {
		return s.commitAlone(head)
	}
	s.mu.Lock()
	seq := s.saved.Seq + 1
	s.ackedNext = map[peer.ID]bool{}
	s.doubt = &proposal{head: head} // late acknowledgements of this root count from now on
	s.mu.Unlock()
	for wait := 20 * time.Millisecond; ; wait = min(2*wait, 500*time.Millisecond) {
		pctx, stop := s.untilCut(ctx)
		acked, w, err := s.push(pctx, head)
		stop()
		if err == nil {
			return s.propose(ctx, &proposal{head: head, req: arbiter.CommitRequest{
				Key: s.cfg.key, Epoch: s.cfg.epoch, Nonce: s.cfg.nonce, Seq: seq, Root: head.link.Hash[:], Holders: acked, W: uint32(w),
			}})
		}
		if s.alone() {
			return s.commitAlone(head)
		}
		s.note(err)
		s.cfg.log.Debug("holders are chosen anew", "instance", s.cfg.instance, "error", err)
		if perr := pause(ctx, wait); perr != nil {
			s.resolved()
			return err // nothing was proposed
		}
	}
}

// push brings a head to its holders and returns those who acknowledged it, at least w. It takes as long as it gets on: what ends it is that so many holders are
// dead, unreachable or silent that w cannot be reached. Then they are chosen anew.
func (s *saver) push(ctx context.Context, head *chainHead) ([]peer.ID, int, error) {
	to, w := s.cfg.holders()
	if planted.Bug("one-holder-less") {
		w = max(w-1, 1)
	}
	if len(to) < w {
		return nil, w, fmt.Errorf("checkpoint %s: %d holders are alive, %d must acknowledge", s.cfg.instance, len(to), w)
	}
	acked, err := head.push(ctx, s.cfg.store, to, w)
	if err != nil {
		return nil, w, fmt.Errorf("checkpoint %s: copy to the holders: %w", s.cfg.instance, err)
	}
	return acked, w, nil
}

// propose has the log decide about a commit. The same root is tried under the same number until it is certain how that ended: another
// root under this number could be refused although this one was committed. When ctx ends before that, the proposal stays in doubt
// (see settle).
func (s *saver) propose(ctx context.Context, p *proposal) error {
	s.mu.Lock()
	s.doubt = p
	s.mu.Unlock()
	for {
		cctx, stop := s.untilCut(ctx)
		reg, err := s.cfg.ledger.Commit(cctx, p.req)
		stop()
		if err == nil {
			s.acknowledge(p, reg.Holders)
			return nil
		}
		if s.alone() && ctx.Err() == nil {
			return s.commitAlone(p.head) // whether the log has it, too, does not matter: it is part of the branch
		}
		if verdict, certain := s.outcome(ctx, p, err); certain {
			return verdict
		}
		if ctx.Err() != nil {
			return err
		}
		s.note(err)
		s.cfg.log.Warn("commit failed; it is tried again", "instance", s.cfg.instance, "seq", p.req.Seq, "error", err)
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
}

// route is where the pages of the next checkpoint go while they are written.
func (s *saver) route() route {
	if s.alone() {
		return route{}
	}
	to, w := s.cfg.holders()
	return route{to, w}
}

// alone says whether checkpoints go on without the arbiter.
func (s *saver) alone() bool {
	if s.cfg.cut == nil {
		return false
	}
	s.mu.Lock()
	local := s.local
	s.mu.Unlock()
	return local || s.cfg.cut()
}

// cutLook is how often a commit under way looks whether the arbiter is out of reach.
const cutLook = 50 * time.Millisecond

// untilCut is ctx until the arbiter is out of reach and that is no reason to wait.
func (s *saver) untilCut(ctx context.Context) (context.Context, func()) {
	if s.cfg.cut == nil {
		return ctx, func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for !s.cfg.cut() {
			if pause(ctx, cutLook) != nil {
				return
			}
		}
		cancel()
	}()
	return ctx, func() {
		cancel()
		<-ended
	}
}

// commitAlone makes head the branch's newest checkpoint, on this node's disk: answers that wait for it are given.
func (s *saver) commitAlone(head *chainHead) error {
	if err := head.keep(s.cfg.store); err != nil {
		return err
	}
	s.mu.Lock()
	before := s.saved
	s.mu.Unlock()
	if err := s.cfg.branched(head, before); err != nil {
		return err
	}
	s.mu.Lock()
	s.local, s.head, s.doubt = true, head, nil
	s.saved = Saved{
		Seq: before.Seq, Root: head.link.Hash, Mark: head.meta.GetMark(), Bytes: head.link.Bytes, Holders: []peer.ID{s.cfg.self}, At: time.Now(),
	}
	s.acked, s.ackedNext = map[peer.ID]bool{s.cfg.self: true}, map[peer.ID]bool{}
	mark := s.saved.Mark
	s.mu.Unlock()
	s.cfg.committed(mark)
	return nil
}

// outcome says what became of a proposal that was answered with an error; certain false: it may still be carried out.
func (s *saver) outcome(ctx context.Context, p *proposal, err error) (verdict error, certain bool) {
	cur, exists, known := currentOf(err)
	if !known {
		rctx, cancel := context.WithTimeout(ctx, readWithin)
		defer cancel()
		var rerr error
		if cur, exists, rerr = s.cfg.ledger.Read(rctx, p.req.Key); rerr != nil {
			return nil, false
		}
	}
	switch {
	case exists && cur.Seq == p.req.Seq && blobs.Hash(p.req.Root) == hashFrom(cur.Root):
		s.acknowledge(p, cur.Holders)
		if cur.Epoch != p.req.Epoch || cur.Nonce != p.req.Nonce {
			return s.fenced(cur), true
		}
		return nil, true
	case !exists, cur.Epoch != p.req.Epoch, cur.Nonce != p.req.Nonce:
		s.resolved()
		return s.fenced(cur), true
	case cur.Seq >= p.req.Seq:
		s.resolved()
		return fmt.Errorf("commit the checkpoint of %s: %w: seq %d is committed, this would have been %d", s.cfg.instance, errForeign, cur.Seq, p.req.Seq), true
	}
	return nil, false
}

// currentOf is the register as an error of the arbiter shows it.
func currentOf(err error) (reg arbiter.Register, exists, known bool) {
	if e, ok := errors.AsType[*arbiter.FencedError](err); ok {
		return e.Current, e.Exists, true
	}
	if e, ok := errors.AsType[*arbiter.RefusedError](err); ok {
		return e.Current, e.Exists, true
	}
	if e, ok := errors.AsType[*arbiter.InDoubtError](err); ok && e.Current != nil {
		return *e.Current, true, true
	}
	return arbiter.Register{}, false, false
}

func (s *saver) fenced(now arbiter.Register) error {
	return fmt.Errorf("%w (epoch %d, now %d)", errFenced, s.cfg.epoch, now.Epoch)
}

// resolved: nothing of this saver's is under way at the arbiter.
func (s *saver) resolved() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.doubt = nil
}

func (s *saver) acknowledge(p *proposal, holders []peer.ID) {
	s.mu.Lock()
	s.head, s.doubt = p.head, nil
	s.saved = Saved{
		Seq: p.req.Seq, Root: p.head.link.Hash, Mark: p.head.meta.GetMark(), Bytes: p.head.link.Bytes, Holders: slices.Clone(holders), At: time.Now(),
	}
	s.acked, s.ackedNext = s.ackedNext, map[peer.ID]bool{}
	for _, id := range p.req.Holders {
		s.acked[id] = true
	}
	mark := s.saved.Mark
	close(s.news)
	s.news = make(chan struct{})
	s.mu.Unlock()
	s.cfg.committed(mark)
}

// settle makes certain how the last commit of an ended saver came out. The next process of the epoch may be given the state of the log only
// after that: a commit that comes through later would be a checkpoint that it does not have (DESIGN.md §5, restart).
func (s *saver) settle(ctx context.Context) error {
	select {
	case <-s.done:
	case <-ctx.Done():
		return fmt.Errorf("settle the commits of %s: %w", s.cfg.instance, ctx.Err())
	}
	s.mu.Lock()
	p := s.doubt
	s.mu.Unlock()
	if p == nil || p.req.Key == "" {
		return nil
	}
	if err := s.propose(ctx, p); err != nil && !errors.Is(err, errFenced) && !errors.Is(err, errForeign) {
		return fmt.Errorf("settle the commits of %s: %w", s.cfg.instance, err)
	}
	return nil
}

// Acked is told that a holder acknowledged a root, perhaps long after the commit.
func (s *saver) Acked(root blobs.Hash, id peer.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case root == s.saved.Root:
		s.acked[id] = true
	case s.doubt != nil && root == s.doubt.head.link.Hash:
		s.ackedNext[id] = true
	}
}

// keepCopies looks after the copies of the committed checkpoint.
func (s *saver) keepCopies(ctx context.Context) {
	tick := unison.New(copiesEvery, string(s.cfg.self))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			tick.Next()
		}
		err := s.repair(ctx)
		if ctx.Err() != nil {
			return
		}
		s.mu.Lock()
		news := err != nil && s.copyErr == nil
		s.copyErr = err
		s.mu.Unlock()
		if news {
			s.cfg.log.Warn("copies are missing; it is tried again", "instance", s.cfg.instance, "epoch", s.cfg.epoch, "error", err)
		}
	}
}

// repair keeps the committed root on as many live holders as it should have, and in more than one zone where there are: late acknowledgements are
// recorded, and the copies of dead holders are made again elsewhere. A commit meanwhile makes it pointless, not wrong.
func (s *saver) repair(ctx context.Context) error {
	s.mu.Lock()
	saved := s.saved
	s.mu.Unlock()
	if saved.Seq == 0 || time.Since(saved.At) < copiesEvery || s.alone() {
		return nil // the copies of a branch are made when it is over
	}
	have := slices.DeleteFunc(s.keepers(), func(id peer.ID) bool { return !s.cfg.alive(id) })
	to, _ := s.cfg.holders()
	if give := lacking(to, slices.Compact(slices.Sorted(slices.Values(have))), s.cfg.apart); len(give) > 0 {
		push := s.cfg.store.Push
		if len(have) >= restingLeast { // it is safe for now
			push = s.cfg.store.PushGently
		}
		got, err := push(ctx, saved.Root, give, 1)
		if err != nil {
			return fmt.Errorf("repair the copies of %s: %w", s.cfg.instance, err)
		}
		for _, id := range got {
			s.Acked(saved.Root, id)
		}
		have = append(have, got...)
	}
	slices.Sort(have)
	have = slices.Compact(have)
	if len(have) == 0 || slices.Equal(have, slices.Sorted(slices.Values(saved.Holders))) && s.areNamed(saved.Seq, have) {
		return nil
	}
	// In a cut it is given up: carried out when that is over, it could name holders of a root that has become another meanwhile (rejoin).
	cctx, stop := s.untilCut(ctx)
	_, err := s.cfg.ledger.SetHolders(cctx, s.cfg.key, saved.Seq, have)
	stop()
	if err != nil {
		if _, refused := errors.AsType[*arbiter.RefusedError](err); refused {
			return nil // a newer checkpoint has been committed, with holders of its own
		}
		return fmt.Errorf("record the holders of %s: %w", s.cfg.instance, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.saved.Seq == saved.Seq {
		s.saved.Holders = have
	}
	return nil
}

// areNamed says that the register does not name others than these. Before a process runs somebody else looks after the copies (keepRestingCopies), who may finish
// only when it does, and in whose view a node that had been cut off some of them were dead.
func (s *saver) areNamed(seq uint64, have []peer.ID) bool {
	if s.cfg.named == nil {
		return true
	}
	named, known := s.cfg.named(seq)
	return !known || slices.Equal(have, slices.Sorted(slices.Values(named)))
}

// pause waits for d or the end of ctx, whose error it returns.
func pause(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
