package sdk

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"runtime/debug"
	"strconv"
	"sync"

	"github.com/cespare/xxhash/v2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	"github.com/coppice-project/coppice/plugins/sdk/state"
	"github.com/coppice-project/coppice/plugins/sdk/statev1"
)

// call is what the SDK knows about the call, request, Update or View that a context belongs to.
type call struct {
	in     *Instance
	tx     *Txn // nil: a stateless component, or a stream
	key    string
	low    uint64
	caller string

	mu    sync.Mutex     // guards everything below
	asked map[string]int // calls made on its behalf, by binding and method
	mark  uint64         // of a stream: the newest mark that its Updates and Views saw
}

// saw notes a mark that a stream's answer depends on.
func (c *call) saw(mark uint64) {
	if c == nil {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mark = max(c.mark, mark)
}

type callKey struct{}

func (c *call) context(ctx context.Context) context.Context {
	return c.in.context(context.WithValue(ctx, callKey{}, c))
}

func callOf(ctx context.Context) *call {
	c, ok := ctx.Value(callKey{}).(*call)
	if !ok {
		return nil
	}
	return c
}

// Tx returns the transaction of the call: one for each gRPC call and HTTP request of a stateful component, and for each Update and View. The first Tx
// of a call that may change state waits until it is the only one that holds it; call Tx after slow work that does not need the state, not before.
// Everything the transaction writes, and the reply, becomes lasting when the handler returns without an error; otherwise nothing does.
func Tx(ctx context.Context) (*Txn, error) {
	c := callOf(ctx)
	switch {
	case c == nil:
		return nil, status.Error(codes.Internal, "no transaction: this context does not come from a call, Update or View")
	case c.in.store == nil:
		return nil, status.Error(codes.Internal, errStateless.Error())
	case c.tx == nil:
		return nil, status.Error(codes.Internal, "a stream is not one transaction: use Instance.Update or View for each step")
	}
	if err := c.in.store.Begin(ctx, c.tx); err != nil {
		return nil, stateError(err)
	}
	return c.tx, nil
}

// Key returns the idempotency key of the call, "" without one. It names the call for good: hand it to services outside that take such keys.
func Key(ctx context.Context) string {
	if c := callOf(ctx); c != nil {
		return c.key
	}
	return ""
}

// Caller returns who called: an instance, or a client's name; "" if nobody said.
func Caller(ctx context.Context) string {
	if c := callOf(ctx); c != nil {
		return c.caller
	}
	return ""
}

// stateError turns what package state returns into a gRPC status.
func stateError(err error) error {
	code := codes.Internal
	switch {
	case err == nil:
		return nil
	case errors.Is(err, state.ErrTableFull), errors.Is(err, state.ErrTooLarge):
		code = codes.ResourceExhausted
	case errors.Is(err, state.ErrAnswered):
		code = codes.FailedPrecondition
	case errors.Is(err, state.ErrKeyReused):
		code = codes.Aborted
	case errors.Is(err, state.ErrBacklog):
		code = codes.Unavailable
	case errors.Is(err, state.ErrGone), errors.Is(err, state.ErrFuture), errors.Is(err, state.ErrFollowerUp):
		code = codes.OutOfRange
	case errors.Is(err, context.DeadlineExceeded):
		code = codes.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	default:
		if s, ok := status.FromError(err); ok {
			return s.Err()
		}
		var corrupt *state.CorruptError
		if errors.As(err, &corrupt) {
			code = codes.DataLoss
		}
	}
	return status.Error(code, err.Error())
}

// checkUnary lets only those in who know the process's credential.
func (in *Instance) checkUnary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if err := in.checkCredential(metadata.ValueFromIncomingContext(ctx, componentv1.MetaCredential)); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

func (in *Instance) checkStream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if err := in.checkCredential(metadata.ValueFromIncomingContext(ss.Context(), componentv1.MetaCredential)); err != nil {
		return err
	}
	return next(srv, ss)
}

func (in *Instance) checkCredential(given []string) error {
	if in.env.Credential == "" {
		return nil
	}
	if len(given) != 1 || subtle.ConstantTimeCompare([]byte(given[0]), []byte(in.env.Credential)) != 1 {
		return status.Errorf(codes.Unauthenticated, "this component answers its node only: metadata %s is missing or wrong", componentv1.MetaCredential)
	}
	return nil
}

// callUnary runs one of the author's methods as one transaction with its reply. The contract's own methods pass.
func (in *Instance) callUnary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	m, ok := in.desc.methods[info.FullMethod]
	if !ok {
		return next(ctx, req)
	}
	if !in.calls.enter() {
		return nil, in.refusal()
	}
	defer in.calls.leave()
	c, err := in.newCall(ctx, m)
	if err != nil {
		return nil, err
	}
	ctx = c.context(ctx)
	switch {
	case in.store == nil:
		return in.guarded(ctx, info.FullMethod, req, next)
	case m.readOnly:
		return in.readCall(ctx, c, info.FullMethod, req, next)
	}
	return in.writeCall(ctx, c, m, req, next)
}

func (in *Instance) newCall(ctx context.Context, m *method) (*call, error) {
	md, _ := metadata.FromIncomingContext(ctx)
	c := &call{in: in, key: first(md.Get(componentv1.MetaKey)), caller: first(md.Get(componentv1.MetaCaller))}
	if low := first(md.Get(componentv1.MetaLow)); low != "" {
		n, err := strconv.ParseUint(low, 10, 64)
		if err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "metadata %s is %q, not a number", componentv1.MetaLow, low)
		}
		c.low = n
	}
	if in.store != nil {
		c.tx = in.store.NewTxn(m.full, m.readOnly)
	}
	return c, nil
}

func first(values []string) string {
	if len(values) == 0 {
		return ""
	}
	return values[0]
}

func (in *Instance) readCall(ctx context.Context, c *call, name string, req any, next grpc.UnaryHandler) (any, error) {
	defer in.store.Rollback(c.tx)
	reply, err := in.guarded(ctx, name, req, next)
	setMark(ctx, c.tx.Mark())
	if err == nil {
		err = stateError(c.tx.Err())
	}
	if err != nil {
		return nil, err
	}
	return reply, nil
}

func (in *Instance) writeCall(ctx context.Context, c *call, m *method, req any, next grpc.UnaryHandler) (any, error) {
	defer in.store.Rollback(c.tx)
	ticket, remembered, err := in.admit(ctx, c, func() (uint64, error) { return fingerprint(m.full, req) })
	if err != nil {
		return nil, err
	}
	if remembered != nil {
		return m.replay(ctx, remembered)
	}
	defer ticket.Done()
	reply, err := in.guarded(ctx, m.full, req, next)
	if err != nil {
		setMark(ctx, c.tx.Mark())
		return nil, err
	}
	msg, ok := reply.(proto.Message)
	if !ok {
		return nil, status.Errorf(codes.Internal, "%s returned no message and no error", m.full)
	}
	body, err := proto.Marshal(msg)
	if err != nil {
		return nil, status.Errorf(codes.Internal, "%s: encode reply: %v", m.full, err)
	}
	// The call is done: a caller that has gone away gets this reply when it comes back with its key.
	mark, err := in.store.Commit(context.WithoutCancel(ctx), c.tx, ticket, &statev1.Reply{Body: body})
	if err != nil {
		setMark(ctx, c.tx.Mark())
		return nil, stateError(fmt.Errorf("%s: %w", m.full, err))
	}
	setMark(ctx, mark)
	return msg, nil
}

// admit asks the dedupe table; the fingerprint is only computed for calls with a key.
func (in *Instance) admit(ctx context.Context, c *call, print func() (uint64, error)) (*state.Ticket, *statev1.Reply, error) {
	request := state.Call{Key: c.key, Low: c.low}
	if c.key != "" {
		fp, err := print()
		if err != nil {
			return nil, nil, status.Errorf(codes.Internal, "%v", err)
		}
		request.Fingerprint = fp
	}
	ticket, remembered, err := in.store.Admit(ctx, request)
	if err != nil {
		if errors.Is(err, state.ErrKeyReused) {
			setTrailer(ctx, componentv1.MetaKeyReused, "1")
		}
		return nil, nil, stateError(err)
	}
	return ticket, remembered, nil
}

// fingerprint tells one request from another under the same key.
func fingerprint(full string, req any) (uint64, error) {
	msg, ok := req.(proto.Message)
	if !ok {
		return 0, fmt.Errorf("%s: the request is not a protobuf message", full)
	}
	b, err := proto.MarshalOptions{Deterministic: true}.MarshalAppend(append([]byte(full), 0), msg)
	if err != nil {
		return 0, fmt.Errorf("%s: encode request: %w", full, err)
	}
	return xxhash.Sum64(b), nil
}

// replay answers from the dedupe table.
func (m *method) replay(ctx context.Context, r *statev1.Reply) (any, error) {
	if r.GetHttpStatus() != 0 {
		return nil, stateError(state.ErrKeyReused)
	}
	msg := m.newReply()
	if err := proto.Unmarshal(r.GetBody(), msg); err != nil {
		return nil, status.Errorf(codes.DataLoss, "%s: the remembered reply is not a %s: %v", m.full, m.output.FullName(), err)
	}
	setMark(ctx, r.GetMark())
	return msg, nil
}

// guarded runs the handler; a panic is an error of that call, and rolls it back.
func (in *Instance) guarded(ctx context.Context, name string, req any, next grpc.UnaryHandler) (reply any, err error) {
	defer func() {
		if r := recover(); r != nil {
			reply, err = nil, in.panicked(name, r)
		}
	}()
	return next(ctx, req)
}

func (in *Instance) panicked(name string, r any) error {
	in.panics.Add(1)
	in.log.Error("a handler panicked; its call was rolled back", "instance", in.Name(), "method", name, "panic", r, "stack", string(debug.Stack()))
	return status.Errorf(codes.Internal, "%s panicked: %v", name, r)
}

// setMark tells the gate which journal mark the reply depends on. 0 is nothing to wait for.
func setMark(ctx context.Context, mark uint64) {
	if mark > 0 {
		setTrailer(ctx, componentv1.MetaMark, strconv.FormatUint(mark, 10))
	}
}

// setTrailer does nothing outside of a gRPC call. It is called once for each key: a second value would stand beside the first.
func setTrailer(ctx context.Context, key, value string) {
	if grpc.ServerTransportStreamFromContext(ctx) == nil {
		return
	}
	if err := grpc.SetTrailer(ctx, metadata.Pairs(key, value)); err != nil {
		if in := From(ctx); in != nil {
			in.log.Warn("trailer not set", "key", key, "error", err)
		}
	}
}

// callStream runs one of the author's streams: no transaction of its own, and not counted as in flight, so that it does not hold up a freeze.
func (in *Instance) callStream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) (err error) {
	if _, ok := in.desc.methods[info.FullMethod]; !ok {
		return next(srv, ss)
	}
	if in.currentState() != componentv1.State_STARTED {
		return in.refusal()
	}
	defer func() {
		if r := recover(); r != nil {
			err = in.panicked(info.FullMethod, r)
		}
	}()
	md, _ := metadata.FromIncomingContext(ss.Context())
	c := &call{in: in, caller: first(md.Get(componentv1.MetaCaller))}
	defer func() {
		if c.mark > 0 {
			ss.SetTrailer(metadata.Pairs(componentv1.MetaMark, strconv.FormatUint(c.mark, 10)))
		}
	}()
	return next(srv, &stream{ServerStream: ss, ctx: c.context(ss.Context())})
}

// stream is a server stream with the instance in its context.
type stream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context implements grpc.ServerStream.
func (s *stream) Context() context.Context { return s.ctx }
