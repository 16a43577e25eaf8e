package peers

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
)

// Addr is a peer as a net.Addr: what RemoteAddr of a Conn returns is authenticated.
type Addr struct{ ID peer.ID }

// Network implements net.Addr.
func (Addr) Network() string { return "coppice" }

// String implements net.Addr; Dialer takes it back.
func (a Addr) String() string { return a.ID.String() }

// PeerOf returns the authenticated peer behind an address of a Conn, as gRPC (peer.Peer.Addr) and net/http (through ConnContext)
// hand it on. ok is false for addresses of other kinds.
func PeerOf(a net.Addr) (id peer.ID, ok bool) {
	p, ok := a.(Addr)
	return p.ID, ok
}

// streamConn is a Stream as a net.Conn.
type streamConn struct {
	Stream
	local, remote peer.ID
}

func (c *streamConn) LocalAddr() net.Addr  { return Addr{c.local} }
func (c *streamConn) RemoteAddr() net.Addr { return Addr{c.remote} }

// Read maps the end of a stream whose peer is gone to what net.Conn's users expect.
func (c *streamConn) Read(b []byte) (int, error) {
	n, err := c.Stream.Read(b)
	return n, c.wrap("read", err)
}

func (c *streamConn) Write(b []byte) (int, error) {
	n, err := c.Stream.Write(b)
	return n, c.wrap("write", err)
}

// wrap makes errors net.Errors that name the peer; io.EOF stays itself.
func (c *streamConn) wrap(op string, err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	return &net.OpError{Op: op, Net: Addr{}.Network(), Source: c.LocalAddr(), Addr: c.RemoteAddr(), Err: err}
}

// selfOf returns the own identity of a Peers that knows it, or "".
func selfOf(p Peers) peer.ID {
	if s, ok := p.(interface{ ID() peer.ID }); ok {
		return s.ID()
	}
	return ""
}

// NewConn makes a stream to or from a member a net.Conn.
func NewConn(s Stream, local, remote peer.ID) net.Conn {
	return &streamConn{Stream: s, local: local, remote: remote}
}

// acceptBacklog is how many streams wait for Accept, acceptWait how long a further one does.
const (
	acceptBacklog = 64
	acceptWait    = 5 * time.Second
)

// Listener accepts the members' streams of a protocol as connections, for a gRPC or HTTP server. Closing it resets later streams;
// connections accepted before stay.
func Listener(p Peers, proto protocol.ID) net.Listener {
	l := &streamListener{self: selfOf(p), accepted: make(chan net.Conn, acceptBacklog), closed: make(chan struct{})}
	p.Handle(proto, l.handle)
	return l
}

type streamListener struct {
	self     peer.ID
	accepted chan net.Conn
	once     sync.Once
	closed   chan struct{}
}

func (l *streamListener) handle(from peer.ID, s Stream) {
	select {
	case <-l.closed:
	default:
		t := time.NewTimer(acceptWait)
		defer t.Stop()
		select {
		case l.accepted <- NewConn(s, l.self, from):
			return
		case <-l.closed:
		case <-t.C:
		}
	}
	// Nothing is lost by a failed reset: the stream is dead either way.
	_ = s.Reset() //nolint:errcheck // see above
}

func (l *streamListener) Accept() (net.Conn, error) {
	select {
	case <-l.closed:
		return nil, net.ErrClosed
	default:
	}
	select {
	case c := <-l.accepted:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *streamListener) Close() error {
	l.once.Do(func() {
		close(l.closed)
		for {
			select {
			case c := <-l.accepted:
				_ = c.(*streamConn).Reset() //nolint:errcheck // nobody accepted it
			default:
				return
			}
		}
	})
	return nil
}

func (l *streamListener) Addr() net.Addr { return Addr{l.self} }

// Dialer opens connections to members by their peer id in text, as grpc.WithContextDialer wants it (target "passthrough:///<id>") and,
// after dropping the network argument, http.Transport.DialContext (a ":port" behind the id is ignored).
func Dialer(p Peers, proto protocol.ID) func(ctx context.Context, node string) (net.Conn, error) {
	local := selfOf(p)
	return func(ctx context.Context, node string) (net.Conn, error) {
		text, _, _ := strings.Cut(node, ":")
		id, err := peer.Decode(text)
		if err != nil {
			return nil, fmt.Errorf("dial %q: not a peer id: %w", node, err)
		}
		s, err := p.Open(ctx, id, proto)
		if err != nil {
			return nil, err
		}
		return NewConn(s, local, id), nil
	}
}
