package members

import (
	"fmt"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/keys"
)

// entry is what this node holds of one node.
type entry struct {
	id       peer.ID
	point    keys.Point
	info     *Info    // replaced, never changed
	verdict  *verdict // likewise; nil: none
	admitted bool     // by a committed record
	expelled bool     // by a committed record; sticks until admitted again
	unheard  bool     // known from the book only
	met      bool     // heard, or told of by one who heard it, since this node started
	suspect  string
	since    time.Time // in its state
	seen     time.Time // last known to run
	evidence string    // while alive
	shown    shown
	flaps    *flaps // nil while it has not died

	connected bool
	lastByte  time.Duration // boot time of its last sign of life to this node itself
	rtt       *rttStats     // nil where no heartbeats pass between the two
	measure   measured      // the last one that was asked for

	dialing  bool // a contact is under way
	nextDial time.Time
	backoff  time.Duration
	reported time.Time // last look because of somebody's report
	asking   bool      // an inquiry is under way
	lonely   int       // inquiries in a row that nobody answered
	blamed   bool      // its garbage was logged
	shunned  time.Time // not to be chosen as watcher until then

	sum   uint64 // hash of what is told, of
	sumOf summed
}

// shown is a node as subscribers know it.
type shown struct {
	info     *Info // nil: they do not
	state    State
	since    time.Time
	evidence string
}

// summed is what a hash of an entry depends on.
type summed struct {
	info    *Info // nil: the hash was not made
	verdict *verdict
	unheard bool
}

// hash is told().hash(), made once for each state: digests are asked for all the time, and few entries change.
func (e *entry) hash() uint64 {
	of := summed{e.info, e.verdict, e.unheard}
	if of != e.sumOf {
		e.sum, e.sumOf = e.told().hash(), of
	}
	return e.sum
}

func (e *entry) member() bool { return e.admitted && !e.expelled }

func (e *entry) state(now time.Time) State {
	switch {
	case e.expelled:
		return Left
	case e.verdict.covers(e.info.version()):
		return e.verdict.kind
	case e.unheard:
		return Dead
	case e.suspect != "":
		return Suspect
	case e.flaps != nil && now.Before(e.flaps.until):
		return Quarantined
	}
	return Alive
}

// running reports whether the node is a member and taken to run.
func (e *entry) running() bool {
	return e.member() && !e.unheard && !e.verdict.covers(e.info.version())
}

// lastSeen returns when a lost node was last known to run: by the book, or by what this node saw itself.
func (e *entry) lastSeen() time.Time {
	if e.unheard {
		return e.seen
	}
	return e.since
}

func (e *entry) why(s State) string {
	switch {
	case e.expelled:
		return "expelled: its membership was revoked"
	case s == Left || (s == Dead && e.verdict.covers(e.info.version())):
		return e.verdict.evidence
	case s == Dead:
		return "not heard since this node started"
	case s == Suspect:
		return e.suspect
	case s == Quarantined:
		return fmt.Sprintf("%d deaths within %v; not used until %s", len(e.flaps.deaths), flapWindow, e.flaps.until.UTC().Format(time.TimeOnly))
	}
	return e.evidence
}

// told returns what messages say of the node.
func (e *entry) told() state {
	s := state{info: e.info, unheard: e.unheard}
	if e.verdict.covers(e.info.version()) {
		s.verdict = e.verdict
	}
	return s
}

// name returns a node's name for logs and evidence. Locked.
func (m *Members) name(id peer.ID) string {
	if e := m.entries[id]; e != nil && e.info.Name != "" {
		return e.info.Name
	}
	return id.ShortString()
}

// touch brings what follows from an entry up to date after a change: its member, its subscribers, its flapping. Locked.
func (m *Members) touch(e *entry, trigger string) {
	now := time.Now()
	old := e.shown
	m.countDeath(e, old, now)
	m.forgive(e)
	s := e.state(now)
	if !e.admitted && !e.expelled {
		return // nobody's business before it is admitted
	}
	if s != old.state || old.info == nil {
		e.since = now
	}
	if s.Running() {
		e.seen = now
	}
	m.unsaved = true
	m.recheck(e, old, s)
	m.snap.Store(nil)
	e.shown = shown{e.info, s, e.since, e.why(s)}
	if old.info != nil && old.state == s && (old.info == e.info || old.info.sameFor(*e.info)) && trigger != "refuted" {
		return
	}
	var before Member
	if old.info != nil {
		if old.info.Boot != 0 && e.info.Boot != old.info.Boot {
			trigger = "reboot"
		}
		before = m.memberShown(e, old)
	}
	m.changes.add(Change{Old: before, New: m.memberShown(e, e.shown), Trigger: trigger})
}

func (m *Members) memberOf(e *entry, s State) Member {
	return m.memberShown(e, shown{e.info, s, e.since, e.why(s)})
}

// memberShown is a node in a state of its own, with the connection and the round trips of now.
func (m *Members) memberShown(e *entry, s shown) Member {
	out := Member{Info: *s.info, State: s.state, Since: s.since, Evidence: s.evidence}
	if e.rtt != nil {
		out.RTT = e.rtt.mean
	}
	switch {
	case e == m.self:
		out.Connection = "self"
	case m.cfg.Connection != nil:
		out.Connection = m.cfg.Connection(e.id)
	case e.connected:
		out.Connection = "direct"
	}
	return out
}

// add returns the entry of a node, made if need be; nil when there are too many strangers. Locked.
func (m *Members) add(id peer.ID) *entry {
	if e := m.entries[id]; e != nil {
		return e
	}
	if m.unknown >= maxUnknown {
		m.badMessages.Add(1)
		return nil
	}
	m.unknown++
	e := &entry{id: id, point: keys.OfPeer(id), info: &Info{ID: id}, since: time.Now()}
	m.entries[id] = e
	m.order = append(m.order, e)
	return e
}

// shared has what a node says of itself use the ids that this node holds already: without it each would lie here once for each node that
// names it as watcher. Locked.
func (m *Members) shared(i *Info) *Info {
	if e := m.entries[i.ID]; e != nil {
		i.ID = e.id
	}
	for k, id := range i.Watchers {
		if e := m.entries[id]; e != nil {
			i.Watchers[k] = e.id
		}
	}
	for _, s := range []struct{ text, own *string }{{&i.Version, &m.self.info.Version}, {&i.Platform, &m.self.info.Platform}, {&i.Role, &m.self.info.Role}, {&i.Zone, &m.self.info.Zone}} {
		if *s.text == *s.own {
			*s.text = *s.own
		}
	}
	return i
}

// merge takes in what from says of a node. direct: the node says it itself. Locked.
func (m *Members) merge(from peer.ID, s state) {
	if s.info.ID == m.id {
		m.hearOfSelf(s)
		return
	}
	e := m.add(s.info.ID)
	if e == nil || e.expelled {
		return
	}
	direct := from == e.id
	wasCovered := e.verdict.covers(e.info.version())
	trigger := m.mergeInfo(e, s, direct)
	if s.verdict.newer(e.verdict) && s.verdict.covers(e.info.version()) {
		if t := m.mergeVerdict(from, e, s.verdict); t != "" {
			trigger = t
		}
	}
	if trigger != "" {
		if wasCovered && !e.verdict.covers(e.info.version()) && trigger != "reboot" {
			trigger = "refuted"
			m.healed()
		}
		m.touch(e, trigger)
		m.pass(e.id, trigger)
	}
	if e.verdict.covers(e.info.version()) && !s.unheard && !s.verdict.covers(e.info.version()) {
		m.reportedAlive(e)
	}
}

// mergeInfo takes over what is newer and says what that is to be called; "" for nothing new.
func (m *Members) mergeInfo(e *entry, s state, direct bool) string {
	c := s.info.version().compare(e.info.version())
	e.met = e.met || (c >= 0 && !s.unheard && s.info.Boot != 0)
	if c < 0 || (c == 0 && (!e.unheard || s.unheard)) {
		return ""
	}
	trigger := "update"
	if e.unheard || e.shown.info == nil || e.info.Boot == 0 {
		trigger = "heard"
	}
	e.unheard = s.unheard && (e.unheard || !e.admitted)
	if c > 0 {
		if e.info.Boot != 0 && e.info.Boot != s.info.Boot {
			trigger = "reboot"
			e.suspect, e.lonely = "", 0
			e.rtt = nil
		} else if trigger == "update" && s.info.readmitted.compare(e.info.readmitted) > 0 {
			trigger = "readmitted"
		}
		e.info = m.shared(s.info)
		if m.cfg.Learned != nil && len(s.info.Addrs) > 0 {
			m.cfg.Learned(e.id, s.info.Addrs)
		}
	}
	e.evidence = "told of by another member"
	if direct {
		e.evidence = "heard"
	}
	if !e.unheard {
		e.backoff = 0
		m.dialAt(e, time.Time{})
	}
	return trigger
}

// mergeVerdict takes over a verdict on a node that this node holds to run only if it has reason to; "" if not.
func (m *Members) mergeVerdict(from peer.ID, e *entry, v *verdict) string {
	trigger := "goodbye"
	if v.kind == Dead {
		trigger = "silence"
		if v.proof {
			trigger = "refused"
		}
		if e.running() && !e.unheard && !m.believe(from, e, v) {
			m.rejected.Add(1)
			m.hint(from, e, v)
			return ""
		}
	}
	e.verdict = v
	e.suspect, e.lonely = "", 0
	m.lostNow(e)
	return trigger
}

// believe: fresh, and a proof, or agreed on by most of the node's own watchers; and not against what this node hears itself.
func (m *Members) believe(from peer.ID, e *entry, v *verdict) bool {
	if time.Since(v.since) > freshVerdict || m.hears(e.id) {
		return false
	}
	if v.proof {
		return m.deciders(from, v, nil) > 0
	}
	if len(e.info.Watchers) == 0 {
		return m.deciders(from, v, nil) >= 2
	}
	return m.deciders(from, v, e.info.Watchers) > len(e.info.Watchers)/2
}

// deciders counts who agreed on a verdict and is taken to run: of the given ones, or of all when nil.
func (m *Members) deciders(from peer.ID, v *verdict, of []peer.ID) int {
	n := 0
	for _, id := range v.by {
		e := m.entries[id]
		if id != from && id != m.id && (e == nil || !e.running()) {
			continue
		}
		if of == nil || contains(of, id) {
			n++
		}
	}
	return n
}

// hint has this node look for itself, unless the report has too little behind it: a node that was cut off calls everybody dead.
func (m *Members) hint(from peer.ID, e *entry, v *verdict) {
	need := 2
	if v.proof || m.runningCount() <= 3 {
		need = 1
	}
	if m.deciders(from, v, nil) < need || m.hears(e.id) || time.Since(e.reported) < reportPause {
		return
	}
	e.reported = time.Now()
	m.inquire(e, causeHint, "reported dead by "+m.name(from))
}

// reportedAlive has a node that this one holds for dead or left dialled soon, because another member holds it to run.
func (m *Members) reportedAlive(e *entry) {
	if !e.member() || time.Since(e.reported) < reportPause {
		return
	}
	e.reported = time.Now()
	if soon := time.Now().Add(m.jitter(min(time.Second, time.Duration(len(m.entries))*10*time.Millisecond))); soon.Before(e.nextDial) {
		m.dialAt(e, soon)
	}
}

// healed: a node called dead for its silence lives, so a cut has ended. The others lost to silence are dialled soon. Locked.
func (m *Members) healed() {
	now := time.Now()
	if now.Sub(m.lastHeal) < reportPause {
		return
	}
	m.lastHeal = now
	for _, e := range m.entries {
		if e.member() && e.verdict.covers(e.info.version()) && e.verdict.kind == Dead && !e.verdict.proof {
			if soon := now.Add(m.jitter(2 * time.Second)); soon.Before(e.nextDial) {
				e.backoff = redialFirst
				m.dialAt(e, soon)
			}
		}
	}
}

// hearOfSelf refutes what is said against this node, and outranks an earlier life whose clock was ahead. Locked.
func (m *Members) hearOfSelf(s state) {
	if s.verdict != nil {
		m.refute(s.verdict.at, s.verdict.evidence)
	}
	v := s.info.version()
	if s.unheard || v.compare(m.self.info.version()) <= 0 {
		return
	}
	if now := time.Now(); now.Sub(m.outranked) > time.Second { // two processes with one identity must not race each other upwards
		m.outranked = now
		if m.rivals.Add(1) == rivalsBeforeAlarm {
			m.log.Error("another process seems to run with this node's identity: a copied data directory? Stop one of the two and " +
				"give it a directory of its own")
		}
		m.refute(v, "an earlier life of this node, by a clock that was ahead")
	}
}

func (m *Members) refute(at version, evidence string) {
	mine := m.self.info.version()
	if m.leaving || at.compare(mine) < 0 {
		return
	}
	info := m.self.info.clone()
	if at.sameBoot(mine) {
		info.Counter = at.counter + 1
		m.ended()
	} else {
		info.StartedUnixMs = at.started + 1
		info.Counter++
	}
	m.self.info = &info
	m.log.Info("refuting what others hold against this node", "evidence", evidence)
	m.touch(m.self, "refuted")
	m.announce(m.id)
}

func (m *Members) runningCount() int {
	n := 0
	for _, e := range m.entries {
		if e.running() {
			n++
		}
	}
	return n
}

func contains(ids []peer.ID, id peer.ID) bool {
	for _, o := range ids {
		if o == id {
			return true
		}
	}
	return false
}

// sane clips what would not fit on the wire.
func sane(i Info) Info {
	for _, s := range []*string{&i.Name, &i.Zone, &i.Role, &i.Version, &i.Platform} {
		*s = clip(*s)
	}
	for k := range i.Addrs {
		i.Addrs[k] = clip(i.Addrs[k])
	}
	i.Addrs = i.Addrs[:min(len(i.Addrs), maxAddrs)]
	for k, v := range i.Labels {
		if c := clip(k); c != k {
			delete(i.Labels, k)
			i.Labels[c] = clip(v)
		} else {
			i.Labels[k] = clip(v)
		}
	}
	for k := range i.Labels {
		if len(i.Labels) <= maxPairs {
			break
		}
		delete(i.Labels, k)
	}
	return i
}

func clip(s string) string {
	if len(s) > maxText {
		s = s[:maxText]
	}
	return strings.ToValidUTF8(s, "")
}
