// Package peers is how members reach each other: streams named by a protocol, and what the link itself tells about a peer
// (closed, refused, silent). Protocol packages depend on these interfaces only; a libp2p host satisfies them in a node, and Net
// simulates them with resets, refusals, delay and loss in a synctest bubble.
package peers

import (
	"context"
	"errors"
	"io"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
)

// Stream is one ordered, reliable byte stream to a member. A libp2p network.Stream satisfies it.
type Stream interface {
	io.ReadWriteCloser
	CloseWrite() error
	Reset() error
	SetDeadline(time.Time) error
	SetReadDeadline(time.Time) error
	SetWriteDeadline(time.Time) error
}

// Handler serves one incoming stream and owns it: it must close or reset it. from is authenticated and a member, unless the
// protocol was registered as open to strangers.
type Handler func(from peer.ID, s Stream)

// Peers opens streams to members and handles theirs.
type Peers interface {
	// Open opens a stream. It dials when there is no connection. It fails within the context's deadline and, without one, within
	// DialTimeout.
	Open(ctx context.Context, to peer.ID, proto protocol.ID) (Stream, error)
	// Handle registers the handler of a protocol. It is called before the node serves; a second call replaces the first.
	Handle(proto protocol.ID, h Handler)
}

// DialTimeout bounds Open where the caller set no deadline.
const DialTimeout = 2 * time.Second

// Outcome is what a fresh dial of a peer found.
type Outcome int

const (
	// Silent: nothing answered in time; no proof of anything.
	Silent Outcome = iota
	// Reached: the peer's process answered and authenticated itself.
	Reached
	// Refused: the host is there and nothing listens on the peer's ports any more: its process is dead.
	Refused
)

func (o Outcome) String() string { return [...]string{"silent", "reached", "refused"}[o] }

// Links tells about connections. Watchers need it; nothing else should.
type Links interface {
	// Notify calls f when the last connection to a peer is gone (up false) and when the first is there (up true). f must not block.
	Notify(f func(id peer.ID, up bool))
	// Probe dials the peer afresh, past any dial back-off, and says what it found. A bare TCP accept is no sign of life: Reached
	// needs the peer's authenticated answer.
	Probe(ctx context.Context, id peer.ID) Outcome
}

// ErrUnreachable is wrapped by Open when no connection could be made.
var ErrUnreachable = errors.New("peer unreachable")
