package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/load"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

const (
	component = "bench/kv"
	stateSize = 1 << 20
	fillValue = 64 << 10
)

// stand is a cluster with a key-value component that holds 1 MiB, and a load on it.
type stand struct {
	cfg     Config
	dir     string
	cluster *cluster.Cluster
	load    *load.Process
}

const manifest = `application: bench
components:
  - name: kv
    artifact: %s
    durable: each-call
cost: {move: 1}
`

// newStand starts a cluster. end must be called, whatever newStand returns.
func newStand(ctx context.Context, cfg Config, nodes int) (*stand, error) {
	return newStandOf(ctx, cfg, nodes, "")
}

// newStandOf is newStand with another profile than the network's own; "": that one.
func newStandOf(ctx context.Context, cfg Config, nodes int, profile string) (*stand, error) {
	s := &stand{cfg: cfg}
	var err error
	if s.dir, err = os.MkdirTemp("", "cop"); err != nil {
		return s, fmt.Errorf("a folder for the cluster: %w", err)
	}
	net, err := cluster.NewNamespaces(nodes)
	if err != nil {
		net, err = cluster.NewLoopback(nodes)
	}
	if err != nil {
		return s, err
	}
	args := func(int) []string { return nil }
	if profile != "" {
		args = func(int) []string { return []string{"--profile", profile} }
	}
	if s.cluster, err = cluster.New(cluster.Config{Binary: cfg.Binary, Dir: s.dir, Network: net, Nodes: nodes, Args: args}); err != nil {
		return s, errors.Join(err, net.Close())
	}
	cfg.say("%d nodes on %s", nodes, net.Kind())
	if err := s.cluster.Up(ctx); err != nil {
		return s, err
	}
	return s, s.cluster.AllAlive(ctx)
}

// end leaves nothing behind, but the logs when err says that something failed.
func (s *stand) end(err error) error {
	var errs []error
	if s.load != nil {
		errs = append(errs, s.load.Close())
	}
	if s.cluster != nil {
		errs = append(errs, s.cluster.Close())
	}
	if err == nil {
		errs = append(errs, os.RemoveAll(s.dir))
	} else {
		err = fmt.Errorf("%w (logs are kept in %s)", err, s.dir)
	}
	return errors.Join(append([]error{err}, errs...)...)
}

// fill deploys the component and gives it its state.
func (s *stand) fill(ctx context.Context) error {
	path := filepath.Join(s.dir, "bench.yaml")
	if err := os.WriteFile(path, fmt.Appendf(nil, manifest, s.cfg.file("components/kv")), 0o600); err != nil {
		return err
	}
	n1 := s.cluster.Nodes[0]
	if err := s.cluster.Coppice(ctx, n1, nil, "deploy", path, "--wait"); err != nil {
		return err
	}
	c, err := n1.Client()
	if err != nil {
		return err
	}
	for i := range stateSize / fillValue {
		raw, err := json.Marshal(map[string]string{"key": fmt.Sprintf("fill/%d", i), "value": strings.Repeat(string(rune('a'+i)), fillValue)})
		if err != nil {
			return err
		}
		if _, err := c.Call(ctx, &apiv1.CallRequest{Component: component, Method: "kv.v1.KV/Put", Json: string(raw), IdempotencyKey: fmt.Sprintf("fill-%d", i)}); err != nil {
			return fmt.Errorf("fill the state: %w", err)
		}
	}
	return nil
}

// start starts the load.
func (s *stand) start(rate, reads float64, clients int) error {
	var err error
	if s.load, err = load.Launch(s.cluster.Command(load.Command), func(cmd *exec.Cmd) error { return s.cluster.Network.Start(0, cmd) }); err != nil {
		return err
	}
	cfg := load.Config{
		Seed: 1, Run: "load", Ledger: filepath.Join(s.dir, "ledger.jsonl"), KV: component, KVClients: clients, KVKeys: 64, Rate: rate, Reads: reads,
	}
	for _, n := range s.cluster.Nodes {
		cfg.Gateways = append(cfg.Gateways, load.Gateway{Name: n.Name, HTTP: n.HTTP, API: n.API})
	}
	return s.load.Start(cfg)
}

// settle waits until all is well and returns the component's only instance.
func (s *stand) settle(ctx context.Context) (*apiv1.InspectInstance, error) {
	if err := s.cluster.AllAlive(ctx); err != nil {
		return nil, err
	}
	return cluster.Calm(ctx, s.cluster.Alive()[0], component)
}

// verify fails when an answered write is missing or there twice, or a call was not answered.
func (s *stand) verify(began time.Time) ([]Result, error) {
	if err := s.load.Pause(); err != nil {
		return nil, err
	}
	f, err := s.load.Figures(load.Window{From: began, To: time.Now()})
	if err != nil {
		return nil, err
	}
	rep, err := s.load.Verify()
	if err != nil {
		return nil, err
	}
	out := []Result{
		summary("calls", "calls", []float64{float64(f.Calls)}),
		summary("failed calls", "calls", []float64{float64(f.Failed + f.Refused)}),
		summary("answered writes", "writes", []float64{float64(rep.Answered)}),
		summary("lost writes", "writes", []float64{float64(rep.Missing)}),
		summary("doubled writes", "writes", []float64{float64(rep.Doubled)}),
	}
	if !rep.Good() {
		return out, fmt.Errorf("of %d answered writes %d are missing and %d are there twice: %s", rep.Answered, rep.Missing, rep.Doubled, strings.Join(rep.Examples, "; "))
	}
	if f.Failed+f.Refused > 0 {
		return out, fmt.Errorf("%d of %d calls failed: %s", f.Failed+f.Refused, f.Calls, f.Why)
	}
	return out, nil
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }
