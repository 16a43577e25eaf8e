package peers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
)

var (
	errNetReset  = errors.New("stream reset")
	errNetClosed = errors.New("stream closed by this side")
)

// netConn is one connection of a Net: a side for each of its two endpoints. Net.mu guards it.
type netConn struct {
	net     *Net
	ends    [2]*Endpoint
	open    [2]bool
	rst     [2]bool // a reset is meant for that side and has not arrived
	streams []*netPair
	last    [2]time.Time // arrival of the last thing sent by that side
	lost    bool         // a write was lost: silence until the timeout
	stuck   bool         // silent in at least one direction
	spell   int          // counts the silences
}

// connOf returns the connection that e would use to reach a peer.
func (n *Net) connOf(e *Endpoint, to peer.ID) (*netConn, int) {
	if open := e.conns[to]; len(open) > 0 {
		side, _ := open[0].sideOf(e)
		return open[0], side
	}
	return nil, 0
}

func (n *Net) connect(a, b *Endpoint) {
	c := &netConn{net: n, ends: [2]*Endpoint{a, b}, open: [2]bool{true, true}}
	n.conns = append(n.conns, c)
	for i, e := range c.ends {
		to := c.ends[1-i].id
		e.conns[to] = append(e.conns[to], c)
		if len(e.conns[to]) == 1 {
			e.tell(to, true)
		}
	}
}

func (c *netConn) sideOf(e *Endpoint) (int, bool) {
	switch e {
	case c.ends[0]:
		return 0, true
	case c.ends[1]:
		return 1, true
	}
	return 0, false
}

// cut reports whether what side sends does not arrive.
func (c *netConn) cut(side int) bool {
	return c.lost || c.net.blocked(c.ends[side].id, c.ends[1-side].id)
}

// arrival returns when something sent by side now arrives; it keeps the order.
func (c *netConn) arrival(side int, now time.Time) time.Time {
	at := now.Add(c.net.delay(c.ends[side].id, c.ends[1-side].id))
	if at.Before(c.last[side]) {
		at = c.last[side]
	}
	c.last[side] = at
	return at
}

func (c *netConn) settle(now time.Time) {
	for _, p := range c.streams {
		p.half[0].settle(now)
		p.half[1].settle(now)
	}
}

// topologyChanged sends again what a healed cut had lost, wakes everybody, and watches over silence.
func (c *netConn) topologyChanged(now time.Time) {
	for side := range 2 {
		if !c.cut(side) {
			for _, p := range c.streams {
				p.half[side].resend(now)
			}
			if c.rst[1-side] {
				c.sendReset(1 - side)
			}
		}
	}
	for _, p := range c.streams {
		p.sig.raise()
	}
	c.checkStuck()
}

func (c *netConn) checkStuck() {
	stuck := c.cut(0) || c.cut(1) || c.ends[0].frozen || c.ends[1].frozen
	if stuck == c.stuck {
		return
	}
	c.stuck = stuck
	c.spell++
	if !stuck {
		return
	}
	spell := c.spell
	time.AfterFunc(c.net.timeout, func() {
		c.net.mu.Lock()
		defer c.net.mu.Unlock()
		if c.spell == spell {
			c.closeSide(0)
			c.closeSide(1)
		}
	})
}

// sendReset has the connection reset on a side, as soon as a packet gets there.
func (c *netConn) sendReset(side int) {
	if !c.open[side] {
		return
	}
	c.rst[side] = true
	if c.cut(1 - side) {
		return // topologyChanged tries again, and the timeout ends it anyway
	}
	n := c.net
	time.AfterFunc(n.delay(c.ends[1-side].id, c.ends[side].id), func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		if c.rst[side] && !c.cut(1-side) {
			c.closeSide(side)
		}
	})
}

// closeSide ends the connection for one side: its streams break.
func (c *netConn) closeSide(side int) {
	c.rst[side] = false
	if !c.open[side] {
		return
	}
	c.open[side] = false
	e, to := c.ends[side], c.ends[1-side].id
	if e.conns[to] = slices.DeleteFunc(e.conns[to], func(o *netConn) bool { return o == c }); len(e.conns[to]) == 0 {
		delete(e.conns, to)
		e.tell(to, false)
	}
	for _, p := range slices.Clone(c.streams) {
		p.side[side].broken = true
		p.sig.raise()
		p.finish()
	}
	if !c.open[0] && !c.open[1] {
		c.net.conns = slices.DeleteFunc(c.net.conns, func(o *netConn) bool { return o == c })
		c.spell++ // no timeout any more
	}
}

// openStream opens a stream. The other side's handler starts when the news arrives there.
func (c *netConn) openStream(side int, proto protocol.ID) *netStream {
	p := &netPair{conn: c, proto: proto}
	for i := range 2 {
		p.half[i] = &netHalf{pair: p, from: i}
		p.side[i] = &netStream{pair: p, at: i, broken: !c.open[i]}
	}
	c.streams = append(c.streams, p)
	p.half[side].push(netChunk{kind: netOpen})
	if c.open[1-side] { // else a reset of the connection is on its way here
		go p.side[1-side].accept(proto)
	}
	return p.side[side]
}

// netPair is one stream: two sides, and a half for what each side sends.
type netPair struct {
	conn  *netConn
	proto protocol.ID
	side  [2]*netStream
	half  [2]*netHalf // by sender
	sig   netSignal
}

// finish forgets the stream once both sides are done with it.
func (p *netPair) finish() {
	if !p.side[0].over() || !p.side[1].over() {
		return
	}
	p.conn.streams = slices.DeleteFunc(p.conn.streams, func(o *netPair) bool { return o == p })
}

type netKind uint8

const (
	netData netKind = iota
	netOpen
	netEnd   // CloseWrite
	netReset // Reset
)

type netChunk struct {
	kind netKind
	b    []byte
	at   time.Time
}

// netHalf is one direction of a stream: what was sent and not yet read.
type netHalf struct {
	pair    *netPair
	from    int
	q       []netChunk
	settled int // so many of q have arrived
	bytes   int
}

func (h *netHalf) push(k netChunk) {
	k.at = h.pair.conn.arrival(h.from, time.Now())
	h.q = append(h.q, k)
	h.bytes += len(k.b)
	h.pair.sig.raise()
}

// settle notes what has arrived.
func (h *netHalf) settle(now time.Time) {
	if h.pair.conn.cut(h.from) {
		return
	}
	for h.settled < len(h.q) && !h.q[h.settled].at.After(now) {
		h.settled++
	}
}

// resend has what was lost arrive from now on.
func (h *netHalf) resend(now time.Time) {
	for i := h.settled; i < len(h.q); i++ {
		if !h.q[i].at.After(now) {
			h.q[i].at = h.pair.conn.arrival(h.from, now)
		}
	}
}

// next returns when something further arrives by itself; zero if nothing does.
func (h *netHalf) next() time.Time {
	if h.settled < len(h.q) && !h.pair.conn.cut(h.from) {
		return h.q[h.settled].at
	}
	return time.Time{}
}

func (h *netHalf) pop() {
	h.bytes -= len(h.q[0].b)
	h.q[0] = netChunk{} // the array lives on, the bytes need not
	h.q = h.q[1:]
	h.settled--
	h.pair.sig.raise()
}

// netStream is one side's view of a stream. It implements Stream.
type netStream struct {
	pair         *netPair
	at           int
	broken       bool // reset by this side, or the connection is gone
	wroteEnd     bool
	closedRead   bool
	rdead, wdead time.Time
}

func (s *netStream) net() *Net      { return s.pair.conn.net }
func (s *netStream) end() *Endpoint { return s.pair.conn.ends[s.at] }
func (s *netStream) out() *netHalf  { return s.pair.half[s.at] }
func (s *netStream) in() *netHalf   { return s.pair.half[1-s.at] }
func (s *netStream) over() bool     { return s.broken || (s.wroteEnd && s.closedRead) }

// resetArrived reports whether the other side's reset is here. Settled first.
func (s *netStream) resetArrived() bool {
	in := s.in()
	for _, k := range in.q[:in.settled] {
		if k.kind == netReset {
			return true
		}
	}
	return false
}

// check returns why the stream is unusable. While its node is frozen it learns nothing new.
func (s *netStream) check() error {
	if s.broken {
		return errNetReset
	}
	if s.end().frozen {
		return nil
	}
	s.in().settle(time.Now())
	if s.resetArrived() {
		s.broken = true
		s.pair.finish()
		return errNetReset
	}
	return nil
}

// accept runs the handler once the stream's opening has arrived.
func (s *netStream) accept(proto protocol.ID) {
	n := s.net()
	n.mu.Lock()
	for {
		if s.check() != nil {
			n.mu.Unlock()
			return
		}
		if in := s.in(); in.settled > 0 && !s.end().frozen {
			in.pop()
			break
		}
		n.wait(context.Background(), &s.pair.sig, s.wake(time.Time{}))
	}
	h := s.end().handlers[proto]
	from := s.pair.conn.ends[1-s.at].id
	n.mu.Unlock()
	if h == nil {
		_ = s.Reset()
		return
	}
	h(from, s)
}

// wake returns when to look again: at the deadline or at the next arrival. Nothing arrives at a frozen node.
func (s *netStream) wake(deadline time.Time) time.Time {
	if s.end().frozen {
		return deadline
	}
	at := s.in().next()
	if at.IsZero() || (!deadline.IsZero() && deadline.Before(at)) {
		return deadline
	}
	return at
}

func netExpired(deadline time.Time) bool { return !deadline.IsZero() && !time.Now().Before(deadline) }

// Read implements Stream.
func (s *netStream) Read(b []byte) (int, error) {
	n := s.net()
	n.mu.Lock()
	defer n.mu.Unlock()
	for {
		if err := s.check(); err != nil {
			return 0, err
		}
		if s.closedRead {
			return 0, errNetClosed
		}
		if in := s.in(); in.settled > 0 && !s.end().frozen {
			k := &in.q[0]
			if k.kind == netEnd {
				return 0, io.EOF
			}
			if len(b) == 0 {
				return 0, nil
			}
			m := copy(b, k.b)
			k.b = k.b[m:]
			in.bytes -= m
			if len(k.b) == 0 {
				in.pop()
			}
			s.pair.sig.raise()
			return m, nil
		}
		if netExpired(s.rdead) {
			return 0, fmt.Errorf("read: %w", os.ErrDeadlineExceeded)
		}
		n.wait(context.Background(), &s.pair.sig, s.wake(s.rdead))
	}
}

// Write implements Stream.
func (s *netStream) Write(b []byte) (int, error) {
	n := s.net()
	n.mu.Lock()
	defer n.mu.Unlock()
	done := 0
	for {
		if err := s.check(); err != nil {
			return done, err
		}
		if s.wroteEnd {
			return done, errNetClosed
		}
		if room := Window - s.out().bytes; !s.end().frozen && (room > 0 || len(b) == 0) {
			m := min(room, len(b)-done)
			if m > 0 {
				s.send(b[done : done+m])
			}
			if done += m; done == len(b) {
				return done, nil
			}
			continue
		}
		if netExpired(s.wdead) {
			return done, fmt.Errorf("write: %w", os.ErrDeadlineExceeded)
		}
		n.wait(context.Background(), &s.pair.sig, s.wake(s.wdead))
	}
}

func (s *netStream) send(b []byte) {
	c, e := s.pair.conn, s.end()
	e.count(s.pair.proto, Sent{Writes: 1, Bytes: uint64(len(b))})
	if c.net.loss > 0 && c.net.rng.Float64() < c.net.loss && !c.lost {
		c.settle(time.Now())
		c.lost = true
		c.checkStuck()
	}
	if peer := s.pair.side[1-s.at]; peer.closedRead || peer.broken {
		return // nobody will read it
	}
	c.ends[1-s.at].count(s.pair.proto, Sent{Heard: 1})
	s.out().push(netChunk{b: append([]byte(nil), b...)})
}

// CloseWrite implements Stream.
func (s *netStream) CloseWrite() error {
	s.net().mu.Lock()
	defer s.net().mu.Unlock()
	return s.closeWrite()
}

func (s *netStream) closeWrite() error {
	if s.broken || s.wroteEnd {
		return nil
	}
	s.wroteEnd = true
	s.out().push(netChunk{kind: netEnd})
	s.pair.finish()
	return nil
}

// Close implements Stream: both directions, without waiting for anything.
func (s *netStream) Close() error {
	s.net().mu.Lock()
	defer s.net().mu.Unlock()
	s.closedRead = true
	for in := s.in(); len(in.q) > 0 && in.q[0].kind == netData; { // nobody will read it: the writer need not wait
		if in.settled == 0 {
			in.settled = 1
		}
		in.pop()
	}
	err := s.closeWrite()
	s.pair.finish()
	return err
}

// Reset implements Stream: at once here, and there when the news arrives.
func (s *netStream) Reset() error {
	s.net().mu.Lock()
	defer s.net().mu.Unlock()
	if s.broken {
		return nil
	}
	s.out().push(netChunk{kind: netReset})
	s.broken = true
	s.pair.finish()
	return nil
}

// SetDeadline implements Stream.
func (s *netStream) SetDeadline(t time.Time) error { return s.deadline(t, &s.rdead, &s.wdead) }

// SetReadDeadline implements Stream.
func (s *netStream) SetReadDeadline(t time.Time) error { return s.deadline(t, &s.rdead) }

// SetWriteDeadline implements Stream.
func (s *netStream) SetWriteDeadline(t time.Time) error { return s.deadline(t, &s.wdead) }

func (s *netStream) deadline(t time.Time, which ...*time.Time) error {
	s.net().mu.Lock()
	defer s.net().mu.Unlock()
	if s.broken {
		return errNetReset
	}
	for _, d := range which {
		*d = t
	}
	s.pair.sig.raise()
	return nil
}
