package supervisor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/runner"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/membrane"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

const (
	// drainDeadline is how long calls under way may take to end before a replace gives up and the old process goes on.
	drainDeadline = 5 * time.Second
	// pauseLimit bounds the whole pause before the claim: past it the old process goes on.
	pauseLimit = 2 * drainDeadline
	// swapClaim bounds the claim, during which calls are held, too.
	swapClaim = 10 * time.Second
	// swapStart bounds the new version's Start while calls are held: a version that does not come up costs its callers this much, once.
	swapStart = time.Second
	// preCopyRounds and preCopyEnough end the copying before the freeze: when what changed meanwhile is small, or no longer shrinks.
	preCopyRounds = 5
	preCopyEnough = 64 << 10
	// streamGrace is how long streams that are open in a replaced process may go on.
	streamGrace = 10 * time.Second
)

// Replaced tells what a replace did.
type Replaced struct {
	From, To  string // version or node
	Pause     time.Duration
	Bytes     uint64
	CallsHeld uint64
	Took      time.Duration
	Epoch     uint64
	Kept      string // id of the earlier checkpoint that keeps the state which was left; "" it is not kept
	State     string // which state it has now, in words
}

// versionError says that a version is at fault: trying it again does not help.
type versionError struct{ why error }

func (e *versionError) Error() string { return e.why.Error() }
func (e *versionError) Unwrap() error { return e.why }

// swapPlan is one wish to run another version on this node.
type swapPlan struct {
	digest, artifact, version string
	// app, when set, is the desired state that says the same, committed in one transaction with the new epoch, against this revision of it.
	app      *arbiter.PutOp
	revision uint64
	trigger  string
	cause    string
	// again: nobody asked for it just now; the deaths of owners go on to count.
	again bool
	// undo: the version that is left is none to return to.
	undo bool
	// root, when set, is the state to go back to (restore, and undo where the versions' schemas differ); else the running state is carried over.
	root blobs.Hash
	kept []peer.ID // who has root by the time of the claim
	// back: the state is left, not the version: an undo returns to it.
	back bool
	// why what is left is kept in the history, and the change of that, while the claim is made.
	why  string
	keep *before
	// branch, when set, is what is gone back to: it becomes an entry of the history, too.
	branch *componentsv1.HistoryEntry
	// rest, of an instance that does not run, asks for the checkpoint that was found to be its last.
	rest *arbiter.Compare
}

// swap replaces the running process by one of another version with the same state: start, pre-copy, freeze, drain, last delta, commit,
// claim, switch, release. Until the claim any failure leaves the old process serving.
func (i *instance) swap(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective, p swapPlan) (Replaced, error) {
	begin := time.Now()
	old := i.gen
	out := Replaced{From: old.version, To: p.version}
	next, err := i.sup.launch(ctx, i.name, p.digest, eff, i.shell, func(components.State) {})
	if err != nil {
		return out, launchError(err)
	}
	out.To = next.version
	carried, err := i.precopy(ctx, old, next, p)
	if err != nil {
		i.sup.end(i.shell, next, 0)
		return out, err
	}
	p.kept = carried.keepers
	if p.keep, err = i.hist.open(ctx, p); err != nil {
		i.sup.end(i.shell, next, 0)
		return out, fmt.Errorf("swap %s to %s: %w", i.name, next.version, err)
	}
	defer p.keep.close()
	pauseBegin := time.Now()
	claimed, tail, err := i.cutOver(ctx, reg, body, eff, old, next, carried.mark, p)
	if err != nil {
		i.sup.end(i.shell, next, 0)
		return out, i.goOn(ctx, fmt.Errorf("swap %s to %s: %w", i.name, next.version, err))
	}
	old.stopSaver()
	p.keep.close()
	i.adoptSwapped(old, next, claimed, carried, p)
	out.CallsHeld = i.held()
	i.save(next, claimed, eff, carried.keepers)
	err = i.serve(ctx, next, eff)
	frozen := i.applied.frozen
	i.note(next, eff)
	i.applied.frozen = frozen
	i.retire(old)
	if err != nil {
		i.fell("crashed", "its process ended right after the switch", err.Error())
		return out, fmt.Errorf("swap %s: %s took over, but does not serve: %w", i.name, next.version, err)
	}
	out.Pause, out.Bytes = time.Since(pauseBegin), carried.bytes+tail
	out.Took, out.Epoch, out.Kept = time.Since(begin), claimed.Epoch, p.keep.id()
	if !frozen {
		i.show(components.Running, "")
	}
	i.sup.cfg.Events.Publish(events.Event{
		Channel: "/apps/" + i.name, Type: "swapped", Trigger: p.trigger, Cause: p.cause,
		Message: fmt.Sprintf("%s swapped from %s to %s in epoch %d, paused %.1f ms", i.name, out.From, out.To, claimed.Epoch, float64(out.Pause.Microseconds())/1000),
		Fields:  map[string]string{"from": out.From, "to": out.To, "pause_ms": fmt.Sprintf("%.1f", float64(out.Pause.Microseconds())/1000), "epoch": fmt.Sprint(claimed.Epoch)},
	})
	return out, nil
}

// adoptSwapped makes the new process the instance's own.
func (i *instance) adoptSwapped(old, next *generation, claimed arbiter.Register, carried copied, p swapPlan) {
	next.saved = Saved{Seq: claimed.Seq, Root: hashFrom(claimed.Root), Mark: next.mark, Bytes: carried.bytes, Holders: claimed.Holders, At: time.Now()}
	switch {
	case !p.root.IsZero():
		next.head = carried.head
	case next.desc.GetState().GetWritesSchema() == old.desc.GetState().GetWritesSchema():
		next.head = old.lastHead()
	default:
		next.head = nil // a chain has one schema: the next checkpoint is a base
	}
	i.gen, i.prev, i.unfit = next, nil, unfit{}
}

// retire ends a process that was replaced, once its open streams are over.
func (i *instance) retire(old *generation) {
	m, sh := i.mem(), i.shell
	if !i.sup.spawn(func() {
		if err := m.Retire(i.sup.ctx, old.back, stopGrace, streamGrace); err != nil {
			i.sup.cfg.Log.Warn("the replaced process did not stop", "instance", i.name, "error", err)
		}
		i.sup.end(sh, old, 0)
	}) {
		i.sup.end(sh, old, 0)
	}
}

// goOn takes the old process back into service after a replace that failed before its claim. It returns why, and what came on top.
func (i *instance) goOn(ctx context.Context, why error) error {
	if i.applied.frozen {
		return why // it was frozen before, and stays so
	}
	if err := i.regain(ctx); err != nil {
		i.kill("its lease did not come back")
		i.show(components.Stopped, "it is exactly-one, and its lease did not come back after a move that failed")
		return errors.Join(why, err)
	}
	if err := i.resume(ctx, i.gen); err != nil {
		i.relaunch("it does not go on after a replace that failed: " + err.Error())
		return errors.Join(why, err)
	}
	i.release()
	return why
}

type copied struct {
	mark    uint64
	bytes   uint64
	head    *chainHead
	keepers []peer.ID // of a root that is gone back to; nil: those whom the register names
}

// precopy gives the new process the state while the old one serves.
func (i *instance) precopy(ctx context.Context, old, next *generation, p swapPlan) (copied, error) {
	if !old.stateful() || !next.stateful() {
		return copied{}, nil
	}
	if !p.root.IsZero() {
		return i.goBack(ctx, next, p.root)
	}
	if schema := old.desc.GetState().GetWritesSchema(); !i.sup.reads(next, schema) {
		return copied{}, &versionError{fmt.Errorf("%s@%s cannot read schema %d that %s@%s writes", next.artifact, next.version, schema, old.artifact, old.version)}
	}
	var c copied
	last := uint64(0)
	for round := range preCopyRounds {
		n, err := carry(ctx, old, next, c.mark)
		if err != nil {
			return c, copyError(old, fmt.Errorf("copy the state of %s: %w", i.name, err))
		}
		c.bytes += n
		c.mark = next.mark
		if !old.has(componentv1.FeatureIncremental) || n < preCopyEnough || (round > 0 && n >= last) {
			break
		}
		last = n
	}
	return c, nil
}

// goBack gives the new process an earlier state, and has enough nodes keep that: it is about to be what a restart begins with.
func (i *instance) goBack(ctx context.Context, next *generation, root blobs.Hash) (copied, error) {
	if err := i.sup.fetch(ctx, root, i.key, nil); err != nil {
		return copied{}, err
	}
	if err := i.sup.restore(ctx, next, root, blobs.Hash{}); err != nil {
		return copied{}, &versionError{err}
	}
	to, w := i.holders()
	kept, err := i.sup.cfg.Blobs.Push(ctx, root, to, w)
	if err != nil {
		return copied{}, fmt.Errorf("copy the state of %s to its holders: %w", i.name, err)
	}
	return copied{mark: next.mark, bytes: next.head.link.Bytes, head: next.head, keepers: kept}, nil
}

// carry streams what changed after a mark from one process to the other and returns how many bytes that were.
func carry(ctx context.Context, from, to *generation, since uint64) (uint64, error) {
	n, mark, err := membrane.CopyState(ctx, from.back, to.back, since)
	if err == nil {
		to.mark = mark
	}
	return n, err
}

// copyError: when the old process has ended, or what it gives is no state, the new version is not to blame for what it was not given.
func copyError(old *generation, err error) error {
	if _, source := errors.AsType[*membrane.SourceError](err); source {
		return err
	}
	if old.dead() || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		return err
	}
	return &versionError{err}
}

// startFaults are what is wrong with an executable that does not start.
var startFaults = []error{
	runner.ErrNoExecutable, runner.ErrWrongArch, runner.ErrNoHandshake, runner.ErrHung, runner.ErrProtocol, runner.ErrDescribe,
}

// launchError: a process that does not start is its version's fault, an artifact that cannot be fetched is not.
func launchError(err error) error {
	for _, fault := range startFaults {
		if errors.Is(err, fault) {
			return &versionError{err}
		}
	}
	return err
}

// cutOver is the pause: calls are held from before it until after it.
func (i *instance) cutOver(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective, old, next *generation, mark uint64, p swapPlan) (arbiter.Register, uint64, error) {
	pctx, cancel := context.WithTimeout(ctx, pauseLimit)
	defer cancel()
	if err := i.quiesce(pctx, reasonSwap); err != nil {
		return arbiter.Register{}, 0, err
	}
	if err := i.flush(pctx); err != nil {
		return arbiter.Register{}, 0, err
	}
	if err := i.together(); err != nil {
		return arbiter.Register{}, 0, err
	}
	saved, _ := old.saver.Saved()
	var tail uint64
	if old.stateful() && next.stateful() && p.root.IsZero() {
		since := mark
		if !old.has(componentv1.FeatureIncremental) {
			since = 0
		}
		var err error
		if tail, err = carry(pctx, old, next, since); err != nil {
			return arbiter.Register{}, 0, copyError(old, fmt.Errorf("copy the last changes: %w", err))
		}
	}
	if err := i.takeOn(next); err != nil {
		return arbiter.Register{}, 0, err
	}
	// It is told the present epoch: the next one is its own only once it is claimed, and a token must not be with two who may both run.
	if err := next.start(pctx, i.shell, tokenIn(reg), eff, old.stateful() && next.stateful(), swapStart); err != nil {
		if pctx.Err() != nil {
			return arbiter.Register{}, 0, err
		}
		return arbiter.Register{}, 0, &versionError{err}
	}
	claimed, err := i.claimSwap(ctx, reg, body, old, next, saved, p)
	if err == nil {
		next.own(ctx, tokenIn(claimed))
	}
	return claimed, tail, err
}

// claimSwap takes the next epoch for the new process, in one transaction with the desired state that asked for it. When its answer does
// not come the log is asked; when that does not tell either the old process goes on, which is safe: commits of the epoch that is over are
// refused, and this node finds out.
func (i *instance) claimSwap(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, old, next *generation, saved Saved, p swapPlan) (arbiter.Register, error) {
	b := proto.CloneOf(body)
	b.Digest, b.ArtifactName, b.Version = next.digest, next.artifact, next.version
	b.Trigger, b.Cause, b.ClaimedUnixMs, b.Settled, b.ReturnedFrom = p.trigger, p.cause, i.sup.date(), false, ""
	b.Fallback = &componentsv1.Fallback{Digest: old.digest, ArtifactName: old.artifact, Version: old.version, Root: rootBytes(saved.Root), Seq: saved.Seq}
	b.Previous = &componentsv1.Previous{Digest: old.digest, ArtifactName: old.artifact, Version: old.version, Root: rootBytes(saved.Root), Back: p.back}
	if p.undo || old.digest == next.digest {
		b.Fallback = nil
	}
	if !p.again {
		b.Deaths = nil
	}
	data, err := proto.Marshal(b)
	if err != nil {
		return arbiter.Register{}, err
	}
	claim := &arbiter.ClaimRequest{Key: i.key, Expect: reg.Epoch, Nonce: i.sup.nonce(), Owner: i.sup.cfg.Self, Boot: i.sup.cfg.Boot, Body: data}
	if !p.root.IsZero() {
		claim.SetRoot, claim.Root, claim.Holders = true, p.root[:], p.kept
	}
	// From here on the caller's patience does not count: a claim that was sent has to be followed up.
	cctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), swapClaim)
	defer cancel()
	defer context.AfterFunc(i.sup.ctx, cancel)()
	left, _ := old.saver.point()
	claimed, err := i.claimBoth(cctx, claim, left, tokenIn(reg), p)
	if errors.Is(err, arbiter.ErrInDoubt) {
		rctx, rcancel := context.WithTimeout(i.sup.ctx, 2*time.Second)
		defer rcancel()
		now, ok, rerr := i.sup.cfg.Arbiter.Read(rctx, i.key)
		if rerr == nil && ok && now.Nonce == claim.Nonce {
			claimed, err = now, nil
		}
	}
	if err != nil {
		return claimed, fmt.Errorf("claim the next epoch: %w", err)
	}
	i.sup.adopt(claimed)
	return claimed, nil
}

// claimBoth claims in one transaction with the desired state that asked for it and the history that keeps what is left.
func (i *instance) claimBoth(ctx context.Context, claim *arbiter.ClaimRequest, left point, t components.Token, p swapPlan) (arbiter.Register, error) {
	req := arbiter.TxnRequest{Nonce: i.sup.nonce(), Then: []arbiter.Op{{Claim: claim}}}
	if p.app != nil {
		req.Compares = append(req.Compares, arbiter.Compare{Key: p.app.Key, Field: "revision", Equal: p.revision})
		req.Then = append(req.Then, arbiter.Op{Put: p.app})
	}
	if p.rest != nil {
		req.Compares = append(req.Compares, *p.rest)
	}
	if err := p.keep.with(&req, left, t, p.root); err != nil {
		return arbiter.Register{}, err
	}
	if len(req.Then) == 1 && len(req.Compares) == 0 {
		return i.sup.cfg.Arbiter.Claim(ctx, *claim)
	}
	res, err := i.sup.cfg.Arbiter.Txn(ctx, req)
	if err != nil {
		return arbiter.Register{}, err
	}
	if !res.Succeeded {
		return arbiter.Register{}, errors.New("the desired state, or the instance's owner, was changed meanwhile; try again")
	}
	for _, r := range res.Registers {
		i.sup.adopt(r) // the desired state, too: the local view may still show the one before
	}
	return res.Registers[0], nil
}

// quiesce holds new calls, waits for those under way and brings the process to a consistent point.
func (i *instance) quiesce(ctx context.Context, reason componentv1.QuiesceRequest_Reason) error {
	if err := i.mem().Hold("it is being replaced"); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, drainDeadline)
	defer cancel()
	if err := i.mem().Drain(ctx); err != nil {
		return fmt.Errorf("calls under way did not end within %s: %w", drainDeadline, err)
	}
	return i.gen.back.Quiesce(ctx, reason)
}

// resume takes a quiesced process back into service.
func (i *instance) resume(ctx context.Context, g *generation) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), drainDeadline)
	defer cancel()
	return g.back.Resume(ctx)
}

// flush commits everything the running process has done.
func (i *instance) flush(ctx context.Context) error {
	g := i.gen
	if g == nil || g.saver == nil || g.saver.cfg.mode == componentsv1.Durability_DURABILITY_NONE {
		return nil
	}
	return g.saver.Flush(ctx, false)
}

// lastHead is the head of what the generation has committed.
func (g *generation) lastHead() *chainHead {
	if g.saver == nil {
		return g.head
	}
	g.saver.mu.Lock()
	defer g.saver.mu.Unlock()
	return g.saver.head
}
