package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/coppice-project/coppice/components/runner"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	counterv1 "github.com/coppice-project/coppice/plugins/counter/v1"
	"github.com/coppice-project/coppice/plugins/sdk"
)

// binary is an artifact of the simulated cluster: what runs when it is started.
type binary struct {
	name, version string
	schema        uint32
	reads         []uint32
	stateless     bool
	launch        error                           // its process does not start
	onStart       func(ctx context.Context) error // part of the component's Start
	journal       int64                           // bytes kept of the journal; 0: plenty
	ballast       int                             // bytes of state besides the counter
	merge         func(base, ours, theirs, into *sdk.Txn) error
	requires      string                        // an interface
	hang          atomic.Pointer[chan struct{}] // Get waits for it
	spoil         atomic.Pointer[spoiler]       // changes the frames that its processes give and are given

	desc *componentv1.Description
}

func (b *binary) digest() string { return "sha256:" + b.name + "-" + b.version }

// component makes the counter: one number, raised by Add, one transaction a call.
func (b *binary) component() *sdk.Component {
	c := &sdk.Component{
		Type: b.name, Version: b.version,
		Register: func(r grpc.ServiceRegistrar) {
			counterv1.RegisterCounterServer(r, &counter{stateless: b.stateless, hang: &b.hang})
		},
		OnStart: func(ctx context.Context, in *sdk.Instance) error {
			if b.onStart != nil {
				if err := b.onStart(ctx); err != nil {
					return err
				}
			}
			if b.ballast == 0 {
				return nil
			}
			return in.Update(ctx, func(_ context.Context, tx *sdk.Txn) error {
				if _, there := tx.Get("ballast"); !there {
					tx.Put("ballast", make([]byte, b.ballast))
				}
				return nil
			})
		},
	}
	if b.requires != "" {
		c.Requires = []*sdk.Binding{sdk.Require(b.requires, "counter.v1.Counter")}
	}
	if !b.stateless {
		c.State = &sdk.State{Schema: max(b.schema, 1), Reads: b.reads, Merge: b.merge}
		c.State.Limits.JournalBytes = b.journal
	}
	return c
}

type counter struct {
	counterv1.UnimplementedCounterServer
	stateless bool
	hang      *atomic.Pointer[chan struct{}]
}

func (c *counter) Add(ctx context.Context, req *counterv1.AddRequest) (*counterv1.Value, error) {
	if c.stateless {
		return &counterv1.Value{Value: req.GetN()}, nil
	}
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	value := int64(tx.Uint64("value")) + req.GetN()
	tx.PutUint64("value", uint64(value))
	return &counterv1.Value{Value: value}, nil
}

func (c *counter) Get(ctx context.Context, _ *counterv1.GetRequest) (*counterv1.Value, error) {
	if h := c.hang.Load(); h != nil {
		<-*h
	}
	if c.stateless {
		return &counterv1.Value{}, nil
	}
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	return &counterv1.Value{Value: int64(tx.Uint64("value"))}, nil
}

// shelf is every node's registry.
type shelf struct {
	mu       sync.Mutex
	binaries map[string]*binary
}

func (s *shelf) add(b *binary) *binary {
	p, err := startProcess(b, runner.Spec{Instance: "describe"})
	if err != nil {
		panic(err)
	}
	if b.desc, err = componentv1.NewComponentClient(p.conn).Describe(context.Background(), &componentv1.DescribeRequest{}); err != nil {
		panic(err)
	}
	p.die("")
	s.mu.Lock()
	defer s.mu.Unlock()
	s.binaries[b.digest()] = b
	return b
}

func (s *shelf) get(digest string) (*binary, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.binaries[digest]; b != nil {
		return b, nil
	}
	return nil, fmt.Errorf("artifact %s: not in the registry", digest)
}

func (s *shelf) Open(_ context.Context, digest string) (*os.File, *componentsv1.Artifact, error) {
	b, err := s.get(digest)
	if err != nil {
		return nil, nil, err
	}
	f, err := os.Open(os.DevNull)
	return f, &componentsv1.Artifact{Name: b.name, Version: b.version, Digest: digest}, err
}

func (s *shelf) Description(_ context.Context, digest string) (*componentv1.Description, error) {
	b, err := s.get(digest)
	if err != nil {
		return nil, err
	}
	return b.desc, nil
}

func (s *shelf) Warm(_ context.Context, digest string) error { _, err := s.get(digest); return err }
func (s *shelf) Cached(string) bool                          { return true }

// simRunner starts processes that are goroutines of the test.
type simRunner struct {
	shelf *shelf

	mu    sync.Mutex
	procs map[*simProcess]bool
}

// Start implements runner.Runner.
func (r *simRunner) Start(ctx context.Context, spec runner.Spec) (runner.Process, error) {
	b, err := r.shelf.get(spec.Exec.Digest)
	if err != nil {
		return nil, err
	}
	time.Sleep(5 * time.Millisecond)
	if b.launch != nil {
		return nil, b.launch
	}
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	p, err := startProcess(b, spec)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.procs[p] = true
	return p, nil
}

// Adopt implements runner.Runner: nothing outlives a simulated node.
func (r *simRunner) Adopt(context.Context, runner.Ident, runner.Spec) (runner.Process, error) {
	return nil, runner.ErrGone
}

// running lists the live processes of an instance.
func (r *simRunner) running(instance string) []*simProcess {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []*simProcess
	for p := range r.procs {
		if p.spec.Instance == instance && !p.over() {
			out = append(out, p)
		}
	}
	return out
}

func (r *simRunner) killAll() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for p := range r.procs {
		p.die("killed")
	}
}

var lastPid atomic.Int64

// simProcess is a component's process: its real SDK behind a connection in memory.
type simProcess struct {
	b                *binary
	spec             runner.Spec
	pid              int
	server           *grpc.Server
	lis              *bufconn.Listener
	conn             *grpc.ClientConn
	done             chan struct{}
	once             sync.Once
	exit             runner.ExitStatus
	starts, restored atomic.Int64 // calls of Start; bytes of states that it was given

	mu     sync.Mutex
	frozen chan struct{} // not nil: SIGSTOP, until it is closed
}

func startProcess(b *binary, spec runner.Spec) (*simProcess, error) {
	in, err := sdk.New(b.component(), sdk.Env{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, err
	}
	p := &simProcess{b: b, spec: spec, pid: int(lastPid.Add(1)), server: in.Server(), lis: bufconn.Listen(256 << 10), done: make(chan struct{})}
	go p.server.Serve(stoppable{p.lis, p}) //nolint:errcheck // ends with the process
	p.conn, err = grpc.NewClient("passthrough:component", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return p.lis.DialContext(ctx) }),
		grpc.WithStreamInterceptor(b.spoils), grpc.WithChainStreamInterceptor(p.counts), grpc.WithUnaryInterceptor(p.sees), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(runner.MaxMessage)))
	return p, err
}

// sees counts the starts.
func (p *simProcess) sees(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, next grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if method == componentv1.Component_Start_FullMethodName {
		p.starts.Add(1)
	}
	return next(ctx, method, req, reply, cc, opts...)
}

// counts counts what is restored.
func (p *simProcess) counts(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, next grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	s, err := next(ctx, desc, cc, method, opts...)
	if err != nil || method != componentv1.Component_Restore_FullMethodName {
		return s, err
	}
	return &countingStream{s, p}, nil
}

type countingStream struct {
	grpc.ClientStream
	p *simProcess
}

func (s *countingStream) SendMsg(m any) error {
	if f, ok := m.(*componentv1.StateFrame); ok {
		s.p.restored.Add(int64(len(f.GetData())))
	}
	return s.ClientStream.SendMsg(m)
}

// die ends the process; signal "" is an exit of its own.
func (p *simProcess) die(signal string) {
	p.once.Do(func() {
		p.exit = runner.ExitStatus{Known: true, Signal: signal, At: time.Now()}
		close(p.done)
		p.conn.Close()
		p.server.Stop()
	})
}

func (p *simProcess) over() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// freeze is SIGSTOP.
func (p *simProcess) freeze() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.frozen = make(chan struct{})
}

func (p *simProcess) wait() {
	p.mu.Lock()
	c := p.frozen
	p.mu.Unlock()
	if c != nil {
		select {
		case <-c:
		case <-p.done:
		}
	}
}

func (p *simProcess) Conn() *grpc.ClientConn        { return p.conn }
func (p *simProcess) Sandbox() runner.SandboxReport { return runner.SandboxReport{} }
func (p *simProcess) Done() <-chan struct{}         { return p.done }
func (p *simProcess) Exit() runner.ExitStatus       { return p.exit }
func (p *simProcess) Output() string                { return "" }
func (p *simProcess) Kill() error                   { p.die("killed"); return nil }
func (p *simProcess) Ident() runner.Ident {
	return runner.Ident{Instance: p.spec.Instance, Pid: p.pid, Credential: p.spec.Credential}
}

func (p *simProcess) Stop(ctx context.Context, grace time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	_, err := componentv1.NewComponentClient(p.conn).Stop(ctx, &componentv1.StopRequest{GraceMs: uint32(grace.Milliseconds())})
	p.die("")
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return nil
}

// stoppable hands out connections that stand still while the process is frozen.
type stoppable struct {
	net.Listener
	p *simProcess
}

func (l stoppable) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return stoppableConn{c, l.p}, nil
}

type stoppableConn struct {
	net.Conn
	p *simProcess
}

func (c stoppableConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	c.p.wait()
	return n, err
}

func (c stoppableConn) Write(b []byte) (int, error) {
	c.p.wait()
	return c.Conn.Write(b)
}
