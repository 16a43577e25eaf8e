package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/load"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// join: the nodes find each other with a token and nothing else, and the DHT names the voters and the coordinator.
func (d *demo) join(ctx context.Context) (string, error) {
	begin := time.Now()
	if err := d.cluster.Up(ctx); err != nil {
		return "", err
	}
	if err := d.allAlive(ctx); err != nil {
		return "", err
	}
	took := time.Since(begin)
	order, err := d.homed(ctx)
	if err != nil {
		return "", err
	}
	var pids []string
	for _, n := range d.cluster.Nodes {
		pids = append(pids, fmt.Sprint(n.PID()))
		d.figure("ready_ms_"+n.Name, n.Ready().Milliseconds())
	}
	d.figure("alive_ms", took.Milliseconds())
	d.figure("voters", order)
	return fmt.Sprintf("n1…n%d alive in %s · pids %s · no config file · voters %s and coordinator %s: first of `dht closest /system/placement`",
		d.Nodes, msOf(took), strings.Join(pids, " "), strings.Join(order, " "), order[0]), nil
}

// drop: a file that is copied into a node's drop folder is an artifact everywhere.
func (d *demo) drop(ctx context.Context) (string, error) {
	n1, n4 := d.cluster.Node("n1"), d.cluster.Node("n4")
	c, err := n1.Client()
	if err != nil {
		return "", err
	}
	begin := time.Now()
	if err := copyFile(d.file("components/kv"), filepath.Join(n4.Data, "plugins", "kv-1.0")); err != nil {
		return "", err
	}
	var found *apiv1.Artifact
	err = cluster.WaitFor(ctx, 30*time.Second, "n1 to list kv on 3 holders", func(ctx context.Context) (bool, error) {
		res, err := c.RegistryList(ctx, &apiv1.RegistryListRequest{})
		for _, a := range res.GetArtifacts() {
			if a.GetName() == "kv" {
				found = a
			}
		}
		switch {
		case err != nil || found == nil:
			return false, err
		case found.GetState() != "ready" || len(found.GetHolders()) < 3:
			return false, fmt.Errorf("it is %s on %v %s", found.GetState(), found.GetHolders(), found.GetReason())
		}
		return true, nil
	})
	if err != nil {
		return "", err
	}
	took := time.Since(begin)
	if found.GetKind() != "component" || found.GetVersion() != "1.0.0" {
		return "", fmt.Errorf("n1 lists kv as %s %s, want component 1.0.0", found.GetKind(), found.GetVersion())
	}
	d.figure("ready_ms", took.Milliseconds())
	return fmt.Sprintf("cp kv-1.0 → n4's plugins · described in the sandbox, on %d holders in %s · n1 lists it", len(found.GetHolders()), msOf(took)), nil
}

// copyFile copies as cp does: the file grows where it will be.
func copyFile(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}

const shopManifest = `application: shop
components:
  - name: store
    artifact: ./components/shop
    durable: each-call
    require: ['node.labels.disk == "ssd"']
    objective: [{value: node.cpu, from: 0, to: 10, weight: 1, better: high}]
  - name: web
    artifact: ./components/shopweb
    count: 3
    spread: node
    require: ['node.labels.edge == "yes"']
    expose: {http: /}
cost: {move: 1}
`

const kvManifest = `application: kv
components:
  - name: kv
    artifact: kv@^1
    durable: each-call
`

// deploy: two manifests become what runs.
func (d *demo) deploy(ctx context.Context) (string, error) {
	n1 := d.cluster.Node("n1")
	if err := os.Symlink(d.file("components"), filepath.Join(d.dir, "components")); err != nil {
		return "", err
	}
	begin := time.Now()
	for name, text := range map[string]string{"shop.yaml": shopManifest, "kv.yaml": kvManifest} {
		path := filepath.Join(d.dir, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			return "", err
		}
		if err := d.coppice(ctx, n1, nil, "deploy", path, "--wait"); err != nil {
			return "", err
		}
	}
	took := time.Since(begin)
	list, err := cluster.Instances(ctx, n1)
	if err != nil {
		return "", err
	}
	where := map[string][]string{}
	for _, in := range list {
		where[in.GetComponent()] = append(where[in.GetComponent()], in.GetNode())
	}
	web := slices.Sorted(slices.Values(where["shop/web"]))
	if !slices.Equal(where[storeComponent], []string{"n2"}) || len(slices.Compact(slices.Clone(web))) != 3 {
		return "", fmt.Errorf("the store is on %v, want n2; web is on %v, want three of the nodes with edge=yes", where[storeComponent], web)
	}
	why, err := d.why(ctx, n1)
	if err != nil {
		return "", err
	}
	if why.GetRunnerUp() != "n4" {
		return "", fmt.Errorf("the runner-up for the store is %q, want n4", why.GetRunnerUp())
	}
	d.figure("running_ms", took.Milliseconds())
	return fmt.Sprintf("shop: store on n2, web on %s · kv on %s · running in %s · why n2: %s; runner-up %s", strings.Join(web, " "),
		strings.Join(where[kvComponent], " "), msOf(took), why.GetReason(), why.GetRunnerUp()), nil
}

func (d *demo) why(ctx context.Context, on *cluster.Node) (*apiv1.Decision, error) {
	c, err := on.Client()
	if err != nil {
		return nil, err
	}
	var out *apiv1.Decision
	err = cluster.WaitFor(ctx, 10*time.Second, "the decision about the store to be recorded", func(ctx context.Context) (bool, error) {
		res, err := c.Why(ctx, &apiv1.WhyRequest{Component: storeComponent})
		if err != nil || len(res.GetDecisions()) != 1 {
			return false, err
		}
		out = res.GetDecisions()[0]
		return out.GetScore() > 0 && out.GetRunnerUp() != "", nil
	})
	return out, err
}

// startLoad: a process that writes down what it is answered. It goes on until the end.
func (d *demo) startLoad(ctx context.Context) (string, error) {
	err := d.launch(load.Config{Shop: "shop", ShopClients: 6, Store: storeComponent, StoreClients: 6, KV: kvComponent, KVClients: 4, Reads: 0.5})
	if err != nil {
		return "", err
	}
	var all, writes load.Figures
	for {
		if all, writes, err = d.sustained(ctx); err != nil {
			return "", err
		}
		if all.Rate >= d.Rate*0.9 && writes.P50 < maxP50 || d.Rate < minRate {
			break
		}
		// The machine does not do more, or does other things: what comes is to be measured without a backlog.
		if err := d.load.Pause(); err != nil {
			return "", err
		}
		d.Rate /= 2
		if err := d.load.Rate(d.Rate); err != nil {
			return "", err
		}
	}
	if all.Answered == 0 {
		return "", fmt.Errorf("no call was answered: %s", all.Why)
	}
	d.figure("calls_per_second", all.Rate)
	d.figure("p50_ms", writes.P50)
	d.figure("p99_ms", writes.P99)
	return fmt.Sprintf("own process, own ledger · %.0f calls/s, %.0f of them writes · durable: each-call · p50/p99 of a write %.1f/%.1f ms",
		all.Rate, writes.Rate, writes.P50, writes.P99), d.noneFailed()
}

// minRate is where the demo stops to lower the load's rate; a median above maxP50, in ms, says that a backlog is worked off.
const (
	minRate = 20
	maxP50  = 200
)

// sustained lets the load warm up and measures it, all of it and the writes alone.
func (d *demo) sustained(ctx context.Context) (all, writes load.Figures, err error) {
	if err = cluster.Sleep(ctx, 1500*time.Millisecond); err != nil {
		return all, writes, err
	}
	from := time.Now()
	if err = cluster.Sleep(ctx, 3*time.Second); err != nil {
		return all, writes, err
	}
	if all, err = d.since(from, ""); err == nil {
		writes, err = d.load.Figures(load.Window{From: from, To: time.Now(), Writes: true})
	}
	return all, writes, err
}

// launch starts the load's process and its clients.
func (d *demo) launch(cfg load.Config) error {
	log, err := os.OpenFile(filepath.Join(d.dir, "load.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	d.load, err = load.Launch(d.cluster.Command(load.Command), func(cmd *exec.Cmd) error {
		cmd.Stderr = log
		return d.cluster.Network.Start(0, cmd)
	})
	if err != nil {
		return err
	}
	cfg.Seed, cfg.Rate, cfg.Run, cfg.Ledger = d.Seed, d.Rate, "demo", filepath.Join(d.dir, "ledger.jsonl")
	for _, n := range d.cluster.Nodes {
		cfg.Gateways = append(cfg.Gateways, load.Gateway{Name: n.Name, HTTP: n.HTTP, API: n.API})
	}
	d.began = time.Now()
	return d.load.Start(cfg)
}

// factsWithin is how long a node may not know yet what another has told: reports are told when a node starts, and what a newcomer missed comes with the next
// comparison of records.
const factsWithin = 20 * time.Second

// facts: any node answers for all, with the age of what it knows.
func (d *demo) facts(ctx context.Context) (string, error) {
	const sql = "select name, free_mib, age_ms from nodes"
	c, err := d.cluster.Node("n5").Client()
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, factsWithin)
	defer cancel()
	for {
		res, err := c.Query(ctx, &apiv1.QueryRequest{Sql: sql})
		if err != nil {
			return "", err
		}
		oldest, known := 0.0, 0
		for _, row := range res.GetRows() {
			if len(row.GetValues()) == 3 && number(row.GetValues()[1]) > 0 {
				known++
				oldest = max(oldest, number(row.GetValues()[2]))
			}
		}
		if known == d.Nodes && known == len(res.GetRows()) {
			d.figure("oldest_ms", oldest)
			return fmt.Sprintf("n5> %s  %d rows, oldest %.0f ms", sql, known, oldest), nil
		}
		if cluster.Sleep(ctx, 100*time.Millisecond) != nil {
			return "", fmt.Errorf("n5 does not know the free memory of every node, for %s: %v", factsWithin, res.GetRows())
		}
	}
}

func number(v *apiv1.Value) float64 {
	switch k := v.GetKind().(type) {
	case *apiv1.Value_Integer:
		return float64(k.Integer)
	case *apiv1.Value_Real:
		return k.Real
	}
	return 0
}

// dht: kad-dht's own lookup finds what says where the store's state is.
func (d *demo) dht(ctx context.Context) (string, error) {
	c, err := d.cluster.Node("n1").Client()
	if err != nil {
		return "", err
	}
	var res *apiv1.DhtGetResponse
	err = cluster.WaitFor(ctx, 10*time.Second, "the store's index in the DHT", func(ctx context.Context) (bool, error) {
		if res, err = c.DhtGet(ctx, &apiv1.DhtGetRequest{Key: storeInstance}); err != nil {
			return false, err
		}
		if !res.GetFound() || !res.GetSigned() || res.GetCopies() < 3 {
			return false, fmt.Errorf("found %t, signed %t, %d copies", res.GetFound(), res.GetSigned(), res.GetCopies())
		}
		return true, nil
	})
	if err != nil {
		return "", err
	}
	hops := "1 hop"
	if res.GetHops() != 1 {
		hops = fmt.Sprintf("%d hops", res.GetHops())
	}
	d.figure("hops", res.GetHops())
	d.figure("copies", res.GetCopies())
	return fmt.Sprintf("kad-dht's own GetValue finds the index of %s: %s, signed, %d copies", storeComponent, hops, res.GetCopies()), nil
}

// predict: before anything is lost, what its loss would do.
func (d *demo) predict(ctx context.Context) (string, error) {
	n1 := d.cluster.Node("n1")
	if err := d.calm(ctx, n1); err != nil {
		return "", err
	}
	in, err := d.store(ctx, n1)
	if err != nil {
		return "", err
	}
	if in.GetNode() != "n2" || in.GetWouldRestartOn() != "n4" || in.WouldLoseMs == nil || in.GetWouldLoseMs() != 0 || in.PredictedRestartMs == nil {
		return "", fmt.Errorf("ps says: on %s, would restart on %q, would lose %s ms, predicted %s ms; want n2, n4, 0 and a time",
			in.GetNode(), in.GetWouldRestartOn(), optional(in.WouldLoseMs), optional(in.PredictedRestartMs))
	}
	d.figure("predicted_ms", in.GetPredictedRestartMs())
	return fmt.Sprintf("lose n2 → n4, restart ≈ %s, would lose 0 answered writes", msText(in.GetPredictedRestartMs())), nil
}

func optional[T any](p *T) string {
	if p == nil {
		return "unknown"
	}
	return fmt.Sprint(*p)
}
