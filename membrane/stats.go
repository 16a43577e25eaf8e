package membrane

import (
	"math/bits"
	"sort"
	"sync"
	"sync/atomic"
	"time"
)

// maxMethods bounds how many methods are counted one by one; what comes on top is counted under "other". Callers choose the names, so
// there has to be an end.
const maxMethods = 256

// MethodStats is what passed a gate, for one method since the membrane was made.
type MethodStats struct {
	Method   string
	Calls    uint64 // ended, streams included
	Errors   uint64 // of them with another status than OK
	InFlight int64
	P50, P99 time.Duration // of unary calls, held time and mark wait included; exact to 1/8
}

// Stats is what passed a gate.
type Stats struct {
	Methods  []MethodStats
	Calls    uint64
	Errors   uint64
	InFlight int64 // inside the component or waiting for their mark
	Held     int64 // waiting at the gate
	Waiting  int   // answers that wait for their mark
	Streams  int64 // open ones
	Refused  uint64
	P50, P99 time.Duration
}

type counter struct {
	calls, errors atomic.Uint64
	inflight      atomic.Int64
	latency       histogram
}

type stats struct {
	total   counter
	refused atomic.Uint64

	methods sync.Map // string -> *counter
	n       atomic.Int64
}

func (s *stats) of(method string) *counter {
	if c, ok := s.methods.Load(method); ok {
		return c.(*counter)
	}
	if s.n.Load() >= maxMethods {
		method = "other"
	}
	c, loaded := s.methods.LoadOrStore(method, &counter{})
	if !loaded {
		s.n.Add(1)
	}
	return c.(*counter)
}

func (s *stats) begin(method string) *counter {
	c := s.of(method)
	c.inflight.Add(1)
	s.total.inflight.Add(1)
	return c
}

func (s *stats) end(c *counter, began time.Time, unary, failed bool) {
	for _, x := range []*counter{c, &s.total} {
		x.inflight.Add(-1)
		x.calls.Add(1)
		if failed {
			x.errors.Add(1)
		}
		if unary {
			x.latency.add(time.Since(began))
		}
	}
}

func (s *stats) snapshot() Stats {
	out := Stats{
		Calls: s.total.calls.Load(), Errors: s.total.errors.Load(), InFlight: s.total.inflight.Load(), Refused: s.refused.Load(),
		P50: s.total.latency.quantile(0.5), P99: s.total.latency.quantile(0.99),
	}
	s.methods.Range(func(k, v any) bool {
		c := v.(*counter)
		out.Methods = append(out.Methods, MethodStats{
			Method: k.(string), Calls: c.calls.Load(), Errors: c.errors.Load(), InFlight: c.inflight.Load(),
			P50: c.latency.quantile(0.5), P99: c.latency.quantile(0.99),
		})
		return true
	})
	sort.Slice(out.Methods, func(i, j int) bool { return out.Methods[i].Method < out.Methods[j].Method })
	return out
}

// histogram counts durations in buckets of an eighth of their power of two, from a microsecond to an hour.
type histogram struct {
	buckets [8 * 33]atomic.Uint64
}

func bucketOf(d time.Duration) int {
	us := uint64(max(d/time.Microsecond, 1))
	exp := bits.Len64(us) - 1
	var sub uint64
	if exp >= 3 {
		sub = (us >> (exp - 3)) & 7
	} else {
		sub = (us << (3 - exp)) & 7
	}
	return min(exp*8+int(sub), 8*33-1)
}

// upper is the largest duration of a bucket.
func upper(b int) time.Duration {
	exp, sub := b/8, uint64(b%8)
	return time.Duration((uint64(1)<<exp)*(8+sub+1)/8) * time.Microsecond
}

func (h *histogram) add(d time.Duration) { h.buckets[bucketOf(d)].Add(1) }

func (h *histogram) quantile(q float64) time.Duration {
	var counts [8 * 33]uint64
	var total uint64
	for i := range h.buckets {
		counts[i] = h.buckets[i].Load()
		total += counts[i]
	}
	if total == 0 {
		return 0
	}
	want := uint64(float64(total) * q)
	var seen uint64
	for i, c := range counts {
		if seen += c; seen > want {
			return upper(i)
		}
	}
	return upper(len(counts) - 1)
}
