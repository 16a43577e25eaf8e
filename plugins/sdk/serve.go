package sdk

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// Handshake is the go-plugin handshake of every component; a stock go-plugin client launches one with it and Plugins.
var Handshake = plugin.HandshakeConfig{
	ProtocolVersion:  componentv1.ProtocolVersion,
	MagicCookieKey:   componentv1.CookieKey,
	MagicCookieValue: componentv1.CookieValue,
}

// Plugins is the plugin set of a stock go-plugin client: dispensing componentv1.PluginName gives a componentv1.ComponentClient. Such a client must use
// gRPC without AutoMTLS.
func Plugins() plugin.PluginSet {
	return plugin.PluginSet{componentv1.PluginName: &grpcPlugin{}}
}

// grpcPlugin is both ends for go-plugin. The server end has nothing to do: Instance.Server registers everything.
type grpcPlugin struct {
	plugin.NetRPCUnsupportedPlugin
}

// GRPCServer implements plugin.GRPCPlugin.
func (*grpcPlugin) GRPCServer(*plugin.GRPCBroker, *grpc.Server) error { return nil }

// GRPCClient implements plugin.GRPCPlugin.
func (*grpcPlugin) GRPCClient(_ context.Context, _ *plugin.GRPCBroker, conn *grpc.ClientConn) (any, error) {
	return componentv1.NewComponentClient(conn), nil
}

const (
	maxSocketPath = 107             // of a unix socket, by the kernel
	goPluginPath  = 24              // what go-plugin and the HTTP socket add to the directory
	lingerLimit   = 3 * time.Second // for streams to end after Stop, before they are cut
)

// Serve runs the component as the process that it is: main calls it and nothing else. It does not return: the process ends with status 0 after Stop or
// SIGTERM, 1 when it cannot serve (stderr says why), componentv1.ExitLeaseLapsed when its node is gone.
func Serve(c *Component) {
	if err := serve(c); err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", filepath.Base(os.Args[0]), err)
		os.Exit(1)
	}
	os.Exit(0)
}

func serve(c *Component) error {
	if err := checkEnvironment(); err != nil {
		return err
	}
	signal.Ignore(syscall.SIGINT)                           // Ctrl-C in a node's terminal is the node's
	signal.Notify(make(chan os.Signal, 1), syscall.SIGPIPE) // a reader of our output that has died must not take us along
	log := slog.New(slog.NewTextHandler(os.Stderr, nil)).With("component", c.Type, "pid", os.Getpid())
	in, err := New(c, Env{
		Credential: os.Getenv(componentv1.EnvCredential),
		NodeSocket: os.Getenv(componentv1.EnvNodeSocket),
		Log:        log,
	})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	closeHTTP, err := in.serveHTTPSocket()
	if err != nil {
		return err
	}
	defer closeHTTP()
	if in.node != nil {
		go in.keepLease(ctx)
	}
	return in.servePlugin(ctx)
}

// checkEnvironment does what plugin.Serve leaves out in test mode, and refuses what cannot work.
func checkEnvironment() error {
	if os.Getenv(componentv1.CookieKey) != componentv1.CookieValue {
		return errors.New("this is a component: a node starts it. Try: coppice registry push " + os.Args[0])
	}
	if os.Getenv("PLUGIN_CLIENT_CERT") != "" {
		return errors.New("the client asks for AutoMTLS, which a component that outlives its client cannot offer: start it without")
	}
	if dir := os.Getenv(plugin.EnvUnixSocketDir); len(dir) > maxSocketPath-goPluginPath {
		return fmt.Errorf("$%s is %d bytes long; a unix socket's path may have %d in all: use a shorter directory", plugin.EnvUnixSocketDir, len(dir), maxSocketPath)
	}
	return nil
}

// servePlugin serves gRPC until Stop, SIGTERM or go-plugin's Shutdown. go-plugin's test mode leaves stdout and stderr alone, so the process outlives
// whoever started it; the handshake line is printed here instead.
func (in *Instance) servePlugin(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	servers := make(chan *grpc.Server, 1)
	attach := make(chan *plugin.ReattachConfig, 1)
	done := make(chan struct{})
	go plugin.Serve(&plugin.ServeConfig{
		HandshakeConfig: Handshake,
		Plugins:         Plugins(),
		GRPCServer: func(options []grpc.ServerOption) *grpc.Server {
			s := in.Server(options...)
			servers <- s
			return s
		},
		Logger: hclog.NewNullLogger(),
		Test:   &plugin.ServeTestConfig{Context: ctx, ReattachConfigCh: attach, CloseCh: done},
	})
	select {
	case at := <-attach:
		if err := printHandshake(at); err != nil {
			return err
		}
	case <-done:
		return fmt.Errorf("cannot listen in $%s=%q", plugin.EnvUnixSocketDir, os.Getenv(plugin.EnvUnixSocketDir))
	}
	server := <-servers
	terminate := make(chan os.Signal, 1)
	signal.Notify(terminate, syscall.SIGTERM)
	for {
		select {
		case <-done: // go-plugin's Shutdown
			return nil
		case <-terminate:
			go in.stop(context.Background(), defaultGrace)
		case <-in.stopped:
			cut := time.AfterFunc(lingerLimit, server.Stop)
			server.GracefulStop()
			cut.Stop()
			<-done
			return nil
		}
	}
}

func printHandshake(at *plugin.ReattachConfig) error {
	line := fmt.Sprintf("%d|%d|%s|%s|%s|", plugin.CoreProtocolVersion, at.ProtocolVersion, at.Addr.Network(), at.Addr.String(), at.Protocol)
	if os.Getenv("PLUGIN_MULTIPLEX_GRPC") != "" {
		line += "|true"
	}
	if _, err := fmt.Fprintln(os.Stdout, line); err != nil {
		return fmt.Errorf("print handshake: %w", err)
	}
	return nil
}

// serveHTTPSocket serves Component.HTTP on a unix socket of its own, beside go-plugin's; Status.info tells its path.
func (in *Instance) serveHTTPSocket() (closeFn func(), err error) {
	if in.comp.HTTP == nil {
		return func() {}, nil
	}
	dir := os.Getenv(plugin.EnvUnixSocketDir)
	if dir == "" {
		dir = os.TempDir()
	}
	path := filepath.Join(dir, "http"+strconv.Itoa(os.Getpid()))
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("http socket: %w", err) // a leftover of a process that had our pid
	}
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("http socket: %w", err)
	}
	if err := shareSocket(path, os.Getenv(plugin.EnvUnixSocketGroup)); err != nil {
		return nil, errors.Join(err, l.Close())
	}
	server := &http.Server{
		Handler:           in.Handler(),
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          slog.NewLogLogger(in.log.Handler(), slog.LevelWarn),
	}
	in.httpSocket = path
	go func() {
		if err := server.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
			in.log.Error("http interface ended", "error", err)
			in.setState(componentv1.State_FAILED, fmt.Sprintf("http interface ended: %v", err))
		}
	}()
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), lingerLimit)
		defer cancel()
		if err := server.Shutdown(ctx); err != nil {
			in.log.Warn("http interface did not end in time", "error", err)
		}
	}, nil
}

// shareSocket lets the group that go-plugin names connect, as go-plugin does for its own socket.
func shareSocket(path, group string) error {
	if group == "" {
		return nil
	}
	gid, err := strconv.Atoi(group)
	if err != nil {
		g, err := user.LookupGroup(group)
		if err != nil {
			return fmt.Errorf("http socket: group %q: %w", group, err)
		}
		if gid, err = strconv.Atoi(g.Gid); err != nil {
			return fmt.Errorf("http socket: group %q: %w", group, err)
		}
	}
	if err := os.Chown(path, -1, gid); err != nil {
		return fmt.Errorf("http socket: %w", err)
	}
	if err := os.Chmod(path, 0o660); err != nil {
		return fmt.Errorf("http socket: %w", err)
	}
	return nil
}
