package arbiter

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/coppice-project/coppice/internal/planted"
)

// The rule of two nodes (consistency.md §3.6). A group of two commits with both. While Meta.TwoNode names one of them, the primary, either
// may go on alone when the other is gone, in the next incarnation:
//
//   - the primary after Timings.Alone without a word of the secondary, or at once on proof that its process is dead, and only when it has
//     heard it since it was started;
//   - the secondary only on proof that the primary's process is dead, obtained while the primary cannot have gone alone for its silence,
//     and only when the primary has answered it since it was started.
//
// What the two measure with is one exchange: the secondary beats, the primary answers. The primary counts from when a beat came, the
// secondary from when it sent the last one that was answered, which is earlier. TestTwoNodeModel goes through all interleavings, with the
// same decision function, and shows for each condition what is lost without it.

// loner is all that a node of two decides on.
type loner struct {
	on      bool // the rule holds: committed and applied, and nothing in the log ends it
	primary bool
	met     bool          // there was contact since this process was started, in this incarnation
	silent  time.Duration // since the last contact, when the proof was obtained or now
	proven  bool          // the link is gone and the other's host refused a fresh connection: its process is dead
	limit   time.Duration // Timings.Alone
}

// drift is by how much the rates of two clocks may differ.
const drift = 0.01

// alone says whether the node may go on alone. It is the whole rule.
func (l loner) alone() bool {
	switch {
	case !l.on || !l.met:
		return false
	case l.primary:
		return l.proven || l.silent >= l.limit || planted.Bug("two-impatient") && l.silent >= l.limit/4
	case planted.Bug("two-unproven") && l.silent >= l.limit:
		return true
	}
	return l.proven && (l.silent <= time.Duration(float64(l.limit)*(1-2*drift)) || planted.Bug("two-late-proof"))
}

// two watches the other of two nodes.
type two struct {
	a     *Arbiter
	kicks chan struct{}

	mu      sync.Mutex // guards the rest
	down    map[peer.ID]bool
	inc     incarnation   // of the contact
	with    peer.ID       // of the contact
	at      time.Duration // of the contact, on the boot-time clock
	tried   incarnation   // in which this node last tried to go alone
	notYet  time.Duration // boot time before which it does not try again in that
	rule    peer.ID       // primary, as last applied
	leaving bool          // no contact counts any more: this node is finding out whether the other is dead
}

// probePause lies between the first two probes of a peer whose link is gone; it doubles up to a beat's.
const probePause = 25 * time.Millisecond

func newTwo(a *Arbiter) *two {
	return &two{a: a, kicks: make(chan struct{}, 1), down: map[peer.ID]bool{}}
}

// linkChanged is told by the links.
func (t *two) linkChanged(id peer.ID, up bool) {
	t.mu.Lock()
	if up {
		delete(t.down, id)
	} else {
		t.down[id] = true
	}
	t.mu.Unlock()
	t.kick()
}

// applied is told who is primary after each batch of entries: a rule that begins begins with a contact.
func (t *two) applied(primary peer.ID) {
	t.mu.Lock()
	same := t.rule == primary
	t.rule = primary
	t.mu.Unlock()
	if !same {
		t.kick()
	}
}

func (t *two) kick() {
	select {
	case t.kicks <- struct{}{}:
	default:
	}
}

func (t *two) isDown(id peer.ID) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.down[id]
}

// partner returns the other voter when there are two, and whether this node is the primary; on says whether the rule holds as far as is
// applied here.
func (t *two) partner(r *raft.Raft) (other peer.ID, primary, on bool) {
	voters, _ := t.a.configuration(r)
	if len(voters) != 2 || !slices.Contains(voters, t.a.cfg.Self) {
		return "", false, false
	}
	other = voters[0]
	if other == t.a.cfg.Self {
		other = voters[1]
	}
	st := t.a.fsm.shown.Load()
	if st == nil {
		return other, false, false
	}
	first := st.meta.TwoNode
	return other, first == t.a.cfg.Self, first == t.a.cfg.Self || first == other
}

// status says who is primary of the rule of two, if it holds, and whether this node could go on alone.
func (t *two) status(r *raft.Raft) (primary peer.ID, paired bool) {
	other, first, on := t.partner(r)
	if !on {
		return "", false
	}
	primary = other
	if first {
		primary = t.a.cfg.Self
	}
	inc, err := t.a.speaks()
	if err != nil {
		return primary, false
	}
	l := t.look(other, first, on, inc)
	return primary, l.met && t.worthProbing(l)
}

// contact notes one, unless it came too late.
func (t *two) contact(with peer.ID, inc incarnation, at time.Duration) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.leaving && !planted.Bug("two-contact-leaving") {
		return false
	}
	t.with, t.inc, t.at = with, inc, at
	return true
}

// serveBeat answers the secondary. It counts as contact whoever is primary: that may not be applied here yet.
func (t *two) serveBeat(from peer.ID, inc incarnation) *wirev1.ArbiterResponse {
	own, err := t.a.speaks()
	var other peer.ID
	if r := t.a.raft.Load(); err == nil && r != nil {
		other, _, _ = t.partner(r)
	}
	if err == nil && other != from {
		err = errors.New("the two are not the voters")
	}
	if err == nil && own != inc {
		err = fmt.Errorf("this node is of incarnation %s, the beat of %s", own, inc)
	}
	if err == nil && !t.contact(from, inc, t.a.cfg.BootTime()) {
		err = errors.New("this node is about to go on alone")
	}
	if err != nil {
		return &wirev1.ArbiterResponse{Code: wirev1.ArbiterResponse_BUSY, Reason: err.Error()}
	}
	return &wirev1.ArbiterResponse{}
}

// beat asks the primary for a sign of life; contact is when the question left.
func (t *two) beat(ctx context.Context, to peer.ID, inc incarnation) {
	ctx, cancel := context.WithTimeout(ctx, t.a.t.Alone/3)
	defer cancel()
	sent := t.a.cfg.BootTime()
	resp := new(wirev1.ArbiterResponse)
	req := &wirev1.ArbiterRequest{Shard: thisShard, Kind: &wirev1.ArbiterRequest_Beat{Beat: true}, Incarnation: inc.wire()}
	if err := t.a.caller.Call(ctx, to, protoCall, req, resp); err != nil {
		return // silence is what counts
	}
	t.a.hear(resp.GetWhere())
	if resp.GetCode() == wirev1.ArbiterResponse_OK {
		t.contact(to, inc, sent)
	}
}

// look describes the situation, but for the proof.
func (t *two) look(other peer.ID, primary, on bool, inc incarnation) loner {
	t.mu.Lock()
	defer t.mu.Unlock()
	l := loner{on: on, primary: primary, limit: t.a.t.Alone}
	if t.with == other && t.inc == inc {
		l.met, l.silent = true, t.a.cfg.BootTime()-t.at
	} else if planted.Bug("two-unmet") {
		l.met, l.silent = true, t.a.cfg.BootTime()-t.a.begun
	}
	return l
}

func (t *two) leave(is bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.leaving = is
}

// run watches until the context ends, one life of raft long.
func (t *two) run(ctx context.Context, r *raft.Raft) {
	t.leave(false)
	defer t.leave(false)
	beats := newBeater(t)
	defer beats.stop()
	probing := probePause
	looked := t.a.cfg.BootTime()
	var awake time.Duration
	for {
		// What came in while this process did not run has not been read yet: it gets a moment to.
		now := t.a.cfg.BootTime()
		if now-looked > t.a.t.Alone/3 {
			awake = now + t.a.t.Alone/3
		}
		looked = now
		pause := t.a.t.Alone / 6
		other, primary, on := t.partner(r)
		if inc, err := t.a.speaks(); err == nil && on {
			l := t.look(other, primary, on, inc)
			why := ""
			switch {
			case l.alone() && now < awake:
				pause = awake - now
			case l.alone():
				why = "the other of two nodes has been silent for " + l.silent.Round(time.Millisecond).String()
			case t.isDown(other) && t.worthProbing(l):
				beats.stop()
				if t.prove(ctx, l, other, inc) {
					why = "the process of the other of two nodes is dead: its host refuses the connection"
				}
				pause, probing = probing, min(2*probing, pause)
			default:
				probing = probePause
			}
			if why != "" && t.goAlone(ctx, r, inc, primary, why) {
				return
			}
			if !primary {
				beats.start(ctx, other, inc)
			}
		}
		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-t.kicks:
		case <-ctx.Done():
			timer.Stop()
			return
		}
		timer.Stop()
	}
}

// worthProbing: a proof would be of use.
func (t *two) worthProbing(l loner) bool {
	l.proven = true
	return t.a.cfg.Links != nil && l.alone()
}

// prove asks the other's host and says whether this node may go on alone. From before the question until the answer was acted on nothing
// counts as contact: a process that is started there meanwhile must find a peer that has gone on, not one that talks as before.
func (t *two) prove(ctx context.Context, l loner, other peer.ID, inc incarnation) bool {
	t.leave(true)
	probe, cancel := context.WithTimeout(ctx, t.a.t.Alone/3)
	defer cancel()
	proven := t.a.cfg.Links.Probe(probe, other) == peers.Refused && t.isDown(other)
	if proven {
		l = t.look(other, l.primary, l.on, inc)
		l.proven = true
	}
	if !proven || !l.alone() {
		t.leave(false)
		return false
	}
	return true
}

// goAlone asks for the next incarnation; true: raft is being ended for it. It asks the disk before, so that raft is not ended in vain, and
// again then.
func (t *two) goAlone(ctx context.Context, r *raft.Raft, inc incarnation, primary bool, why string) bool {
	t.leave(true)
	voters, _ := t.a.configuration(r)
	check := func() error { return t.stillHolds(inc, primary, voters) }
	now := t.a.cfg.BootTime()
	t.mu.Lock()
	early := now < t.notYet && t.tried == inc
	if !early {
		t.notYet, t.tried = now+retryTime, inc
	}
	t.mu.Unlock()
	err := errors.New("it was tried a moment ago")
	if !early {
		err = check()
	}
	if err != nil {
		t.a.failures.note("go on alone", err)
		t.leave(false)
		return false
	}
	select {
	case t.a.turns <- turn{why: why, check: check, done: make(chan error, 1)}:
		return true
	case <-ctx.Done():
		return true
	}
}

// stillHolds asks the disk once more, now that raft stands still: the rule must hold as applied, and no entry behind that may touch it or
// the group. An entry that ends the rule counts from when it is in the log; one that begins it from when it is applied.
func (t *two) stillHolds(inc incarnation, primary bool, voters []peer.ID) error {
	d := t.a.disk
	st := t.a.fsm.shown.Load()
	if group, seen := d.incarnations(); group != inc || seen != inc || st == nil {
		return fmt.Errorf("another incarnation was met: %s", seen)
	}
	if first := st.meta.TwoNode; first == "" || (first == t.a.cfg.Self) != primary {
		return errors.New("the rule of two nodes does not hold any more")
	}
	conf, _, err := d.configuration()
	if err != nil {
		return err
	}
	if now := votersOf(conf); !slices.Equal(now, voters) {
		return fmt.Errorf("the voters have changed: %v", now)
	}
	var pending error
	err = d.ruleChanges(st.at.index, func(index uint64, _ peer.ID) {
		pending = fmt.Errorf("entry %d changes the rule of two nodes", index)
	})
	return errors.Join(err, pending)
}

// ruleChanges calls f for each entry behind an index that begins the rule of two nodes, or ends it (no primary).
func (d *disk) ruleChanges(behind uint64, f func(index uint64, primary peer.ID)) error {
	first, last := d.ends()
	for i := max(behind+1, first); i <= last && last > 0; i++ {
		var l raft.Log
		if err := d.GetLog(i, &l); errors.Is(err, raft.ErrLogNotFound) {
			continue // compacted meanwhile: it was applied
		} else if err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
		if l.Type != raft.LogCommand {
			continue
		}
		e, err := decodeEntry(l.Data, math.MaxUint32)
		if err != nil {
			return fmt.Errorf("entry %d: %w", i, err)
		}
		for _, c := range e.GetCommands() {
			if m := c.GetSetMeta(); m != nil && m.TwoNode != nil {
				f(i, peer.ID(m.GetTwoNode()))
			}
		}
	}
	return nil
}

// beater makes one beat at a time.
type beater struct {
	t      *two
	cancel context.CancelFunc
	done   chan struct{}
	next   time.Duration
}

func newBeater(t *two) *beater { return &beater{t: t} }

// start makes a beat when it is time and none is under way.
func (b *beater) start(ctx context.Context, to peer.ID, inc incarnation) {
	now := b.t.a.cfg.BootTime()
	if b.done != nil {
		select {
		case <-b.done:
			b.cancel()
		default:
			return
		}
	} else if now < b.next {
		return
	}
	if b.done = nil; now < b.next {
		return
	}
	b.next = now + b.t.a.t.Alone/6 - time.Millisecond
	ctx, b.cancel = context.WithCancel(ctx)
	b.done = make(chan struct{})
	go func(done chan struct{}) {
		defer close(done)
		b.t.beat(ctx, to, inc)
	}(b.done)
}

// stop ends the one under way and returns when it can have no effect any more.
func (b *beater) stop() {
	if b.done == nil {
		return
	}
	b.cancel()
	<-b.done
	b.done = nil
}
