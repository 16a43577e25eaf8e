package e2e

import (
	"context"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/internal/load"
)

// pressure is a load on the key-value store with a ledger of every answer.
type pressure struct {
	*load.Runner
	t     testing.TB
	begin time.Time
}

var runs atomic.Uint64

// press begins to write to a key-value component through these nodes. A call that is not answered within attempt goes to the next
// node; one that is not answered within a minute has failed.
func (g *grove) press(component string, nodes []*cluster.Node, rate float64, attempt time.Duration) *pressure {
	g.t.Helper()
	id := runs.Add(1)
	cfg := load.Config{
		Seed: id, Run: fmt.Sprintf("r%d", id), Ledger: filepath.Join(g.Dir, fmt.Sprintf("ledger-%d", id)), KV: component, KVClients: 8, KVKeys: 20, Rate: rate, Reads: 0.2,
		Attempt: attempt,
	}
	for _, n := range nodes {
		cfg.Gateways = append(cfg.Gateways, load.Gateway{Name: n.Name, HTTP: n.HTTP, API: n.API})
	}
	begin := time.Now()
	r, err := load.Start(g.t.Context(), cfg)
	must(g.t, err)
	p := &pressure{Runner: r, t: g.t, begin: begin}
	g.t.Cleanup(func() { must(g.t, r.Close()) })
	p.answered(20) // it is under way
	return p
}

// figures of all calls so far.
func (p *pressure) figures() load.Figures {
	return p.Figures(load.Window{From: p.begin, To: time.Now()})
}

// answered waits until n more calls have been answered.
func (p *pressure) answered(n int) {
	p.t.Helper()
	want := p.figures().Answered + n
	must(p.t, cluster.WaitFor(p.t.Context(), within, fmt.Sprintf("%d answers", n), func(context.Context) (bool, error) {
		f := p.figures()
		if f.Answered < want {
			return false, fmt.Errorf("%d of %d; the last failure: %q", f.Answered, want, f.Why)
		}
		return true, nil
	}))
}

// answeredBy waits for an answer to a call by a node after a time.
func (p *pressure) answeredBy(q load.FirstQuery) load.First {
	p.t.Helper()
	var first load.First
	must(p.t, cluster.WaitFor(p.t.Context(), within, fmt.Sprintf("an answer of %s%s", q.Node, q.NotNode), func(context.Context) (bool, error) {
		first = p.First(q)
		return first.Found, nil
	}))
	return first
}

// audit ends the load and reads everything back: no write that was answered is missing, none is there twice, and no call failed. With
// once, no call needed a second attempt either.
func (p *pressure) audit(once bool) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.t.Context(), 2*within)
	defer cancel()
	must(p.t, p.Pause(ctx))
	f := p.figures()
	rep, err := p.Verify(ctx)
	must(p.t, err)
	p.t.Logf("%d calls, %d retried, %d failed, longest without an answer %s; of %d answered writes %d found", f.Calls, f.Retried, f.Failed, f.Gap.Round(time.Millisecond), rep.Answered, rep.Found)
	if f.Failed > 0 || f.Refused > 0 {
		p.t.Errorf("%d calls failed, %d were refused; the last one: %s", f.Failed, f.Refused, f.Why)
	}
	if once && f.Retried > 0 {
		p.t.Errorf("%d calls needed another attempt", f.Retried)
	}
	if !rep.Good() {
		p.t.Errorf("of %d answered writes %d are missing, %d doubled: %v", rep.Answered, rep.Missing, rep.Doubled, rep.Examples)
	}
}
