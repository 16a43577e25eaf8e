package instance

import (
	"regexp"
	"strconv"
	"time"
)

// traceFormat is the format of a trace: one group problem whose nodes and latencies change from period to period.
const traceFormat = "placement-trace/1"

// maxSteps bounds a trace.
const maxSteps = 10_000

// Trace is a group problem over time.
type Trace struct {
	Name   string
	Steps  int
	Period time.Duration
	// Event is the first period of the event of the trace and the first after it; both 0: it has none.
	Event [2]int

	still  Group // what does not change
	free   [][]float64
	load   [][]float64
	slices [][]float64
	memory [][]float64
	alive  [][]bool
	later  []int32 // latencies between sites from period from on
	from   int     // 0: they do not change
}

// At is the problem in a period, with nothing running yet. What it holds is shared between periods: it is not to be changed.
func (t *Trace) At(step int) *Group {
	g := t.still
	g.Nodes.FreeCPU, g.Nodes.Load5, g.Nodes.LiveSlices, g.Nodes.MemPressure, g.Nodes.Alive = t.free[step], t.load[step], t.slices[step], t.memory[step], t.alive[step]
	if t.from > 0 && step >= t.from {
		g.Latency.Base = t.later
	}
	return &g
}

// ReadTrace reads a trace, .json or .json.gz.
func ReadTrace(path string) (*Trace, error) {
	raw, err := content(path)
	if err != nil {
		return nil, err
	}
	return ParseTrace(path, raw)
}

// laterPrefix begins the name of the field of the latencies that hold from some period on; the period ends it.
const laterPrefix = "base_from_step_"

var laterBase = regexp.MustCompile(`"(` + laterPrefix + `([1-9][0-9]{0,4}))"`)

// ParseTrace reads a trace from memory; path is for messages only.
func ParseTrace(path string, raw []byte) (t *Trace, err error) {
	defer catch(&err)
	s := &scanner{file: path, in: raw}
	want := map[string]bool{
		"format": true, "name": true, "n": true, "regions": true, "steps": true, "period_s": true, "nodes": true, "latency": true, "anchors": true,
		"series": true, "constraints": true, "utility": true, "cost": true, "provenance": false,
	}
	t = &Trace{}
	later := ""
	if m := laterBase.FindSubmatch(raw); m != nil {
		later = string(m[1])
		want[later] = true
		if t.from, err = strconv.Atoi(string(m[2])); err != nil {
			return nil, err
		}
	}
	at := s.fields("the trace", want)
	s.end()
	s.at = at["format"]
	if v := s.text("format"); v != traceFormat {
		s.fail(at["format"], "format %q, want %s", v, traceFormat)
	}
	s.at = at["name"]
	t.Name = s.text("name")
	g := &t.still
	g.Name = t.Name
	s.at = at["n"]
	g.N = s.whole("n", 1, MaxNodes)
	s.at = at["regions"]
	g.Regions = s.whole("regions", 1, 1000)
	s.at = at["steps"]
	t.Steps = s.whole("steps", 1, maxSteps)
	s.at = at["period_s"]
	t.Period = time.Duration(s.whole("period_s", 1, 1<<20)) * time.Second
	s.at = at["nodes"]
	s.stillNodes(g)
	s.at = at["latency"]
	g.Latency = s.latency(g.N)
	if later != "" {
		if t.from >= t.Steps {
			s.fail(at[later], "%s: the trace ends before", later)
		}
		s.at = at[later]
		t.later = s.base(g.Latency.Sites)
	}
	s.at = at["anchors"]
	if g.Anchors = s.list("anchors", g.N); len(g.Anchors) == 0 {
		s.fail(at["anchors"], "anchors: at least one is needed")
	}
	s.groupRules(g, at)
	s.at = at["series"]
	s.series(t)
	if p, ok := at["provenance"]; ok {
		s.at = p
		s.event(t)
	}
	return t, nil
}

func (s *scanner) stillNodes(g *Group) {
	n := &g.Nodes
	s.object("nodes", map[string]bool{"region": true, "cpu_ghz": true, "blacklisted": true, "price": true}, func(name string) {
		switch name {
		case "region":
			n.Region = s.column(name, g.N, 1, g.Regions)
			for i := range n.Region {
				n.Region[i]--
			}
		case "cpu_ghz":
			n.CPUGHz = s.floats(name, g.N)
		case "blacklisted":
			n.Blacklisted = s.flags(name, g.N)
		case "price":
			n.Price = s.floats(name, g.N)
		}
	})
}

func (s *scanner) series(t *Trace) {
	floats := map[string]*[][]float64{"free_cpu": &t.free, "load5": &t.load, "live_slices": &t.slices, "mem_pressure": &t.memory}
	want := required(floats)
	want["alive"] = true
	s.object("series", want, func(name string) {
		at, rows := s.at, 0
		s.array(name, func(int) {
			if rows++; rows > t.Steps {
				s.fail(s.at, "%s: more than %d periods", name, t.Steps)
			}
			if name == "alive" {
				t.alive = append(t.alive, s.flags(name, t.still.N))
				return
			}
			*floats[name] = append(*floats[name], s.floats(name, t.still.N))
		})
		if rows != t.Steps {
			s.fail(at, "%s: %d periods, want %d", name, rows, t.Steps)
		}
	})
}

// event reads when something happens in the trace, where something does.
func (s *scanner) event(t *Trace) {
	at := s.fields("provenance", map[string]bool{
		"seed": false, "cpu_days": false, "rtt_slices": false, "t0": false, "event": false, "event_steps": false, "hit": false,
	})
	e, ok := at["event"]
	steps, told := at["event_steps"]
	if !ok || !told {
		return
	}
	s.at = e
	if s.null() {
		return
	}
	s.at = steps
	v := s.list("event_steps", t.Steps+1)
	if len(v) != 2 || v[0] < 1 || v[0] >= v[1] {
		s.fail(steps, "event_steps: want [first, end] of at most %d periods", t.Steps)
	}
	t.Event = [2]int{int(v[0]), int(v[1])}
}
