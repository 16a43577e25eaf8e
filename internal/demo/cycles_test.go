package demo

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/cluster/clustertest"
	"github.com/coppice-project/coppice/internal/load"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

const testManifest = `application: shop
components:
  - name: store
    artifact: ./components/shop
    durable: each-call
  - name: web
    artifact: ./components/shopweb
    count: 2
    spread: node
    expose: {http: /}
---
application: kv
components:
  - name: kv
    artifact: ./components/kv
    durable: each-call
`

// bed is a cluster under load, for tests.
func bed(t *testing.T, nodes int, rate float64, namespaces bool) *demo {
	t.Helper()
	c := clustertest.Up(t, clustertest.Config{Nodes: nodes, Namespaces: namespaces})
	d := &demo{
		Config: Config{Binary: c.Binary, Nodes: nodes, Seed: 7, Rate: rate, Out: io.Discard}, dir: c.Dir, cluster: c, figures: map[string]any{},
	}
	must(t, d.allAlive(t.Context()))
	must(t, os.Symlink(d.file("components"), filepath.Join(d.dir, "components")))
	path := filepath.Join(d.dir, "apps.yaml")
	must(t, os.WriteFile(path, []byte(testManifest), 0o600))
	must(t, d.coppice(t.Context(), c.Nodes[0], nil, "deploy", path, "--wait"))
	must(t, d.launch(load.Config{Shop: "shop", ShopClients: 2, Store: storeComponent, StoreClients: 4, KV: kvComponent, KVClients: 2, Reads: 0.3}))
	t.Cleanup(func() {
		if err := d.load.Close(); err != nil {
			t.Errorf("end the load: %v", err)
		}
	})
	return d
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// owners says which node ran an instance in an epoch, by what the nodes told.
type owners map[string]string

// see takes in the events of all nodes that run. Two nodes that ran the same instance in the same epoch are an error.
func (o owners) see(ctx context.Context, c *cluster.Cluster) error {
	for _, n := range c.Alive() {
		cl, err := n.Client()
		if err != nil {
			return err
		}
		st, err := cl.Events(ctx, &apiv1.EventsRequest{Channel: "/apps/", Limit: 2000})
		if err != nil {
			return err
		}
		for st.Receive() {
			ev := st.Msg()
			if ev.GetType() != "running" && ev.GetType() != "swapped" {
				continue
			}
			key := ev.GetChannel() + " epoch " + ev.GetFields()["epoch"]
			if was, ok := o[key]; ok && was != ev.GetNode() {
				return fmt.Errorf("%s ran on %s and on %s", key, was, ev.GetNode())
			}
			o[key] = ev.GetNode()
		}
		if err := st.Err(); err != nil {
			return err
		}
	}
	return nil
}

// killCycles kills a random node and starts it again, n times, under load.
func killCycles(t *testing.T, d *demo, n int, seed uint64) {
	t.Helper()
	t.Logf("seed %d", seed)
	ctx, rng, seen := t.Context(), rand.New(rand.NewPCG(seed, 1)), owners{}
	var slowest time.Duration
	for cycle := 1; cycle <= n; cycle++ {
		must(t, d.calm(ctx, d.cluster.Nodes[0]))
		must(t, d.expendable(ctx))
		must(t, seen.see(ctx, d.cluster))
		victim := d.cluster.Nodes[rng.IntN(len(d.cluster.Nodes))]
		owned := d.owner == victim.Name
		at, err := victim.Kill()
		must(t, err)
		if owned {
			first, err := d.answered(ctx, at, victim.Name)
			must(t, err)
			slowest = max(slowest, first.Time.Sub(at))
			t.Logf("cycle %d: %s killed, the store was its; answered by %s after %s", cycle, victim.Name, first.Node, first.Time.Sub(at).Round(time.Millisecond))
		}
		must(t, cluster.Sleep(ctx, time.Duration(rng.IntN(1000))*time.Millisecond))
		must(t, victim.Start(ctx))
		must(t, d.allAlive(ctx))
		must(t, d.calm(ctx, d.cluster.Nodes[0]))
		must(t, d.noneFailed())
		if cycle%10 == 0 {
			rep, err := d.checked()
			must(t, err)
			t.Logf("cycle %d: %d answered writes, all there once", cycle, rep.Answered)
		}
	}
	must(t, seen.see(ctx, d.cluster))
	rep, err := d.checked()
	must(t, err)
	t.Logf("%d kills: %d answered writes, %d found, %d missing, %d twice; slowest failover %s; %d epochs, none with two owners",
		n, rep.Answered, rep.Found, rep.Missing, rep.Doubled, slowest.Round(time.Millisecond), len(seen))
}

// stopped suspends the store's owner for a time. It is taken over from, and after waking it serves nothing as the old owner.
func stopped(t *testing.T, d *demo, hold time.Duration) {
	t.Helper()
	ctx := t.Context()
	must(t, d.calm(ctx, d.cluster.Nodes[0]))
	victim, epoch, pid := d.cluster.Node(d.owner), d.epoch, d.pid
	at, err := victim.Stop()
	must(t, err)
	first, err := d.answered(ctx, at, victim.Name)
	must(t, err)
	t.Logf("%s suspended: answered by %s after %s", victim.Name, first.Node, first.Time.Sub(at).Round(time.Millisecond))
	d.isolated = startProbe(victim, epoch, pid, true)
	must(t, cluster.Sleep(ctx, hold-time.Since(at)))
	text, err := d.wake(ctx)
	must(t, err)
	t.Log(strings.TrimSpace(text))
	must(t, d.calm(ctx, d.cluster.Nodes[0]))
	rep, err := d.checked()
	must(t, err)
	t.Logf("%d answered writes, all there once", rep.Answered)
}

func TestKillCycles(t *testing.T) {
	if testing.Short() {
		t.Skip("it starts processes")
	}
	killCycles(t, bed(t, 3, 50, false), 3, 1)
}

func TestStop(t *testing.T) {
	if testing.Short() {
		t.Skip("it starts processes")
	}
	stopped(t, bed(t, 3, 50, false), 3*time.Second)
}

// long skips a test that takes minutes, unless it was asked for.
func long(t *testing.T) {
	t.Helper()
	if os.Getenv("COPPICE_LONG") == "" {
		t.Skip("set COPPICE_LONG=1, or make test-long")
	}
}

func TestLongKillCycles(t *testing.T) {
	long(t)
	killCycles(t, bed(t, 5, 100, true), 100, uint64(time.Now().UnixNano()))
}

func TestLongStop(t *testing.T) {
	long(t)
	stopped(t, bed(t, 5, 100, true), 10*time.Second)
}

func TestLongDemo(t *testing.T) {
	long(t)
	var out strings.Builder
	err := Run(t.Context(), Config{Binary: clustertest.Binary(t), Nodes: 5, Seed: 7, Rate: 100, Out: &out})
	t.Log("\n" + out.String())
	if err != nil {
		t.Fatal(err)
	}
}
