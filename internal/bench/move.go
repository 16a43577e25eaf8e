package bench

import (
	"context"
	"fmt"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/load"
)

const (
	moveNodes = 3
	moveRate  = 2000
	moveReads = 0.95 // 100 writes a second: each is committed by itself (durable: each-call)
	moveSize  = 64 << 20
	moveWarm  = 3 * time.Second
)

// move moves a component with its state from node to node under load.
func move(ctx context.Context, cfg Config) (_ []Result, err error) {
	cfg.Size = cfg.size(moveSize)
	s, err := newStand(ctx, cfg, moveNodes)
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
	began := time.Now()
	if err := s.start(moveRate, moveReads, 32); err != nil {
		return nil, err
	}
	if err := cluster.Sleep(ctx, moveWarm); err != nil {
		return nil, err
	}
	calm, err := s.load.Figures(load.Window{From: began.Add(time.Second), To: time.Now()})
	if err != nil {
		return nil, err
	}
	var pauses, gaps, calms, took, held []float64
	for run := range cfg.Runs {
		usual, err := s.during(ctx, func() error { return nil })
		if err != nil {
			return nil, err
		}
		res, gap, err := s.moveOnce(ctx, run)
		if err != nil {
			return nil, err
		}
		pauses, gaps, calms = append(pauses, res.Pause), append(gaps, ms(gap)), append(calms, ms(usual))
		took, held = append(took, res.Took), append(held, res.Held)
		cfg.say("run %d of %d: moved in %.0f ms, paused %.1f ms, longest time without an answer %.1f ms", run+1, cfg.Runs, res.Took, res.Pause, ms(gap))
	}
	ledger, err := s.verify(began)
	if calm.Rate < moveRate*0.9 {
		cfg.say("%.0f calls/s were answered, %d were offered: this machine is too slow or too busy for these figures", calm.Rate, moveRate)
	}
	return append([]Result{
		disk,
		summary(fmt.Sprintf("pause of a move with %s, as the move tells it", sizeText(cfg.Size)), "ms", pauses),
		summary("longest time without an answer during the move", "ms", gaps).against("the same without a move", calms),
		summary("the whole move", "ms", took),
		summary("calls held", "calls", held),
		summary("load: offered", "calls/s", []float64{moveRate}),
		summary("load: answered per second before the moves", "calls/s", []float64{calm.Rate}),
		summary("load: latency of a call before the moves", "ms", []float64{calm.P50}),
	}, ledger...), err
}

// moved is what `coppice move` prints.
type moved struct {
	Pause float64 `json:"pause_ms"`
	Took  float64 `json:"took_ms"`
	Held  float64 `json:"calls_held"`
}

// moveOnce moves the component to a node where it is not and returns the longest time without an answer.
func (s *stand) moveOnce(ctx context.Context, run int) (res moved, gap time.Duration, err error) {
	at, err := s.owner(ctx)
	if err != nil {
		return res, 0, err
	}
	to := s.cluster.Nodes[(at.Index+run%(moveNodes-1))%moveNodes] // Index begins at 1: it is never the same
	gap, err = s.during(ctx, func() error {
		return s.cluster.Coppice(ctx, s.cluster.Nodes[0], &res, "move", component, to.Name, "--timeout", "5m")
	})
	return res, gap, err
}

// sizeText is a size as people read it.
func sizeText(n int64) string {
	switch {
	case n >= 1<<30 && n%(1<<30) == 0:
		return fmt.Sprintf("%d GiB", n>>30)
	case n >= 1<<20:
		return fmt.Sprintf("%d MiB", n>>20)
	}
	return fmt.Sprintf("%d KiB", n>>10)
}
