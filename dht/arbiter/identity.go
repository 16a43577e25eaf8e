package arbiter

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/keys"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/coppice-project/coppice/internal/planted"
)

// ErrRolledBack is wrapped when this node's raft database is not what the group knows of this node: emptied, restored from an old
// copy, or another node's. Taking part with it could undo what was promised. The node needs a new identity.
var ErrRolledBack = errors.New("the raft database went back in time or is not this node's")

var keyTerm = []byte("CurrentTerm") // raft's own name for it

// sightings remembers what this node saw of others' disks. It is lost with the process: then the group's own record of former voters
// and what other members saw remain.
type sightings struct {
	mu sync.Mutex // guards by
	by map[peer.ID]*wirev1.ArbiterHello
}

func newSightings() *sightings { return &sightings{by: map[peer.ID]*wirev1.ArbiterHello{}} }

// check compares a hello with what was seen before.
func (s *sightings) check(from peer.ID, h *wirev1.ArbiterHello) string {
	s.mu.Lock()
	defer s.mu.Unlock()
	old := s.by[from]
	switch {
	case old == nil:
	case h.GetBoots() < old.GetBoots():
		return fmt.Sprintf("it counts %d starts, %d were seen", h.GetBoots(), old.GetBoots())
	case h.GetBoots() == old.GetBoots() && h.GetBoot() != old.GetBoot():
		return fmt.Sprintf("two processes claim to be start %d of this disk", h.GetBoots())
	case h.GetTerm() < old.GetTerm() && !h.GetEmpty() && incarnationOf(h.GetGroup()) == incarnationOf(old.GetGroup()):
		return fmt.Sprintf("it is in term %d, term %d was seen", h.GetTerm(), old.GetTerm())
	}
	return ""
}

// remember keeps the hello of a node that was vouched for.
func (s *sightings) remember(from peer.ID, h *wirev1.ArbiterHello) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.by[from] = h
}

// vouch says why a starting node must not take part; "" when nothing speaks against it.
func (a *Arbiter) vouch(from peer.ID, h *wirev1.ArbiterHello) string {
	if planted.Bug("amnesia") {
		return ""
	}
	if why := a.seen.check(from, h); why != "" {
		return why
	}
	group, _ := a.disk.incarnations()
	if at := incarnationOf(h.GetGroup()); !h.GetEmpty() && at != group {
		// Of another incarnation: what was acknowledged there does not bind here. Its log is given up when it meets the higher one.
		a.meet(at)
		return ""
	}
	p := a.trans.Load().of(from)
	switch {
	case h.GetEmpty():
		voters, _, _ := a.where.group()
		if slices.Contains(voters, from) || slices.Contains(a.fsm.voted(), from) {
			return "its log is empty, and it has voted before"
		}
	case h.GetTerm() < p.term:
		return fmt.Sprintf("its log is in term %d, it acknowledged entries in term %d", h.GetTerm(), p.term)
	case h.GetTerm() == p.term && h.GetLast() < p.matched:
		return fmt.Sprintf("its log ends at %d, it acknowledged %d", h.GetLast(), p.matched)
	}
	if h.GetTakingPart() {
		a.seen.remember(from, h)
	}
	return ""
}

// verify asks others whether this node's disk is what they know of it. A node with an empty disk needs the word of a voter. One that
// has a log needs no answer: when everybody was down nobody knows, and waiting for ever would help no one.
func (a *Arbiter) verify(ctx context.Context) error {
	h, ask, err := a.hello()
	if err != nil {
		return err
	}
	if !h.GetEmpty() && len(ask) == 0 {
		return nil // the only voter, or bootstrapped just now
	}
	limit := time.Now().Add(a.t.Verify)
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, 250*time.Millisecond) {
		if h.GetEmpty() {
			ask = a.likely(5)
		}
		answered, why := a.vouchers(ctx, h, ask)
		if why == nil && a.superseded() {
			why = errSuperseded
		}
		if why != nil {
			return why
		}
		if n := len(answered); n > 0 && (h.GetEmpty() || n > len(ask)/2) || !h.GetEmpty() && !time.Now().Add(pause).Before(limit) {
			h.TakingPart = true
			_, why := a.vouchers(ctx, h, answered)
			return why
		}
		// Of a node without a log, and with nobody left who could vouch for its disk, a new group may be grown (Recover).
		select {
		case t := <-a.turns:
			if a.take(&t) {
				return nil
			}
		case <-time.After(pause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// hello describes the disk, and names the other servers of the group as it has them.
func (a *Arbiter) hello() (*wirev1.ArbiterHello, []peer.ID, error) {
	exists, err := raft.HasExistingState(a.disk, a.disk, a.disk)
	if err != nil {
		return nil, nil, fmt.Errorf("raft database: %w", err)
	}
	group, _ := a.disk.incarnations()
	h := &wirev1.ArbiterHello{Boots: a.disk.boots(), Boot: a.cfg.Boot, Empty: !exists, Group: group.wire()}
	if !exists {
		return h, nil, nil
	}
	if h.Term, err = a.disk.GetUint64(keyTerm); err != nil && !errors.Is(err, errNoKey) {
		return nil, nil, fmt.Errorf("raft database: %w", err)
	}
	conf, last, err := a.disk.configuration()
	if err != nil {
		return nil, nil, fmt.Errorf("raft database: %w", err)
	}
	h.Last = last
	var others []peer.ID
	for _, s := range conf.Servers {
		if id, err := peer.Decode(string(s.ID)); err == nil && id != a.cfg.Self {
			others = append(others, id)
		}
	}
	return h, keys.Sort(keys.Of(shardKey(thisShard)), others), nil
}

// configuration returns the latest group on disk and the last index.
func (d *disk) configuration() (raft.Configuration, uint64, error) {
	var conf raft.Configuration
	snaps, err := d.List()
	if err != nil {
		return conf, 0, err
	}
	last := d.last
	from := d.first
	if len(snaps) > 0 {
		conf = snaps[0].Configuration
		last = max(last, snaps[0].Index)
		from = max(from, snaps[0].Index+1)
	}
	for i := from; i <= d.last && d.last > 0; i++ {
		var l raft.Log
		if err := d.GetLog(i, &l); err != nil {
			return conf, last, err
		}
		if l.Type == raft.LogConfiguration {
			if conf, err = decodeConfiguration(l.Data); err != nil {
				return conf, last, err
			}
		}
	}
	return conf, last, nil
}

// vouchers asks them all at once. Of an empty disk's answers only those of voters count.
func (a *Arbiter) vouchers(ctx context.Context, h *wirev1.ArbiterHello, ask []peer.ID) (answered []peer.ID, why error) {
	ctx, cancel := context.WithTimeout(ctx, a.t.Verify)
	defer cancel()
	type voice struct {
		id   peer.ID
		resp *wirev1.ArbiterResponse
	}
	answers := make(chan voice, len(ask))
	for _, id := range ask {
		go func() {
			resp := new(wirev1.ArbiterResponse)
			req := a.request(&wirev1.ArbiterRequest{Kind: &wirev1.ArbiterRequest_Hello{Hello: h}})
			if err := a.caller.Call(ctx, id, protoCall, req, resp); err != nil {
				a.log.Debug("nobody to vouch for the disk", "node", id, "err", err)
				answers <- voice{}
				return
			}
			if why := resp.GetRolledBack(); why != "" {
				resp.RolledBack = fmt.Sprintf("node %s says: %s", id, why)
			}
			if h.GetEmpty() && !slices.Contains(idsFromWire(resp.GetWhere().GetVoters()), id) {
				a.hear(resp.GetWhere()) // no voter, but it may know them
				answers <- voice{}
				return
			}
			answers <- voice{id, resp}
		}()
	}
	for range ask {
		v := <-answers
		if v.resp == nil {
			continue
		}
		if why := v.resp.GetRolledBack(); why != "" {
			return answered, fmt.Errorf("%w: %s", ErrRolledBack, why)
		}
		answered = append(answered, v.id)
		a.hear(v.resp.GetWhere())
	}
	return answered, nil
}
