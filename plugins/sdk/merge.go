package sdk

import (
	"context"
	"errors"
	"fmt"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	"github.com/coppice-project/coppice/plugins/sdk/state"
)

// branches are the states of a Merge in the order in which they come.
var branches = []componentv1.BranchFrame_Branch{componentv1.BranchFrame_BASE, componentv1.BranchFrame_OURS, componentv1.BranchFrame_THEIRS}

// Merge brings two states together without touching the instance's own: base, ours and theirs in, in this order, each as a Restore takes it; the
// result out, as a full checkpoint. A base without frames is the empty state.
func (s *control) Merge(stream grpc.BidiStreamingServer[componentv1.BranchFrame, componentv1.StateFrame]) error {
	if _, err := s.stateful(); err != nil {
		return err
	}
	if s.in.comp.State.Merge == nil {
		return status.Error(codes.Unimplemented, "this component has no Merge")
	}
	var asides [3]*Instance
	in := &branchReader{stream: stream}
	for i, b := range branches {
		var err error
		if asides[i], err = s.in.aside(stream.Context(), in.only(b)); err != nil {
			return stateError(fmt.Errorf("merge: the state %s: %w", b, err))
		}
	}
	if _, err := in.next(); !errors.Is(err, io.EOF) {
		return status.Errorf(codes.InvalidArgument, "merge: frames out of order: base, ours and theirs are expected, in this order (%v)", err)
	}
	base, ours, theirs := asides[0], asides[1], asides[2]
	into := ours.store
	before := state.New(s.in.comp.State.Schema, s.in.comp.State.Limits)
	if err := copyState(into, before, s.in.comp.State.reads()); err != nil {
		return stateError(err)
	}
	if err := s.in.merge(stream.Context(), base.store, before, theirs.store, into); err != nil {
		return stateError(fmt.Errorf("merge: %w", err))
	}
	into.Absorb(theirs.store)
	_, err := into.Checkpoint(0, 0, stream.Send)
	return stateError(err)
}

// aside is an instance that only has a state: what recv gives, in the present schema.
func (in *Instance) aside(ctx context.Context, recv func() (*componentv1.StateFrame, error)) (*Instance, error) {
	spec := in.comp.State
	a := &Instance{comp: in.comp, desc: in.desc, env: in.env, log: in.log, name: in.Name(), store: state.New(spec.Schema, spec.Limits)}
	a.calls.closed = true
	a.opening = true
	if _, _, err := a.store.Restore(recv, spec.reads()); err != nil {
		return nil, err
	}
	return a, a.migrate(ctx)
}

// merge runs the author's Merge as one transaction on into.
func (in *Instance) merge(ctx context.Context, base, ours, theirs, into *state.Store) error {
	var views []*state.Txn
	for _, st := range []*state.Store{base, ours, theirs} {
		t := st.NewTxn("Merge", true)
		defer st.Rollback(t)
		if err := st.Begin(ctx, t); err != nil {
			return err
		}
		views = append(views, t)
	}
	w := into.NewTxn("Merge", false)
	defer into.Rollback(w)
	if err := into.Begin(ctx, w); err != nil {
		return err
	}
	if err := in.comp.State.Merge(views[0], views[1], views[2], w); err != nil {
		return err
	}
	for _, v := range views {
		if err := v.Err(); err != nil {
			return err
		}
	}
	_, err := into.Commit(ctx, w, nil, nil)
	return err
}

// copyState gives to the state that from has now.
func copyState(from, to *state.Store, schemas []uint32) error {
	var frames []*componentv1.StateFrame
	if _, err := from.Checkpoint(0, 0, func(f *componentv1.StateFrame) error {
		frames = append(frames, f)
		return nil
	}); err != nil {
		return err
	}
	_, _, err := to.Restore(func() (*componentv1.StateFrame, error) {
		if len(frames) == 0 {
			return nil, io.EOF
		}
		f := frames[0]
		frames = frames[1:]
		return f, nil
	}, schemas)
	return err
}

// branchReader reads one branch after the other.
type branchReader struct {
	stream grpc.BidiStreamingServer[componentv1.BranchFrame, componentv1.StateFrame]
	ahead  *componentv1.BranchFrame
}

func (r *branchReader) next() (*componentv1.BranchFrame, error) {
	if f := r.ahead; f != nil {
		r.ahead = nil
		return f, nil
	}
	return r.stream.Recv()
}

// only gives the frames of one branch, as long as they come.
func (r *branchReader) only(b componentv1.BranchFrame_Branch) func() (*componentv1.StateFrame, error) {
	return func() (*componentv1.StateFrame, error) {
		f, err := r.next()
		if err != nil {
			return nil, err
		}
		if f.GetBranch() != b {
			r.ahead = f
			return nil, io.EOF
		}
		return f.GetFrame(), nil
	}
}
