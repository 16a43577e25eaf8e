package instance

import (
	"fmt"
	"math/big"
	"strconv"
)

// None is the latency where there is no direct link. Sums of a few of them do not overflow an int32, and none is below None.
const None = int32(1) << 28

// maxLatency is the longest latency of a link, so that any path is shorter than None.
const maxLatency = 1 << 22

// Latency between nodes: that between their sites and what each node's access adds, in units of Unit ms.
type Latency struct {
	Unit   float64
	Sites  int
	Base   []int32 // Sites × Sites, None: no link
	Site   []int32 // by node
	Access []int32 // by node
}

// Between is the direct latency between nodes i and j, at least None where there is no link.
func (l *Latency) Between(i, j int) int32 {
	if i == j {
		return 0
	}
	return l.Base[int(l.Site[i])*l.Sites+int(l.Site[j])] + l.Access[i] + l.Access[j]
}

// Ms converts units to milliseconds.
func (l *Latency) Ms(v int32) float64 { return float64(v) * l.Unit }

// Limits remembers what Below said: it computes with decimals, and the same few limits come again and again.
type Limits struct {
	l    *Latency
	seen map[limit]int32
}

type limit struct {
	ms     float64
	strict bool
}

// Limits of these latencies.
func (l *Latency) Limits() Limits { return Limits{l, map[limit]int32{}} }

// Below is Latency.Below.
func (m Limits) Below(ms float64, strict bool) int32 {
	k := limit{ms, strict}
	v, ok := m.seen[k]
	if !ok {
		v = m.l.Below(ms, strict)
		m.seen[k] = v
	}
	return v
}

// Below is the largest number of units that is shorter than ms: strictly, or at most as long. Exact, as decimals are read.
func (l *Latency) Below(ms float64, strict bool) int32 {
	q := new(big.Rat).Quo(decimal(ms), decimal(l.Unit))
	v := new(big.Int).Quo(q.Num(), q.Denom())
	if strict && q.IsInt() {
		v.Sub(v, big.NewInt(1))
	}
	if !v.IsInt64() || v.Int64() >= int64(None) {
		return None - 1
	}
	return int32(v.Int64())
}

// decimal is the shortest decimal that reads as v: what was written, for at most 15 digits.
func decimal(v float64) *big.Rat {
	r, ok := new(big.Rat).SetString(strconv.FormatFloat(v, 'g', -1, 64))
	if !ok {
		panic(fmt.Sprintf("%g is not finite", v))
	}
	return r
}

func (s *scanner) latency(n int) Latency {
	var l Latency
	at := s.fields("latency", map[string]bool{"unit_ms": true, "sites": true, "base": true, "site": true, "access": true})
	end := s.at
	s.at = at["unit_ms"]
	if l.Unit = s.number("unit_ms", 0); l.Unit <= 0 {
		s.fail(at["unit_ms"], "unit_ms must be above 0")
	}
	s.at = at["sites"]
	l.Sites = s.whole("sites", 1, MaxNodes)
	s.at = at["base"]
	l.Base = s.base(l.Sites)
	s.at = at["site"]
	l.Site = s.column("site", n, 0, l.Sites-1)
	s.at = at["access"]
	l.Access = s.column("access", n, 0, maxLatency)
	s.at = end
	return l
}

// base reads the upper triangle and fills both.
func (s *scanner) base(sites int) []int32 {
	at := s.at
	if int64(sites)*int64(sites) > int64(len(s.in)) { // half of the entries take two bytes each, at least
		s.fail(at, "base: the file is too short for %d sites", sites)
	}
	out := make([]int32, sites*sites)
	rows := 0
	s.array("base", func(a int) {
		if a >= sites-1 {
			s.fail(s.at, "base: more than %d rows", sites-1)
		}
		rows++
		b := a + 1
		s.array("base", func(int) {
			if b >= sites {
				s.fail(s.at, "base: row %d has more than %d entries", a, sites-1-a)
			}
			v := int32(s.whole("base", -1, maxLatency))
			if v < 0 {
				v = None
			}
			out[a*sites+b], out[b*sites+a] = v, v
			b++
		})
		if b != sites {
			s.fail(s.at, "base: row %d has %d entries, want %d", a, b-a-1, sites-1-a)
		}
	})
	if rows != sites-1 {
		s.fail(at, "base: %d rows, want %d", rows, sites-1)
	}
	return out
}

// column reads n whole numbers.
func (s *scanner) column(what string, n, least, most int) []int32 {
	at := s.at
	out := make([]int32, 0, n)
	s.array(what, func(int) { out = append(out, int32(s.whole(what, least, most))) })
	if len(out) != n {
		s.fail(at, "%s: %d entries, want %d", what, len(out), n)
	}
	return out
}

// floats reads n numbers that are not negative.
func (s *scanner) floats(what string, n int) []float64 {
	at := s.at
	out := make([]float64, 0, n)
	s.array(what, func(int) { out = append(out, s.number(what, 0)) })
	if len(out) != n {
		s.fail(at, "%s: %d entries, want %d", what, len(out), n)
	}
	return out
}

func (s *scanner) flags(what string, n int) []bool {
	out := make([]bool, n)
	for i, v := range s.column(what, n, 0, 1) {
		out[i] = v == 1
	}
	return out
}
