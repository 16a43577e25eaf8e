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
)

// headWithin bounds the reading of what the last checkpoint of an instance that does not run says about itself.
const headWithin = 2 * time.Second

// Keep is Checkpoint, and the checkpoint is kept in the history, under the id that is returned; "" where the component keeps none.
func (s *Supervisor) Keep(ctx context.Context, name string) (Saved, string, error) {
	saved, sv, err := s.checkpoint(ctx, name)
	if err != nil {
		return saved, "", err
	}
	i, err := s.get(name)
	if err != nil {
		return saved, "", err
	}
	p, ok := sv.point()
	if !ok {
		return saved, "", nil // it goes on alone: this is its branch's
	}
	e, err := i.hist.note(ctx, p, components.Token{Incarnation: sv.cfg.incarnation, Epoch: sv.cfg.epoch}, components.WhyByHand)
	switch {
	case err != nil:
		return p.saved, "", fmt.Errorf("checkpoint %d of %s is acknowledged, but not kept in its history: %w", p.saved.Seq, name, err)
	case e == nil:
		return p.saved, "", nil
	}
	return p.saved, components.CheckpointID(e.GetNumber()), nil
}

// Restore takes an instance of this node back to an earlier checkpoint, or to a stored branch, in the version that runs now where that can read it, else in the one that wrote it. It
// is one replace: calls are held, and what is left is kept in the history. other tells the desired state that goes with another version than the present one.
func (s *Supervisor) Restore(ctx context.Context, name string, at components.Moment, w Wish, other func(digest string) (Wish, error)) (Replaced, error) {
	return s.onInstance(ctx, name, func(ctx context.Context, i *instance, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective) (Replaced, error) {
		entry, err := FindEarlier(ctx, s.cfg.Arbiter, name, at)
		if err != nil {
			return Replaced{}, err
		}
		digest, err := i.reader(ctx, body, entry)
		if err != nil {
			return Replaced{}, err
		}
		w.Digest, w.Artifact, w.Version = digest, body.GetArtifactName(), body.GetVersion()
		if digest != body.GetDigest() {
			if w, err = other(digest); err != nil {
				return Replaced{}, err
			}
		}
		p := s.plan(w, body, hashFrom(entry.GetRoot()))
		p.back, p.why = true, components.WhyBeforeRestore
		if entry.IsBranch() {
			p.branch = entry.HistoryEntry
		}
		defer i.keepMeanwhile(p.root)()
		out, err := i.goTo(ctx, reg, body, eff, p)
		if err == nil {
			out.State = fmt.Sprintf("that of %s (checkpoint %d)", entry.Name, entry.GetSeq())
			s.cfg.Events.Publish(events.Event{
				Channel: "/apps/" + name, Type: "restored", Trigger: w.Trigger, Cause: w.Cause, Message: fmt.Sprintf("%s went back to %s", name, out.State),
				Fields: map[string]string{"checkpoint": entry.Name, "kept": out.Kept, "epoch": fmt.Sprint(out.Epoch)},
			})
		}
		return out, err
	})
}

// keepMeanwhile pins a root until nothing more than the register is needed to keep it.
func (i *instance) keepMeanwhile(root blobs.Hash) (done func()) {
	if root.IsZero() {
		return func() {}
	}
	name := "restore/" + i.name
	i.sup.cfg.Blobs.Pin(name, fetchWithin+historyPin, root)
	return func() { i.hist.pin(root); i.sup.cfg.Blobs.Unpin(name) }
}

// reader is the version that an earlier state is restored in.
func (i *instance) reader(ctx context.Context, body *componentsv1.InstanceBody, e Earlier) (digest string, err error) {
	desc, err := i.sup.cfg.Artifacts.Description(ctx, body.GetDigest())
	if err == nil && readsSchema(desc, e.GetSchema()) {
		return body.GetDigest(), nil
	}
	then, terr := i.sup.cfg.Artifacts.Description(ctx, e.GetDigest())
	switch {
	case terr != nil && err != nil:
		return "", err
	case terr != nil:
		return "", fmt.Errorf("version %s cannot read schema %d of %s, and version %s, which wrote it, cannot be had: %w", body.GetVersion(), e.GetSchema(),
			e.Name, e.GetVersion(), terr)
	case !readsSchema(then, e.GetSchema()):
		return "", fmt.Errorf("neither version %s nor %s can read schema %d of %s", body.GetVersion(), e.GetVersion(), e.GetSchema(), e.Name)
	}
	return e.GetDigest(), nil
}

// Undo returns to what was before the last swap, restore or undo. After a swap: to the version before, with today's state where that version can read it, else
// with the state it had. After a restore: to the state that was left.
func (s *Supervisor) Undo(ctx context.Context, name string, wish func(previous *componentsv1.Previous) (Wish, error)) (Replaced, error) {
	return s.onInstance(ctx, name, func(ctx context.Context, i *instance, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective) (Replaced, error) {
		prev := body.GetPrevious()
		if prev.GetDigest() == "" {
			return Replaced{}, fmt.Errorf("%s has nothing to return to: it was neither swapped nor restored", name)
		}
		w, err := wish(prev)
		if err != nil {
			return Replaced{}, err
		}
		root, err := i.undoRoot(ctx, body, prev)
		if err != nil {
			return Replaced{}, err
		}
		p := s.plan(w, body, root)
		p.undo, p.back, p.why = true, prev.GetBack(), components.WhyBeforeUndo
		defer i.keepMeanwhile(p.root)()
		out, err := i.goTo(ctx, reg, body, eff, p)
		switch {
		case err != nil:
		case root.IsZero():
			out.State = "today's"
		default:
			out.State = "that which it had with version " + prev.GetVersion()
		}
		return out, err
	})
}

// undoRoot is the state that an undo goes back to; zero: today's is carried over.
func (i *instance) undoRoot(ctx context.Context, body *componentsv1.InstanceBody, prev *componentsv1.Previous) (blobs.Hash, error) {
	root := hashFrom(prev.GetRoot())
	if prev.GetBack() {
		if root.IsZero() {
			return root, fmt.Errorf("%s had no state that could be returned to", i.name)
		}
		return root, nil
	}
	now, err := i.sup.cfg.Artifacts.Description(ctx, body.GetDigest())
	if err != nil {
		return blobs.Hash{}, err
	}
	then, err := i.sup.cfg.Artifacts.Description(ctx, prev.GetDigest())
	if err != nil {
		return blobs.Hash{}, err
	}
	if !now.GetState().GetStateful() || readsSchema(then, now.GetState().GetWritesSchema()) {
		return blobs.Hash{}, nil
	}
	return root, nil
}

// goTo carries a plan out, whether a process runs or not: a component that its state keeps from running can go back to another one.
func (i *instance) goTo(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective, p swapPlan) (Replaced, error) {
	delete(i.refused, p.digest)
	if i.running(reg) {
		return i.swap(ctx, reg, body, eff, p)
	}
	if i.gen != nil {
		if !i.gen.dead() {
			return Replaced{}, fmt.Errorf("%s changes its epoch just now; try again", i.name)
		}
		i.died()
	}
	if isBuiltin(body.GetDigest()) && body.GetDigest() != components.ExecDigest {
		return Replaced{}, fmt.Errorf("%s is not running (%s)", i.name, i.Info().State)
	}
	return i.atRest(ctx, reg, body, p)
}

// atRest gives an instance that does not run another version or state to start with.
func (i *instance) atRest(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, p swapPlan) (out Replaced, err error) {
	begin := time.Now()
	out = Replaced{From: body.GetVersion(), To: p.version}
	if p.kept, err = i.bringHere(ctx, p.root); err != nil {
		return out, err
	}
	now, err := i.settled(ctx, reg)
	if err == nil { // the local view lags with checkpoints
		now, _, err = i.sup.cfg.Arbiter.Read(ctx, i.key)
	}
	switch {
	case err != nil:
		return out, err
	case now.Epoch != reg.Epoch || now.Owner != i.sup.cfg.Self:
		i.sup.adopt(now)
		return out, fmt.Errorf("%s: %w", i.name, errOverEpoch)
	}
	left := i.leftAt(ctx, now, body)
	if p.keep, err = i.hist.open(ctx, p); err != nil {
		return out, err
	}
	defer p.keep.close()
	claimed, err := i.claimAtRest(ctx, now, body, left, p)
	if err != nil {
		return out, err
	}
	i.failures, i.notUntil, i.unfit = 0, time.Time{}, unfit{}
	out.Took, out.Epoch, out.Kept = time.Since(begin), claimed.Epoch, p.keep.id()
	return out, nil
}

// bringHere makes a root complete here and on its holders, and says who has it.
func (i *instance) bringHere(ctx context.Context, root blobs.Hash) ([]peer.ID, error) {
	if root.IsZero() {
		return nil, nil
	}
	if err := i.sup.fetch(ctx, root, i.key, nil); err != nil {
		return nil, err
	}
	to, w := i.holders()
	kept, err := i.sup.cfg.Blobs.Push(ctx, root, to, w)
	if err != nil {
		return nil, fmt.Errorf("copy the state of %s to its holders: %w", i.name, err)
	}
	return kept, nil
}

// leftAt is the last acknowledged checkpoint of an instance that does not run. What it says about itself may not be had; then its register has to do.
func (i *instance) leftAt(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody) point {
	root := hashFrom(reg.Root)
	p := point{
		saved: Saved{Seq: reg.Seq, Root: root}, keepers: reg.Holders,
		meta: &componentsv1.CheckpointMeta{Digest: body.GetDigest(), Version: body.GetVersion()},
	}
	if root.IsZero() {
		return p
	}
	ctx, cancel := context.WithTimeout(ctx, headWithin)
	defer cancel()
	err := i.sup.fetch(ctx, root, i.key, reg.Holders)
	var head *chainHead
	if err == nil {
		head, _, err = readHead(i.sup.cfg.Blobs, root)
	}
	if err != nil {
		i.sup.cfg.Log.Warn("the state that is left cannot be read", "instance", i.name, "seq", reg.Seq, "error", err)
		return p
	}
	p.meta, p.saved.Bytes, p.saved.Mark = head.meta, head.link.Bytes, head.meta.GetMark()
	return p
}

func (i *instance) claimAtRest(ctx context.Context, now arbiter.Register, body *componentsv1.InstanceBody, left point, p swapPlan) (arbiter.Register, error) {
	b := proto.CloneOf(body)
	b.Previous = &componentsv1.Previous{Digest: b.GetDigest(), ArtifactName: b.GetArtifactName(), Version: b.GetVersion(), Root: rootBytes(left.saved.Root), Back: p.back}
	if p.digest != b.GetDigest() {
		b.Digest, b.ArtifactName, b.Version = p.digest, p.artifact, p.version
	}
	b.Trigger, b.Cause, b.ClaimedUnixMs, b.Settled, b.ReturnedFrom, b.Fallback, b.Deaths = p.trigger, p.cause, i.sup.date(), false, "", nil, nil
	data, err := proto.Marshal(b)
	if err != nil {
		return arbiter.Register{}, err
	}
	claim := &arbiter.ClaimRequest{Key: i.key, Expect: now.Epoch, Nonce: i.sup.nonce(), Owner: i.sup.cfg.Self, Boot: i.sup.cfg.Boot, Body: data}
	if !p.root.IsZero() {
		claim.SetRoot, claim.Root, claim.Holders = true, p.root[:], p.kept
	}
	p.rest = &arbiter.Compare{Key: i.key, Field: "seq", Equal: now.Seq}
	claimed, err := i.claimBoth(ctx, claim, left, tokenIn(now), p)
	if errors.Is(err, arbiter.ErrInDoubt) {
		reg, ok, rerr := i.sup.cfg.Arbiter.Read(ctx, i.key)
		if rerr == nil && ok && reg.Nonce == claim.Nonce {
			claimed, err = reg, nil
		}
	}
	if err != nil {
		return claimed, fmt.Errorf("claim the next epoch: %w", err)
	}
	i.sup.adopt(claimed)
	return claimed, nil
}
