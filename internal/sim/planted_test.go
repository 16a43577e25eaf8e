//go:build planted

package sim

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/planted"
)

// bug is one rule broken on purpose.
type bug struct {
	name   string
	kind   string // of the schedules that are to find it
	budget int    // schedules in which it must be found
	rule   string // that it breaks
}

// bugs are all that are planted. Budgets are several times what was measured (docs/testing.md).
var bugs = []bug{
	{"doubt-as-failure", "registers", 150, "a caller that gives up on a command under way is told that it was not carried out"},
	{"doubt-forgotten", "registers", 300, "a try whose answer was lost does not count when a later one is refused"},
	{"claim-retry-unknown", "registers", 60, "a claim that comes twice is not recognised: as if it came with a new nonce"},
	{"txn-retry-unknown", "registers", 60, "a transaction that comes twice is carried out twice"},
	{"leader-local-read", "registers", 600, "a leader answers reads without asking whether it still leads"},
	{"read-before-own-term", "registers", 2000, "a new leader answers reads before anything of its own term is committed"},
	{"amnesia", "registers", 200, "a voter that comes back with an empty disk takes part again"},
	{"log-unsynced", "registers", 200, "entries are acknowledged before they are on disk"},
	{"vote-unsynced", "registers", 2000, "term and vote are given before they are on disk"},
	{"commit-unfenced", "registers", 30, "a commit counts in whatever epoch it was made"},
	{"seq-gap", "registers", 30, "a checkpoint may leave a number out"},
	{"seq-back", "registers", 30, "a checkpoint may have an older number: the restore point goes back"},
	{"too-few-holders", "registers", 30, "a checkpoint is committed with fewer holders than it takes"},
	{"holders-late", "registers", 1000, "a late repetition undoes who holds a checkpoint"},
	{"deleted-revived", "registers", 300, "a late repetition of a claim brings a deleted register back"},
	{"epoch-reused", "registers", 60, "a register that was deleted and made again uses its epochs twice"},
	{"view-goes-back", "registers", 100, "a node shows an older state of the registers than before"},
	{"snapshot-older", "registers", 2000, "a follower takes a snapshot older than what it has applied (with a log kept short, or it is never sent one)"},
	{"remove-first", "registers", 200, "the keeper takes a dead voter out before another learns in its place"},
	{"vote-without-learning", "registers", 30, "the keeper makes a node a voter that has not caught up"},
	{"ack-unsynced", "pages", 100, "a holder acknowledges pages before they are on its disk"},
	{"ack-incomplete", "pages", 100, "a holder acknowledges a root of which it lacks pages"},
	{"collect-reachable", "pages", 100, "the collector takes pages that a live root reaches"},
	{"collect-pinned", "pages", 300, "the collector takes what was acknowledged and is not committed yet"},
	{"mirror-older-wins", "whole", 400, "a holder takes an older mirror for a newer one"},
	{"one-holder-less", "whole", 10, "w - 1 holders are taken for w"},
	{"restore-older", "whole", 100, "a new owner starts from the checkpoint before the last acknowledged one"},
	{"no-lease-wait", "whole", 200, "the successor of an exactly-one instance does not wait until the last owner's lease has run out"},
	{"lease-of-old-state", "leases", 800, "a new leader decides about claims by what it has applied so far: it does not know who owns what yet"},
	{"lease-no-drift", "leases", 400, "no margin is left for clocks that run at different rates"},
	{"lease-no-revoke", "leases", 800, "leases of an epoch are renewed while a claim that ends it is being decided"},
	{"lease-unverified", "leases", 800, "a leader renews leases without making sure that it still leads"},
	{"lease-new-leader", "leases", 100, "a new leader does not wait for the leases that its predecessors acknowledged"},
	{"lease-lost-on-boot", "leases", 200, "a leader that was started anew does not wait for the leases that were acknowledged before"},
	{"lease-from-answer", "leases", 400, "an owner counts its lease from the answer, not from its question"},
	{"branch-elsewhere", "always", 20, "what goes on without the arbiter goes on at nodes that do not own it"},
	{"reply-before-commit", "whole", 100, "an answer is given before its effects are committed"},
}

// Others are shown by unit tests: TestPlanted in membrane, components/supervisor and dht/arbiter. docs/testing.md says which, and why not here.

// TestPlanted has the simulation look for each planted bug, and fails where one is not found in time. Each hunt is a process of its own: some
// of the bugs end it.
func TestPlanted(t *testing.T) {
	if os.Getenv("COPPICE_PLANTED") != "" {
		t.Skip("this is a hunt")
	}
	only := os.Getenv("COPPICE_SIM_BUG")
	slots := make(chan struct{}, runtime.GOMAXPROCS(0))
	var wg sync.WaitGroup
	var mu sync.Mutex
	found := map[string]string{}
	for _, b := range bugs {
		if only != "" && only != b.name {
			continue
		}
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			began := time.Now()
			after, how, log := hunt(t, b)
			mu.Lock()
			defer mu.Unlock()
			if how == "" {
				t.Errorf("%s was not found in %d schedules (%s): %s\n%s", b.name, after, time.Since(began).Round(time.Second), b.rule, log)
				return
			}
			found[b.name] = fmt.Sprintf("| `%s` | %s | %s | %d | %s |", b.name, b.rule, b.kind, after, how)
			t.Logf("%s: found by schedule %d of %s, %s: %s", b.name, after, b.kind, time.Since(began).Round(100*time.Millisecond), how)
		})
	}
	wg.Wait()
	var table []string
	for _, b := range bugs {
		if row := found[b.name]; row != "" {
			table = append(table, row)
		}
	}
	t.Logf("%d of %d planted bugs were found\n%s", len(found), len(bugs), strings.Join(table, "\n"))
}

// hunt looks for one bug in a process of its own, and says after how many schedules it was found, and how.
func hunt(t *testing.T, b bug) (after int, how, log string) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, exe, "-test.run=^TestHunt$", "-test.v", "-test.timeout=9m")
	cmd.Env = append(os.Environ(), "COPPICE_PLANTED="+b.name, "GOMAXPROCS=1", "GOGC=300")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	failed := cmd.Run()
	sc := bufio.NewScanner(bytes.NewReader(out.Bytes()))
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		line := sc.Text()
		if _, err := fmt.Sscanf(line, "schedule %d", &after); err == nil {
			continue
		}
		if s, ok := strings.CutPrefix(line, "FOUND "); ok && how == "" {
			how = s
		}
		if strings.HasPrefix(line, "panic: ") && how == "" {
			how = line
		}
	}
	if failed != nil && how == "" {
		log = out.String()
		log = log[max(0, len(log)-2000):]
	}
	return after, how, log
}

// TestHunt is the process of one hunt: schedules one after another until one fails.
func TestHunt(t *testing.T) {
	name := os.Getenv("COPPICE_PLANTED")
	i := slices.IndexFunc(bugs, func(b bug) bool { return b.name == name })
	if i < 0 {
		t.Skip("COPPICE_PLANTED names no planted bug; TestPlanted starts the hunts")
	}
	if !planted.Bug(name) {
		t.Fatal("the bug is not switched on")
	}
	k, _ := kindOf(bugs[i].kind)
	for n := range bugs[i].budget {
		fmt.Printf("schedule %d\n", n+1)
		if s := play(t, k, uint64(n+1)); s.failed() {
			planted.Set("")
			if clean := play(t, k, uint64(n+1)); clean.failed() {
				fmt.Printf("without the bug it fails, too: %s\n", clean.failures[0])
				planted.Set(name)
				continue
			}
			how, _, _ := strings.Cut(s.failures[0], "\n")
			fmt.Printf("FOUND %.200s\n", how)
			return
		}
	}
}
