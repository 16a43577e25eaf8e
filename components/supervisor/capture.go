package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/membrane"
	"github.com/coppice-project/coppice/plugins/contract/component/frames"
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

// saw takes what the header said.
func (s *snapshot) saw(v *frames.Verifier) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.mark, s.full = v.Mark(), v.Full()
}

// pump passes the component's frames on, each checked. It ends with an error unless the checkpoint is whole: then whoever stores it commits nothing.
func (s *saver) pump(ctx context.Context, since uint64, w io.Writer, snap *snapshot) error {
	p := membrane.NewPatience(ctx)
	defer p.Close()
	check := frames.Checkpoint(since)
	err := s.pumpFrames(p, since, w, func(f *componentv1.StateFrame) error {
		err := check.Frame(f)
		if err == nil {
			snap.saw(check)
		}
		return err
	})
	if err == nil {
		err = check.End()
	}
	if err == nil {
		s.absolve(&s.stateFault)
		return nil
	}
	err = fmt.Errorf("checkpoint of %s: %w", s.cfg.instance, err)
	if atFault(err) && ctx.Err() == nil {
		s.blame(&s.stateFault, err)
	}
	return err
}

func (s *saver) pumpFrames(p *membrane.Patience, since uint64, w io.Writer, check func(*componentv1.StateFrame) error) error {
	stream, err := s.cfg.component.Checkpoint(p.Context(), &componentv1.CheckpointFrom{SinceMark: since, ChunkBytes: 256 << 10, Schema: s.cfg.schema})
	if err != nil {
		return err
	}
	var buf []byte
	for {
		var f *componentv1.StateFrame
		err := p.Step(membrane.StateStall, "gave nothing of its state", func() (err error) { f, err = stream.Recv(); return err })
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := check(f); err != nil {
			return err
		}
		buf = protowire.AppendVarint(buf[:0], uint64(proto.Size(f)))
		if buf, err = (proto.MarshalOptions{UseCachedSize: true}).MarshalAppend(buf, f); err != nil {
			return fmt.Errorf("encode a state frame: %w", err)
		}
		if _, err := w.Write(buf); err != nil {
			return err
		}
	}
}

// atFault says whether an error is the component's: it sent what is no state, or stood still.
func atFault(err error) bool {
	if _, wrong := errors.AsType[*frames.Error](err); wrong {
		return true
	}
	_, stalled := errors.AsType[*membrane.StalledError](err)
	return stalled
}

// blame notes what the component did wrong; the first of a row is told.
func (s *saver) blame(fault *error, err error) {
	s.mu.Lock()
	news := *fault == nil
	*fault = err
	s.mu.Unlock()
	if news && s.cfg.faulty != nil {
		s.cfg.faulty(err)
	}
}

// absolve: it has done the same right since.
func (s *saver) absolve(fault *error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	*fault = nil
}

// base writes a full snapshot as a new base. Everything is durable here when it returns.
func (s *saver) base(ctx context.Context, snap *snapshot) (*chainHead, error) {
	br := newByteReader(snap)
	if _, err := br.Peek(1); err != nil {
		return nil, err
	}
	mark, _ := snap.state()
	return writeBase(ctx, s.cfg.store, s.meta(mark), br, s.route())
}

// capture saves by asking the component for its state, not its journal: what changed since the last commit, or all of it.
func (s *saver) capture(ctx context.Context, full bool) error {
	s.mu.Lock()
	head, saved := s.head, s.saved
	s.mu.Unlock()
	var answered uint64
	if s.cfg.answered != nil {
		answered = s.cfg.answered()
	}
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
	if s.cfg.counted != nil {
		s.cfg.counted(answered)
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
	if _, err := br.Peek(1); err != nil {
		return nil, err
	}
	mark, whole := snap.state()
	back := mark < saved.Mark && (!whole || s.cfg.mode == componentsv1.Durability_DURABILITY_EACH_CALL)
	switch {
	case head != nil && !full && mark == saved.Mark && mark != 0: // unchanged: all up to it is committed
		s.absolve(&s.stateFault)
		return nil, nil
	case back:
		err := fmt.Errorf("checkpoint of %s: the component is at mark %d, %d is committed", s.cfg.instance, mark, saved.Mark)
		s.blame(&s.stateFault, err)
		return nil, err
	case whole:
		next, err := writeBase(ctx, s.cfg.store, s.meta(mark), br, s.route())
		if err == nil && next.link.Hash == saved.Root {
			return nil, nil
		}
		return next, err
	}
	return writeDelta(ctx, s.cfg.store, head, s.meta(mark), br, s.route())
}
