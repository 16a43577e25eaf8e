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
)

// pushAttempt bounds one try to have a root acknowledged: after it the holders are chosen anew, without those who have died since.
const pushAttempt = 2 * time.Second

// commit makes head the instance's restore point: first on w holders' disks, then in the arbiter's log. It returns nil only when
// both are so (DESIGN.md §10 G3), errFenced when the epoch is over, and otherwise keeps trying until ctx ends.
func (s *saver) commit(ctx context.Context, head *chainHead) error {
	s.mu.Lock()
	seq := s.saved.Seq + 1
	s.acked = map[peer.ID]bool{}
	s.mu.Unlock()
	for {
		acked, w, err := s.push(ctx, head.link.Hash)
		if err != nil {
			if ctx.Err() != nil {
				return err
			}
			s.cfg.log.Debug("holders are chosen anew", "instance", s.cfg.instance, "error", err)
			if err := pause(ctx, 20*time.Millisecond); err != nil {
				return err
			}
			continue
		}
		reg, err := s.cfg.ledger.Commit(ctx, arbiter.CommitRequest{
			Key: s.cfg.key, Epoch: s.cfg.epoch, Nonce: s.cfg.nonce, Seq: seq, Root: head.link.Hash[:], Holders: acked, W: uint32(w),
		})
		if err == nil {
			s.acknowledge(head, reg, acked)
			return nil
		}
		// The same root is tried again under the same number until the answer is certain: another root under this number could be
		// refused although this one was committed.
		err = s.commitError(err)
		if errors.Is(err, errFenced) || ctx.Err() != nil {
			return err
		}
		s.cfg.log.Warn("commit failed; it is tried again", "instance", s.cfg.instance, "seq", seq, "error", err)
		if err := pause(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
}

func (s *saver) push(ctx context.Context, root blobs.Hash) ([]peer.ID, int, error) {
	to, w := s.cfg.holders()
	if len(to) < w {
		return nil, w, fmt.Errorf("checkpoint %s: %d holders are alive, %d must acknowledge", s.cfg.instance, len(to), w)
	}
	pctx, cancel := context.WithTimeout(ctx, pushAttempt)
	defer cancel()
	acked, err := s.cfg.store.Push(pctx, root, to, w)
	if err != nil {
		return nil, w, fmt.Errorf("checkpoint %s: copy to the holders: %w", s.cfg.instance, err)
	}
	return acked, w, nil
}

func (s *saver) commitError(err error) error {
	var fenced *arbiter.FencedError
	if errors.As(err, &fenced) {
		return fmt.Errorf("%w (epoch %d, now %d)", errFenced, s.cfg.epoch, fenced.Current.Epoch)
	}
	return fmt.Errorf("commit the checkpoint of %s: %w", s.cfg.instance, err)
}

func (s *saver) acknowledge(head *chainHead, reg arbiter.Register, acked []peer.ID) {
	s.mu.Lock()
	s.head = head
	s.saved = Saved{
		Seq: reg.Seq, Root: head.link.Hash, Mark: head.meta.GetMark(), Bytes: head.link.Bytes,
		Holders: slices.Clone(acked), At: time.Now(),
	}
	for _, id := range acked {
		s.acked[id] = true
	}
	mark := s.saved.Mark
	s.mu.Unlock()
	s.cfg.committed(mark)
}

// Acked is told that a holder acknowledged a root, perhaps long after the commit.
func (s *saver) Acked(root blobs.Hash, id peer.ID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if root == s.saved.Root {
		s.acked[id] = true
	}
}

// repair keeps the committed root on as many live holders as it should have: late acknowledgements are recorded, and the copies of
// dead holders are made again elsewhere.
func (s *saver) repair(ctx context.Context) error {
	s.mu.Lock()
	saved := s.saved
	have := make([]peer.ID, 0, len(s.acked))
	for _, h := range saved.Holders {
		if s.cfg.alive(h) {
			s.acked[h] = true
		}
	}
	for id := range s.acked {
		if s.cfg.alive(id) {
			have = append(have, id)
		}
	}
	s.mu.Unlock()
	if saved.Seq == 0 {
		return nil
	}
	to, _ := s.cfg.holders()
	missing := slices.DeleteFunc(slices.Clone(to), func(id peer.ID) bool { return slices.Contains(have, id) })
	if len(have) < len(to) && len(missing) > 0 {
		pctx, cancel := context.WithTimeout(ctx, 10*pushAttempt)
		got, err := s.cfg.store.Push(pctx, saved.Root, missing[:min(len(missing), len(to)-len(have))], 1)
		cancel()
		if err != nil {
			return fmt.Errorf("repair the copies of %s: %w", s.cfg.instance, err)
		}
		have = append(have, got...)
	}
	slices.Sort(have)
	have = slices.Compact(have)
	was := slices.Sorted(slices.Values(saved.Holders))
	if slices.Equal(have, was) || len(have) == 0 {
		return nil
	}
	if _, err := s.cfg.ledger.SetHolders(ctx, s.cfg.key, saved.Seq, have); err != nil {
		var refused *arbiter.RefusedError
		if errors.As(err, &refused) {
			return nil // a newer checkpoint has been committed, with holders of its own
		}
		return fmt.Errorf("record the holders of %s: %w", s.cfg.instance, err)
	}
	s.mu.Lock()
	if s.saved.Seq == saved.Seq {
		s.saved.Holders = have
	}
	s.mu.Unlock()
	return nil
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
