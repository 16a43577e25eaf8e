package membrane

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/coppice-project/coppice/components/runner"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// Config of a Membrane.
type Config struct {
	Instance string // app/name-0
	Log      *slog.Logger

	// Serving says whether the instance may be served right now: its owner's lease. It is asked for each call on its way in and for each
	// answer on its way out, so it must cost nanoseconds. nil: always.
	Serving func() bool
	// OnStale is told once per token when a caller knows of a newer epoch than ours. Answers are withheld from then on until the token is
	// raised or the membrane is closed. It must not block.
	OnStale func(Token)
	// OnEnd is told when the serving process has ended; calls are held already. It must not block.
	OnEnd func(*Backend, runner.ExitStatus)
	// OnHung is told when the serving process missed its heartbeats. It must not block. Calls go on until somebody acts.
	OnHung func(*Backend, error)

	HeartbeatEvery   time.Duration // default 1 s
	HeartbeatTimeout time.Duration // default 500 ms
	HeartbeatMisses  int           // default 3

	MaxHeld   int           // calls waiting at the gate; default 10,000
	HoldLimit time.Duration // for calls without a deadline; default 10 s
}

// Membrane is the control surface round one instance. It is safe for concurrent use; verbs that move the lifecycle exclude each other.
type Membrane struct {
	cfg  Config
	gate *gate
	http http.Handler

	verbs chan struct{} // held while a verb runs
	turn  atomic.Uint64 // of the targets of a binding to many

	mu       sync.Mutex // guards the fields below
	state    State
	reason   string // of failed, stopped and frozen, for people
	version  string
	bindings map[string]*Binding
	watched  *Backend
	cancel   context.CancelFunc // of the heartbeat
}

// New returns a membrane without a process: calls are held until one is attached and started.
func New(cfg Config) *Membrane {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.HeartbeatEvery <= 0 {
		cfg.HeartbeatEvery = time.Second
	}
	if cfg.HeartbeatTimeout <= 0 {
		cfg.HeartbeatTimeout = 500 * time.Millisecond
	}
	if cfg.HeartbeatMisses <= 0 {
		cfg.HeartbeatMisses = 3
	}
	m := &Membrane{
		cfg: cfg, verbs: make(chan struct{}, 1), bindings: map[string]*Binding{},
		gate: newGate(gateConfig{maxHeld: int64(cfg.MaxHeld), holdLimit: cfg.HoldLimit, serving: cfg.Serving, onStale: cfg.OnStale}),
	}
	m.http = m.newHTTP()
	return m
}

// Instance returns its name.
func (m *Membrane) Instance() string { return m.cfg.Instance }

// State returns where it is in its life, and why when it is not running.
func (m *Membrane) State() (State, string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state, m.reason
}

// Version is the one that Start was told.
func (m *Membrane) Version() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.version
}

// Token returns the ownership under which it serves.
func (m *Membrane) Token() Token { return m.gate.cur.Load().token }

// Backend returns the process behind the gate; nil before Attach.
func (m *Membrane) Backend() *Backend { return m.gate.cur.Load().backend }

// SetDurable says whether answers wait for their mark (durability each-call).
func (m *Membrane) SetDurable(eachCall bool) { m.gate.durable.Store(eachCall) }

// lock excludes other verbs, at most until ctx ends.
func (m *Membrane) lock(ctx context.Context) error {
	select {
	case m.verbs <- struct{}{}:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: another command is under way: %w", m.cfg.Instance, ctx.Err())
	}
}

func (m *Membrane) unlock() { <-m.verbs }

// move applies a verb to the lifecycle.
func (m *Membrane) move(v Verb, reason string) (changed bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	next, changed, err := Next(m.state, v)
	if err != nil {
		return false, fmt.Errorf("%s: %w", m.cfg.Instance, err)
	}
	if changed {
		m.cfg.Log.Debug("lifecycle", "instance", m.cfg.Instance, "from", m.state, "to", next, "reason", reason)
		m.state, m.reason = next, reason
	}
	return changed, nil
}

// Prepare puts a process beside the one that serves: it gets no calls before Switch. It can be started, restored into and asked.
func (m *Membrane) Prepare(proc runner.Process, desc *componentv1.Description) *Backend {
	return newBackend(proc, desc)
}

// Attach puts the first process, or the next one after the last has ended, behind the held gate. A closed gate is opened for that.
func (m *Membrane) Attach(proc runner.Process, desc *componentv1.Description, t Token) (*Backend, error) {
	b := newBackend(proc, desc)
	m.Reopen("it is starting")
	if err := m.Hold("it is starting"); err != nil {
		return nil, err
	}
	if err := m.Switch(b, t); err != nil {
		return nil, err
	}
	return b, nil
}

// StartBackend runs the contract's Start in a prepared process, with the attributes and bindings of req completed by the membrane's own
// bindings. Mandatory bindings have to be bound.
func (m *Membrane) StartBackend(ctx context.Context, b *Backend, req *componentv1.StartRequest) error {
	m.declare(b.desc)
	if missing := m.unbound(b.desc); len(missing) > 0 {
		return fmt.Errorf("start %s: required interface not bound: %s; try: coppice bind %s %s TARGET", m.cfg.Instance, strings.Join(missing, ", "), m.cfg.Instance, missing[0])
	}
	if len(req.GetBindings()) == 0 {
		req.Bindings = m.bindingStates()
	}
	if err := b.start(ctx, req); err != nil {
		return fmt.Errorf("%s: %w", m.cfg.Instance, err)
	}
	return nil
}

// Start starts the attached process and opens the gate.
func (m *Membrane) Start(ctx context.Context, req *componentv1.StartRequest) error {
	if err := m.lock(ctx); err != nil {
		return err
	}
	defer m.unlock()
	b := m.Backend()
	if b == nil {
		return fmt.Errorf("start %s: no process is attached", m.cfg.Instance)
	}
	changed, err := m.move(VerbStart, "")
	if err != nil || !changed {
		return err
	}
	if err := m.StartBackend(ctx, b, req); err != nil {
		_, merr := m.move(VerbFail, err.Error())
		return errors.Join(err, merr)
	}
	return m.ready(req)
}

// Adopted opens the gate for a process that runs already: the daemon is new, the process is not. Its heartbeat has to answer.
func (m *Membrane) Adopted(ctx context.Context, version string) error {
	if err := m.lock(ctx); err != nil {
		return err
	}
	defer m.unlock()
	b := m.Backend()
	if b == nil {
		return fmt.Errorf("adopt %s: no process is attached", m.cfg.Instance)
	}
	if _, err := b.Heartbeat(ctx, m.Token()); err != nil {
		return fmt.Errorf("adopt %s: %w", m.cfg.Instance, err)
	}
	if _, err := m.move(VerbStart, ""); err != nil {
		return err
	}
	m.declare(b.desc)
	return m.ready(&componentv1.StartRequest{Version: version})
}

func (m *Membrane) ready(req *componentv1.StartRequest) error {
	m.SetVersion(req.GetVersion())
	return m.Release()
}

// Hold makes calls wait at the gate; why is told to those whose deadline passes meanwhile. Calls inside go on.
func (m *Membrane) Hold(why string) error { return m.named(m.gate.hold(why)) }

// Drain waits until no call is inside and every answer is given. Open streams are not waited for.
func (m *Membrane) Drain(ctx context.Context) error { return m.named(m.gate.drain(ctx)) }

// Switch puts another process behind the held gate, in a new epoch or the same one. Answers of the process before that still wait for a mark are
// discarded; after Drain there are none. Watching moves to the new process.
func (m *Membrane) Switch(b *Backend, t Token) error {
	if err := m.gate.swap(b, t); err != nil {
		return m.named(err)
	}
	m.mu.Lock()
	moved := m.watched != nil && m.watched != b
	m.mu.Unlock()
	if moved {
		m.watch(b)
	}
	return nil
}

// Release opens the gate: the instance is Running, whatever it was, and its process is looked after from now on. It fails when the
// process behind the gate has ended.
func (m *Membrane) Release() error {
	b := m.Backend()
	if b == nil {
		return fmt.Errorf("release %s: no process serves it", m.cfg.Instance)
	}
	if err := m.run(b); err != nil {
		return err
	}
	if err := m.gate.release(); err != nil {
		if b.dead() {
			m.Fail("its process ended (" + b.proc.Exit().String() + ")")
		}
		return m.named(err)
	}
	return nil
}

// run moves the lifecycle to Running by the way that leads there, and watches the process.
func (m *Membrane) run(b *Backend) error {
	m.mu.Lock()
	way := map[State][]Verb{Created: {VerbStart, VerbReady}, Starting: {VerbReady}, Running: nil, Frozen: {VerbThaw}, Stopped: {VerbStart, VerbReady}, Failed: {VerbStart, VerbReady}}[m.state]
	watched := m.watched == b
	m.mu.Unlock()
	for _, v := range way {
		if _, err := m.move(v, ""); err != nil {
			return err
		}
	}
	if !watched {
		m.watch(b)
	}
	return nil
}

// SetVersion is told by a replacement that has gone well.
func (m *Membrane) SetVersion(v string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.version = v
}

// SetToken continues with the same process in a later epoch.
func (m *Membrane) SetToken(t Token) error { return m.named(m.gate.setToken(t)) }

// SetCommitted is Backend.SetCommitted for the serving process.
func (m *Membrane) SetCommitted(mark uint64) {
	if b := m.Backend(); b != nil {
		b.SetCommitted(mark)
	}
}

// Close refuses every call from now on, held ones included, and discards the answers that are not yet given: the instance is not ours any more,
// or is stopped. moved, when known, sends callers there. Reopen takes it back.
func (m *Membrane) Close(why string, moved *Redirect) { m.gate.close(why, moved) }

// Reopen makes a closed gate a held one.
func (m *Membrane) Reopen(why string) { m.gate.reopen(why) }

// Freeze holds and drains the calls and makes the component quiet. On failure it runs as before.
func (m *Membrane) Freeze(ctx context.Context, why componentv1.QuiesceRequest_Reason) error {
	if err := m.lock(ctx); err != nil {
		return err
	}
	defer m.unlock()
	m.mu.Lock()
	_, changed, err := Next(m.state, VerbFreeze)
	m.mu.Unlock()
	if err != nil {
		return m.named(err)
	}
	if !changed {
		return nil
	}
	reason := "it is frozen (" + strings.ToLower(why.String()) + ")"
	if err := m.Hold(reason); err != nil {
		return err
	}
	b := m.Backend()
	err = m.gate.drain(ctx)
	if err == nil {
		err = b.Quiesce(ctx, why)
		if err != nil {
			rctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), m.cfg.HeartbeatTimeout)
			defer cancel()
			err = errors.Join(err, b.Resume(rctx))
		}
	}
	if err != nil {
		return fmt.Errorf("freeze %s: %w", m.cfg.Instance, errors.Join(err, m.gate.release()))
	}
	_, err = m.move(VerbFreeze, reason)
	return err
}

// Thaw ends what Freeze began.
func (m *Membrane) Thaw(ctx context.Context) error {
	if err := m.lock(ctx); err != nil {
		return err
	}
	defer m.unlock()
	m.mu.Lock()
	_, changed, err := Next(m.state, VerbThaw)
	m.mu.Unlock()
	if err != nil {
		return m.named(err)
	}
	if !changed {
		return nil
	}
	if err := m.Backend().Resume(ctx); err != nil {
		return fmt.Errorf("thaw %s: %w", m.cfg.Instance, err)
	}
	return m.Release()
}

// Fail says that the instance does not work: calls are held until somebody attaches another process, or closes the membrane.
func (m *Membrane) Fail(reason string) {
	if err := m.gate.hold("it failed: " + reason); err != nil {
		m.cfg.Log.Debug("failed while closed", "instance", m.cfg.Instance, "error", err)
	}
	_, err := m.move(VerbFail, reason)
	if err != nil {
		m.cfg.Log.Warn("lifecycle", "instance", m.cfg.Instance, "error", err)
	}
	m.unwatch()
}

// Detach ends the membrane's part in the process: calls are refused, the component is stopped by the ladder of runner.Process. The
// membrane is Stopped; Attach begins anew.
func (m *Membrane) Detach(ctx context.Context, grace time.Duration, why string, moved *Redirect) error {
	if err := m.lock(ctx); err != nil {
		return err
	}
	defer m.unlock()
	m.unwatch()
	m.Close(why, moved)
	_, err := m.move(VerbStop, why)
	b := m.Backend()
	if b == nil {
		return err
	}
	return errors.Join(err, m.Retire(ctx, b, grace, 0))
}

// Retire ends a process that does not serve any more: streams that are still open get their grace first.
func (m *Membrane) Retire(ctx context.Context, b *Backend, grace, streams time.Duration) error {
	limit := time.Now().Add(streams)
	for b.Streams() > 0 && time.Now().Before(limit) && ctx.Err() == nil && !b.dead() {
		select {
		case <-time.After(min(20*time.Millisecond, streams)):
		case <-ctx.Done():
		case <-b.proc.Done():
		}
	}
	b.marks.discard()
	b.transport.CloseIdleConnections()
	return m.named(b.proc.Stop(ctx, grace))
}

func (m *Membrane) named(err error) error {
	if err == nil {
		return nil
	}
	return wrap(err, "%s", m.cfg.Instance)
}
