package dht

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/libp2p/go-libp2p/core/metrics"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
)

// Traffic is what one protocol has moved since the node started: payload bytes of its streams, without the framing of yamux, TLS and TCP.
type Traffic struct {
	Protocol       string
	Sent, Received uint64 // bytes
	Writes, Reads  uint64 // calls; each write is a record of TLS, and a segment of TCP when the link is quiet
}

// traffic counts what streams move, by protocol. It implements metrics.Reporter as far as the network uses it: libp2p's own counter keeps
// rates and a goroutine that wakes each second for them.
type traffic struct {
	mu sync.RWMutex // guards the map
	by map[protocol.ID]*flow
}

type flow struct{ sent, received, writes, reads atomic.Int64 }

func newTraffic() *traffic { return &traffic{by: map[protocol.ID]*flow{}} }

func (t *traffic) of(p protocol.ID) *flow {
	t.mu.RLock()
	f := t.by[p]
	t.mu.RUnlock()
	if f != nil {
		return f
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if f = t.by[p]; f == nil {
		f = &flow{}
		t.by[p] = f
	}
	return f
}

// list is sorted by bytes sent, most first.
func (t *traffic) list() []Traffic {
	t.mu.RLock()
	defer t.mu.RUnlock()
	out := make([]Traffic, 0, len(t.by))
	for p, f := range t.by {
		out = append(out, Traffic{
			Protocol: string(p), Sent: uint64(f.sent.Load()), Received: uint64(f.received.Load()), Writes: uint64(f.writes.Load()), Reads: uint64(f.reads.Load()),
		})
	}
	slices.SortFunc(out, func(a, b Traffic) int {
		return cmp.Or(cmp.Compare(b.Sent, a.Sent), cmp.Compare(a.Protocol, b.Protocol))
	})
	return out
}

// LogSentMessageStream implements metrics.Reporter: the network calls it for each write to a stream.
func (t *traffic) LogSentMessageStream(n int64, p protocol.ID, _ peer.ID) {
	f := t.of(p)
	f.sent.Add(n)
	f.writes.Add(1)
}

// LogRecvMessageStream implements metrics.Reporter.
func (t *traffic) LogRecvMessageStream(n int64, p protocol.ID, _ peer.ID) {
	f := t.of(p)
	f.received.Add(n)
	f.reads.Add(1)
}

// LogSentMessage implements metrics.Reporter; the streams' own count is enough.
func (t *traffic) LogSentMessage(int64) {}

// LogRecvMessage implements metrics.Reporter.
func (t *traffic) LogRecvMessage(int64) {}

// GetBandwidthForPeer implements metrics.Reporter; nothing is kept by peer.
func (t *traffic) GetBandwidthForPeer(peer.ID) metrics.Stats { return metrics.Stats{} }

// GetBandwidthForProtocol implements metrics.Reporter, without rates.
func (t *traffic) GetBandwidthForProtocol(p protocol.ID) metrics.Stats {
	f := t.of(p)
	return metrics.Stats{TotalIn: f.received.Load(), TotalOut: f.sent.Load()}
}

// GetBandwidthTotals implements metrics.Reporter, without rates.
func (t *traffic) GetBandwidthTotals() (out metrics.Stats) {
	for _, f := range t.list() {
		out.TotalIn += int64(f.Received)
		out.TotalOut += int64(f.Sent)
	}
	return out
}

// GetBandwidthByPeer implements metrics.Reporter; nothing is kept by peer.
func (t *traffic) GetBandwidthByPeer() map[peer.ID]metrics.Stats { return nil }

// GetBandwidthByProtocol implements metrics.Reporter, without rates.
func (t *traffic) GetBandwidthByProtocol() map[protocol.ID]metrics.Stats {
	out := map[protocol.ID]metrics.Stats{}
	for _, f := range t.list() {
		out[protocol.ID(f.Protocol)] = metrics.Stats{TotalIn: int64(f.Received), TotalOut: int64(f.Sent)}
	}
	return out
}

// Reset implements metrics.Reporter.
func (t *traffic) Reset() {
	t.mu.Lock()
	defer t.mu.Unlock()
	clear(t.by)
}

// TrimIdle implements metrics.Reporter: there are few protocols, and all are kept.
func (t *traffic) TrimIdle(time.Time) {}
