package sdk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	"github.com/coppice-project/coppice/plugins/sdk/state"
)

const (
	defaultQuiesce = 10 * time.Second // when the node gives no deadline
	defaultGrace   = 5 * time.Second
)

// control serves coppice.component.v1.Component.
type control struct {
	componentv1.UnimplementedComponentServer
	in *Instance
}

// Describe answers at any time, before Start too.
func (s *control) Describe(context.Context, *componentv1.DescribeRequest) (*componentv1.Description, error) {
	return s.in.desc.proto, nil
}

// Start takes the instance from CREATED to STARTED. Repeated for the same instance it only answers.
func (s *control) Start(ctx context.Context, req *componentv1.StartRequest) (*componentv1.Status, error) {
	in := s.in
	in.lifecycle.Lock()
	defer in.lifecycle.Unlock()
	switch st := in.currentState(); st {
	case componentv1.State_CREATED:
	case componentv1.State_STARTED, componentv1.State_FROZEN:
		if req.GetInstance() != "" && req.GetInstance() != in.Name() {
			return nil, status.Errorf(codes.FailedPrecondition, "already started as %s, not %s", in.Name(), req.GetInstance())
		}
		in.setToken(req.GetToken())
		return in.status(ctx), nil
	default:
		return nil, status.Errorf(codes.FailedPrecondition, "cannot start: the component is %s; start a new process", st)
	}
	if err := in.awaitLease(ctx, req); err != nil {
		return nil, err
	}
	in.setOpening(true)
	err := in.start(ctx, req)
	in.setOpening(false)
	if err != nil {
		in.setState(componentv1.State_FAILED, err.Error())
		in.log.Error("start failed", "instance", in.Name(), "error", err)
		return nil, stateError(fmt.Errorf("start %s: %w", in.Name(), err))
	}
	in.setState(componentv1.State_STARTED, "")
	in.calls.open()
	in.startRun()
	return in.status(ctx), nil
}

func (in *Instance) start(ctx context.Context, req *componentv1.StartRequest) error {
	in.setToken(req.GetToken())
	in.mu.Lock()
	if req.GetInstance() != "" {
		in.name = req.GetInstance()
	}
	if req.GetVersion() != "" {
		in.version = req.GetVersion()
	}
	in.dataDir = req.GetDataDir()
	in.mu.Unlock()
	if _, err := in.attrs.set(req.GetAttributes().GetJson(), 0, false, true); err != nil {
		return err
	}
	in.attrs.adopt(req.GetAttributes().GetRevision())
	for _, b := range req.GetBindings() {
		if err := in.bindingChanged(b); err != nil {
			return err
		}
	}
	if in.store != nil {
		if err := in.migrate(ctx); err != nil {
			return err
		}
	}
	if in.comp.OnStart == nil {
		return nil
	}
	return in.comp.OnStart(in.context(ctx), in)
}

// migrate turns a restored map of an older schema into ours, in one transaction.
func (in *Instance) migrate(ctx context.Context) error {
	from, to := in.store.Schema(), in.comp.State.Schema
	if from == to {
		return nil
	}
	err := in.Update(ctx, func(_ context.Context, tx *Txn) error {
		if in.comp.State.Migrate != nil {
			if err := in.comp.State.Migrate(from, tx); err != nil {
				return err
			}
		}
		tx.SetSchema(to)
		return nil
	})
	if err != nil {
		return fmt.Errorf("migrate the state from schema %d to %d: %w", from, to, err)
	}
	in.log.Info("state migrated", "instance", in.Name(), "from", from, "to", to)
	return nil
}

// Quiesce takes STARTED to FROZEN: no call is let in any more, those inside have ended, background work has stopped. The state does not change until
// Resume. When that does not succeed by the deadline the instance goes on as before, and the error says what did not end.
func (s *control) Quiesce(ctx context.Context, req *componentv1.QuiesceRequest) (*componentv1.Status, error) {
	in := s.in
	in.lifecycle.Lock()
	defer in.lifecycle.Unlock()
	switch st := in.currentState(); st {
	case componentv1.State_FROZEN:
		return in.status(ctx), nil
	case componentv1.State_STARTED:
	default:
		return nil, status.Errorf(codes.FailedPrecondition, "cannot freeze: the component is %s", st)
	}
	limit := defaultQuiesce
	if ms := req.GetDeadlineMs(); ms > 0 {
		limit = time.Duration(ms) * time.Millisecond
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	in.setState(componentv1.State_FROZEN, "")
	err := in.halt(ctx)
	if err == nil {
		err = in.quiet(ctx, req.GetReason())
	}
	if err != nil {
		in.setState(componentv1.State_STARTED, "")
		in.calls.open()
		in.reviveRun()
		return nil, status.Errorf(codes.DeadlineExceeded, "not frozen: %v; the component goes on", err)
	}
	return in.status(ctx), nil
}

// halt lets no call in, waits for those inside and stops background work.
func (in *Instance) halt(ctx context.Context) error {
	wait := in.cancelRun()
	drained := in.calls.shut()
	err := wait(ctx)
	select {
	case <-drained:
	case <-ctx.Done():
		err = errors.Join(err, fmt.Errorf("%d calls did not end in time", in.calls.count()))
	}
	return err
}

// Resume takes FROZEN back to STARTED.
func (s *control) Resume(ctx context.Context, _ *componentv1.ResumeRequest) (*componentv1.Status, error) {
	in := s.in
	in.lifecycle.Lock()
	defer in.lifecycle.Unlock()
	switch st := in.currentState(); st {
	case componentv1.State_STARTED:
		return in.status(ctx), nil
	case componentv1.State_FROZEN:
	default:
		return nil, status.Errorf(codes.FailedPrecondition, "cannot resume: the component is %s", st)
	}
	if in.store != nil { // it may have been restored while it was frozen
		in.setOpening(true)
		err := in.migrate(ctx)
		in.setOpening(false)
		if err != nil {
			return nil, stateError(err)
		}
	}
	if err := in.stir(ctx); err != nil {
		return nil, err
	}
	in.setState(componentv1.State_STARTED, "")
	in.calls.open()
	in.startRun()
	return in.status(ctx), nil
}

// Stop ends the instance from any state; the process ends itself soon after the answer. Calls inside have the grace to end.
func (s *control) Stop(ctx context.Context, req *componentv1.StopRequest) (*componentv1.Status, error) {
	grace := defaultGrace
	if ms := req.GetGraceMs(); ms > 0 {
		grace = time.Duration(ms) * time.Millisecond
	}
	return s.in.stop(ctx, grace), nil
}

func (in *Instance) stop(ctx context.Context, grace time.Duration) *componentv1.Status {
	in.lifecycle.Lock()
	defer in.lifecycle.Unlock()
	before := in.currentState()
	if before == componentv1.State_STOPPED {
		return in.status(ctx)
	}
	limited, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	in.setState(componentv1.State_STOPPED, "")
	var problems []error
	if err := in.halt(limited); err != nil {
		problems = append(problems, err)
	}
	if in.comp.OnStop != nil && (before == componentv1.State_STARTED || before == componentv1.State_FROZEN) {
		if err := in.comp.OnStop(in.context(limited)); err != nil {
			problems = append(problems, fmt.Errorf("OnStop: %w", err))
		}
	}
	if err := errors.Join(problems...); err != nil {
		in.setState(componentv1.State_STOPPED, err.Error())
		in.log.Warn("stopped, but not cleanly", "instance", in.Name(), "error", err)
	}
	close(in.stopped)
	return in.status(ctx)
}

// Heartbeat runs where calls run: on the same server, behind the same interceptors. It reports a transaction that holds the state for too long.
func (s *control) Heartbeat(ctx context.Context, beat *componentv1.Beat) (*componentv1.Beat, error) {
	in := s.in
	in.setToken(beat.GetToken())
	if in.store != nil && beat.GetDurableMark() > 0 {
		in.store.SetDurable(beat.GetDurableMark())
	}
	return &componentv1.Beat{Seq: beat.GetSeq(), Token: in.currentToken(), Inflight: uint32(in.calls.count()), Status: in.status(ctx)}, nil
}

// GetAttributes implements the contract.
func (s *control) GetAttributes(_ context.Context, req *componentv1.AttributeNames) (*componentv1.Attributes, error) {
	return s.in.attrs.get(req.GetNames())
}

// SetAttributes implements the contract: all or none.
func (s *control) SetAttributes(_ context.Context, req *componentv1.SetAttributesRequest) (*componentv1.Attributes, error) {
	return s.in.attrs.set(req.GetJson(), req.GetIfRevision(), req.GetDryRun(), false)
}

// BindingChanged implements the contract.
func (s *control) BindingChanged(ctx context.Context, b *componentv1.BindingState) (*componentv1.Status, error) {
	if err := s.in.bindingChanged(b); err != nil {
		return nil, err
	}
	return s.in.status(ctx), nil
}

func (s *control) stateful() (*state.Store, error) {
	if s.in.store == nil {
		return nil, errNoState
	}
	return s.in.store, nil
}

// Checkpoint sends the state, live.
func (s *control) Checkpoint(req *componentv1.CheckpointFrom, out grpc.ServerStreamingServer[componentv1.StateFrame]) error {
	if o := s.in.comp.Opaque; o != nil {
		return stateError(o.Checkpoint(out.Context(), req.GetSinceMark(), out.Send))
	}
	store, err := s.stateful()
	if err != nil {
		return err
	}
	_, err = store.Checkpoint(req.GetSinceMark(), int(req.GetChunkBytes()), out.Send)
	return stateError(err)
}

// Deltas sends journal entries from after a mark on, until the caller goes or the instance stops.
func (s *control) Deltas(req *componentv1.CheckpointFrom, out grpc.ServerStreamingServer[componentv1.StateFrame]) error {
	store, err := s.stateful()
	if err != nil {
		return err
	}
	follower, err := store.Follow(req.GetSinceMark())
	if err != nil {
		return stateError(err)
	}
	defer follower.Close()
	ctx, cancel := context.WithCancelCause(out.Context())
	defer cancel(nil)
	go func() {
		select {
		case <-s.in.stopped:
			cancel(errStopped)
		case <-ctx.Done():
		}
	}()
	for {
		e, err := follower.Next(ctx)
		if errors.Is(err, errStopped) {
			return nil
		}
		if err != nil {
			return stateError(err)
		}
		if err := state.EntryFrames(e, int(req.GetChunkBytes()), out.Send); err != nil {
			return err
		}
	}
}

var errStopped = errors.New("the instance has stopped")

// Restore replaces the state; only before Start, or while frozen.
func (s *control) Restore(in grpc.ClientStreamingServer[componentv1.StateFrame, componentv1.RestoreReply]) error {
	s.in.lifecycle.Lock()
	defer s.in.lifecycle.Unlock()
	defer s.in.beginFilling()()
	if s.in.comp.Opaque != nil {
		return s.in.opaqueRestore(in)
	}
	store, err := s.stateful()
	if err != nil {
		return err
	}
	switch st := s.in.currentState(); st {
	case componentv1.State_CREATED, componentv1.State_FROZEN:
	default:
		return status.Errorf(codes.FailedPrecondition, "cannot restore: the component is %s; restore before Start, or freeze it first", st)
	}
	bytes, mark, err := store.Restore(in.Recv, s.in.comp.State.reads())
	if err != nil {
		return stateError(err)
	}
	return in.SendAndClose(&componentv1.RestoreReply{Bytes: bytes, Mark: mark})
}

// Migrate turns a checkpoint of an older schema into one of ours without touching the instance's own state.
func (s *control) Migrate(stream grpc.BidiStreamingServer[componentv1.StateFrame, componentv1.StateFrame]) error {
	if _, err := s.stateful(); err != nil {
		return err
	}
	spec := s.in.comp.State
	aside := &Instance{comp: s.in.comp, desc: s.in.desc, env: s.in.env, log: s.in.log, name: s.in.Name(), store: state.New(spec.Schema, spec.Limits)}
	if _, _, err := aside.store.Restore(stream.Recv, spec.reads()); err != nil && !errors.Is(err, io.EOF) {
		return stateError(err)
	}
	if err := aside.migrate(stream.Context()); err != nil {
		return stateError(err)
	}
	_, err := aside.store.Checkpoint(0, 0, stream.Send)
	return stateError(err)
}
