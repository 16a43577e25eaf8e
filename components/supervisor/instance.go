package supervisor

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/membrane"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

const (
	minBackoff = 100 * time.Millisecond
	maxBackoff = 30 * time.Second
	// healthyAfter: a process that lived so long starts the next back-off from the beginning.
	healthyAfter = 10 * time.Second
	// claimWithin bounds one try to claim.
	claimWithin = 30 * time.Second
)

// instance is the actor of one instance on this node.
type instance struct {
	sup  *Supervisor
	name string // app/name-0
	key  string // inst/app/name-0

	wake chan struct{}
	cmds chan func(ctx context.Context)
	gone chan struct{} // closed when the actor has ended
	hist *historian

	// Of the loop's goroutine only.
	shell     Shell
	gen       *generation
	prev      *generation // the process before, ended: its commits must be settled before the next of the same epoch begins
	failures  int
	notUntil  time.Time
	unfit     unfit
	quiet     bool              // the process is held and frozen for a stop that has not gone through
	refused   map[string]string // digest -> why a swap to it failed; cleared when desired state changes
	wanted    uint64            // the revision of desired state seen last, to notice that change
	follows   retries           // of a swap that failed for no fault of the version
	applied   applied           // what was last given to the process
	regradeAt time.Time         // not before: a change of the takeover that failed
	thin      broken            // too few copies of its checkpoint
	loose     broken            // a required interface that leads nowhere

	mu   sync.Mutex // guards the fields below
	info Info
	sv   *saver // of the running generation
	back *membrane.Backend
	hung *hung
	// follower keeps a standby, or did.
	follower follower
}

// unfit is an epoch whose process died or hung before the epoch was settled.
type unfit struct {
	nonce uint64 // of the claim that made it
	why   string
}

// retries counts tries and says when the next one is due.
type retries struct {
	times int
	until time.Time
	why   string
}

func (r *retries) failed(why error) {
	r.until, r.why = time.Now().Add(min(time.Second<<min(r.times, 5), maxBackoff)), why.Error()
	r.times++
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
	Settled   bool // the epoch has answered and held: a failure does not return it to the version before
	TxnCalls  bool
	Durable   string  // how it is saved in fact, which may be less than desired (Reason says why)
	StartedMs float64 // how long its last start took, once its artifact was here: launch, restore, start
	Failures  int     // starts in a row that failed
	// LaunchTook and BeginTook are how long its process took to come up, and its Start: what a start takes however large the state.
	LaunchTook, BeginTook time.Duration
	// Listen is where what it runs listens by itself, beside the gate; "" nowhere.
	Listen string
	// Standby is the node where a process waits that has the state, but for so many acknowledged checkpoints; "": none told of it lately.
	Standby       peer.ID
	StandbyBehind uint64
	// Unsaved is how much was answered since the last acknowledged checkpoint: changes, or calls that may have changed something.
	Unsaved uint64
}

func newInstance(s *Supervisor, name string) *instance {
	return &instance{
		sup: s, name: name, key: components.InstanceRegister(name), wake: make(chan struct{}, 1), cmds: make(chan func(context.Context)),
		gone: make(chan struct{}), hist: newHistorian(s, name), refused: map[string]string{}, info: Info{Instance: name, State: components.Pending},
	}
}

func (i *instance) poke() {
	select {
	case i.wake <- struct{}{}:
	default:
	}
}

// do runs f in the actor's goroutine and waits for it. f's context ends with ctx and with the node.
func (i *instance) do(ctx context.Context, f func(ctx context.Context)) error {
	done := make(chan struct{})
	cmd := func(actor context.Context) {
		defer close(done)
		both, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		defer context.AfterFunc(actor, func() { cancel(errStopping) })()
		f(both)
	}
	select {
	case i.cmds <- cmd:
	case <-ctx.Done():
		return fmt.Errorf("%s: waiting for an earlier operation: %w", i.name, ctx.Err())
	case <-i.gone:
		return fmt.Errorf("%s: %w", i.name, ErrNotHere)
	}
	<-done
	return nil
}

// errStopping ends what is under way when the node stops.
var errStopping = errors.New("this node is stopping")

func (i *instance) loop(ctx context.Context) {
	defer i.finish()
	for {
		again := i.step(ctx)
		if again < 0 || ctx.Err() != nil {
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
		i.sup.end(i.shell, i.gen, stopGrace)
		i.gen = nil
	}
	if i.prev != nil {
		i.prev.stopSaver()
	}
	i.sup.dropClaimed(i.name)
	i.sup.dropStandby(i.name)
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
	i.sup.drop(i)
	i.sup.Wake() // it may have become this node's again meanwhile
}

// step compares what should be with what is and does one thing about it. It returns after how long to look again unasked: 0 = not
// before something changes, negative = nothing is left to do here.
func (i *instance) step(ctx context.Context) time.Duration {
	reg, ok := i.sup.register(i.key)
	if again, done := i.afterCut(ctx, reg, ok); done {
		return again
	}
	if !ok {
		return i.vanished("its register was removed")
	}
	if i.sup.finishing(i.name) {
		return 20 * time.Millisecond
	}
	if !i.sup.owns(reg) {
		return i.fenced(reg)
	}
	var body componentsv1.InstanceBody
	if err := proto.Unmarshal(reg.Body, &body); err != nil {
		i.show(components.Failed, "its register cannot be read: "+err.Error())
		return maxBackoff
	}
	if eff, yes := i.goesAlone(reg, &body); yes {
		return i.alone(ctx, reg, &body, eff)
	}
	if reg.Boot != i.sup.cfg.Boot {
		return i.reclaim(ctx, reg, &body)
	}
	i.grade(body.GetLeased(), false)
	eff, revision, err := i.sup.desired(body.GetComponent())
	if err != nil {
		i.show(components.Failed, err.Error())
		return maxBackoff
	}
	if surplus(eff, &body) {
		return i.remove(ctx, reg, &body)
	}
	i.sup.service(i.name).keeps.Store(eff.Keeps())
	i.hist.want(components.RetentionOf(eff.Spec))
	if revision != i.wanted {
		i.wanted, i.refused, i.follows = revision, map[string]string{}, retries{}
	}
	switch {
	case body.GetQuarantined():
		return i.rest(ctx, components.Failed, "quarantined: its owners died after they started it; try coppice start "+i.name)
	case eff.Stopped:
		return i.rest(ctx, components.Stopped, "stopped by a command; try coppice start "+i.name)
	case i.sup.paused():
		return i.rest(ctx, components.Stopped, "the cluster is paused")
	case i.sup.retiring.Load():
		return i.rest(ctx, components.Stopped, whyRetired)
	case eff.Leased() != body.GetLeased() && !time.Now().Before(i.regradeAt):
		return i.regrade(ctx, reg, &body, eff.Leased())
	case !i.leaseHeld():
		return i.yield()
	case i.gen == nil:
		return i.begin(ctx, reg, &body, eff)
	}
	return i.keep(ctx, reg, &body, eff)
}

// surplus says that the component no longer has this instance: it was removed, or its count was lowered.
func surplus(eff *components.Effective, body *componentsv1.InstanceBody) bool {
	switch {
	case eff == nil:
		return true
	case eff.EachNode:
		return body.GetEachNode() == ""
	}
	return body.GetEachNode() != "" || int(body.GetOrdinal()) >= eff.Count
}

// vanished: nothing says any more that the instance exists.
func (i *instance) vanished(why string) time.Duration {
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
		i.show(components.Stopped, "the cluster is paused")
		return 0
	}
	next := proto.CloneOf(body)
	next.Trigger, next.Cause, next.ClaimedUnixMs = "neighbour", "its node was restarted", i.sup.date()
	claim := arbiter.ClaimRequest{}
	if fb := body.GetFallback(); fb != nil && !body.GetSettled() {
		next.Digest, next.ArtifactName, next.Version = fb.GetDigest(), fb.GetArtifactName(), fb.GetVersion()
		claim = i.sup.fallbackRoot(ctx, reg, body)
	}
	next.Fallback, next.Settled = nil, false
	ctx, stop := i.untilAlone(ctx, reg, body)
	defer stop()
	if err := i.claim(ctx, reg, next, claim); err != nil {
		i.show(components.Pending, err.Error())
		return time.Second
	}
	return time.Millisecond
}

// claim takes the next epoch for this node. what says about its root, if it is to be another one.
func (i *instance) claim(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, what arbiter.ClaimRequest) error {
	data, err := proto.Marshal(body)
	if err != nil {
		return fmt.Errorf("encode %s: %w", i.key, err)
	}
	ctx, cancel := context.WithTimeout(ctx, claimWithin)
	defer cancel()
	what.Body = data
	now, err := i.sup.claimOver(ctx, reg, what)
	if err != nil {
		if refused, ok := errors.AsType[*arbiter.RefusedError](err); ok {
			i.sup.adopt(refused.Current)
		}
		return fmt.Errorf("claim %s: %w", i.name, err)
	}
	i.sup.adopt(now)
	return nil
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

// note records what runs now, and under which desired state.
func (i *instance) note(g *generation, eff *components.Effective) {
	i.applied = appliedFrom(eff)
	i.sup.service(i.name).free.Store(free(eff))
	i.mu.Lock()
	defer i.mu.Unlock()
	i.info.Epoch, i.info.Version, i.info.Digest, i.info.Artifact = g.token.Epoch, g.version, g.digest, g.artifact
	i.info.Started, i.info.Failures, i.info.Settled = g.since, 0, false
	i.info.Pid, i.info.TxnCalls = g.proc.Ident().Pid, g.has(componentv1.FeatureTxnCalls)
	i.info.Durable = durableNow(g, eff)
	i.info.LaunchTook, i.info.BeginTook = g.launchTook, g.beginTook
	i.hung = nil
}
