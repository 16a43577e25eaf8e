package bench

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

const (
	ownershipNodes = 5
	ownershipIn    = 20 * time.Second
	// apart is the time between two deaths of one node: one that dies more often is quarantined, which is not what is measured.
	apart = 21 * time.Second
)

// ownership kills the arbiter's leader until something is committed again, and a node, by kill -9 and by taking its link away, until the
// others call it dead; and measures how long the claims after a mass failure take.
func ownership(ctx context.Context, cfg Config) (_ []Result, err error) {
	s, err := newStand(ctx, cfg, ownershipNodes)
	defer func() { err = s.end(err) }()
	if err != nil {
		return nil, err
	}
	died := map[*cluster.Node]time.Time{}
	var calm, leader, killed, dark []float64
	for run := range cfg.Runs {
		if err := s.cluster.AllAlive(ctx); err != nil {
			return nil, err
		}
		victim, err := s.leader(ctx)
		if err != nil {
			return nil, err
		}
		if err := cluster.Sleep(ctx, time.Until(died[victim].Add(apart))); err != nil {
			return nil, err
		}
		other := s.notNode(victim)
		before, err := commit(ctx, other, time.Now())
		if err != nil {
			return nil, err
		}
		at, err := victim.Kill()
		if err != nil {
			return nil, err
		}
		died[victim] = at
		next, err := commit(ctx, other, at)
		if err != nil {
			return nil, fmt.Errorf("a commit after the death of the leader %s: %w", victim.Name, err)
		}
		gone, err := dead(ctx, other, victim, at)
		if err != nil {
			return nil, err
		}
		if err := victim.Start(ctx); err != nil {
			return nil, err
		}
		calm, leader, killed = append(calm, ms(before)), append(leader, ms(next)), append(killed, ms(gone))
		said := fmt.Sprintf("run %d of %d: leader %s killed, next commit after %.1f ms, called dead after %.1f ms", run+1, cfg.Runs, victim.Name, ms(next), ms(gone))
		if err := s.cluster.AllAlive(ctx); err != nil {
			return nil, err
		}
		if silent, err := s.blackhole(ctx, other); err == nil {
			dark = append(dark, ms(silent))
			said += fmt.Sprintf("; link of %s cut, called dead after %.0f ms", other.Name, ms(silent))
		} else if !errors.Is(err, cluster.ErrNoCut) {
			return nil, err
		}
		cfg.say("%s", said)
	}
	out := []Result{
		summary("leader killed → next commit", "ms", leader).against("a commit while the leader lives", calm),
		summary("kill -9 → called dead", "ms", killed),
	}
	if len(dark) > 0 {
		out = append(out, summary("link cut → called dead", "ms", dark))
	}
	mass, err := claims(ctx, cfg, claimCount)
	if err != nil {
		return out, err
	}
	return append(out, mass), nil
}

// leader is the node that leads the arbiter.
func (s *stand) leader(ctx context.Context) (*cluster.Node, error) {
	var leads *cluster.Node
	err := cluster.WaitFor(ctx, 30*time.Second, "a leader with five voters", func(ctx context.Context) (bool, error) {
		c, err := s.cluster.Nodes[0].Client()
		if err != nil {
			return false, err
		}
		st, err := c.Status(ctx, &apiv1.StatusRequest{})
		leads = s.cluster.Node(st.GetArbiter().GetLeader())
		return err == nil && leads != nil && len(st.GetArbiter().GetVoters()) == ownershipNodes, err
	})
	return leads, err
}

func (s *stand) notNode(n *cluster.Node) *cluster.Node {
	for _, o := range s.cluster.Nodes {
		if o != n {
			return o
		}
	}
	return nil
}

// commit has something small committed and returns how long after a time that was done.
func commit(ctx context.Context, on *cluster.Node, since time.Time) (time.Duration, error) {
	c, err := on.Client()
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, ownershipIn)
	defer cancel()
	_, err = c.Token(ctx, &apiv1.TokenRequest{Uses: 1, TtlMs: 1000})
	return time.Since(since), err
}

// dead waits until a node calls another one dead and returns how long after a time that was.
func dead(ctx context.Context, on, victim *cluster.Node, since time.Time) (time.Duration, error) {
	c, err := on.Client()
	if err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, ownershipIn)
	defer cancel()
	for {
		res, err := c.Nodes(ctx, &apiv1.NodesRequest{})
		if err != nil {
			return 0, fmt.Errorf("%s does not call %s dead: %w", on.Name, victim.Name, err)
		}
		for _, n := range res.GetNodes() {
			if n.GetName() == victim.Name && n.GetState() == "dead" {
				return time.Since(since), nil
			}
		}
		if err := cluster.Sleep(ctx, 2*time.Millisecond); err != nil {
			return 0, fmt.Errorf("%s does not call %s dead: %w", on.Name, victim.Name, err)
		}
	}
}

// blackhole takes a node's link away until another one calls it dead, and gives it back.
func (s *stand) blackhole(ctx context.Context, victim *cluster.Node) (took time.Duration, err error) {
	at := time.Now()
	if err := victim.Cut(); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, victim.Heal()) }()
	return dead(ctx, s.notNode(victim), victim, at)
}
