package dht

import (
	"context"
	"log/slog"
	"sync"
	"time"

	"github.com/coppice-project/coppice/dht/peers"
	"github.com/libp2p/go-libp2p/core/host"
	"github.com/libp2p/go-libp2p/core/network"
	"github.com/libp2p/go-libp2p/core/peer"
)

// strangerStay is how long an unknown peer's connection stays without a join in progress.
const strangerStay = 2 * time.Second

// maxSaid bounds the refusals remembered as logged.
const maxSaid = 1024

// door watches who comes in: it serves join and hello, says hello on the connections this node dials, and closes the connections of
// strangers.
type door struct {
	cfg   *Config
	h     host.Host
	peers *peers.Libp2p
	log   *slog.Logger
	slots chan struct{} // joins being served

	ctx    context.Context // ends with Close; bounds admissions and greetings
	cancel context.CancelFunc
	wg     sync.WaitGroup
	bundle *network.NotifyBundle

	mu      sync.Mutex // guards what follows
	closed  bool
	busy    map[peer.ID]int      // joins in progress
	clients map[peer.ID]struct{} // certified clients, while connected
	said    map[said]struct{}    // refusals already logged
}

type said struct {
	id     peer.ID
	reason Reason
}

func newDoor(cfg *Config, h host.Host, p *peers.Libp2p) *door {
	d := &door{
		cfg: cfg, h: h, peers: p, log: cfg.Log, slots: make(chan struct{}, maxJoins),
		busy: map[peer.ID]int{}, clients: map[peer.ID]struct{}{}, said: map[said]struct{}{},
	}
	d.ctx, d.cancel = context.WithCancel(context.Background())
	d.bundle = &network.NotifyBundle{ConnectedF: d.connected, DisconnectedF: d.disconnected}
	h.Network().Notify(d.bundle)
	p.HandleOpen(JoinProtocol, d.handleJoin)
	p.HandleOpen(HelloProtocol, d.handleHello)
	return d
}

func (d *door) close() {
	d.mu.Lock()
	d.closed = true
	d.mu.Unlock()
	d.h.Network().StopNotify(d.bundle)
	d.cancel()
	d.wg.Wait()
}

// begin counts a goroutine in, unless the door is closed.
func (d *door) begin() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return false
	}
	d.wg.Add(1)
	return true
}

func (d *door) connected(_ network.Network, c network.Conn) {
	if c.Stat().Direction == network.DirOutbound {
		d.greet(c.RemotePeer())
		return
	}
	if !d.known(c.RemotePeer()) {
		time.AfterFunc(strangerStay, func() { d.showOut(c) })
	}
}

func (d *door) disconnected(_ network.Network, c network.Conn) {
	if len(d.h.Network().ConnsToPeer(c.RemotePeer())) > 0 {
		return
	}
	d.mu.Lock()
	delete(d.clients, c.RemotePeer())
	d.mu.Unlock()
}

// showOut closes a connection whose peer is still a stranger.
func (d *door) showOut(c network.Conn) {
	id := c.RemotePeer()
	if c.IsClosed() || d.known(id) {
		return
	}
	d.mu.Lock()
	busy, closed := d.busy[id] > 0, d.closed
	d.mu.Unlock()
	switch {
	case closed:
	case busy:
		time.AfterFunc(strangerStay, func() { d.showOut(c) })
	default:
		d.log.Debug("closed the connection of a stranger", "peer", id, "addr", c.RemoteMultiaddr())
		if err := c.Close(); err != nil {
			d.log.Debug("close a stranger's connection", "peer", id, "err", err)
		}
	}
}

// known reports whether the peer may stay connected.
func (d *door) known(id peer.ID) bool { return d.cfg.Member(id) || d.isClient(id) }

func (d *door) isClient(id peer.ID) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, ok := d.clients[id]
	return ok
}

func (d *door) addClient(id peer.ID) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.clients[id] = struct{}{}
}

// joining marks a join in progress until the returned function is called.
func (d *door) joining(id peer.ID) func() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.busy[id]++
	return func() {
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.busy[id]--; d.busy[id] <= 0 {
			delete(d.busy, id)
		}
	}
}

// sayOnce reports whether this refusal of this peer is new, so that a stranger cannot fill the log.
func (d *door) sayOnce(id peer.ID, r Reason) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	k := said{id, r}
	if _, ok := d.said[k]; ok {
		return false
	}
	if len(d.said) >= maxSaid {
		clear(d.said)
	}
	d.said[k] = struct{}{}
	return true
}
