package peers

import (
	"context"
	"errors"
	"net"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/transport"
	"github.com/libp2p/go-libp2p/p2p/net/swarm"
	libp2ptls "github.com/libp2p/go-libp2p/p2p/security/tls"
	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
	mss "github.com/multiformats/go-multistream"
)

// Times of a probe. A dying process's backlog still accepts (17 of 40 first redials were), so one refusal is not enough and an accept
// says nothing.
const (
	probeTimeout = time.Second           // where the caller set no deadline
	probeAgain   = 2 * time.Millisecond  // between the two refusals that make a proof; doubles after each broken handshake
	probeOthers  = 20 * time.Millisecond // how long other addresses may contradict the proven one
	probeRounds  = 6
)

// found is what one address said.
type found int

const (
	nothing  found = iota // unreachable, or no answer in time
	refusal               // the host answered for the closed port
	broke                 // accepted, then closed before it proved who it is
	answered              // authenticated
)

// Probe implements Links. Refused needs two rounds in which every TCP address refuses, or in which the address where the peer was last
// met refuses and no other accepts. Reached needs the TLS handshake with the peer's key; it leaves no connection behind on either side.
// Over transports without refusals (QUIC, in simulations) the answer is Reached or Silent.
func (l *Libp2p) Probe(ctx context.Context, id peer.ID) Outcome {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, probeTimeout)
		defer cancel()
	}
	if s, ok := l.h.Network().(*swarm.Swarm); ok {
		s.Backoff().Clear(id)
	}
	l.learn(id)
	tcp, other := l.dialable(id)
	if len(tcp) == 0 {
		return l.probeSwarm(ctx, id, other)
	}
	refusals, pause := 0, probeAgain
	for range probeRounds {
		switch l.round(ctx, id, tcp) {
		case answered:
			return Reached
		case nothing:
			return Silent
		case refusal:
			if refusals++; refusals == 2 {
				return Refused
			}
		case broke:
			refusals = 0
			pause *= 2
		}
		select {
		case <-ctx.Done():
			return Silent
		case <-time.After(pause):
		}
	}
	return Silent
}

// dialable returns the peer's addresses, TCP ones first of all. A loopback address counts only where the peer has no other: on another
// machine it would lead to a different process.
func (l *Libp2p) dialable(id peer.ID) (tcp, other []ma.Multiaddr) {
	var loop []ma.Multiaddr
	for _, a := range l.h.Peerstore().Addrs(id) {
		network, _, err := manet.DialArgs(a)
		switch {
		case err != nil || network != "tcp4" && network != "tcp6" && network != "tcp":
			other = append(other, a)
		case manet.IsIPLoopback(a):
			loop = append(loop, a)
		default:
			tcp = append(tcp, a)
		}
	}
	if l.provenLoopback(id) {
		tcp = append(loop, tcp...)
	} else if len(tcp) == 0 {
		tcp = loop
	}
	return tcp, other
}

func (l *Libp2p) provenLoopback(id peer.ID) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	a := l.proven[id]
	return a != nil && manet.IsIPLoopback(a)
}

// round asks all addresses at once and sums up.
func (l *Libp2p) round(ctx context.Context, id peer.ID, addrs []ma.Multiaddr) found {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	l.mu.Lock()
	proven := l.proven[id]
	l.mu.Unlock()
	type answer struct {
		a ma.Multiaddr
		f found
	}
	var accepted atomic.Int32 // of those still talking
	answers := make(chan answer, len(addrs))
	for _, a := range addrs {
		go func() { answers <- answer{a, l.probeAddr(ctx, id, a, &accepted)} }()
	}
	var enough <-chan time.Time // runs once the proven address has refused
	count := map[found]int{}
	for range addrs {
		select {
		case got := <-answers:
			if got.f == answered {
				return answered
			}
			count[got.f]++
			if got.f == refusal && proven != nil && got.a.Equal(proven) {
				enough = time.After(probeOthers)
			}
		case <-enough:
			if accepted.Load() == 0 {
				return refusal
			}
			enough = nil
		}
	}
	switch {
	case count[broke] > 0:
		return broke
	case count[refusal] == len(addrs) || enough != nil:
		return refusal
	}
	return nothing
}

func (l *Libp2p) probeAddr(ctx context.Context, id peer.ID, a ma.Multiaddr, accepted *atomic.Int32) found {
	network, addr, err := manet.DialArgs(a)
	if err != nil {
		return nothing
	}
	c, err := (&net.Dialer{}).DialContext(ctx, network, addr)
	if err != nil {
		if errors.Is(err, syscall.ECONNREFUSED) {
			return refusal
		}
		return nothing
	}
	accepted.Add(1)
	defer accepted.Add(-1)
	stop := context.AfterFunc(ctx, func() { l.closeProbe(c) })
	defer func() {
		if stop() {
			l.closeProbe(c)
		}
	}()
	if err := l.authenticate(ctx, id, c); err != nil {
		if ctx.Err() != nil {
			return nothing
		}
		l.log.Debug("probe: handshake failed", "peer", id, "addr", a, "err", err)
		return broke
	}
	return answered
}

func (l *Libp2p) closeProbe(c net.Conn) {
	if t, ok := c.(*net.TCPConn); ok {
		if err := t.SetLinger(0); err != nil {
			l.log.Debug("probe: linger", "err", err)
		}
	}
	if err := c.Close(); err != nil {
		l.log.Debug("probe: close", "err", err)
	}
}

// authenticate runs libp2p's security handshake and offers no muxer, so that the other side never counts this as a connection: nobody
// there is told of a link that comes and goes.
func (l *Libp2p) authenticate(ctx context.Context, id peer.ID, c net.Conn) error {
	tls, err := l.tls()
	if err != nil {
		return err
	}
	if err := mss.SelectProtoOrFail(libp2ptls.ID, c); err != nil {
		return err
	}
	_, err = tls.SecureOutbound(ctx, c, id)
	return err
}

// probeSwarm asks over a transport that has no raw dial.
func (l *Libp2p) probeSwarm(ctx context.Context, id peer.ID, addrs []ma.Multiaddr) Outcome {
	if l.h.Network().Connectedness(id) != network.Connected {
		if l.Connect(ctx, id) == nil {
			return Reached
		}
		return Silent
	}
	s, ok := l.h.Network().(interface {
		TransportForDialing(ma.Multiaddr) transport.Transport
	})
	if !ok {
		return Silent
	}
	for _, a := range addrs {
		t := s.TransportForDialing(a)
		if t == nil {
			continue
		}
		c, err := t.Dial(ctx, a, id) // authenticates, or fails
		if err != nil {
			continue
		}
		if err := c.Close(); err != nil {
			l.log.Debug("probe: close", "peer", id, "err", err)
		}
		return Reached
	}
	return Silent
}
