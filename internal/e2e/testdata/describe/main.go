// Command describe shakes hands as a component does, and misbehaves when it is asked what it is.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health"
	"google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// mode is set at build time: hang, fail, exit or nameless.
var mode = "hang"

type component struct {
	componentv1.UnimplementedComponentServer
}

// Describe misbehaves.
func (component) Describe(ctx context.Context, _ *componentv1.DescribeRequest) (*componentv1.Description, error) {
	switch mode {
	case "fail":
		return nil, status.Error(codes.FailedPrecondition, "the stars are not right")
	case "exit":
		fmt.Fprintln(os.Stderr, "panic: out of cheese")
		os.Exit(3)
	case "nameless":
		return &componentv1.Description{Version: "1.0.0"}, nil
	}
	<-ctx.Done()
	return nil, ctx.Err()
}

func main() {
	l, err := net.Listen("unix", filepath.Join(os.Getenv("PLUGIN_UNIX_SOCKET_DIR"), "s"))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	s := grpc.NewServer()
	h := health.NewServer()
	h.SetServingStatus("plugin", grpc_health_v1.HealthCheckResponse_SERVING)
	grpc_health_v1.RegisterHealthServer(s, h)
	componentv1.RegisterComponentServer(s, component{})
	fmt.Printf("1|%d|unix|%s|grpc|\n", componentv1.ProtocolVersion, l.Addr())
	if err := s.Serve(l); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
