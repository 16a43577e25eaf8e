package supervisor

import (
	"fmt"
	"testing"
	"time"

	"github.com/coppice-project/coppice/components"
)

// wrongClocks gives each node a wall clock of its own, hours and years from the others'.
func wrongClocks(n *simNode, cfg *Config) {
	by := map[string]time.Duration{"n1": 0, "n2": 26 * time.Hour, "n3": -30 * time.Hour, "n4": 9 * 365 * 24 * time.Hour, "n5": -50 * 365 * 24 * time.Hour}[n.name]
	cfg.Now = func() time.Time { return time.Now().Add(by) }
}

// Whatever the clocks show, a takeover takes as long as with right ones, and goes from one node to the next without anything lost.
func TestATakeoverUnderWrongClocks(t *testing.T) {
	inWorldWith(t, 5, wrongClocks, func(w *world) {
		n := w.nodes
		w.deploy("1.0.0")
		w.place(n[0], n[1], n[2])
		w.running(n[0], "1.0.0")
		l := w.load(2, n[3], n[4])
		for i, next := range []int{1, 2} {
			l.more(20)
			w.settled()
			n[i].kill()
			if took := w.running(n[next], "1.0.0"); took > time.Second {
				w.t.Errorf("%s took over from %s after %s", n[next].name, n[i].name, took)
			}
		}
		l.more(20)
		l.end(n[3])
		if _, body := w.register(); len(body.GetDeaths()) != 0 || body.GetQuarantined() {
			w.t.Errorf("settled epochs are held against it: %v", body)
		}
	})
}

// An exactly-one instance is waited for as long as its lease lasts, by no clock that could be set.
func TestALeaseUnderWrongClocks(t *testing.T) {
	inWorldWith(t, 5, wrongClocks, func(w *world) {
		n := w.nodes
		w.deploy("1.0.0", exactlyOne)
		w.place(n[4], n[3], n[2])
		w.running(n[4], "1.0.0")
		w.settled()
		g := w.guard()
		w.net.Isolate(n[4].id)
		took := w.running(n[3], "1.0.0")
		if took < 2*time.Second || took > 10*time.Second {
			w.t.Errorf("the next owner ran %s after the last one was cut off", took)
		}
		w.net.Heal()
		g.end()
	})
}

// Two owners that die soon after the start quarantine an instance; two that die long after it do not, although the epochs never settled. How long an epoch
// lasted is measured by who takes it over, and is no difference of two nodes' clocks.
func TestDeathsAreCountedUnderWrongClocks(t *testing.T) {
	for _, c := range []struct {
		lasts time.Duration
		want  bool
	}{{time.Second, true}, {components.DeathWindow + 5*time.Second, false}} {
		t.Run(fmt.Sprint("after ", c.lasts), func(t *testing.T) {
			tune := func(n *simNode, cfg *Config) {
				wrongClocks(n, cfg)
				cfg.Settle = time.Hour
			}
			inWorldWith(t, 5, tune, func(w *world) {
				n := w.nodes
				time.Sleep(2 * time.Second) // the nodes watch before it is there
				w.deploy("1.0.0")
				w.place(n[0], n[1], n[2])
				for i := range 2 {
					w.running(n[i], "1.0.0")
					time.Sleep(c.lasts)
					n[i].kill()
					w.eventually(20*time.Second, "it is taken over", func() bool { reg, _ := w.register(); return reg.Epoch == uint64(i+2) })
				}
				if _, body := w.register(); body.GetQuarantined() != c.want {
					w.t.Errorf("two owners died %s after they had started it: quarantined %v, %d deaths", c.lasts, body.GetQuarantined(), len(body.GetDeaths()))
				}
			})
		})
	}
}
