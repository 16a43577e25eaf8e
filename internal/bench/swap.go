package bench

import (
	"context"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/load"
)

const (
	swapNodes = 3
	swapRate  = 2000
	swapReads = 0.95 // 100 writes a second: each is committed by itself (durable: each-call)
)

// swap replaces a component by another version and back under load. The baseline is what one does without a hot swap: stop it and start
// it again, with its state.
func swap(ctx context.Context, cfg Config) (_ []Result, err error) {
	s, err := newStand(ctx, cfg, swapNodes)
	defer func() { err = s.end(err) }()
	if err != nil {
		return nil, err
	}
	if err := s.fill(ctx); err != nil {
		return nil, err
	}
	n1 := s.cluster.Nodes[0]
	if err := s.cluster.Coppice(ctx, n1, nil, "registry", "push", cfg.file("demo/kv-1.1.0")); err != nil {
		return nil, err
	}
	began := time.Now()
	if err := s.start(swapRate, swapReads, 32); err != nil {
		return nil, err
	}
	if err := cluster.Sleep(ctx, 3*time.Second); err != nil {
		return nil, err
	}
	calm, err := s.load.Figures(load.Window{From: began.Add(time.Second), To: time.Now()})
	if err != nil {
		return nil, err
	}
	var pauses, gaps, took, held []float64
	for run := range cfg.Runs {
		var res struct {
			Pause float64 `json:"pause_ms"`
			Took  float64 `json:"took_ms"`
			Held  float64 `json:"calls_held"`
		}
		gap, err := s.during(ctx, func() error {
			return s.cluster.Coppice(ctx, n1, &res, "swap", component+[]string{"@1.1", "@1.0"}[run%2])
		})
		if err != nil {
			return nil, err
		}
		pauses, gaps, took, held = append(pauses, res.Pause), append(gaps, ms(gap)), append(took, res.Took), append(held, res.Held)
		cfg.say("run %d of %d: paused %.1f ms, longest time without an answer %.1f ms", run+1, cfg.Runs, res.Pause, ms(gap))
	}
	var restarts []float64
	for range min(cfg.Runs, 3) {
		gap, err := s.during(ctx, func() error {
			if err := s.cluster.Coppice(ctx, n1, nil, "stop", component); err != nil {
				return err
			}
			return s.cluster.Coppice(ctx, n1, nil, "start", component)
		})
		if err != nil {
			return nil, err
		}
		restarts = append(restarts, ms(gap))
	}
	ledger, err := s.verify(began)
	if calm.Rate < swapRate*0.9 {
		cfg.say("%.0f calls/s were answered, %d were sent: this machine is too slow or too busy for these figures", calm.Rate, swapRate)
	}
	return append([]Result{
		summary("pause of a hot swap with 1 MiB, as the swap tells it", "ms", pauses),
		summary("longest time without an answer during the swap", "ms", gaps).against("coppice stop and start", restarts),
		summary("the whole swap", "ms", took),
		summary("calls held", "calls", held),
		summary("load: answered per second", "calls/s", []float64{calm.Rate}),
		summary("load: latency of a call", "ms", []float64{calm.P50}),
	}, ledger...), err
}

// during returns the longest time without an answer around something.
func (s *stand) during(ctx context.Context, do func() error) (time.Duration, error) {
	if _, err := s.settle(ctx); err != nil {
		return 0, err
	}
	from := time.Now()
	if err := do(); err != nil {
		return 0, err
	}
	if err := cluster.Sleep(ctx, 500*time.Millisecond); err != nil {
		return 0, err
	}
	f, err := s.load.Figures(load.Window{From: from, To: time.Now(), Component: component})
	return f.Gap, err
}
