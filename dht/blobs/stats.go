package blobs

import (
	"sync"
	"sync/atomic"
)

// stats are the counters behind Usage.
type stats struct {
	nodes, bytes   atomic.Int64 // since the start; what was there before is in base
	baseMu         sync.Mutex   // guards base*, last, scrub
	baseNodes      int64
	baseBytes      int64
	baseKnown      bool
	last           Sweep
	scrub          Scrub
	corrupt        atomic.Uint64
	repaired       atomic.Uint64
	repairsDropped atomic.Uint64
	background     atomic.Int64
	late           atomic.Uint64
	failed         atomic.Uint64
	busy           atomic.Uint64
	refused        atomic.Uint64
	sent           atomic.Uint64
	gentle         atomic.Uint64 // frames that had no hurry
	received       atomic.Uint64
	garbage        atomic.Uint64
}

func (s *stats) add(nodes, bytes int64) {
	s.nodes.Add(nodes)
	s.bytes.Add(bytes)
}

func (s *stats) sub(nodes, bytes int64) { s.add(-nodes, -bytes) }

// counted takes what a walk found that was there before the start.
func (s *stats) counted(nodes, bytes int64) {
	s.baseMu.Lock()
	defer s.baseMu.Unlock()
	s.baseNodes, s.baseBytes, s.baseKnown = nodes, bytes, true
}

func (s *stats) swept(sw Sweep, err error) {
	s.baseMu.Lock()
	defer s.baseMu.Unlock()
	sw.Failures = s.last.Failures
	if err != nil {
		sw.Failures++
	}
	s.last = sw
}

func (s *stats) scrubs(f func(*Scrub)) {
	s.baseMu.Lock()
	defer s.baseMu.Unlock()
	f(&s.scrub)
}

// Usage is what the store holds and does.
type Usage struct {
	// Nodes and Bytes (of encodings) stored; only those of this start until Counted, when the walk at the start is done.
	Nodes, Bytes int64
	Counted      bool
	Pins         int
	LastSweep    Sweep
	Scrub        Scrub
	// Low: the disk is low, nothing is kept for others.
	Low bool
	// Corrupt nodes found, Repaired from others, RepairsDropped because too many were waiting: those are found again when next read.
	Corrupt, Repaired, RepairsDropped uint64
	// Background pushes under way after their Push returned; LateAcks that came of them.
	Background int64
	LateAcks   uint64
	// PushesFailed to a single peer; PushesBusy refused because MaxInflight were under way to the peer.
	PushesFailed, PushesBusy uint64
	// Refused: questions of peers answered "disk is low". Garbage: streams of peers closed because of what they sent.
	Refused, Garbage uint64
	// NodesSent to and NodesReceived from peers.
	NodesSent, NodesReceived uint64
}

// Usage returns what the store holds and does now.
func (s *Store) Usage() Usage {
	st := &s.stats
	u := Usage{
		Nodes: st.nodes.Load(), Bytes: st.bytes.Load(), Pins: s.pins.count(), Low: s.cfg.Low(),
		Corrupt: st.corrupt.Load(), Repaired: st.repaired.Load(), RepairsDropped: st.repairsDropped.Load(),
		Background: st.background.Load(), LateAcks: st.late.Load(),
		PushesFailed: st.failed.Load(), PushesBusy: st.busy.Load(),
		Refused: st.refused.Load(), Garbage: st.garbage.Load(),
		NodesSent: st.sent.Load(), NodesReceived: st.received.Load(),
	}
	st.baseMu.Lock()
	defer st.baseMu.Unlock()
	u.Nodes += st.baseNodes
	u.Bytes += st.baseBytes
	u.Counted, u.LastSweep, u.Scrub = st.baseKnown, st.last, st.scrub
	return u
}
