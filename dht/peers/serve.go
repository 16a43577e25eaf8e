package peers

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/protobuf/proto"
)

const (
	maxServed  = 256             // streams of one protocol from one peer; further ones are reset
	servedIdle = 3 * time.Minute // a stream without a request for so long is closed; longer than a Caller's idleTime
	maxBlamed  = 256             // peers whose garbage is logged, once each
)

// CallServer answers the calls of one protocol. Its counters tell about peers that misbehave.
type CallServer struct {
	proto  protocol.ID
	decode func(body []byte) (request, error)

	served, refused, garbage atomic.Uint64

	mu      sync.Mutex // guards the rest
	streams map[peer.ID]int
	blamed  map[peer.ID]bool
}

// request is one decoded request, ready to be answered.
type request func(ctx context.Context, from peer.ID) (proto.Message, error)

// ServeStats counts what a CallServer met.
type ServeStats struct {
	Served  uint64 // answered calls, failures included
	Refused uint64 // streams reset because their peer had too many
	Garbage uint64 // streams reset because what came was no call
}

// Stats returns the counters.
func (v *CallServer) Stats() ServeStats {
	return ServeStats{Served: v.served.Load(), Refused: v.refused.Load(), Garbage: v.garbage.Load()}
}

// ServeCalls answers calls of a protocol with fn: one goroutine per stream and one per running call. newReq returns an empty request.
// An error of fn reaches the caller as *RemoteError. fn's context ends at the caller's deadline and when its stream breaks; fn must
// respect it. What is no call is reset, counted, and logged once per peer.
func ServeCalls[Req, Resp proto.Message](
	p Peers, id protocol.ID, newReq func() Req, fn func(ctx context.Context, from peer.ID, req Req) (Resp, error),
) *CallServer {
	v := &CallServer{proto: id, streams: map[peer.ID]int{}, blamed: map[peer.ID]bool{}}
	v.decode = func(body []byte) (request, error) {
		req := newReq()
		if err := proto.Unmarshal(body, req); err != nil {
			return nil, fmt.Errorf("%w: %w", errGarbage, err)
		}
		return func(ctx context.Context, from peer.ID) (proto.Message, error) { return fn(ctx, from, req) }, nil
	}
	p.Handle(id, v.serve)
	return v
}

func (v *CallServer) serve(from peer.ID, s Stream) {
	if !v.enter(from) {
		v.refused.Add(1)
		_ = s.Reset()
		return
	}
	defer v.leave(from)
	err := v.serveStream(from, s)
	if errors.Is(err, io.EOF) {
		_ = s.Close()
		return
	}
	_ = s.Reset()
	if errors.Is(err, errGarbage) {
		v.blame(from, err)
	}
}

// serveStream reads requests and has them answered one after the other. It reads on while a call runs, which is how it learns that
// the caller gave up.
func (v *CallServer) serveStream(from peer.ID, s Stream) error {
	ctx, cancel := context.WithCancel(context.Background())
	answered := make(chan error, 1)
	answered <- nil
	defer func() {
		cancel()
		<-answered // never leave a call behind
	}()
	r := bufio.NewReaderSize(s, readAhead)
	wait := servedIdle
	for {
		if err := s.SetReadDeadline(time.Now().Add(wait)); err != nil {
			return err
		}
		if _, err := r.Peek(1); err != nil { // most streams wait here most of the time, and hold nothing else meanwhile
			return err
		}
		timeout, call, err := v.read(r)
		if err != nil {
			return err
		}
		if err := <-answered; err != nil {
			answered <- nil
			return err
		}
		wait = servedIdle + timeout
		go func() { answered <- v.answer(ctx, from, s, timeout, call) }()
	}
}

// read reads one request.
func (v *CallServer) read(r *bufio.Reader) (timeout time.Duration, call request, err error) {
	buf := getBuffer()
	defer putBuffer(buf)
	timeout, *buf, err = readRequest(r, (*buf)[:0])
	if err == nil {
		call, err = v.decode(*buf)
	}
	return timeout, call, err
}

func (v *CallServer) answer(ctx context.Context, from peer.ID, s Stream, timeout time.Duration, call request) error {
	deadline := time.Now().Add(timeout)
	ctx, cancel := context.WithDeadline(ctx, deadline)
	defer cancel()
	resp, err := call(ctx, from)
	v.served.Add(1)
	buf := getBuffer()
	defer putBuffer(buf)
	*buf = appendAnswer((*buf)[:0], resp, err)
	if err := s.SetWriteDeadline(deadline.Add(time.Second)); err != nil {
		return err
	}
	if _, err = s.Write(*buf); err != nil {
		_ = s.Reset() // wakes the reading side too
	}
	return err
}

func (v *CallServer) enter(from peer.ID) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.streams[from] >= maxServed {
		return false
	}
	v.streams[from]++
	return true
}

func (v *CallServer) leave(from peer.ID) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.streams[from]--; v.streams[from] == 0 {
		delete(v.streams, from)
	}
}

func (v *CallServer) blame(from peer.ID, err error) {
	v.garbage.Add(1)
	v.mu.Lock()
	first := !v.blamed[from] && len(v.blamed) < maxBlamed
	if first {
		v.blamed[from] = true
	}
	v.mu.Unlock()
	if first {
		slog.Warn("garbage on a stream, dropped; further ones of this peer are only counted", "node", from, "protocol", v.proto, "err", err)
	}
}

func validUTF8(s string) string { return strings.ToValidUTF8(s, "�") }
