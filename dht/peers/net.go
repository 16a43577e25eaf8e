package peers

import (
	"context"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
)

// Net is a network in memory: what TCP shows of dead, silent and unreachable peers, for simulations in a synctest bubble. It draws
// from its seed alone; what remains undetermined is the order of goroutines. All waiting is on channels and timers, so virtual time
// advances; Close ends every stream, and with them the goroutines of handlers that respect it.
//
// What it models. One connection between two nodes carries all their streams; bytes arrive in order after the delay. A killed
// process resets its connections and refuses dials at once. A frozen one (SIGSTOP) is silent: what is sent to it queues up to Window
// bytes a stream and then blocks the writer; its own reads, writes and dials stand still (its timers do not: freeze its clock too, if
// the code under test reads one). A cut loses what is under way; Heal brings it (retransmission), unless the silence lasted for
// Timeout, which resets the connection on both sides. Bandwidth is not modelled.
type Net struct {
	mu      sync.Mutex // guards everything in this file and stream.go
	rng     *rand.Rand
	ends    map[peer.ID]*Endpoint // the newest endpoint of each id, dead ones too: their host refuses
	conns   []*netConn            // the ones still open on a side
	cuts    map[netRoute]bool
	dark    map[peer.ID]bool
	delay   func(a, b peer.ID) time.Duration
	loss    float64
	timeout time.Duration
	topo    netSignal // Join, Kill, Freeze, Thaw, Cut, Heal
}

// netRoute is a direction between two nodes.
type netRoute struct{ from, to peer.ID }

// Defaults of Net.
const (
	DefaultDelay   = 250 * time.Microsecond // one way
	DefaultTimeout = 10 * time.Second       // silence that resets a connection
	Window         = 256 << 10              // bytes a stream holds in one direction before its writer blocks
)

// NewNet returns a network without nodes, DefaultDelay between any two, no loss.
func NewNet(seed uint64) *Net {
	return &Net{
		rng:     rand.New(rand.NewPCG(seed, 0x636f7070696365)),
		ends:    map[peer.ID]*Endpoint{},
		cuts:    map[netRoute]bool{},
		dark:    map[peer.ID]bool{},
		delay:   func(_, _ peer.ID) time.Duration { return DefaultDelay },
		timeout: DefaultTimeout,
	}
}

// Join adds a node, or restarts a killed one. A node that still runs is killed first.
func (n *Net) Join(id peer.ID) *Endpoint {
	n.mu.Lock()
	defer n.mu.Unlock()
	if old := n.ends[id]; old != nil {
		n.kill(old)
	}
	e := &Endpoint{net: n, id: id, handlers: map[protocol.ID]Handler{}, conns: map[peer.ID][]*netConn{}, by: map[protocol.ID]Sent{}}
	n.ends[id] = e
	n.topo.raise()
	return e
}

// Kill ends the node's process (kill -9): its connections are reset, dials are refused until it joins again.
func (n *Net) Kill(id peer.ID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if e := n.ends[id]; e != nil {
		n.kill(e)
	}
}

// Freeze stops the node's process (SIGSTOP) until Thaw.
func (n *Net) Freeze(id peer.ID) { n.setFrozen(id, true) }

// Thaw lets a frozen node go on (SIGCONT): it finds at once what arrived meanwhile.
func (n *Net) Thaw(id peer.ID) { n.setFrozen(id, false) }

func (n *Net) setFrozen(id peer.ID, frozen bool) {
	n.change(func() {
		if e := n.ends[id]; e != nil && !e.closed {
			e.frozen = frozen
			if !frozen {
				e.notifySoon()
			}
		}
	})
}

// Cut loses everything from a to b, and from b to a too if both, until Heal.
func (n *Net) Cut(a, b peer.ID, both bool) {
	n.change(func() {
		n.cuts[netRoute{a, b}] = true
		if both {
			n.cuts[netRoute{b, a}] = true
		}
	})
}

// Isolate cuts a node off from all others, present and future, until Heal: a pulled plug.
func (n *Net) Isolate(id peer.ID) { n.changeAt(id, func() { n.dark[id] = true }) }

// Heal ends all cuts and isolations.
func (n *Net) Heal() { n.change(func() { clear(n.cuts); clear(n.dark) }) }

// SetDelay sets the one-way delay from a to b for what is sent from now on. f is called with Net's lock held.
func (n *Net) SetDelay(f func(a, b peer.ID) time.Duration) {
	n.change(func() { n.delay = f })
}

// SetLoss sets the probability that a write, and with it the rest of its connection, is lost: silence, then a reset after Timeout.
func (n *Net) SetLoss(p float64) { n.change(func() { n.loss = p }) }

// SetTimeout sets how long a silent connection lasts, for silences that begin from now on.
func (n *Net) SetTimeout(d time.Duration) { n.change(func() { n.timeout = d }) }

// Close kills every node.
func (n *Net) Close() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range slices.Clone(n.conns) {
		c.closeSide(0)
		c.closeSide(1)
	}
	for _, e := range n.ends {
		n.kill(e)
	}
}

// change applies f to the topology and what follows from it to the connections.
func (n *Net) change(f func()) { n.changeAt("", f) }

// changeAt is change where f concerns one node only; "": all.
func (n *Net) changeAt(id peer.ID, f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	now := time.Now()
	var concerned []*netConn
	for _, c := range n.conns {
		if id == "" || c.ends[0].id == id || c.ends[1].id == id {
			concerned = append(concerned, c)
		}
	}
	for _, c := range concerned {
		c.settle(now)
	}
	f()
	for _, c := range concerned {
		c.topologyChanged(now)
	}
	n.topo.raise()
}

func (n *Net) kill(e *Endpoint) {
	if e.closed {
		return
	}
	e.closed, e.frozen = true, false
	e.events = nil
	e.dying.raise()
	for _, c := range slices.Clone(n.conns) {
		if side, ok := c.sideOf(e); ok && c.open[side] {
			c.closeSide(side)
			c.sendReset(1 - side)
		}
	}
	n.topo.raise()
}

func (n *Net) blocked(from, to peer.ID) bool {
	return n.dark[from] || n.dark[to] || n.cuts[netRoute{from, to}]
}

// wait unlocks until sig, the time at (none if zero) or ctx's end.
func (n *Net) wait(ctx context.Context, sig *netSignal, at time.Time) {
	changed := sig.wait()
	var timer <-chan time.Time
	if !at.IsZero() {
		t := time.NewTimer(time.Until(at))
		defer t.Stop()
		timer = t.C
	}
	n.mu.Unlock()
	defer n.mu.Lock()
	select {
	case <-changed:
	case <-ctx.Done():
	case <-timer:
	}
}

// dial finds out what a fresh dial finds: a round trip for the connection, one more for the authenticated answer.
func (n *Net) dial(ctx context.Context, e *Endpoint, to peer.ID) (Outcome, error) {
	for trips := 0; ; {
		until := time.Now().Add(n.delay(e.id, to) + n.delay(to, e.id))
		for ctx.Err() == nil && !e.closed && time.Now().Before(until) {
			n.wait(ctx, &e.dying, until)
		}
		target := n.ends[to]
		switch {
		case e.closed:
			return Silent, fmt.Errorf("dial %s: this node is closed: %w", to, ErrUnreachable)
		case ctx.Err() != nil:
			return Silent, fmt.Errorf("dial %s: no answer: %w: %w", to, ErrUnreachable, context.Cause(ctx))
		case target == nil:
			return Silent, fmt.Errorf("dial %s: no address known: %w", to, ErrUnreachable)
		case e.frozen || n.blocked(e.id, to) || n.blocked(to, e.id) || (target.frozen && !target.closed):
			n.wait(ctx, &n.topo, time.Time{})
			trips = 0
		case n.loss > 0 && n.rng.Float64() < n.loss:
			n.wait(ctx, &e.dying, time.Now().Add(time.Second)) // the first packet is sent again after a second
		case target.closed:
			return Refused, fmt.Errorf("dial %s: connection refused: %w", to, ErrUnreachable)
		default:
			if trips++; trips == 2 {
				return Reached, nil
			}
		}
	}
}

// Endpoint is one life of one node on the Net. It implements Peers and Links.
type Endpoint struct {
	net      *Net
	id       peer.ID
	handlers map[protocol.ID]Handler
	notify   []func(id peer.ID, up bool)
	closed   bool
	frozen   bool
	dying    netSignal // raised when the endpoint is closed

	conns     map[peer.ID][]*netConn // the open ones
	events    []netEvent             // not yet told
	notifying bool

	writes, bytes uint64
	by            map[protocol.ID]Sent
}

// Sent is what a node handed to the streams of one protocol. Heard are the writes of others to it.
type Sent struct{ Writes, Bytes, Heard uint64 }

func (e *Endpoint) count(p protocol.ID, more Sent) {
	e.writes, e.bytes = e.writes+more.Writes, e.bytes+more.Bytes
	by := e.by[p]
	e.by[p] = Sent{by.Writes + more.Writes, by.Bytes + more.Bytes, by.Heard + more.Heard}
}

type netEvent struct {
	id peer.ID
	up bool
}

// ID returns the node's id.
func (e *Endpoint) ID() peer.ID { return e.id }

// Sent returns how many writes and bytes the node handed to its streams.
func (e *Endpoint) Sent() (writes, bytes uint64) {
	e.net.mu.Lock()
	defer e.net.mu.Unlock()
	return e.writes, e.bytes
}

// SentBy returns the same by protocol.
func (e *Endpoint) SentBy() map[protocol.ID]Sent {
	e.net.mu.Lock()
	defer e.net.mu.Unlock()
	return maps.Clone(e.by)
}

// Handle implements Peers.
func (e *Endpoint) Handle(proto protocol.ID, h Handler) {
	e.net.mu.Lock()
	defer e.net.mu.Unlock()
	e.handlers[proto] = h
}

// Notify implements Links. Each call of f is made by a goroutine of its own, in order; none while the node is frozen.
func (e *Endpoint) Notify(f func(id peer.ID, up bool)) {
	e.net.mu.Lock()
	defer e.net.mu.Unlock()
	e.notify = append(e.notify, f)
}

// Close ends the node like Kill.
func (e *Endpoint) Close() error {
	e.net.mu.Lock()
	defer e.net.mu.Unlock()
	e.net.kill(e)
	return nil
}

// Open implements Peers. As over libp2p, a peer without the protocol shows only as a reset of the stream.
func (e *Endpoint) Open(ctx context.Context, to peer.ID, proto protocol.ID) (Stream, error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, DialTimeout)
		defer cancel()
	}
	if to == e.id {
		return nil, fmt.Errorf("open %s to this node itself: %w", proto, ErrUnreachable)
	}
	n := e.net
	n.mu.Lock()
	defer n.mu.Unlock()
	for {
		if e.closed {
			return nil, fmt.Errorf("open %s to %s: this node is closed: %w", proto, to, ErrUnreachable)
		}
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("open %s to %s: %w: %w", proto, to, ErrUnreachable, err)
		}
		if e.frozen {
			n.wait(ctx, &n.topo, time.Time{})
			continue
		}
		if c, side := n.connOf(e, to); c != nil {
			return c.openStream(side, proto), nil
		}
		if outcome, err := n.dial(ctx, e, to); outcome != Reached {
			return nil, err
		}
		if c, _ := n.connOf(e, to); c == nil {
			n.connect(e, n.ends[to])
		}
	}
}

// Probe implements Links.
func (e *Endpoint) Probe(ctx context.Context, id peer.ID) Outcome {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, DialTimeout)
		defer cancel()
	}
	e.net.mu.Lock()
	defer e.net.mu.Unlock()
	outcome, _ := e.net.dial(ctx, e, id) // the error only says the outcome in words
	return outcome
}

// tell notes that the first connection to a peer is there or the last one gone.
func (e *Endpoint) tell(id peer.ID, up bool) {
	if !e.closed {
		e.events = append(e.events, netEvent{id, up})
		e.notifySoon()
	}
}

// notifySoon has the events told outside the lock.
func (e *Endpoint) notifySoon() {
	if e.notifying || len(e.events) == 0 {
		return
	}
	e.notifying = true
	go func() {
		e.net.mu.Lock()
		defer e.net.mu.Unlock()
		for len(e.events) > 0 && !e.frozen {
			ev := e.events[0]
			e.events = e.events[1:]
			fs := e.notify
			e.net.mu.Unlock()
			for _, f := range fs {
				f(ev.id, ev.up)
			}
			e.net.mu.Lock()
		}
		e.notifying = false
	}()
}

// netSignal wakes all who wait for a change. Net.mu guards it.
type netSignal struct{ ch chan struct{} }

func (s *netSignal) wait() <-chan struct{} {
	if s.ch == nil {
		s.ch = make(chan struct{})
	}
	return s.ch
}

func (s *netSignal) raise() {
	if s.ch != nil {
		close(s.ch)
		s.ch = nil
	}
}
