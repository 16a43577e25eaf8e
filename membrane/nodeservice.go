package membrane

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// NodeServices is what the node does for a component. A nil function answers UNIMPLEMENTED: the node does not offer it. Errors with a gRPC
// status are passed on as they are.
type NodeServices struct {
	Publish    func(ctx context.Context, instance string, ev *componentv1.Event) error
	Query      func(ctx context.Context, instance string, q *componentv1.QueryRequest, send func(*componentv1.QueryRow) error) error
	Assert     func(ctx context.Context, instance string, r *componentv1.AssertRequest) (*componentv1.AssertReply, error)
	Checkpoint func(ctx context.Context, instance string, r *componentv1.CheckpointRequest) (*componentv1.CheckpointReply, error)
	Content    func(ctx context.Context, instance string, r *componentv1.ContentRequest) (*componentv1.ContentReply, error)
	Report     func(ctx context.Context, instance string, t *componentv1.Telemetry) error
}

// NodeSocketConfig of ServeNode.
type NodeSocketConfig struct {
	Path     string        // of the unix socket; what an earlier daemon left there is replaced
	LeaseTTL time.Duration // of each grant; default 2 s
	// Open opens the path in its own way; nil: a unix socket.
	Open     func(path string) (net.Listener, error)
	Services NodeServices
	// Lease says of an instance under a lease of the arbiter for how long a process may still be granted to run: grants are no longer than that, and
	// none is given without. nil: it is not leased.
	Lease func() (left time.Duration, leased bool)
}

const defaultLease = 2 * time.Second

// NodeSocket is the node as one instance sees it: the contract's Node service and the instance's bindings, on a unix socket of its own.
// Each call has to carry a credential that was allowed.
type NodeSocket struct {
	componentv1.UnimplementedNodeServer
	m        *Membrane
	cfg      NodeSocketConfig
	server   *grpc.Server
	file     os.FileInfo // of the socket that it made; nil: Open made none
	withheld atomic.Bool
	draining atomic.Bool

	mu          sync.Mutex // guards credentials
	credentials map[string]chan struct{}
}

// ServeNode listens on cfg.Path for the component behind m, until Close.
func (r *Router) ServeNode(m *Membrane, cfg NodeSocketConfig) (*NodeSocket, error) {
	if cfg.LeaseTTL <= 0 {
		cfg.LeaseTTL = defaultLease
	}
	l, file, err := cfg.open()
	if err != nil {
		return nil, fmt.Errorf("node socket of %s: %w", m.Instance(), err)
	}
	s := &NodeSocket{m: m, cfg: cfg, file: file, credentials: map[string]chan struct{}{}}
	s.server = NewServer(r.bindingHandler(m), grpc.ChainUnaryInterceptor(s.checkUnary), grpc.ChainStreamInterceptor(s.checkStream))
	componentv1.RegisterNodeServer(s.server, s)
	go func() {
		if err := s.server.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			m.cfg.Log.Error("node socket ended: the component's lease will lapse", "instance", m.Instance(), "error", err)
		}
	}()
	return s, nil
}

// open makes the socket, and says which file it is.
func (cfg *NodeSocketConfig) open() (net.Listener, os.FileInfo, error) {
	if cfg.Open != nil {
		l, err := cfg.Open(cfg.Path)
		return l, nil, err
	}
	if err := os.MkdirAll(filepath.Dir(cfg.Path), 0o700); err != nil {
		return nil, nil, err
	}
	if err := os.Remove(cfg.Path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: cfg.Path, Net: "unix"})
	if err != nil {
		return nil, nil, err
	}
	l.SetUnlinkOnClose(false) // the path may be another one's by then
	err = os.Chmod(cfg.Path, 0o600)
	file, serr := os.Stat(cfg.Path)
	if err = errors.Join(err, serr); err != nil {
		return nil, nil, errors.Join(err, l.Close(), os.Remove(cfg.Path))
	}
	return l, file, nil
}

// Allow lets a process with this credential in. A replacement allows two.
func (s *NodeSocket) Allow(credential string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if credential != "" && s.credentials[credential] == nil {
		s.credentials[credential] = make(chan struct{})
	}
}

// Forbid ends what Allow began: the process gets no lease any more and its calls are refused.
func (s *NodeSocket) Forbid(credential string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ch := s.credentials[credential]; ch != nil {
		close(ch)
		delete(s.credentials, credential)
	}
}

// Withhold stops (true) or goes on (false) granting leases. A component without a grant ends itself when the last one runs out.
func (s *NodeSocket) Withhold(stop bool) { s.withheld.Store(stop) }

// SetDrain tells the component with its next grant that it will be moved away soon.
func (s *NodeSocket) SetDrain(drain bool) { s.draining.Store(drain) }

// Close stops serving and removes the socket.
func (s *NodeSocket) Close() error {
	s.server.Stop()
	if s.file == nil {
		return nil
	}
	now, err := os.Stat(s.cfg.Path)
	if err == nil && os.SameFile(now, s.file) {
		err = os.Remove(s.cfg.Path)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("node socket of %s: %w", s.m.Instance(), err)
	}
	return nil
}

// allowed returns the channel that is closed when the caller's credential is forbidden.
func (s *NodeSocket) allowed(ctx context.Context) (<-chan struct{}, error) {
	got := one(metadataOf(ctx), componentv1.MetaCredential)
	s.mu.Lock()
	defer s.mu.Unlock()
	for c, over := range s.credentials {
		if subtle.ConstantTimeCompare([]byte(c), []byte(got)) == 1 {
			return over, nil
		}
	}
	return nil, status.Errorf(codes.Unauthenticated, "this socket is for %s: metadata %s is missing or wrong; send $%s", s.m.Instance(), componentv1.MetaCredential, componentv1.EnvCredential)
}

func metadataOf(ctx context.Context) metadata.MD {
	md, _ := metadata.FromIncomingContext(ctx)
	return md
}

func (s *NodeSocket) checkUnary(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if _, err := s.allowed(ctx); err != nil {
		return nil, err
	}
	return next(ctx, req)
}

func (s *NodeSocket) checkStream(srv any, ss grpc.ServerStream, _ *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if _, err := s.allowed(ss.Context()); err != nil {
		return err
	}
	return next(srv, ss)
}

// Lease implements Node: one grant for each beat, none while they are withheld.
func (s *NodeSocket) Lease(stream grpc.BidiStreamingServer[componentv1.LeaseBeat, componentv1.LeaseGrant]) error {
	over, err := s.allowed(stream.Context())
	if err != nil {
		return err
	}
	for {
		if _, err := stream.Recv(); err != nil {
			return endOfStream(err)
		}
		select {
		case <-over:
			return status.Error(codes.PermissionDenied, "this process is not the instance's any more")
		default:
		}
		if s.withheld.Load() {
			continue
		}
		ttl, leased := s.cfg.LeaseTTL, false
		if s.cfg.Lease != nil {
			var left time.Duration
			if left, leased = s.cfg.Lease(); leased {
				ttl = min(ttl, left)
			}
		}
		if ttl < time.Millisecond {
			continue
		}
		grant := &componentv1.LeaseGrant{TtlMs: uint32(ttl.Milliseconds()), Drain: s.draining.Load(), Token: s.m.Token().Proto(), Leased: leased}
		if err := stream.Send(grant); err != nil {
			return err
		}
	}
}

func endOfStream(err error) error {
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

func notOffered(what string) error {
	return status.Errorf(codes.Unimplemented, "this node does not offer %s", what)
}

// Publish implements Node. An event that was not taken is acknowledged with its error; the stream goes on.
func (s *NodeSocket) Publish(stream grpc.BidiStreamingServer[componentv1.Event, componentv1.EventAck]) error {
	if s.cfg.Services.Publish == nil {
		return notOffered("Publish")
	}
	for {
		ev, err := stream.Recv()
		if err != nil {
			return endOfStream(err)
		}
		ack := &componentv1.EventAck{Channel: ev.GetChannel(), Seq: ev.GetSeq()}
		if err := s.cfg.Services.Publish(stream.Context(), s.m.Instance(), ev); err != nil {
			ack.Error = status.Convert(err).Message()
		}
		if err := stream.Send(ack); err != nil {
			return err
		}
	}
}

// Query implements Node.
func (s *NodeSocket) Query(q *componentv1.QueryRequest, stream grpc.ServerStreamingServer[componentv1.QueryRow]) error {
	if s.cfg.Services.Query == nil {
		return notOffered("Query")
	}
	return s.cfg.Services.Query(stream.Context(), s.m.Instance(), q, stream.Send)
}

// Assert implements Node.
func (s *NodeSocket) Assert(ctx context.Context, r *componentv1.AssertRequest) (*componentv1.AssertReply, error) {
	if s.cfg.Services.Assert == nil {
		return nil, notOffered("Assert")
	}
	return s.cfg.Services.Assert(ctx, s.m.Instance(), r)
}

// Checkpoint implements Node.
func (s *NodeSocket) Checkpoint(ctx context.Context, r *componentv1.CheckpointRequest) (*componentv1.CheckpointReply, error) {
	if s.cfg.Services.Checkpoint == nil {
		return nil, notOffered("Checkpoint")
	}
	return s.cfg.Services.Checkpoint(ctx, s.m.Instance(), r)
}

// Content implements Node.
func (s *NodeSocket) Content(ctx context.Context, r *componentv1.ContentRequest) (*componentv1.ContentReply, error) {
	if s.cfg.Services.Content == nil {
		return nil, notOffered("Content")
	}
	return s.cfg.Services.Content(ctx, s.m.Instance(), r)
}

// Report implements Node.
func (s *NodeSocket) Report(stream grpc.ClientStreamingServer[componentv1.Telemetry, componentv1.TelemetryAck]) error {
	if s.cfg.Services.Report == nil {
		return notOffered("Report")
	}
	for {
		t, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stream.SendAndClose(&componentv1.TelemetryAck{})
		}
		if err != nil {
			return err
		}
		if err := s.cfg.Services.Report(stream.Context(), s.m.Instance(), t); err != nil {
			return err
		}
	}
}
