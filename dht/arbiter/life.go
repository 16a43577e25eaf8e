package arbiter

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"
	"github.com/libp2p/go-libp2p/core/peer"
)

// A node takes part in one incarnation of the group at a time. Between two, raft is shut down, the disk is changed, and raft is started
// again: within about 0.1 s, while the Arbiter, its callers and its feeds live on.

// turn is a wish to go on in the next incarnation, alone.
type turn struct {
	why      string
	check    func() error // asked once raft stands still: an error keeps everything as it is
	recovery Recovery
	done     chan error // buffered
}

const (
	// answerTime is what raft gets to answer what it was given before it is shut down. What it cannot commit it would not answer at all.
	answerTime = 50 * time.Millisecond
	// retryTime is the pause after something with the disk failed.
	retryTime = time.Second
)

// takePart has the disk vouched for, starts raft and does what a member of the group does, in one incarnation after the other.
func (a *Arbiter) takePart(ctx context.Context) error {
	for ctx.Err() == nil {
		if a.superseded() {
			if err := a.giveUp(); err != nil {
				a.failures.note("give up a lower incarnation", err)
				a.log.Error("arbiter: what this node holds of a lower incarnation cannot be given up", "err", err)
				sleep(ctx, retryTime)
			}
			continue
		}
		if err := a.verify(ctx); errors.Is(err, errSuperseded) {
			continue
		} else if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			a.halt(err)
			return err
		}
		if err := a.live(ctx); err != nil {
			return err
		}
	}
	return nil
}

// live runs raft until the context ends or this node goes on in another incarnation.
func (a *Arbiter) live(ctx context.Context) error {
	r, err := a.startRaft()
	if err != nil {
		return err
	}
	a.serving.resume()
	a.standAtStart(r)
	for {
		t, over := a.work(ctx, r)
		if over {
			return nil // Close shuts raft down
		}
		a.serving.pause(answerTime)
		err := a.endRaft(r)
		a.raft.Store(nil)
		a.view.leaveMachine()
		if err != nil {
			a.failures.note("end a life of raft", err)
		}
		if t == nil {
			return nil // superseded
		}
		a.take(t)
		if r, err = a.startRaft(); err != nil {
			return err
		}
		a.serving.resume()
		a.standAtStart(r)
	}
}

// take goes on in the next incarnation, or says why it does not. Raft must not be running.
func (a *Arbiter) take(t *turn) (taken bool) {
	err := t.check()
	if err == nil {
		err = a.renew(t)
	}
	t.done <- err
	if err != nil {
		a.failures.note("go on alone", err)
		return false
	}
	group, _ := a.disk.incarnations()
	a.log.Warn("arbiter: this node goes on alone, in the next incarnation", "incarnation", group, "why", t.why)
	a.cfg.Turned(group.number, "", t.why)
	return true
}

// work does what a member of the group does until the context ends (over), a turn is asked for, or this node is superseded (no turn).
func (a *Arbiter) work(ctx context.Context, r *raft.Raft) (t *turn, over bool) {
	inner, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	for _, f := range []func(context.Context, *raft.Raft){a.observe, a.keeper.run, a.tellCommits, a.mirror.run, a.two.run} {
		wg.Go(func() { f(inner, r) })
	}
	defer wg.Wait()
	defer cancel()
	for {
		higher := a.outranked.next()
		if a.superseded() {
			return nil, false
		}
		select {
		case <-ctx.Done():
			return nil, true
		case <-higher:
		case t := <-a.turns:
			return &t, false
		}
	}
}

// startRaft starts raft on what the disk holds.
func (a *Arbiter) startRaft() (*raft.Raft, error) {
	if a.trans.Load().ended() {
		a.trans.Store(a.newTransport())
	}
	trans := a.trans.Load()
	var r atomic.Pointer[raft.Raft]
	trans.start(func() uint64 {
		if x := r.Load(); x != nil {
			return max(x.AppliedIndex(), a.fsm.applied.Load())
		}
		return 0
	}, func(index uint64) bool {
		var l raft.Log
		err := a.disk.GetLog(index, &l)
		if x := r.Load(); x != nil && x.LastIndex() == index {
			return true // raft knows the term of its last entry, also when only a snapshot has it
		}
		return !errors.Is(err, raft.ErrLogNotFound)
	})
	a.disk.guard.raft.Store(true)
	x, err := raft.NewRaft(a.raftConfig(), a.fsm, a.disk, a.disk, a.disk, trans)
	if err != nil {
		return nil, fmt.Errorf("start raft on %s: %w", a.cfg.Dir, err)
	}
	r.Store(x)
	a.raft.Store(x)
	if a.halted.Load() {
		x.Shutdown() // it met what it does not know before it was stored
	}
	trans.layer.admit()
	return x, nil
}

// endRaft shuts raft down, with its transport, and marks how far the log is committed.
func (a *Arbiter) endRaft(r *raft.Raft) error {
	trans := a.trans.Load()
	f := r.Shutdown()
	err := errors.Join(trans.Close(), f.Error())
	<-trans.done
	if !a.halted.Load() {
		commit := max(a.base.Load(), r.CommitIndex())
		a.base.Store(commit)
		err = errors.Join(err, a.disk.markCommitted(commit))
	}
	return err
}

// giveUp exports what this node holds of a lower incarnation, and empties its raft database.
func (a *Arbiter) giveUp() error {
	group, seen := a.disk.incarnations()
	file, err := a.export(group, seen)
	if err != nil {
		return err
	}
	if err := a.disk.wipe(); err != nil {
		return err
	}
	a.fsm.reset()
	a.base.Store(0)
	a.log.Warn("arbiter: the group goes on in a higher incarnation; what this node held of the lower one was put aside", "lower", group, "higher", seen, "file", file)
	a.cfg.Turned(seen.number, file, "the group goes on in a higher incarnation")
	return nil
}

// renew makes this node the only voter of the next incarnation. What its log holds counts as committed: the entries of a dead leader among
// it may or may not have been answered. Raft must not be running. The snapshot that it writes is the point of no return.
func (a *Arbiter) renew(t *turn) error {
	_, seen := a.disk.incarnations()
	conf, last, err := a.disk.configuration()
	if err != nil {
		return fmt.Errorf("read the raft database: %w", err)
	}
	for _, r := range t.recovery.Known {
		seen.number = max(seen.number, r.Incarnation)
	}
	next := incarnation{seen.number + 1, a.nonce()}
	if more, err := a.showsMore(last); err != nil {
		return fmt.Errorf("read the raft database: %w", err)
	} else if more {
		return a.regrow(t, next, last)
	}
	f := &renewal{
		m: newMachine(), next: next, begun: last, self: a.cfg.Self, former: votersOf(conf), known: t.recovery.Known, adopt: t.recovery.Adopt, format: a.cfg.Format,
	}
	me := a.address()
	only := raft.Configuration{Servers: []raft.Server{{Suffrage: raft.Voter, ID: raft.ServerID(me), Address: me}}}
	err = raft.RecoverCluster(a.raftConfig(), f, a.disk, a.disk, a.disk, a.trans.Load(), only)
	// Its snapshot counts once it is there, whatever failed after that.
	if m, merr := a.disk.machine(a.cfg.Format); merr != nil {
		return errors.Join(fmt.Errorf("begin incarnation %d: %w", next.number, err), merr)
	} else if m.meta.incarnation() != next {
		return fmt.Errorf("begin incarnation %d: %w", next.number, err)
	} else if err := a.disk.settle(m); err != nil {
		return err
	}
	a.begin(next, last)
	return nil
}

// begin makes a next incarnation that lies on disk the one that this node takes part in.
func (a *Arbiter) begin(next incarnation, last uint64) {
	a.fsm.reset()
	a.base.Store(last)
	a.raise(point{next.number, last})
	a.where.outrank(next)
}

// showsMore says whether the view holds more than the raft database, whose last entry is given: there is no log, or the node was let go
// as a learner and has followed the feed since.
func (a *Arbiter) showsMore(last uint64) (bool, error) {
	exists, err := raft.HasExistingState(a.disk, a.disk, a.disk)
	if err != nil || !exists || last == 0 {
		return !exists || last == 0, err
	}
	group, _ := a.disk.incarnations()
	st := a.view.now()
	at := st.meta.incarnation()
	return group.before(at) || group == at && last < st.complete, nil
}

// regrow is renew without a log, or past the end of one: the next incarnation begins with what this node shows and with newer copies
// of it. Everything that it shows was committed.
func (a *Arbiter) regrow(t *turn, next incarnation, last uint64) error {
	st := a.view.now()
	voters, _, _ := a.where.group()
	m := newMachine()
	m.tree, m.meta, m.former = st.tree, st.meta, st.former
	m.meta.Cluster, m.meta.Format, m.meta.Coordinator = cmp.Or(m.meta.Cluster, t.recovery.Cluster), max(m.meta.Format, 1), a.cfg.Self
	m.learn(t.recovery.Known, point{st.at.inc, st.complete})
	m.grown(max(st.at.index, st.complete, last))
	m.raise(next, m.index, a.cfg.Self, voters)
	m.adopt(t.recovery.Adopt)
	if err := a.disk.plant(m, a.address()); err != nil {
		return fmt.Errorf("begin incarnation %d: %w", next.number, err)
	}
	a.begin(next, m.index)
	return nil
}

// settle makes the database one of the incarnation that its newest snapshot is of: behind the snapshot of a next incarnation the log of the
// lower one may still lie. After a crash in renew it finishes that. It also names the incarnation of a database that was written before
// incarnations were.
func (d *disk) settle(m *machine) error {
	group, _ := d.incarnations()
	exists, err := raft.HasExistingState(d, d, d)
	if err != nil || !exists {
		return err
	}
	at := m.meta.incarnation()
	if !group.before(at) {
		return nil
	}
	snaps, err := d.List()
	if err != nil {
		return err
	}
	if !group.none() && len(snaps) > 0 && d.first > 0 && d.first <= snaps[0].Index {
		if err := d.DeleteRange(d.first, min(d.last, snaps[0].Index)); err != nil {
			return err
		}
	}
	_, _, err = d.setIncarnations(func(_, seen incarnation) (incarnation, incarnation) { return at, seen })
	return err
}

// Adoption puts a newer checkpoint into a register when the next incarnation begins: one that its holders keep although the log of this
// node does not know of it (consistency.md §3.7).
type Adoption struct {
	Key     string
	Seq     uint64
	Root    []byte
	Holders []peer.ID
}

// renewal is the machine that raft replays the log into when an incarnation begins. Its snapshot is of the next one.
type renewal struct {
	m      *machine
	next   incarnation
	begun  uint64
	self   peer.ID
	former []peer.ID
	known  []Register
	adopt  []Adoption
	format uint32
	failed error // an entry that this build does not know
}

// Apply implements raft.FSM.
func (f *renewal) Apply(l *raft.Log) any {
	if f.failed == nil {
		scratch := &fsm{m: f.m, format: f.format}
		_, _, err := scratch.one(l)
		if err != nil {
			f.failed = fmt.Errorf("entry %d: %w; start a newer version of this program", l.Index, err)
		}
	}
	return nil
}

// Snapshot implements raft.FSM.
func (f *renewal) Snapshot() (raft.FSMSnapshot, error) {
	if f.failed != nil {
		return nil, f.failed
	}
	f.m.learn(f.known, point{f.m.meta.Incarnation, f.begun})
	f.m.raise(f.next, f.begun, f.self, f.former)
	f.m.adopt(f.adopt)
	return fsmSnapshot{f.m.freeze()}, nil
}

// Restore implements raft.FSM.
func (f *renewal) Restore(r io.ReadCloser) error {
	m, err := readSnapshot(r)
	if err != nil {
		return err
	}
	f.m = m
	return nil
}
