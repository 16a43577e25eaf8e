package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// Config of a cluster.
type Config struct {
	Binary  string // coppice
	Dir     string // everything is below it; a short path, for there are sockets in it
	Network Network
	Nodes   int
	// Args of node i beyond those of the network: labels, capacity.
	Args func(i int) []string
	// Harm says that the binary was built with the tag "harm": each node obeys the orders that Node.Harm gives.
	Harm bool
	// Env is set for every process of it, besides what those inherit.
	Env []string
	// Registered says that the nodes announce themselves to the commands of this user, as any node does.
	Registered bool
}

// Cluster is a set of node processes. Methods may be called from several goroutines, for different nodes.
type Cluster struct {
	Config
	Nodes []*Node // n1 first
}

// New prepares a cluster; nothing runs yet. This process becomes a reaper.
func New(cfg Config) (*Cluster, error) {
	if err := BecomeReaper(); err != nil {
		return nil, err
	}
	c := &Cluster{Config: cfg}
	for i := 1; i <= cfg.Nodes; i++ {
		name := fmt.Sprintf("n%d", i)
		n := &Node{Name: name, Index: i, Data: filepath.Join(cfg.Dir, name), cluster: c}
		n.API = "unix://" + filepath.Join(n.Data, "api.sock")
		n.HTTP = "http://" + cfg.Network.HTTP(i)
		c.Nodes = append(c.Nodes, n)
		if err := os.MkdirAll(filepath.Join(n.Data, "plugins"), 0o700); err != nil {
			return nil, fmt.Errorf("data folder of %s: %w", name, err)
		}
	}
	if err := os.MkdirAll(filepath.Join(cfg.Dir, "run"), 0o700); err != nil {
		return nil, fmt.Errorf("runtime folder: %w", err)
	}
	return c, nil
}

// Node returns a node by name; nil when there is none.
func (c *Cluster) Node(name string) *Node {
	for _, n := range c.Nodes {
		if n.Name == name {
			return n
		}
	}
	return nil
}

// atOnce is how many nodes join at the same time; a node refuses more newcomers at once than it has room for.
const atOnce = 8

// Up starts the first node, has it make a token, and starts the others with it, some at the same time. It returns when all are ready.
func (c *Cluster) Up(ctx context.Context) error {
	if err := c.Nodes[0].Start(ctx); err != nil {
		return err
	}
	if len(c.Nodes) == 1 {
		return nil
	}
	cl, err := c.Nodes[0].Client()
	if err != nil {
		return err
	}
	tok, err := cl.Token(ctx, &apiv1.TokenRequest{})
	if err != nil {
		return fmt.Errorf("make a token: %w", err)
	}
	for some := range slices.Chunk(c.Nodes[1:], atOnce) {
		if err := Each(some, func(n *Node) error { return n.Start(ctx, "--join", tok.GetToken()) }); err != nil {
			return err
		}
	}
	return nil
}

// Each does something with several nodes at the same time.
func Each(nodes []*Node, f func(n *Node) error) error {
	errs := make([]error, len(nodes))
	var wg sync.WaitGroup
	for i, n := range nodes {
		wg.Go(func() { errs[i] = f(n) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Alive lists the nodes whose process runs.
func (c *Cluster) Alive() []*Node {
	var out []*Node
	for _, n := range c.Nodes {
		if n.Running() {
			out = append(out, n)
		}
	}
	return out
}

// Command is the binary with arguments, as a process of this cluster: its environment and its own process group.
func (c *Cluster) Command(args ...string) *exec.Cmd {
	cmd := exec.Command(c.Binary, args...)
	for _, kv := range os.Environ() {
		if k, _, _ := strings.Cut(kv, "="); !strings.HasPrefix(k, "COPPICE_") && k != "XDG_RUNTIME_DIR" {
			cmd.Env = append(cmd.Env, kv)
		}
	}
	run := filepath.Join(c.Dir, "run")
	if c.Registered {
		run = os.Getenv("XDG_RUNTIME_DIR")
	}
	if run != "" {
		cmd.Env = append(cmd.Env, "XDG_RUNTIME_DIR="+run)
	}
	cmd.Env = append(cmd.Env, c.Env...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // a Ctrl-C is for us; we end them
	return cmd
}

// endWithin is how long a node that has announced itself may take to withdraw that.
const endWithin = 10 * time.Second

// Close ends what still runs of this cluster, and closes its network. What lies in Dir stays.
func (c *Cluster) Close() error {
	err := Each(c.Nodes, func(n *Node) error {
		if c.Registered {
			ctx, cancel := context.WithTimeout(context.Background(), endWithin)
			defer cancel()
			if n.Term(ctx) == nil {
				return nil
			}
		}
		if !n.Running() {
			return nil
		}
		_, err := n.Kill()
		return err
	})
	return errors.Join(err, c.sweep(), c.Network.Close())
}

// sweep ends components that outlived their nodes: with their nodes dead they are children of this process. Others of its children, a load
// generator or a test's, are in Command's care and have ended before.
func (c *Cluster) sweep() error {
	for range 3 { // what dies may leave children of its own
		left, err := descendants(os.Getpid())
		if err != nil {
			return err
		}
		var ours []int
		for _, pid := range left {
			if c.started(pid) {
				ours = append(ours, pid)
			}
		}
		if len(ours) == 0 {
			return nil
		}
		for _, pid := range ours {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
				return fmt.Errorf("end process %d: %w", pid, err)
			}
		}
		reap(ours)
	}
	return nil
}

// started says whether a process belongs to this cluster: what it was told names the cluster's folder, or a node's runtime folder, whose name
// is the end of its peer id.
func (c *Cluster) started(pid int) bool {
	marks := []string{c.Dir + "/"}
	for _, n := range c.Nodes {
		if id := n.ID(); len(id) > idSuffix {
			marks = append(marks, "/"+id[len(id)-idSuffix:]+"/")
		}
	}
	for _, what := range []string{"cmdline", "environ"} {
		raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, what))
		for _, m := range marks {
			if err == nil && strings.Contains(string(raw), m) {
				return true
			}
		}
	}
	return false
}

const idSuffix = 8

// WaitFor looks every few milliseconds until f says true. The error says what was waited for, and f's last reason.
func WaitFor(ctx context.Context, within time.Duration, what string, f func(ctx context.Context) (bool, error)) error {
	ctx, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	var last error
	for {
		ok, err := f(ctx)
		if ok && err == nil {
			return nil
		}
		if err != nil && (last == nil || ctx.Err() == nil) {
			last = err
		}
		select {
		case <-ctx.Done():
			if last != nil {
				return fmt.Errorf("waited %s for %s: %w", within, what, last)
			}
			return fmt.Errorf("waited %s for %s", within, what)
		case <-time.After(10 * time.Millisecond):
		}
	}
}
