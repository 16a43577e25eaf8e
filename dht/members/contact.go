package members

import (
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

// lostNow puts a node on the long tail. Locked.
func (m *Members) lostNow(e *entry) {
	e.backoff = redialFirst
	if e.verdict.kind == Left {
		e.backoff = redialMost // it will come by itself
	}
	e.nextDial = time.Now().Add(e.backoff/2 + m.jitter(e.backoff/2))
	delete(m.watched, e.id)
}

// redial contacts the lost and the never met whose time has come. Locked.
func (m *Members) redial(now time.Time) {
	for id, e := range m.entries {
		if e == m.self || !e.member() || e.dialing || now.Before(e.nextDial) || m.contacts >= maxContacts {
			continue
		}
		lost := e.unheard || e.verdict.covers(e.info.version())
		if e.met && !lost {
			continue
		}
		if lost && now.Sub(e.lastSeen()) > keepLost && (!e.unheard || e.backoff == redialMost) {
			continue // it has to come by itself
		}
		e.dialing = true
		m.contacts++
		if !m.spawn(func() { m.contact(id, e) }) {
			return
		}
	}
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
	e.nextDial = time.Now().Add(e.backoff*3/4 + m.jitter(e.backoff/2))
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
		e.nextDial = time.Time{}
	}
}
