package bench

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

const (
	nodeNodes  = 5
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
	before, err := s.traffic(ctx)
	if err != nil {
		return nil, err
	}
	begun := time.Now()
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
		out = append(out, summary("idle: sent by a node, all framing included", "B/s", sent))
	}
	after, err := s.traffic(ctx)
	if err != nil {
		return out, err
	}
	return append(out, byCause(before, after, time.Since(begun))...), nil
}

// flow is what a protocol has moved on a node.
type flow struct {
	bytes, writes float64
	heard         float64 // writes of others to it; not known of real nodes, whose acknowledgements are counted with the rest
}

// traffic asks each node what its protocols have sent: protocol, then node.
func (s *stand) traffic(ctx context.Context) (map[string]map[string]flow, error) {
	out := map[string]map[string]flow{}
	for _, n := range s.cluster.Nodes {
		c, err := n.Client()
		if err != nil {
			return nil, err
		}
		res, err := c.Query(ctx, &apiv1.QueryRequest{Sql: "select protocol, sent, writes from traffic"})
		if err != nil {
			return nil, fmt.Errorf("traffic of %s: %w", n.Name, err)
		}
		for _, r := range res.GetRows() {
			v := r.GetValues()
			if out[v[0].GetText()] == nil {
				out[v[0].GetText()] = map[string]flow{}
			}
			out[v[0].GetText()][n.Name] = flow{bytes: float64(v[1].GetInteger()), writes: float64(v[2].GetInteger())}
		}
	}
	return out, nil
}

// byCause tells for each protocol what the nodes sent between two looks, the busiest protocols first. A sample is a node.
func byCause(before, after map[string]map[string]flow, span time.Duration) []Result {
	var out []Result
	for protocol, nodes := range after {
		var sent, writes []float64
		for node, f := range nodes {
			b := before[protocol][node]
			sent, writes = append(sent, (f.bytes-b.bytes)/span.Seconds()), append(writes, (f.writes-b.writes)/span.Seconds())
		}
		r := summary(fmt.Sprintf("idle: sent for %s, in %.1f writes a second, without framing", protocol, summary("", "", writes).Median), "B/s", sent)
		if r.Max > 0 {
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b Result) int { return cmp.Compare(b.Median, a.Median) })
	return out
}
