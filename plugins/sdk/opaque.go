package sdk

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// OpaqueSchema is the schema of every opaque state: what its bytes mean is the component's business.
const OpaqueSchema = 1

// Opaque is a state that the SDK does not look into: files, or what another program holds. It is saved as often as the manifest's durable says, not with each
// call: nobody tells when it changed. The frames that it sends and takes have to be as package frames of the contract says.
type Opaque interface {
	// Checkpoint sends all of the state (since 0), or what changed after a mark that an earlier one reached. It is called while the component runs, and
	// while it is quiet, by several at a time. Of a state in which nothing has changed it repeats the mark.
	Checkpoint(ctx context.Context, since uint64, send func(*componentv1.StateFrame) error) error
	// Restore takes a full state, and what changed after it, from recv until io.EOF. It is called before OnStart, possibly several times. It returns how many
	// bytes it took and the mark that it reached.
	Restore(ctx context.Context, recv func() (*componentv1.StateFrame, error)) (bytes, mark uint64, err error)
	// Quiesce stops all change until Resume. An error leaves the component running.
	Quiesce(ctx context.Context, reason componentv1.QuiesceRequest_Reason) error
	// Resume ends what Quiesce began.
	Resume(ctx context.Context) error
}

var errNoState = status.Error(codes.Unimplemented, "this component has no state")

// opaqueRestore gives the component a state; the caller holds lifecycle.
func (in *Instance) opaqueRestore(stream grpc.ClientStreamingServer[componentv1.StateFrame, componentv1.RestoreReply]) error {
	if st := in.currentState(); st != componentv1.State_CREATED {
		return status.Errorf(codes.FailedPrecondition, "cannot restore: the component is %s; restore before Start", st)
	}
	bytes, mark, err := in.comp.Opaque.Restore(stream.Context(), stream.Recv)
	if err != nil {
		return stateError(err)
	}
	return stream.SendAndClose(&componentv1.RestoreReply{Bytes: bytes, Mark: mark})
}

// quiet brings an opaque state to rest, after the calls have ended.
func (in *Instance) quiet(ctx context.Context, reason componentv1.QuiesceRequest_Reason) error {
	if in.comp.Opaque == nil {
		return nil
	}
	return in.comp.Opaque.Quiesce(ctx, reason)
}

// stir ends it.
func (in *Instance) stir(ctx context.Context) error {
	if in.comp.Opaque == nil {
		return nil
	}
	if err := in.comp.Opaque.Resume(ctx); err != nil {
		return stateError(err)
	}
	return nil
}

// lapse ends the process, and what it started.
func (in *Instance) lapse(late time.Duration, exit func(int)) {
	in.log.Error("lease lapsed: no node vouches for this process; it ends itself", "instance", in.Name(), "late", late)
	if in.comp.OnLapse != nil {
		in.comp.OnLapse()
	}
	exit(componentv1.ExitLeaseLapsed)
}

// CheckpointSoon asks the node to save the state now, and waits for it at most d. A component whose state ends with it asks so before it ends.
func (in *Instance) CheckpointSoon(d time.Duration, reason string) error {
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	_, err := in.Checkpoint(ctx, reason)
	if errors.Is(err, errNoNode) {
		return nil
	}
	return err
}
