package arbiter

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coppice-project/coppice/dht/peers"
)

// TestIdleIsQuiet: what an idle group sends, before TLS and TCP.
func TestIdleIsQuiet(t *testing.T) {
	for profile, most := range map[string]float64{"lan": 4000, "wan": 1000} {
		t.Run(profile, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCluster(t, 31)
				defer c.close()
				ends := map[int]*peers.Endpoint{}
				c.adjust = func(cfg *Config) {
					cfg.Profile, cfg.Timings = profile, Timings{}
					ends[len(ends)] = cfg.Peers.(*peers.Endpoint)
				}
				c.grow(7)
				c.settled(2*time.Minute, 5, 0)
				time.Sleep(time.Minute)
				before := map[int]uint64{}
				for i, e := range ends {
					_, before[i] = e.Sent()
				}
				const span = 100 * time.Second
				time.Sleep(span)
				var all, top float64
				for i, e := range ends {
					_, b := e.Sent()
					rate := float64(b-before[i]) / span.Seconds()
					all += rate
					top = max(top, rate)
				}
				t.Logf("%s: mean %.0f B/s a node, leader %.0f B/s", profile, all/7, top)
				if all/7 > most/4 || top > most {
					t.Errorf("too much: mean %.0f, most %.0f B/s", all/7, top)
				}
			})
		})
	}
}

// A leader's raft sends fewer heartbeats than its followers' time-out would have it; who leads no more waits as long as any follower.
func TestOnlyTheLeaderIsSlow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 32)
		defer c.close()
		c.grow(5)
		c.settled(2*time.Minute, 5, 0)
		time.Sleep(5 * time.Second)
		paced := func(leader *node) error {
			for _, n := range c.live() {
				a := n.arb()
				want := a.t.Heartbeat
				if n == leader {
					want = time.Duration(leaderPace * float64(want))
				}
				if got := a.raft.Load().ReloadableConfig().HeartbeatTimeout; got != want {
					return fmt.Errorf("%s, leading: %v: %v, want %v", n.id, n == leader, got, want)
				}
			}
			return nil
		}
		first := c.leader()
		if err := paced(first); err != nil {
			t.Fatal(err)
		}
		term := first.arb().raft.Load().CurrentTerm()
		if err := first.arb().raft.Load().LeadershipTransfer().Error(); err != nil {
			t.Fatal(err)
		}
		for begun := time.Now(); ; time.Sleep(100 * time.Millisecond) {
			now := c.leader() // the keeper may bring it back to the first
			var err error
			if now != nil && now.arb().raft.Load().CurrentTerm() > term {
				if err = paced(now); err == nil {
					return
				}
			}
			if time.Since(begun) > 5*time.Second {
				t.Fatal(now, err)
			}
		}
	})
}

// Every node of a healthy group hears of the leader as often as Unheard says, and the leader feeds nobody while other voters can.
func TestAHealthyNodeHearsOfTheLeader(t *testing.T) {
	for _, profile := range []string{"lan", "wan"} {
		t.Run(profile, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCluster(t, 33)
				defer c.close()
				c.adjust = func(cfg *Config) { cfg.Profile, cfg.Timings = profile, Timings{} }
				c.grow(8)
				c.settled(2*time.Minute, 5, 0)
				most, err := Unheard(profile)
				if err != nil {
					t.Fatal(err)
				}
				c.eventually(time.Minute, "the leader feeds nobody", func() bool { return c.leader().arb().Status().Followers == 0 })
				fed := 0
				for _, n := range c.live() {
					fed += n.arb().Status().Followers
				}
				if fed != 3 {
					t.Errorf("%d followers are fed, want 3", fed)
				}
				for begun := time.Now(); time.Since(begun) < 2*time.Minute; time.Sleep(10 * time.Millisecond) {
					for _, n := range c.live() {
						if age := n.arb().HeardLeader(); age < 0 || age > most+50*time.Millisecond {
							t.Fatalf("%s has heard nothing of the leader for %s, want at most %s", n.id, age, most)
						}
					}
				}
				if err := c.leader().arb().raft.Load().LeadershipTransfer().Error(); err != nil {
					t.Fatal(err)
				}
				c.eventually(time.Minute, "the next leader feeds nobody either", func() bool {
					l := c.leader()
					return l != nil && l.arb().Status().Followers == 0
				})
			})
		})
	}
}
