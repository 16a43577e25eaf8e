package sdk

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	"github.com/coppice-project/coppice/plugins/sdk/state"
)

// Instance is the running component as its author sees it. It is handed to OnStart and Run, and From finds it in the context of every call.
type Instance struct {
	comp  *Component
	desc  *description
	store *state.Store // nil: stateless
	attrs attributes
	env   Env
	log   *slog.Logger
	node  *nodeLink // nil: not started by a node

	calls      gauge
	panics     atomic.Uint64
	httpSocket string
	stopped    chan struct{} // closed when Stop has begun its last step: streams end

	lifecycle sync.Mutex // one lifecycle verb at a time; held over the author's hooks

	mu       sync.Mutex // guards everything below
	state    componentv1.State
	detail   string // why FAILED
	name     string
	version  string
	dataDir  string
	token    *componentv1.Token
	drain    bool
	leased   bool          // by the last grant, or by Start: nothing may act past the end of the grant
	leaseEnd time.Duration // of the last grant, on bootTime
	granted  chan struct{} // closed with the first grant; nil without a node
	filling  time.Duration // until when, on bootTime, it may outlive its lease, for it is being given its state and has not begun; 0: it may not
	opening  bool          // Start is running: Update may write though no call may come yet
	run      *background
}

// Env is what a process learns from outside. Serve fills it from the environment; tests make their own.
type Env struct {
	Credential string       // every call must carry it; "" = none is asked for
	NodeSocket string       // unix socket of the node; "" = no node
	Log        *slog.Logger // nil = slog's default
	// Exit ends the process when the lease lapses; nil = os.Exit.
	Exit func(code int)
}

// New makes an instance without a process around it: nothing listens, nothing dials but the node socket, if there is one. Serve uses it, and tests.
func New(c *Component, env Env) (*Instance, error) {
	desc, err := describe(c)
	if err != nil {
		return nil, err
	}
	if env.Log == nil {
		env.Log = slog.Default()
	}
	in := &Instance{
		comp: c, desc: desc, env: env, log: env.Log, stopped: make(chan struct{}),
		attrs: attributes{list: c.Attributes}, version: c.Version, name: c.Type, token: &componentv1.Token{},
	}
	in.calls.closed = true // until Start
	if c.State != nil {
		in.store = state.New(c.State.Schema, c.State.Limits)
	}
	if env.NodeSocket != "" {
		if in.node, err = dialNode(env); err != nil {
			return nil, err
		}
		in.granted = make(chan struct{})
	}
	for _, b := range c.Requires {
		if !b.in.CompareAndSwap(nil, in) {
			return nil, fmt.Errorf("component %q: binding %q is used by another instance already", c.Type, b.name)
		}
	}
	return in, nil
}

type instanceKey struct{}

// From returns the instance in whose call, OnStart or Run this context was made; nil elsewhere.
func From(ctx context.Context) *Instance {
	in, ok := ctx.Value(instanceKey{}).(*Instance)
	if !ok {
		return nil
	}
	return in
}

func (in *Instance) context(ctx context.Context) context.Context {
	return context.WithValue(ctx, instanceKey{}, in)
}

// Name returns the instance's name, "app/name-0": the same over swaps, moves and failover. Before Start it is the component's type.
func (in *Instance) Name() string {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.name
}

// ComponentName returns "app/name": the name without the instance's number or node.
func (in *Instance) ComponentName() string { return componentName(in.Name()) }

func componentName(instance string) string {
	if i := strings.LastIndexAny(instance, "-@"); i > strings.LastIndexByte(instance, '/') {
		if instance[i] == '@' || strings.Trim(instance[i+1:], "0123456789") == "" {
			return instance[:i]
		}
	}
	return instance
}

// Version returns the deployed version: what the registry calls this binary, which may be another name than Component.Version.
func (in *Instance) Version() string {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.version
}

// DataDir is a directory of the instance's own, "" if it has none. It is not part of the state: another node starts with an empty one.
func (in *Instance) DataDir() string {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.dataDir
}

// Token is the pair that fences this ownership; compare it as a pair. Hand it to resources outside that can refuse a smaller one. Each lease grant may
// change it.
func (in *Instance) Token() (incarnation, epoch uint64) {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.token.GetIncarnation(), in.token.GetEpoch()
}

// FencingToken is Token as one number, incarnation<<32 | epoch, for stores outside the cluster that compare numbers: write it with each change, and
// have the store refuse a change whose number is smaller than one it has seen. It rises with each ownership of the instance, also over a recovery
// of the cluster from a lost majority, and is never used twice. Ask for it right before each use: an instance goes on in a newer epoch
// of the same node without a restart. An epoch past 2^32-1 counts as that. Source: the fencing token of notes consistency §5.
func (in *Instance) FencingToken() uint64 {
	incarnation, epoch := in.Token()
	return incarnation<<32 | min(epoch, 1<<32-1)
}

// FencingToken is the Instance.FencingToken of the call's instance; 0 without one.
func FencingToken(ctx context.Context) uint64 {
	if in := From(ctx); in != nil {
		return in.FencingToken()
	}
	return 0
}

// Token is the Instance.Token of the call's instance; zeros without one.
func Token(ctx context.Context) (incarnation, epoch uint64) {
	if in := From(ctx); in != nil {
		return in.Token()
	}
	return 0, 0
}

func (in *Instance) setToken(t *componentv1.Token) {
	if t == nil {
		return
	}
	in.mu.Lock()
	defer in.mu.Unlock()
	if t.GetIncarnation() > in.token.GetIncarnation() ||
		t.GetIncarnation() == in.token.GetIncarnation() && t.GetEpoch() > in.token.GetEpoch() {
		in.token = t
	}
}

func (in *Instance) currentToken() *componentv1.Token {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.token
}

func (in *Instance) setDrain(drain bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.drain = drain
}

// Draining reports whether the node wants to be rid of the instance: start nothing long.
func (in *Instance) Draining() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.drain
}

// Update runs fn as one write transaction outside of a call: in Run, in a stream, at start. It is refused while the instance is frozen or stopped: what
// it wrote would be lost with this process. Calls that fn makes through bindings with its context are
// numbered by the state: if the transaction is lost with the process and done again, they carry the same keys.
func (in *Instance) Update(ctx context.Context, fn func(ctx context.Context, tx *Txn) error) error {
	if in.store == nil {
		return errStateless
	}
	outer := callOf(ctx)
	if outer != nil && outer.tx != nil {
		return errors.New("an Update inside a call or another Update: use the transaction that is there, sdk.Tx(ctx)")
	}
	if in.calls.enter() {
		defer in.calls.leave()
	} else if !in.isOpening() {
		return in.refusal()
	}
	c := &call{in: in, tx: in.store.NewTxn("Update", false)}
	defer in.store.Rollback(c.tx)
	ctx = c.context(ctx)
	if err := in.store.Begin(ctx, c.tx); err != nil {
		return err
	}
	if err := fn(ctx, c.tx); err != nil {
		return err
	}
	mark, err := in.store.Commit(ctx, c.tx, nil, nil)
	if err != nil {
		return err
	}
	outer.saw(mark)
	return nil
}

func (in *Instance) isOpening() bool {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.opening
}

func (in *Instance) setOpening(opening bool) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.opening = opening
}

// View runs fn on one version of the state, read-only, outside of a call. It never waits for a writer.
func (in *Instance) View(ctx context.Context, fn func(ctx context.Context, tx *Txn) error) error {
	if in.store == nil {
		return errStateless
	}
	c := &call{in: in, tx: in.store.NewTxn("View", true)}
	defer in.store.Rollback(c.tx)
	outer := callOf(ctx)
	ctx = c.context(ctx)
	if err := in.store.Begin(ctx, c.tx); err != nil {
		return err
	}
	outer.saw(c.tx.Mark())
	if err := fn(ctx, c.tx); err != nil {
		return err
	}
	return c.tx.Err()
}

var errStateless = errors.New("this component has no state: set Component.State")

// gauge counts what is in flight and lets one wait for zero.
type gauge struct {
	mu      sync.Mutex // guards everything below
	n       int
	closed  bool
	drained chan struct{} // closed when n reaches 0 while closed; made by shut
}

// enter reports whether the caller may go on; it must leave then.
func (g *gauge) enter() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return false
	}
	g.n++
	return true
}

func (g *gauge) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.n--
	if g.n == 0 && g.drained != nil {
		close(g.drained)
		g.drained = nil
	}
}

func (g *gauge) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed, g.drained = false, nil
}

// shut lets nobody in and returns a channel that is closed when all have left.
func (g *gauge) shut() <-chan struct{} {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	done := make(chan struct{})
	if g.n == 0 {
		close(done)
		return done
	}
	if g.drained != nil {
		return g.drained
	}
	g.drained = done
	return done
}

func (g *gauge) count() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.n
}

// hangLimit is how long one transaction may hold the state before heartbeats call the component unhealthy.
const hangLimit = 60 * time.Second

// status is the instance's state as the node reads it.
func (in *Instance) status(ctx context.Context) *componentv1.Status {
	in.mu.Lock()
	st := &componentv1.Status{State: in.state, Detail: in.detail, Info: map[string]string{}}
	if in.run != nil && st.GetState() == componentv1.State_STARTED {
		if err := in.run.failure(); err != nil {
			st.State, st.Detail = componentv1.State_FAILED, fmt.Sprintf("background work ended: %v", err)
		}
	}
	in.mu.Unlock()
	if in.comp.Info != nil {
		maps.Copy(st.Info, in.comp.Info())
	}
	if in.httpSocket != "" {
		st.Info[componentv1.InfoHTTPSocket] = in.httpSocket
	}
	if n := in.panics.Load(); n > 0 {
		st.Info["panics"] = fmt.Sprint(n)
	}
	if in.store != nil {
		s := in.store.Stats()
		st.Info[componentv1.InfoMark] = fmt.Sprint(s.Mark)
		st.Info["state_bytes"] = fmt.Sprint(s.StateBytes)
		st.Info["dedupe_bytes"] = fmt.Sprint(s.DedupeBytes)
		st.Info["backlog_bytes"] = fmt.Sprint(s.BacklogBytes)
		if held := time.Since(s.WriterSince); s.Writer != "" && held > hangLimit {
			st.State, st.Detail = componentv1.State_FAILED, fmt.Sprintf("%s has held the state for %s", s.Writer, held.Round(time.Second))
		}
	}
	if st.GetState() == componentv1.State_STARTED && in.comp.Healthy != nil {
		if err := in.comp.Healthy(in.context(ctx)); err != nil {
			st.State, st.Detail = componentv1.State_FAILED, err.Error()
		}
	}
	return st
}

// Server makes the gRPC server of the instance: the contract and the author's services behind the SDK's interceptors.
func (in *Instance) Server(options ...grpc.ServerOption) *grpc.Server {
	options = append(options,
		grpc.MaxRecvMsgSize(maxMessageBytes), grpc.MaxSendMsgSize(maxMessageBytes),
		grpc.ChainUnaryInterceptor(in.checkUnary, in.callUnary),
		grpc.ChainStreamInterceptor(in.checkStream, in.callStream),
	)
	s := grpc.NewServer(options...)
	componentv1.RegisterComponentServer(s, &control{in: in})
	if in.comp.Register != nil {
		in.comp.Register(s)
	}
	return s
}

// maxMessageBytes bounds one message in either direction.
const maxMessageBytes = 16 << 20

// setState changes the lifecycle state; detail says why it failed.
func (in *Instance) setState(s componentv1.State, detail string) {
	in.mu.Lock()
	defer in.mu.Unlock()
	in.state, in.detail = s, detail
}

func (in *Instance) currentState() componentv1.State {
	in.mu.Lock()
	defer in.mu.Unlock()
	return in.state
}

// refusal is why a call cannot run now.
func (in *Instance) refusal() error {
	switch s := in.currentState(); s {
	case componentv1.State_CREATED:
		return status.Error(codes.FailedPrecondition, "the component is not started: call Start first")
	case componentv1.State_FAILED:
		return status.Error(codes.FailedPrecondition, "the component failed to start")
	default:
		return status.Errorf(codes.Unavailable, "the component is %s", strings.ToLower(s.String()))
	}
}
