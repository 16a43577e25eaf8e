package arbiter

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"

	"github.com/coppice-project/coppice/dht/peers"
)

const protoRaft = protocol.ID("/coppice/raft/1")

// streams is raft's stream layer over peers.Peers. It refuses incoming streams until it is opened, so that a node whose disk was not
// yet vouched for neither votes nor acknowledges anything.
type streams struct {
	peers peers.Peers
	self  peer.ID

	accepted chan net.Conn
	closed   chan struct{}

	mu    sync.Mutex // guards the rest
	open  bool
	ended bool
	conns map[*conn]struct{}
}

var _ raft.StreamLayer = (*streams)(nil)

func newStreams(p peers.Peers, self peer.ID) *streams {
	s := &streams{peers: p, self: self, accepted: make(chan net.Conn), closed: make(chan struct{}), conns: map[*conn]struct{}{}}
	p.Handle(protoRaft, s.handle)
	return s
}

// admit lets incoming streams in from now on.
func (s *streams) admit() {
	s.mu.Lock()
	s.open = true
	s.mu.Unlock()
}

func (s *streams) isOpen() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.open && !s.ended
}

func (s *streams) handle(from peer.ID, st peers.Stream) {
	if !s.isOpen() {
		_ = st.Reset()
		return
	}
	c, err := s.track(st, from)
	if err != nil {
		return
	}
	select {
	case s.accepted <- c:
	case <-s.closed:
		_ = c.Close()
		return
	}
	// The handler owns the stream; it stays until raft has done with it.
	<-c.done
}

func (s *streams) track(st peers.Stream, remote peer.ID) (*conn, error) {
	c := &conn{Stream: st, layer: s, remote: remote, done: make(chan struct{})}
	s.mu.Lock()
	ended := s.ended
	if !ended {
		s.conns[c] = struct{}{}
	}
	s.mu.Unlock()
	if ended {
		return nil, errors.Join(fmt.Errorf("raft stream: %w", ErrClosed), st.Reset())
	}
	return c, nil
}

// Accept implements net.Listener.
func (s *streams) Accept() (net.Conn, error) {
	select {
	case c := <-s.accepted:
		return c, nil
	case <-s.closed:
		return nil, net.ErrClosed
	}
}

// Dial implements raft.StreamLayer. The address is a peer id.
func (s *streams) Dial(to raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	id, err := peer.Decode(string(to))
	if err != nil {
		return nil, fmt.Errorf("raft address %q: %w", to, err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	st, err := s.peers.Open(ctx, id, protoRaft)
	if err != nil {
		return nil, err
	}
	return s.track(st, id)
}

// Close implements net.Listener and ends every stream.
func (s *streams) Close() error {
	s.mu.Lock()
	if s.ended {
		s.mu.Unlock()
		return nil
	}
	s.ended = true
	close(s.closed)
	all := make([]*conn, 0, len(s.conns))
	for c := range s.conns {
		all = append(all, c)
	}
	s.mu.Unlock()
	for _, c := range all {
		_ = c.Close()
	}
	return nil
}

// drop ends the streams to one peer: what raft has pooled for it is stale.
func (s *streams) drop(id peer.ID) {
	s.mu.Lock()
	var all []*conn
	for c := range s.conns {
		if c.remote == id {
			all = append(all, c)
		}
	}
	s.mu.Unlock()
	for _, c := range all {
		_ = c.Close()
	}
}

// Addr implements net.Listener.
func (s *streams) Addr() net.Addr { return peerAddr(s.self) }

type peerAddr peer.ID

func (peerAddr) Network() string  { return "coppice" }
func (a peerAddr) String() string { return peer.ID(a).String() }

// conn is a stream as a net.Conn.
type conn struct {
	peers.Stream
	layer  *streams
	remote peer.ID
	once   sync.Once
	done   chan struct{}
}

// Close resets the stream: raft closes a connection only when it has no more use for what is under way on it.
func (c *conn) Close() error {
	c.once.Do(func() {
		c.layer.mu.Lock()
		delete(c.layer.conns, c)
		c.layer.mu.Unlock()
		_ = c.Reset() // a stream that is gone already is closed, too
		close(c.done)
	})
	return nil
}

func (c *conn) LocalAddr() net.Addr  { return peerAddr(c.layer.self) }
func (c *conn) RemoteAddr() net.Addr { return peerAddr(c.remote) }
