package sim

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"

	"github.com/coppice-project/coppice/components/runner"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	counterv1 "github.com/coppice-project/coppice/plugins/counter/v1"
	"github.com/coppice-project/coppice/plugins/sdk"
)

// The component of the simulation is the counter, behind its real SDK: one number, raised by Add, one transaction a call. Its process is a few
// goroutines.
const (
	counterDigest  = "sha256:counter-1.0.0"
	counterVersion = "1.0.0"
	counterName    = "counter"
	// lineHeader tells in which epoch a call was carried out.
	lineHeader = "sim-line"
)

type counter struct {
	counterv1.UnimplementedCounterServer
	acts func(incarnation, epoch uint64) // told of each call that is carried out; nil: nobody is
}

// Add implements the service.
func (c counter) Add(ctx context.Context, req *counterv1.AddRequest) (*counterv1.Value, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	value := int64(tx.Uint64("value")) + req.GetN()
	tx.PutUint64("value", uint64(value))
	incarnation, epoch := sdk.Token(ctx)
	if c.acts != nil {
		c.acts(incarnation, epoch)
	}
	err = grpc.SetHeader(ctx, metadata.Pairs(lineHeader, fmt.Sprintf("%d/%d", incarnation, epoch)))
	return &counterv1.Value{Value: value}, err
}

// Get implements the service.
func (counter) Get(ctx context.Context, _ *counterv1.GetRequest) (*counterv1.Value, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	return &counterv1.Value{Value: int64(tx.Uint64("value"))}, nil
}

// counterComponent is the counter as a component of a process; begun is set when that is told to start.
func counterComponent(begun *atomic.Bool, acts func(incarnation, epoch uint64)) *sdk.Component {
	return &sdk.Component{
		OnStart: func(context.Context, *sdk.Instance) error { begun.Store(true); return nil },
		Type:    counterName, Version: counterVersion, State: &sdk.State{Schema: 1, Merge: func(base, ours, theirs, into *sdk.Txn) error {
			into.PutUint64("value", ours.Uint64("value")+theirs.Uint64("value")-base.Uint64("value"))
			return nil
		}},
		Register: func(r grpc.ServiceRegistrar) { counterv1.RegisterCounterServer(r, counter{acts: acts}) },
	}
}

// shelf is every node's registry: it has the counter.
type shelf struct{ desc *componentv1.Description }

func newShelf() (*shelf, error) {
	p, err := startProcess(runner.Spec{Instance: "describe"})
	if err != nil {
		return nil, err
	}
	defer p.die("")
	desc, err := componentv1.NewComponentClient(p.conn).Describe(context.Background(), &componentv1.DescribeRequest{})
	return &shelf{desc}, err
}

// Open implements supervisor.Artifacts.
func (s *shelf) Open(_ context.Context, digest string) (*os.File, *componentsv1.Artifact, error) {
	if digest != counterDigest {
		return nil, nil, fmt.Errorf("artifact %s: not in the registry", digest)
	}
	f, err := os.Open(os.DevNull)
	return f, &componentsv1.Artifact{Name: counterName, Version: counterVersion, Digest: digest}, err
}

// Description implements supervisor.Artifacts.
func (s *shelf) Description(context.Context, string) (*componentv1.Description, error) {
	return s.desc, nil
}

// Warm implements supervisor.Artifacts.
func (s *shelf) Warm(context.Context, string) error { return nil }

// Cached implements supervisor.Artifacts.
func (s *shelf) Cached(string) bool { return true }

// processes starts a node's processes. Nothing outlives a simulated node.
type processes struct {
	// component is what a process is to be; nil: the counter.
	component func(spec runner.Spec, p *process) *sdk.Component

	mu   sync.Mutex // guards list
	list []*process
}

// Start implements runner.Runner.
func (r *processes) Start(ctx context.Context, spec runner.Spec) (runner.Process, error) {
	time.Sleep(5 * time.Millisecond)
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	p := newProcess(spec)
	comp := counterComponent(p.begun, nil)
	if r.component != nil {
		comp = r.component(spec, p)
	}
	if err := p.run(comp); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.list = append(r.list, p)
	return p, nil
}

// Adopt implements runner.Runner.
func (r *processes) Adopt(context.Context, runner.Ident, runner.Spec) (runner.Process, error) {
	return nil, runner.ErrGone
}

// running lists the live processes of an instance.
func (r *processes) running(instance string) []*process {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []*process
	for _, p := range r.list {
		if p.spec.Instance == instance && !p.over() {
			out = append(out, p)
		}
	}
	return out
}

// begun lists those of them that were started: a standby was not.
func (r *processes) begun(instance string) []*process {
	return slices.DeleteFunc(r.running(instance), func(p *process) bool { return !p.begun.Load() })
}

func (r *processes) killAll() {
	r.mu.Lock()
	list := r.list
	r.mu.Unlock()
	for _, p := range list {
		p.die("killed")
	}
}

var lastPid atomic.Int64

// process is a component's process.
type process struct {
	spec   runner.Spec
	pid    int
	server *grpc.Server
	lis    *bufconn.Listener
	conn   *grpc.ClientConn
	done   chan struct{}
	once   sync.Once
	exit   runner.ExitStatus
	begun  *atomic.Bool // it was told to start; before that it can serve nobody
}

func startProcess(spec runner.Spec) (*process, error) {
	p := newProcess(spec)
	return p, p.run(counterComponent(p.begun, nil))
}

func newProcess(spec runner.Spec) *process {
	return &process{spec: spec, pid: int(lastPid.Add(1)), lis: bufconn.Listen(64 << 10), done: make(chan struct{}), begun: new(atomic.Bool)}
}

// run begins what the process is.
func (p *process) run(comp *sdk.Component) error {
	in, err := sdk.New(comp, sdk.Env{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	p.server = in.Server()
	go p.server.Serve(p.lis) //nolint:errcheck // ends with the process
	p.conn, err = grpc.NewClient("passthrough:component", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return p.lis.DialContext(ctx) }),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(runner.MaxMessage)))
	return err
}

// die ends the process; signal "" is an exit of its own.
func (p *process) die(signal string) {
	p.once.Do(func() {
		p.exit = runner.ExitStatus{Known: true, Signal: signal, At: time.Now()}
		close(p.done)
		_ = p.conn.Close() // whoever uses it finds out
		p.server.Stop()
	})
}

func (p *process) over() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// Conn implements runner.Process.
func (p *process) Conn() *grpc.ClientConn { return p.conn }

// Sandbox implements runner.Process.
func (p *process) Sandbox() runner.SandboxReport { return runner.SandboxReport{} }

// Done implements runner.Process.
func (p *process) Done() <-chan struct{} { return p.done }

// Exit implements runner.Process.
func (p *process) Exit() runner.ExitStatus { return p.exit }

// Output implements runner.Process.
func (p *process) Output() string { return "" }

// Kill implements runner.Process.
func (p *process) Kill() error { p.die("killed"); return nil }

// Ident implements runner.Process.
func (p *process) Ident() runner.Ident {
	return runner.Ident{Instance: p.spec.Instance, Pid: p.pid, Credential: p.spec.Credential}
}

// Stop implements runner.Process.
func (p *process) Stop(ctx context.Context, grace time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	_, err := componentv1.NewComponentClient(p.conn).Stop(ctx, &componentv1.StopRequest{GraceMs: uint32(grace.Milliseconds())})
	p.die("")
	return err
}

var _ runner.Runner = (*processes)(nil)
