package bench

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// Config of a benchmark.
type Config struct {
	Binary   string        // coppice; its components lie beside it
	Runs     int           // samples of each figure
	Nodes    int           // of scale; 0: as many as it takes by itself
	Profile  string        // of traffic and scale; "": both, and lan
	Size     int64         // of the state, in bytes: of failover, checkpoint and move; 0: what each takes by itself
	Standby  string        // of failover: cold, warm or hot; "": cold
	Span     time.Duration // of one sample of durable; 0: what it takes by itself
	Progress io.Writer
}

// Result is one figure. Baseline and Ratio are nil where there is nothing to compare with; Against says with what.
type Result struct {
	Name     string   `json:"name"`
	Unit     string   `json:"unit"`
	Median   float64  `json:"median"`
	P99      float64  `json:"p99"`
	Min      float64  `json:"min"`
	Max      float64  `json:"max"`
	Baseline *float64 `json:"baseline"`
	Ratio    *float64 `json:"ratio"`
	Against  string   `json:"against,omitempty"`
}

// Report is what a benchmark found.
type Report struct {
	Bench   string   `json:"bench"`
	Machine string   `json:"machine"`
	Runs    int      `json:"runs"`
	Results []Result `json:"results"`
}

// benchmarks by name, with what each measures.
var benchmarks = map[string]struct {
	about string
	run   func(ctx context.Context, cfg Config) ([]Result, error)
}{
	"checkpoint": {"a checkpoint of 64 MiB (--size) to 3 other nodes, beside a copy by TLS; 1 % changed: bytes sent; the nodes' memory", checkpoint},
	"durable":    {"each-call: 1 and 64 callers write 256 bytes, beside an etcd put with 3 members", durable},
	"failover":   {"kill -9 of a node, or of a component, until its component with 1 MiB of state (--size) answers again", failover},
	"move":       {"a move of 64 MiB (--size) between nodes under 2,000 calls/s: pause, failed and lost calls", move},
	"ownership":  {"the arbiter: its leader killed until the next commit, a node killed or cut off until the others call it dead, 10,000 claims", ownership},
	"scale":      {"the protocol core of 250 nodes (--nodes) in memory and in virtual time: they join, idle, lose a quarter at once, and settle", scale},
	"swap":       {"hot swap of a component with 1 MiB of state under 2,000 calls/s: pause, failed and lost calls", swap},
	"node":       {"a node: start until ready, memory, CPU and traffic while idle", node},
	"traffic":    {"what nodes and their leader send while nothing happens, by cause: 25 processes, in profiles lan and wan (--profile)", traffic},
	"call":       {"an HTTP call through the gateway and the gate, beside the same call straight to the component's socket", call},
}

// Names lists the benchmarks.
func Names() []string { return slices.Sorted(maps.Keys(benchmarks)) }

// About says what a benchmark measures.
func About(name string) string { return benchmarks[name].about }

// Run runs one benchmark. A *Report with an error holds what was measured before it failed.
func Run(ctx context.Context, name string, cfg Config) (*Report, error) {
	b, ok := benchmarks[name]
	if !ok {
		return nil, fmt.Errorf("there is no benchmark %q, there are %s", name, strings.Join(Names(), ", "))
	}
	if cfg.Runs < 1 {
		return nil, errors.New("at least one run is needed")
	}
	rep := &Report{Bench: name, Machine: machine(), Runs: cfg.Runs}
	var err error
	rep.Results, err = b.run(ctx, cfg)
	return rep, err
}

func (c Config) say(format string, args ...any) {
	if c.Progress != nil {
		fmt.Fprintf(c.Progress, format+"\n", args...)
	}
}

func (c Config) size(usual int64) int64 { return cmp.Or(c.Size, usual) }

func (c Config) file(name string) string { return filepath.Join(filepath.Dir(c.Binary), name) }

// summary makes a figure of samples.
func summary(name, unit string, samples []float64) Result {
	r := Result{Name: name, Unit: unit}
	if len(samples) == 0 {
		return r
	}
	s := slices.Sorted(slices.Values(samples))
	at := func(q float64) float64 { return round(s[int(math.Ceil(q*float64(len(s))))-1]) }
	r.Min, r.Max, r.P99 = round(s[0]), round(s[len(s)-1]), at(0.99)
	r.Median = round((s[(len(s)-1)/2] + s[len(s)/2]) / 2)
	return r
}

// against sets a figure beside a baseline.
func (r Result) against(what string, samples []float64) Result {
	base := summary("", "", samples).Median
	if base <= 0 {
		return r
	}
	ratio := round(r.Median / base)
	r.Baseline, r.Ratio, r.Against = &base, &ratio, what
	return r
}

// round keeps three digits after the point.
func round(x float64) float64 { return math.Round(x*1000) / 1000 }

// machine describes where the figures come from.
func machine() string {
	model, load := "unknown CPU", "?"
	if raw, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		for line := range strings.Lines(string(raw)) {
			if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == "model name" {
				model = strings.TrimSpace(v)
				break
			}
		}
	}
	if raw, err := os.ReadFile("/proc/loadavg"); err == nil {
		load, _, _ = strings.Cut(string(raw), " ")
	}
	return fmt.Sprintf("%d × %s, %s/%s, load %s at the start", runtime.NumCPU(), model, runtime.GOOS, runtime.GOARCH, load)
}
