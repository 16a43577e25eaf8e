package blobs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"

	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// Protocol is the protocol of this package.
const Protocol protocol.ID = "/coppice/blob/1"

// class separates what must not wait for each other: each class has its own stream to a peer.
type class uint8

const (
	hot class = iota
	bulk
	fetch
)

// idleAfter is when a stream that nobody uses is closed.
const idleAfter = 5 * time.Minute

var (
	errSilent = errors.New("the peer is silent")
	errDown   = errors.New("the peer is down")
)

// session is one open stream to a peer: questions go out in order, answers come back in any.
type session struct {
	peer   peer.ID
	stall  time.Duration
	stream peers.Stream
	turn   chan struct{} // held by whoever writes
	buf    []byte        // of frames; of whoever has the turn
	dead   chan struct{} // closed when the session is over

	mu      sync.Mutex // guards all below
	err     error
	next    uint64
	waiting map[uint64]chan *wirev1.BlobAnswer
	heard   time.Time
	used    time.Time
}

func newSession(id peer.ID, st peers.Stream, stall time.Duration) *session {
	now := time.Now()
	return &session{
		peer: id, stall: stall, stream: st, turn: make(chan struct{}, 1), dead: make(chan struct{}),
		waiting: map[uint64]chan *wirev1.BlobAnswer{}, heard: now, used: now,
	}
}

// fail ends the session; all who wait get err.
func (x *session) fail(err error) {
	x.mu.Lock()
	if x.err != nil {
		x.mu.Unlock()
		return
	}
	x.err = err
	x.waiting = nil
	x.mu.Unlock()
	close(x.dead)
	// A reset that fails leaves a stream that is dead already.
	_ = x.stream.Reset()
}

func (x *session) reason() error {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.err
}

// read takes answers until the stream ends.
func (x *session) read() {
	r := bufio.NewReaderSize(x.stream, 32<<10)
	for {
		a := &wirev1.BlobAnswer{}
		if err := readFrame(r, a); err != nil {
			x.fail(fmt.Errorf("stream to %s: %w", x.peer, err))
			return
		}
		x.mu.Lock()
		c := x.waiting[a.GetId()]
		delete(x.waiting, a.GetId())
		x.heard = time.Now()
		x.mu.Unlock()
		if c != nil {
			c <- a
		}
	}
}

// write sends one frame; sent, where given, is called when it is out and before anyone else's frame.
func (x *session) write(ctx context.Context, ask *wirev1.BlobAsk, sent func()) error {
	select {
	case x.turn <- struct{}{}:
		defer func() { <-x.turn }()
	case <-x.dead:
		return x.reason()
	case <-ctx.Done():
		return ctx.Err()
	}
	frame, err := appendFrame(x.buf[:0], ask)
	if err != nil {
		return err
	}
	if cap(frame) <= keptFrame {
		x.buf = frame
	}
	err = x.stream.SetWriteDeadline(time.Now().Add(x.stall))
	if err == nil {
		_, err = x.stream.Write(frame)
	}
	if err != nil {
		// Part of a frame may be out: the stream is of no more use.
		x.fail(fmt.Errorf("stream to %s: %w", x.peer, err))
		return x.reason()
	}
	if sent != nil {
		sent()
	}
	return nil
}

// ask sends a question and waits for its answer. It gives the session up when nothing at all was heard for the stall time.
func (x *session) ask(ctx context.Context, ask *wirev1.BlobAsk, sent func()) (*wirev1.BlobAnswer, error) {
	answer := make(chan *wirev1.BlobAnswer, 1)
	began := time.Now()
	x.mu.Lock()
	if x.err != nil {
		x.mu.Unlock()
		return nil, x.reason()
	}
	x.next++
	ask.Id = x.next
	x.waiting[ask.Id] = answer
	x.used = began
	x.mu.Unlock()
	if err := x.write(ctx, ask, sent); err != nil {
		x.forget(ask.GetId())
		return nil, err
	}
	timer := time.NewTimer(x.stall)
	defer timer.Stop()
	for {
		select {
		case a := <-answer:
			return a, failure(a.GetFailure())
		case <-x.dead:
			return nil, x.reason()
		case <-ctx.Done():
			x.forget(ask.GetId())
			return nil, ctx.Err()
		case <-timer.C:
			quiet := time.Since(x.lastHeard(began))
			if quiet >= x.stall {
				x.fail(fmt.Errorf("%w: nothing from %s for %v", errSilent, x.peer, quiet.Round(time.Millisecond)))
				return nil, x.reason()
			}
			timer.Reset(x.stall - quiet)
		}
	}
}

func (x *session) forget(id uint64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	delete(x.waiting, id)
}

func (x *session) lastHeard(began time.Time) time.Time {
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.heard.After(began) {
		return x.heard
	}
	return began
}

// RemoteError is a failure that a peer answered with.
type RemoteError struct {
	Code    wirev1.Failure_Code
	Message string
}

func (e *RemoteError) Error() string { return fmt.Sprintf("peer refused: %s (%s)", e.Message, e.Code) }

func (e *RemoteError) Is(target error) bool {
	return target == ErrFull && e.Code == wirev1.Failure_FULL
}

func failure(f *wirev1.Failure) error {
	if f == nil || f.GetCode() == wirev1.Failure_OK {
		return nil
	}
	return &RemoteError{Code: f.GetCode(), Message: f.GetMessage()}
}

// pool holds the sessions to peers.
type pool struct {
	s *Store

	mu    sync.Mutex // guards slots
	slots map[slotKey]*slot
}

type slotKey struct {
	peer  peer.ID
	class class
}

// slot is where the session of a peer and class stands; lock is held while it is opened.
type slot struct {
	lock chan struct{}
	mu   sync.Mutex // guards cur
	cur  *session
}

func newPool(s *Store) *pool { return &pool{s: s, slots: map[slotKey]*slot{}} }

func (p *pool) slot(k slotKey) *slot {
	p.mu.Lock()
	defer p.mu.Unlock()
	sl := p.slots[k]
	if sl == nil {
		sl = &slot{lock: make(chan struct{}, 1)}
		p.slots[k] = sl
	}
	return sl
}

// get returns the session to a peer, opening one where there is none. reused says that it was there: it may be stale.
func (p *pool) get(ctx context.Context, to peer.ID, c class) (x *session, reused bool, err error) {
	sl := p.slot(slotKey{to, c})
	if x := sl.alive(); x != nil {
		return x, true, nil
	}
	select {
	case sl.lock <- struct{}{}:
		defer func() { <-sl.lock }()
	case <-ctx.Done():
		return nil, false, ctx.Err()
	}
	if x := sl.alive(); x != nil {
		return x, true, nil
	}
	x, err = p.open(ctx, to, c)
	if err != nil {
		return nil, false, err
	}
	sl.mu.Lock()
	sl.cur = x
	sl.mu.Unlock()
	return x, false, nil
}

func (p *pool) open(ctx context.Context, to peer.ID, c class) (*session, error) {
	ctx, cancel := context.WithTimeout(ctx, p.s.cfg.DialTimeout)
	defer cancel()
	st, err := p.s.cfg.Peers.Open(ctx, to, Protocol)
	if err != nil {
		return nil, fmt.Errorf("reach %s: %w", to, err)
	}
	stall := p.s.cfg.Stall
	if c != hot {
		stall *= 5
	}
	x := newSession(to, st, stall)
	if !p.s.work.enter() {
		x.fail(ErrClosed)
		return nil, ErrClosed
	}
	go func() {
		defer p.s.work.leave()
		x.read()
	}()
	return x, nil
}

func (sl *slot) alive() *session {
	sl.mu.Lock()
	defer sl.mu.Unlock()
	if sl.cur != nil && sl.cur.reason() != nil {
		sl.cur = nil
	}
	return sl.cur
}

// each calls f for each session there is.
func (p *pool) each(f func(slotKey, *session)) {
	p.mu.Lock()
	slots := make(map[slotKey]*slot, len(p.slots))
	for k, sl := range p.slots {
		slots[k] = sl
	}
	p.mu.Unlock()
	for k, sl := range slots {
		if x := sl.alive(); x != nil {
			f(k, x)
		}
	}
}

func (p *pool) closeAll() {
	p.each(func(_ slotKey, x *session) { x.fail(ErrClosed) })
}

// closeIdle ends sessions that nobody has used for a while.
func (p *pool) closeIdle() {
	p.each(func(_ slotKey, x *session) {
		x.mu.Lock()
		idle := len(x.waiting) == 0 && time.Since(x.used) >= idleAfter
		x.mu.Unlock()
		if idle {
			x.fail(errors.New("idle"))
		}
	})
}

// PeerDown tells the store that a member was confirmed dead: what waits for it fails at once, instead of after the stall time.
func (s *Store) PeerDown(id peer.ID) {
	s.pool.each(func(k slotKey, x *session) {
		if k.peer == id {
			x.fail(fmt.Errorf("%w: %s", errDown, id))
		}
	})
}
