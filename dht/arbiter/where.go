package arbiter

import (
	"slices"
	"sync"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/keys"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// whereabouts is who leads and who votes, as far as this node knows, from its own raft or from others' hints.
type whereabouts struct {
	pulse pulse

	mu       sync.Mutex  // guards the rest
	inc      incarnation // of what follows
	leader   peer.ID
	term     uint64 // of the last leader known
	voters   []peer.ID
	learners []peer.ID
}

// current returns the leader, "" when unknown, and a channel that closes when that changes.
func (w *whereabouts) current() (peer.ID, <-chan struct{}) {
	next := w.pulse.next()
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.leader, next
}

func (w *whereabouts) group() (voters, learners []peer.ID, term uint64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.voters, w.learners, w.term
}

// own takes what this node's raft knows: the truth while the node is in the group, unless others told of a later leader.
func (w *whereabouts) own(inc incarnation, leader peer.ID, term uint64, voters, learners []peer.ID) {
	w.outrank(inc)
	w.mu.Lock()
	known, at := w.term, w.inc
	w.mu.Unlock()
	if leader == "" {
		term = known
	}
	if at == inc && term >= known {
		w.set(leader, term, voters, learners)
	}
}

// outrank forgets what belongs to a lower incarnation.
func (w *whereabouts) outrank(inc incarnation) {
	w.mu.Lock()
	lower := w.inc.before(inc)
	if lower {
		w.inc, w.leader, w.term, w.voters, w.learners = inc, "", 0, nil, nil
	}
	w.mu.Unlock()
	if lower {
		w.pulse.beat()
	}
}

func (w *whereabouts) incarnation() incarnation {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.inc
}

// hint takes what another node knows. A term counts only with its leader: a candidate that is cut off raises its term for nothing.
func (w *whereabouts) hint(h *wirev1.ArbiterWhere) {
	leader, inc := peer.ID(h.GetLeader()), incarnation{h.GetIncarnation(), h.GetLineage()}
	w.outrank(inc)
	w.mu.Lock()
	voters, term, at := w.voters, w.term, w.inc
	w.mu.Unlock()
	switch {
	case len(h.GetVoters()) == 0 || at != inc:
		return
	case leader == "" && len(voters) == 0:
		w.set("", term, idsFromWire(h.GetVoters()), idsFromWire(h.GetLearners()))
	case leader != "" && h.GetTerm() >= term:
		w.set(leader, h.GetTerm(), idsFromWire(h.GetVoters()), idsFromWire(h.GetLearners()))
	}
}

func (w *whereabouts) set(leader peer.ID, term uint64, voters, learners []peer.ID) {
	target := keys.Of(shardKey(thisShard))
	voters = keys.Sort(target, slices.Clone(voters))
	learners = keys.Sort(target, slices.Clone(learners))
	w.mu.Lock()
	same := w.leader == leader && w.term == term && slices.Equal(w.voters, voters) && slices.Equal(w.learners, learners)
	w.leader, w.term, w.voters, w.learners = leader, term, voters, learners
	w.mu.Unlock()
	if !same {
		w.pulse.beat()
	}
}

// lost forgets the leader after it could not be reached.
func (w *whereabouts) lost(leader peer.ID) {
	w.mu.Lock()
	was := w.leader == leader && leader != ""
	if was {
		w.leader = ""
	}
	w.mu.Unlock()
	if was {
		w.pulse.beat()
	}
}

// idCache turns raft's server ids, which are peer ids in base 58, back into peer ids. The zero value is ready.
type idCache struct{ known sync.Map }

func (c *idCache) decode(s string) (peer.ID, bool) {
	if id, ok := c.known.Load(s); ok {
		return id.(peer.ID), true
	}
	id, err := peer.Decode(s)
	if err != nil {
		return "", false
	}
	c.known.Store(s, id)
	return id, true
}
