package members

import (
	"bytes"
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/keys"
)

// snapshot is the view as readers see it: made once after a change, never altered.
type snapshot struct {
	list   []Member // by name, then id
	points []keys.Point
	at     map[peer.ID]int
}

func (m *Members) current() *snapshot {
	if s := m.snap.Load(); s != nil {
		return s
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if s := m.snap.Load(); s != nil {
		return s
	}
	s := &snapshot{at: map[peer.ID]int{}}
	now := time.Now()
	for _, e := range m.entries {
		if e.member() || (e == m.self && !e.expelled) {
			s.list = append(s.list, m.memberOf(e, e.state(now)))
		}
	}
	slices.SortFunc(s.list, func(a, b Member) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.ID, b.ID)) })
	s.points = make([]keys.Point, len(s.list))
	for i, o := range s.list {
		s.at[o.ID] = i
		s.points[i] = m.entries[o.ID].point
	}
	m.snap.Store(s)
	return s
}

// Self returns this node as its own view has it.
func (m *Members) Self() Member {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.memberOf(m.self, m.self.state(time.Now()))
}

// Member returns a member by id.
func (m *Members) Member(id peer.ID) (Member, bool) {
	s := m.current()
	i, ok := s.at[id]
	if !ok {
		return Member{}, false
	}
	return s.list[i], true
}

// ByName returns a member by name. Where several have the name, one that runs is preferred.
func (m *Members) ByName(name string) (Member, bool) {
	s := m.current()
	i, ok := slices.BinarySearchFunc(s.list, name, func(o Member, name string) int { return cmp.Compare(o.Name, name) })
	if !ok {
		return Member{}, false
	}
	best := s.list[i]
	for _, o := range s.list[i:] {
		if o.Name == name && o.State.Running() && !best.State.Running() {
			best = o
		}
	}
	return best, true
}

// All returns every member, this node and the dead included, by name.
func (m *Members) All() []Member { return slices.Clone(m.current().list) }

// Alive returns the members taken to run and to be used, this node included: those alive and those merely suspect.
func (m *Members) Alive() []Member {
	return slices.DeleteFunc(m.All(), func(o Member) bool { return !usable(o) })
}

func usable(o Member) bool { return o.State == Alive || o.State == Suspect }

// IsMember reports whether a node was admitted and not expelled; a dead one still is.
func (m *Members) IsMember(id peer.ID) bool {
	_, ok := m.admitted.Load(id)
	return ok
}

// Closest returns the n members closest to a key, closest first, this node included; fewer when there are fewer. Dead, left and
// quarantined ones are passed over, and those that ok (nil: none) refuses. It is arithmetic on the view, without any message.
func (m *Members) Closest(key string, n int, ok func(Member) bool) []Member {
	s := m.current()
	target := keys.Of(key)
	type near struct {
		i int
		d keys.Point
	}
	order := make([]near, 0, len(s.list))
	for i := range s.list {
		if usable(s.list[i]) {
			order = append(order, near{i, keys.Distance(target, s.points[i])})
		}
	}
	slices.SortFunc(order, func(a, b near) int { return bytes.Compare(a.d[:], b.d[:]) })
	var out []Member
	for _, o := range order {
		if len(out) >= n {
			break
		}
		if ok == nil || ok(s.list[o.i]) {
			out = append(out, s.list[o.i])
		}
	}
	return out
}

// Subscribe has f told of every Change, in order, on one goroutine shared by all subscribers: f must not block. What happens while
// it does is merged per member. Changes begin with Run.
func (m *Members) Subscribe(f func(Change)) (cancel func()) { return m.changes.subscribe(f) }

// UpdateSelf changes what this node says of itself and tells the others. ID, Boot, Counter, StartedUnixMs and Watchers stay. f must
// not call back.
func (m *Members) UpdateSelf(f func(*Info)) {
	m.mu.Lock()
	defer m.mu.Unlock()
	old := m.self.info
	info := old.clone()
	f(&info)
	info.ID, info.Boot, info.Counter, info.StartedUnixMs, info.Watchers = old.ID, old.Boot, old.Counter, old.StartedUnixMs, old.Watchers
	if info = sane(info); info.sameFor(*old) {
		return
	}
	info.Counter++
	m.self.info = &info
	m.touch(m.self, "update")
	m.announce(m.id)
}

// Admit carries out a committed admission. A node not heard of yet enters the view as alive and is contacted; it stays so until it is
// heard, or found dead.
func (m *Members) Admit(info Info) {
	if info.ID == "" || len(info.ID) > maxID {
		m.badMessages.Add(1)
		m.log.Warn("admission of a node without a usable id ignored", "name", info.Name)
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.entries[info.ID]
	if e == nil {
		m.unknown-- // add counts it; a member has room in any case
		e = m.add(info.ID)
	} else if !e.admitted {
		m.unknown--
	}
	again := e.expelled
	if e.admitted && !again {
		return
	}
	e.admitted, e.expelled = true, false
	if info = sane(info.clone()); e.info.Name == "" || info.version().compare(e.info.version()) > 0 {
		e.info = &info
	}
	if m.cfg.Learned != nil && len(e.info.Addrs) > 0 && e != m.self {
		m.cfg.Learned(e.id, e.info.Addrs)
	}
	if again {
		e.verdict = nil
	}
	e.unheard = false
	e.evidence = "admitted; not heard yet"
	if e.met { // and passed on when it was
		e.evidence = "told of by another member"
	} else {
		m.dirty[e.id] = true
	}
	m.dialAt(e, time.Now().Add(m.jitter(redialUnmet)))
	m.admitted.Store(e.id, true)
	m.touch(e, "admitted")
}

// Expel carries out a committed revocation: the node is no member any more, whatever others say, until it is admitted again.
func (m *Members) Expel(id peer.ID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.entries[id]
	if e == nil {
		if e = m.add(id); e == nil {
			return
		}
	}
	if e.expelled {
		return
	}
	if !e.admitted {
		m.unknown--
	}
	e.admitted, e.expelled, e.suspect = true, true, ""
	if w := m.watched[id]; w != nil {
		if w.stream != nil {
			_ = w.stream.Reset()
		}
		delete(m.watched, id)
	}
	m.admitted.Delete(id)
	m.touch(e, "expelled")
}

// Readmit says to all that what this node has died of so far counts no more: whoever holds it quarantined takes it back at once. It waits until
// the others know, or ctx ends. Only the node itself says it, as all of its Info: so it goes by pushes and exchanges in the order of its
// versions, and an old readmission ends no later quarantine. It stays in each later Info, over restarts, for those who were away.
func (m *Members) Readmit(ctx context.Context) {
	m.mu.Lock()
	info := m.self.info.clone()
	info.Counter++
	info.readmitted = info.version()
	m.ends, m.flapping = nil, time.Time{}
	m.self.info = &info
	m.touch(m.self, "readmitted")
	m.announce(m.id)
	m.mu.Unlock()
	m.pushNow(ctx, m.id)
}

// Goodbye tells the others that this node goes by plan, and waits until they know or ctx ends. Afterwards it is Left, refutes nothing
// and calls nobody dead.
func (m *Members) Goodbye(ctx context.Context) {
	m.mu.Lock()
	if m.leaving {
		m.mu.Unlock()
		return
	}
	m.leaving = true
	at := m.self.info.version()
	at.counter += verdictReach
	m.self.verdict = &verdict{kind: Left, at: at, evidence: "said goodbye", by: []peer.ID{m.id}, proof: true, since: time.Now()}
	m.touch(m.self, "goodbye")
	m.mu.Unlock()
	m.pushNow(ctx, m.id)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.chooseWatchers() // none: the streams end in order
}

// Lag returns this node's own scheduling delay: the worst of the last five seconds.
func (m *Members) Lag() time.Duration { return m.late.now() }
