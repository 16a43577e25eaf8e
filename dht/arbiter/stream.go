package arbiter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

const protoRaft = protocol.ID("/coppice/raft/2")

// greetTime bounds the exchange of incarnations at the beginning of an incoming stream.
const greetTime = 2 * time.Second

// door says who may talk to this node's raft: nodes of the same incarnation of the group.
type door struct {
	speaks func() (incarnation, error)                        // what a stream from here announces
	greet  func(incarnation) (answer incarnation, admit bool) // what one to here is answered
	met    func(incarnation)                                  // told what others answer
}

// streams is raft's stream layer over peers.Peers. Each stream begins with the incarnations of both ends and is refused where they differ.
// It refuses all incoming streams until it is opened, so that a node whose disk was not yet vouched for neither votes nor acknowledges
// anything.
type streams struct {
	peers peers.Peers
	self  peer.ID
	door  door

	accepted chan net.Conn
	closed   chan struct{}

	mu    sync.Mutex // guards the rest
	open  bool
	ended bool
	conns map[*conn]struct{}
}

var _ raft.StreamLayer = (*streams)(nil)

func newStreams(p peers.Peers, self peer.ID, d door) *streams {
	s := &streams{peers: p, self: self, door: d, accepted: make(chan net.Conn), closed: make(chan struct{}), conns: map[*conn]struct{}{}}
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
	if !s.greeted(c) {
		_ = c.Close()
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

// greeted exchanges incarnations on an incoming stream. Reading is byte by byte past the message: what follows belongs to raft.
func (s *streams) greeted(c *conn) bool {
	if c.SetDeadline(time.Now().Add(greetTime)) != nil {
		return false
	}
	in := new(wirev1.ArbiterIncarnation)
	if err := readSmall(c, in); err != nil {
		return false
	}
	var at incarnation
	ok := ours(in.GetShard()) == nil // else nothing of what it says is about this group
	if ok {
		at, ok = s.door.greet(incarnationOf(in))
	}
	if _, err := protodelim.MarshalTo(c, &wirev1.ArbiterIncarnation{Number: at.number, Lineage: at.lineage, Refused: !ok, Shard: thisShard}); err != nil || !ok {
		if err == nil {
			_ = c.CloseWrite() // so that the answer gets there before the reset does
			_, _ = c.Read(make([]byte, 1))
		}
		return false
	}
	return c.SetDeadline(time.Time{}) == nil
}

// greeting announces this node's incarnation on a stream that it opened.
func (s *streams) greeting(c *conn, deadline time.Time) error {
	own, err := s.door.speaks()
	if err != nil {
		return err
	}
	if err := c.SetDeadline(deadline); err != nil {
		return err
	}
	if _, err := protodelim.MarshalTo(c, own.wire()); err != nil {
		return err
	}
	answer := new(wirev1.ArbiterIncarnation)
	if err := readSmall(c, answer); err != nil {
		return err
	}
	if err := ours(answer.GetShard()); err != nil {
		return fmt.Errorf("raft stream refused: the other is %w", err)
	}
	s.door.met(incarnationOf(answer))
	if answer.GetRefused() {
		return fmt.Errorf("raft stream refused: this node is of incarnation %s, the other of %s", own, incarnationOf(answer))
	}
	return c.SetDeadline(time.Time{})
}

// readSmall reads one short message and not a byte more.
func readSmall(r io.Reader, m proto.Message) error {
	return protodelim.UnmarshalOptions{MaxSize: 256}.UnmarshalFrom(oneByOne{r}, m)
}

// oneByOne is a reader without a buffer.
type oneByOne struct{ io.Reader }

func (r oneByOne) ReadByte() (byte, error) {
	var b [1]byte
	_, err := io.ReadFull(r.Reader, b[:])
	return b[0], err
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
	deadline, _ := ctx.Deadline()
	st, err := s.peers.Open(ctx, id, protoRaft)
	if err != nil {
		return nil, err
	}
	c, err := s.track(st, id)
	if err != nil {
		return nil, err
	}
	if err := s.greeting(c, deadline); err != nil {
		return nil, errors.Join(fmt.Errorf("raft stream to %s: %w", id, err), c.Close())
	}
	return c, nil
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
