package bench

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

const (
	trafficNodes = 25
	// trafficAfter is how long nodes settle: newcomers may vote after a minute, and then the voters change one by one.
	trafficAfter  = 90 * time.Second
	trafficSample = 20 * time.Second
	// What a write costs on a quiet link besides its bytes, by count: a frame of yamux (12), a record of TLS 1.3 (5 + 16 + 1), and the headers of
	// a segment (Ethernet 14, IPv4 20, TCP with time stamps 32).
	perWrite = 12 + 22 + perSegment
	// perSegment is also what an acknowledgement without bytes costs.
	perSegment = 14 + 20 + 32
)

// traffic measures what nodes send while nothing happens, by cause, in both profiles.
func traffic(ctx context.Context, cfg Config) ([]Result, error) {
	var out []Result
	profiles := []string{"lan", "wan"}
	if cfg.Profile != "" {
		profiles = []string{cfg.Profile}
	}
	for _, profile := range profiles {
		res, err := realTraffic(ctx, cfg, profile)
		out = append(out, res...)
		if err != nil {
			return out, fmt.Errorf("profile %s: %w", profile, err)
		}
	}
	return out, nil
}

func realTraffic(ctx context.Context, cfg Config, profile string) (_ []Result, err error) {
	s, err := newStandOf(ctx, cfg, trafficNodes, "--profile", profile)
	defer func() { err = s.end(err) }()
	if err != nil {
		return nil, err
	}
	cfg.say("profile %s: %d nodes settle for %s", profile, trafficNodes, trafficAfter)
	if err := cluster.Sleep(ctx, trafficAfter); err != nil {
		return nil, err
	}
	before, err := s.traffic(ctx)
	if err != nil {
		return nil, err
	}
	begun := time.Now()
	cost, err := s.cluster.Idle(ctx, trafficSample)
	if err != nil {
		return nil, err
	}
	after, err := s.traffic(ctx)
	if err != nil {
		return nil, err
	}
	leads, err := s.leaderIndex(ctx)
	if err != nil {
		return nil, err
	}
	what := fmt.Sprintf("%s, %d nodes", profile, trafficNodes)
	leader := s.cluster.Nodes[leads].Name
	why := causes(what, before, after, time.Since(begun), "")
	whyLeader := causes(profile+", the leader", before, after, time.Since(begun), leader)
	var out []Result
	if cost.Counted {
		out = append(out,
			mean(what+": sent by a node, all framing included, mean", "B/s", cost.EachBytes),
			summary(what+": sent by a node, all framing included", "B/s", cost.EachBytes),
			summary(profile+", the leader: sent, all framing included", "B/s", []float64{cost.EachBytes[leads]}))
		why = append(why, rest(what, cost.EachBytes, why))
		whyLeader = append(whyLeader, rest(profile+", the leader", cost.EachBytes[leads:leads+1], whyLeader))
	}
	out = append(append(out, why...), whyLeader...)
	return append(out, mean(what+": CPU of a node, mean", "% of a core", []float64{cost.CPU})), nil
}

// rest is what of all that was sent no stream is the cause of: acknowledgements of TCP above all, the multiplexer's own questions, handshakes.
func rest(what string, sent []float64, why []Result) Result {
	r := mean(what+": the rest: acknowledgements of TCP, the multiplexer", "B/s", sent)
	for _, c := range why {
		r.Median -= c.Median
	}
	r.Median = round(r.Median)
	r.P99, r.Min, r.Max = r.Median, r.Median, r.Median
	return r
}

// mean is a figure whose median is the mean of the samples.
func mean(name, unit string, samples []float64) Result {
	r := summary(name, unit, samples)
	sum := 0.0
	for _, x := range samples {
		sum += x
	}
	if len(samples) > 0 {
		r.Median = round(sum / float64(len(samples)))
	}
	return r
}

// leaderIndex is the place among the nodes of the one that leads the arbiter.
func (s *stand) leaderIndex(ctx context.Context) (at int, err error) {
	err = cluster.WaitFor(ctx, 30*time.Second, "a leader", func(ctx context.Context) (bool, error) {
		c, err := s.cluster.Nodes[0].Client()
		if err != nil {
			return false, err
		}
		st, err := c.Status(ctx, &apiv1.StatusRequest{})
		at = slices.Index(s.cluster.Nodes, s.cluster.Node(st.GetArbiter().GetLeader()))
		return err == nil && at >= 0, err
	})
	return at, err
}

// causes tells for each protocol what a node sent on average between two looks, framing by count included, the costliest first; with only, what
// that node sent.
func causes(what string, before, after map[string]map[string]flow, span time.Duration, only string) []Result {
	all := map[string]bool{}
	for _, nodes := range after {
		for node := range nodes {
			if only == "" || node == only {
				all[node] = true
			}
		}
	}
	var out []Result
	for protocol, nodes := range after {
		var sent []float64
		bytes, writes := 0.0, 0.0
		for node := range all { // some do not speak it
			f, b := nodes[node], before[protocol][node]
			sent = append(sent, (f.bytes-b.bytes+(f.writes-b.writes)*perWrite+(f.heard-b.heard)*perSegment)/span.Seconds())
			bytes += (f.bytes - b.bytes) / span.Seconds() / float64(len(all))
			writes += (f.writes - b.writes) / span.Seconds() / float64(len(all))
		}
		r := mean(fmt.Sprintf("%s: of that %s: %.0f B in %.2f writes a second, with framing", what, strings.TrimPrefix(protocol, "/coppice/"), bytes, writes), "B/s", sent)
		if r.Max > 0 {
			out = append(out, r)
		}
	}
	slices.SortFunc(out, func(a, b Result) int { return cmp.Compare(b.Median, a.Median) })
	return out
}
