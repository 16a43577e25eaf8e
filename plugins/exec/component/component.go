package component

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	"github.com/coppice-project/coppice/plugins/contract/program"
	"github.com/coppice-project/coppice/plugins/exec/dirstate"
	"github.com/coppice-project/coppice/plugins/sdk"
)

// Type is what the component calls itself.
const Type = "exec"

const (
	hookWithin   = 5 * time.Second        // a hook; less than a node waits for a frame
	freezeWithin = 3 * time.Second        // for the program to stand still
	startReserve = 300 * time.Millisecond // of the time for a start, left for its answer
	startWaits   = 8 * time.Second        // at most that a start waits for the program to be healthy; it goes on to become so
	stopReserve  = 200 * time.Millisecond // of the time for a stop, left for SIGKILL
	saveWithin   = 5 * time.Second        // for the state of a program that has ended of itself
	lastStop     = 5 * time.Second        // for the program to end where the node says nothing
)

// Run runs the component as this process. It does not return.
func Run(version string) {
	cfg, err := program.Parse(os.Getenv(program.Env))
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: %v\n", Type, err)
		os.Exit(1)
	}
	a := newAdapter(cfg, os.Stderr)
	sdk.Serve(a.component(version))
}

// Describe is what a program's component says about itself, where none runs that could be asked.
func Describe(version string, stateful bool) *componentv1.Description {
	d := &componentv1.Description{Type: Type, Version: version, Contract: componentv1.ProtocolVersion, State: &componentv1.StateSpec{}}
	if stateful {
		d.Features = []string{componentv1.FeatureIncremental}
		d.State = &componentv1.StateSpec{Stateful: true, WritesSchema: sdk.OpaqueSchema, ReadsSchemas: []uint32{sdk.OpaqueSchema}, Incremental: true, LiveSnapshot: true}
	}
	return d
}

// adapter is one program as a component.
type adapter struct {
	cfg  program.Config
	out  io.Writer // the program's output
	log  *slog.Logger
	exit func(int) // ends this process
	stop unix.Signal

	ended chan struct{} // closed when the component has stopped

	// ops is held by what must not meet the other: a snapshot, a hook, a check of the health, a start, a stop.
	ops sync.Mutex

	mu      sync.Mutex // guards everything below
	in      *sdk.Instance
	home    *home
	tree    *dirstate.Tree
	port    int
	prog    *process // nil: none was started, or it was ended on purpose
	quiet   bool     // stopped or frozen on purpose; the state rests
	frozen  bool     // SIGSTOP, not ended
	started time.Time
	healthy bool  // it was, once since it was started
	health  error // of the last check
}

func newAdapter(cfg program.Config, out io.Writer) *adapter {
	stop := unix.SignalNum(cfg.Stop)
	if stop == 0 {
		stop = unix.SIGTERM
	}
	return &adapter{
		cfg: cfg, out: out, log: slog.New(slog.NewTextHandler(out, nil)).With("component", Type, "pid", os.Getpid()), exit: os.Exit, stop: stop,
		ended: make(chan struct{}),
	}
}

func (a *adapter) component(version string) *sdk.Component {
	c := &sdk.Component{
		Type: Type, Version: version, Info: a.info, OnStart: a.onStart, Healthy: a.isHealthy, OnStop: a.onStop,
		OnLapse: func() {
			if err := killAll(); err != nil {
				a.log.Error("the lease has lapsed, and something of the program goes on", "error", err)
				return
			}
			a.home.remove()
		},
	}
	if a.cfg.StateDir != "" {
		c.Opaque = &folder{a}
	}
	if a.cfg.Port != nil {
		c.HTTP = http.HandlerFunc(a.serveHTTP)
	}
	return c
}

// open makes the folders of this process, once: describing it makes none.
func (a *adapter) open() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.home != nil {
		return nil
	}
	h, err := makeHome(".")
	if err != nil {
		return err
	}
	a.home = h
	if a.cfg.StateDir == "" {
		return nil
	}
	a.tree, err = dirstate.Open(filepath.Join(h.work, a.cfg.StateDir), h.aside)
	return err
}

func (a *adapter) onStart(ctx context.Context, in *sdk.Instance) error {
	signal.Notify(make(chan os.Signal, 1), syscall.SIGINT) // what is ignored here would be ignored by the program
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become the reaper of the program's processes: %w", err)
	}
	if err := a.open(); err != nil {
		return err
	}
	if a.tree != nil {
		if err := a.tree.Ready(); err != nil {
			return err
		}
	}
	a.mu.Lock()
	a.in = in
	a.mu.Unlock()
	a.ops.Lock()
	defer a.ops.Unlock()
	if err := a.launch(ctx); err != nil {
		return err
	}
	go a.look()
	return nil
}

// launch starts the program and waits until it is healthy, or until there is no time left for that: a slow program goes on to become so. The caller holds ops.
func (a *adapter) launch(ctx context.Context) error {
	port, err := a.choosePort()
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.port = port
	a.mu.Unlock()
	words, env, err := a.line(a.cfg.Command())
	if err != nil {
		return err
	}
	p, err := startProcess(words, env, a.home.work, a.out)
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.prog, a.started, a.healthy, a.health, a.quiet, a.frozen = p, time.Now(), false, nil, false, false
	a.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, startWaits)
	defer cancel()
	if err := a.becomesHealthy(ctx, p); err != nil {
		p.wantEnd()
		return errors.Join(err, killAll())
	}
	go a.outlive(p)
	return nil
}

// choosePort is where the program listens in this start: the manifest's port, or a free one.
func (a *adapter) choosePort() (int, error) {
	switch {
	case a.cfg.Port == nil:
		return 0, nil
	case *a.cfg.Port > 0:
		return int(*a.cfg.Port), nil
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("choose a free port: %w", err)
	}
	addr, ok := l.Addr().(*net.TCPAddr)
	if err := l.Close(); err != nil || !ok {
		return 0, fmt.Errorf("choose a free port: %w", err)
	}
	return addr.Port, nil
}

// line is a command line of the manifest, and the environment for it.
func (a *adapter) line(text string) (words, env []string, err error) {
	a.mu.Lock()
	v := program.Values{Port: a.port, Program: a.cfg.File}
	if a.tree != nil {
		v.StateDir = filepath.Join(a.home.work, a.cfg.StateDir)
	}
	work := a.home.work
	a.mu.Unlock()
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "COPPICE_") && !strings.HasPrefix(e, "PLUGIN_") && !strings.HasPrefix(e, "HOME=") && !strings.HasPrefix(e, "PWD=") {
			env = append(env, e)
		}
	}
	env = append(append(env, "HOME="+work, "PWD="+work), v.Environ()...)
	words, err = v.Expand(text)
	if err != nil {
		return nil, nil, fmt.Errorf("the command line %q has %w", text, err)
	}
	return words, env, nil
}

// hook runs a command line of the manifest; "" is none. The caller holds ops.
func (a *adapter) hook(ctx context.Context, name, text string) error {
	if text == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, hookWithin)
	defer cancel()
	words, env, err := a.line(text)
	if err == nil {
		err = command(ctx, words, env, a.home.work)
	}
	if err != nil {
		return fmt.Errorf("the hook %s: %w", name, err)
	}
	return nil
}

// outlive ends this process when the program has ended of itself. What it left in its folder is saved before.
func (a *adapter) outlive(p *process) {
	<-p.done
	if p.endWanted() {
		return
	}
	why := p.ended()
	if err := killAll(); err != nil {
		why += "; " + err.Error()
	}
	a.mu.Lock()
	in := a.in
	a.mu.Unlock()
	if a.cfg.Unattended && a.cfg.StateDir != "" && in != nil {
		if err := in.CheckpointSoon(saveWithin, "the program has ended"); err != nil {
			fmt.Fprintf(a.out, "%s: what the program left could not be saved, the checkpoint before stands: %v\n", Type, err)
		}
	}
	fmt.Fprintf(a.out, "%s: %s\n", Type, why)
	a.home.remove()
	a.exit(componentv1.ExitProgramEnded)
}

// onStop ends the program by its signal, within the grace that there is.
func (a *adapter) onStop(ctx context.Context) error {
	a.ops.Lock()
	defer a.ops.Unlock()
	defer a.home.remove()
	defer close(a.ended) // Stop comes once
	return a.endProgram(ctx)
}

// endProgram ends the program on purpose. The caller holds ops.
func (a *adapter) endProgram(ctx context.Context) error {
	a.mu.Lock()
	p := a.prog
	a.prog, a.frozen = nil, false
	a.mu.Unlock()
	if p == nil {
		return nil
	}
	grace := lastStop
	if end, ok := ctx.Deadline(); ok {
		grace = max(time.Until(end)-stopReserve, 0)
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), grace)
	defer cancel()
	return p.end(ctx, a.stop)
}

func (a *adapter) info() map[string]string {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := map[string]string{}
	if a.prog != nil {
		out["program_pid"] = fmt.Sprint(a.prog.pid)
		if a.port > 0 {
			out[componentv1.InfoListen] = a.address()
		}
	}
	return out
}

// address is where the program listens; the caller holds mu, or nothing starts.
func (a *adapter) address() string { return net.JoinHostPort("127.0.0.1", fmt.Sprint(a.port)) }
