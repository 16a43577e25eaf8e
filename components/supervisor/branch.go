package supervisor

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
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

// on_partition: keep (notes: consistency §1 G6, §6). An owner that has lost touch with the arbiter goes on. What it saves is a branch: the chain of its
// checkpoints goes on from the last acknowledged one, on this node's disk, and a file says where it stands. If its process dies, or the whole node, it is
// started again here, from the branch, in the epoch that it owned. In touch again, the branch is committed as the next checkpoint when nobody has claimed
// meanwhile (rejoin), and else it ends and is reconciled with what the owner has (reconcile.go).

const (
	// branchDir holds one file per branch.
	branchDir = ".branches"
	// autonomyAfter is how long a node that has just started waits for the arbiter before it goes on without it.
	autonomyAfter = 5 * time.Second
	// aloneLook is how often an instance that goes on alone looks whether it still is.
	aloneLook = 100 * time.Millisecond
	// rejoinWithin bounds one try to commit a branch.
	rejoinWithin = 15 * time.Second
	// aloneStart bounds a start from local state: there is nobody to fetch pages from.
	aloneStart = 30 * time.Second
)

// CutOff says whether this node has lost touch with the arbiter: nothing can be decided here.
func (s *Supervisor) CutOff() bool { return s.lease.cutOff() }

// cutOff: it was not heard for outOfTouch, or never since this process started.
func (l *lease) cutOff() bool {
	away := l.touch()
	return away > l.bears.outOfTouch || away < 0 && l.boot()-l.begun > autonomyAfter
}

// inTouch says whether the arbiter is heard and what the log says is known: what lies between this and CutOff is not decided upon.
func (s *Supervisor) inTouch() bool {
	away := s.lease.touch()
	return s.lease.holds() && away >= 0 && away < s.lease.bears.outOfTouch
}

// branchKey names a branch by its instance and the ownership that it belongs to.
func branchKey(instance string, t components.Token) string {
	return fmt.Sprintf("%s %d.%d", instance, t.Incarnation, t.Epoch)
}

func keyOfBranch(b *componentsv1.Branch) string {
	return branchKey(b.GetInstance(), components.Token{Incarnation: b.GetIncarnation(), Epoch: b.GetEpoch()})
}

// loadBranches reads the branches that an earlier process of this node left.
func (s *Supervisor) loadBranches() {
	dir := filepath.Join(s.cfg.DataDir, branchDir)
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		s.cfg.Log.Error("branches of instances that went on without the arbiter could not be read", "folder", dir, "error", err)
	}
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".branch") {
			continue
		}
		var b componentsv1.Branch
		data, err := os.ReadFile(filepath.Join(dir, e.Name()))
		if err == nil {
			err = proto.Unmarshal(data, &b)
		}
		if err != nil {
			s.cfg.Log.Error("a branch could not be read; it is left where it is", "file", e.Name(), "error", err)
			continue
		}
		s.mu.Lock()
		s.branches[keyOfBranch(&b)] = &b
		s.mu.Unlock()
	}
}

// saveBranch makes a branch's record durable.
func (s *Supervisor) saveBranch(b *componentsv1.Branch) error {
	data, err := proto.Marshal(b)
	if err == nil {
		err = writeDurably(s.branchFile(b), data)
	}
	if err != nil {
		return fmt.Errorf("save the branch of %s: %w", b.GetInstance(), err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.branches[keyOfBranch(b)] = proto.CloneOf(b)
	return nil
}

// dropBranch forgets a branch: it is committed, or stored in the cluster.
func (s *Supervisor) dropBranch(b *componentsv1.Branch) {
	if err := os.Remove(s.branchFile(b)); err != nil && !errors.Is(err, os.ErrNotExist) {
		s.cfg.Log.Warn("the file of a branch", "error", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.branches, keyOfBranch(b))
}

func (s *Supervisor) branchFile(b *componentsv1.Branch) string {
	return filepath.Join(s.cfg.DataDir, branchDir, fmt.Sprintf("%s.%d.%d.branch", fileName(b.GetInstance()), b.GetIncarnation(), b.GetEpoch()))
}

// writeDurably replaces a file: after a crash it is the old one or the new one.
func writeDurably(path string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(path), ".new-*")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// branch returns a copy of an ownership's branch; nil: there is none.
func (s *Supervisor) branch(instance string, t components.Token) *componentsv1.Branch {
	s.mu.Lock()
	defer s.mu.Unlock()
	if b := s.branches[branchKey(instance, t)]; b != nil {
		return proto.CloneOf(b)
	}
	return nil
}

// Branches lists the branches on this node that are not stored in the cluster yet.
func (s *Supervisor) Branches() []*componentsv1.Branch {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := make([]*componentsv1.Branch, 0, len(s.branches))
	for _, b := range s.branches {
		out = append(out, proto.CloneOf(b))
	}
	return out
}

// openBranch is the instance's branch that has not ended; nil: none.
func (i *instance) openBranch() *componentsv1.Branch {
	for _, b := range i.sup.Branches() {
		if b.GetInstance() == i.name && !b.GetEnded() {
			return b
		}
	}
	return nil
}

// together fails while the instance has an open branch: a process that has more than the log knows must not be taken into the next epoch by anything but
// rejoin, for the branch would come on top of what it has.
func (i *instance) together() error {
	if i.openBranch() != nil {
		return fmt.Errorf("%s: %w", i.name, ErrBranch)
	}
	return nil
}

// branched makes a checkpoint durable that the arbiter cannot be told of: it is the branch's newest. before is what was acknowledged last.
func (i *instance) branched(g *generation, head *chainHead, before Saved) error {
	t, now := g.token, i.sup.date()
	b := i.sup.branch(i.name, t)
	first := b == nil
	if first {
		b = &componentsv1.Branch{
			Format: 1, Instance: i.name, Node: i.sup.cfg.Self.String(), NodeName: i.sup.cfg.Name, Incarnation: t.Incarnation, Epoch: t.Epoch,
			BaseSeq: before.Seq, BaseRoot: rootBytes(before.Root), SinceUnixMs: now, Recalled: g.recalled,
		}
	}
	b.Root, b.Commits, b.Mark = head.link.Hash[:], b.GetCommits()+1, head.meta.GetMark()
	b.Digest, b.Version, b.UntilUnixMs = g.digest, g.version, now
	b.Schema, b.Bytes = head.meta.GetSchema(), head.link.Bytes
	if err := i.sup.saveBranch(b); err != nil {
		return err
	}
	if first {
		i.sup.cfg.Events.Publish(events.Event{
			Channel: "/apps/" + i.name, Type: "branched", Cause: "the arbiter is out of reach",
			Message: fmt.Sprintf("%s goes on without the arbiter on %s: what it does from checkpoint %d on is a branch", i.name, i.sup.cfg.Name, before.Seq),
			Fields:  map[string]string{"epoch": fmt.Sprint(t.Epoch), "base_seq": fmt.Sprint(before.Seq)},
		})
	}
	return nil
}

// goesAlone says whether the instance goes on although nothing can be decided here, and as what.
func (i *instance) goesAlone(reg arbiter.Register, body *componentsv1.InstanceBody) (*components.Effective, bool) {
	if !i.sup.owns(reg) || body.GetQuarantined() || body.GetLeased() || !i.sup.CutOff() || i.sup.paused() {
		return nil, false
	}
	eff, err := i.sup.effective(body.GetComponent())
	if err != nil || surplus(eff, body) || !eff.Keeps() || eff.Stopped {
		return nil, false
	}
	return eff, true
}

// untilAlone is the time until the instance goes on without the arbiter: a node that has just started asks that for what it owned, and waits for no answer once
// it is known to be cut off. What it asked may be carried out later all the same; then its branch has another rival, itself.
func (i *instance) untilAlone(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody) (context.Context, func()) {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(aloneLook)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			if _, yes := i.goesAlone(reg, body); yes {
				cancel()
			}
		}
	}()
	return ctx, func() {
		cancel()
		<-ended
	}
}

// alone keeps the instance running without the arbiter: nothing is claimed, committed or changed.
func (i *instance) alone(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective) time.Duration {
	i.sup.service(i.name).keeps.Store(true)
	if g := i.gen; g != nil {
		i.mu.Lock()
		h := i.hung
		i.mu.Unlock()
		_, over := g.saver.over()
		switch {
		case g.dead():
			i.died()
			return time.Millisecond
		case over: // it was told something just before the arbiter went out of reach
			return i.relaunch("it is not saved any more")
		case h != nil && h.process == g.back && i.hangs(ctx, h):
			return time.Millisecond
		}
		if !eff.Frozen && !i.quiet {
			i.show(components.Running, "the arbiter is out of reach: it goes on alone, and what it does from here on is a branch")
		}
		return aloneLook
	}
	if wait := time.Until(i.notUntil); wait > 0 {
		return min(wait, aloneLook)
	}
	sctx, cancel := context.WithTimeout(ctx, aloneStart)
	defer cancel()
	start := time.Now()
	sctx, stop := i.during(sctx, reg)
	err := i.launchEpoch(sctx, reg, body, eff)
	stop()
	if err != nil {
		if ctx.Err() != nil {
			return 0
		}
		i.failures++
		i.notUntil = time.Now().Add(backoff(i.failures))
		i.sup.cfg.Log.Warn("start without the arbiter failed", "instance", i.name, "failures", i.failures, "error", err)
		i.show(components.Failed, fmt.Sprintf("the arbiter is out of reach, and from what is here it does not start: %v", err))
		return aloneLook
	}
	i.show(components.Running, "the arbiter is out of reach: it was started from what is on this node, and goes on as a branch")
	i.sup.cfg.Events.Publish(events.Event{
		Channel: "/apps/" + i.name, Type: "running", Trigger: "crash", Cause: "the arbiter is out of reach",
		Message: fmt.Sprintf("%s runs alone on %s in epoch %d, from what is on that node", i.name, i.sup.cfg.Name, reg.Epoch),
		Fields:  map[string]string{"epoch": fmt.Sprint(reg.Epoch), "took_ms": fmt.Sprint(time.Since(start).Milliseconds())},
	})
	return aloneLook
}

// afterCut deals with a branch when the arbiter is in touch again; done: nothing else is to be done now.
func (i *instance) afterCut(ctx context.Context, reg arbiter.Register, there bool) (again time.Duration, done bool) {
	b := i.openBranch()
	if b == nil {
		return 0, false
	}
	mine := there && reg.Owner == i.sup.cfg.Self && tokenIn(reg).Compare(components.Token{Incarnation: b.GetIncarnation(), Epoch: b.GetEpoch()}) == 0
	switch {
	case there && !mine: // the log says so, however old what is known of it
		i.endBranch(ctx, b)
		return time.Millisecond, true
	case i.sup.CutOff():
		return 0, false
	case !i.sup.inTouch():
		return 20 * time.Millisecond, true // it may be cut off, or the log is not read yet
	case !mine:
		i.endBranch(ctx, b)
		return time.Millisecond, true
	}
	return i.rejoin(ctx, reg, b), true
}

// endBranch ends the process of a branch whose epoch is over: it comes to rest, and its last checkpoint is the branch's.
func (i *instance) endBranch(ctx context.Context, b *componentsv1.Branch) {
	if i.gen != nil && !i.gen.dead() {
		ctx, cancel := context.WithTimeout(ctx, drainDeadline)
		defer cancel()
		if err := i.quiesce(ctx, reasonFreeze); err != nil {
			i.sup.cfg.Log.Warn("calls under way are cut off by the end of the branch", "instance", i.name, "error", err)
		}
		if err := i.flush(ctx); err != nil {
			i.sup.cfg.Log.Warn("the last changes of a branch are not in its last checkpoint", "instance", i.name, "error", err)
		}
	}
	i.kill("its branch has ended: the instance has another owner")
	if now := i.sup.branch(i.name, components.Token{Incarnation: b.GetIncarnation(), Epoch: b.GetEpoch()}); now != nil {
		b = now // the flush made it longer
	}
	b.Ended = true
	if err := i.sup.saveBranch(b); err != nil {
		i.sup.cfg.Log.Warn("the end of a branch could not be noted; it is tried again", "instance", i.name, "error", err)
	}
	i.sup.reconcileSoon()
}

// rejoin commits a branch that nobody has claimed against: as the next checkpoint, in the next epoch, so that nothing that was in doubt before the cut
// can come between. The process goes on.
func (i *instance) rejoin(ctx context.Context, reg arbiter.Register, b *componentsv1.Branch) time.Duration {
	ctx, cancel := context.WithTimeout(ctx, rejoinWithin)
	defer cancel()
	var body componentsv1.InstanceBody
	if err := proto.Unmarshal(reg.Body, &body); err != nil {
		i.show(components.Failed, "its register cannot be read: "+err.Error())
		return maxBackoff
	}
	eff, err := i.sup.effective(body.GetComponent())
	if err != nil || eff == nil {
		i.endBranch(ctx, b) // the application is gone
		return time.Millisecond
	}
	if err := i.tryRejoin(ctx, reg, &body, eff, b); err != nil {
		i.sup.cfg.Log.Warn("a branch could not be committed; it is tried again", "instance", i.name, "error", err)
		if i.gen != nil {
			if gerr := i.goOn(ctx, err); gerr != nil && i.gen == nil {
				i.sup.cfg.Log.Warn("the process of a branch is started anew", "instance", i.name, "error", gerr)
			}
		}
		return 500 * time.Millisecond
	}
	return time.Millisecond
}

func (i *instance) tryRejoin(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective, b *componentsv1.Branch) error {
	if more, err := i.outran(ctx, reg, b); err != nil || more {
		return err
	}
	if i.gen != nil && !i.gen.dead() {
		if err := i.quiesce(ctx, reasonFreeze); err != nil {
			return err
		}
		if err := i.flush(ctx); err != nil {
			return err
		}
		b = i.sup.branch(i.name, tokenIn(reg))
	}
	root := hashFrom(b.GetRoot())
	to, w := i.holders()
	kept, err := i.sup.cfg.Blobs.Push(ctx, root, to, w)
	if err != nil {
		return fmt.Errorf("copy the branch of %s to its holders: %w", i.name, err)
	}
	next := proto.CloneOf(body)
	next.Trigger, next.Cause, next.ClaimedUnixMs = "neighbour", "the arbiter is in touch again: its branch goes on", i.sup.date()
	data, err := proto.Marshal(next)
	if err != nil {
		return err
	}
	claimed, err := i.sup.claimOver(ctx, reg, arbiter.ClaimRequest{Body: data, SetRoot: true, Root: root[:], Holders: kept})
	if err != nil {
		if refused, ok := errors.AsType[*arbiter.RefusedError](err); ok {
			i.sup.adopt(refused.Current)
		}
		return fmt.Errorf("commit the branch of %s: %w", i.name, err)
	}
	i.sup.adopt(claimed)
	i.sup.dropBranch(b)
	i.sup.cfg.Events.Publish(events.Event{
		Channel: "/apps/" + i.name, Type: "rejoined", Cause: "the arbiter is in touch again",
		Message: fmt.Sprintf("the branch of %s on %s is its checkpoint %d, in epoch %d", i.name, i.sup.cfg.Name, claimed.Seq, claimed.Epoch),
		Fields:  map[string]string{"epoch": fmt.Sprint(claimed.Epoch), "seq": fmt.Sprint(claimed.Seq), "commits": fmt.Sprint(b.GetCommits())},
	})
	if i.gen == nil || i.gen.dead() {
		return nil
	}
	return i.continueIn(ctx, claimed, eff, kept)
}

// outran says whether more was acknowledged than a branch began from: the last of what was answered before a power cut need not have been known to the disk,
// where that is not the log's majority. The branch must not come on top of it then. The instance goes on from what was acknowledged, in the next epoch, and the
// branch is reconciled with that like any other whose epoch is over.
func (i *instance) outran(ctx context.Context, reg arbiter.Register, b *componentsv1.Branch) (bool, error) {
	if !b.GetRecalled() || planted.Bug("branch-over-newer") {
		return false, nil
	}
	now, there, err := i.sup.cfg.Arbiter.Read(ctx, i.key)
	switch {
	case err != nil:
		return false, err
	case !there || now.Epoch != reg.Epoch || now.Owner != i.sup.cfg.Self:
		i.sup.adopt(now)
		return true, nil // the next look ends it
	case now.Seq == b.GetBaseSeq() && hashFrom(now.Root) == hashFrom(b.GetBaseRoot()):
		return false, nil
	}
	claimed, err := i.sup.claimOver(ctx, now, arbiter.ClaimRequest{Body: now.Body})
	if err != nil {
		return false, fmt.Errorf("go on from checkpoint %d, which is newer than what the branch of %s began from: %w", now.Seq, i.name, err)
	}
	i.sup.adopt(claimed)
	i.sup.cfg.Log.Info("more was acknowledged than a branch began from: it is reconciled", "instance", i.name, "acknowledged", now.Seq, "began_from", b.GetBaseSeq())
	return true, nil
}

// continueIn takes the process of a branch, which is at rest, into the epoch that its branch was committed in.
func (i *instance) continueIn(ctx context.Context, claimed arbiter.Register, eff *components.Effective, kept []peer.ID) error {
	g := i.gen
	g.stopSaver()
	if err := g.saver.settle(ctx); err != nil {
		i.relaunch("its branch was committed, and its process does not end saving it")
		return nil
	}
	saved, _ := g.saver.Saved()
	if hashFrom(claimed.Root) != saved.Root {
		i.relaunch("its branch was committed, and its process has another state")
		return nil
	}
	saved.Seq, saved.Holders, saved.At = claimed.Seq, claimed.Holders, time.Now()
	g.head, g.saved = g.lastHead(), saved
	g.own(ctx, tokenIn(claimed))
	i.save(g, claimed, eff, kept)
	i.sup.service(i.name).stale.Store(false)
	if err := i.mem().SetToken(tokenOf(g.token)); err != nil {
		i.relaunch("the membrane does not take the new epoch: " + err.Error())
		return nil
	}
	i.mem().SetDurable(waits(g, eff))
	frozen := i.applied.frozen
	i.note(g, eff)
	i.applied.frozen = frozen
	if frozen {
		return nil
	}
	if err := i.resume(ctx, g); err != nil {
		i.relaunch("it does not go on after its branch was committed: " + err.Error())
		return nil
	}
	i.release()
	return nil
}

// BranchRoots are the roots that branches on this node need until they are stored in the cluster.
func (s *Supervisor) BranchRoots() []blobs.Hash {
	var out []blobs.Hash
	for _, b := range s.Branches() {
		for _, r := range [][]byte{b.GetRoot(), b.GetBaseRoot()} {
			if h := hashFrom(r); !h.IsZero() {
				out = append(out, h)
			}
		}
	}
	return out
}
