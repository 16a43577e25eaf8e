package bench

import (
	"context"
	"testing"
	"testing/synctest"
)

// Fifty nodes do what a thousand do: they meet, and a quarter of them with the leader and another voter can be lost.
func TestScale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		out, err := simulate(context.Background(), Config{}, 50)
		if err != nil {
			t.Fatal(err)
		}
		if len(out) < 8 { // with a line for each protocol at least of the view, the heartbeats and raft
			t.Errorf("%v", out)
		}
		for _, r := range out {
			t.Logf("%s: median %v %s, at most %v", r.Name, r.Median, r.Unit, r.Max)
		}
	})
}
