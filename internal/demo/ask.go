package demo

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/load"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// coppice runs a command of the binary against a node, as an operator does, and decodes what -o json prints.
func (d *demo) coppice(ctx context.Context, on *cluster.Node, out any, args ...string) error {
	cmd := d.cluster.Command(append(args, "-o", "json", "--api", on.API)...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("coppice %s: %w", args[0], err)
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() }) // it has ended, or ends now
	err := cmd.Wait()
	stop()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return errors.New(strings.TrimSpace(stderr.String()))
	}
	if err != nil {
		return fmt.Errorf("coppice %s: %w", args[0], err)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(stdout.Bytes(), out); err != nil {
		return fmt.Errorf("coppice %s: what it printed: %w", args[0], err)
	}
	return nil
}

// survivor is the first node that runs and is not the one named.
func (d *demo) survivor(not ...string) *cluster.Node {
	for _, n := range d.cluster.Alive() {
		if !slices.Contains(not, n.Name) {
			return n
		}
	}
	return d.cluster.Nodes[0]
}

// instances lists the instances of an application as a node sees them.
func (d *demo) instances(ctx context.Context, on *cluster.Node, app string) ([]*apiv1.Instance, error) {
	c, err := on.Client()
	if err != nil {
		return nil, err
	}
	res, err := c.Ps(ctx, &apiv1.PsRequest{Application: app})
	return res.GetInstances(), err
}

// store is the store's line of ps.
func (d *demo) store(ctx context.Context, on *cluster.Node) (*apiv1.Instance, error) {
	list, err := d.instances(ctx, on, "shop")
	if err != nil {
		return nil, err
	}
	for _, in := range list {
		if in.GetInstance() == storeInstance {
			return in, nil
		}
	}
	return nil, fmt.Errorf("%s is not in ps", storeInstance)
}

// calm waits until every instance runs and the store's epoch has settled: from then on the death of its owner is not held against it.
func (d *demo) calm(ctx context.Context, on *cluster.Node) error {
	c, err := on.Client()
	if err != nil {
		return err
	}
	return cluster.WaitFor(ctx, time.Minute, "every instance to run and the store to settle", func(ctx context.Context) (bool, error) {
		list, err := d.instances(ctx, on, "")
		if err != nil {
			return false, err
		}
		for _, in := range list {
			if in.GetState() != "running" {
				return false, fmt.Errorf("%s is %s on %s: %s", in.GetInstance(), in.GetState(), in.GetNode(), in.GetReason())
			}
		}
		res, err := c.Inspect(ctx, &apiv1.InspectRequest{Component: storeComponent})
		if err != nil {
			return false, err
		}
		for _, in := range res.GetInstances() {
			if !in.GetSettled() {
				return false, fmt.Errorf("%s has not settled in epoch %d", in.GetInstance(), in.GetEpoch())
			}
			d.owner, d.epoch, d.pid = in.GetNode(), in.GetEpoch(), int(in.GetPid())
		}
		return true, nil
	})
}

// allAlive waits until every running node sees every running node alive.
func (d *demo) allAlive(ctx context.Context) error {
	alive := d.cluster.Alive()
	return cluster.Each(alive, func(n *cluster.Node) error {
		c, err := n.Client()
		if err != nil {
			return err
		}
		return cluster.WaitFor(ctx, 30*time.Second, n.Name+" to see every node alive", func(ctx context.Context) (bool, error) {
			res, err := c.Nodes(ctx, &apiv1.NodesRequest{})
			if err != nil {
				return false, err
			}
			for _, want := range alive {
				if !slices.ContainsFunc(res.GetNodes(), func(x *apiv1.Node) bool { return x.GetName() == want.Name && x.GetState() == "alive" }) {
					return false, fmt.Errorf("it does not see %s alive", want.Name)
				}
			}
			return true, nil
		})
	})
}

// homed waits until the voters are the eligible nodes closest to /system/placement and the first of them is the coordinator, as every
// running node sees it, and returns them in order.
func (d *demo) homed(ctx context.Context) ([]string, error) {
	var order []string
	err := cluster.Each(d.cluster.Alive(), func(n *cluster.Node) error {
		return cluster.WaitFor(ctx, 30*time.Second, "the voters and the coordinator to be the first of `dht closest`, as "+n.Name+" sees it", func(ctx context.Context) (bool, error) {
			first, err := homedAt(ctx, n)
			if err == nil && n == d.cluster.Alive()[0] {
				order = first
			}
			return err == nil, err
		})
	})
	return order, err
}

func homedAt(ctx context.Context, n *cluster.Node) ([]string, error) {
	c, err := n.Client()
	if err != nil {
		return nil, err
	}
	st, err := c.Status(ctx, &apiv1.StatusRequest{})
	if err != nil {
		return nil, err
	}
	res, err := c.DhtClosest(ctx, &apiv1.DhtClosestRequest{Key: "/system/placement", Count: 250})
	if err != nil {
		return nil, err
	}
	var closest []string
	for _, x := range res.GetNodes() {
		if x.GetEligible() && x.GetState() == "alive" {
			closest = append(closest, x.GetName())
		}
	}
	voters := st.GetArbiter().GetVoters()
	want := 3
	if len(closest) >= 5 {
		want = 5
	}
	if len(voters) != want || len(closest) < want {
		return nil, fmt.Errorf("the voters are %v, of the eligible %v", voters, closest)
	}
	first := closest[:len(voters)]
	if !slices.Equal(slices.Sorted(slices.Values(voters)), slices.Sorted(slices.Values(first))) {
		return nil, fmt.Errorf("the voters are %v, the closest are %v", voters, closest)
	}
	if got := st.GetArbiter().GetCoordinator(); got != closest[0] {
		return nil, fmt.Errorf("the coordinator is %q, the closest is %s", got, closest[0])
	}
	return first, nil
}

// sinceStep are the load's figures from a time on, of the store, or of everything.
func (d *demo) since(from time.Time, component string) (load.Figures, error) {
	return d.load.Figures(load.Window{From: from, To: time.Now(), Component: component})
}

// noneFailed is an error when calls have failed since the last time it was asked.
func (d *demo) noneFailed() error {
	f, err := d.since(d.began, "")
	if err != nil {
		return err
	}
	before := d.failed
	d.failed = f.Failed + f.Refused
	if d.failed > before {
		return fmt.Errorf("%d calls were not answered or refused; the last: %s", d.failed-before, f.Why)
	}
	return nil
}

// checked pauses the load, reads everything back and compares it with the ledger, and goes on.
func (d *demo) checked() (*load.Report, error) {
	if err := d.load.Pause(); err != nil {
		return nil, err
	}
	rep, err := d.load.Verify()
	if err != nil {
		return nil, err
	}
	d.figure("answered_writes", rep.Answered)
	d.figure("missing", rep.Missing)
	d.figure("doubled", rep.Doubled)
	if !rep.Good() {
		return rep, fmt.Errorf("the ledger has %d answered writes, %d were found, %d are missing, %d there twice: %s",
			rep.Answered, rep.Found, rep.Missing, rep.Doubled, strings.Join(rep.Examples, "; "))
	}
	return rep, d.load.Rate(d.Rate)
}

func msOf(x time.Duration) string {
	switch ms := float64(x.Microseconds()) / 1000; {
	case ms < 10:
		return fmt.Sprintf("%.1f ms", ms)
	default:
		return fmt.Sprintf("%.0f ms", ms)
	}
}

func msText(ms float64) string { return msOf(time.Duration(ms * float64(time.Millisecond))) }
