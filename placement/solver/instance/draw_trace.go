package instance

import (
	"math/rand/v2"
	"slices"
	"strconv"
	"time"
)

// TraceSpec says what trace to draw.
type TraceSpec struct {
	Name  string
	N     int
	Steps int
	Seed  uint64
	// Event: for the second quarter of the trace most nodes of the largest region, and half of the others, lose most of their free clock.
	Event bool
}

// NewTrace draws a trace: nodes whose load wanders about a mean of their own, with noise, some of which come and go; halfway latencies change.
func NewTrace(spec TraceSpec) *Trace {
	g := NewGroup(GroupSpec{Name: spec.Name, N: spec.N, Seed: spec.Seed})
	other := NewGroup(GroupSpec{N: spec.N, Seed: spec.Seed + 1})
	r := rand.New(rand.NewPCG(spec.Seed, 0x7ace))
	t := &Trace{Name: spec.Name, Steps: spec.Steps, Period: 5 * time.Minute, still: *g, later: slices.Clone(g.Latency.Base), from: spec.Steps / 2}
	for i, v := range other.Latency.Base { // a tenth of the links is another's, both ways alike
		a, b := min(i/g.Latency.Sites, i%g.Latency.Sites), max(i/g.Latency.Sites, i%g.Latency.Sites)
		if (a*31+b)%10 == 0 {
			t.later[i] = v
		}
	}
	hit := make([]bool, spec.N)
	if spec.Event {
		t.Event = [2]int{max(spec.Steps/4, 1), max(spec.Steps/2, 2)}
		for i := range hit {
			hit[i] = r.IntN(10) < 5 || g.Nodes.Region[i] == 1 && r.IntN(10) < 9
		}
	}
	walk := make([]float64, spec.N)
	down := make([]int, spec.N) // periods that a node is still away
	for step := range spec.Steps {
		free, load, busy, memory, alive := make([]float64, spec.N), make([]float64, spec.N), make([]float64, spec.N), make([]float64, spec.N), make([]bool, spec.N)
		for i := range spec.N {
			walk[i] += 6*r.NormFloat64() - 0.15*walk[i]
			lost := walk[i] + 4*r.NormFloat64()
			if hit[i] && step >= t.Event[0] && step < t.Event[1] {
				lost += 60
			}
			free[i] = round(min(max(g.Nodes.FreeCPU[i]-lost, 0), 100))
			load[i] = round(max(g.Nodes.Load5[i]+lost/15, 0))
			busy[i] = max(g.Nodes.LiveSlices[i]+float64(r.IntN(3)-1), 0)
			memory[i] = round(min(max(g.Nodes.MemPressure[i]+4*r.NormFloat64(), 0), 100))
			if down[i] > 0 {
				down[i]--
			} else if r.IntN(400) == 0 {
				down[i] = 1 + r.IntN(12)
			}
			alive[i] = g.Nodes.Alive[i] && down[i] == 0
		}
		t.free, t.load, t.slices, t.memory, t.alive = append(t.free, free), append(t.load, load), append(t.slices, busy), append(t.memory, memory), append(t.alive, alive)
	}
	return t
}

// Write writes the trace, packed where path ends with .gz.
func (t *Trace) Write(path string) error {
	g := &t.still
	doc := g.document()
	delete(doc, "current")
	nodes := g.Nodes.columns(false)
	for _, name := range []string{"alive", "load5", "live_slices", "free_cpu", "mem_pressure"} {
		delete(nodes, name)
	}
	alive := [][]int{}
	for _, row := range t.alive {
		alive = append(alive, bit(row))
	}
	doc["format"], doc["nodes"], doc["steps"], doc["period_s"] = traceFormat, nodes, t.Steps, int(t.Period/time.Second)
	doc["series"] = map[string]any{"free_cpu": t.free, "load5": t.load, "live_slices": t.slices, "mem_pressure": t.memory, "alive": alive}
	if t.from > 0 {
		l := g.Latency
		l.Base = t.later
		doc[laterPrefix+strconv.Itoa(t.from)] = l.document()["base"]
	}
	if t.Event[1] > 0 {
		doc["provenance"] = map[string]any{"event": "drawn", "event_steps": t.Event}
	}
	return writeJSON(path, doc)
}
