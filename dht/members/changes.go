package members

import (
	"slices"
	"sync"

	"github.com/libp2p/go-libp2p/core/peer"
)

// changes delivers Changes in order on one goroutine. What a slow subscriber has not been told of a member is kept as one Change, so
// the queue is never longer than the view.
type changes struct {
	mu      sync.Mutex // guards the rest
	order   []peer.ID
	pending map[peer.ID]Change
	subs    []*func(Change)
	wake    chan struct{}
	quit    chan struct{}
	done    chan struct{}
}

func (c *changes) init() {
	c.pending = map[peer.ID]Change{}
	c.wake = make(chan struct{}, 1)
	c.quit = make(chan struct{})
	c.done = make(chan struct{})
}

func (c *changes) add(ch Change) {
	c.mu.Lock()
	defer c.mu.Unlock()
	id := ch.New.ID
	if before, ok := c.pending[id]; ok {
		ch.Old = before.Old
		if before.Trigger == "reboot" && ch.Trigger != "refuted" {
			ch.Trigger = before.Trigger
		}
	} else {
		c.order = append(c.order, id)
	}
	c.pending[id] = ch
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

func (c *changes) next() (ch Change, subs []func(Change), ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.order) > 0 {
		id := c.order[0]
		c.order = c.order[1:]
		ch = c.pending[id]
		delete(c.pending, id)
		if ch.Old.ID == id && ch.Old.State == ch.New.State && ch.Old.sameFor(ch.New.Info) && ch.Trigger != "refuted" {
			continue // back to what subscribers know
		}
		for _, f := range c.subs {
			subs = append(subs, *f)
		}
		return ch, subs, true
	}
	return Change{}, nil, false
}

func (c *changes) start() {
	go func() {
		defer close(c.done)
		for {
			for ch, subs, ok := c.next(); ok; ch, subs, ok = c.next() {
				for _, f := range subs {
					f(ch)
				}
			}
			select {
			case <-c.wake:
			case <-c.quit:
				return
			}
		}
	}()
}

func (c *changes) stop() {
	close(c.quit)
	<-c.done
}

func (c *changes) subscribe(f func(Change)) (cancel func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.subs = append(c.subs, &f)
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.subs = slices.DeleteFunc(c.subs, func(o *func(Change)) bool { return o == &f })
	}
}
