package arbiter

import (
	"slices"
	"time"

	"github.com/hashicorp/raft"
	"github.com/libp2p/go-libp2p/core/peer"
)

// Get returns a register of the local view, which may be behind (Status().FeedAge) but never goes back.
func (a *Arbiter) Get(key string) (Register, bool) { return value(a.view.get(key)) }

// List returns the registers of the local view whose keys begin with prefix, ordered by key.
func (a *Arbiter) List(prefix string) []Register { return a.view.list(prefix) }

// Watch calls f for every change of the local view after it returns, in order: old nil for a new register, new nil for a deleted one.
// What followed each other closely may come as one change, above all after a reconnection. f must not block and must not change the
// registers; it may call Get and List, which show the new state. To miss nothing, watch first and list then.
func (a *Arbiter) Watch(f func(old, new *Register)) (cancel func()) { return a.view.watch.add(f) }

// Cluster returns the cluster's id as the local view knows it; "" while it does not.
func (a *Arbiter) Cluster() string { return a.view.now().meta.Cluster }

// Status returns what this node knows about the group now.
func (a *Arbiter) Status() Status {
	st := a.view.now()
	leader, _ := a.where.current()
	voters, learners, term := a.where.group()
	last, halted := a.failures.get()
	s := Status{
		Cluster: st.meta.Cluster, HasLeader: leader != "", Leader: leader, Coordinator: st.meta.Coordinator, Voters: slices.Clone(voters),
		Learners: slices.Clone(learners), Incarnation: st.at.inc, Format: st.meta.Format, Term: term, Index: st.at.index, FeedAge: a.follow.staleness(),
		Registers: st.tree.Len(), Pending: a.queue.len(), Followers: int(a.feeds.Load()), Boots: a.disk.boots(), Halted: halted,
		LastError: last, Commits: a.fsm.entries.Load(), Elections: a.voted.Load(), Role: "unverified",
	}
	r := a.raft.Load()
	if r != nil {
		s.Role = "follower"
		s.Commit, s.LastLog = r.CommitIndex(), r.LastIndex()
	}
	if st.fromRaft {
		if age := a.leaderAge(); age >= 0 {
			s.FeedAge = age
		}
	}
	if r != nil {
		s.Primary, s.Paired = a.two.status(r)
	}
	switch {
	case halted != "":
		s.Role = "halted"
	case r == nil:
	case r.State() == raft.Leader:
		s.Role = "leader"
		s.Keeper = a.keeper.last()
		s.Lag = a.lag(r, append(voters, learners...))
	case slices.Contains(voters, a.cfg.Self):
		s.Role = "voter"
	case slices.Contains(learners, a.cfg.Self):
		s.Role = "learner"
	}
	return s
}

// lag is how many entries each other server has not acknowledged.
func (a *Arbiter) lag(r *raft.Raft, servers []peer.ID) map[peer.ID]uint64 {
	out := map[peer.ID]uint64{}
	last := r.LastIndex()
	for _, id := range servers {
		if id != a.cfg.Self {
			out[id] = last - min(last, a.trans.Load().of(id).matched)
		}
	}
	return out
}

// HeardLeader is how long ago this node last heard from the leader, by raft or by a feed; < 0: never.
func (a *Arbiter) HeardLeader() time.Duration {
	if age := a.leaderAge(); age >= 0 && a.machineCurrent() {
		return age
	}
	return a.follow.staleness()
}
