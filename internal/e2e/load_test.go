package e2e

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// hogs is how many processes do nothing but use a CPU.
const hogs = 20

// TestLongNoFalseDeathUnderLoad has five nodes live through 30 min (COPPICE_HOGS: another duration) beside 20 processes that want every CPU: nobody is
// called dead, nothing is taken over, and calls are answered all the time, if late.
func TestLongNoFalseDeathUnderLoad(t *testing.T) {
	long(t)
	lasts := 30 * time.Minute
	if s := os.Getenv("COPPICE_HOGS"); s != "" {
		var err error
		lasts, err = time.ParseDuration(s)
		must(t, err)
	}
	g := plant(t, 5)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "counter", "1.0.0"))
	g.deploy(n1, counterApp)
	in := g.running(n1, "tally/counter-0", protected(5))
	for range hogs {
		hog := exec.CommandContext(t.Context(), "sh", "-c", "while :; do :; done")
		must(t, hog.Start())
		t.Cleanup(func() { _ = hog.Wait() }) // killed at the end of the test
	}
	begun, calls := time.Now(), 0
	for time.Since(begun) < lasts {
		g.wait("an answer", func(ctx context.Context) error {
			_, _, err := bump(ctx, g.Nodes[calls%len(g.Nodes)], fmt.Sprintf("load/%d", calls))
			return err
		})
		calls++
		time.Sleep(100 * time.Millisecond) // the rate of the calls, not a wait
	}
	for _, n := range g.Nodes {
		evs, err := g.events(t.Context(), n, "/")
		must(t, err)
		for _, ev := range evs {
			if ev.GetType() == "dead" || ev.GetType() == "failover" {
				t.Errorf("%s: %s %s because %s", n.Name, ev.GetChannel(), ev.GetMessage(), ev.GetCause())
			}
		}
	}
	g.running(n1, "tally/counter-0", func(now *apiv1.Instance) error {
		if now.GetNode() != in.GetNode() || now.GetEpoch() != in.GetEpoch() {
			t.Errorf("it was on %s in epoch %d, and is on %s in epoch %d", in.GetNode(), in.GetEpoch(), now.GetNode(), now.GetEpoch())
		}
		return nil
	})
	t.Logf("%s beside %d busy processes: %d calls answered", time.Since(begun).Round(time.Second), hogs, calls)
}
