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

	lineage uint64
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
	for _, id := range own.Voters {
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

// Reachable says which voters of a survivor's group are among the survivors, and which are missing.
func Reachable(of Survivor, all []Survivor) (here, missing []peer.ID) {
	for _, v := range of.Voters {
		if slices.ContainsFunc(all, func(s Survivor) bool { return s.ID == v && s.Incarnation == of.Incarnation && s.lineage == of.lineage }) {
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

// Recover makes this node the only voter of the next incarnation of the group, from what its own log holds; the keeper then brings in other
// voters. It is for a group that has lost most of its voters for good: what only they had committed is lost, but for what adopt brings
// back. It returns the new incarnation when this node leads it. Errors wrap ErrMajority while most of the voters answer (their log is the one
// that counts), ErrNoLog, or the context's error.
func (a *Arbiter) Recover(ctx context.Context, adopt []Adoption) (uint64, error) {
	all := a.Survivors(ctx)
	own := a.Survivor()
	if own.Incarnation == 0 {
		return 0, fmt.Errorf("recover: %w; choose one that has voted", ErrNoLog)
	}
	if a.halted.Load() {
		return 0, fmt.Errorf("recover: this node has stopped applying: %s", own.Halted)
	}
	here, missing := Reachable(own, all)
	if l, is := Leading(all); is {
		return 0, fmt.Errorf("recover: %w: node %s leads them", ErrMajority, l.ID)
	}
	if len(here) > len(own.Voters)/2 {
		return 0, fmt.Errorf("recover: %w: %d of %d answer; it goes on by itself", ErrMajority, len(here), len(own.Voters))
	}
	group, _ := a.disk.incarnations()
	t := turn{
		why: fmt.Sprintf("recovered by an operator: %d of %d voters are missing", len(missing), len(own.Voters)), adopt: adopt, done: make(chan error, 1),
		check: func() error {
			if at, seen := a.disk.incarnations(); at != group || seen != group {
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
