// Package sdktest runs a component inside a test: its real interceptors, transactions and contract, over an in-memory connection, without a process or a
// node. A test calls it with the generated client, takes checkpoints, starts a second instance from them and looks at the same state.
//
// It is not a conformance test of the process (handshake, sockets, lease): `coppice conform` is.
//
// Goroutines: one gRPC server and one client connection for each Start, ended by the test's cleanup.
package sdktest

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	"github.com/coppice-project/coppice/plugins/sdk"
)

// Running is a component under test.
type Running struct {
	Conn     *grpc.ClientConn            // make the generated client with it
	Control  componentv1.ComponentClient // the contract
	HTTP     http.Handler                // the HTTP interface, if there is one
	Instance *sdk.Instance

	t testing.TB
}

// Option changes how Start starts.
type Option func(*options)

type options struct {
	env     sdk.Env
	start   *componentv1.StartRequest
	restore []*componentv1.StateFrame
}

// From restores these frames before the start.
func From(frames []*componentv1.StateFrame) Option {
	return func(o *options) { o.restore = frames; o.start.Restored = true }
}

// Request gives the StartRequest; nil leaves the component created, not started.
func Request(req *componentv1.StartRequest) Option { return func(o *options) { o.start = req } }

// Env gives the environment.
func Env(env sdk.Env) Option { return func(o *options) { o.env = env } }

// Start runs a component until the test ends. It fails the test when the component does not start.
func Start(t testing.TB, c *sdk.Component, opts ...Option) *Running {
	t.Helper()
	o := &options{start: &componentv1.StartRequest{Instance: "test/" + c.Type + "-0", Token: &componentv1.Token{Incarnation: 1, Epoch: 1}}}
	for _, opt := range opts {
		opt(o)
	}
	in, err := sdk.New(c, o.env)
	if err != nil {
		t.Fatal(err)
	}
	listener := bufconn.Listen(1 << 20)
	server := in.Server()
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	conn, err := grpc.NewClient("passthrough:component",
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return listener.DialContext(ctx) }),
		grpc.WithUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return next(credential(ctx, o.env.Credential), method, req, reply, cc, opts...)
		}),
		grpc.WithStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, next grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			return next(credential(ctx, o.env.Credential), desc, cc, method, opts...)
		}),
	)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := conn.Close(); err != nil {
			t.Error(err)
		}
		server.Stop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Error(err)
		}
	})
	r := &Running{Conn: conn, Control: componentv1.NewComponentClient(conn), HTTP: in.Handler(), Instance: in, t: t}
	if o.restore != nil {
		r.Restore(o.restore)
	}
	if o.start != nil {
		if _, err := r.Control.Start(t.Context(), o.start); err != nil {
			t.Fatal(err)
		}
	}
	return r
}

func credential(ctx context.Context, credential string) context.Context {
	if credential == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, componentv1.MetaCredential, credential)
}

// Key gives calls made with the context an idempotency key, as a gate does; low is the caller's low-water mark, "" for none.
func Key(ctx context.Context, key, low string) context.Context {
	ctx = metadata.AppendToOutgoingContext(ctx, componentv1.MetaKey, key)
	if low != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, componentv1.MetaLow, low)
	}
	return ctx
}

// Checkpoint returns the state after a mark; 0 is all of it.
func (r *Running) Checkpoint(since uint64) []*componentv1.StateFrame {
	r.t.Helper()
	stream, err := r.Control.Checkpoint(r.t.Context(), &componentv1.CheckpointFrom{SinceMark: since})
	if err != nil {
		r.t.Fatal(err)
	}
	var out []*componentv1.StateFrame
	for {
		f, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			r.t.Fatal(err)
		}
		out = append(out, f)
	}
}

// Merge has the component bring two states with a common base together, and returns the result; an empty base is the empty state.
func (r *Running) Merge(base, ours, theirs []*componentv1.StateFrame) []*componentv1.StateFrame {
	r.t.Helper()
	stream, err := r.Control.Merge(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	for _, b := range []struct {
		branch componentv1.BranchFrame_Branch
		frames []*componentv1.StateFrame
	}{{componentv1.BranchFrame_BASE, base}, {componentv1.BranchFrame_OURS, ours}, {componentv1.BranchFrame_THEIRS, theirs}} {
		for _, f := range b.frames {
			if err := stream.Send(&componentv1.BranchFrame{Branch: b.branch, Frame: f}); err != nil {
				break // Recv says why
			}
		}
	}
	if err := stream.CloseSend(); err != nil {
		r.t.Fatal(err)
	}
	var out []*componentv1.StateFrame
	for {
		f, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			r.t.Fatal(err)
		}
		out = append(out, f)
	}
}

// Restore gives frames to a component that is created or frozen, and returns its mark.
func (r *Running) Restore(frames []*componentv1.StateFrame) uint64 {
	r.t.Helper()
	stream, err := r.Control.Restore(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	for _, f := range frames {
		if err := stream.Send(f); err != nil {
			break // CloseAndRecv says why
		}
	}
	reply, err := stream.CloseAndRecv()
	if err != nil {
		r.t.Fatal(err)
	}
	return reply.GetMark()
}
