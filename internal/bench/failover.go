package bench

import (
	"cmp"
	"context"
	"fmt"
	"syscall"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/load"
)

const (
	failoverNodes = 5
	failoverRate  = 200
	failoverIn    = 20 * time.Second
	failoverEach  = 100 * time.Millisecond // more, for each MiB of the state
)

// failover kills the owner of a component, node and all, until another answers; and the component's process alone, until it answers again.
func failover(ctx context.Context, cfg Config) (_ []Result, err error) {
	s, err := newStand(ctx, cfg, failoverNodes)
	defer func() { err = s.end(err) }()
	if err != nil {
		return nil, err
	}
	disk, err := s.fsync()
	if err != nil {
		return nil, err
	}
	if err := s.fill(ctx); err != nil {
		return nil, err
	}
	bare, err := bareStarts(ctx, cfg, "kv")
	if err != nil {
		return nil, err
	}
	began := time.Now()
	if err := s.start(failoverRate, 0.3, 16); err != nil {
		return nil, err
	}
	var nodes, crashes, ready []float64
	for run := range cfg.Runs {
		crash, err := s.crash(ctx)
		if err != nil {
			return nil, err
		}
		took, victim, err := s.lose(ctx)
		if err != nil {
			return nil, err
		}
		if err := victim.Start(ctx); err != nil {
			return nil, err
		}
		crashes, nodes, ready = append(crashes, ms(crash)), append(nodes, ms(took)), append(ready, ms(victim.Ready()))
		cfg.say("run %d of %d: component killed, answers again after %.1f ms; %s killed, answered elsewhere after %.1f ms", run+1, cfg.Runs, ms(crash), victim.Name, ms(took))
	}
	if _, err := s.settle(ctx); err != nil {
		return nil, err
	}
	ledger, err := s.verify(began)
	return append([]Result{
		disk,
		summary(fmt.Sprintf("node kill -9 → component with %s answers elsewhere, standby: %s", sizeText(cfg.size(stateSize)), cmp.Or(cfg.Standby, "cold")), "ms", nodes).against("start of the bare component process", bare),
		summary("component kill -9 → answers again on its node, longest time without an answer", "ms", crashes).against("start of the bare component process", bare),
		summary("node started again → ready", "ms", ready),
	}, ledger...), err
}

// lose kills the owner's node and returns after how long another one's first answer to a write came.
func (s *stand) lose(ctx context.Context) (time.Duration, *cluster.Node, error) {
	in, err := s.settle(ctx)
	if err != nil {
		return 0, nil, err
	}
	victim := s.cluster.Node(in.GetNode())
	if err := s.ready(ctx, in.GetInstance()); err != nil {
		return 0, nil, err
	}
	at, err := victim.Kill()
	if err != nil {
		return 0, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, failoverIn+time.Duration(s.cfg.Size>>20)*failoverEach)
	defer cancel()
	first, err := s.load.Await(ctx, load.FirstQuery{After: at, Component: component, NotNode: victim.Name, Writes: true})
	return first.Time.Sub(at), victim, err
}

// ready waits until the next owner is as ready as the benchmark wants it.
func (s *stand) ready(ctx context.Context, instance string) error {
	if s.cfg.Standby != "hot" {
		return nil
	}
	on := s.cluster.Alive()[0]
	return cluster.WaitFor(ctx, 5*time.Minute, "a standby that has all", func(ctx context.Context) (bool, error) {
		in, err := cluster.Instance(ctx, on, instance)
		if err != nil {
			return false, err
		}
		if in.GetStandbyNode() == "" || in.GetStandbyNode() != in.GetWouldRestartOn() || in.GetStandbyBehind() > 50 {
			return false, fmt.Errorf("it is on %q, %d behind; the next owner would be %q", in.GetStandbyNode(), in.GetStandbyBehind(), in.GetWouldRestartOn())
		}
		return true, nil
	})
}

// crash kills the component's process and returns the longest time that no write was answered in.
func (s *stand) crash(ctx context.Context) (time.Duration, error) {
	in, err := s.settle(ctx)
	if err != nil {
		return 0, err
	}
	at := time.Now()
	if err := syscall.Kill(int(in.GetPid()), syscall.SIGKILL); err != nil {
		return 0, err
	}
	if err := cluster.Sleep(ctx, time.Second); err != nil {
		return 0, err
	}
	if _, err := s.settle(ctx); err != nil {
		return 0, err
	}
	f, err := s.load.Figures(load.Window{From: at.Add(-50 * time.Millisecond), To: time.Now(), Component: component, Writes: true})
	return f.Gap, err
}
