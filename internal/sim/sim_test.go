package sim

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// kinds are all there are.
var kinds = []kind{registersKind, pagesKind, wholeKind, leasesKind, alwaysKind, darkKind, nodeKind}

func kindOf(name string) (kind, bool) {
	for _, k := range kinds {
		if k.name == name {
			return k, true
		}
	}
	return kind{}, false
}

// parseID reads "registers/17"; a bare number is of the first kind.
func parseID(id string) (kind, uint64, error) {
	name, number, found := strings.Cut(strings.TrimSpace(id), "/")
	if !found {
		name, number = kinds[0].name, name
	}
	k, known := kindOf(name)
	seed, err := strconv.ParseUint(number, 10, 64)
	if err != nil || !known {
		return kind{}, 0, fmt.Errorf("%q is no schedule; one is written kind/number, and the kinds are %v", id, kindNames())
	}
	return k, seed, nil
}

func kindNames() []string {
	var out []string
	for _, k := range kinds {
		out = append(out, k.name)
	}
	return out
}

// runAll plays schedules of a kind, from first on, on all processors, until there were enough, one fails, or the time is over.
func runAll(t *testing.T, k kind, first uint64, n int, until time.Time) counts {
	t.Helper()
	// A schedule keeps many small databases and their caches; collecting them less often is a quarter of the time.
	defer debug.SetGCPercent(debug.SetGCPercent(300))
	var next atomic.Uint64
	var mu sync.Mutex
	var sum counts
	next.Store(first)
	begun := time.Now()
	t.Run(k.name, func(t *testing.T) {
		for worker := range runtime.GOMAXPROCS(0) {
			t.Run(fmt.Sprint("worker", worker), func(t *testing.T) {
				t.Parallel()
				for !t.Failed() && (until.IsZero() || time.Now().Before(until)) {
					seed := next.Add(1) - 1
					if seed >= first+uint64(n) {
						return
					}
					s := play(t, k, seed)
					mu.Lock()
					sum.add(s.count)
					mu.Unlock()
					if s.failed() {
						t.Error(s.report())
						next.Store(first + uint64(n))
					}
				}
			})
		}
	})
	took := time.Since(begun)
	t.Logf("%s: %s; %.1f schedules/s", k.name, sum, float64(sum.Schedules)/took.Seconds())
	return sum
}

func number(t *testing.T, name string, def int) int {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return def
	}
	n, err := strconv.Atoi(s)
	if err != nil || n < 0 {
		t.Fatalf("%s is %q; a number of schedules is wanted", name, s)
	}
	return n
}

// TestSim runs many schedules of each kind. COPPICE_SIM_FIRST moves the seeds, COPPICE_SIM_SCHEDULES their number, COPPICE_SIM_KIND chooses.
func TestSim(t *testing.T) {
	if testing.Short() {
		t.Skip("it takes minutes")
	}
	if os.Getenv("COPPICE_LONG") != "" {
		t.Skip("TestLongSim plays more")
	}
	total := number(t, "COPPICE_SIM_SCHEDULES", defaultSchedules)
	for _, k := range kinds {
		if only := os.Getenv("COPPICE_SIM_KIND"); only != "" && only != k.name {
			continue
		}
		runAll(t, k, uint64(number(t, "COPPICE_SIM_FIRST", 1)), max(1, total*shares[k.name]/1000), time.Time{})
	}
}

// shares of the kinds, of a thousand schedules.
var shares = map[string]int{"registers": 610, "pages": 200, "whole": 100, "leases": 50, "always": 20, "dark": 5, "node": 15}

// TestReplay plays one schedule, named by COPPICE_SIM_SEED ("registers/17"), and prints all its events. COPPICE_SIM_TIMES plays it more than
// once: what a seed leaves open is the order of goroutines.
func TestReplay(t *testing.T) {
	id := os.Getenv("COPPICE_SIM_SEED")
	if id == "" {
		t.Skip("COPPICE_SIM_SEED names no schedule to replay")
	}
	k, seed, err := parseID(id)
	if err != nil {
		t.Fatal(err)
	}
	for range max(1, number(t, "COPPICE_SIM_TIMES", 1)) {
		s := play(t, k, seed)
		t.Logf("%s: %s\n%s", s.id(), s.count, strings.Join(s.log, "\n"))
		if s.failed() {
			t.Fatal(s.report())
		}
	}
}

// TestCorpus plays every schedule that ever failed.
func TestCorpus(t *testing.T) {
	raw, err := os.ReadFile("testdata/corpus")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		id, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		if id == "" || id == "#" {
			continue
		}
		k, seed, err := parseID(id)
		if err != nil {
			t.Fatal(err)
		}
		if s := play(t, k, seed); s.failed() {
			t.Error(s.report())
		}
	}
}

const (
	longSchedules = 50_000
	longFirst     = 1_000_000 // where the long run's seeds begin, apart from those of every day
)

// TestLongSim plays 50,000 schedules, or COPPICE_SIM_SCHEDULES, or as many as COPPICE_SIM_DURATION allows ("2h"). COPPICE_SIM_FIRST moves the
// seeds, so that no two nights see the same.
func TestLongSim(t *testing.T) {
	if os.Getenv("COPPICE_LONG") == "" {
		t.Skip("COPPICE_LONG=1 runs it")
	}
	total := number(t, "COPPICE_SIM_SCHEDULES", longSchedules)
	first := uint64(number(t, "COPPICE_SIM_FIRST", longFirst))
	var each time.Duration
	if s := os.Getenv("COPPICE_SIM_DURATION"); s != "" {
		d, err := time.ParseDuration(s)
		if err != nil {
			t.Fatalf("COPPICE_SIM_DURATION: %v; try 30m or 2h", err)
		}
		each, total = d/time.Duration(len(kinds)), 1<<40
	}
	for _, k := range kinds {
		var until time.Time
		if each > 0 {
			until = time.Now().Add(each)
		}
		runAll(t, k, first, max(1, total*shares[k.name]/1000), until)
	}
}
