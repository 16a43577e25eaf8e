package arbiter

import (
	"context"
	"slices"
	"time"

	"github.com/hashicorp/raft"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/keys"
	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/coppice-project/coppice/internal/unison"
)

// configuration returns the group as this node's raft has it.
func (a *Arbiter) configuration(r *raft.Raft) (voters, learners []peer.ID) {
	voters, learners, _ = a.configurationAt(r)
	return voters, learners
}

// configurationAt returns the index of the entry, too, which a change can be made to depend on.
func (a *Arbiter) configurationAt(r *raft.Raft) (voters, learners []peer.ID, index uint64) {
	f := r.GetConfiguration()
	if f.Error() != nil {
		return nil, nil, 0
	}
	for _, s := range f.Configuration().Servers {
		id, ok := a.ids.decode(string(s.ID))
		if !ok {
			continue
		}
		if s.Suffrage == raft.Voter {
			voters = append(voters, id)
		} else {
			learners = append(learners, id)
		}
	}
	return voters, learners, f.Index()
}

// leaderOf returns the leader as this node's raft has it; "" when it has none.
func (a *Arbiter) leaderOf(r *raft.Raft) peer.ID {
	addr, _ := r.LeaderWithID()
	id, _ := a.ids.decode(string(addr))
	return id
}

// inGroup says whether this node's raft is part of the group, as far as it knows.
func (a *Arbiter) inGroup() (r *raft.Raft, member bool) {
	r = a.raft.Load()
	if r == nil || a.halted.Load() {
		return nil, false
	}
	voters, learners := a.configuration(r)
	return r, slices.Contains(voters, a.cfg.Self) || slices.Contains(learners, a.cfg.Self)
}

// machineCurrent says whether the node's own machine is what the local view should show: it is in the group and hears the leader, or
// did so a moment ago.
func (a *Arbiter) machineCurrent() bool {
	r, member := a.inGroup()
	if !member {
		return false
	}
	return r.State() == raft.Leader || time.Since(r.LastContact()) < 4*a.t.Heartbeat
}

// leaderAge is how long ago this node's raft heard the leader; < 0: never.
func (a *Arbiter) leaderAge() time.Duration {
	r := a.raft.Load()
	if r == nil {
		return -1
	}
	if r.State() == raft.Leader {
		return 0
	}
	if last := r.LastContact(); !last.IsZero() {
		return time.Since(last)
	}
	return -1
}

// observe keeps whereabouts up to date with raft, and marks how far the log is committed.
func (a *Arbiter) observe(ctx context.Context, r *raft.Raft) {
	events := make(chan raft.Observation, 64)
	o := raft.NewObserver(events, false, func(o *raft.Observation) bool {
		switch o.Data.(type) {
		case raft.LeaderObservation, raft.RaftState, raft.PeerObservation:
			return true
		}
		return false
	})
	r.RegisterObserver(o)
	defer r.DeregisterObserver(o)
	tick := unison.New(time.Second, string(a.cfg.Self))
	defer tick.Stop()
	var marked uint64
	var led time.Time
	for {
		if r.State() == raft.Leader {
			led = time.Now()
		}
		a.pace(r, led)
		a.refreshWhere(r)
		select {
		case <-events:
		case <-a.fsm.regrouped.next():
		case <-tick.C:
			tick.Next()
			a.settleDown()
			if c := r.CommitIndex(); c != marked && !a.halted.Load() {
				marked = c
				if err := a.disk.markCommitted(c); err != nil {
					a.failures.note("mark the committed index", err)
				}
			}
		case <-ctx.Done():
			return
		}
	}
}

// settleDown notes, once for all lives of this node, that the group is older than Settle. Its leader may be started anew: then it sees everybody as if they
// had just come.
func (a *Arbiter) settleDown() {
	if _, member := a.inGroup(); !member || a.cfg.BootTime()-a.begun < a.t.Settle {
		return
	}
	if err := a.disk.settleDown(); err != nil {
		a.failures.note("note that the group has settled", err)
	}
}

func (a *Arbiter) refreshWhere(r *raft.Raft) {
	_, member := a.inGroup()
	if !member {
		return
	}
	group, err := a.speaks()
	if err != nil {
		return
	}
	voters, learners := a.configuration(r)
	term := r.CurrentTerm()
	leader := a.leaderOf(r)
	if r.CurrentTerm() != term {
		return // it changes right now; raft will tell again
	}
	before, _ := a.where.current()
	a.where.own(group, leader, term, voters, learners)
	if leader != before {
		a.keeper.kick()
		a.leases.notice(r)
	}
}

// whereNow tells what this node knows about the group.
func (a *Arbiter) whereNow() *wirev1.ArbiterWhere {
	leader, _ := a.where.current()
	voters, learners, term := a.where.group()
	st := a.view.now()
	at := a.where.incarnation()
	return &wirev1.ArbiterWhere{
		Shard:  thisShard,
		Leader: []byte(leader), Voters: idsToWire(voters), Learners: idsToWire(learners), Term: term,
		Incarnation: at.number, Lineage: at.lineage, Index: st.at.index, Meta: metaToWire(st.meta),
	}
}

// seek asks others who leads: the voters known, then the members closest to the placement key, who are the voters as a rule.
func (a *Arbiter) seek(ctx context.Context) {
	ask := a.likely(3)
	ctx, cancel := context.WithTimeout(ctx, a.t.RPC)
	defer cancel()
	done := make(chan struct{}, len(ask))
	for _, id := range ask {
		go func() {
			defer func() { done <- struct{}{} }()
			resp := new(wirev1.ArbiterResponse)
			req := a.request(&wirev1.ArbiterRequest{Kind: &wirev1.ArbiterRequest_Status{Status: true}})
			if err := a.caller.Call(ctx, id, protoCall, req, resp); err == nil {
				a.hear(resp.GetWhere())
			}
		}()
	}
	for range ask {
		select {
		case <-done:
			if leader, _ := a.where.current(); leader != "" {
				return
			}
		case <-ctx.Done():
			return
		}
	}
}

// likely returns up to n others that may know the leader, best first, with one drawn from all so that no wrong belief lasts.
func (a *Arbiter) likely(n int) []peer.ID {
	voters, _, _ := a.where.group()
	var alive []peer.ID
	for _, m := range a.cfg.Members.List() {
		if m.Alive && m.ID != a.cfg.Self {
			alive = append(alive, m.ID)
		}
	}
	voters = slices.DeleteFunc(slices.Clone(voters), func(id peer.ID) bool { return id == a.cfg.Self })
	shuffle(voters, a.cfg.Rand)
	out := voters[:min(len(voters), n-1)]
	for _, id := range keys.Sort(keys.Of(shardKey(thisShard)), slices.Clone(alive)) {
		if len(out) < n && !slices.Contains(out, id) {
			out = append(out, id)
		}
	}
	if len(alive) > 0 {
		if id := alive[a.cfg.Rand()%uint64(len(alive))]; !slices.Contains(out, id) {
			out = append(out, id)
		}
	}
	return out
}

func shuffle(ids []peer.ID, rand func() uint64) {
	for i := len(ids) - 1; i > 0; i-- {
		j := int(rand() % uint64(i+1))
		ids[i], ids[j] = ids[j], ids[i]
	}
}

// tellCommits tells followers what was committed at once, where raft would wait for the next entry or for CommitTimeout. The message
// is one that a leader may send at any time: an append without entries behind the last committed one, with the commit index.
func (a *Arbiter) tellCommits(ctx context.Context, r *raft.Raft) {
	busy := map[peer.ID]chan struct{}{}
	defer func() {
		for _, done := range busy {
			<-done
		}
	}()
	for {
		next := a.notice.next()
		again := false
		if a.lagging.CompareAndSwap(true, false) {
			again = a.tellOnce(r, busy)
		}
		var retry <-chan time.Time
		if again {
			a.lagging.Store(true)
			retry = time.After(5 * time.Millisecond)
		}
		select {
		case <-next:
			// The next entry tells it, too: let it go first.
			if !sleep(ctx, 3*time.Millisecond) {
				return
			}
		case <-retry:
		case <-ctx.Done():
			return
		}
	}
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// tellOnce sends to each follower that needs it and is not being sent to; true: some were.
func (a *Arbiter) tellOnce(r *raft.Raft, busy map[peer.ID]chan struct{}) (again bool) {
	term := r.CurrentTerm()
	commit := r.CommitIndex()
	var last raft.Log
	if r.State() != raft.Leader || commit == 0 || a.disk.GetLog(commit, &last) != nil || last.Term != term || r.CurrentTerm() != term {
		return false
	}
	voters, learners := a.configuration(r)
	for _, id := range append(voters, learners...) {
		p := a.trans.Load().of(id)
		if id == a.cfg.Self || p.told >= commit || time.Since(p.heard) > 2*a.t.Heartbeat {
			continue
		}
		if done := busy[id]; done != nil {
			select {
			case <-done:
			default:
				again = true
				continue
			}
		}
		done := make(chan struct{})
		busy[id] = done
		go func() {
			defer close(done)
			req := &raft.AppendEntriesRequest{
				RPCHeader: a.trans.Load().header(), Term: term, PrevLogEntry: commit, PrevLogTerm: last.Term, LeaderCommitIndex: commit,
			}
			var resp raft.AppendEntriesResponse
			if err := a.trans.Load().AppendEntries(raft.ServerID(id.String()), raft.ServerAddress(id.String()), req, &resp); err != nil {
				a.log.Debug("commit notice", "node", id, "err", err)
			}
		}()
	}
	return again
}

// ===== a proven death of the leader =====

// memberChanged is told by the members' view.
func (a *Arbiter) memberChanged(old, now Member) {
	a.keeper.kick()
	if now.Dead || old.Boot != 0 && now.Boot != 0 && old.Boot != now.Boot {
		a.leaderDied(now.ID)
	}
}

// linkChanged is told by the links. A reset alone proves nothing; a refused redial does.
func (a *Arbiter) linkChanged(id peer.ID, up bool) {
	a.two.linkChanged(id, up)
	if up {
		return
	}
	a.trans.Load().layer.drop(id)
	if leader, _ := a.where.current(); leader != id {
		return
	}
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), a.t.RPC)
		defer cancel()
		if a.cfg.Links.Probe(ctx, id) == peers.Refused {
			a.leaderDied(id)
		}
	}()
}

// leaderDied starts an election here, after those voters that are closer to the placement key had their chance.
func (a *Arbiter) leaderDied(id peer.ID) {
	if id == a.cfg.Self {
		return // it has said goodbye: that is for the others to act upon, and an election of its own would be in their way
	}
	r, _ := a.inGroup()
	if r == nil || a.leaderOf(r) != id {
		return
	}
	voters, _ := a.configuration(r)
	if !slices.Contains(voters, a.cfg.Self) {
		return
	}
	voters = nearest(slices.DeleteFunc(voters, func(v peer.ID) bool { return v == id }))
	rank := slices.Index(voters, a.cfg.Self)
	go a.standForElection(r, id, r.CurrentTerm(), rank, len(voters), "the leader is dead")
}

// standAtStart stands for election when this node starts as a voter of a group of which nobody knows a leader, instead of waiting for
// raft's time-out: at once as the only voter, else in turn.
func (a *Arbiter) standAtStart(r *raft.Raft) {
	voters, _ := a.configuration(r)
	voters = nearest(voters)
	rank := slices.Index(voters, a.cfg.Self)
	if leader, _ := a.where.current(); rank < 0 || leader != "" {
		return
	}
	if len(voters) > 1 {
		rank += 2 // others may just be starting, and a leader may just be about to tell
	}
	go a.standForElection(r, "", r.CurrentTerm(), rank, len(voters), "starting without a leader")
}

// standForElection waits its turn and stands, as long as nobody leads and nobody else does the same; a few rounds, then
// raft's own time-outs have it.
func (a *Arbiter) standForElection(r *raft.Raft, dead peer.ID, term uint64, rank, of int, why string) {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-a.closing:
			cancel()
		case <-ctx.Done():
		}
	}()
	begun := time.Now()
	wait := time.Duration(rank) * a.t.Stagger
	for round := range 4 {
		if wait > 0 && !sleep(ctx, wait) {
			return
		}
		if l := a.leaderOf(r); ctx.Err() != nil || l != "" && l != dead {
			return
		}
		now := r.CurrentTerm()
		if now == term && r.LastContact().After(begun) {
			return // it is heard: whoever called it dead was wrong
		}
		wait = time.Duration(of<<round) * a.t.Stagger
		if now != term {
			term = now
			continue // another voter stands: its election must not be disturbed
		}
		if a.raft.Load() != r {
			return // another life of raft has begun
		}
		a.voted.Add(1)
		a.log.Info("arbiter: standing for election", "why", why, "node", dead, "rank", rank)
		a.trans.Load().electSelf()
		term++ // the own one
	}
}
