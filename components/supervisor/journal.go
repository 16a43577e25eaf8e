package supervisor

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/coppice-project/coppice/membrane"
	"github.com/coppice-project/coppice/plugins/contract/component/frames"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// follow reads the component's journal as it is written.
func (s *saver) follow(ctx context.Context) {
	wait := 20 * time.Millisecond
	for ctx.Err() == nil {
		read, err := s.followOnce(ctx)
		if ctx.Err() != nil {
			return
		}
		if status.Code(err) == codes.OutOfRange {
			// The journal no longer reaches back to what is committed, or the state was replaced: a checkpoint bridges that.
			s.mu.Lock()
			s.gap = true
			s.mu.Unlock()
			s.poke()
		}
		s.cfg.log.Debug("journal stream ended; it is opened again", "instance", s.cfg.instance, "error", err)
		most := time.Second
		switch {
		case atFault(err):
			most = maxBackoff
		case read:
			wait = 20 * time.Millisecond
		}
		if pause(ctx, wait) != nil {
			return
		}
		wait = min(2*wait, most)
	}
}

// followOnce reads one stream of the journal to its end. read says whether it gave anything.
func (s *saver) followOnce(ctx context.Context) (read bool, err error) {
	s.mu.Lock()
	since := s.saved.Mark
	if n := len(s.pending); n > 0 {
		since = s.pending[n-1].mark
	}
	s.mu.Unlock()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p := membrane.NewPatience(ctx)
	defer p.Close()
	stream, err := s.cfg.component.Deltas(p.Context(), &componentv1.CheckpointFrom{SinceMark: since, Schema: s.cfg.schema})
	if err != nil {
		return false, fmt.Errorf("follow the journal: %w", err)
	}
	check := frames.Journal(since)
	var buf frameBuffer
	for {
		f, err := nextEntryFrame(p, stream, check)
		if err != nil {
			err = fmt.Errorf("the journal of %s: %w", s.cfg.instance, err)
			if atFault(err) && ctx.Err() == nil {
				s.blame(&s.journalFault, err)
			}
			return read, err
		}
		if err := buf.add(f); err != nil {
			return read, err
		}
		if !f.GetLast() {
			continue
		}
		if !read {
			s.absolve(&s.journalFault)
		}
		read = true
		s.append(entry{mark: buf.mark, frames: buf.buf.Bytes()})
		buf = frameBuffer{}
	}
}

// nextEntryFrame receives one frame of a journal and checks it. There may be nothing to tell for any time, but an entry that has begun has to go on.
func nextEntryFrame(p *membrane.Patience, stream grpc.ServerStreamingClient[componentv1.StateFrame], check *frames.Verifier) (f *componentv1.StateFrame, err error) {
	recv := func() (err error) { f, err = stream.Recv(); return err }
	if check.Inside() {
		err = p.Step(membrane.StateStall, "gave nothing more of a journal entry", recv)
	} else {
		err = recv()
	}
	if err != nil {
		return nil, err
	}
	return f, check.Frame(f)
}

func (s *saver) append(e entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	last := s.saved.Mark
	if n := len(s.pending); n > 0 {
		last = max(last, s.pending[n-1].mark)
	}
	if e.mark <= last {
		return
	}
	s.pending = append(s.pending, e)
	s.poke()
}

// compaction is a new base in the making.
type compaction struct {
	// kept are the entries committed to the old chain since it began: what the base does not hold of them goes on top of it.
	kept []entry
	base *chainHead // once it is written and copied to the holders
}

// commitPending commits every entry that is there.
func (s *saver) commitPending(ctx context.Context) error {
	s.mu.Lock()
	head, pending, saved, gap := s.head, s.pending, s.saved, s.gap
	var base *chainHead
	entries := pending
	if c := s.compaction; c != nil && c.base != nil {
		base, head = c.base, c.base
		entries = after(base.meta.GetMark(), c.kept, pending)
	}
	s.mu.Unlock()
	switch {
	case gap:
		return s.capture(ctx, true)
	case len(pending) == 0 && base == nil:
		return nil
	case head == nil, base == nil && head.meta.GetChain() >= fullChain:
		return s.capture(ctx, true)
	}
	next := head
	if len(entries) > 0 {
		var buf bytes.Buffer
		for _, e := range entries {
			buf.Write(e.frames)
		}
		var err error
		if next, err = writeDelta(ctx, s.cfg.store, head, s.meta(entries[len(entries)-1].mark), &buf, s.route()); err != nil {
			return err
		}
	}
	if next.meta.GetMark() < saved.Mark { // cannot be: all that was committed since the compaction began is kept
		s.abandon()
		s.poke()
		return fmt.Errorf("checkpoint of %s would go back from mark %d to %d: the compaction is abandoned", s.cfg.instance, saved.Mark, next.meta.GetMark())
	}
	if err := s.commit(ctx, next); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pending = s.pending[len(pending):]
	if base != nil {
		s.compaction = nil
		s.turn = saved
		s.turn.At = time.Now()
	} else if s.compaction != nil {
		s.compaction.kept = append(s.compaction.kept, pending...)
	}
	s.compact(ctx)
	return nil
}

// after selects the entries past a mark.
func after(mark uint64, lists ...[]entry) []entry {
	var out []entry
	for _, list := range lists {
		for _, e := range list {
			if e.mark > mark {
				out = append(out, e)
			}
		}
	}
	return out
}

// abandon gives up the compaction under way.
func (s *saver) abandon() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.compaction = nil
}

// compact begins a new base beside the calls when the chain is long. Locked.
func (s *saver) compact(ctx context.Context) {
	if s.compaction != nil || !s.head.needsBase() || time.Now().Before(s.compactAt) {
		return
	}
	c := &compaction{}
	s.compaction = c
	s.beside.Go(func() {
		head, err := s.newBase(ctx)
		s.mu.Lock()
		defer s.mu.Unlock()
		switch {
		case s.compaction != c: // abandoned
		case err != nil:
			s.compaction = nil
			s.compactOff = min(max(2*s.compactOff, time.Second), time.Minute)
			s.compactAt = time.Now().Add(s.compactOff)
			if ctx.Err() == nil {
				s.cfg.log.Warn("compaction failed; it is tried again", "instance", s.cfg.instance, "in", s.compactOff, "error", err)
			}
		default:
			s.compactOff = 0
			c.base = head
			s.poke()
		}
	})
}

// newBase writes a full snapshot and has it copied to the holders, so that committing it costs no more than a delta.
func (s *saver) newBase(ctx context.Context) (*chainHead, error) {
	s.mu.Lock()
	since := s.saved.Mark
	s.mu.Unlock()
	snap := s.snapshot(ctx, 0)
	defer snap.close()
	head, err := s.base(ctx, snap)
	if err != nil {
		return nil, err
	}
	if head.meta.GetMark() < since { // the entries that go on top of it would leave a hole
		err := fmt.Errorf("checkpoint of %s: the component is at mark %d, %d is committed", s.cfg.instance, head.meta.GetMark(), since)
		s.blame(&s.stateFault, err)
		return nil, err
	}
	to, w := s.cfg.holders()
	if _, err := s.cfg.store.Push(ctx, head.link.Hash, to, w); err != nil {
		return nil, fmt.Errorf("copy the base of %s: %w", s.cfg.instance, err)
	}
	return head, nil
}
