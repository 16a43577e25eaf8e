package supervisor

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/dht/members"
)

const (
	// rankDelay is how long each further candidate waits before it claims, so that the first one usually is alone (DESIGN.md §5).
	rankDelay = 150 * time.Millisecond
	// rebootGrace is what a node that has just come back gets to claim its own components before its successors do.
	rebootGrace = 300 * time.Millisecond
	// claimAttempt bounds one try to claim from a dead owner; after it everything is looked at anew.
	claimAttempt = 2 * time.Second
	// maxRank bounds who tries at all when no successor is alive.
	maxRank = 5
)

// onMember notes the end of a node's process, and that it was none after all. Sweeps see to its instances.
func (s *Supervisor) onMember(c members.Change) {
	if c.New.ID == s.cfg.Self {
		if c.Trigger == "refuted" {
			s.cfg.Log.Warn("others had called this node dead: nothing is served before its ownership is confirmed")
			s.lease.doubt()
		}
		return
	}
	gone := c.New.State == members.Dead || c.New.State == members.Left
	// A node that appears dead (Old is empty: this node has just started and has not heard of it yet) has not died here and now.
	was := c.Old.ID != "" && c.Old.State.Running()
	reboot := c.Old.Boot != 0 && c.New.Boot != c.Old.Boot
	boot := c.Old.Boot
	if boot == 0 {
		boot = c.New.Boot
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch d, dead := s.deaths[c.New.ID]; {
	case gone && was, reboot:
		s.deaths[c.New.ID] = death{
			node: c.New.ID, name: c.New.Name, boot: boot, reboot: reboot && !gone, evidence: c.New.Evidence, at: time.Now(),
			silent: gone && c.Trigger != "refused" && c.Trigger != "goodbye", planned: c.New.State == members.Left,
			since: s.lease.boot(),
		}
	case dead && c.New.State.Running() && c.New.Boot == d.boot:
		delete(s.deaths, c.New.ID) // it was alive all the time
	}
}

// death is the end of one process of one node.
type death struct {
	node     peer.ID
	name     string
	boot     uint64
	reboot   bool
	silent   bool // nothing proves it
	planned  bool // it said goodbye
	evidence string
	at       time.Time
	since    time.Duration // boot time of its finding
}

// succession is the taking over of one epoch whose owner has died, as this node sees it.
type succession struct {
	nonce uint64 // of the claim that made the epoch
	since time.Time
	busy  bool
}

// succeed begins to take an instance over if its owner is known to have died. It is asked again and again: a register may say only later that
// the dead node owned it, and a successor that comes first may die as well.
func (s *Supervisor) succeed(reg arbiter.Register) {
	paused := s.paused()
	s.mu.Lock()
	if t := s.successions[reg.Key]; paused && (t == nil || !t.busy) {
		delete(s.successions, reg.Key) // the turns begin when the cluster goes on: who owned it may be back by then
		s.mu.Unlock()
		return
	}
	d, dead := s.deaths[reg.Owner]
	t := s.successions[reg.Key]
	if !dead || d.boot != reg.Boot {
		if t != nil && !t.busy {
			delete(s.successions, reg.Key)
		}
		s.mu.Unlock()
		return
	}
	if t == nil || t.nonce != reg.Nonce && !t.busy {
		t = &succession{nonce: reg.Nonce, since: time.Now()}
		s.successions[reg.Key] = t
	}
	busy := t.busy
	t.busy = true
	d.at = t.since
	s.mu.Unlock()
	if busy {
		return
	}
	s.spawn(func() {
		if err := s.takeOver(s.ctx, reg.Key, d); err != nil && s.ctx.Err() == nil {
			s.cfg.Log.Warn("take over failed; it is tried again, and placement claims it, too", "register", reg.Key, "from", d.name, "error", err)
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		t.busy = false
	})
}

// sighting is an epoch and since when this node has known of it, by its own clock; the zero time: longer than it has been watching.
type sighting struct {
	nonce uint64 // of the claim that made it
	since time.Time
}

// sight notes which epochs there are. What is there when the view is first known to be the arbiter's began before that, nobody here knows when.
func (s *Supervisor) sight(list []arbiter.Register) {
	now := time.Now()
	inTouch := s.inTouch()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.watching {
		now = time.Time{}
	}
	s.watching = s.watching || inTouch
	there := make(map[string]bool, len(list))
	for _, reg := range list {
		there[reg.Key] = true
		if at, ok := s.sightings[reg.Key]; !ok || at.nonce != reg.Nonce {
			s.sightings[reg.Key] = sighting{reg.Nonce, now}
		}
	}
	maps.DeleteFunc(s.sightings, func(key string, _ sighting) bool { return !there[key] })
}

// lasted is how long an epoch has lasted, by this node's own clock: what owners write into registers are dates of their clocks. What began before this
// node watched is old.
func (s *Supervisor) lasted(reg arbiter.Register) time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	at, ok := s.sightings[reg.Key]
	if !ok || at.nonce != reg.Nonce { // it began since the last look
		return 1
	}
	if at.since.IsZero() {
		return components.DeathWindow
	}
	return max(time.Since(at.since), 1)
}

// died says whether a process that was taken for dead still is.
func (s *Supervisor) died(d death) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	now, ok := s.deaths[d.node]
	return ok && now.boot == d.boot
}

// takeOver claims one instance of a dead node when it is this node's turn. It gives up as soon as anyone has claimed it.
func (s *Supervisor) takeOver(ctx context.Context, key string, d death) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		reg, ok := s.register(key)
		if !ok || reg.Owner != d.node || reg.Boot != d.boot || !s.died(d) || s.paused() {
			return nil
		}
		var body componentsv1.InstanceBody
		if err := proto.Unmarshal(reg.Body, &body); err != nil {
			return fmt.Errorf("read %s: %w", key, err)
		}
		if body.GetEachNode() != "" || body.GetQuarantined() {
			return nil
		}
		rank, ok := s.rank(key, &body, d.node)
		if !ok {
			return nil
		}
		wait := time.Duration(rank) * rankDelay
		if d.reboot {
			wait += rebootGrace
		}
		left := wait - time.Since(d.at)
		if !s.lease.holds() || d.silent && !s.lease.steady(d.since) {
			// Perhaps it is this node that is cut off. A claim would wait for the arbiter until the cut heals, and then take from nodes that
			// live: the others get the time to contradict.
			left = max(left, 20*time.Millisecond)
		}
		if left > 0 {
			if err := pause(ctx, min(left, 50*time.Millisecond)); err != nil {
				return err
			}
			continue
		}
		claimed, err := s.claimFromDead(ctx, reg, &body, d)
		if err == nil {
			s.adopt(claimed)
			return nil
		}
		if refused, ok := errors.AsType[*arbiter.RefusedError](err); ok {
			s.adopt(refused.Current) // somebody else's epoch; or a newer one of the same dead process, or a newer body: once more with that
			continue
		}
		if w, ok := errors.AsType[*arbiter.WaitError](err); ok { // it may still hold its lease
			if err := pause(ctx, w.For+time.Duration(rank)*rankDelay); err != nil { // whose turn it is does not change
				return err
			}
			continue
		}
		if ctx.Err() != nil {
			return err
		}
		s.cfg.Log.Debug("claim from a dead owner", "register", key, "from", d.name, "error", err)
	}
}

// rank is this node's place among those who may take the instance over; false: others are there for it. The named successors come
// first, in order, the dead ones skipped; without any alive it is the order of XOR distance to the instance's key.
func (s *Supervisor) rank(key string, body *componentsv1.InstanceBody, dead peer.ID) (int, bool) {
	alive := 0
	for _, id := range body.GetSuccessors() {
		p, err := peer.Decode(id)
		if err != nil || p == dead || !s.hosts(p) {
			continue
		}
		if p == s.cfg.Self {
			return alive, true
		}
		alive++
	}
	if alive > 0 {
		return 0, false
	}
	for i, m := range s.cfg.Members.Closest(key, maxRank, func(m members.Member) bool { return m.ID != dead && s.hosts(m.ID) }) {
		if m.ID == s.cfg.Self {
			return i, true
		}
	}
	return 0, false
}

// hosts says whether a node may be given components now.
func (s *Supervisor) hosts(id peer.ID) bool {
	m, ok := s.cfg.Members.Member(id)
	return ok && m.State == members.Alive && !m.Draining && m.Role != "voter"
}

func (s *Supervisor) claimFromDead(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, d death) (arbiter.Register, error) {
	next := components.Takeover(body, components.OwnerDeath{
		Node: d.node.String(), Name: d.name, Boot: d.boot, Reboot: d.reboot, Planned: d.planned, Evidence: d.evidence,
		Trigger: "neighbour", To: s.cfg.Self.String(), Now: s.cfg.Now(), Lasted: s.lasted(reg),
	})
	data, err := proto.Marshal(next)
	if err != nil {
		return arbiter.Register{}, fmt.Errorf("encode %s: %w", reg.Key, err)
	}
	var root arbiter.ClaimRequest
	if next.GetDigest() != body.GetDigest() {
		root = s.fallbackRoot(ctx, reg, body)
	}
	cctx, cancel := context.WithTimeout(ctx, claimAttempt)
	defer cancel()
	claimed, err := s.claimOver(cctx, reg, arbiter.ClaimRequest{Body: data, SetRoot: root.SetRoot, Root: root.Root})
	if err != nil {
		return arbiter.Register{}, fmt.Errorf("claim %s after %s: %w", reg.Key, d.name, err)
	}
	name := instanceOf(reg.Key)
	ev := events.Event{
		Channel: "/apps/" + name, Type: "failover", Trigger: "neighbour", Cause: d.name + " died: " + d.evidence,
		Message: fmt.Sprintf("%s taken over from %s in epoch %d", name, d.name, claimed.Epoch),
		Fields:  map[string]string{"from": d.name, "to": s.cfg.Name, "epoch": fmt.Sprint(claimed.Epoch)},
	}
	if next.GetQuarantined() {
		ev.Type = "quarantine"
		ev.Message = fmt.Sprintf("%s is quarantined: %d of its owners died within %s of its start", name, len(next.GetDeaths()), components.DeathWindow)
	}
	s.cfg.Events.Publish(ev)
	return claimed, nil
}

// claimOver takes the next epoch of a register for this node, if the register is as reg says: its epoch, and its body, from which the claim's
// was made. A local view that lags must not undo what is committed, that the epoch settled for example. It fails with *arbiter.RefusedError
// where the register has moved on.
func (s *Supervisor) claimOver(ctx context.Context, reg arbiter.Register, claim arbiter.ClaimRequest) (arbiter.Register, error) {
	claim.Key, claim.Expect, claim.Nonce, claim.Owner, claim.Boot = reg.Key, reg.Epoch, s.nonce(), s.cfg.Self, s.cfg.Boot
	res, err := s.cfg.Arbiter.Txn(ctx, arbiter.TxnRequest{
		Nonce: s.nonce(), Compares: []arbiter.Compare{{Key: reg.Key, Field: "revision", Equal: reg.Revision}}, Then: []arbiter.Op{{Claim: &claim}},
	})
	if err != nil {
		return arbiter.Register{}, err
	}
	if res.Succeeded && len(res.Registers) == 1 {
		return res.Registers[0], nil
	}
	refused := &arbiter.RefusedError{Reason: "the register has moved on"}
	if len(res.Registers) == 1 {
		refused.Current, refused.Exists = res.Registers[0], true
	}
	return arbiter.Register{}, refused
}

// pausedKey is there while the cluster as a whole is down, or on its way.
const pausedKey = "meta/paused"

func (s *Supervisor) paused() bool {
	_, ok := s.cfg.Arbiter.Get(pausedKey)
	return ok
}
