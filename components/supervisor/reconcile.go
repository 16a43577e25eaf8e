package supervisor

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/coppice-project/coppice/internal/planted"
	"github.com/coppice-project/coppice/internal/unison"
)

// What becomes of a branch (notes: consistency §6). It is stored in the cluster first, whatever the policy: its pages on the instance's holders, and a
// register that names it. Then the owner is asked to bring it together with its own state, if the policy says so; what it decides it commits in one
// transaction with the branch's register, so it happens once.

const (
	protoReconcile protocol.ID = "/coppice/reconcile/1"

	// reconcileEvery is how often branches that could not be reconciled are tried again.
	reconcileEvery = time.Second
	// storeWithin bounds the storing of a branch, reconcileWithin what the owner does with it.
	storeWithin     = time.Minute
	reconcileWithin = time.Minute
	// maxBranches is how many branches of an instance are kept; the oldest go.
	maxBranches = 16
)

// Outcomes of a branch.
const (
	outcomeKept   = "kept"   // it is stored, and nothing of it is in the instance's state
	outcomeMerged = "merged" // the component has merged it
	outcomeNewest = "newest" // it became the instance's state
)

func (s *Supervisor) handleReconcile() {
	if s.cfg.Peers != nil {
		peers.ServeCalls(s.cfg.Peers, protoReconcile, func() *componentsv1.ReconcileRequest { return &componentsv1.ReconcileRequest{} }, s.serveReconcile)
	}
}

// reconcileSoon has ended branches looked after.
func (s *Supervisor) reconcileSoon() {
	select {
	case s.reconciles <- struct{}{}:
	default:
	}
}

// keepReconciling looks after the branches of this node.
func (s *Supervisor) keepReconciling(ctx context.Context) {
	tick := unison.New(reconcileEvery, string(s.cfg.Self))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.reconciles:
		case <-tick.C:
			tick.Next()
		}
		for _, b := range s.Branches() {
			if !s.inTouch() || ctx.Err() != nil {
				break
			}
			if err := s.reconcile(ctx, b); err != nil && ctx.Err() == nil {
				s.cfg.Log.Warn("a branch is not reconciled yet; it is tried again", "instance", b.GetInstance(), "epoch", b.GetEpoch(), "error", err)
			}
		}
	}
}

// reconcile brings one branch to its end.
func (s *Supervisor) reconcile(ctx context.Context, b *componentsv1.Branch) error {
	if !b.GetEnded() {
		reg, ok := s.register(components.InstanceRegister(b.GetInstance()))
		if _, err := s.get(b.GetInstance()); err == nil || ok && reg.Owner == s.cfg.Self {
			return nil // its actor has it
		}
		b.Ended = true
		if err := s.saveBranch(b); err != nil {
			return err
		}
	}
	key, err := s.storeBranch(ctx, b)
	if err != nil {
		return err
	}
	if s.rule(b) != components.KeepMajority {
		if err := s.askOwner(ctx, b, key); err != nil {
			return err
		}
	}
	s.dropBranch(b)
	return nil
}

// rule is how the instance's branches are reconciled now.
func (s *Supervisor) rule(b *componentsv1.Branch) string {
	t, err := components.ParseTarget(b.GetInstance())
	if err != nil {
		return components.KeepMajority
	}
	eff, err := s.effective(components.ComponentKey(t.Application, t.Component))
	if err != nil || eff == nil || !eff.Keeps() {
		return components.KeepMajority
	}
	return eff.Reconcile
}

// storeBranch makes the branch a register of the cluster and its pages the holders'. Repeated it finds what it stored.
func (s *Supervisor) storeBranch(ctx context.Context, b *componentsv1.Branch) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, storeWithin)
	defer cancel()
	if b.GetNumber() == 0 {
		b.Number = s.freeNumber(b)
		if err := s.saveBranch(b); err != nil {
			return "", err
		}
	}
	root := hashFrom(b.GetRoot())
	for {
		key := components.BranchRegister(b.GetInstance(), b.GetNodeName(), b.GetNumber())
		reg, there, err := s.cfg.Arbiter.Read(ctx, key)
		switch {
		case err != nil:
			return "", err
		case there && hashFrom(reg.Root) == root:
			return key, nil
		case there: // another one's number
			b.Number++
			if err := s.saveBranch(b); err != nil {
				return "", err
			}
			continue
		}
		to, w := s.holdersOf(components.InstanceRegister(b.GetInstance()))
		kept, err := s.cfg.Blobs.Push(ctx, root, to, w)
		if err != nil {
			return "", fmt.Errorf("copy the branch of %s to its holders: %w", b.GetInstance(), err)
		}
		stored := proto.CloneOf(b)
		if s.rule(b) == components.KeepMajority {
			stored.Outcome, stored.Reason = outcomeKept, "reconcile: keep_majority"
		}
		ops, gone, err := s.storeOps(key, stored, kept)
		if err != nil {
			return "", err
		}
		res, err := s.cfg.Arbiter.Txn(ctx, arbiter.TxnRequest{Nonce: s.nonce(), Compares: []arbiter.Compare{{Key: key, Field: "exists", Equal: 0}}, Then: ops})
		if err != nil {
			return "", err
		}
		if !res.Succeeded {
			continue
		}
		s.tellDropped(b.GetInstance(), gone, res.Registers)
		name := components.BranchName(b.GetInstance(), b.GetNodeName(), b.GetNumber())
		s.cfg.Events.Publish(events.Event{
			Channel: "/apps/" + b.GetInstance(), Type: "branch", Cause: fmt.Sprintf("%s went on without the arbiter in epoch %d", b.GetNodeName(), b.GetEpoch()),
			Message: fmt.Sprintf("what %s did alone on %s is stored as %s (%d checkpoints after %d)", b.GetInstance(), b.GetNodeName(), name, b.GetCommits(), b.GetBaseSeq()),
			Fields:  map[string]string{"branch": name, "commits": fmt.Sprint(b.GetCommits()), "base_seq": fmt.Sprint(b.GetBaseSeq())},
		})
		return key, nil
	}
}

// storeOps make the register of a branch, which kept have (empty: nobody is named yet, repairBranch looks after that), and take away the oldest of the instance's, gone, when there are too many.
func (s *Supervisor) storeOps(key string, b *componentsv1.Branch, kept []peer.ID) (ops []arbiter.Op, gone []storedBranch, err error) {
	b.StoredUnixMs = s.date()
	data, err := proto.Marshal(b)
	if err != nil {
		return nil, nil, err
	}
	ops = []arbiter.Op{{Claim: &arbiter.ClaimRequest{
		Key: key, Nonce: s.nonce(), Owner: s.cfg.Self, Boot: s.cfg.Boot, Body: data, SetRoot: true, Root: b.GetRoot(), Holders: kept,
	}}}
	have := storedBranches(s.cfg.Arbiter, b.GetInstance())
	gone = have[:max(0, len(have)-maxBranches+1)]
	for _, old := range gone {
		ops = append(ops, arbiter.Op{Delete: old.reg.Key})
	}
	return ops, gone, nil
}

// tellDropped tells of branches that were deleted for room. done are the registers of the transaction: somebody else may have deleted one before.
func (s *Supervisor) tellDropped(instance string, gone []storedBranch, done []arbiter.Register) {
	for _, b := range gone {
		if !slices.ContainsFunc(done, func(r arbiter.Register) bool { return r.Key == b.reg.Key && r.Deleted }) {
			continue
		}
		e := b.earlier()
		s.cfg.Events.Publish(events.Event{
			Channel: "/apps/" + instance, Type: "branch-dropped", Cause: fmt.Sprintf("%d branches of an instance are kept", maxBranches),
			Message: fmt.Sprintf("the oldest branch of %s, %s with %d checkpoints of %s, is deleted", instance, e.Name, b.GetCommits(),
				time.UnixMilli(int64(b.GetUntilUnixMs())).UTC().Format(time.RFC3339)),
			Fields: map[string]string{"branch": instance + e.Name, "outcome": b.GetOutcome(), "root": fmt.Sprintf("%x", b.GetRoot())},
		})
	}
}

func (s *Supervisor) freeNumber(b *componentsv1.Branch) uint32 {
	n := uint32(0)
	for _, reg := range s.cfg.Arbiter.List(components.BranchesOf(b.GetInstance())) {
		var other componentsv1.Branch
		if proto.Unmarshal(reg.Body, &other) == nil && other.GetNodeName() == b.GetNodeName() {
			n = max(n, other.GetNumber())
		}
	}
	return n + 1
}

// askOwner has the instance's owner decide about a stored branch.
func (s *Supervisor) askOwner(ctx context.Context, b *componentsv1.Branch, key string) error {
	reg, ok := s.register(components.InstanceRegister(b.GetInstance()))
	if !ok {
		return nil // nothing is left to reconcile with
	}
	req := &componentsv1.ReconcileRequest{Instance: b.GetInstance(), Branch: key}
	ctx, cancel := context.WithTimeout(ctx, reconcileWithin)
	defer cancel()
	var reply *componentsv1.ReconcileReply
	var err error
	switch reg.Owner {
	case "":
		err = errors.New("it has no owner now")
	case s.cfg.Self:
		reply, err = s.serveReconcile(ctx, s.cfg.Self, req)
	default:
		reply = &componentsv1.ReconcileReply{}
		err = s.cfg.Caller.Call(ctx, reg.Owner, protoReconcile, req, reply)
	}
	if err != nil {
		return fmt.Errorf("reconcile %s with its owner %s: %w", b.GetInstance(), s.nodeName(reg.Owner), err)
	}
	s.cfg.Log.Info("a branch is reconciled", "instance", b.GetInstance(), "branch", key, "outcome", reply.GetOutcome(), "reason", reply.GetReason())
	return nil
}

// serveReconcile is asked by the node that a branch is from.
func (s *Supervisor) serveReconcile(ctx context.Context, from peer.ID, req *componentsv1.ReconcileRequest) (*componentsv1.ReconcileReply, error) {
	i, err := s.get(req.GetInstance())
	if err != nil {
		return nil, peers.Fail(wirev1.Failure_REFUSED, "%v", err)
	}
	var out *componentsv1.ReconcileReply
	var ferr error
	if err := i.do(ctx, func(ctx context.Context) { out, ferr = i.reconcile(ctx, from, req.GetBranch()) }); err != nil {
		return nil, peers.Fail(wirev1.Failure_REFUSED, "%v", err)
	}
	i.poke()
	if ferr != nil {
		return nil, peers.Fail(wirev1.Failure_REFUSED, "%v", ferr)
	}
	return out, nil
}

// reconcile decides about a branch of this node's instance, once.
func (i *instance) reconcile(ctx context.Context, from peer.ID, key string) (*componentsv1.ReconcileReply, error) {
	s := i.sup
	reg, ok := s.register(i.key)
	if !ok || reg.Owner != s.cfg.Self || reg.Boot != s.cfg.Boot || i.gen == nil || i.gen.dead() || tokenIn(reg).Compare(i.gen.token) != 0 {
		return nil, fmt.Errorf("%s does not run here now", i.name)
	}
	stored, there, err := s.cfg.Arbiter.Read(ctx, key)
	if err != nil {
		return nil, err
	}
	var b componentsv1.Branch
	if !there || proto.Unmarshal(stored.Body, &b) != nil {
		return &componentsv1.ReconcileReply{Outcome: outcomeKept, Reason: "the branch is not there any more"}, nil
	}
	if b.GetOutcome() != "" && !planted.Bug("branch-decided-twice") {
		return &componentsv1.ReconcileReply{Outcome: b.GetOutcome(), Reason: b.GetReason()}, nil
	}
	var body componentsv1.InstanceBody
	if err := proto.Unmarshal(reg.Body, &body); err != nil {
		return nil, err
	}
	r := &reconciling{i: i, reg: reg, body: &body, stored: stored, branch: &b, from: from}
	if rule := s.rule(&b); rule == components.ReconMerge {
		err = r.merge(ctx)
	} else {
		err = r.newest(ctx, rule)
	}
	if no, ok := errors.AsType[*noMergeError](err); ok {
		err = r.decide(ctx, outcomeKept, no.Error())
	}
	if err != nil {
		return nil, err
	}
	return &componentsv1.ReconcileReply{Outcome: r.branch.GetOutcome(), Reason: r.branch.GetReason()}, nil
}

// reconciling is one branch being brought together with the running instance.
type reconciling struct {
	i      *instance
	reg    arbiter.Register
	body   *componentsv1.InstanceBody
	stored arbiter.Register // of the branch
	branch *componentsv1.Branch
	from   peer.ID
}

// noMergeError says that trying again does not help: the branch stays beside.
type noMergeError struct{ why error }

func (e *noMergeError) Error() string {
	return "it cannot become the instance's state: " + e.why.Error()
}
func (e *noMergeError) Unwrap() error { return e.why }

// merge has the component bring both states together.
func (r *reconciling) merge(ctx context.Context) error {
	i := r.i
	base, theirs := hashFrom(r.branch.GetBaseRoot()), hashFrom(r.branch.GetRoot())
	for _, root := range []blobs.Hash{base, theirs} {
		if err := i.sup.fetch(ctx, root, i.key, append([]peer.ID{r.from}, r.stored.Holders...)); err != nil {
			return err
		}
	}
	if err := i.quiesce(ctx, reasonFreeze); err != nil {
		return i.goOn(ctx, err)
	}
	if err := errors.Join(i.flush(ctx), i.together()); err != nil {
		return i.goOn(ctx, err)
	}
	saved, _ := i.gen.saver.Saved()
	head, err := i.merged(ctx, base, saved.Root, theirs)
	if err != nil {
		return i.goOn(ctx, err)
	}
	if err := i.proves(ctx, r.body.GetDigest(), head.link.Hash); err != nil {
		return i.goOn(ctx, err)
	}
	why := fmt.Sprintf("%d checkpoints after %d and %d after it here", r.branch.GetCommits(), r.branch.GetBaseSeq(), saved.Seq-min(saved.Seq, r.branch.GetBaseSeq()))
	if err := r.take(ctx, head.link.Hash, outcomeMerged, why, nil); err != nil {
		return i.goOn(ctx, err)
	}
	i.relaunch("its state was merged with a branch")
	return nil
}

// newest has the state of more checkpoints go on; the other is stored beside.
func (r *reconciling) newest(ctx context.Context, rule string) error {
	i := r.i
	theirs := r.branch.GetBaseSeq() + r.branch.GetCommits()
	if rule != components.ReconNewest {
		return r.decide(ctx, outcomeKept, "reconcile: "+rule)
	}
	if err := i.quiesce(ctx, reasonFreeze); err != nil {
		return i.goOn(ctx, err)
	}
	if err := errors.Join(i.flush(ctx), i.together()); err != nil {
		return i.goOn(ctx, err)
	}
	saved, _ := i.gen.saver.Saved()
	if theirs <= saved.Seq {
		err := r.decide(ctx, outcomeKept, fmt.Sprintf("the owner's state is at checkpoint %d, the branch at %d", saved.Seq, theirs))
		return i.goOn(ctx, err)
	}
	root := hashFrom(r.branch.GetRoot())
	if err := i.sup.fetch(ctx, root, i.key, append([]peer.ID{r.from}, r.stored.Holders...)); err != nil {
		return i.goOn(ctx, err)
	}
	if err := i.proves(ctx, r.body.GetDigest(), root); err != nil {
		return i.goOn(ctx, err)
	}
	ours := &componentsv1.Branch{
		Format: 1, Instance: i.name, Node: i.sup.cfg.Self.String(), NodeName: i.sup.cfg.Name, Incarnation: r.reg.Incarnation, Epoch: r.reg.Epoch, Ended: true,
		BaseSeq: r.branch.GetBaseSeq(), BaseRoot: r.branch.GetBaseRoot(), Root: rootBytes(saved.Root), Commits: saved.Seq - min(saved.Seq, r.branch.GetBaseSeq()),
		Mark: saved.Mark, Digest: i.gen.digest, Version: i.gen.version, UntilUnixMs: i.sup.date(), Bytes: saved.Bytes,
		Schema:  i.gen.desc.GetState().GetWritesSchema(),
		Outcome: outcomeKept, Reason: fmt.Sprintf("the branch of %s has more checkpoints", r.branch.GetNodeName()),
	}
	ours.Number = i.sup.freeNumber(ours)
	if err := r.take(ctx, root, outcomeNewest, fmt.Sprintf("%d checkpoints, the owner's state had %d", theirs, saved.Seq), ours); err != nil {
		return i.goOn(ctx, err)
	}
	i.relaunch("the state of a branch is newer")
	return nil
}

// proves has a process of the running version take a state, before that becomes the only one: a state that cannot be restored would end the instance.
func (i *instance) proves(ctx context.Context, digest string, root blobs.Hash) error {
	reg, ok := i.sup.register(i.key)
	var body componentsv1.InstanceBody
	if !ok || proto.Unmarshal(reg.Body, &body) != nil {
		return ErrNotHere
	}
	eff, err := i.sup.effective(body.GetComponent())
	if err != nil || eff == nil {
		return ErrNotHere
	}
	g, err := i.sup.launch(ctx, i.name, digest, eff, i.shell, func(components.State) {})
	if err != nil {
		return err
	}
	defer i.sup.end(i.shell, g, 0)
	if err := i.sup.restore(ctx, g, root, blobs.Hash{}); err != nil {
		if ctx.Err() != nil || g.dead() {
			return err
		}
		return &noMergeError{err}
	}
	return nil
}

// decide records what became of the branch where the instance's state stays as it is.
func (r *reconciling) decide(ctx context.Context, outcome, why string) error {
	data, err := r.outcome(outcome, why)
	if err != nil {
		return err
	}
	res, err := r.i.sup.cfg.Arbiter.Txn(ctx, arbiter.TxnRequest{
		Nonce: r.i.sup.nonce(), Compares: []arbiter.Compare{{Key: r.stored.Key, Field: "revision", Equal: r.stored.Revision}},
		Then: []arbiter.Op{{Put: &arbiter.PutOp{Key: r.stored.Key, Body: data}}},
	})
	if err == nil && !res.Succeeded {
		err = errors.New("the branch has changed meanwhile")
	}
	return err
}

func (r *reconciling) outcome(outcome, why string) ([]byte, error) {
	r.branch.Outcome, r.branch.Reason = outcome, why
	return proto.Marshal(r.branch)
}

// take makes root the instance's next checkpoint, in its next epoch, in one transaction with the branch's outcome. ours, when set, is stored as a branch.
func (r *reconciling) take(ctx context.Context, root blobs.Hash, outcome, why string, ours *componentsv1.Branch) error {
	i := r.i
	to, w := i.holders()
	kept, err := i.sup.cfg.Blobs.Push(ctx, root, to, w)
	if err != nil {
		return fmt.Errorf("copy the reconciled state of %s to its holders: %w", i.name, err)
	}
	next := proto.CloneOf(r.body)
	next.Trigger, next.Cause, next.ClaimedUnixMs = "neighbour", fmt.Sprintf("the branch of %s: %s", r.branch.GetNodeName(), outcome), r.i.sup.date()
	next.Settled, next.Fallback = false, nil
	body, err := proto.Marshal(next)
	if err != nil {
		return err
	}
	decided, err := r.outcome(outcome, why)
	if err != nil {
		return err
	}
	ops := []arbiter.Op{
		{Claim: &arbiter.ClaimRequest{
			Key: i.key, Expect: r.reg.Epoch, Nonce: i.sup.nonce(), Owner: i.sup.cfg.Self, Boot: i.sup.cfg.Boot, Body: body, SetRoot: true, Root: root[:],
			Holders: kept,
		}},
		{Put: &arbiter.PutOp{Key: r.stored.Key, Body: decided}},
	}
	if ours != nil {
		more, _, err := i.sup.storeOps(components.BranchRegister(ours.GetInstance(), ours.GetNodeName(), ours.GetNumber()), ours, nil)
		if err != nil {
			return err
		}
		ops = append(ops, more[:1]...)
	}
	res, err := i.sup.cfg.Arbiter.Txn(ctx, arbiter.TxnRequest{
		Nonce: i.sup.nonce(), Then: ops, Compares: []arbiter.Compare{
			{Key: i.key, Field: "revision", Equal: r.reg.Revision}, {Key: r.stored.Key, Field: "revision", Equal: r.stored.Revision},
		},
	})
	if err != nil {
		return fmt.Errorf("commit the reconciled state of %s: %w", i.name, err)
	}
	if !res.Succeeded {
		return fmt.Errorf("commit the reconciled state of %s: it, or the branch, has changed meanwhile", i.name)
	}
	for _, reg := range res.Registers {
		if reg.Key == i.key {
			i.sup.adopt(reg)
		}
	}
	i.sup.cfg.Events.Publish(events.Event{
		Channel: "/apps/" + i.name, Type: "reconciled", Cause: fmt.Sprintf("the cut between %s and %s is over", r.branch.GetNodeName(), i.sup.cfg.Name),
		Message: fmt.Sprintf("%s and its branch of %s: %s (%s)", i.name, r.branch.GetNodeName(), outcome, why),
		Fields:  map[string]string{"outcome": outcome, "branch": strings.TrimPrefix(r.stored.Key, components.BranchPrefix)},
	})
	return nil
}
