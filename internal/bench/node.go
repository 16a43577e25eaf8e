package bench

import (
	"context"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
)

const (
	nodeNodes  = 3
	idleAfter  = 10 * time.Second
	idleSample = 5 * time.Second
)

// node measures a node that has nothing to do: its start, with the data of a member, and what it costs.
func node(ctx context.Context, cfg Config) (_ []Result, err error) {
	s, err := newStand(ctx, cfg, nodeNodes)
	defer func() { err = s.end(err) }()
	if err != nil {
		return nil, err
	}
	first := []float64{ms(s.cluster.Nodes[0].Ready())}
	var joined, ready []float64
	for _, n := range s.cluster.Nodes[1:] {
		joined = append(joined, ms(n.Ready()))
	}
	last := s.cluster.Nodes[nodeNodes-1]
	for range cfg.Runs {
		if err := last.Term(ctx); err != nil {
			return nil, err
		}
		if err := last.Start(ctx); err != nil {
			return nil, err
		}
		ready = append(ready, ms(last.Ready()))
		if err := s.cluster.AllAlive(ctx); err != nil {
			return nil, err
		}
	}
	cfg.say("started %d times, median %.0f ms", cfg.Runs, summary("", "", ready).Median)
	if err := cluster.Sleep(ctx, idleAfter); err != nil {
		return nil, err
	}
	var rss, cpu, sent []float64
	for range max(1, cfg.Runs/3) {
		c, err := s.cluster.Idle(ctx, idleSample)
		if err != nil {
			return nil, err
		}
		rss, cpu = append(rss, c.RSS), append(cpu, c.CPU)
		if c.Counted {
			sent = append(sent, c.Bytes)
		}
	}
	out := []Result{
		summary("start → ready, first node of a cluster", "ms", first),
		summary("start → ready, joining", "ms", joined),
		summary("start → ready, a member again", "ms", ready),
		summary("idle: resident memory of a node", "MiB", rss),
		summary("idle: CPU of a node", "% of a core", cpu),
	}
	if len(sent) > 0 {
		out = append(out, summary("idle: sent by a node", "B/s", sent))
	}
	return out, nil
}
