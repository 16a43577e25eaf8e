package sim

import (
	"context"
	"io"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"

	"github.com/coppice-project/coppice/dht/peers"
)

// echo has calls arrive twice. A stream neither doubles nor reorders what is written to it, but a caller that tries again after a lost answer
// does, and much later than it means to when the first try is stuck somewhere. So some streams of a protocol get a second one beside them to
// the same peer, on which everything is said again after a while and whose answers nobody hears.
type echo struct {
	peers.Peers
	protocol protocol.ID
	ctx      context.Context //nolint:containedctx // of the world: ends what is left
	goes     *sync.WaitGroup
	// draw says whether a stream is doubled, and by how much its echo is late.
	draw func() (bool, time.Duration)
}

// Open implements peers.Peers.
func (e *echo) Open(ctx context.Context, to peer.ID, proto protocol.ID) (peers.Stream, error) {
	st, err := e.Peers.Open(ctx, to, proto)
	if err != nil || proto != e.protocol {
		return st, err
	}
	double, late := e.draw()
	if !double {
		return st, nil
	}
	s := &echoed{Stream: st, said: make(chan said, 64), over: make(chan struct{})}
	e.goes.Go(func() { e.repeat(s, to, late) })
	return s, nil
}

type said struct {
	b  []byte
	at time.Time
}

// echoed is a stream that has an echo.
type echoed struct {
	peers.Stream
	said chan said
	once sync.Once
	over chan struct{}
}

// Write implements io.Writer.
func (s *echoed) Write(b []byte) (int, error) {
	n, err := s.Stream.Write(b)
	if err == nil {
		select {
		case s.said <- said{append([]byte(nil), b...), time.Now()}:
		default: // it is too far behind: half a message would be no message
			s.end()
		}
	}
	return n, err
}

func (s *echoed) end() { s.once.Do(func() { close(s.over) }) }

// Close implements io.Closer.
func (s *echoed) Close() error { s.end(); return s.Stream.Close() }

// Reset implements peers.Stream.
func (s *echoed) Reset() error { s.end(); return s.Stream.Reset() }

// repeat says everything again until the stream is over, and for a while longer.
func (e *echo) repeat(s *echoed, to peer.ID, late time.Duration) {
	ctx, cancel := context.WithTimeout(e.ctx, 2*time.Second)
	defer cancel()
	st, err := e.Peers.Open(ctx, to, e.protocol)
	if err != nil {
		return
	}
	heard := make(chan struct{})
	go func() {
		defer close(heard)
		_, _ = io.Copy(io.Discard, st) // nobody hears the answers
	}()
	defer func() {
		_ = st.Reset() // it has said all it had to
		<-heard
	}()
	for {
		var w said
		select {
		case w = <-s.said:
		default:
			select {
			case w = <-s.said:
			case <-s.over:
				return
			case <-e.ctx.Done():
				return
			}
		}
		select {
		case <-time.After(time.Until(w.at.Add(late))):
		case <-e.ctx.Done():
			return
		}
		if st.SetWriteDeadline(time.Now().Add(time.Second)) != nil {
			return
		}
		if _, err := st.Write(w.b); err != nil {
			return
		}
	}
}
