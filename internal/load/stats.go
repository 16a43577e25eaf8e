package load

import (
	"slices"
	"sync"
	"time"
)

// sample is one call.
type sample struct {
	intended, done int64 // unix ns
	comp, node     uint8 // of names
	write          bool
	outcome        uint8
	attempts       uint16
}

const (
	answered uint8 = iota
	refused
	doubt
)

var outcomeNames = [...]string{answered: Answered, refused: Refused, doubt: Doubt}

// stats keeps every sample. Safe for concurrent use.
type stats struct {
	mu      sync.Mutex // guards the fields below
	samples []sample
	names   []string
	index   map[string]uint8
	open    map[int]call // calls under way, by client
	why     string       // of the last refusal or doubt
}

type call struct {
	intended int64
	comp     string
	write    bool
}

func newStats() *stats {
	return &stats{index: map[string]uint8{}, open: map[int]call{}}
}

func (s *stats) name(n string) uint8 {
	i, ok := s.index[n]
	if !ok {
		i = uint8(len(s.names))
		s.names, s.index[n] = append(s.names, n), i
	}
	return i
}

func (s *stats) begin(client int, c call) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.open[client] = c
}

func (s *stats) end(client int, c call, r result) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, client)
	s.samples = append(s.samples, sample{
		intended: c.intended, done: r.done.UnixNano(), comp: s.name(c.comp), node: s.name(r.node), write: c.write, outcome: r.outcome, attempts: uint16(min(r.attempts, 1<<16-1)),
	})
	if r.outcome != answered {
		s.why = r.why
	}
}

// Window asks about the calls that were to be sent in [From, To), and the answers that came in that time.
type Window struct {
	From, To  time.Time
	Component string // empty: all
	Writes    bool   // only writes
}

// Figures are what a window saw.
type Figures struct {
	Calls    int     `json:"calls"`
	Writes   int     `json:"writes"`
	Answered int     `json:"answered"`
	Failed   int     `json:"failed"`    // no answer before the deadline
	Refused  int     `json:"refused"`   // the component said no
	Retried  int     `json:"retried"`   // needed more than one attempt
	UnderWay int     `json:"under_way"` // no answer yet, deadline not over
	Rate     float64 `json:"rate"`      // answers per second
	P50      float64 `json:"p50_ms"`
	P99      float64 `json:"p99_ms"`
	Max      float64 `json:"max_ms"`
	// Gap is the longest time in the window without an answer, and GapFrom when it began.
	Gap     time.Duration  `json:"gap"`
	GapFrom time.Time      `json:"gap_from"`
	Nodes   map[string]int `json:"nodes"` // answers by node, of those that name it
	Why     string         `json:"why"`   // of the last call that was refused or not answered, ever
}

func (s *stats) figures(w Window) Figures {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := Figures{Nodes: map[string]int{}, Why: s.why}
	from, to := w.From.UnixNano(), w.To.UnixNano()
	var latencies, answers []int64
	for i := range s.samples {
		x := &s.samples[i]
		if w.Component != "" && s.names[x.comp] != w.Component || w.Writes && !x.write {
			continue
		}
		if x.outcome == answered && x.done >= from && x.done < to {
			answers = append(answers, x.done)
			if n := s.names[x.node]; n != "" {
				f.Nodes[n]++
			}
		}
		if x.intended < from || x.intended >= to {
			continue
		}
		f.add(x)
		if x.outcome == answered {
			latencies = append(latencies, x.done-x.intended)
		}
	}
	for _, c := range s.open {
		if (w.Component == "" || c.comp == w.Component) && (c.write || !w.Writes) && c.intended >= from && c.intended < to {
			f.Calls++
			f.UnderWay++
		}
	}
	f.latency(latencies)
	f.gap(answers, from, to)
	return f
}

func (f *Figures) add(x *sample) {
	f.Calls++
	if x.write {
		f.Writes++
	}
	if x.attempts > 1 {
		f.Retried++
	}
	switch x.outcome {
	case answered:
		f.Answered++
	case refused:
		f.Refused++
	case doubt:
		f.Failed++
	}
}

func (f *Figures) latency(ns []int64) {
	if len(ns) == 0 {
		return
	}
	slices.Sort(ns)
	at := func(q float64) float64 { return float64(ns[int(q*float64(len(ns)-1))]) / 1e6 }
	f.P50, f.P99, f.Max = at(0.5), at(0.99), at(1)
}

func (f *Figures) gap(answers []int64, from, to int64) {
	slices.Sort(answers)
	f.Rate = float64(len(answers)) / (float64(to-from) / 1e9)
	last := from
	for _, t := range append(answers, to) {
		if d := time.Duration(t - last); d > f.Gap {
			f.Gap, f.GapFrom = d, time.Unix(0, last)
		}
		last = t
	}
}

// FirstQuery asks for the first answer after a time.
type FirstQuery struct {
	After     time.Time
	Component string
	Node      string // by this node; empty: by any that is named and is not NotNode
	NotNode   string
	Writes    bool
}

// First is that answer.
type First struct {
	Found bool      `json:"found"`
	Time  time.Time `json:"time"`
	Node  string    `json:"node"`
}

func (s *stats) first(q FirstQuery) First {
	s.mu.Lock()
	defer s.mu.Unlock()
	after, best := q.After.UnixNano(), int64(0)
	out := First{}
	for i := range s.samples {
		x := &s.samples[i]
		node := s.names[x.node]
		if x.outcome != answered || x.done <= after || q.Writes && !x.write || q.Component != "" && s.names[x.comp] != q.Component ||
			q.Node != "" && node != q.Node || q.Node == "" && (node == "" || node == q.NotNode) {
			continue
		}
		if !out.Found || x.done < best {
			best, out = x.done, First{Found: true, Time: time.Unix(0, x.done), Node: node}
		}
	}
	return out
}

// idle says whether no call is under way.
func (s *stats) idle() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.open) == 0
}
