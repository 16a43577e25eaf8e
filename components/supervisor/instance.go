package supervisor

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/events"
)

const (
	minBackoff = 100 * time.Millisecond
	maxBackoff = 30 * time.Second
	// healthyAfter: a process that lived so long starts the next back-off from the beginning.
	healthyAfter = 10 * time.Second
)

// instance is the actor of one instance on this node.
type instance struct {
	sup  *Supervisor
	name string // app/name-0
	key  string // inst/app/name-0

	wake chan struct{}
	cmds chan func(ctx context.Context)

	// Of the loop's goroutine only.
	shell    Shell
	gen      *generation
	failures int
	notUntil time.Time
	refused  map[string]string // digest -> why a swap to it failed; cleared when desired state changes
	wanted   string            // the digest desired last, to notice that change
	applied  applied           // what was last given to the process
	crashed  bool              // the process of this epoch has ended: its own commits must be settled first

	mu   sync.Mutex // guards the fields below
	info Info
	sv   *saver // of the running generation
	hung error  // the process missed its heartbeats
}

// Info is what status shows of an instance on this node.
type Info struct {
	Instance  string
	State     components.State
	Reason    string
	Epoch     uint64
	Version   string
	Digest    string
	Artifact  string
	Pid       int
	Since     time.Time // in this state
	Started   time.Time // its process
	Restarts  int
	Saved     Saved
	Settled   bool
	TxnCalls  bool
	Durable   string
	StartedMs float64 // how long its last start took
	Failures  int     // starts in a row that failed
}

func newInstance(s *Supervisor, name string) *instance {
	return &instance{
		sup: s, name: name, key: components.InstanceRegister(name), wake: make(chan struct{}, 1), cmds: make(chan func(context.Context)),
		refused: map[string]string{}, info: Info{Instance: name, State: components.Pending},
	}
}

func (i *instance) poke() {
	select {
	case i.wake <- struct{}{}:
	default:
	}
}

// do runs f in the actor's goroutine and waits for it.
func (i *instance) do(ctx context.Context, f func(ctx context.Context)) error {
	done := make(chan struct{})
	select {
	case i.cmds <- func(lctx context.Context) { defer close(done); f(lctx) }:
	case <-ctx.Done():
		return fmt.Errorf("%s: waiting for an earlier operation: %w", i.name, ctx.Err())
	case <-i.sup.ctx.Done():
		return fmt.Errorf("%s: this node is stopping", i.name)
	}
	<-done
	return nil
}

func (i *instance) loop(ctx context.Context) {
	defer i.finish()
	for {
		again := i.step(ctx)
		if again < 0 {
			return
		}
		var timer <-chan time.Time
		if again > 0 {
			timer = time.After(again)
		}
		var died <-chan struct{}
		if i.gen != nil {
			died = i.gen.proc.Done()
		}
		select {
		case <-ctx.Done():
			return
		case <-i.wake:
		case <-died:
			i.died()
		case <-timer:
		case f := <-i.cmds:
			f(ctx)
		}
	}
}

// finish ends what runs when the actor ends: the node is stopping, or nothing of the instance is left here.
func (i *instance) finish() {
	if i.gen != nil {
		i.sup.end(i.gen, stopGrace)
		i.gen = nil
	}
	if i.shell != nil {
		reg, ok := i.sup.register(i.key)
		if ok {
			i.shut("the instance is not on this node", &reg)
		} else {
			i.shut("the instance is gone", nil)
		}
		i.shell.Close()
		i.shell = nil
	}
	i.sup.drop(i.name)
	i.sup.Wake() // it may have become this node's again meanwhile
}

// step compares what should be with what is and does one thing about it. It returns after how long to look again unasked: 0 = not
// before something changes, negative = nothing is left to do here.
func (i *instance) step(ctx context.Context) time.Duration {
	reg, ok := i.sup.register(i.key)
	if !ok {
		return i.gone("its register was removed")
	}
	if i.sup.finishing(i.name) {
		return 20 * time.Millisecond
	}
	if reg.Owner != i.sup.cfg.Self {
		return i.fenced(reg)
	}
	var body componentsv1.InstanceBody
	if err := proto.Unmarshal(reg.Body, &body); err != nil {
		i.show(components.Failed, "its register cannot be read: "+err.Error())
		return maxBackoff
	}
	if reg.Boot != i.sup.cfg.Boot {
		return i.reclaim(ctx, reg, &body)
	}
	eff, err := i.sup.effective(body.GetComponent())
	if err != nil {
		i.show(components.Failed, err.Error())
		return maxBackoff
	}
	if eff == nil || i.surplus(eff, &body) {
		return i.remove(ctx, reg)
	}
	if eff.Digest != i.wanted {
		i.wanted, i.refused = eff.Digest, map[string]string{}
	}
	switch {
	case body.GetQuarantined():
		i.halt("it is quarantined")
		i.show(components.Failed, "quarantined: its owners died after they started it; try coppice start "+i.name)
		return 0
	case eff.Stopped:
		return i.stop(ctx, reg)
	case i.sup.paused():
		i.halt("the cluster is paused")
		i.show(components.Stopped, "the cluster is paused")
		return 0
	case i.gen == nil:
		return i.begin(ctx, reg, &body, eff)
	}
	return i.keep(ctx, reg, &body, eff)
}

// surplus says that the component no longer has this instance: its count was lowered.
func (i *instance) surplus(eff *components.Effective, body *componentsv1.InstanceBody) bool {
	if eff.EachNode {
		return body.GetEachNode() == ""
	}
	return body.GetEachNode() != "" || int(body.GetOrdinal()) >= eff.Count
}

// gone: nothing says any more that the instance exists.
func (i *instance) gone(why string) time.Duration {
	i.halt(why)
	i.sup.cfg.Log.Info("instance ended", "instance", i.name, "reason", why)
	return -1
}

// fenced: another node owns it now, or nobody does.
func (i *instance) fenced(reg arbiter.Register) time.Duration {
	if i.gen != nil {
		i.sup.cfg.Log.Warn("fenced: the instance has another owner", "instance", i.name, "epoch", i.gen.token.Epoch, "now", reg.Epoch, "owner", i.sup.nodeName(reg.Owner))
		i.sup.cfg.Events.Publish(events.Event{
			Channel: "/apps/" + i.name, Type: "fenced", Cause: fmt.Sprintf("epoch %d is owned by %s", reg.Epoch, i.sup.nodeName(reg.Owner)),
			Message: fmt.Sprintf("%s of epoch %d stopped on %s", i.name, i.gen.token.Epoch, i.sup.cfg.Name),
			Fields:  map[string]string{"epoch": fmt.Sprint(i.gen.token.Epoch), "now": fmt.Sprint(reg.Epoch)},
		})
		i.kill("another node owns it")
	}
	return -1
}

// reclaim takes the next epoch of an instance that this node owned before it was restarted.
func (i *instance) reclaim(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody) time.Duration {
	if i.sup.paused() {
		return 0
	}
	next := proto.CloneOf(body)
	next.Trigger, next.Cause, next.ClaimedUnixMs = "neighbour", "its node was restarted", uint64(time.Now().UnixMilli())
	if fb := body.GetFallback(); fb != nil && !body.GetSettled() {
		next.Digest, next.ArtifactName, next.Version = fb.GetDigest(), fb.GetArtifactName(), fb.GetVersion()
	}
	next.Fallback, next.Settled = nil, false
	if err := i.claim(ctx, reg, next); err != nil {
		i.show(components.Pending, err.Error())
		return time.Second
	}
	return time.Millisecond
}

// claim takes the next epoch for this node.
func (i *instance) claim(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody) error {
	data, err := proto.Marshal(body)
	if err != nil {
		return fmt.Errorf("encode %s: %w", i.key, err)
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	now, err := i.sup.cfg.Arbiter.Claim(ctx, arbiter.ClaimRequest{
		Key: i.key, Expect: reg.Epoch, Nonce: i.sup.nonce(), Owner: i.sup.cfg.Self, Boot: i.sup.cfg.Boot, Body: data,
	})
	if err != nil {
		var refused *arbiter.RefusedError
		if errors.As(err, &refused) {
			i.sup.adopt(refused.Current)
		}
		return fmt.Errorf("claim %s: %w", i.name, err)
	}
	i.sup.adopt(now)
	return nil
}

// remove ends an instance that should not exist any more, and its register with it.
func (i *instance) remove(ctx context.Context, reg arbiter.Register) time.Duration {
	i.halt("it is being removed")
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	res, err := i.sup.cfg.Arbiter.Txn(ctx, arbiter.TxnRequest{
		Nonce: i.sup.nonce(), Compares: []arbiter.Compare{{Key: i.key, Field: "epoch", Equal: reg.Epoch}}, Then: []arbiter.Op{{Delete: i.key}},
	})
	if err != nil || !res.Succeeded {
		i.show(components.Stopped, "it is being removed")
		return 500 * time.Millisecond
	}
	i.sup.cfg.Events.Publish(events.Event{Channel: "/apps/" + i.name, Type: "removed", Trigger: "operator", Message: i.name + " removed"})
	return -1
}

// stop: a command stopped it. Its state is saved and its owner stays.
func (i *instance) stop(ctx context.Context, _ arbiter.Register) time.Duration {
	if i.gen != nil {
		sctx, cancel := context.WithTimeout(ctx, 30*time.Second)
		defer cancel()
		if err := i.quiesce(sctx, reasonFreeze); err != nil {
			i.sup.cfg.Log.Warn("calls under way are cut off by stop", "instance", i.name, "error", err)
		}
		if err := i.flush(sctx); err != nil {
			i.show(components.Running, "not stopped yet: its state could not be saved: "+err.Error())
			return time.Second
		}
	}
	i.halt("a command stopped it")
	i.show(components.Stopped, "stopped by a command; try coppice start "+i.name)
	return 0
}

// begin starts the process of an instance that this node owns.
func (i *instance) begin(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective) time.Duration {
	if wait := time.Until(i.notUntil); wait > 0 {
		return wait
	}
	start := time.Now()
	if p := i.sup.takePrepared(i.name, reg.Epoch); p != nil {
		if err := i.install(p, reg, eff); err != nil {
			return i.failed(ctx, reg, body, eff, err)
		}
		return i.sup.cfg.Settle
	}
	g, err := i.launchEpoch(ctx, reg, body, eff)
	if err != nil {
		if ctx.Err() != nil {
			return 0
		}
		return i.failed(ctx, reg, body, eff, err)
	}
	i.gen = g
	i.crashed = false
	if eff.Frozen {
		i.show(components.Frozen, "frozen by a command")
	} else {
		i.show(components.Running, "")
	}
	i.mu.Lock()
	i.info.StartedMs = float64(time.Since(start).Microseconds()) / 1000
	i.mu.Unlock()
	i.sup.cfg.Events.Publish(events.Event{
		Channel: "/apps/" + i.name, Type: "running", Trigger: body.GetTrigger(), Cause: body.GetCause(),
		Message: fmt.Sprintf("%s runs %s@%s on %s in epoch %d", i.name, g.artifact, g.version, i.sup.cfg.Name, reg.Epoch),
		Fields:  map[string]string{"epoch": fmt.Sprint(reg.Epoch), "version": g.version, "took_ms": fmt.Sprint(time.Since(start).Milliseconds())},
	})
	return i.sup.cfg.Settle
}

// launchEpoch brings up the process of an epoch with its state and opens the gate.
func (i *instance) launchEpoch(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective) (*generation, error) {
	if i.crashed {
		// The last process of this epoch may have had a commit under way: what the log says is the restore point (DESIGN.md §5, restart).
		rctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		now, ok, err := i.sup.cfg.Arbiter.Read(rctx, i.key)
		cancel()
		if err != nil {
			return nil, fmt.Errorf("settle the commits of %s: %w", i.name, err)
		}
		if !ok || now.Epoch != reg.Epoch {
			i.sup.adopt(now)
			return nil, fmt.Errorf("%s has a newer epoch", i.name)
		}
		reg = now
	}
	if err := i.open(eff); err != nil {
		return nil, err
	}
	clock := newStopwatch()
	defer func() {
		i.sup.cfg.Log.Debug("launched", "instance", i.name, "epoch", reg.Epoch, "steps", clock.String())
	}()
	pages := make(chan error, 1)
	root := blobs.Hash{}
	if reg.Seq > 0 && len(reg.Root) == len(root) {
		root = blobs.Hash(reg.Root)
	}
	go func() { pages <- i.sup.fetch(ctx, root, reg) }()
	g, err := i.sup.launch(ctx, i.name, body.GetDigest(), eff, i.shell, func(st components.State) { i.show(st, "") })
	clock.lap("process")
	perr := <-pages
	clock.lap("pages")
	if err != nil {
		return nil, err
	}
	if perr != nil {
		i.sup.end(g, 0)
		return nil, perr
	}
	if !root.IsZero() {
		if err := i.sup.restore(ctx, g, root, blobs.Hash{}); err != nil {
			i.sup.end(g, 0)
			return nil, err
		}
	}
	clock.lap("restore")
	g.saved = Saved{Seq: reg.Seq, Root: root, Mark: g.mark, Holders: reg.Holders, At: time.Now()}
	token := components.Token{Incarnation: reg.Incarnation, Epoch: reg.Epoch}
	if err := i.bring(ctx, g, token, eff, !root.IsZero()); err != nil {
		i.sup.end(g, 0)
		return nil, err
	}
	clock.lap("start")
	i.save(i.sup.ctx, g, reg, eff)
	i.note(g, eff)
	if eff.Frozen {
		return g, i.mem().Freeze(ctx, reasonFreeze)
	}
	return g, nil
}

// bring puts the first process of an epoch behind the gate, starts it and lets the calls in. Answers wait for their commit from the
// first call on.
func (i *instance) bring(ctx context.Context, g *generation, token components.Token, eff *components.Effective, restored bool) error {
	ctx, cancel := context.WithTimeout(ctx, startDeadline)
	defer cancel()
	m := i.mem()
	i.sup.staleFlag(i.name).Store(false)
	if err := i.shell.Bind(eff); err != nil {
		return err
	}
	back, err := m.Attach(g.proc, g.desc, tokenOf(token))
	if err != nil {
		return err
	}
	g.back, g.token, g.since = back, token, time.Now()
	m.SetDurable(eff.Durable == componentsv1.Durability_DURABILITY_EACH_CALL && g.stateful())
	back.SetCommitted(g.mark)
	return m.Start(ctx, g.request(token, eff, restored))
}

// install makes the process that a move prepared the instance's own.
func (i *instance) install(p *prepared, reg arbiter.Register, eff *components.Effective) error {
	if i.shell != nil {
		i.shell.Close()
	}
	i.shell, i.gen, i.crashed = p.shell, p.gen, false
	i.sup.staleFlag(i.name).Store(false)
	i.save(i.sup.ctx, p.gen, reg, eff)
	if err := i.serve(p.gen, eff); err != nil {
		i.kill("its process could not be put behind the gate")
		return err
	}
	i.note(p.gen, eff)
	i.show(components.Running, "")
	return nil
}

// fetch makes a checkpoint's pages complete on this node.
func (s *Supervisor) fetch(ctx context.Context, root blobs.Hash, reg arbiter.Register) error {
	if root.IsZero() || s.cfg.Blobs.Complete(root) {
		return nil
	}
	from := reg.Holders
	for _, m := range s.cfg.Members.Alive() {
		from = append(from[:len(from):len(from)], m.ID)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Minute)
	defer cancel()
	if err := s.cfg.Blobs.Fetch(ctx, root, from); err != nil {
		return fmt.Errorf("fetch the state of %s: %w", instanceOf(reg.Key), err)
	}
	return nil
}

// failed notes a start that did not succeed and when the next one is.
func (i *instance) failed(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective, why error) time.Duration {
	i.failures++
	i.mu.Lock()
	i.info.Failures = i.failures
	i.mu.Unlock()
	wait := min(minBackoff<<min(i.failures-1, 10), maxBackoff)
	i.notUntil = time.Now().Add(wait)
	i.sup.cfg.Log.Warn("start failed", "instance", i.name, "epoch", reg.Epoch, "failures", i.failures, "next_in", wait, "error", why)
	i.show(components.Failed, fmt.Sprintf("%v; started again in %s", why, wait))
	i.sup.cfg.Events.Publish(events.Event{
		Channel: "/apps/" + i.name, Type: "start-failed", Trigger: "crash", Cause: why.Error(), Message: fmt.Sprintf("%s did not start (%d in a row)", i.name, i.failures),
	})
	if eff.Digest != body.GetDigest() && eff.Digest != "" {
		next := proto.CloneOf(body)
		next.Digest, next.ArtifactName, next.Version = eff.Digest, eff.ArtifactName, eff.Version
		next.Trigger, next.Cause, next.Settled, next.Fallback = "operator", "another version is deployed", false, nil
		next.ClaimedUnixMs = uint64(time.Now().UnixMilli())
		if err := i.claim(ctx, reg, next); err == nil {
			i.notUntil = time.Time{}
			return time.Millisecond
		}
	}
	return wait
}

// died: the process ended of itself. It is started again here, with its state; the ownership stays.
func (i *instance) died() {
	g := i.gen
	if g == nil {
		return
	}
	exit := g.proc.Exit()
	why := "exit status unknown"
	if exit.Known {
		why = fmt.Sprintf("exit status %d", exit.Code)
		if exit.Signal != "" {
			why = "killed by " + exit.Signal
		}
	}
	lived := time.Since(g.since)
	i.mem().Fail("its process ended (" + why + ")") // calls wait for the next one
	i.sup.end(g, 0)
	i.gen, i.crashed = nil, true
	i.mu.Lock()
	i.info.Restarts++
	i.mu.Unlock()
	if lived > healthyAfter {
		i.failures = 0
	}
	if i.failures > 0 || lived < time.Second {
		i.failures++
		i.notUntil = time.Now().Add(min(minBackoff<<min(i.failures-1, 10), maxBackoff))
	}
	i.show(components.Starting, "its process ended ("+why+"); it is started again")
	i.sup.cfg.Log.Warn("component process ended", "instance", i.name, "pid", g.proc.Ident().Pid, "reason", why, "lived", lived)
	i.sup.cfg.Events.Publish(events.Event{
		Channel: "/apps/" + i.name, Type: "crashed", Trigger: "crash", Cause: why, Message: i.name + " ended and is started again on " + i.sup.cfg.Name,
		Fields: map[string]string{"pid": fmt.Sprint(g.proc.Ident().Pid), "output": g.proc.Output()},
	})
}

// kill ends the process at once: its epoch is over.
func (i *instance) kill(why string) {
	if i.gen == nil {
		return
	}
	reg, ok := i.sup.register(i.key)
	if !ok {
		reg = arbiter.Register{}
	}
	i.shut(why, &reg)
	i.sup.end(i.gen, 0)
	i.gen = nil
}

// halt ends the process gently.
func (i *instance) halt(why string) {
	if i.gen == nil {
		return
	}
	i.shut(why, nil)
	i.sup.end(i.gen, stopGrace)
	i.gen = nil
}

func (i *instance) show(st components.State, reason string) {
	i.mu.Lock()
	changed := i.info.State != st || i.info.Reason != reason
	if i.info.State != st || i.info.Since.IsZero() {
		i.info.Since = time.Now()
	}
	i.info.State, i.info.Reason = st, reason
	i.mu.Unlock()
	if changed && i.sup.cfg.Changed != nil {
		i.sup.cfg.Changed()
	}
}

func (i *instance) note(g *generation, eff *components.Effective) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.info.Epoch, i.info.Version, i.info.Digest, i.info.Artifact = g.token.Epoch, g.version, g.digest, g.artifact
	i.info.Started, i.info.Failures = g.since, 0
	i.info.Pid, i.info.TxnCalls = g.proc.Ident().Pid, g.has("txn-calls")
	i.info.Durable = components.DurableName(eff.Durable, eff.Interval)
	i.applied = appliedFrom(eff)
}
