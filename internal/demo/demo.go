package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/load"
)

// Config of a demo.
type Config struct {
	Binary string // coppice; its components lie beside it, in components/ and demo/
	Nodes  int    // 5 or more
	Seed   uint64 // of what the load does
	Rate   float64
	Keep   bool // leave it running at the end, until ctx ends
	JSON   bool // one object per step instead of a line
	// Loopback does without network namespaces even where they are permitted.
	Loopback bool
	Out      io.Writer
}

// DefaultRate is the load's calls per second.
const DefaultRate = 200

// FailedError says which step did not do what it says.
type FailedError struct {
	Step string
	Err  error
	Logs string // folder
}

func (e *FailedError) Error() string { return e.Step + ": " + e.Err.Error() }

// Unwrap returns the reason.
func (e *FailedError) Unwrap() error { return e.Err }

// demo is one run.
type demo struct {
	Config
	dir     string
	cluster *cluster.Cluster
	load    *load.Process
	began   time.Time // of the load

	owner    string // of the store, as the last step left it
	epoch    uint64
	pid      int // of its process
	failed   int // calls that the load has told of as failed
	isolated *probe
	figures  map[string]any // of the step under way, for JSON
}

// names of the demo's applications.
const (
	storeComponent = "shop/store"
	storeInstance  = "shop/store-0"
	kvComponent    = "kv/kv"
)

type step struct {
	name string
	do   func(ctx context.Context) (string, error)
}

// Run runs the demo and prints it. Whatever happens, nothing of it is left behind but, after a failure, its logs.
func Run(ctx context.Context, cfg Config) (err error) {
	if cfg.Nodes < 5 {
		return fmt.Errorf("a demo has at least 5 nodes, not %d", cfg.Nodes)
	}
	d := &demo{Config: cfg}
	if d.dir, err = os.MkdirTemp("", "cop"); err != nil {
		return fmt.Errorf("a folder for the demo: %w", err)
	}
	defer func() { err = d.end(err) }()
	if err := d.prepare(); err != nil {
		return err
	}
	d.print(fmt.Sprintf("coppice demo · %d nodes = %d processes, %s · seed %d · logs in %s", cfg.Nodes, cfg.Nodes, d.networkText(), cfg.Seed, d.dir))
	for i, s := range d.steps() {
		begin := time.Now()
		d.figures = map[string]any{}
		text, err := s.do(ctx)
		if ctx.Err() != nil {
			return ctx.Err() // it was told to stop: nothing has failed
		}
		d.tell(i+1, s.name, text, time.Since(begin), err)
		if err != nil {
			return &FailedError{Step: fmt.Sprintf("step %d, %s", i+1, s.name), Err: err, Logs: d.dir}
		}
	}
	if err := d.verdict(); err != nil {
		return &FailedError{Step: "ledger", Err: err, Logs: d.dir}
	}
	if cfg.Keep {
		return d.keep(ctx)
	}
	return nil
}

func (d *demo) steps() []step {
	return []step{
		{"join", d.join},
		{"drop", d.drop},
		{"deploy", d.deploy},
		{"load", d.startLoad},
		{"facts", d.facts},
		{"dht", d.dht},
		{"predict", d.predict},
		{"kill -9", d.kill},
		{"cut", d.cut},
		{"wake", d.wake},
		{"leader", d.leader},
		{"swap", d.swap},
		{"bad v2", d.badVersion},
		{"all down", d.allDown},
		{"cost", d.cost},
	}
}

// prepare makes the network and the cluster; nothing runs yet.
func (d *demo) prepare() error {
	for _, f := range []string{"components/shop", "components/shopweb", "components/kv", "demo/shop-1.1.0", "demo/shop-1.2.0"} {
		if _, err := os.Stat(d.file(f)); err != nil {
			return fmt.Errorf("the demo needs %s beside the binary: %w; make builds it", f, err)
		}
	}
	net, err := d.network()
	if err != nil {
		return err
	}
	d.cluster, err = cluster.New(cluster.Config{Binary: d.Binary, Dir: d.dir, Network: net, Nodes: d.Nodes, Args: nodeArgs, Registered: d.Keep})
	if err != nil {
		return errors.Join(err, net.Close())
	}
	return nil
}

func (d *demo) network() (cluster.Network, error) {
	if !d.Loopback {
		if net, err := cluster.NewNamespaces(d.Nodes); err == nil {
			return net, nil
		}
	}
	return cluster.NewLoopback(d.Nodes)
}

func (d *demo) networkText() string {
	if d.onLoopback() {
		return "loopback"
	}
	return fmt.Sprintf("%d %s", d.Nodes, d.cluster.Network.Kind())
}

func (d *demo) onLoopback() bool { return d.cluster.Network.Kind() == cluster.Loopback }

// file is a file that make built beside the binary.
func (d *demo) file(name string) string { return filepath.Join(filepath.Dir(d.Binary), name) }

// nodeArgs: n2, n4 and n5 have the disks for the store, the biggest machine first; the odd ones face the web.
func nodeArgs(i int) []string {
	cpu := map[int]int{2: 9, 4: 5}[i]
	args := []string{"--capacity", fmt.Sprintf("cpu=%d", max(1, cpu))}
	if i == 2 || i == 4 || i == 5 {
		args = append(args, "--label", "disk=ssd")
	}
	if i%2 == 1 {
		args = append(args, "--label", "edge=yes")
	}
	return args
}

// end leaves nothing behind, but the logs when the demo failed.
func (d *demo) end(err error) error {
	var errs []error
	if d.load != nil {
		errs = append(errs, d.load.Close())
	}
	if d.isolated != nil {
		d.isolated.stop()
	}
	if d.cluster != nil {
		errs = append(errs, d.cluster.Close())
	}
	if err == nil || errors.Is(err, context.Canceled) || d.cluster == nil {
		errs = append(errs, os.RemoveAll(d.dir))
	} else {
		d.print("logs are kept in " + d.dir)
	}
	return errors.Join(append([]error{err}, errs...)...)
}

// tell prints one step.
func (d *demo) tell(i int, name, text string, took time.Duration, err error) {
	if d.JSON {
		line := map[string]any{"step": i, "name": name, "ok": err == nil, "text": text, "took_ms": took.Milliseconds(), "figures": d.figures}
		if err != nil {
			line["error"] = err.Error()
		}
		d.object(line)
		return
	}
	if err != nil {
		text = strings.TrimSpace(text + " FAILED: " + strings.ReplaceAll(err.Error(), "\n", "; "))
	}
	fmt.Fprintf(d.Out, "%2d %-10s%s\n", i, name, text)
}

func (d *demo) print(line string) {
	if d.JSON {
		d.object(map[string]any{"text": line})
		return
	}
	fmt.Fprintln(d.Out, line)
}

func (d *demo) object(o map[string]any) {
	enc := json.NewEncoder(d.Out)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(o); err != nil {
		fmt.Fprintf(d.Out, "{\"error\":%q}\n", err)
	}
}

// figure notes a number for JSON.
func (d *demo) figure(name string, value any) { d.figures[name] = value }
