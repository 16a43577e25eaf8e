package arbiter

import (
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

func TestZonesAreSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 13)
		defer c.close()
		for i := range 9 {
			n := c.add()
			n.zone = []string{"a", "a", "a", "b", "c"}[i%5]
			c.up(n, i == 0)
			time.Sleep(20 * time.Millisecond)
		}
		c.eventually(time.Minute, "no zone has more than two of five voters", func() bool {
			used := map[string]int{}
			s := c.nodes[0].arb().Status()
			for _, v := range s.Voters {
				used[c.of(v).zone]++
			}
			return len(s.Voters) == 5 && used["a"] <= 2 && used["b"] <= 2 && used["c"] <= 2
		})
	})
}

func TestMirrorAtTheLeader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 14)
		defer c.close()
		type told struct {
			by   peer.ID
			regs []Register
			at   time.Time
		}
		var mu sync.Mutex
		var all []told
		c.adjust = func(cfg *Config) {
			self := cfg.Self
			cfg.Mirror = func(r []Register) {
				mu.Lock()
				defer mu.Unlock()
				all = append(all, told{self, r, time.Now()})
			}
		}
		c.grow(3)
		c.settled(10*time.Second, 3, 0)
		time.Sleep(5 * time.Second)
		for i := range 50 {
			if err := put(c.live()[i%3].arb(), fmt.Sprint("k", i%5), fmt.Sprint(i), time.Second); err != nil {
				t.Fatal(err)
			}
		}
		ctx, done := within(5 * time.Second)
		defer done()
		if _, err := c.nodes[0].arb().Txn(ctx, TxnRequest{Then: []Op{{Delete: "k0"}}}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		mu.Lock()
		defer mu.Unlock()
		newest := map[string]Register{}
		var last time.Time
		for i, m := range all {
			if i > 0 && m.at.Sub(last) < 50*time.Millisecond {
				t.Errorf("told again after %s", m.at.Sub(last))
			}
			last = m.at
			at := point{}
			for _, r := range m.regs {
				if (point{r.Incarnation, r.Index}).before(at) {
					t.Errorf("out of order: %d after %d", r.Index, at.index)
				}
				at = point{r.Incarnation, r.Index}
				newest[r.Key] = r
			}
		}
		if len(newest) != 5 || !newest["k0"].Deleted || string(newest["k4"].Body) != "49" {
			t.Errorf("told: %+v", newest)
		}
	})
}
