package runnertest

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// Methods of the component's own service. Add changes state; Get has no side effects; Watch is a server stream that stays open; Echo a
// bidirectional one; Probe tries the sandbox.
const (
	Service = "runnertest.v1.Counter"
	Add     = "/" + Service + "/Add"
	Get     = "/" + Service + "/Get"
	Watch   = "/" + Service + "/Watch"
	Echo    = "/" + Service + "/Echo"
	Probing = "/" + Service + "/Probe"
)

// Description is what the component describes itself as.
func Description(version string) *componentv1.Description {
	return &componentv1.Description{
		Type: "counter", Version: version, Contract: componentv1.ProtocolVersion,
		Features: []string{componentv1.FeatureTxnCalls, componentv1.FeatureDeltas},
		Provides: []*componentv1.Interface{
			{Name: "counter", Service: Service, Kind: componentv1.Kind_KIND_GRPC},
			{Name: "http", Kind: componentv1.Kind_KIND_HTTP},
		},
		Requires: []*componentv1.Interface{{Name: "peer", Service: Service, Optional: true}},
		Attributes: []*componentv1.AttributeSpec{
			{Name: "step", MessageType: "google.protobuf.Int64Value"},
			{Name: "fixed", MessageType: "google.protobuf.StringValue", ReadOnly: true},
			{Name: "mode", RestartToApply: true},
		},
		State:    &componentv1.StateSpec{Stateful: true, WritesSchema: 1, ReadsSchemas: []uint32{1}, Incremental: true},
		Services: descriptors(),
	}
}

func descriptors() *descriptorpb.FileDescriptorSet {
	method := func(name, in, out string, client, server bool, level descriptorpb.MethodOptions_IdempotencyLevel) *descriptorpb.MethodDescriptorProto {
		return &descriptorpb.MethodDescriptorProto{
			Name: proto.String(name), InputType: proto.String(in), OutputType: proto.String(out),
			ClientStreaming: proto.Bool(client), ServerStreaming: proto.Bool(server),
			Options: &descriptorpb.MethodOptions{IdempotencyLevel: level.Enum()},
		}
	}
	const (
		empty, number, text = ".google.protobuf.Empty", ".google.protobuf.Int64Value", ".google.protobuf.StringValue"
		free                = descriptorpb.MethodOptions_NO_SIDE_EFFECTS
		unknown             = descriptorpb.MethodOptions_IDEMPOTENCY_UNKNOWN
	)
	return &descriptorpb.FileDescriptorSet{File: []*descriptorpb.FileDescriptorProto{
		protodesc.ToFileDescriptorProto(emptypb.File_google_protobuf_empty_proto),
		protodesc.ToFileDescriptorProto(wrapperspb.File_google_protobuf_wrappers_proto),
		{
			Name: proto.String("runnertest/v1/counter.proto"), Package: proto.String("runnertest.v1"), Syntax: proto.String("proto3"),
			Dependency: []string{"google/protobuf/empty.proto", "google/protobuf/wrappers.proto"},
			Service: []*descriptorpb.ServiceDescriptorProto{{
				Name: proto.String("Counter"),
				Method: []*descriptorpb.MethodDescriptorProto{
					method("Add", number, number, false, false, unknown),
					method("Get", empty, number, false, false, free),
					method("Watch", empty, number, false, true, free),
					method("Echo", number, number, true, true, unknown),
					method("Probe", empty, text, false, false, free),
				},
			}},
		},
	}}
}

func unary[In any, PIn interface {
	*In
	proto.Message
}, Out proto.Message](name string, f func(context.Context, PIn) (Out, error)) grpc.MethodDesc {
	return grpc.MethodDesc{MethodName: name, Handler: func(srv any, ctx context.Context, dec func(any) error, ic grpc.UnaryServerInterceptor) (any, error) {
		in := PIn(new(In))
		if err := dec(in); err != nil {
			return nil, err
		}
		h := func(ctx context.Context, req any) (any, error) { return f(ctx, req.(PIn)) }
		if ic == nil {
			return h(ctx, in)
		}
		return ic(ctx, in, &grpc.UnaryServerInfo{Server: srv, FullMethod: "/" + Service + "/" + name}, h)
	}}
}

func counterDesc(c *component) *grpc.ServiceDesc {
	return &grpc.ServiceDesc{
		ServiceName: Service, HandlerType: (*any)(nil),
		Methods: []grpc.MethodDesc{
			unary("Add", c.handleAdd), unary("Get", c.handleGet), unary("Probe", c.handleProbe),
		},
		Streams: []grpc.StreamDesc{
			{StreamName: "Watch", ServerStreams: true, Handler: func(_ any, s grpc.ServerStream) error {
				var in emptypb.Empty
				if err := s.RecvMsg(&in); err != nil {
					return err
				}
				return c.handleWatch(&in, s)
			}},
			{StreamName: "Echo", ServerStreams: true, ClientStreams: true, Handler: func(_ any, s grpc.ServerStream) error { return c.handleEcho(s) }},
		},
	}
}

// Probe tries what a sandbox should deny. The value of each try is "" when it worked and the error otherwise.
func Probe() map[string]string {
	out := map[string]string{}
	try := func(name string, err error) {
		out[name] = ""
		if err != nil {
			out[name] = err.Error()
		}
	}
	_, err := os.ReadFile("/etc/shadow")
	try("shadow", err)
	err = os.WriteFile("/tmp/coppice-probe", []byte("x"), 0o600)
	try("write-tmp", err)
	wd, err := os.Getwd()
	try("cwd", err)
	try("write-cwd", os.WriteFile(filepath.Join(wd, "probe"), []byte("x"), 0o600))
	try("write-run", os.WriteFile(filepath.Join(os.Getenv("TMPDIR"), "probe"), []byte("x"), 0o600))
	conn, err := net.DialTimeout("tcp", os.Getenv("RUNNERTEST_DIAL"), time.Second)
	try("tcp", err)
	if err == nil {
		conn.Close() //nolint:errcheck // probe
	}
	try("signal-parent", syscall.Kill(os.Getppid(), 0))
	if p := os.Getenv("RUNNERTEST_READ"); p != "" {
		_, err := os.ReadFile(p)
		try("declared", err)
	}
	out["env"] = strings.Join(os.Environ(), "\n")
	return out
}
