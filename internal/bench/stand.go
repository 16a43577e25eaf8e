package bench

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/load"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

const (
	component = "bench/kv"
	stateSize = 1 << 20
	// What the state is made of: values of random text, so many of them in a call, from so many callers at a time.
	valueBytes  = 16 << 10
	fillBatch   = 32
	fillCallers = 4
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
    durable: %s
    state: {standby: %s}
cost: {move: 1}
`

// newStand starts a cluster. end must be called, whatever newStand returns.
func newStand(ctx context.Context, cfg Config, nodes int) (*stand, error) {
	return newStandOf(ctx, cfg, nodes)
}

// newStandOf is newStand with further flags for each node.
func newStandOf(ctx context.Context, cfg Config, nodes int, flags ...string) (*stand, error) {
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
	args := func(int) []string { return flags }
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

// fill deploys the component, each-call, and gives it its state.
func (s *stand) fill(ctx context.Context) error {
	if err := s.deploy(ctx, "each-call"); err != nil {
		return err
	}
	return s.write(ctx, s.cfg.size(stateSize), 1, 1)
}

// deploy deploys the component with a durability and waits until it runs.
func (s *stand) deploy(ctx context.Context, durable string) error {
	path := filepath.Join(s.dir, "bench.yaml")
	if err := os.WriteFile(path, fmt.Appendf(nil, manifest, s.cfg.file("components/kv"), durable, cmp.Or(s.cfg.Standby, "cold")), 0o600); err != nil {
		return err
	}
	return s.cluster.Coppice(ctx, s.cluster.Nodes[0], nil, "deploy", path, "--wait")
}

// owner returns the node that the component runs on.
func (s *stand) owner(ctx context.Context) (*cluster.Node, error) {
	in, err := s.settle(ctx)
	if err != nil {
		return nil, err
	}
	return s.cluster.Node(in.GetNode()), nil
}

// write gives the component a state of so many bytes: values of random text (base64, so that three quarters of it cannot be compressed away). Of each
// every keys it writes one; a seed gives the same values again.
func (s *stand) write(ctx context.Context, size int64, every int, seed uint64) error {
	owner, err := s.owner(ctx)
	if err != nil {
		return err
	}
	c, err := owner.Client()
	if err != nil {
		return err
	}
	keys := make([]int, 0, size/valueBytes/int64(every)+1)
	for k := 0; int64(k)*valueBytes < size; k += every {
		keys = append(keys, k)
	}
	batches := slices.Collect(slices.Chunk(keys, fillBatch))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(fillCallers)
	for _, batch := range batches {
		g.Go(func() error {
			call := &apiv1.CallRequest{
				Component: component, Method: "kv.v1.KV/Txn", IdempotencyKey: fmt.Sprintf("fill-%d-%d-%d", every, seed, batch[0]), TimeoutMs: 60_000,
				Json: puts(batch, min(size, valueBytes), seed),
			}
			if _, err := c.Call(ctx, call); err != nil {
				return fmt.Errorf("fill the state: %w", err)
			}
			return nil
		})
	}
	return g.Wait()
}

// puts is a kv.v1.TxnRequest that writes keys.
func puts(keys []int, size int64, seed uint64) string {
	type put struct {
		Key   string `json:"key"`
		Value string `json:"value"`
	}
	type op struct {
		Put put `json:"put"`
	}
	req := struct {
		Then []op `json:"then"`
	}{}
	for _, k := range keys {
		raw := make([]byte, (size*3+3)/4)
		_, _ = rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(k), byte(k >> 8), byte(k >> 16)}).Read(raw) // it never fails
		req.Then = append(req.Then, op{put{fmt.Sprintf("fill/%07d", k), base64.StdEncoding.EncodeToString(raw)[:size]}})
	}
	out, _ := json.Marshal(req) // of strings: it never fails
	return string(out)
}

// port is one that a process of a benchmark beside the nodes may listen on at a node, each time another one where all nodes share an address.
func (s *stand) port(usual int) string {
	if s.cluster.Network.Kind() != cluster.Loopback {
		return strconv.Itoa(usual)
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return strconv.Itoa(usual)
	}
	defer ln.Close() // it is free again then
	_, port, _ := net.SplitHostPort(ln.Addr().String())
	return port
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
