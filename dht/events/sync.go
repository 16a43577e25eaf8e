package events

import (
	"context"
	"slices"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

const (
	syncBatch  = 256
	syncBytes  = 512 << 10
	syncRounds = 64 // batches in one comparison, at most
)

// syncLoop compares with a random member now and then, and soon with one that has what fills a gap.
func (e *Events) syncLoop(ctx context.Context) {
	tick := time.NewTicker(e.cfg.SyncEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case id := <-e.quick:
			select {
			case <-ctx.Done():
				return
			case <-time.After(quickPause): // what is on its way may close the gap
			}
			e.syncWith(ctx, id)
		case <-tick.C:
			e.giveUpGaps()
			if id, ok := e.pick(); ok {
				e.syncWith(ctx, id)
			}
		}
	}
}

func (e *Events) pick() (peer.ID, bool) {
	ids := slices.DeleteFunc(slices.Clone(e.cfg.Alive()), func(id peer.ID) bool { return id == e.cfg.Self })
	if len(ids) == 0 {
		return "", false
	}
	e.push.mu.Lock() // which guards the random source
	defer e.push.mu.Unlock()
	return ids[e.cfg.Rand.IntN(len(ids))], true
}

func (e *Events) syncWith(ctx context.Context, id peer.ID) {
	if err := e.compare(ctx, id); err != nil {
		e.stats.syncFailed.Add(1)
		e.cfg.Log.Debug("events could not be compared; the next round tries another member", "with", id, "err", err)
		return
	}
	e.stats.synced.Add(1)
}

func (e *Events) call(ctx context.Context, id peer.ID, ask *wirev1.EventAsk) (*wirev1.EventAnswer, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	a := &wirev1.EventAnswer{}
	return a, e.cfg.Caller.Call(ctx, id, Protocol, ask, a)
}

func (e *Events) mine() (digest uint64, marks []*wirev1.EventMark) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.ring.digest(), e.ring.marks()
}

// compare brings this node and another to know the same events: first by digest, then by marks, this node's lack first.
func (e *Events) compare(ctx context.Context, id peer.ID) error {
	digest, _ := e.mine()
	a, err := e.call(ctx, id, &wirev1.EventAsk{Sync: &wirev1.EventSync{Digest: digest}})
	if err != nil || a.GetSame() {
		return err
	}
	theirs := a.GetMarks()
	if err := e.adopt(theirs); err != nil { // first, so that what comes then comes without gaps
		return err
	}
	for range syncRounds {
		digest, marks := e.mine()
		a, err := e.call(ctx, id, &wirev1.EventAsk{Sync: &wirev1.EventSync{Digest: digest, Marks: marks, Send: true}})
		if err != nil {
			return err
		}
		fresh, err := e.accept(a.GetEvents(), id)
		if err != nil {
			return err
		}
		if !a.GetMore() || len(fresh) == 0 {
			break
		}
	}
	return e.give(ctx, id, theirs)
}

// adopt gives up what another says is gone.
func (e *Events) adopt(marks []*wirev1.EventMark) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return errClosed
	}
	ready, err := e.ring.adopt(marks)
	e.tell(ready)
	return err
}

// give sends a member what its marks say it lacks.
func (e *Events) give(ctx context.Context, id peer.ID, theirs []*wirev1.EventMark) error {
	e.mu.Lock()
	if e.closed {
		e.mu.Unlock()
		return errClosed
	}
	list, _, err := e.ring.lacking(theirs, syncRounds*syncBatch, syncRounds*syncBytes)
	e.mu.Unlock()
	if err != nil {
		return err
	}
	for part := range slices.Chunk(list, syncBatch) {
		if _, err := e.call(ctx, id, &wirev1.EventAsk{Push: part}); err != nil {
			return err
		}
	}
	return nil
}

// giveUpGaps goes past gaps that nobody has filled for long.
func (e *Events) giveUpGaps() {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return
	}
	for _, o := range e.ring.origins {
		if len(o.extra) == 0 || time.Since(o.gap) < gapMost {
			continue
		}
		var told []place
		for _, c := range o.giveUp() {
			told = append(told, place{origin: o, counter: c})
		}
		e.stats.givenUp.Add(1)
		ready, err := e.ring.load(told)
		if err != nil {
			e.cfg.Log.Error("events: the history cannot be read", "err", err)
		}
		e.tell(ready)
	}
}

// serve answers a member.
func (e *Events) serve(_ context.Context, from peer.ID, ask *wirev1.EventAsk) (*wirev1.EventAnswer, error) {
	a := &wirev1.EventAnswer{}
	if len(ask.GetPush()) > 0 {
		fresh, err := e.accept(ask.GetPush(), from)
		if err != nil {
			return nil, err
		}
		if ask.GetForward() {
			e.push.send(fresh, from)
		}
	}
	sync := ask.GetSync()
	if sync == nil {
		return a, nil
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return nil, errClosed
	}
	if sync.GetDigest() == e.ring.digest() {
		a.Same = true
		return a, nil
	}
	if !sync.GetSend() {
		a.Marks = e.ring.marks()
		return a, nil
	}
	var err error
	a.Events, a.More, err = e.ring.lacking(sync.GetMarks(), syncBatch, syncBytes)
	return a, err
}
