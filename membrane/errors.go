package membrane

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// MetaRetry is the trailer (and, as HeaderRetry, the HTTP response header) by which a gate tells a router whether a failed call may be
// asked again: "untouched" when the component never saw it, "doubt" when it may have run and its answer is lost. Without it the answer
// is the component's own and final. It never leaves the cluster.
const (
	MetaRetry      = "x-coppice-retry"
	HeaderRetry    = "X-Coppice-Retry"
	HeaderMoved    = "X-Coppice-Moved"
	HeaderTarget   = "X-Coppice-Target"
	retryUntouched = "untouched"
	retryDoubt     = "doubt"
)

// What a Directory's Resolve can say about a target that has no route.
var (
	// ErrUnknownTarget: no application names it. Calls fail at once.
	ErrUnknownTarget = errors.New("no such component")
	// ErrNoOwner: it exists and nobody serves it now (a claim is under way, it is stopped). Calls are held until their deadline.
	ErrNoOwner = errors.New("nobody serves it now")
	// ErrNeedsShard: it has several stateful instances and the call names none. Calls fail at once.
	ErrNeedsShard = errors.New("it has several instances: name one (app/name-0) or send x-shard-key")
)

// outcome is how certain a failure is.
type outcome uint8

const (
	final     outcome = iota // the component's own answer, or nothing that another try would change
	untouched                // the component has not seen the call
	doubt                    // it may have run
)

// callError is a failed call with what a router has to know about it.
type callError struct {
	st      *status.Status
	outcome outcome
	moved   *Redirect
}

func (e *callError) Error() string              { return e.st.Message() }
func (e *callError) GRPCStatus() *status.Status { return e.st }

func refuse(o outcome, code codes.Code, format string, args ...any) *callError {
	return &callError{st: status.Newf(code, format, args...), outcome: o}
}

// outcomeOf classifies any error of a call.
func outcomeOf(err error) (outcome, *Redirect) {
	var ce *callError
	if errors.As(err, &ce) {
		return ce.outcome, ce.moved
	}
	return final, nil
}

// statusOf turns an error into what a gRPC caller is told.
func statusOf(err error) *status.Status {
	var ce *callError
	if errors.As(err, &ce) {
		return ce.st
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return status.New(codes.DeadlineExceeded, err.Error())
	}
	if errors.Is(err, context.Canceled) {
		return status.New(codes.Canceled, err.Error())
	}
	return status.Convert(err)
}

// encode adds to a trailer what the router at the other end needs.
func (e *callError) encode(trailer metadata.MD) metadata.MD {
	if e.outcome == final {
		return trailer
	}
	if trailer == nil {
		trailer = metadata.MD{}
	}
	trailer.Set(MetaRetry, map[outcome]string{untouched: retryUntouched, doubt: retryDoubt}[e.outcome])
	if e.moved != nil {
		trailer.Set(componentv1.MetaMoved, e.moved.String())
	}
	return trailer
}

// decodeOutcome reads what encode wrote, from a trailer of another node.
func decodeOutcome(err error, trailer metadata.MD) error {
	v := trailer.Get(MetaRetry)
	if len(v) == 0 {
		return err
	}
	ce := &callError{st: status.Convert(err), outcome: doubt}
	if v[0] == retryUntouched {
		ce.outcome = untouched
	}
	if m := trailer.Get(componentv1.MetaMoved); len(m) > 0 {
		if r, perr := ParseRedirect(m[0]); perr == nil {
			ce.moved = &r
		}
	}
	return ce
}

// broke reports whether err is that of a connection, ours or theirs, and not that of the caller's own context.
func broke(ctx context.Context, st *status.Status) bool {
	// A connection that we closed because the process has ended reports Canceled.
	return st.Code() == codes.Unavailable || (st.Code() == codes.Canceled && ctx.Err() == nil)
}

// lost classifies the failure of an exchange on a connection: an answer that came is final, a connection that broke leaves doubt.
func lost(ctx context.Context, err error, header, trailer metadata.MD) error {
	st := status.Convert(err)
	if !broke(ctx, st) || len(trailer) > 0 {
		return err
	}
	if len(header) > 0 {
		return refuse(doubt, codes.Unavailable, "the answer broke off: %s", st.Message())
	}
	return refuse(doubt, codes.Unavailable, "the connection broke during the call: %s", st.Message())
}

// unsent classifies the failure to open a stream: nothing has left.
func unsent(ctx context.Context, err error) error {
	st := status.Convert(err)
	if !broke(ctx, st) {
		return err
	}
	return refuse(untouched, codes.Unavailable, "not connected: %s", st.Message())
}

// wrap names the operation in front of an error and keeps its classification.
func wrap(err error, format string, args ...any) error {
	what := fmt.Sprintf(format, args...)
	var ce *callError
	if errors.As(err, &ce) {
		return &callError{st: status.Newf(ce.st.Code(), "%s: %s", what, ce.st.Message()), outcome: ce.outcome, moved: ce.moved}
	}
	return fmt.Errorf("%s: %w", what, err)
}
