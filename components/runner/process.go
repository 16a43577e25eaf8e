package runner

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/hashicorp/go-hclog"
	plugin "github.com/hashicorp/go-plugin"
	pluginrunner "github.com/hashicorp/go-plugin/runner"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// process implements Process.
type process struct {
	*child
	conn   *grpc.ClientConn
	id     Ident
	output string
	log    *slog.Logger
}

// Start implements Runner.
func (r *Local) Start(ctx context.Context, spec Spec) (Process, error) {
	if err := spec.prepare(); err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Instance, err)
	}
	prog, err := spec.Exec.open()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Instance, err)
	}
	defer prog.close()
	p, err := r.start(ctx, &spec, prog)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", spec.Instance, err)
	}
	return p, nil
}

// prepare fills defaults and makes the directories.
func (s *Spec) prepare() error {
	if len(s.RunDir) == 0 || len(s.RunDir) > maxRunDir {
		return fmt.Errorf("run folder %q has %d bytes, want 1 to %d: a unix socket's path has to fit into 107", s.RunDir, len(s.RunDir), maxRunDir)
	}
	if s.LogDir == "" {
		return errors.New("no folder for output")
	}
	for _, dir := range []string{s.RunDir, s.DataDir} {
		if dir == "" {
			continue
		}
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fmt.Errorf("make its folder: %w", err)
		}
	}
	if s.Credential == "" {
		s.Credential = newCredential()
	}
	if s.Limits.Start <= 0 {
		s.Limits.Start = defaultStart
	}
	return nil
}

func newCredential() string {
	var b [24]byte
	rand.Read(b[:]) //nolint:errcheck // never fails since Go 1.24
	return hex.EncodeToString(b[:])
}

func (r *Local) start(ctx context.Context, spec *Spec, prog *program) (*process, error) {
	limit := spec.Limits.Start
	if dl, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(dl))
	}
	if limit <= 0 {
		return nil, fmt.Errorf("no time left: %w", context.DeadlineExceeded)
	}
	var l *launch
	client := plugin.NewClient(&plugin.ClientConfig{
		HandshakeConfig:  plugin.HandshakeConfig{MagicCookieKey: componentv1.CookieKey, MagicCookieValue: componentv1.CookieValue},
		VersionedPlugins: map[int]plugin.PluginSet{componentv1.ProtocolVersion: {}},
		AllowedProtocols: []plugin.Protocol{plugin.ProtocolGRPC},
		StartTimeout:     limit,
		SkipHostEnv:      true,
		Logger:           hclog.NewNullLogger(),
		UnixSocketConfig: &plugin.UnixSocketConfig{TempDir: spec.RunDir},
		RunnerFunc: func(_ hclog.Logger, cmd *exec.Cmd, dir string) (pluginrunner.Runner, error) {
			var err error
			l, err = r.newLaunch(spec, prog, cmd.Env, dir)
			if err != nil {
				return nil, err
			}
			l.hello = newHelloReader(filepath.Join(spec.LogDir, OutputLog), l.offset, dir, ctx.Done())
			return l, nil
		},
	})
	addr, err := client.Start()
	if l != nil {
		err = errors.Join(err, l.log.Close()) // the component has its own
	}
	if err != nil {
		return nil, r.startError(ctx, l, limit, err)
	}
	p := r.newProcess(l.child, Ident{
		Instance: spec.Instance, Pid: l.child.pid, StartTicks: l.ticks, BootID: r.bootID, Socket: addr.String(), SocketDir: l.dir,
		ProtocolVersion: client.NegotiatedVersion(), ExecDigest: spec.Exec.Digest, Credential: spec.Credential,
		StartedUnixMs: time.Now().UnixMilli(), Sandbox: l.report,
	}, filepath.Join(spec.LogDir, OutputLog))
	return p, p.dial()
}

func (r *Local) newLaunch(spec *Spec, prog *program, pluginEnv []string, dir string) (*launch, error) {
	out, offset, err := openLog(spec.LogDir)
	if err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	env := append([]string{"PATH=" + r.path, "TMPDIR=" + dir, componentv1.EnvCredential + "=" + spec.Credential}, pluginEnv...)
	if spec.NodeSocket != "" {
		env = append(env, componentv1.EnvNodeSocket+"="+spec.NodeSocket)
	}
	if m := spec.Limits.MemoryBytes; m > 0 {
		env = append(env, fmt.Sprintf("GOMEMLIMIT=%d", m/10*9))
	}
	return &launch{local: r, spec: spec, prog: prog, env: append(env, spec.Env...), dir: dir, log: out, offset: offset}, nil
}

// startError ends what is there of a failed start and says what was wrong with it.
func (r *Local) startError(ctx context.Context, l *launch, limit time.Duration, err error) error {
	if l == nil {
		return err
	}
	l.hello.Close() //nolint:errcheck // never fails
	if l.child == nil {
		return errors.Join(err, os.RemoveAll(l.dir))
	}
	alive := true
	select {
	case <-l.child.done:
		alive = false
	default:
		err = errors.Join(err, l.child.signal(unix.SIGKILL))
		l.child.ended(killWait, nil)
	}
	said := lastLines(filepath.Join(l.spec.LogDir, OutputLog), l.offset, 5)
	if said == "" {
		said = "no output"
	} else {
		said = "its last output: " + said
	}
	text := err.Error()
	switch {
	case strings.Contains(text, "ncompatible API version"), strings.Contains(text, "incompatible core API"):
		return fmt.Errorf("%w: %s", ErrProtocol, firstLine(text))
	case ctx.Err() != nil && !errors.Is(ctx.Err(), context.DeadlineExceeded):
		return fmt.Errorf("given up: %w", ctx.Err())
	case strings.Contains(text, "timeout"), ctx.Err() != nil && (alive || l.child.exit.Signal == "SIGKILL"): // whoever waits kills it
		return fmt.Errorf("%w: no handshake within %s; %s", ErrHung, limit.Round(time.Millisecond), said)
	case !alive && !l.hello.said.Load():
		return fmt.Errorf("%w: it ended (%s) before saying hello; %s", ErrNoHandshake, l.child.exit, said)
	}
	return fmt.Errorf("%w: %s; %s", ErrNoHandshake, firstLine(text), said)
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

// String says how the process ended, for messages.
func (e ExitStatus) String() string {
	switch {
	case !e.Known:
		return "ended, status unknown"
	case e.Signal != "":
		return e.Signal
	}
	return fmt.Sprintf("exit status %d", e.Code)
}

// Adopt implements Runner.
func (r *Local) Adopt(_ context.Context, id Ident, spec Spec) (Process, error) {
	if err := id.same(r.bootID); err != nil {
		return nil, fmt.Errorf("adopt %s: %w", id.Instance, err)
	}
	if id.ProtocolVersion != componentv1.ProtocolVersion {
		return nil, fmt.Errorf("adopt %s: %w: it speaks %d, this node %d", id.Instance, ErrProtocol, id.ProtocolVersion, componentv1.ProtocolVersion)
	}
	if id.Credential == "" {
		id.Credential = spec.Credential
	}
	c, err := watch(id.Pid, nil)
	if err != nil {
		return nil, fmt.Errorf("adopt %s: %w", id.Instance, err)
	}
	// Between the first look and the pidfd the pid may have gone to another process: only now it cannot any more.
	if err := id.same(r.bootID); err != nil {
		return nil, fmt.Errorf("adopt %s: %w", id.Instance, errors.Join(err, c.pidfd.Close()))
	}
	c.clean = func() {
		if err := os.RemoveAll(id.SocketDir); err != nil {
			r.cfg.Log.Warn("socket folder stays behind", "instance", id.Instance, "dir", id.SocketDir, "error", err)
		}
	}
	go c.wait()
	p := r.newProcess(c, id, filepath.Join(spec.LogDir, OutputLog))
	return p, p.dial()
}

func (r *Local) newProcess(c *child, id Ident, output string) *process {
	p := &process{child: c, id: id, output: output, log: r.cfg.Log}
	go p.boundOutput(&r.logs, r.cfg.MaxLogBytes)
	return p
}

func (p *process) boundOutput(l *logFiles, limit int64) {
	t := time.NewTicker(logCheck)
	defer t.Stop()
	for {
		select {
		case <-p.done:
			return
		case <-t.C:
			if err := l.rotate(p.output, limit); err != nil {
				p.log.Warn("output is not bounded", "instance", p.id.Instance, "error", err)
			}
		}
	}
}

// MaxMessage is the largest gRPC message to or from a component, in bytes. Larger states stream in frames.
const MaxMessage = 64 << 20

func (p *process) dial() error {
	conn, err := grpc.NewClient("passthrough:///component",
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", p.id.Socket)
		}),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithPerRPCCredentials(credential(p.id.Credential)),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 5 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 500 * time.Millisecond},
			MinConnectTimeout: 2 * time.Second,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(MaxMessage), grpc.MaxCallSendMsgSize(math.MaxInt32)),
		grpc.WithDisableServiceConfig(), grpc.WithIdleTimeout(0), grpc.WithNoProxy(),
	)
	if err != nil {
		return errors.Join(fmt.Errorf("connect to %s: %w", p.id.Instance, err), p.Kill())
	}
	p.conn = conn
	conn.Connect()
	go func() {
		<-p.done
		conn.Close() //nolint:errcheck // the other end is gone
	}()
	return nil
}

// credential attaches the process's credential to each call.
type credential string

func (c credential) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{componentv1.MetaCredential: string(c)}, nil
}

// RequireTransportSecurity is false: it travels over a unix socket in a folder that only we can open.
func (c credential) RequireTransportSecurity() bool { return false }

func (p *process) Conn() *grpc.ClientConn { return p.conn }
func (p *process) Ident() Ident           { return p.id }
func (p *process) Sandbox() SandboxReport { return p.id.Sandbox }
func (p *process) Done() <-chan struct{}  { return p.done }
func (p *process) Exit() ExitStatus       { return p.exit }
func (p *process) Output() string         { return p.output }
func (p *process) Kill() error            { return p.signal(unix.SIGKILL) }

// Stop implements Process.
func (p *process) Stop(ctx context.Context, grace time.Duration) error {
	if grace <= 0 {
		grace = termWait
	}
	p.by.Store("stop")
	if err := p.askToStop(ctx, grace); err != nil {
		p.log.Debug("stop call", "instance", p.id.Instance, "error", err)
	}
	if ctx.Err() == nil && !p.ended(0, nil) {
		p.by.Store("term")
		if err := p.signal(unix.SIGTERM); err != nil {
			return err
		}
		p.ended(min(grace, termWait), ctx.Done())
	}
	select {
	case <-p.done:
		return nil
	default:
	}
	p.by.Store("kill")
	if err := p.signal(unix.SIGKILL); err != nil {
		return err
	}
	if !p.ended(killWait, nil) {
		return fmt.Errorf("stop %s: pid %d is still there %s after SIGKILL; it waits for the kernel (a dead disk or network file system?)", p.id.Instance, p.pid, killWait)
	}
	return nil
}

func (p *process) askToStop(ctx context.Context, grace time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, grace)
	defer cancel()
	go func() {
		select {
		case <-p.done:
			cancel()
		case <-ctx.Done():
		}
	}()
	_, err := componentv1.NewComponentClient(p.conn).Stop(ctx, &componentv1.StopRequest{GraceMs: uint32(min(grace.Milliseconds(), math.MaxUint32))})
	return err
}
