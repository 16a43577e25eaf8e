package demo

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/load"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// coppice runs a command of the binary against a node, as an operator does, and decodes what -o json prints.
func (d *demo) coppice(ctx context.Context, on *cluster.Node, out any, args ...string) error {
	return d.cluster.Coppice(ctx, on, out, args...)
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

// store is the store's line of ps.
func (d *demo) store(ctx context.Context, on *cluster.Node) (*apiv1.Instance, error) {
	return cluster.Instance(ctx, on, storeInstance)
}

// calm waits until every instance runs and the store's epoch has settled: from then on the death of its owner is not held against it.
func (d *demo) calm(ctx context.Context, on *cluster.Node) error {
	in, err := cluster.Calm(ctx, on, storeComponent)
	if err == nil {
		d.owner, d.epoch, d.pid = in.GetNode(), in.GetEpoch(), int(in.GetPid())
	}
	return err
}

// allAlive waits until every running node sees every running node alive.
func (d *demo) allAlive(ctx context.Context) error { return d.cluster.AllAlive(ctx) }

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

// expendable waits until every running node says that there are three voters, so that any one may die.
func (d *demo) expendable(ctx context.Context) error {
	return cluster.Each(d.cluster.Alive(), func(n *cluster.Node) error {
		return cluster.WaitFor(ctx, 30*time.Second, "three voters, as "+n.Name+" sees it", func(ctx context.Context) (bool, error) {
			c, err := n.Client()
			if err != nil {
				return false, err
			}
			st, err := c.Status(ctx, &apiv1.StatusRequest{})
			return err == nil && len(st.GetArbiter().GetVoters()) >= 3, err
		})
	})
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

// since are the load's figures from a time on, of the store, or of everything.
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
