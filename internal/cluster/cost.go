package cluster

import (
	"context"
	"time"
)

// Cost is what a node process takes, the mean over the nodes.
type Cost struct {
	RSS       float64   // MiB
	CPU       float64   // percent of a core
	Bytes     float64   // sent per second over its link
	EachBytes []float64 // a second, of each node in the order of Alive
	Counted   bool      // Bytes is known
}

// Idle measures the running nodes' processes, without their components', over a time.
func (c *Cluster) Idle(ctx context.Context, over time.Duration) (Cost, error) {
	type point struct {
		use  Usage
		sent uint64
	}
	var out Cost
	look := func(n *Node) (point, error) {
		use, err := UsageOf(n.PID())
		if err != nil {
			return point{}, err
		}
		sent, ok, err := c.Network.Sent(n.Index, n.PID())
		out.Counted = ok
		return point{use, sent}, err
	}
	before := map[string]point{}
	nodes := c.Alive()
	for _, n := range nodes {
		p, err := look(n)
		if err != nil {
			return out, err
		}
		before[n.Name] = p
	}
	if err := Sleep(ctx, over); err != nil {
		return out, err
	}
	for _, n := range nodes {
		p, err := look(n)
		if err != nil {
			return out, err
		}
		b := before[n.Name]
		span := p.use.Time.Sub(b.use.Time).Seconds()
		k := float64(len(nodes))
		out.RSS += float64(p.use.RSS) / (1 << 20) / k
		out.CPU += (p.use.CPU - b.use.CPU).Seconds() / span * 100 / k
		out.Bytes += float64(p.sent-b.sent) / span / k
		out.EachBytes = append(out.EachBytes, float64(p.sent-b.sent)/span)
	}
	return out, nil
}

// Sleep waits, unless ctx ends before.
func Sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
