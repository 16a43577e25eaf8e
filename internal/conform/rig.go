package conform

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"

	"github.com/coppice-project/coppice/components/runner"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// rig is what one check works with: the file, what it says of itself, a node that is played, and the processes that were started.
type rig struct {
	cfg     *Config
	desc    *componentv1.Description // nil before it is known
	dir     string
	runner  *runner.Local
	closers []func() error
	started int
}

func newRig(cfg *Config, desc *componentv1.Description) (*rig, error) {
	dir, err := os.MkdirTemp("", "cpc") // short: a unix socket's path has to fit into 107 bytes
	if err != nil {
		return nil, fmt.Errorf("conform: a folder for its sockets: %w", err)
	}
	l, err := runner.New(runner.Config{})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("conform: %w", err), os.RemoveAll(dir))
	}
	return &rig{cfg: cfg, desc: desc, dir: dir, runner: l, closers: []func() error{func() error { return os.RemoveAll(dir) }}}, nil
}

// close ends all that the check started.
func (r *rig) close() error {
	var errs []error
	for i := len(r.closers) - 1; i >= 0; i-- {
		errs = append(errs, r.closers[i]())
	}
	return errors.Join(errs...)
}

// describe asks the component what it is, in the strictest sandbox, as the registry does.
func (r *rig) describe(ctx context.Context) (*componentv1.Description, error) {
	return runner.Describe(ctx, runner.ExecFile{Path: r.cfg.File}, runner.Limits{})
}

// process is one process of the component, and the node that it belongs to.
type process struct {
	runner.Process
	control componentv1.ComponentClient
	node    *node
}

// launch starts a process that is created, not started.
func (r *rig) launch(ctx context.Context) (*process, error) { return r.launchBeside(ctx, false) }

// launchBeside is launch beside a node that is silent from the beginning, or not.
func (r *rig) launchBeside(ctx context.Context, silent bool) (*process, error) {
	r.started++
	name := fmt.Sprint("p", r.started)
	node, err := playNode(filepath.Join(r.dir, name+".node"), silent)
	if err != nil {
		return nil, err
	}
	r.closers = append(r.closers, node.close)
	p, err := r.runner.Start(ctx, runner.Spec{
		Instance: instance, Exec: runner.ExecFile{Path: r.cfg.File}, RunDir: filepath.Join(r.dir, name), LogDir: filepath.Join(r.dir, name+".log"),
		DataDir: filepath.Join(r.dir, name+".data"), NodeSocket: node.path,
	})
	if err != nil {
		return nil, err
	}
	r.closers = append(r.closers, func() error {
		if err := p.Kill(); err != nil {
			return err
		}
		<-p.Done()
		return nil
	})
	return &process{Process: p, control: componentv1.NewComponentClient(p.Conn()), node: node}, nil
}

const instance = "conform/it-0"

func startRequest() *componentv1.StartRequest {
	return &componentv1.StartRequest{Instance: instance, Token: &componentv1.Token{Incarnation: 1, Epoch: 1}}
}

// start launches a process and starts it.
func (r *rig) start(ctx context.Context) (*process, error) {
	p, err := r.launch(ctx)
	if err != nil {
		return nil, err
	}
	st, err := p.control.Start(ctx, startRequest())
	if err != nil {
		return nil, p.said(fmt.Errorf("the Start call: %w", err))
	}
	if st.GetState() != componentv1.State_STARTED {
		return nil, fmt.Errorf("the Start call answers %s, want STARTED", st.GetState())
	}
	return p, nil
}

// said adds what the process wrote last.
func (p *process) said(err error) error {
	b, rerr := os.ReadFile(p.Output())
	if rerr != nil || len(b) == 0 {
		return err
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	return fmt.Errorf("%w; its last output: %s", err, strings.Join(lines[max(0, len(lines)-3):], " | "))
}

// ended waits for the process's own end.
func (p *process) ended(ctx context.Context, within time.Duration) (runner.ExitStatus, error) {
	select {
	case <-p.Done():
		return p.Exit(), nil
	case <-time.After(within):
		return runner.ExitStatus{}, fmt.Errorf("it still runs after %s", within)
	case <-ctx.Done():
		return runner.ExitStatus{}, fmt.Errorf("it still runs: %w", ctx.Err())
	}
}

// stranger is a connection without the credential.
func (r *rig) stranger(p *process) (*grpc.ClientConn, error) {
	conn, err := grpc.NewClient("passthrough:///component", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", p.Ident().Socket)
		}))
	if err != nil {
		return nil, err
	}
	r.closers = append(r.closers, conn.Close)
	return conn, nil
}

// refused says that a call must fail with one of these codes.
func refused(what string, err error, want ...codes.Code) error {
	if err == nil {
		return fmt.Errorf("%s succeeds, want %v", what, want)
	}
	for _, c := range want {
		if status.Code(err) == c {
			return nil
		}
	}
	return fmt.Errorf("%s fails with %v, want %v: %s", what, status.Code(err), want, status.Convert(err).Message())
}

// unimplemented turns "not offered" into a skip.
func unimplemented(what string, err error) error {
	if status.Code(err) == codes.Unimplemented {
		return skip(what + " is not offered")
	}
	return err
}

// node is the played node: it grants leases until it is told to stop.
type node struct {
	componentv1.UnimplementedNodeServer
	path   string
	server *grpc.Server
	served chan error

	mu     sync.Mutex // guards everything below
	ttl    time.Duration
	silent bool
	asked  int
}

func playNode(path string, silent bool) (*node, error) {
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("conform: play a node: %w", err)
	}
	n := &node{path: path, server: grpc.NewServer(), served: make(chan error, 1), ttl: 2 * time.Second, silent: silent}
	componentv1.RegisterNodeServer(n.server, n)
	go func() { n.served <- n.server.Serve(l) }()
	return n, nil
}

func (n *node) close() error {
	n.server.Stop()
	if err := <-n.served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
		return err
	}
	return nil
}

// silence has the node grant nothing more; speak the opposite.
func (n *node) silence() { n.set(func() { n.silent = true }) }

func (n *node) speak() { n.set(func() { n.silent = false }) }

func (n *node) set(change func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	change()
}

func (n *node) beats() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.asked
}

// Lease implements the contract's node.
func (n *node) Lease(stream grpc.BidiStreamingServer[componentv1.LeaseBeat, componentv1.LeaseGrant]) error {
	for {
		if _, err := stream.Recv(); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		n.mu.Lock()
		n.asked++
		ttl, silent := n.ttl, n.silent
		n.mu.Unlock()
		if silent {
			continue
		}
		if err := stream.Send(&componentv1.LeaseGrant{TtlMs: uint32(ttl.Milliseconds()), Token: &componentv1.Token{Incarnation: 1, Epoch: 1}}); err != nil {
			return err
		}
	}
}
