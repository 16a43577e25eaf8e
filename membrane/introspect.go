package membrane

import (
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// Interfaces returns what the component provides and requires, as it described itself.
func (m *Membrane) Interfaces() (provides, requires []*componentv1.Interface) {
	b := m.Backend()
	if b == nil {
		return nil, nil
	}
	return b.desc.GetProvides(), b.desc.GetRequires()
}

// Methods returns what is known of the component's calls; nil before a process is attached. nil answers every question with "unknown".
func (m *Membrane) Methods() *Methods {
	if b := m.Backend(); b != nil {
		return b.methods
	}
	return nil
}

// Stats returns what has passed the gate since the membrane was made.
func (m *Membrane) Stats() Stats {
	s := m.gate.stats.snapshot()
	s.Held = max(m.gate.held.Load(), 0)
	if b := m.Backend(); b != nil {
		s.InFlight, s.Streams, s.Waiting = b.inflight.Load(), b.streams.Load(), b.marks.pending()
	}
	return s
}

// Held says whether calls are held now, and what for.
func (m *Membrane) Held() (bool, string) {
	p := m.gate.cur.Load()
	return p.mode == gateHeld, p.why
}
