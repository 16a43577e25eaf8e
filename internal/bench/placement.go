package bench

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/coppice-project/coppice/placement/solver/assign"
	"github.com/coppice-project/coppice/placement/solver/group"
	"github.com/coppice-project/coppice/placement/solver/instance"
	"github.com/coppice-project/coppice/placement/solver/replay"
)

// PlacementConfig says what Placement solves.
type PlacementConfig struct {
	Instances string        // folder of instances, .json and .json.gz
	Solutions string        // folder to write solutions to; empty: none are written
	Generate  bool          // draw instances of our own, into Instances where that is given
	Seed      uint64        // of the generator and of the solvers
	Deadline  time.Duration // of each instance
	// CPUTime measures with the CPU time of this process instead of the clock: what a busy machine takes away does not count.
	CPUTime  bool
	Progress func(PlacementRow) // called after each instance

	// Traces are files of a group problem over time: policies of redeployment are compared on them, each from as many starts, and no instances are solved. With
	// Generate they are drawn and written there first.
	Traces []string
	Starts int
	Played func(replay.Row) // called after each policy on each trace
}

// PlacementRow is what came of one instance. Times are in seconds, memory in MiB.
type PlacementRow struct {
	Instance string   `json:"instance"`
	Nodes    int      `json:"nodes"`
	Replicas int      `json:"replicas,omitempty"`
	Feasible bool     `json:"feasible"`
	Value    *float64 `json:"value"`
	Bound    *float64 `json:"bound"`
	Gap      *float64 `json:"gap"` // of the bound above the value, as a share of the value
	Proven   bool     `json:"proven"`
	First    float64  `json:"first_s"`
	Best     float64  `json:"best_s"`
	Time     float64  `json:"time_s"`
	CPU      float64  `json:"cpu_s"`
	Memory   float64  `json:"memory_mib"` // the most that the whole process had while solving, the instance included
	Steps    int      `json:"steps"`
	// Resolve is how long a solve took after the fullest node died, and Moved what it moved besides what was there.
	Resolve *float64 `json:"resolve_s,omitempty"`
	Moved   *int     `json:"moved,omitempty"`
}

// PlacementReport is what Placement found.
type PlacementReport struct {
	Bench    string         `json:"bench"`
	Machine  string         `json:"machine"`
	Deadline float64        `json:"deadline_s"`
	CPUTime  bool           `json:"cpu_time"`
	Rows     []PlacementRow `json:"rows,omitempty"`
	Replays  []replay.Row   `json:"replays,omitempty"`
}

// Placement solves instances one after the other, or plays traces.
func Placement(ctx context.Context, cfg PlacementConfig) (*PlacementReport, error) {
	if len(cfg.Traces) > 0 {
		return playTraces(ctx, cfg)
	}
	files, err := placementFiles(cfg)
	if err != nil {
		return nil, err
	}
	rep := &PlacementReport{Bench: "placement", Machine: machine(), Deadline: cfg.Deadline.Seconds(), CPUTime: cfg.CPUTime}
	for _, load := range files {
		if ctx.Err() != nil {
			return rep, context.Cause(ctx)
		}
		f, err := load()
		if err != nil {
			return rep, err
		}
		row, err := solveOne(ctx, cfg, f)
		if err != nil {
			return rep, err
		}
		rep.Rows = append(rep.Rows, row)
		if cfg.Progress != nil {
			cfg.Progress(row)
		}
	}
	return rep, nil
}

// playTraces compares policies on traces. The group that Rhizoma's own start-up ends with is where all of them begin.
func playTraces(ctx context.Context, cfg PlacementConfig) (*PlacementReport, error) {
	rep := &PlacementReport{Bench: "placement", Machine: machine(), Deadline: cfg.Deadline.Seconds()}
	for i, path := range cfg.Traces {
		if cfg.Generate { // 200 nodes over 8 hours; every second one with an event
			t := instance.NewTrace(instance.TraceSpec{Name: fmt.Sprintf("drawn_%02d", i), N: 200, Steps: 96, Seed: cfg.Seed + uint64(i), Event: i%2 == 1})
			if err := t.Write(path); err != nil {
				return rep, err
			}
		}
		t, err := instance.ReadTrace(path)
		if err != nil {
			return rep, err
		}
		var starts [][]int
		for i := range cfg.Starts {
			start := replay.Bootstrap(ctx, t, cfg.Seed+uint64(i))
			if len(start) == 0 {
				return rep, fmt.Errorf("%s: no node is eligible in its first period", path)
			}
			starts = append(starts, start)
		}
		for _, p := range replay.Policies(cfg.Deadline) {
			var rows []replay.Row
			for i, start := range starts {
				row, err := replay.Play(ctx, t, p.New(cfg.Seed+uint64(i)), start)
				if err != nil {
					return rep, err
				}
				rows = append(rows, row)
			}
			row := replay.Mean(rows)
			row.Policy = p.Name
			rep.Replays = append(rep.Replays, row)
			if cfg.Played != nil {
				cfg.Played(row)
			}
		}
	}
	return rep, nil
}

// placementFiles lists what to solve, read or drawn when it is its turn.
func placementFiles(cfg PlacementConfig) ([]func() (*instance.File, error), error) {
	var out []func() (*instance.File, error)
	if cfg.Generate {
		for _, make := range generated(cfg.Seed) {
			out = append(out, func() (*instance.File, error) {
				f, err := make()
				if err == nil && cfg.Instances != "" {
					err = f.Write(filepath.Join(cfg.Instances, f.Name()+".json.gz"))
				}
				return f, err
			})
		}
		return out, nil
	}
	entries, err := os.ReadDir(cfg.Instances)
	if err != nil {
		return nil, fmt.Errorf("read the instances: %w", err)
	}
	for _, e := range entries {
		if n := e.Name(); strings.HasSuffix(n, ".json") || strings.HasSuffix(n, ".json.gz") {
			out = append(out, func() (*instance.File, error) { return instance.Read(filepath.Join(cfg.Instances, n)) })
		}
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("%s holds no .json and no .json.gz", cfg.Instances)
	}
	return out, nil
}

// generated is the set of instances that --generate draws: the sizes and kinds of the study of placement.
func generated(seed uint64) []func() (*instance.File, error) {
	var out []func() (*instance.File, error)
	for i, g := range []instance.GroupSpec{
		{N: 20, Least: 3, Most: 5, Current: true},
		{N: 60, Current: true},
		{N: 100, Anchors: 12, Current: true},
		{N: 200, Diameter: 320, Current: true},
		{N: 490, Current: true, Missing: 0.05},
		{N: 600},
		{N: 600, Anchors: 16, Current: true},
		{N: 2000, Current: true},
		{N: 5000, Current: true},
	} {
		g.Name, g.Seed = fmt.Sprintf("group_%02d_n%d", i, g.N), seed+uint64(i)
		out = append(out, func() (*instance.File, error) { return &instance.File{Group: instance.NewGroup(g)}, nil })
	}
	for i, a := range []instance.AssignmentSpec{
		{N: 8, Components: 2, Replicas: 2},
		{N: 20, Components: 4, Replicas: 4},
		{N: 40, Components: 6, Replicas: 6},
		{N: 60, Components: 8, Replicas: 6},
		{N: 200, Components: 10, Replicas: 10},
		{N: 600, Components: 20, Replicas: 12},
		{N: 5000, Components: 30, Replicas: 14},
		{N: 5000, Components: 2000, Replicas: 3, Plain: true},
	} {
		a.Name, a.Seed = fmt.Sprintf("assignment_%02d_n%d_c%d", i, a.N, a.Components), seed+100+uint64(i)
		out = append(out, func() (*instance.File, error) {
			v, err := instance.NewAssignment(a)
			return &instance.File{Assignment: v}, err
		})
	}
	return out
}

// stopwatch measures by the clock or by CPU time.
type stopwatch struct {
	begun time.Time
	cpu   time.Duration
	byCPU bool
}

func newStopwatch(byCPU bool) stopwatch { return stopwatch{time.Now(), cpuTime(), byCPU} }

func (s stopwatch) elapsed() time.Duration {
	if s.byCPU {
		return cpuTime() - s.cpu
	}
	return time.Since(s.begun)
}

// cpuTime is what this process has taken.
func cpuTime() time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		panic("getrusage: " + err.Error()) // it takes no argument that can be wrong
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// resetPeak makes the kernel forget the most memory that this process ever had.
func resetPeak() error {
	if err := os.WriteFile("/proc/self/clear_refs", []byte("5"), 0); err != nil {
		return fmt.Errorf("measure memory: %w", err)
	}
	return nil
}

// peakMemory is the most memory that this process had since, in MiB.
func peakMemory() (float64, error) {
	raw, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return 0, fmt.Errorf("measure memory: %w", err)
	}
	for line := range strings.Lines(string(raw)) {
		if v, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			var kib float64
			if _, err := fmt.Sscanf(v, "%f kB", &kib); err == nil {
				return math.Round(kib/102.4) / 10, nil
			}
		}
	}
	return 0, errors.New("measure memory: the kernel does not say")
}

// watched is a context that ends when a stopwatch says so.
type watched struct {
	context.Context //nolint:containedctx // it is one
	watch           stopwatch
	deadline        time.Duration
}

func (w watched) Err() error {
	if w.watch.elapsed() >= w.deadline {
		return context.DeadlineExceeded
	}
	return w.Context.Err()
}

func solveOne(ctx context.Context, cfg PlacementConfig, f *instance.File) (PlacementRow, error) {
	debug.FreeOSMemory() // garbage of the last instance is not this one's
	if err := resetPeak(); err != nil {
		return PlacementRow{}, err
	}
	cpu, watch, wall := cpuTime(), newStopwatch(cfg.CPUTime), time.Now()
	row := PlacementRow{Instance: f.Name()}
	var value, bound float64
	var wrong []string
	var save func(path string) error
	death := func() {}
	if g := f.Group; g != nil {
		res := group.Solve(watched{ctx, watch, cfg.Deadline}, g, group.Options{Seed: cfg.Seed, Clock: watch.elapsed})
		row.Nodes, row.Feasible, row.Proven, row.Steps, row.First, row.Best = g.N, res.Feasible, res.Proven, res.Steps, res.First.Seconds(), res.Best.Seconds()
		value, bound = res.Objective, res.Bound
		if res.Feasible {
			_, wrong = g.Judge(res.Nodes)
		}
		save = func(path string) error { return instance.WriteGroup(path, g.Name, res.Nodes, res.Objective) }
	} else {
		a := f.Assignment
		res := assign.Solve(ctx, a, assign.Options{Seed: cfg.Seed, Deadline: cfg.Deadline, Clock: watch.elapsed})
		row.Nodes, row.Replicas, row.Feasible, row.Proven, row.Steps, row.First, row.Best = a.N, a.Replicas(), res.Feasible, res.Proven, res.Steps, res.First.Seconds(), res.Best.Seconds()
		value, bound = res.Objective, res.Bound
		if res.Feasible {
			_, wrong = a.Judge(res.Placement)
		}
		save = func(path string) error {
			return instance.WriteAssignment(path, a.Name, res.Placement, res.Objective)
		}
		death = func() { afterDeath(ctx, cfg, a, res.Placement, &row) }
	}
	row.Time, row.CPU = time.Since(wall).Seconds(), (cpuTime() - cpu).Seconds()
	peak, err := peakMemory()
	if err != nil {
		return row, err
	}
	row.Memory = peak
	if len(wrong) > 0 {
		return row, fmt.Errorf("%s: the solution violates %s", f.Name(), strings.Join(wrong, ", "))
	}
	death()
	if row.Feasible {
		gap := (bound - value) / math.Abs(value)
		row.Value, row.Bound, row.Gap = &value, &bound, &gap
		if cfg.Solutions != "" {
			return row, save(filepath.Join(cfg.Solutions, f.Name()+".sol.json"))
		}
	}
	return row, nil
}

// afterDeath measures how long it takes to place what ran on the fullest node again when it dies.
func afterDeath(ctx context.Context, cfg PlacementConfig, a *instance.Assignment, placement [][]int32, row *PlacementRow) {
	if !row.Feasible {
		return
	}
	load := map[int32]int{}
	fullest := placement[0][0]
	for _, nodes := range placement {
		for _, i := range nodes {
			if load[i]++; load[i] > load[fullest] || load[i] == load[fullest] && i < fullest {
				fullest = i
			}
		}
	}
	dead := *a
	dead.Nodes.Alive = slices.Clone(a.Nodes.Alive)
	dead.Nodes.Alive[fullest] = false
	dead.Current = placement
	watch := newStopwatch(cfg.CPUTime)
	res := assign.Solve(ctx, &dead, assign.Options{Seed: cfg.Seed, Repair: true})
	took := watch.elapsed().Seconds()
	if !res.Feasible { // what is pinned to the dead node cannot go elsewhere
		return
	}
	moved := -load[fullest]
	for c, nodes := range res.Placement {
		left := map[int32]int{}
		for _, i := range placement[c] {
			left[i]++
		}
		for _, i := range nodes {
			if left[i]--; left[i] < 0 {
				moved++
			}
		}
	}
	row.Resolve, row.Moved = &took, &moved
}

// errNoInstances is what the command says when it was not told what to solve.
var errNoInstances = errors.New("no instances and no traces: name them, or let instances be drawn")

// Check tells what is wrong with the configuration.
func (cfg PlacementConfig) Check() error {
	switch {
	case len(cfg.Traces) > 0 && (cfg.Instances != "" || cfg.Solutions != "" || cfg.CPUTime):
		return errors.New("traces are played, not solved: they go with a seed, starts, a deadline and --generate only")
	case len(cfg.Traces) > 0 && (cfg.Starts < 1 || cfg.Starts > 100):
		return fmt.Errorf("%d starts: want 1 to 100", cfg.Starts)
	case len(cfg.Traces) == 0 && cfg.Instances == "" && !cfg.Generate:
		return errNoInstances
	case cfg.Deadline <= 0 || cfg.Deadline > time.Hour:
		return fmt.Errorf("a deadline of %v: want more than 0 and at most an hour", cfg.Deadline)
	}
	return nil
}
