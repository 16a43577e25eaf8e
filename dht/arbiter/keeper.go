package arbiter

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// keeper keeps the voters what they should be, while this node leads.
type keeper struct {
	a     *Arbiter
	kicks chan struct{}

	// Only its own goroutine uses these.
	since    time.Time // leading since
	leads    bool
	swapped  time.Time
	firstMet map[peer.ID]time.Time // servers that the view does not name: since when
	reach    map[peer.ID]reach     // newcomers

	mu      sync.Mutex // guards the rest
	leaving map[peer.ID]*wish
	word    string
}

// reach is whether others than the leader get through to a newcomer, as they said last, and until when that counts: meanwhile one that is out of reach
// is passed over.
type reach struct {
	ok    bool
	wait  time.Duration
	until time.Time
}

const (
	// reachHolds is how long a yes counts.
	reachHolds = 10 * time.Second
	// reachLeast and reachMost are how long a no does: who joined just now is not known to all yet.
	reachLeast = 500 * time.Millisecond
	reachMost  = 30 * time.Second
	// reachAsked is how many others are asked.
	reachAsked = 5
)

// wish is that of a node to stop voting.
type wish struct {
	at      time.Time
	drained bool // it was seen to drain since: when it does so no more it has been readmitted, and may vote again at once
}

// leaveTime is how long a wish to stop voting holds.
const leaveTime = time.Minute

func newKeeper(a *Arbiter) *keeper {
	return &keeper{a: a, kicks: make(chan struct{}, 1), leaving: map[peer.ID]*wish{}, firstMet: map[peer.ID]time.Time{}, reach: map[peer.ID]reach{}}
}

// kick has the keeper look now.
func (k *keeper) kick() {
	select {
	case k.kicks <- struct{}{}:
	default:
	}
}

// leave notes that a node wants to stop voting.
func (k *keeper) leave(id peer.ID) {
	k.mu.Lock()
	if w := k.leaving[id]; w != nil {
		w.at = time.Now()
	} else {
		k.leaving[id] = &wish{at: time.Now()}
	}
	k.mu.Unlock()
	k.kick()
}

func (k *keeper) say(s string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.word = s
}

func (k *keeper) last() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.word
}

// run looks every Timings.Keeper and when kicked.
func (k *keeper) run(ctx context.Context, r *raft.Raft) {
	k.leads = false // of an earlier life of raft
	for {
		pause := k.a.t.Keeper
		if r.State() != raft.Leader || k.a.halted.Load() {
			k.leads = false
		} else {
			if !k.leads {
				k.leads, k.since, k.swapped = true, time.Now(), time.Time{}
				clear(k.firstMet)
				clear(k.reach)
			}
			pause = k.look(ctx, r)
		}
		t := time.NewTimer(pause)
		select {
		case <-t.C:
		case <-k.kicks:
		case <-ctx.Done():
			t.Stop()
			return
		}
		t.Stop()
	}
}

// look takes one step and says when to look again.
func (k *keeper) look(ctx context.Context, r *raft.Raft) time.Duration {
	s := k.situation(ctx, r)
	st := s.next()
	switch st.kind {
	case stepNone:
		return k.a.t.Keeper
	case stepWait:
		return min(k.a.t.Keeper, 50*time.Millisecond)
	}
	err := k.do(ctx, r, st, s.index)
	word := fmt.Sprintf("%s %s: %s", st.kind, st.id, st.why)
	if err != nil {
		word += fmt.Sprintf(" (failed: %v)", err)
		k.a.failures.note("keeper: "+st.kind.String(), err)
	}
	k.say(word)
	k.a.log.Info("arbiter keeper", "step", st.kind.String(), "node", st.id, "why", st.why, "err", err)
	if err != nil {
		return k.a.t.Keeper
	}
	return 0
}

func (k *keeper) situation(ctx context.Context, r *raft.Raft) *situation {
	a := k.a
	s := &situation{self: a.cfg.Self, max: a.cfg.MaxVoters, members: map[peer.ID]standing{}}
	s.voters, s.learners, s.index = a.configurationAt(r)
	if st := a.fsm.shown.Load(); st != nil {
		s.coordinator = st.meta.Coordinator
		s.format = st.meta.Format
		s.primary = k.primary(st)
	}
	list := a.cfg.Members.List()
	young := !a.disk.settled()
	for _, m := range list {
		young = young && (!m.Alive || m.For < a.t.Settle)
	}
	former := a.fsm.former()
	for _, m := range list {
		can := !k.isLeaving(m) && eligible(m, slices.Contains(former, m.ID), young, a.t.Settle) && (slices.Contains(s.voters, m.ID) || !k.outOfReach(m.ID))
		// After a restart the view begins with everybody dead: what raft hears is not.
		quiet := min(m.For, time.Since(k.since), time.Since(a.trans.Load().of(m.ID).heard))
		s.members[m.ID] = standing{alive: m.Alive, dead: m.Dead && quiet >= a.t.DeadFor, eligible: can, zone: m.Zone}
	}
	for _, id := range append(slices.Clone(s.voters), s.learners...) {
		if a.cfg.Expelled != nil && a.cfg.Expelled(id) {
			s.members[id] = standing{dead: true} // it never comes back, so there is nothing to wait for
			continue
		}
		if _, known := s.members[id]; known {
			delete(k.firstMet, id)
			continue
		}
		if _, met := k.firstMet[id]; !met {
			k.firstMet[id] = time.Now()
		}
		s.members[id] = standing{dead: time.Since(k.firstMet[id]) >= a.t.Unknown}
	}
	s.maySwap = young || time.Since(k.swapped) >= a.t.Swap && time.Since(k.since) >= a.t.Swap
	s.mayHand = young || time.Since(k.since) < 2*a.t.Keeper+a.t.RPC || time.Since(k.since) >= a.t.Transfer
	s.known = lowestFormat(a.cfg.Format, list)
	s.ready = func(id peer.ID) bool { return k.caughtUp(ctx, r, id) }
	s.reached = func(id peer.ID) bool { return k.reached(ctx, id, list, s.voters) }
	return s
}

// primary says whether the rule of two nodes holds or may come to hold: an entry that begins it and is not applied here yet may be on the
// other's disk, and count there once it is committed, with whatever group.
func (k *keeper) primary(st *viewState) peer.ID {
	if st.meta.TwoNode != "" {
		return st.meta.TwoNode
	}
	var found peer.ID
	err := k.a.disk.ruleChanges(st.at.index, func(_ uint64, primary peer.ID) {
		if primary != "" {
			found = primary
		}
	})
	if err != nil {
		k.a.failures.note("read the log for the rule of two nodes", err)
		return k.a.cfg.Self // it may
	}
	return found
}

// isLeaving says whether a node's wish to stop voting holds.
func (k *keeper) isLeaving(m Member) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	w := k.leaving[m.ID]
	if w == nil {
		return false
	}
	if time.Since(w.at) > leaveTime || w.drained && !m.Draining {
		delete(k.leaving, m.ID)
		return false
	}
	w.drained = w.drained || m.Draining
	return true
}

// caughtUp asks a server whether it has nearly all of this incarnation's log and would take part.
func (k *keeper) caughtUp(ctx context.Context, r *raft.Raft, id peer.ID) bool {
	const near = 100
	ctx, cancel := context.WithTimeout(ctx, k.a.t.RPC)
	defer cancel()
	resp := new(wirev1.ArbiterResponse)
	req := k.a.request(&wirev1.ArbiterRequest{Kind: &wirev1.ArbiterRequest_Status{Status: true}})
	if err := k.a.caller.Call(ctx, id, protoCall, req, resp); err != nil {
		return false
	}
	l := resp.GetLog()
	if own, err := k.a.speaks(); err != nil || incarnationOf(l.GetGroup()) != own {
		return false // what it holds is of another incarnation, whose log may be as long
	}
	format := uint32(1)
	if st := k.a.fsm.shown.Load(); st != nil {
		format = st.meta.Format
	}
	return l.GetOpen() && l.GetHalted() == "" && l.GetMaxFormat() >= format && l.GetApplied()+near >= k.a.fsm.applied.Load()
}

// outOfReach says whether nobody but the leader got through to a newcomer a moment ago.
func (k *keeper) outOfReach(id peer.ID) bool {
	r, asked := k.reach[id]
	return asked && !r.ok && time.Now().Before(r.until)
}

// reached says whether somebody besides this leader gets through to a newcomer: a voter that only the leader reaches votes for nobody else, and is of no
// use when the leader is gone. Other voters are asked first.
func (k *keeper) reached(ctx context.Context, id peer.ID, list []Member, voters []peer.ID) bool {
	was := k.reach[id]
	if time.Now().Before(was.until) {
		return was.ok
	}
	var ask []peer.ID
	for _, m := range list {
		if m.Alive && m.ID != id && m.ID != k.a.cfg.Self {
			ask = append(ask, m.ID)
		}
	}
	slices.SortStableFunc(ask, func(a, b peer.ID) int {
		return cmp.Compare(slices.Index(voters, b), slices.Index(voters, a)) // who is none has -1
	})
	now := reach{ok: k.reachedBy(ctx, id, ask[:min(len(ask), reachAsked)]), wait: reachHolds}
	if !now.ok {
		now.wait = min(max(2*was.wait, reachLeast), reachMost)
		if was.ok {
			now.wait = reachLeast
		}
		k.a.log.Info("arbiter keeper: nobody but the leader gets through to a node: it may not vote", "node", id, "again", now.wait)
	}
	now.until = time.Now().Add(now.wait)
	k.reach[id] = now
	return now.ok
}

// reachedBy asks others, all at once; one that gets through is enough. Who does not know the question, an older version, says nothing against it, and
// without anybody to ask there is nothing to find out.
func (k *keeper) reachedBy(ctx context.Context, id peer.ID, ask []peer.ID) bool {
	if len(ask) == 0 {
		return true
	}
	ctx, cancel := context.WithTimeout(ctx, k.a.t.RPC)
	defer cancel()
	answers := make(chan wirev1.ArbiterResponse_Code, len(ask))
	for _, other := range ask {
		go func() {
			resp := new(wirev1.ArbiterResponse)
			req := k.a.request(&wirev1.ArbiterRequest{Kind: &wirev1.ArbiterRequest_Reach{Reach: []byte(id)}})
			if k.a.caller.Call(ctx, other, protoCall, req, resp) != nil {
				resp.Code = wirev1.ArbiterResponse_BUSY
			}
			answers <- resp.GetCode()
		}()
	}
	unknown, no := false, false
	for range ask {
		switch <-answers {
		case wirev1.ArbiterResponse_OK:
			return true
		case wirev1.ArbiterResponse_INVALID:
			unknown = true
		default:
			no = true
		}
	}
	return unknown && !no
}

// do carries a step out, if the group is still that of the entry at index: another node may have led meanwhile, and who learned then may do so no more. It
// returns when the change is committed, or can no longer be by this leader.
func (k *keeper) do(ctx context.Context, r *raft.Raft, st step, index uint64) error {
	if !k.a.serving.enter() {
		return ErrClosed
	}
	defer k.a.serving.leave()
	id, addr := raft.ServerID(st.id.String()), raft.ServerAddress(st.id.String())
	switch st.kind {
	case stepLearner:
		return r.AddNonvoter(id, addr, index, enqueueTime).Error()
	case stepVoter:
		err := r.AddVoter(id, addr, index, enqueueTime).Error()
		if err == nil {
			k.swapped = time.Now()
		}
		return err
	case stepDemote:
		return r.DemoteVoter(id, index, enqueueTime).Error()
	case stepRemove:
		return r.RemoveServer(id, index, enqueueTime).Error()
	case stepHand:
		return r.LeadershipTransferToServer(id, addr).Error()
	case stepName:
		return k.setMeta(ctx, &wirev1.ArbiterSetMeta{Coordinator: []byte(st.id)})
	case stepPair:
		return k.setMeta(ctx, &wirev1.ArbiterSetMeta{TwoNode: []byte(st.id)})
	case stepUnpair:
		return k.setMeta(ctx, &wirev1.ArbiterSetMeta{TwoNode: []byte{}})
	case stepRaise:
		return k.raise(ctx)
	case stepNone, stepWait:
	}
	return nil
}

// setMeta commits what the group keeps about itself. It goes straight into this leader's log, not through the queue: a wish that another
// leader carried out later could end or begin the rule of two nodes at the wrong time.
func (k *keeper) setMeta(ctx context.Context, m *wirev1.ArbiterSetMeta) error {
	e := &wirev1.ArbiterEntry{Format: 1, Shard: thisShard, Proposer: []byte(k.a.cfg.Self), Commands: []*wirev1.ArbiterCommand{{Kind: &wirev1.ArbiterCommand_SetMeta{SetMeta: m}}}}
	b, err := proto.Marshal(e)
	if err != nil {
		return err
	}
	done := make(chan *wirev1.ArbiterResponse, 1)
	go func() { done <- k.a.propose(ctx, b, k.a.view.now().at.inc) }()
	select {
	case resp := <-done:
		if resp.GetCode() != wirev1.ArbiterResponse_OK {
			return fmt.Errorf("%s: %s", resp.GetCode(), resp.GetReason())
		}
		return nil
	case <-time.After(k.a.t.RPC):
		return errors.New("not committed in time")
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// StepDown hands this node's leadership and vote over and returns when it votes no more; learners and followers return at once. The
// only voter of a cluster without another eligible member cannot step down: the context ends the waiting. A node that goes on living
// should also be draining (or NoVoter) in the view, or it is called back after a minute.
func (a *Arbiter) StepDown(ctx context.Context) error {
	for pause := newPause(); ; pause.wait(ctx) {
		r, member := a.inGroup()
		voters, _, _ := a.where.group()
		if !member || !slices.Contains(voters, a.cfg.Self) {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("step down: this node still votes: %w", context.Cause(ctx))
		}
		leader, changed := a.where.current()
		if leader == "" {
			a.findLeader(ctx, changed)
			continue
		}
		req := a.request(&wirev1.ArbiterRequest{Kind: &wirev1.ArbiterRequest_StepDown{StepDown: true}})
		if _, err := a.attempt(ctx, leader, changed, req); err != nil && !errors.Is(err, context.Canceled) {
			a.log.Debug("step down", "leader", leader, "err", err)
		}
		if leader == a.cfg.Self && r.State() == raft.Leader {
			a.keeper.kick()
		}
	}
}

// HandOver hands the leadership to another voter, if this node has it, and returns once another node is known to lead. It is for a node that is about to
// end and has said so: else the leadership may come back to it. Without another voter it does nothing.
func (a *Arbiter) HandOver(ctx context.Context) error {
	r, member := a.inGroup()
	if !member || r.State() != raft.Leader || !a.serving.enter() {
		return nil
	}
	defer a.serving.leave()
	voters, _ := a.configuration(r)
	heirs := nearest(slices.DeleteFunc(voters, func(id peer.ID) bool { return id == a.cfg.Self }))
	if len(heirs) == 0 {
		return nil
	}
	var failed error
	for ctx.Err() == nil {
		if r.State() == raft.Leader {
			// The one who stands first where the leader has said goodbye (leaderDied): another one would stand against it. It fails while the keeper does
			// the same, where that one stands by itself just now, and where it does not answer: then raft chooses.
			transfer := r.LeadershipTransfer
			if failed == nil {
				transfer = func() raft.Future {
					return r.LeadershipTransferToServer(raft.ServerID(heirs[0].String()), raft.ServerAddress(heirs[0].String()))
				}
			}
			if err := transfer().Error(); err != nil && r.State() == raft.Leader {
				failed = err
				sleep(ctx, 10*time.Millisecond)
				continue
			}
		}
		leader, changed := a.where.current()
		switch leader {
		case "":
			a.findLeader(ctx, changed)
		case a.cfg.Self:
			sleep(ctx, 10*time.Millisecond) // raft's word may not have come here yet, or it leads again
			a.refreshWhere(r)
		default:
			return nil
		}
	}
	if r.State() == raft.Leader && failed != nil {
		return fmt.Errorf("hand the leadership over: %w", failed)
	}
	return fmt.Errorf("hand the leadership over: no other node leads yet: %w", context.Cause(ctx))
}
