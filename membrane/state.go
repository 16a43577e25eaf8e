package membrane

import (
	"context"
	"errors"
	"fmt"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/plugins/contract/component/frames"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// StateReader receives a component's state as frames that are not decoded. Close it, or read it to io.EOF.
type StateReader struct {
	stream grpc.ClientStream
	cancel context.CancelFunc
}

// Next returns the next frame, io.EOF after the last. The caller frees it.
func (r *StateReader) Next() (*Frame, error) {
	f := &Frame{}
	if err := r.stream.RecvMsg(f); err != nil {
		r.cancel()
		if errors.Is(err, io.EOF) {
			return nil, io.EOF
		}
		return nil, optional(err)
	}
	return f, nil
}

// NextState is Next, decoded.
func (r *StateReader) NextState() (*componentv1.StateFrame, error) {
	f, err := r.Next()
	if err != nil {
		return nil, err
	}
	defer f.Free()
	return f.State()
}

// Close ends the stream before its end.
func (r *StateReader) Close() { r.cancel() }

// State decodes a frame of a state stream.
func (f *Frame) State() (*componentv1.StateFrame, error) {
	var s componentv1.StateFrame
	if err := proto.Unmarshal(f.Bytes(), &s); err != nil {
		return nil, fmt.Errorf("state frame: %w", err)
	}
	return &s, nil
}

func (b *Backend) openState(ctx context.Context, method string, from *componentv1.CheckpointFrom) (*StateReader, error) {
	ctx, cancel := context.WithCancel(ctx)
	s, err := b.proc.Conn().NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, method, callOptions...)
	if err == nil {
		if err = s.SendMsg(from); errors.Is(err, io.EOF) {
			err = nil // Next tells why
		}
	}
	if err == nil {
		err = s.CloseSend()
	}
	if err != nil {
		cancel()
		return nil, fmt.Errorf("open state stream: %w", err)
	}
	return &StateReader{stream: s, cancel: cancel}, nil
}

// Checkpoint streams the state: all of it, or what changed after from.SinceMark. A component that does not offer it makes the first Next
// fail with an error that IsUnimplemented recognises.
func (b *Backend) Checkpoint(ctx context.Context, from *componentv1.CheckpointFrom) (*StateReader, error) {
	return b.openState(ctx, componentv1.Component_Checkpoint_FullMethodName, from)
}

// Deltas streams journal entries as they are written, without an end.
func (b *Backend) Deltas(ctx context.Context, from *componentv1.CheckpointFrom) (*StateReader, error) {
	return b.openState(ctx, componentv1.Component_Deltas_FullMethodName, from)
}

// StateWriter sends a state into a component.
type StateWriter struct {
	stream grpc.ClientStream
	cancel context.CancelFunc
}

// Restore begins to send a state: a full one, or what changed after the one before. It may be done repeatedly before Start.
func (b *Backend) Restore(ctx context.Context) (*StateWriter, error) {
	ctx, cancel := context.WithCancel(ctx)
	s, err := b.proc.Conn().NewStream(ctx, &grpc.StreamDesc{ClientStreams: true}, componentv1.Component_Restore_FullMethodName, callOptions...)
	if err != nil {
		cancel()
		return nil, fmt.Errorf("restore: %w", err)
	}
	return &StateWriter{stream: s, cancel: cancel}, nil
}

// Send sends a frame: a *Frame, or a *componentv1.StateFrame. io.EOF says that the component has ended the stream; Finish tells why.
func (w *StateWriter) Send(frame any) error {
	if err := w.stream.SendMsg(frame); err != nil {
		return err
	}
	return nil
}

// Finish ends the state and returns what the component took.
func (w *StateWriter) Finish() (*componentv1.RestoreReply, error) {
	defer w.cancel()
	if err := w.stream.CloseSend(); err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	var reply componentv1.RestoreReply
	if err := w.stream.RecvMsg(&reply); err != nil {
		return nil, fmt.Errorf("restore: %w", optional(err))
	}
	return &reply, nil
}

// Abort gives the state up. The process is not to be used any more: it has half a state.
func (w *StateWriter) Abort() { w.cancel() }

// CopyState sends what changed in from after mark since into b, and returns how many bytes that was and the mark it reached. since 0 copies all. Each frame
// is checked on its way, and has to come and to be taken within StateStall; nothing is buffered.
func CopyState(ctx context.Context, from, to *Backend, since uint64) (bytes, mark uint64, err error) {
	p := NewPatience(ctx)
	defer p.Close()
	r, err := from.Checkpoint(p.Context(), &componentv1.CheckpointFrom{SinceMark: since, ChunkBytes: stateChunk, Schema: writesSchema(from, to)})
	if err != nil {
		return 0, 0, err
	}
	defer r.Close()
	w, err := to.Restore(p.Context())
	if err != nil {
		return 0, 0, err
	}
	defer w.Abort()
	check := frames.Checkpoint(since)
	for {
		n, err := copyFrame(p, r, w, check)
		bytes += n
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return bytes, 0, err
		}
	}
	var reply *componentv1.RestoreReply
	if err := p.Step(StateTaken, "did not say that it has taken its state", func() (err error) { reply, err = w.Finish(); return err }); err != nil {
		return bytes, 0, err
	}
	return bytes, reply.GetMark(), nil
}

// SourceError says that a state could not be copied because of the process that has it, not of the one that was to be given it.
type SourceError struct{ Err error }

func (e *SourceError) Error() string { return "read state: " + e.Err.Error() }
func (e *SourceError) Unwrap() error { return e.Err }

// copyFrame moves one frame; io.EOF: that was all, or the receiver ended the stream, and Finish tells why.
func copyFrame(p *Patience, r *StateReader, w *StateWriter, check *frames.Verifier) (uint64, error) {
	var f *Frame
	err := p.Step(StateStall, "gave nothing of its state", func() (err error) { f, err = r.Next(); return err })
	if errors.Is(err, io.EOF) {
		if err := check.End(); err != nil {
			return 0, &SourceError{err}
		}
		return 0, io.EOF
	}
	if err != nil {
		return 0, &SourceError{err}
	}
	defer f.Free()
	state, err := f.State()
	if err == nil {
		err = check.Frame(state)
	}
	if err != nil {
		return 0, &SourceError{err}
	}
	n := uint64(f.Len())
	if err := p.Step(StateStall, "took nothing of its state", func() error { return w.Send(f) }); err != nil && !errors.Is(err, io.EOF) {
		return n, fmt.Errorf("restore: %w", err)
	} else if err != nil {
		return n, io.EOF
	}
	return n, nil
}

const stateChunk = 256 << 10 // measured best between 32 KiB and 1 MiB

// writesSchema is the schema in which the receiver can read the sender's state: the sender's own when it is listed, else its newest
// that is not newer than the sender's; 0 leaves it to the sender.
func writesSchema(from, to *Backend) uint32 {
	mine := from.desc.GetState().GetWritesSchema()
	var best uint32
	for _, s := range to.desc.GetState().GetReadsSchemas() {
		if s <= mine && s > best {
			best = s
		}
	}
	return best
}
