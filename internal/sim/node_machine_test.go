package sim

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"
	"github.com/cockroachdb/pebble/v2/vfs"

	"github.com/coppice-project/coppice/components/runner"
	coppice "github.com/coppice-project/coppice/node"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	placementcomponent "github.com/coppice-project/coppice/plugins/placement/component"
	"github.com/coppice-project/coppice/plugins/sdk"
)

// machine is a computer with a node on it, through all the node's lives.
type machine struct {
	w    *nodes
	name string
	ip   string
	rate float64
	dir  string // the data folder: of that name in fs, and for real what a node keeps outside of it (artifacts, notes of processes)

	mu   sync.Mutex // guards the rest
	fs   *vfs.MemFS
	lost bool // its disk is gone: it never comes back
	busy bool // a fault is being done to it

	cur atomic.Pointer[nodeLife] // nil while it is off
}

// nodeLife is one process of a node, with those of its components.
type nodeLife struct {
	m      *machine
	ctx    context.Context //nolint:containedctx // of the process
	cancel context.CancelFunc
	procs  *processes
	ready  chan struct{} // closed when it serves
	done   chan struct{} // closed when nothing of it is left
	token  string        // of a new cluster
	client apiv1connect.ControlClient
	web    *http.Transport

	node    atomic.Pointer[coppice.Node]
	off     atomic.Bool // it was ended from outside
	doorsMu sync.Mutex  // guards doors
	doors   map[string]*pipes
}

// add makes a machine that has never run.
func (w *nodes) add() *machine {
	w.mu.Lock()
	defer w.mu.Unlock()
	i := len(w.list) + 1
	m := &machine{w: w, name: fmt.Sprintf("n%d", i), ip: fmt.Sprintf("1.0.0.%d", i), fs: vfs.NewCrashableMem(), dir: memoryDir(w.t)}
	m.rate = 1 - maxRate + 2*maxRate*float64(w.draw()%1001)/1000
	w.list = append(w.list, m)
	return m
}

// power begins a life: the node is built from its disk, or joins by a token, or founds the cluster.
func (m *machine) power(token string) *nodeLife {
	w := m.w
	m.mu.Lock()
	fs := m.fs
	m.mu.Unlock()
	l := &nodeLife{m: m, procs: &processes{}, ready: make(chan struct{}), done: make(chan struct{}), doors: map[string]*pipes{}}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	l.procs.component = l.component
	l.web = &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return l.dial(ctx, filepath.Join(m.dir, api.SocketFile))
	}}
	l.client = apiv1connect.NewControlClient(&http.Client{Transport: tokenBearer{l.web, m.dir}}, "http://node", connect.WithReadMaxBytes(api.MaxMessage))
	cfg := coppice.Config{
		Data: m.dir, Name: m.name, Listen: []string{"/ip4/" + m.ip + "/udp/7400/quic-v1"}, Join: token, Profile: "lan", Version: "1.0.0", Log: logger(m.name),
		FS: fs, BootTime: newClock(m.rate).now, NewHost: w.air.host, NewRunner: func() (runner.Runner, error) { return nodeRunner{l.procs}, nil }, Door: l.door,
	}
	w.air.setDark(m.ip, false)
	m.cur.Store(l)
	go func() {
		defer close(l.done)
		if err := l.live(cfg); err != nil && !l.off.Load() {
			w.failf("%s ended: %v", m.name, err)
			m.cur.CompareAndSwap(l, nil)
		}
		l.procs.killAll()
		l.web.CloseIdleConnections()
		l.closeDoors()
	}()
	return l
}

func (l *nodeLife) live(cfg coppice.Config) error {
	n, err := l.build(cfg)
	for ; err != nil && cfg.Join != "" && l.ctx.Err() == nil; n, err = l.build(cfg) { // as whoever runs the command again
		l.m.w.logf("%s could not join: %v", l.m.name, err)
		time.Sleep(500 * time.Millisecond)
	}
	if err != nil {
		return err
	}
	l.node.Store(n)
	if l.off.Load() { // since: it knows nothing of that yet
		n.Stop("the power is gone")
	}
	return n.Run(l.ctx, func(r coppice.Ready) error {
		l.token = r.Token
		close(l.ready)
		return nil
	})
}

// build makes the node. One at a time: libp2p's simulated network does not expect two to be opened at once.
func (l *nodeLife) build(cfg coppice.Config) (*coppice.Node, error) {
	ctx, cancel := context.WithTimeout(l.ctx, 10*time.Second)
	defer cancel()
	l.m.w.opening <- struct{}{}
	defer func() { <-l.m.w.opening }()
	return coppice.New(ctx, cfg)
}

// door opens what is a unix socket elsewhere.
func (l *nodeLife) door(path string) (net.Listener, error) {
	l.doorsMu.Lock()
	defer l.doorsMu.Unlock()
	p := &pipes{path: path, come: make(chan net.Conn), over: make(chan struct{})}
	l.doors[path] = p
	return p, nil
}

func (l *nodeLife) dial(ctx context.Context, path string) (net.Conn, error) {
	l.doorsMu.Lock()
	b := l.doors[path]
	l.doorsMu.Unlock()
	if b == nil {
		return nil, fmt.Errorf("dial %s: connection refused", path)
	}
	return b.dial(ctx)
}

func (l *nodeLife) closeDoors() {
	l.doorsMu.Lock()
	defer l.doorsMu.Unlock()
	for _, b := range l.doors {
		_ = b.Close() // of a node that is gone
	}
}

// pipes is a socket in memory.
type pipes struct {
	path string
	come chan net.Conn
	once sync.Once
	over chan struct{} // closed with it
}

func (p *pipes) dial(ctx context.Context) (net.Conn, error) {
	here, there := net.Pipe()
	select {
	case p.come <- there:
		return here, nil
	case <-p.over:
		return nil, fmt.Errorf("dial %s: connection refused", p.path)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// Accept implements net.Listener.
func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.come:
		return c, nil
	case <-p.over:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (p *pipes) Close() error {
	p.once.Do(func() { close(p.over) })
	return nil
}

// Addr implements net.Listener.
func (p *pipes) Addr() net.Addr { return &net.UnixAddr{Name: p.path, Net: "unix"} }

// serves says whether the node is ready for commands.
func (l *nodeLife) serves() bool {
	select {
	case <-l.ready:
		return !l.off.Load()
	default:
		return false
	}
}

// tokenBearer opens the control API by the token in the data folder, as the command line does.
type tokenBearer struct {
	next http.RoundTripper
	dir  string
}

// RoundTrip implements http.RoundTripper.
func (t tokenBearer) RoundTrip(r *http.Request) (*http.Response, error) {
	token, err := api.ReadToken(filepath.Join(t.dir, api.TokenFile))
	if err != nil {
		return nil, err
	}
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+token)
	return t.next.RoundTrip(r)
}

// cutPower ends the machine at once: nothing that it says any more is heard, its disk keeps what was synced, its components are gone. It returns when nothing
// is left of the life, which takes the program a moment and the cluster nothing.
func (m *machine) cutPower() {
	l := m.cur.Load()
	if l == nil {
		return
	}
	m.w.air.setDark(m.ip, true)
	m.mu.Lock()
	m.fs = m.fs.CrashClone(vfs.CrashCloneCfg{})
	m.mu.Unlock()
	l.off.Store(true)
	m.cur.CompareAndSwap(l, nil)
	l.procs.killAll()
	if n := l.node.Load(); n != nil {
		n.Stop("the power is gone") // not as one that is told to: it says nothing and saves nothing
	}
	l.cancel()
	<-l.done
}

// shut ends the node in order, as SIGTERM does.
func (m *machine) shut() {
	l := m.cur.Load()
	if l == nil {
		return
	}
	l.off.Store(true)
	l.cancel()
	<-l.done
	m.cur.CompareAndSwap(l, nil)
}

func (m *machine) isLost() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.lost
}

// take reserves a machine for a fault; false: something is being done to it already.
func (m *machine) take() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.busy || m.lost || m.cur.Load() == nil {
		return false
	}
	m.busy = true
	return true
}

func (m *machine) give() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.busy = false
}

// nodeRunner starts components of a node in memory: the counter, and the solver of placement that the binary brings along.
type nodeRunner struct{ *processes }

// Describe says what a pushed file is, as running it would.
func (r nodeRunner) Describe(ctx context.Context, _ runner.ExecFile, _ runner.Limits) (*componentv1.Description, error) {
	p, err := startProcess(runner.Spec{Instance: "describe"})
	if err != nil {
		return nil, err
	}
	defer p.die("")
	return componentv1.NewComponentClient(p.conn).Describe(ctx, &componentv1.DescribeRequest{HostContract: componentv1.ProtocolVersion})
}

func (l *nodeLife) component(spec runner.Spec, p *process) *sdk.Component {
	if len(spec.Args) > 0 && spec.Args[len(spec.Args)-1] == "placement" {
		return placementcomponent.New("1.0.0")
	}
	return counterComponent(p.begun, func(incarnation, epoch uint64) {
		if !p.over() {
			l.m.w.acted(l.m, spec.Instance, incarnation, epoch)
		}
	})
}

// push pushes the counter.
func (l *nodeLife) push(ctx context.Context) error {
	file := []byte("#!/bin/sh\n# the counter: in the simulation it is started in memory\n")
	sum := sha256.Sum256(file)
	st, err := l.client.RegistryPush(ctx)
	if err != nil {
		return err
	}
	head := &apiv1.RegistryPushHeader{Files: []*apiv1.RegistryPushFile{{Name: counterName, Bytes: uint64(len(file)), Sha256: hex.EncodeToString(sum[:])}}}
	err = errors.Join(st.Send(&apiv1.RegistryPushRequest{Part: &apiv1.RegistryPushRequest_Header{Header: head}}),
		st.Send(&apiv1.RegistryPushRequest{Part: &apiv1.RegistryPushRequest_Chunk{Chunk: &apiv1.RegistryPushChunk{Data: file}}}))
	if err != nil {
		return err
	}
	_, err = st.CloseAndReceive()
	return err
}

// deploy deploys a manifest and waits until all of it runs.
func (l *nodeLife) deploy(ctx context.Context, manifest string, within time.Duration) error {
	st, err := l.client.Deploy(ctx, &apiv1.DeployRequest{File: "sim.yaml", Manifest: []byte(manifest), Wait: true, TimeoutMs: uint64(within.Milliseconds())})
	if err != nil {
		return err
	}
	healthy := false
	for st.Receive() {
		healthy = st.Msg().GetHealthy()
	}
	if err := errors.Join(st.Err(), st.Close()); err != nil {
		return err
	}
	if !healthy {
		return errors.New("it is not healthy")
	}
	return nil
}
