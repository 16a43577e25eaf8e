package supervisor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/internal/planted"
)

const (
	// fetchWithin bounds the fetching of a checkpoint's pages.
	fetchWithin = 10 * time.Minute
	// settleWithin bounds one try to make certain how the last commit of an ended process came out.
	settleWithin = 10 * time.Second
)

// errLog says that a start failed because the arbiter could not be asked: no fault of the version.
var errLog = errors.New("the arbiter cannot be asked now")

// errOverEpoch says that an epoch ended while its process was being started.
var errOverEpoch = errors.New("its epoch is over, or it is not to run any more")

// begin starts the process of an instance that this node owns.
func (i *instance) begin(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective) time.Duration {
	if i.unfit.nonce == reg.Nonce && canRetreat(body) {
		return i.retreat(ctx, reg, body, i.unfit.why)
	}
	if wait := time.Until(i.notUntil); wait > 0 {
		return wait
	}
	start := time.Now()
	if p := i.sup.takePrepared(i.name, reg.Epoch); p != nil {
		if err := i.install(ctx, p, reg, eff); err != nil {
			return i.failed(ctx, reg, body, eff, err)
		}
		return time.Millisecond
	}
	sctx, stop := i.during(ctx, reg)
	from, err := "", error(nil)
	if p := i.sup.takeStandby(i.name); p != nil {
		if err = i.promote(sctx, p, reg, body, eff); err == nil {
			from = " from its standby"
			i.gen.fetched = start
		} else if i.sup.cfg.Log.Warn("the standby is not used", "instance", i.name, "epoch", reg.Epoch, "error", err); i.shell != p.shell {
			i.sup.discard(p)
		}
	}
	if from == "" && !errors.Is(err, errOverEpoch) {
		err = i.launchEpoch(sctx, reg, body, eff)
	}
	over := context.Cause(sctx)
	stop()
	switch {
	case err != nil && ctx.Err() != nil:
		return 0
	case err != nil && errors.Is(over, errOverEpoch), errors.Is(err, errOverEpoch):
		return time.Millisecond
	case err != nil:
		return i.failed(ctx, reg, body, eff, err)
	}
	g := i.gen
	if !i.applied.frozen {
		i.show(components.Running, "")
	}
	i.mu.Lock()
	i.info.StartedMs = float64(time.Since(g.fetched).Microseconds()) / 1000
	i.mu.Unlock()
	ev := events.Event{
		Channel: "/apps/" + i.name, Type: "running", Trigger: body.GetTrigger(), Cause: body.GetCause(),
		Message: fmt.Sprintf("%s runs %s@%s on %s in epoch %d%s", i.name, g.artifact, g.version, i.sup.cfg.Name, reg.Epoch, from),
		Fields:  map[string]string{"epoch": fmt.Sprint(reg.Epoch), "version": g.version, "took_ms": fmt.Sprint(time.Since(start).Milliseconds())},
	}
	if from != "" {
		ev.Fields["standby"] = components.StandbyHot
	}
	i.sup.cfg.Events.Publish(ev)
	return time.Millisecond
}

// during is the time in which reg's epoch is this node's and the instance should run: a start may take minutes (pages to fetch) and does
// not go on for nothing.
func (i *instance) during(ctx context.Context, reg arbiter.Register) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if !i.wanting(reg) {
				cancel(errOverEpoch)
			}
		}
	}()
	return ctx, func() {
		cancel(nil)
		<-ended
	}
}

// wanting says whether the instance should still run here in reg's epoch.
func (i *instance) wanting(reg arbiter.Register) bool {
	now, ok := i.sup.register(i.key)
	if !ok || now.Owner != i.sup.cfg.Self || now.Boot != i.sup.cfg.Boot && now.Boot != reg.Boot || now.Epoch != reg.Epoch {
		return false
	}
	var body componentsv1.InstanceBody
	if proto.Unmarshal(now.Body, &body) != nil {
		return true // step says so
	}
	eff, err := i.sup.effective(body.GetComponent())
	return err != nil || !surplus(eff, &body) && !eff.Stopped && !body.GetQuarantined() && !i.sup.paused()
}

// settled is the register whose root the next process of its epoch is to be given. The last process of this epoch may have had a commit
// under way: how that came out is made certain first, and then the log is asked, for the local view may lag behind with checkpoints.
func (i *instance) settled(ctx context.Context, reg arbiter.Register) (arbiter.Register, error) {
	if i.prev == nil || i.prev.nonce != reg.Nonce {
		return reg, nil
	}
	sctx, cancel := context.WithTimeout(ctx, settleWithin)
	defer cancel()
	if i.prev.saver != nil && !planted.Bug("unsettled-restart") {
		if err := i.prev.saver.settle(sctx); err != nil {
			return reg, fmt.Errorf("%w: %w", errLog, err)
		}
	}
	now, ok, err := i.sup.cfg.Arbiter.Read(sctx, i.key)
	if err != nil {
		return reg, fmt.Errorf("%w: settle the commits of %s: %w", errLog, i.name, err)
	}
	if !ok || now.Epoch != reg.Epoch {
		i.sup.adopt(now)
		return reg, errOverEpoch
	}
	return now, nil
}

// launchEpoch brings up the process of an epoch with its state, opens the gate and makes it i.gen.
func (i *instance) launchEpoch(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective) error {
	b := i.sup.branch(i.name, tokenIn(reg))
	alone := eff.Keeps() && i.sup.CutOff()
	if b == nil && !alone { // else nothing can be settled now: what was in doubt is part of the branch
		var err error
		if reg, err = i.settled(ctx, reg); err != nil {
			return err
		}
	}
	if err := i.open(eff); err != nil {
		return err
	}
	clock := newStopwatch()
	defer func() {
		i.sup.cfg.Log.Debug("launched", "instance", i.name, "epoch", reg.Epoch, "steps", clock.String())
	}()
	root := blobs.Hash{}
	if reg.Seq > 0 {
		root = hashFrom(reg.Root)
	}
	if b != nil {
		root = hashFrom(b.GetRoot())
	}
	g, err := i.process(ctx, reg, body, eff, root, clock)
	if err != nil {
		return err
	}
	if !root.IsZero() {
		if err := i.sup.restore(ctx, g, root, blobs.Hash{}); err != nil {
			i.sup.end(i.shell, g, 0)
			return err
		}
	}
	clock.lap("restore")
	g.saved = Saved{Seq: reg.Seq, Root: root, Mark: g.mark, Bytes: g.bytes(), Holders: reg.Holders, At: time.Now()}
	if err := i.bring(ctx, g, tokenIn(reg), eff, !root.IsZero()); err != nil {
		i.mem().Fail(err.Error())
		i.sup.end(i.shell, g, 0)
		return err
	}
	clock.lap("start")
	g.recalled = b == nil && alone
	i.gen = g
	i.save(g, reg, eff, nil)
	i.note(g, eff)
	if eff.Frozen {
		i.applied.frozen = false // keep freezes it
	}
	return nil
}

// process starts the process and, at the same time, brings the pages of its state here.
func (i *instance) process(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective, root blobs.Hash, clock *stopwatch) (*generation, error) {
	fctx, cancel := context.WithCancel(ctx)
	defer cancel()
	pages := make(chan error, 1)
	go func() { pages <- i.sup.fetch(fctx, root, reg.Key, reg.Holders) }()
	g, err := i.sup.launch(ctx, i.name, body.GetDigest(), eff, i.shell, func(st components.State) { i.show(st, "") })
	clock.lap("process")
	if err != nil {
		cancel()
		<-pages
		return nil, err
	}
	select { // a process that ends meanwhile is not waited for
	case err = <-pages:
	case <-g.proc.Done():
		cancel()
		<-pages
		err = fmt.Errorf("start %s@%s: it ended (%s) before its state was here", g.artifact, g.version, g.proc.Exit())
	}
	clock.lap("pages")
	if err != nil {
		i.sup.end(i.shell, g, 0)
		return nil, err
	}
	return g, nil
}

// bring puts the first process of an epoch behind the gate, starts it and lets the calls in. Answers wait for their commit from the
// first call on.
func (i *instance) bring(ctx context.Context, g *generation, token components.Token, eff *components.Effective, restored bool) error {
	ctx, cancel := context.WithTimeout(ctx, startDeadline)
	defer cancel()
	m := i.mem()
	i.sup.service(i.name).stale.Store(false)
	if err := i.shell.Bind(eff); err != nil {
		return err
	}
	back, err := m.Attach(g.proc, g.desc, tokenOf(token))
	if err != nil {
		return err
	}
	if err := i.takeOn(g); err != nil {
		return err
	}
	g.back, g.token, g.since = back, token, time.Now()
	m.SetDurable(waits(g, eff))
	back.SetCommitted(g.mark)
	err = m.Start(ctx, g.request(token, eff, restored))
	g.beginTook = time.Since(g.since)
	return err
}

// install makes a process that was prepared, for a move or as a standby, the instance's own.
func (i *instance) install(ctx context.Context, p *prepared, reg arbiter.Register, eff *components.Effective) error {
	if i.shell != nil {
		i.shell.Close()
	}
	i.shell, i.gen = p.shell, p.gen
	i.sup.service(i.name).stale.Store(false)
	if p.gen.since.IsZero() {
		err := i.takeOn(p.gen)
		if err == nil {
			err = p.gen.start(ctx, p.shell, tokenIn(reg), eff, !p.gen.saved.Root.IsZero(), startDeadline)
		}
		if err != nil {
			i.kill("it did not start")
			return err
		}
	}
	i.save(p.gen, reg, eff, nil)
	if err := i.serve(ctx, p.gen, eff); err != nil {
		i.kill("its process could not be put behind the gate")
		return err
	}
	i.note(p.gen, eff)
	if eff.Frozen {
		i.applied.frozen = false // keep freezes it
		return nil
	}
	i.show(components.Running, "")
	return nil
}

// fetch makes a checkpoint's pages complete on this node: from those who should keep them, else from anybody.
func (s *Supervisor) fetch(ctx context.Context, root blobs.Hash, key string, holders []peer.ID) error {
	if root.IsZero() || s.cfg.Blobs.Complete(root) {
		return nil
	}
	from := append([]peer.ID(nil), holders...)
	for _, m := range s.cfg.Members.Alive() {
		from = append(from, m.ID)
	}
	ctx, cancel := context.WithTimeout(ctx, fetchWithin)
	defer cancel()
	if err := s.cfg.Blobs.Fetch(ctx, root, from); err != nil {
		return fmt.Errorf("fetch the state of %s: %w", instanceOf(key), err)
	}
	return nil
}

// failed notes a start that did not succeed and when the next one is.
func (i *instance) failed(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective, why error) time.Duration {
	i.failures++
	i.mu.Lock()
	i.info.Failures = i.failures
	i.mu.Unlock()
	wait := backoff(i.failures)
	i.notUntil = time.Now().Add(wait)
	i.sup.cfg.Log.Warn("start failed", "instance", i.name, "epoch", reg.Epoch, "failures", i.failures, "next_in", wait, "error", why)
	i.show(components.Failed, fmt.Sprintf("%v; started again in %s", why, wait))
	i.sup.cfg.Events.Publish(events.Event{
		Channel: "/apps/" + i.name, Type: "start-failed", Trigger: "crash", Cause: why.Error(), Message: fmt.Sprintf("%s did not start (%d in a row)", i.name, i.failures),
	})
	if canRetreat(body) && !errors.Is(why, errLog) {
		i.unfit = unfit{reg.Nonce, why.Error()}
		return time.Millisecond
	}
	if eff.Digest != body.GetDigest() && eff.Digest != "" && eff.Digest != body.GetReturnedFrom() {
		next := proto.CloneOf(body)
		next.Digest, next.ArtifactName, next.Version = eff.Digest, eff.ArtifactName, eff.Version
		next.Trigger, next.Cause, next.Settled, next.Fallback, next.ReturnedFrom = "operator", "another version is deployed", false, nil, ""
		next.ClaimedUnixMs = i.sup.date()
		if err := i.claim(ctx, reg, next, arbiter.ClaimRequest{}); err == nil {
			i.notUntil = time.Time{}
			return time.Millisecond
		}
	}
	return wait
}

// backoff is the pause after so many failures in a row.
func backoff(failures int) time.Duration {
	return min(minBackoff<<min(max(failures-1, 0), 10), maxBackoff)
}

func tokenIn(reg arbiter.Register) components.Token {
	return components.Token{Incarnation: reg.Incarnation, Epoch: reg.Epoch}
}
