package members

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

// lostNow puts a node on the long tail. Locked.
func (m *Members) lostNow(e *entry) {
	e.backoff = redialFirst
	if e.verdict.kind == Left {
		e.backoff = redialMost // it will come by itself
	}
	m.dialAt(e, time.Now().Add(e.backoff/2+m.jitter(e.backoff/2)))
	delete(m.watched, e.id)
}

// dialAt sets when a node is contacted next, if it needs to be. Locked.
func (m *Members) dialAt(e *entry, at time.Time) {
	e.nextDial = at
	if at.Before(m.nextDue) {
		m.nextDue = at
	}
}

// redial contacts the lost and the never met whose time has come. While nobody's has, it costs nothing. Locked.
func (m *Members) redial(now time.Time) {
	if now.Before(m.nextDue) {
		return
	}
	m.nextDue = now.Add(redialMost)
	beyond := m.beyondTail()
	first := 0 // contacts with nodes that were not met yet
	for _, e := range m.order {
		if e.dialing && !e.met {
			first++
		}
	}
	for _, e := range m.order {
		if e == m.self || !e.member() || e.dialing {
			continue
		}
		lost := e.unheard || e.verdict.covers(e.info.version())
		if e.met && !lost {
			continue
		}
		if lost && (now.Sub(e.lastSeen()) > keepLost || beyond[e]) && (!e.unheard || e.backoff == redialMost) {
			continue // it has to come by itself
		}
		// One that was met tells of all the others: a newcomer need not ask each of a thousand.
		full := m.contacts >= maxContacts || !e.met && first >= maxFirst
		if now.Before(e.nextDial) || full {
			if full {
				m.nextDue = now
			} else if e.nextDial.Before(m.nextDue) {
				m.nextDue = e.nextDial
			}
			continue
		}
		if !e.met {
			first++
		}
		e.dialing = true
		m.contacts++
		if !m.spawn(func() { m.contact(e.id, e) }) {
			return
		}
	}
}

// beyondTail are the lost members that are too many to look for: not those that were seen last. Locked.
func (m *Members) beyondTail() map[*entry]bool {
	var lost []*entry
	for _, e := range m.order {
		if e != m.self && e.member() && (e.unheard || e.verdict.covers(e.info.version())) {
			lost = append(lost, e)
		}
	}
	if len(lost) <= keepTail {
		return nil
	}
	slices.SortFunc(lost, func(a, b *entry) int {
		return cmp.Or(b.lastSeen().Compare(a.lastSeen()), strings.Compare(string(a.id), string(b.id)))
	})
	beyond := make(map[*entry]bool, len(lost)-keepTail)
	for _, e := range lost[keepTail:] {
		beyond[e] = true
	}
	return beyond
}

// contact exchanges views with a node not known to run; success is what brings it back.
func (m *Members) contact(id peer.ID, e *entry) {
	err := m.exchange(id)
	m.mu.Lock()
	defer m.mu.Unlock()
	e.dialing = false
	m.contacts--
	switch {
	case e.backoff == 0 && e.met:
		e.backoff = redialFirst
	case e.backoff == 0:
		e.backoff = redialUnmet
	default:
		e.backoff = min(redialMost, 2*e.backoff)
	}
	m.dialAt(e, time.Now().Add(e.backoff*3/4+m.jitter(e.backoff/2)))
	if err == nil && e.running() && e.met {
		e.backoff = 0
	}
}

// linkChanged is told by the host that the last connection to a peer is gone, or the first is there.
func (m *Members) linkChanged(id peer.ID, up bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.entries[id]
	if e == nil {
		return
	}
	e.connected = up
	m.snap.Store(nil)
	switch {
	case !up:
		m.inquire(e, causeClosed, "connection closed")
	case !e.met || !e.running():
		m.dialAt(e, time.Time{})
	}
}
