package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// snapshot is the component's checkpoint on its way, in stored form.
type snapshot struct {
	*io.PipeReader
	cancel context.CancelFunc
	pumped sync.WaitGroup

	mu   sync.Mutex // guards the fields below
	mark uint64     // known once the first byte was read
	full bool       // all of the state, whatever was asked for
}

// snapshot asks the component for what changed after a mark; 0 for everything.
func (s *saver) snapshot(ctx context.Context, since uint64) *snapshot {
	ctx, cancel := context.WithCancel(ctx)
	pr, pw := io.Pipe()
	snap := &snapshot{PipeReader: pr, cancel: cancel, full: since == 0}
	snap.pumped.Go(func() { pw.CloseWithError(s.pump(ctx, since, pw, snap)) })
	return snap
}

// close ends it and waits for its goroutine.
func (s *snapshot) close() {
	s.cancel()
	s.CloseWithError(context.Canceled)
	s.pumped.Wait()
}

func (s *snapshot) state() (mark uint64, full bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.mark, s.full
}

func (s *snapshot) saw(f *componentv1.StateFrame) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mark = max(s.mark, f.GetMark())
	if f.GetSection() == componentv1.SectionHeader {
		s.full = f.GetSinceMark() == 0
	}
}

func (s *saver) pump(ctx context.Context, since uint64, w io.Writer, snap *snapshot) error {
	stream, err := s.cfg.component.Checkpoint(ctx, &componentv1.CheckpointFrom{SinceMark: since, ChunkBytes: 256 << 10, Schema: s.cfg.schema})
	if err != nil {
		return fmt.Errorf("snapshot of %s: %w", s.cfg.instance, err)
	}
	for {
		f, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("snapshot of %s: %w", s.cfg.instance, err)
		}
		snap.saw(f)
		var buf frameBuffer
		if err := buf.add(f); err != nil {
			return err
		}
		if _, err := w.Write(buf.buf.Bytes()); err != nil {
			return fmt.Errorf("snapshot of %s: %w", s.cfg.instance, err)
		}
	}
}

// base writes a full snapshot as a new base. Everything is durable here when it returns.
func (s *saver) base(ctx context.Context, snap *snapshot) (*chainHead, error) {
	br := newByteReader(snap)
	if _, err := br.Peek(1); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	mark, _ := snap.state()
	return writeBase(ctx, s.cfg.store, s.meta(mark), br)
}

// capture saves by asking the component for its state, not its journal: what changed since the last commit, or all of it.
func (s *saver) capture(ctx context.Context, full bool) error {
	s.mu.Lock()
	head, saved := s.head, s.saved
	s.mu.Unlock()
	since := saved.Mark
	if full || !s.cfg.incremental || head.needsBase() {
		since = 0
	}
	snap := s.snapshot(ctx, since)
	defer snap.close()
	next, err := s.captured(ctx, snap, head, saved, full)
	if err != nil {
		return err
	}
	if next != nil {
		// What is committed here is not among the entries of a compaction.
		s.abandon()
		if err := s.commit(ctx, next); err != nil {
			return err
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.gap = false
	for len(s.pending) > 0 && s.pending[0].mark <= s.saved.Mark {
		s.pending = s.pending[1:]
	}
	return nil
}

// captured stores a snapshot; nil when there is nothing new in it.
func (s *saver) captured(ctx context.Context, snap *snapshot, head *chainHead, saved Saved, full bool) (*chainHead, error) {
	br := newByteReader(snap)
	_, err := br.Peek(1)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	mark, whole := snap.state()
	if err != nil && !whole {
		return nil, nil // not a frame: nothing has changed
	}
	unchanged := head != nil && !full && mark == saved.Mark && mark != 0
	switch {
	case unchanged:
		return nil, nil
	case whole:
		next, err := writeBase(ctx, s.cfg.store, s.meta(mark), br)
		if err == nil && next.link.Hash == saved.Root {
			return nil, nil
		}
		return next, err
	case mark < saved.Mark:
		return nil, fmt.Errorf("checkpoint of %s: the component is at mark %d, %d is committed", s.cfg.instance, mark, saved.Mark)
	}
	frames, err := io.ReadAll(br)
	if err != nil {
		return nil, err
	}
	return writeDelta(ctx, s.cfg.store, head, s.meta(mark), frames)
}
