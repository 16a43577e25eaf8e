package events

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

const (
	pushAll     = 32 // so many members are told directly
	pushSome    = 3  // else so many, who pass it on
	pushBatch   = 128
	pushWaiting = 1024
	callTimeout = time.Second
)

// pusher sends events to members: to each in order, one call at a time, on a goroutine that lives as long as there is something.
type pusher struct {
	e *Events

	mu      sync.Mutex // guards all below
	lines   map[peer.ID]*line
	closed  bool
	running sync.WaitGroup
}

// line is what waits for one member.
type line struct {
	waiting []*wirev1.Event
	forward bool
}

func newPusher(e *Events) *pusher { return &pusher{e: e, lines: map[peer.ID]*line{}} }

// close ends with what is under way; what waits behind it is dropped.
func (p *pusher) close() {
	p.mu.Lock()
	p.closed = true
	for _, l := range p.lines {
		l.waiting = nil
	}
	p.mu.Unlock()
	p.running.Wait()
}

// send pushes events to all members or to a few, but not to who sent them here.
func (p *pusher) send(list []*wirev1.Event, from peer.ID) {
	if len(list) == 0 {
		return
	}
	ids := slices.DeleteFunc(slices.Clone(p.e.cfg.Alive()), func(id peer.ID) bool { return id == p.e.cfg.Self || id == from })
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return
	}
	forward := len(ids) >= pushAll
	if forward {
		p.e.cfg.Rand.Shuffle(len(ids), func(i, j int) { ids[i], ids[j] = ids[j], ids[i] })
		ids = ids[:pushSome]
	}
	for _, id := range ids {
		l := p.lines[id]
		if l == nil {
			l = &line{}
			p.lines[id] = l
			p.running.Go(func() { p.run(id) })
		}
		room := max(pushWaiting-len(l.waiting), 0)
		if len(list) > room {
			p.e.stats.pushDropped.Add(uint64(len(list) - room))
		}
		l.waiting = append(l.waiting, list[:min(room, len(list))]...)
		l.forward = forward
	}
}

func (p *pusher) take(id peer.ID) (*wirev1.EventAsk, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	l := p.lines[id]
	if len(l.waiting) == 0 {
		delete(p.lines, id)
		return nil, false
	}
	n := min(pushBatch, len(l.waiting))
	ask := &wirev1.EventAsk{Push: l.waiting[:n:n], Forward: l.forward}
	l.waiting = l.waiting[n:]
	return ask, true
}

// run sends what waits for a member; at the first failure the rest is dropped: comparison brings it when the member is back.
func (p *pusher) run(id peer.ID) {
	for {
		ask, ok := p.take(id)
		if !ok {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
		err := p.e.cfg.Caller.Call(ctx, id, Protocol, ask, &wirev1.EventAnswer{})
		cancel()
		if err == nil {
			continue
		}
		p.mu.Lock()
		lost := len(ask.GetPush()) + len(p.lines[id].waiting)
		delete(p.lines, id)
		p.mu.Unlock()
		p.e.stats.pushFailed.Add(uint64(lost))
		p.e.cfg.Log.Debug("events could not be pushed; comparison brings them", "to", id, "events", lost, "err", err)
		return
	}
}
