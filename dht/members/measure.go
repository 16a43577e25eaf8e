package members

import (
	"context"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

const (
	maxMeasures  = 32                     // at once
	measureFor   = 500 * time.Millisecond // for all of them; who has not answered then has no round trip
	measureEvery = 10 * time.Second       // for so long a measured one is good enough
)

// measured is a round trip that somebody asked for.
type measured struct {
	at  time.Time
	rtt time.Duration
}

// Measure returns the round trips to these members as they are now, for people who ask: between most pairs of a larger cluster no heartbeats
// pass. It goes over the connections that there are and makes none; who has none, or does not answer at once, is left out.
func (m *Members) Measure(ctx context.Context, ids []peer.ID) map[peer.ID]time.Duration {
	ctx, cancel := context.WithTimeout(ctx, measureFor)
	defer cancel()
	out := map[peer.ID]time.Duration{}
	var mu sync.Mutex // guards out
	var wg sync.WaitGroup
	slots := make(chan struct{}, maxMeasures)
	for _, id := range ids {
		boot, rtt, ok := m.measurable(id)
		if rtt > 0 {
			mu.Lock()
			out[id] = rtt
			mu.Unlock()
		}
		if !ok {
			continue
		}
		wg.Go(func() {
			select {
			case slots <- struct{}{}:
				defer func() { <-slots }()
			case <-ctx.Done():
				return
			}
			rtt, err := m.roundTrip(ctx, id, boot)
			if err != nil {
				return
			}
			mu.Lock()
			out[id] = rtt
			mu.Unlock()
		})
	}
	wg.Wait()
	return out
}

// measurable says whether a round trip to a member can be measured and is to be: it runs, is connected, and was not measured a moment ago.
func (m *Members) measurable(id peer.ID) (boot uint64, known time.Duration, ok bool) {
	o, there := m.Member(id)
	if !there || !o.State.Running() || o.Connection == "" || id == m.id {
		return 0, 0, false
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if was := m.entries[id].measure; was.rtt > 0 && time.Since(was.at) < measureEvery {
		return 0, was.rtt, false
	}
	return o.Boot, 0, true
}

// roundTrip asks a node when it was last heard by itself, which it answers at once. The second question goes over a stream that is open for sure.
func (m *Members) roundTrip(ctx context.Context, id peer.ID, boot uint64) (rtt time.Duration, err error) {
	req := &wirev1.ViewRequest{What: &wirev1.ViewRequest_Ask{Ask: &wirev1.ViewAsk{Id: []byte(id), Boot: boot}}}
	for range 2 {
		begun := time.Now()
		if err := m.caller.Call(ctx, id, ViewProtocol, req, &wirev1.ViewReply{}); err != nil {
			return 0, err
		}
		rtt = max(time.Since(begun), time.Microsecond)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.heard(id)
	if e := m.entries[id]; e != nil {
		e.measure = measured{time.Now(), rtt}
	}
	return rtt, nil
}
