package peers

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/protobuf/proto"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// Limits of calls. A peer that meets one waits or is refused; nothing grows without a bound.
const (
	// MaxMessage is the largest request or answer in bytes.
	MaxMessage = 8 << 20
	// CallTimeout bounds a call whose context has no deadline.
	CallTimeout = 30 * time.Second

	maxCalls = 64          // at once, per Caller, peer and protocol; more wait for their turn
	maxIdle  = 8           // pooled streams per peer and protocol
	idleTime = time.Minute // a pooled stream unused for so long is closed
)

// RemoteError is an error that the other side answered with, as opposed to one of the connection. Handlers return one (see Fail) to
// choose the code; any other error of a handler arrives with code INTERNAL.
type RemoteError struct {
	Code    wirev1.Failure_Code
	Message string
}

func (e *RemoteError) Error() string { return e.Message }

// Fail returns an error that arrives at the caller as a *RemoteError with this code.
func Fail(code wirev1.Failure_Code, format string, args ...any) error {
	return &RemoteError{Code: code, Message: fmt.Sprintf(format, args...)}
}

// CodeOf returns the code of a *RemoteError in err's chain; OK when there is none.
func CodeOf(err error) wirev1.Failure_Code {
	if remote, ok := errors.AsType[*RemoteError](err); ok {
		return remote.Code
	}
	return wirev1.Failure_OK
}

// CallStats counts what a Caller did since it was made.
type CallStats struct {
	Calls   uint64 // all
	Failed  uint64 // ended by the connection or the deadline, not by an answer
	Reused  uint64 // went over a pooled stream
	Retried uint64 // met a stale pooled stream and were sent again over a fresh one
}

// Caller makes calls over pooled, long-lived streams, one call at a time on each. Safe for concurrent use.
type Caller struct {
	peers Peers

	calls, failed, reused, retried atomic.Uint64

	mu     sync.Mutex // guards the rest
	lanes  map[laneKey]*lane
	closed bool
	reaper *time.Timer // runs only while streams are pooled
}

type laneKey struct {
	to    peer.ID
	proto protocol.ID
}

// lane is what goes to one peer by one protocol.
type lane struct {
	slots chan struct{} // one taken per running call
	users int           // calls that run or wait
	idle  []*callStream // the last one was used last
}

type callStream struct {
	Stream
	r     *bufio.Reader
	since time.Time // pooled since
}

// NewCaller returns a Caller over p. It has no goroutine of its own; Close ends its pooled streams.
func NewCaller(p Peers) *Caller { return &Caller{peers: p, lanes: map[laneKey]*lane{}} }

// Stats returns the counters.
func (c *Caller) Stats() CallStats {
	return CallStats{Calls: c.calls.Load(), Failed: c.failed.Load(), Reused: c.reused.Load(), Retried: c.retried.Load()}
}

// Call sends req and waits for the answer, which it puts into resp. The context's deadline (CallTimeout without one) bounds all of
// it and is told to the other side. An answered error is a *RemoteError; any other error is *in doubt*: the request may have been
// carried out. A request that went into a pooled stream which turned out to be stale, with no byte answered, is sent once more over a
// fresh one, so requests must be idempotent, as everything between members is.
func (c *Caller) Call(ctx context.Context, to peer.ID, proto protocol.ID, req, resp proto.Message) error {
	return c.make(ctx, laneKey{to, proto}, req, resp, false)
}

// Once is Call for requests whose caller must know whether an earlier copy may have been carried out: it never sends again by itself. A stale
// pooled stream then is an error, in doubt like any other.
func (c *Caller) Once(ctx context.Context, to peer.ID, proto protocol.ID, req, resp proto.Message) error {
	return c.make(ctx, laneKey{to, proto}, req, resp, true)
}

func (c *Caller) make(ctx context.Context, key laneKey, req, resp proto.Message, once bool) error {
	c.calls.Add(1)
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, CallTimeout)
		defer cancel()
	}
	err := c.call(ctx, key, req, resp, once)
	if err == nil {
		return nil
	}
	if _, answered := errors.AsType[*RemoteError](err); answered {
		return err
	}
	c.failed.Add(1)
	if ctx.Err() != nil && !errors.Is(err, ctx.Err()) {
		err = fmt.Errorf("%w (%w)", context.Cause(ctx), err)
	}
	return fmt.Errorf("call %s of %s: %w", key.proto, key.to, err)
}

func (c *Caller) call(ctx context.Context, key laneKey, req, resp proto.Message, once bool) error {
	l, err := c.enter(ctx, key)
	if err != nil {
		return err
	}
	defer c.leave(key, l)
	if s := c.takeIdle(l); s != nil {
		c.reused.Add(1)
		answered, err := s.roundTrip(ctx, req, resp)
		if err == nil || answered || ctx.Err() != nil || errors.Is(err, errMessageSize) {
			return c.done(l, s, err)
		}
		_ = c.done(l, s, err) // reset
		c.dropIdle(l)         // the others went with the same connection
		if once {
			return err
		}
		c.retried.Add(1) // the error is not the call's
	}
	raw, err := c.peers.Open(ctx, key.to, key.proto)
	if err != nil {
		return err
	}
	s := &callStream{Stream: raw, r: bufio.NewReaderSize(raw, readAhead)}
	_, err = s.roundTrip(ctx, req, resp)
	return c.done(l, s, err)
}

// done pools the stream when its call ended in order, resets it otherwise, and returns err.
func (c *Caller) done(l *lane, s *callStream, err error) error {
	_, remote := errors.AsType[*RemoteError](err)
	if err == nil || remote || errors.Is(err, errMessageSize) {
		c.mu.Lock()
		keep := !c.closed && len(l.idle) < maxIdle
		if keep {
			s.since = time.Now()
			l.idle = append(l.idle, s)
			if c.reaper == nil {
				c.reaper = time.AfterFunc(idleTime, c.reap)
			}
		}
		c.mu.Unlock()
		if keep {
			return err
		}
	}
	_ = s.Reset() // nothing to do about a stream that is gone already
	return err
}

func (c *Caller) enter(ctx context.Context, key laneKey) (*lane, error) {
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return nil, errors.New("this node is closing")
	}
	l := c.lanes[key]
	if l == nil {
		l = &lane{slots: make(chan struct{}, maxCalls)}
		c.lanes[key] = l
	}
	l.users++
	c.mu.Unlock()
	select {
	case l.slots <- struct{}{}:
		return l, nil
	default:
	}
	select {
	case l.slots <- struct{}{}:
		return l, nil
	case <-ctx.Done():
		c.mu.Lock()
		l.users--
		c.mu.Unlock()
		return nil, fmt.Errorf("%d calls are under way already: %w", maxCalls, context.Cause(ctx))
	}
}

func (c *Caller) leave(key laneKey, l *lane) {
	<-l.slots
	c.mu.Lock()
	defer c.mu.Unlock()
	if l.users--; l.users == 0 && len(l.idle) == 0 && c.lanes[key] == l {
		delete(c.lanes, key)
	}
}

func (c *Caller) takeIdle(l *lane) *callStream {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := len(l.idle)
	if n == 0 {
		return nil
	}
	s := l.idle[n-1]
	l.idle[n-1] = nil
	l.idle = l.idle[:n-1]
	return s
}

func (c *Caller) dropIdle(l *lane) {
	c.mu.Lock()
	stale := l.idle
	l.idle = nil
	c.mu.Unlock()
	for _, s := range stale {
		_ = s.Reset()
	}
}

// reap closes the streams that were idle for idleTime.
func (c *Caller) reap() {
	c.mu.Lock()
	var old []*callStream
	left := 0
	for key, l := range c.lanes {
		n := 0
		for n < len(l.idle) && time.Since(l.idle[n].since) >= idleTime {
			n++
		}
		old = append(old, l.idle[:n]...)
		l.idle = append([]*callStream(nil), l.idle[n:]...)
		left += len(l.idle)
		if l.users == 0 && len(l.idle) == 0 {
			delete(c.lanes, key)
		}
	}
	c.reaper = nil
	if left > 0 && !c.closed {
		c.reaper = time.AfterFunc(idleTime/2, c.reap)
	}
	c.mu.Unlock()
	for _, s := range old {
		_ = s.Close()
	}
}

// Close ends the pooled streams and refuses further calls. Running calls end by their own deadlines.
func (c *Caller) Close() {
	c.mu.Lock()
	c.closed = true
	if c.reaper != nil {
		c.reaper.Stop()
		c.reaper = nil
	}
	var all []*callStream
	for _, l := range c.lanes {
		all = append(all, l.idle...)
		l.idle = nil
	}
	c.mu.Unlock()
	for _, s := range all {
		_ = s.Close()
	}
}

// roundTrip makes one call on the stream. answered: at least one byte of an answer came, so the request must not be sent again.
func (s *callStream) roundTrip(ctx context.Context, req, resp proto.Message) (answered bool, err error) {
	deadline, _ := ctx.Deadline()
	buf := getBuffer()
	defer putBuffer(buf)
	if *buf, err = appendRequest((*buf)[:0], time.Until(deadline), req); err != nil {
		return false, err
	}
	// The end of the context, by deadline or cancellation, ends the stream: reads and writes alike.
	stop := context.AfterFunc(ctx, func() { _ = s.Reset() })
	defer func() {
		if !stop() && err == nil {
			err = context.Cause(ctx) // the stream may be gone: do not pool it
		}
	}()
	if _, err := s.Write(*buf); err != nil {
		return false, fmt.Errorf("send: %w", err)
	}
	status, err := s.r.ReadByte()
	if err != nil {
		return false, fmt.Errorf("no answer: %w", err)
	}
	*buf, err = readFrame(s.r, (*buf)[:0])
	if err != nil {
		return true, fmt.Errorf("half an answer: %w", err)
	}
	return true, decodeAnswer(status, *buf, resp)
}
