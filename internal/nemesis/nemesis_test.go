package nemesis

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/cluster/clustertest"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// back is how long the cluster gets to be whole again once a fault is over: a promise of seconds, on a machine that may be busy.
const back = time.Minute

// components are what is called.
var components = []string{"data/kv", "bank/bank", draftsComponent}

// bed is a cluster with the components.
type bed struct {
	t       *testing.T
	c       *cluster.Cluster
	rng     *rand.Rand
	seed    uint64
	longest time.Duration // of a pause or a cut
	owners  map[string]string
	small   *cluster.Node // the one with a small disk; nil: none
}

const manifest = `application: %s
components:
  - name: %s
    artifact: %s
    durable: %s
    guarantee: %s
`

func seed(t *testing.T) uint64 {
	t.Helper()
	s := uint64(time.Now().UnixNano())
	if text := os.Getenv("COPPICE_SEED"); text != "" {
		var err error
		if s, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatalf("COPPICE_SEED: %v", err)
		}
	}
	t.Logf("seed %d", s)
	return s
}

func newBed(t *testing.T, nodes int, longest time.Duration) *bed {
	t.Helper()
	s := seed(t)
	b := &bed{
		t: t, seed: s, rng: rand.New(rand.NewPCG(s, 1)), longest: longest, owners: map[string]string{},
		c: clustertest.New(t, clustertest.Config{Nodes: nodes, Namespaces: true, Harm: true}),
	}
	clustertest.Cuttable(t, b.c)
	b.shrink()
	must(t, b.c.Up(t.Context()))
	must(t, b.c.AllAlive(t.Context()))
	bin := filepath.Dir(clustertest.Binary(t))
	for _, x := range []struct{ app, name, durable, guarantee string }{
		{"data", "kv", "each-call", "safe"}, {"bank", "bank", "each-call", "safe"}, {"draft", "kv", "on-demand", "exactly-one"},
	} {
		path := filepath.Join(b.c.Dir, x.app+".yaml")
		must(t, os.WriteFile(path, fmt.Appendf(nil, manifest, x.app, x.name, filepath.Join(bin, "components", x.name), x.durable, x.guarantee), 0o600))
		must(t, b.c.Coppice(t.Context(), b.c.Nodes[0], nil, "deploy", path, "--wait", "--timeout", "60s"))
	}
	return b
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// whole waits until all nodes live, there is a leader, both components run and have settled, and answer.
func (b *bed) whole(ctx context.Context, l *clientele) (time.Duration, error) {
	begun := time.Now()
	// Whether something was answered is asked first: the rest waits for epochs to settle, which takes its time by itself.
	if err := cluster.WaitFor(ctx, back, "writes to be answered", func(context.Context) (bool, error) {
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.last.After(begun) {
			return true, nil
		}
		return false, fmt.Errorf("the last answer came %s before", begun.Sub(l.last).Round(time.Millisecond))
	}); err != nil {
		return 0, err
	}
	took := time.Since(begun)
	if err := b.c.AllAlive(ctx); err != nil {
		return took, err
	}
	for _, name := range components {
		if _, err := cluster.Calm(ctx, b.c.Nodes[0], name); err != nil {
			return took, err
		}
	}
	return took, b.epochs(ctx)
}

// epochs reads the nodes' events: no two nodes ran the same instance in the same epoch.
func (b *bed) epochs(ctx context.Context) error {
	for _, n := range b.c.Alive() {
		c, err := n.Client()
		if err != nil {
			return err
		}
		st, err := c.Events(ctx, &apiv1.EventsRequest{Channel: "/apps/", Limit: 2000})
		if err != nil {
			return err
		}
		for st.Receive() {
			ev := st.Msg()
			if ev.GetType() != "running" && ev.GetType() != "swapped" {
				continue
			}
			key := ev.GetChannel() + " epoch " + ev.GetFields()["epoch"]
			if was, ok := b.owners[key]; ok && was != ev.GetNode() {
				return fmt.Errorf("%s ran on %s and on %s", key, was, ev.GetNode())
			}
			b.owners[key] = ev.GetNode()
		}
		if err := st.Err(); err != nil {
			return err
		}
	}
	return nil
}

// run does the faults that next names until it names none.
func (b *bed) run(next func(n int) *fault) {
	t, ctx := b.t, b.t.Context()
	t.Helper()
	l := open(t, b.c, b.seed)
	count := map[string]int{}
	var skipped []string
	n := 0
	for f := next(n); f != nil; f = next(n) {
		n++
		over := l.drafts.during()
		what, err := f.do(ctx, b)
		if errors.Is(err, errSkipped) {
			skipped = append(skipped, f.name)
			over()
			t.Logf("fault %d: %s was SKIPPED: %v", n, f.name, err)
			continue
		}
		if err != nil {
			t.Fatalf("fault %d, %s: %v", n, f.name, err)
		}
		took, err := b.whole(ctx, l)
		if err != nil {
			t.Fatalf("fault %d, %s: %s; afterwards: %v", n, f.name, what, err)
		}
		over()
		count[f.name]++
		t.Logf("fault %d: %s; a write was answered %s after it was over", n, what, took.Round(time.Millisecond))
	}
	l.close(b.seed)
	t.Logf("%d faults: %v; %d epochs, none with two owners", n-len(skipped), count, len(b.owners))
	if len(skipped) > 0 {
		t.Logf("SKIPPED: %v", skipped)
	}
}

func named(name string) *fault {
	for i := range faults {
		if faults[i].name == name {
			return &faults[i]
		}
	}
	return nil
}

// TestNemesis does each of the short faults once.
func TestNemesis(t *testing.T) {
	if testing.Short() {
		t.Skip("it starts processes")
	}
	list := []string{"crash-component", "clocks", "reset", "slow-disk", "pause-component", "failing-log", "kill-leader"}
	if only := os.Getenv("COPPICE_FAULTS"); only != "" {
		list = strings.Split(only, ",")
	}
	newBed(t, 5, 3*time.Second).run(func(n int) *fault {
		if n == len(list) {
			return nil
		}
		return named(list[n])
	})
}

// TestLongNemesis does faults at random for an hour, or for COPPICE_NEMESIS.
func TestLongNemesis(t *testing.T) {
	if os.Getenv("COPPICE_LONG") == "" {
		t.Skip("set COPPICE_LONG=1, or make test-long")
	}
	length := time.Hour
	if text := os.Getenv("COPPICE_NEMESIS"); text != "" {
		var err error
		length, err = time.ParseDuration(text)
		must(t, err)
	}
	b := newBed(t, 7, 30*time.Second)
	end := time.Now().Add(length)
	b.run(func(n int) *fault {
		switch {
		case time.Now().After(end):
			return nil
		case n < len(faults):
			return &faults[n] // each once first
		}
		return &faults[b.rng.IntN(len(faults))]
	})
}
