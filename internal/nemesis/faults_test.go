package nemesis

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// fault does something bad and mends it, except for what mends itself. It says what it did.
type fault struct {
	name string
	do   func(ctx context.Context, b *bed) (string, error)
}

// errSkipped is wrapped by a fault that cannot be done here.
var errSkipped = errors.New("not possible here")

// faults in the order in which a seed chooses from them.
var faults = []fault{
	{"kill", func(ctx context.Context, b *bed) (string, error) { return b.kill(ctx, b.any()) }},
	{"kill-leader", func(ctx context.Context, b *bed) (string, error) {
		n, err := b.leader(ctx)
		if err != nil {
			return "", err
		}
		return b.kill(ctx, n)
	}},
	{"kill-owner", func(ctx context.Context, b *bed) (string, error) {
		n, _, err := b.owner(ctx)
		if err != nil {
			return "", err
		}
		return b.kill(ctx, n)
	}},
	{"kill-half", func(ctx context.Context, b *bed) (string, error) { return b.kill(ctx, b.some(len(b.c.Nodes)/2)...) }},
	{"pause", pause},
	{"pause-component", pauseComponent},
	{"crash-component", crashComponent},
	{"cut", cut},
	{"flap", flap},
	{"one-way", oneWay},
	{"reset", reset},
	{"terminate", func(ctx context.Context, b *bed) (string, error) { return b.terminate(ctx, b.any()) }},
	{"roll", roll},
	{"starve", starve},
	{"wipe", wipe},
	{"bridge", bridge},
	{"slow-disk", slowDisk},
	{"failing-log", failingLog},
	{"failing-disk", failingDisk},
	{"full-disk", fullDisk},
	{"roll-back", rollBack},
	{"clocks", clocks},
	{"boot-1970", boot1970},
	{"kill-watchers", killWatchers},
}

func names(nodes []*cluster.Node) string {
	var out []string
	for _, n := range nodes {
		out = append(out, n.Name)
	}
	return strings.Join(out, ", ")
}

func (b *bed) any() *cluster.Node { return b.c.Nodes[b.rng.IntN(len(b.c.Nodes))] }

// some are n different nodes.
func (b *bed) some(n int) []*cluster.Node {
	var out []*cluster.Node
	for _, i := range b.rng.Perm(len(b.c.Nodes))[:n] {
		out = append(out, b.c.Nodes[i])
	}
	return out
}

// between is a time between two others.
func (b *bed) between(least, most time.Duration) time.Duration {
	return least + time.Duration(b.rng.Int64N(int64(most-least)))
}

func (b *bed) leader(ctx context.Context) (*cluster.Node, error) {
	c, err := b.c.Nodes[0].Client()
	if err != nil {
		return nil, err
	}
	st, err := c.Status(ctx, &apiv1.StatusRequest{})
	if err != nil {
		return nil, err
	}
	if n := b.c.Node(st.GetArbiter().GetLeader()); n != nil {
		return n, nil
	}
	return b.any(), nil
}

// owner is the node of one of the components, with the component's process.
func (b *bed) owner(ctx context.Context) (*cluster.Node, int, error) {
	component := components[b.rng.IntN(len(components))]
	in, err := cluster.Calm(ctx, b.c.Nodes[0], component)
	if err != nil {
		return nil, 0, err
	}
	return b.c.Node(in.GetNode()), int(in.GetPid()), nil
}

// kill is kill -9 of nodes and what they run, all at once. They are started again after a while.
func (b *bed) kill(ctx context.Context, nodes ...*cluster.Node) (string, error) {
	for _, n := range nodes {
		if _, err := n.Kill(); err != nil {
			return "", err
		}
	}
	down := b.between(0, 4*time.Second)
	if err := cluster.Sleep(ctx, down); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s killed, started again after %s", names(nodes), down.Round(time.Millisecond)), cluster.Each(nodes, func(n *cluster.Node) error { return n.Start(ctx) })
}

// killWatchers kills a node and all that watch it, at once: nobody is left who would miss its heartbeats, and others have to find out.
func killWatchers(ctx context.Context, b *bed) (string, error) {
	n := b.any()
	var watchers []*cluster.Node
	if err := cluster.WaitFor(ctx, back, n.Name+" to be watched", func(ctx context.Context) (bool, error) {
		c, err := n.Client()
		if err != nil {
			return false, err
		}
		res, err := c.Nodes(ctx, &apiv1.NodesRequest{Node: n.Name}) // coppice nodes NODE
		if err != nil {
			return false, err
		}
		watchers = nil
		for _, it := range res.GetNodes() {
			for _, name := range it.GetWatchers() {
				if w := b.c.Node(name); w != nil && it.GetState() == "alive" {
					watchers = append(watchers, w)
				}
			}
		}
		return len(watchers) > 0, nil
	}); err != nil {
		return "", err
	}
	what, err := b.kill(ctx, append(watchers, n)...)
	return fmt.Sprintf("%s and its watchers: %s", n.Name, what), err
}

func (b *bed) terminate(ctx context.Context, n *cluster.Node) (string, error) {
	if err := n.Term(ctx); err != nil {
		return "", err
	}
	down := b.between(0, 2*time.Second)
	if err := cluster.Sleep(ctx, down); err != nil {
		return "", err
	}
	return fmt.Sprintf("%s terminated, started again after %s", n.Name, down.Round(time.Millisecond)), n.Start(ctx)
}

func roll(ctx context.Context, b *bed) (string, error) {
	for _, n := range b.c.Nodes {
		if _, err := b.terminate(ctx, n); err != nil {
			return "", err
		}
		if err := b.c.AllAlive(ctx); err != nil {
			return "", err
		}
	}
	return "every node terminated and started again, one after the other", nil
}

// pause is SIGSTOP of a node and what it runs: a machine that stands still.
func pause(ctx context.Context, b *bed) (string, error) {
	n := b.any()
	if _, err := n.Stop(); err != nil {
		return "", err
	}
	held := b.between(time.Second, b.longest)
	err := cluster.Sleep(ctx, held)
	if _, cont := n.Cont(); cont != nil {
		return "", errors.Join(err, cont)
	}
	return fmt.Sprintf("%s stood still for %s", n.Name, held.Round(time.Millisecond)), err
}

func pauseComponent(ctx context.Context, b *bed) (string, error) {
	n, pid, err := b.owner(ctx)
	if err != nil {
		return "", err
	}
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		return "", fmt.Errorf("suspend process %d of %s: %w", pid, n.Name, err)
	}
	held := b.between(500*time.Millisecond, b.longest)
	err = cluster.Sleep(ctx, held)
	if cont := syscall.Kill(pid, syscall.SIGCONT); cont != nil && !errors.Is(cont, syscall.ESRCH) { // its node may have given it up
		return "", errors.Join(err, cont)
	}
	return fmt.Sprintf("a component's process on %s stood still for %s", n.Name, held.Round(time.Millisecond)), err
}

func crashComponent(ctx context.Context, b *bed) (string, error) {
	n, pid, err := b.owner(ctx)
	if err != nil {
		return "", err
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return "", fmt.Errorf("kill process %d of %s: %w", pid, n.Name, err)
	}
	return "a component's process on " + n.Name + " killed", nil
}

func cut(ctx context.Context, b *bed) (string, error) {
	nodes := b.some(1 + b.rng.IntN(len(b.c.Nodes)/2))
	for _, n := range nodes {
		if err := n.Cut(); err != nil {
			return "", err
		}
	}
	held := b.between(500*time.Millisecond, b.longest)
	err := cluster.Sleep(ctx, held)
	for _, n := range nodes {
		err = errors.Join(err, n.Heal())
	}
	return fmt.Sprintf("%s cut off, each alone, for %s", names(nodes), held.Round(time.Millisecond)), err
}

func flap(ctx context.Context, b *bed) (string, error) {
	n, times := b.any(), 3+b.rng.IntN(4)
	for range times {
		if err := n.Cut(); err != nil {
			return "", err
		}
		err := cluster.Sleep(ctx, b.between(100*time.Millisecond, 2*time.Second))
		if err = errors.Join(err, n.Heal()); err != nil {
			return "", err
		}
		if err := cluster.Sleep(ctx, b.between(100*time.Millisecond, 2*time.Second)); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("the link of %s went %d times", n.Name, times), nil
}

func oneWay(ctx context.Context, b *bed) (string, error) {
	deaf := b.any()
	to := slices.DeleteFunc(b.some(1+b.rng.IntN(len(b.c.Nodes)-1)), func(n *cluster.Node) bool { return n == deaf })
	for _, n := range to {
		if err := deaf.Deaf(n, false); err != nil {
			return "", err
		}
	}
	held := b.between(500*time.Millisecond, b.longest)
	err := cluster.Sleep(ctx, held)
	return fmt.Sprintf("%s heard nothing of %s for %s", deaf.Name, names(to), held.Round(time.Millisecond)), errors.Join(err, deaf.Hear())
}

func reset(ctx context.Context, b *bed) (string, error) {
	pair := b.some(2)
	if err := pair[0].Deaf(pair[1], true); err != nil {
		return "", err
	}
	err := cluster.Sleep(ctx, b.between(50*time.Millisecond, 500*time.Millisecond))
	return fmt.Sprintf("connections from %s to %s were reset", pair[1].Name, pair[0].Name), errors.Join(err, pair[0].Hear())
}

// starve has other processes take the CPUs, several for each.
func starve(ctx context.Context, b *bed) (string, error) {
	held := b.between(time.Second, b.longest)
	hogs := 4 * runtime.NumCPU()
	var cmds []*exec.Cmd
	var errs []error
	for range hogs {
		cmd := exec.Command("sh", "-c", "while :; do :; done")
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			errs = append(errs, err)
			break
		}
		cmds = append(cmds, cmd)
	}
	errs = append(errs, cluster.Sleep(ctx, held))
	for _, cmd := range cmds {
		errs = append(errs, cmd.Process.Kill())
		_ = cmd.Wait() // killed, as it should be
	}
	return fmt.Sprintf("%d other processes took the CPUs for %s", hogs, held.Round(time.Millisecond)), errors.Join(errs...)
}

// wipe has a node lose its disk. It comes back as a new one.
func wipe(ctx context.Context, b *bed) (string, error) {
	n := b.any()
	if _, err := n.Kill(); err != nil {
		return "", err
	}
	return n.Name + " lost its disk and joined as a new node", b.asNew(ctx, n, b.other(n))
}
