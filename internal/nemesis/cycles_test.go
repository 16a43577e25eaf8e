package nemesis

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/cluster/clustertest"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

// longCycles is how often something is killed in the long run, unless COPPICE_CYCLES says so.
const longCycles = 1000

// midway is what is under way when something is killed. begin starts it, on what runs on a node; what it comes to is no matter. within is when the kill comes.
type midway struct {
	name   string
	within time.Duration
	begin  func(ctx context.Context, b *bed, component string, owner *cluster.Node) (started, error)
}

// started is what a midway has done: who else is in it, what it comes to, and what is to be undone.
type started struct {
	other *cluster.Node // nil: nobody
	down  *cluster.Node // killed already; nil: nobody
	over  <-chan error
	after func(ctx context.Context) error
}

// both are the components with durable: each-call, and the versions that they are swapped between.
var (
	both     = []string{"data/kv", "bank/bank"}
	versions = []string{"1.0.0", "1.1.0"}
)

var midways = []midway{
	{"nothing", 50 * time.Millisecond, func(context.Context, *bed, string, *cluster.Node) (started, error) { return started{}, nil }},
	{"a checkpoint", 60 * time.Millisecond, func(ctx context.Context, b *bed, component string, owner *cluster.Node) (started, error) {
		return b.beside(ctx, owner, func(ctx context.Context, c apiv1connect.ControlClient) error {
			_, err := c.Checkpoint(ctx, &apiv1.CheckpointRequest{Component: component})
			return err
		})
	}},
	{"a swap", 150 * time.Millisecond, func(ctx context.Context, b *bed, component string, owner *cluster.Node) (started, error) {
		in, err := cluster.Calm(ctx, b.c.Nodes[0], component)
		if err != nil {
			return started{}, err
		}
		to := versions[1-max(slices.Index(versions, in.GetVersion()), 0)]
		return b.beside(ctx, owner, func(ctx context.Context, c apiv1connect.ControlClient) error {
			_, err := c.Swap(ctx, &apiv1.SwapRequest{Component: component, Version: to})
			return err
		})
	}},
	{"a move", 150 * time.Millisecond, func(ctx context.Context, b *bed, component string, owner *cluster.Node) (started, error) {
		to := b.except(owner)
		s, err := b.beside(ctx, owner, func(ctx context.Context, c apiv1connect.ControlClient) error {
			_, err := c.Move(ctx, &apiv1.MoveRequest{Component: component, Node: to.Name})
			return err
		})
		s.other = to
		s.after = func(ctx context.Context) error {
			c, err := b.c.Nodes[0].Client()
			if err == nil {
				_, err = c.Unpin(ctx, &apiv1.UnpinRequest{Component: component})
			}
			return err
		}
		return s, err
	}},
	{"a repair", 3 * time.Second, func(ctx context.Context, b *bed, component string, owner *cluster.Node) (started, error) {
		in, err := cluster.Calm(ctx, b.c.Nodes[0], component)
		if err != nil {
			return started{}, err
		}
		for _, name := range in.GetCheckpoint().GetReplicas() {
			if n := b.c.Node(name); n != nil && n != owner {
				_, err := n.Kill()
				return started{down: n}, err
			}
		}
		return started{}, fmt.Errorf("the checkpoint of %s lies on %v only", component, in.GetCheckpoint().GetReplicas())
	}},
}

// beside asks a node for something and does not wait for it.
func (b *bed) beside(ctx context.Context, n *cluster.Node, ask func(ctx context.Context, c apiv1connect.ControlClient) error) (started, error) {
	c, err := n.Client()
	if err != nil {
		return started{}, err
	}
	over := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(ctx, back)
		defer cancel()
		over <- ask(ctx, c)
	}()
	return started{over: over}, nil
}

// except is a node that is not this one.
func (b *bed) except(not *cluster.Node) *cluster.Node {
	for {
		if n := b.any(); n != not {
			return n
		}
	}
}

// cycle kills with kill -9 in the middle of something: the owner of a component with its node, its process alone, who else is in what is under way, or any node.
func (b *bed) cycle(ctx context.Context, m midway, victim string) (string, error) {
	component := both[b.rng.IntN(len(both))]
	in, err := cluster.Calm(ctx, b.c.Nodes[0], component)
	if err != nil {
		return "", err
	}
	owner := b.c.Node(in.GetNode())
	s, err := m.begin(ctx, b, component, owner)
	if err != nil {
		return "", fmt.Errorf("begin %s of %s: %w", m.name, component, err)
	}
	after := time.Duration(b.rng.Int64N(int64(m.within)))
	if err := cluster.Sleep(ctx, after); err != nil {
		return "", err
	}
	down := []*cluster.Node{}
	if s.down != nil {
		down = append(down, s.down)
	}
	what := component + "'s process"
	switch n := map[string]*cluster.Node{"owner": owner, "other": s.other, "any": b.any()}[victim]; {
	case victim == "process", n == nil, slices.Contains(down, n):
		if err := syscall.Kill(int(in.GetPid()), syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) { // a swap may have ended it
			return "", fmt.Errorf("kill process %d of %s: %w", in.GetPid(), component, err)
		}
	default:
		what = n.Name
		if n == owner {
			what += ", which owns " + component
		}
		if _, err := n.Kill(); err != nil {
			return "", err
		}
		down = append(down, n)
	}
	if err := cluster.Sleep(ctx, b.between(0, time.Second)); err != nil {
		return "", err
	}
	if err := cluster.Each(down, func(n *cluster.Node) error { return n.Start(ctx) }); err != nil {
		return "", err
	}
	came := "nothing was asked for"
	if s.over != nil {
		select {
		case err := <-s.over:
			came = fmt.Sprintf("it came to: %v", err)
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
	if s.after != nil {
		if err := cluster.WaitFor(ctx, back, "the move to be forgotten", func(ctx context.Context) (bool, error) { err := s.after(ctx); return err == nil, err }); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("%s killed %s into %s of %s; %s", what, after.Round(time.Millisecond), m.name, component, came), nil
}

// cycles kills n times. The first ones are those of first, then chance decides.
func cycles(t *testing.T, nodes, n int, first []struct{ midway, victim string }) {
	b := newBed(t, nodes, time.Second)
	bin := filepath.Dir(clustertest.Binary(t))
	for _, name := range []string{"kv", "bank"} {
		must(t, b.c.Coppice(t.Context(), b.c.Nodes[0], nil, "registry", "push", filepath.Join(bin, "demo", name+"-"+versions[1])))
	}
	// The bank's next owner stands by with its state; the other's starts cold.
	path := filepath.Join(b.c.Dir, "hot.yaml")
	must(t, os.WriteFile(path, fmt.Appendf(nil, manifest+"    state: {standby: hot}\n", "bank", "bank", filepath.Join(bin, "components", "bank"), "each-call", "safe"), 0o600))
	must(t, b.c.Coppice(t.Context(), b.c.Nodes[0], nil, "deploy", path, "--wait", "--timeout", "60s"))
	victims := []string{"owner", "process", "other", "any"}
	b.run(func(k int) *fault {
		if k >= n {
			return nil
		}
		m, victim := midways[b.rng.IntN(len(midways))], victims[b.rng.IntN(len(victims))]
		if k < len(first) {
			m = midways[slices.IndexFunc(midways, func(m midway) bool { return m.name == first[k].midway })]
			victim = first[k].victim
		}
		return &fault{m.name + ", " + victim, func(ctx context.Context, b *bed) (string, error) { return b.cycle(ctx, m, victim) }}
	})
}

// TestCycles is the short form of TestLongCycles: one kill in the middle of each.
func TestCycles(t *testing.T) {
	if testing.Short() {
		t.Skip("it starts processes")
	}
	first := []struct{ midway, victim string }{{"a checkpoint", "process"}, {"a swap", "process"}, {"a move", "other"}}
	cycles(t, 3, len(first), first)
}

// TestLongCycles kills a thousand times, or COPPICE_CYCLES times: nodes and components, at random, also in the middle of checkpoints, swaps, moves and repairs. No
// acknowledged write is lost or there twice, and the history is linearizable.
func TestLongCycles(t *testing.T) {
	if os.Getenv("COPPICE_LONG") == "" {
		t.Skip("set COPPICE_LONG=1, or make test-long")
	}
	n := longCycles
	if text := os.Getenv("COPPICE_CYCLES"); text != "" {
		var err error
		n, err = strconv.Atoi(text)
		must(t, err)
	}
	cycles(t, 5, n, nil)
}
