package supervisor

import (
	"context"
	"errors"
	"fmt"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
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
	// swapStart bounds the new version's Start while calls are held: a version that does not come up costs its callers this much, once.
	swapStart = time.Second
	// preCopyRounds and preCopyEnough end the copying before the freeze: when what changed meanwhile is small, or no longer shrinks.
	preCopyRounds = 5
	preCopyEnough = 64 << 10
)

// Replaced tells what a replace did.
type Replaced struct {
	From, To  string // version or node
	Pause     time.Duration
	Bytes     uint64
	CallsHeld uint64
	Took      time.Duration
	Epoch     uint64
}

// swapPlan is one wish to run another version on this node.
type swapPlan struct {
	digest, artifact, version string
	// overlay, when set, is committed in the same transaction as the new epoch, against this revision of the application.
	app      *arbiter.PutOp
	revision uint64
	trigger  string
	cause    string
	// root, when set, is the state to go back to (undo where the versions' schemas differ); else the running state is carried over.
	root blobs.Hash
	undo bool
}

// swap replaces the running process by one of another version with the same state: start, pre-copy, freeze, drain, last delta, commit,
// claim, switch, release. Until the claim any failure leaves the old process serving.
func (i *instance) swap(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective, p swapPlan) (Replaced, error) {
	begin := time.Now()
	old := i.gen
	out := Replaced{From: old.version, To: p.version}
	next, err := i.sup.launch(ctx, i.name, p.digest, eff, i.shell, func(components.State) {})
	if err != nil {
		return out, err
	}
	out.To = next.version
	keepNew := false
	defer func() {
		if !keepNew {
			i.sup.end(next, 0)
		}
	}()
	if old.stateful() && p.root.IsZero() && !i.sup.reads(next, old.desc.GetState().GetWritesSchema()) {
		return out, fmt.Errorf("%s@%s cannot read schema %d that %s@%s writes", next.artifact, next.version, old.desc.GetState().GetWritesSchema(), old.artifact, old.version)
	}
	carried, err := i.precopy(ctx, old, next, p)
	if err != nil {
		return out, err
	}
	pauseBegin := time.Now()
	claimed, tail, err := i.cutOver(ctx, reg, body, eff, old, next, carried.mark, p)
	if err != nil {
		err = fmt.Errorf("swap %s to %s: %w", i.name, next.version, err)
		if rerr := i.resume(ctx, old); rerr != nil {
			return out, errors.Join(err, rerr)
		}
		i.release()
		return out, err
	}
	keepNew = true
	old.stopSaver()
	next.saved = Saved{Seq: claimed.Seq, Mark: next.mark, Holders: claimed.Holders, At: time.Now()}
	if len(claimed.Root) == len(blobs.Hash{}) {
		next.saved.Root = blobs.Hash(claimed.Root)
	}
	next.head = old.lastHead()
	if !p.root.IsZero() {
		next.head, next.mark = carried.head, carried.mark
	}
	i.gen = next
	if next.desc.GetState().GetWritesSchema() != old.desc.GetState().GetWritesSchema() {
		next.head = nil // a chain has one schema: the next checkpoint is a base
	}
	out.CallsHeld = i.held()
	i.save(i.sup.ctx, next, claimed, eff)
	if err := i.serve(next, eff); err != nil {
		return out, fmt.Errorf("swap %s: open the gate to %s: %w", i.name, next.version, err)
	}
	out.Pause, out.Bytes = time.Since(pauseBegin), carried.bytes+tail
	out.Took, out.Epoch = time.Since(begin), claimed.Epoch
	i.note(next, eff)
	i.show(components.Running, "")
	i.sup.goes.Go(func() { i.sup.end(old, stopGrace) })
	i.sup.cfg.Events.Publish(events.Event{
		Channel: "/apps/" + i.name, Type: "swapped", Trigger: p.trigger, Cause: p.cause,
		Message: fmt.Sprintf("%s swapped from %s to %s in epoch %d, paused %.1f ms", i.name, out.From, out.To, claimed.Epoch, float64(out.Pause.Microseconds())/1000),
		Fields:  map[string]string{"from": out.From, "to": out.To, "pause_ms": fmt.Sprintf("%.1f", float64(out.Pause.Microseconds())/1000), "epoch": fmt.Sprint(claimed.Epoch)},
	})
	return out, nil
}

type copied struct {
	mark  uint64
	bytes uint64
	head  *chainHead
}

// precopy gives the new process the state while the old one serves.
func (i *instance) precopy(ctx context.Context, old, next *generation, p swapPlan) (copied, error) {
	if !old.stateful() || !next.stateful() {
		return copied{}, nil
	}
	if !p.root.IsZero() {
		if err := i.sup.fetch(ctx, p.root, arbiter.Register{Key: i.key}); err != nil {
			return copied{}, err
		}
		if err := i.sup.restore(ctx, next, p.root, blobs.Hash{}); err != nil {
			return copied{}, err
		}
		return copied{mark: next.mark, bytes: next.head.link.Bytes, head: next.head}, nil
	}
	var c copied
	last := uint64(0)
	for round := range preCopyRounds {
		n, err := carry(ctx, old, next, c.mark)
		if err != nil {
			return c, fmt.Errorf("copy the state of %s: %w", i.name, err)
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

// carry streams what changed after a mark from one process to the other and returns how many bytes that were.
func carry(ctx context.Context, from, to *generation, since uint64) (uint64, error) {
	n, mark, err := membrane.CopyState(ctx, from.back, to.back, since)
	if err == nil {
		to.mark = mark
	}
	return n, err
}

// cutOver is the pause: calls are held from before it until after it.
func (i *instance) cutOver(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective, old, next *generation, mark uint64, p swapPlan) (arbiter.Register, uint64, error) {
	if err := i.quiesce(ctx, reasonSwap); err != nil {
		return arbiter.Register{}, 0, err
	}
	if err := i.flush(ctx); err != nil {
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
		if tail, err = carry(ctx, old, next, since); err != nil {
			return arbiter.Register{}, 0, fmt.Errorf("copy the last changes: %w", err)
		}
	}
	token := components.Token{Incarnation: reg.Incarnation, Epoch: reg.Epoch + 1}
	if err := next.start(ctx, i.shell, token, eff, old.stateful(), swapStart); err != nil {
		return arbiter.Register{}, 0, err
	}
	claimed, err := i.claimSwap(ctx, reg, body, old, next, saved, p)
	return claimed, tail, err
}

// claimSwap takes the next epoch for the new process, in one transaction with the desired state that asked for it.
func (i *instance) claimSwap(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, old, next *generation, saved Saved, p swapPlan) (arbiter.Register, error) {
	b := proto.CloneOf(body)
	b.Digest, b.ArtifactName, b.Version = next.digest, next.artifact, next.version
	b.Trigger, b.Cause, b.ClaimedUnixMs, b.Settled, b.Deaths = p.trigger, p.cause, uint64(time.Now().UnixMilli()), false, nil
	b.Fallback = &componentsv1.Fallback{Digest: old.digest, ArtifactName: old.artifact, Version: old.version, Root: saved.Root[:], Seq: saved.Seq}
	b.Previous = &componentsv1.Previous{Digest: old.digest, ArtifactName: old.artifact, Version: old.version, Root: saved.Root[:]}
	data, err := proto.Marshal(b)
	if err != nil {
		return arbiter.Register{}, err
	}
	claim := &arbiter.ClaimRequest{Key: i.key, Expect: reg.Epoch, Nonce: i.sup.nonce(), Owner: i.sup.cfg.Self, Boot: i.sup.cfg.Boot, Body: data}
	if !p.root.IsZero() {
		claim.SetRoot, claim.Root = true, p.root[:]
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if p.app == nil {
		claimed, err := i.sup.cfg.Arbiter.Claim(ctx, *claim)
		if err != nil {
			return claimed, fmt.Errorf("claim the next epoch: %w", err)
		}
		i.sup.adopt(claimed)
		return claimed, nil
	}
	res, err := i.sup.cfg.Arbiter.Txn(ctx, arbiter.TxnRequest{
		Nonce: i.sup.nonce(), Compares: []arbiter.Compare{{Key: p.app.Key, Field: "revision", Equal: p.revision}},
		Then: []arbiter.Op{{Claim: claim}, {Put: p.app}},
	})
	if err != nil {
		return arbiter.Register{}, fmt.Errorf("claim the next epoch: %w", err)
	}
	if !res.Succeeded {
		return arbiter.Register{}, errors.New("the desired state was changed meanwhile; try again")
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
