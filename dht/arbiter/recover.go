package arbiter

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// ErrMajority is wrapped by Recover where most of the voters answer: there is nothing to recover from.
var ErrMajority = errors.New("a majority of the voters can be reached")

// ErrNoLog is wrapped by Recover on a node that holds nothing of the group.
var ErrNoLog = errors.New("this node holds nothing of the arbiter's log")

// Survivor is what one node holds of the group, whether or not there is a leader (consistency.md §3.7).
type Survivor struct {
	ID          peer.ID
	Role        string // voter | learner | none, by its own log
	Incarnation uint64 // of its log; 0: it has none
	Term        uint64
	Last        uint64 // index of the last entry of its log
	LastTerm    uint64 // and its term
	Applied     uint64 // index of the last entry that it has applied
	Committed   uint64 // index up to which it knows the log to be committed
	Registers   int    // applied
	Voters      []peer.ID
	Leader      peer.ID // "": it knows none
	Halted      string  // why it stopped applying and voting; "" when it did not

	// What it shows, with or without a log of its own: a node that does not vote follows the group's feed, and keeps the whole state in
	// memory when nobody feeds it any more.
	ShownIncarnation uint64 // 0: nothing
	Shown            uint64 // index up to which it shows everything
	ShownRegisters   int

	lineage, shownLineage uint64
}

// log is what its log makes of it, shown what its view does.
func (s Survivor) log() (incarnation, uint64) { return incarnation{s.Incarnation, s.lineage}, s.Last }

func (s Survivor) shown() (incarnation, uint64) {
	return incarnation{s.ShownIncarnation, s.shownLineage}, s.Shown
}

// ShowsMore says whether s shows what its own log does not reach to: it never voted, or it learned once and was let go.
func (s Survivor) ShowsMore() bool {
	at, last := s.log()
	shown, index := s.shown()
	return at.before(shown) || at == shown && last < index
}

// Best returns the survivor to recover from: the one with the best log, or, when its log ends before what another one shows, that one. A log
// holds more than what is shown up to the same entry: it knows what was proposed last. all must not be empty.
func Best(all []Survivor) Survivor {
	best := all[0]
	for _, s := range all[1:] {
		if s.Better(best) {
			best = s
		}
	}
	for _, s := range all {
		a, i := best.reach()
		if b, j := s.shown(); a.before(b) || a == b && i < j {
			best = s
		}
	}
	return best
}

// reach is the highest of what a survivor's log and view hold.
func (s Survivor) reach() (incarnation, uint64) {
	if s.ShowsMore() {
		return s.shown()
	}
	return s.log()
}

// Better says whether the log of s should be preferred to that of o when a group is recovered: the higher (incarnation, term of the last
// entry, its index, id), as for an election. It is a total order of nodes.
func (s Survivor) Better(o Survivor) bool {
	a, b := incarnation{s.Incarnation, s.lineage}, incarnation{o.Incarnation, o.lineage}
	switch {
	case a != b:
		return b.before(a)
	case s.LastTerm != o.LastTerm:
		return s.LastTerm > o.LastTerm
	case s.Last != o.Last:
		return s.Last > o.Last
	}
	return s.ID > o.ID
}

// survivorOf reads a node's answer.
func survivorOf(id peer.ID, w *wirev1.ArbiterWhere, l *wirev1.ArbiterLog) Survivor {
	at := incarnationOf(l.GetGroup())
	s := Survivor{
		ID: id, Role: "none", Incarnation: at.number, lineage: at.lineage, Term: l.GetTerm(), Last: l.GetLast(), LastTerm: l.GetLastTerm(), Applied: l.GetApplied(),
		Committed: l.GetCommitted(), Registers: int(l.GetRegisters()), Voters: nearest(idsFromWire(l.GetVoters())), Leader: peer.ID(w.GetLeader()), Halted: l.GetHalted(),
	}
	if l.GetShownIndex() > 0 {
		shown := incarnationOf(l.GetShown())
		s.ShownIncarnation, s.shownLineage, s.Shown, s.ShownRegisters = shown.number, shown.lineage, l.GetShownIndex(), int(l.GetShownRegisters())
	}
	switch {
	case at.none() || l.GetLast() == 0:
		s.Incarnation = 0
	case slices.Contains(s.Voters, id):
		s.Role = "voter"
	default:
		s.Role = "learner"
	}
	return s
}

// Survivor is what this node holds.
func (a *Arbiter) Survivor() Survivor { return survivorOf(a.cfg.Self, a.whereNow(), a.logState()) }

// Survivors asks this node and all that the view holds for alive, and returns what each that answers within Timings.RPC holds, the best
// first. It needs no leader.
func (a *Arbiter) Survivors(ctx context.Context) []Survivor {
	ctx, cancel := context.WithTimeout(ctx, a.t.RPC)
	defer cancel()
	ask := map[peer.ID]bool{}
	for _, m := range a.cfg.Members.List() {
		if m.ID != a.cfg.Self && !m.Dead {
			ask[m.ID] = true
		}
	}
	own := a.Survivor()
	voters, _, _ := a.where.group()
	for _, id := range append(own.Voters, voters...) {
		if id != a.cfg.Self {
			ask[id] = true // whatever the view says
		}
	}
	answers := make(chan *Survivor, len(ask))
	for id := range ask {
		go func() {
			resp := new(wirev1.ArbiterResponse)
			req := a.request(&wirev1.ArbiterRequest{Kind: &wirev1.ArbiterRequest_Status{Status: true}})
			if err := a.caller.Call(ctx, id, protoCall, req, resp); err != nil {
				answers <- nil
				return
			}
			a.hear(resp.GetWhere())
			s := survivorOf(id, resp.GetWhere(), resp.GetLog())
			answers <- &s
		}()
	}
	out := []Survivor{own}
	for range ask {
		if s := <-answers; s != nil {
			out = append(out, *s)
		}
	}
	slices.SortFunc(out, func(x, y Survivor) int {
		if x.Better(y) {
			return -1
		}
		return 1
	})
	return out
}

// Reachable says which of the voters are among the survivors with a log of the incarnation that of would be recovered from, and which are
// missing. With most of them the group goes on by itself.
func Reachable(of Survivor, voters []peer.ID, all []Survivor) (here, missing []peer.ID) {
	at, _ := of.reach()
	for _, v := range voters {
		if slices.ContainsFunc(all, func(s Survivor) bool { in, _ := s.log(); return s.ID == v && in == at && s.Incarnation > 0 }) {
			here = append(here, v)
		} else {
			missing = append(missing, v)
		}
	}
	return here, missing
}

// Leading returns the survivor that leads, with a majority that this node may not know of; false: none says so.
func Leading(all []Survivor) (Survivor, bool) {
	for _, s := range all {
		if s.Leader == s.ID && s.Incarnation > 0 {
			return s, true
		}
	}
	return Survivor{}, false
}

// Recovery is what is known outside of the log of the node that recovers.
type Recovery struct {
	// Known are registers as copies elsewhere have them, in any order; a deleted one has Deleted set. One counts when it is newer than all that
	// this node holds.
	Known []Register
	// Adopt are newer checkpoints than the registers know of.
	Adopt []Adoption
	// Cluster is the cluster's id, for a node that has not heard the group since it started.
	Cluster string
}

// Voters are those of the group as this node knew it last; those of its own log, where it has one that reaches as far.
func (a *Arbiter) Voters() []peer.ID {
	own := a.Survivor()
	if !own.ShowsMore() && own.Incarnation > 0 {
		return own.Voters
	}
	voters, _, _ := a.where.group()
	return voters
}

// Recover makes this node the only voter of the next incarnation of the group, from the best of what its own log and its view hold, and
// from what the caller knows besides; the keeper then brings in other voters. It is for a group that has lost most of its voters for good:
// what only they had committed is lost. It returns the new incarnation when this node leads it. Errors wrap ErrMajority while most of the
// voters answer (their log is the one that counts), ErrNoLog where there is nothing to begin with, or the context's error.
func (a *Arbiter) Recover(ctx context.Context, r Recovery) (uint64, error) {
	all := a.Survivors(ctx)
	own := a.Survivor()
	if own.Incarnation == 0 && own.Shown == 0 && len(r.Known) == 0 {
		return 0, fmt.Errorf("recover: %w, and there are no copies; choose another one", ErrNoLog)
	}
	if a.halted.Load() {
		return 0, fmt.Errorf("recover: this node has stopped applying: %s", own.Halted)
	}
	voters := a.Voters()
	if l, is := Leading(all); is {
		return 0, fmt.Errorf("recover: %w: node %s leads them", ErrMajority, l.ID)
	}
	here, missing := Reachable(own, voters, all)
	if len(here) > len(voters)/2 {
		return 0, fmt.Errorf("recover: %w: %d of %d answer; it goes on by itself", ErrMajority, len(here), len(voters))
	}
	group, saw := a.disk.incarnations()
	t := turn{
		why: fmt.Sprintf("recovered by an operator: %d of %d voters are missing", len(missing), len(voters)), recovery: r, done: make(chan error, 1),
		check: func() error {
			if at, seen := a.disk.incarnations(); at != group || seen != saw {
				return fmt.Errorf("incarnation %s was met meanwhile", seen)
			}
			return nil
		},
	}
	select {
	case a.turns <- t:
	case <-a.closing:
		return 0, fmt.Errorf("recover: %w", ErrClosed)
	case <-ctx.Done():
		return 0, fmt.Errorf("recover: raft does not run here: %w", context.Cause(ctx))
	}
	if err := <-t.done; err != nil {
		return 0, fmt.Errorf("recover: %w", err)
	}
	return a.untilLeading(ctx)
}

// untilLeading waits until this node leads and shows what it holds.
func (a *Arbiter) untilLeading(ctx context.Context) (uint64, error) {
	for {
		if err := a.Sync(ctx); err != nil {
			return 0, fmt.Errorf("recover: begun, but this node does not lead yet: %w", err)
		}
		if st := a.view.now(); st.fromRaft {
			return st.at.inc, nil
		}
		if !sleep(ctx, 10*time.Millisecond) {
			return 0, fmt.Errorf("recover: %w", context.Cause(ctx))
		}
	}
}
