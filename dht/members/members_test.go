package members

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

func TestOneNodeAlone(t *testing.T) {
	simulate(t, seedOf(t, 1), 1, func(c *cluster) {
		n := c.nodes["n1"]
		if got := n.Closest("/system/placement", 3, nil); len(got) != 1 || got[0].ID != "n1" {
			t.Errorf("closest: %v", got)
		}
		if !n.IsMember("n1") || n.IsMember("n2") || n.Self().State != Alive {
			t.Error("a node alone is its cluster's only member")
		}
		time.Sleep(time.Hour)
		if w, b := n.end.Sent(); w != 0 || b != 0 {
			t.Errorf("a node alone sent %d bytes", b)
		}
	})
}

func TestKillIsSeenByAllInMilliseconds(t *testing.T) {
	for _, size := range []int{2, 3, 5, 30} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			simulate(t, seedOf(t, 2), size, func(c *cluster) {
				c.kill("n2")
				d := c.eventually(100*time.Millisecond, "all see the death", func() error { return c.holds("n2", Dead) })
				t.Logf("%d nodes: %v", size, d)
				m, _ := c.nodes["n1"].Member("n2")
				if m.Evidence == "" || !c.nodes["n1"].IsMember("n2") {
					t.Errorf("a dead member stays a member, with a reason: %+v", m)
				}
			})
		})
	}
}

func TestSilenceIsConfirmedInTime(t *testing.T) {
	for _, size := range []int{2, 3, 5, 12} {
		for what, hit := range map[string]func(c *cluster){
			"freeze": func(c *cluster) { c.freeze("n2") }, "blackhole": func(c *cluster) { c.net.Isolate("n2") },
		} {
			t.Run(fmt.Sprint(what, size), func(t *testing.T) {
				simulate(t, seedOf(t, 3), size, func(c *cluster) {
					time.Sleep(time.Duration(c.rng.Int64N(int64(time.Second))))
					others := slices.DeleteFunc(slices.Clone(c.ids), func(id peer.ID) bool { return id == "n2" })
					check := c.without("n2", func() func() { return c.never(others...) })
					hit(c)
					start := time.Now()
					c.eventually(2*time.Second, "confirmed", func() error { return c.holds("n2", Dead) })
					if d := time.Since(start); d < time.Second {
						t.Errorf("called dead after %v of silence already", d)
					} else {
						t.Logf("%d nodes: %v", size, d)
					}
					time.Sleep(5 * time.Second)
					check()
					if what == "freeze" {
						c.thaw("n2")
					} else {
						c.net.Heal()
					}
					c.eventually(10*time.Second, "it is taken back", func() error { return c.agree(c.ids) })
				})
			})
		}
	}
}

func TestAsymmetricCutOfOneWatcherKillsNobody(t *testing.T) {
	for _, both := range []bool{false, true} {
		simulate(t, seedOf(t, 4), 6, func(c *cluster) {
			check := c.never(c.ids...)
			watcher := c.nodes["n3"].Self().Watchers[0]
			c.net.Cut("n3", watcher, both)
			time.Sleep(time.Minute)
			c.net.Heal()
			time.Sleep(5 * time.Second)
			check()
			if err := c.agree(c.ids); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestStarvedNodeDoesNotVote(t *testing.T) {
	simulate(t, seedOf(t, 5), 3, func(c *cluster) {
		n1, n3 := c.nodes["n1"], c.nodes["n3"]
		starve := func() { n1.clock.jump(600 * time.Millisecond) }
		starve()
		time.Sleep(tickEvery)
		if n1.Lag() < 500*time.Millisecond {
			t.Fatalf("lag %v", n1.Lag())
		}
		c.freeze("n2")
		for range 9 { // both n1 and n2 are of no use as witnesses: n3 alone cannot call n2 dead
			time.Sleep(500 * time.Millisecond)
			starve()
		}
		for _, n := range []*node{n1, n3} {
			if m, _ := n.Member("n2"); m.State == Dead {
				t.Errorf("%s: %v (%s)", n.id, m.State, m.Evidence)
			}
		}
		if m, _ := n3.Member("n2"); m.State != Suspect {
			t.Errorf("n3 holds n2 to be %v", m.State)
		}
		c.eventually(15*time.Second, "confirmed once n1 is well again", func() error { return c.holds("n2", Dead) })
	})
}

func TestSuspendedNodeCallsNobodyDead(t *testing.T) {
	simulate(t, seedOf(t, 6), 5, func(c *cluster) {
		check := c.never("n1", "n3", "n4", "n5")
		c.freeze("n2")
		time.Sleep(10 * time.Second)
		if err := c.holds("n2", Dead); err != nil {
			t.Fatal(err)
		}
		c.thaw("n2")
		d := c.eventually(3*time.Second, "it is taken back", func() error { return c.agree(c.ids) })
		t.Logf("back after %v", d)
		time.Sleep(10 * time.Second)
		check()
		n2 := c.nodes["n2"]
		n2.mu.Lock()
		defer n2.mu.Unlock()
		if len(n2.suspended) != 1 || n2.suspended[0] < 9*time.Second {
			t.Errorf("suspended: %v", n2.suspended)
		}
	})
}

func TestRebootReplacesTheOldLifeAtOnce(t *testing.T) {
	simulate(t, seedOf(t, 7), 5, func(c *cluster) {
		old := c.nodes["n2"].Self().Boot
		c.kill("n2")
		c.start("n2") // before anybody could have found it gone
		d := c.eventually(500*time.Millisecond, "all know the new life", func() error { return c.agree(c.ids) })
		t.Logf("after %v", d)
		for id, n := range c.nodes {
			told := n.saw(func(ch Change) bool {
				return ch.New.ID == "n2" && ch.Old.Boot == old && (ch.New.Boot != old || ch.New.State == Dead)
			})
			if id != "n2" && len(told) == 0 {
				t.Errorf("%s was not told that the old life is over", id)
			}
		}
		c.kill("n3")
		time.Sleep(5 * time.Second)
		c.start("n3")
		c.eventually(time.Second, "a dead node returns", func() error { return c.agree(c.ids) })
		if got := c.nodes["n1"].saw(func(ch Change) bool { return ch.New.ID == "n3" && ch.Trigger == "reboot" }); len(got) != 1 {
			t.Errorf("reboots told: %+v", got)
		}
	})
}

func TestGoodbye(t *testing.T) {
	simulate(t, seedOf(t, 8), 5, func(c *cluster) {
		n2 := c.nodes["n2"]
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		start := time.Now()
		n2.Goodbye(ctx)
		if d := time.Since(start); d > 100*time.Millisecond {
			t.Errorf("goodbye took %v", d)
		}
		if err := c.holds("n2", Left); err != nil {
			t.Error(err)
		}
		c.kill("n2")
		time.Sleep(10 * time.Second)
		if err := c.holds("n2", Left); err != nil {
			t.Error(err)
		}
		c.start("n2")
		c.eventually(time.Second, "it returns", func() error { return c.agree(c.ids) })
	})
}

func TestPartitionHealsAndViewsMerge(t *testing.T) {
	for _, cut := range []int{1, 2, 5} {
		t.Run(fmt.Sprint(cut), func(t *testing.T) {
			simulate(t, seedOf(t, 9), 10, func(c *cluster) {
				left, right := c.ids[:cut], c.ids[cut:]
				for _, a := range left {
					for _, b := range right {
						c.net.Cut(a, b, true)
					}
				}
				c.eventually(time.Minute, "each side holds itself alone to be alive", func() error {
					if err := c.agree(left); err != nil {
						return err
					}
					return c.agree(right)
				})
				c.nodes[left[0]].UpdateSelf(func(i *Info) { i.Labels = map[string]string{"disk": "ssd"} })
				synctest.Wait() // the last deaths have been told
				check := c.never(right...)
				if cut > 1 {
					check = func() {}
				}
				time.Sleep(20 * time.Second)
				c.net.Heal()
				d := c.eventually(90*time.Second, "the views merge", func() error { return c.agree(c.ids) })
				t.Logf("merged after %v", d)
				time.Sleep(5 * time.Second)
				check()
				c.eventually(15*time.Second, "what was said meanwhile arrives", func() error {
					for _, id := range right {
						if m, _ := c.nodes[id].Member(left[0]); m.Labels["disk"] != "ssd" {
							return fmt.Errorf("%s does not know", id)
						}
					}
					return nil
				})
			})
		})
	}
}

func TestAllDownAndUpAgainFromTheBooksAlone(t *testing.T) {
	simulate(t, seedOf(t, 10), 5, func(c *cluster) {
		for _, id := range c.ids {
			c.kill(id)
		}
		time.Sleep(time.Hour)
		c.fresh = true
		for _, id := range c.ids {
			c.start(id)
			time.Sleep(time.Duration(c.rng.Int64N(int64(300 * time.Millisecond))))
		}
		d := c.eventually(time.Second, "they find each other", func() error { return c.agree(c.ids) })
		t.Logf("found after %v", d)
		c.kill("n4")
		c.kill("n5")
		for _, id := range c.ids[:3] {
			c.kill(id)
		}
		for _, id := range c.ids[:3] {
			c.start(id)
		}
		c.eventually(time.Second, "those that return find each other", func() error { return c.agree(c.ids[:3]) })
		time.Sleep(10 * time.Minute)
		c.start("n4")
		c.eventually(time.Second, "the late one finds them", func() error { return c.agree(c.ids[:4]) })
	})
}

func TestUpdatesAndAdmissions(t *testing.T) {
	simulate(t, seedOf(t, 11), 5, func(c *cluster) {
		c.nodes["n1"].UpdateSelf(func(i *Info) { i.Draining = true; i.Addrs = []string{"/mem/elsewhere"}; i.Boot = 7 })
		c.eventually(100*time.Millisecond, "the update arrives", func() error {
			for _, n := range c.nodes {
				if m, _ := n.ByName("n1"); !m.Draining || m.Addrs[0] != "/mem/elsewhere" || m.Boot == 7 {
					return fmt.Errorf("%s: %+v", n.id, m.Info)
				}
			}
			return nil
		})
		// A newcomer that only n1 has admitted so far is nobody's member elsewhere.
		c.fresh = true
		n6 := c.start("n6")
		for _, id := range c.ids {
			n6.Admit(Info{ID: id, Name: string(id)})
		}
		c.nodes["n1"].Admit(Info{ID: "n6", Name: "n6"})
		time.Sleep(time.Second)
		if m, ok := c.nodes["n1"].Member("n6"); !ok || m.State != Alive || m.Boot == 0 {
			t.Errorf("n1 holds %+v", m)
		}
		if c.nodes["n2"].IsMember("n6") {
			t.Error("gossip admitted a node")
		}
		for _, id := range c.ids[1:] {
			c.nodes[id].Admit(Info{ID: "n6", Name: "n6"})
		}
		c.ids = append(c.ids, "n6")
		c.eventually(time.Second, "all know it", func() error { return c.agree(c.ids) })
		for _, n := range c.nodes {
			n.Expel("n6")
		}
		time.Sleep(15 * time.Second)
		for _, id := range c.ids[:5] {
			if _, ok := c.nodes[id].Member("n6"); ok || c.nodes[id].IsMember("n6") {
				t.Errorf("%s still has the expelled", id)
			}
		}
		if err := c.agree(c.ids[:5]); err != nil {
			t.Error(err)
		}
	})
}

func TestAnAdmittedNodeThatNeverComesIsFoundDead(t *testing.T) {
	simulate(t, seedOf(t, 12), 3, func(c *cluster) {
		c.net.Join("n9")
		c.net.Isolate("n9")
		for _, n := range c.nodes {
			n.Admit(Info{ID: "n9", Name: "n9"})
		}
		if m, ok := c.nodes["n1"].Member("n9"); !ok || m.State != Alive {
			t.Errorf("admitted: %+v", m)
		}
		c.eventually(30*time.Second, "found dead", func() error { return c.holds("n9", Dead) })
	})
}

func TestFlappingNodeIsQuarantined(t *testing.T) {
	simulateWith(t, seedOf(t, 13), 3, func(cfg *Config) { cfg.FlapDeaths = 3 }, func(c *cluster) {
		for range 4 {
			c.kill("n2")
			time.Sleep(3 * time.Second)
			c.start("n2")
			time.Sleep(3 * time.Second)
		}
		n1 := c.nodes["n1"]
		m, _ := n1.Member("n2")
		if m.State != Quarantined || len(n1.Alive()) != 2 || len(n1.Closest("x", 9, nil)) != 2 {
			t.Fatalf("after four deaths: %v (%s)", m.State, m.Evidence)
		}
		c.eventually(flapBackoff+time.Second, "the back-off ends", func() error { return c.agree(c.ids) })
	})
}

// flap has a node die and come back so often that all others quarantine it.
func (c *cluster) flap(id peer.ID) {
	c.t.Helper()
	for range 4 {
		c.kill(id)
		time.Sleep(3 * time.Second)
		c.start(id)
		time.Sleep(3 * time.Second)
	}
	if err := c.holds(id, Quarantined); err != nil {
		c.t.Fatal("after four deaths: ", err)
	}
}

func (c *cluster) readmit(id peer.ID) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	c.nodes[id].Readmit(ctx)
}

// A readmission is told to all at once. It counts for what was before it alone: who flaps on is quarantined again, whatever is repeated of what was said.
func TestAReadmissionIsToldToAllAndCountsOnce(t *testing.T) {
	simulateWith(t, seedOf(t, 20), 5, func(cfg *Config) { cfg.FlapDeaths = 3 }, func(c *cluster) {
		c.flap("n2")
		c.readmit("n2")
		if err := c.agree(c.ids); err != nil {
			t.Fatal("once the command is done: ", err)
		}
		for id, n := range c.nodes {
			if got := n.saw(func(ch Change) bool { return ch.New.ID == "n2" && ch.Old.State == Quarantined }); id != "n2" && (len(got) != 1 || got[0].Trigger != "readmitted") {
				t.Errorf("%s was told %+v", id, got)
			}
		}
		old := c.nodes["n2"].Self().Info
		c.flap("n2")
		n1 := c.nodes["n1"]
		n1.locked(func() { n1.merge("n3", state{info: &old}) }) // late, or repeated
		time.Sleep(15 * time.Second)                            // exchanges go on
		if now := c.nodes["n2"].Self().Info; now.readmitted != old.readmitted {
			t.Errorf("the next lives do not say when the node was readmitted: %v, want %v", now.readmitted, old.readmitted)
		}
		if err := c.holds("n2", Quarantined); err != nil {
			t.Error("by an old readmission: ", err)
		}
		c.readmit("n2")
		if err := c.agree(c.ids); err != nil {
			t.Error("readmitted once more: ", err)
		}
	})
}

// A node that flaps can tell: it counts its deaths as the others do, and false ones too. One that is put down and started is no such node.
func TestAFlappingNodeKnowsThatItIs(t *testing.T) {
	tune := func(cfg *Config) { cfg.FlapDeaths = 3 }
	simulateWith(t, seedOf(t, 23), 3, tune, func(c *cluster) {
		c.flap("n2")
		if !c.nodes["n2"].Flapping() || c.nodes["n1"].Flapping() || c.nodes["n2"].Self().State != Alive {
			t.Errorf("n2 knows that it flaps: %v, n1: %v, n2 holds itself to be %v", c.nodes["n2"].Flapping(), c.nodes["n1"].Flapping(), c.nodes["n2"].Self().State)
		}
		c.readmit("n2")
		if c.nodes["n2"].Flapping() {
			t.Error("readmitted, it believes that it is quarantined")
		}
		c.flap("n2")
		c.eventually(flapBackoff+time.Second, "its quarantine ends", func() error {
			if c.nodes["n2"].Flapping() {
				return fmt.Errorf("it does not know")
			}
			return c.agree(c.ids)
		})
	})
	simulateWith(t, seedOf(t, 24), 3, tune, func(c *cluster) {
		for range 5 {
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			c.nodes["n2"].Goodbye(ctx)
			cancel()
			c.nodes["n2"].stop()
			c.kill("n2")
			c.start("n2")
			c.eventually(time.Second, "it returns", func() error { return c.agree(c.ids) })
		}
		if c.nodes["n2"].Flapping() {
			t.Error("put down in order five times, it believes that it flaps")
		}
	})
	simulateWith(t, seedOf(t, 25), 3, tune, func(c *cluster) {
		for range 4 {
			c.net.Isolate("n2")
			time.Sleep(10 * time.Second)
			c.net.Heal()
			time.Sleep(10 * time.Second)
		}
		if err := c.holds("n2", Quarantined); err != nil || !c.nodes["n2"].Flapping() {
			t.Errorf("cut off four times it knows that it flaps: %v; %v", c.nodes["n2"].Flapping(), err)
		}
	})
}

// Who is cut off while a node is readmitted hears of it when the cut is over, also when that node was restarted meanwhile.
func TestAReadmissionIsHeardByWhoWasAway(t *testing.T) {
	for _, restart := range []bool{false, true} {
		simulateWith(t, seedOf(t, 21), 5, func(cfg *Config) { cfg.FlapDeaths = 3 }, func(c *cluster) {
			c.flap("n2")
			away := c.nodes["n5"]
			c.net.Isolate("n5")
			c.readmit("n2")
			time.Sleep(2 * time.Second)
			if restart {
				c.kill("n2")
				time.Sleep(time.Second)
				c.start("n2")
			}
			time.Sleep(5 * time.Second)
			c.net.Heal()
			c.eventually(30*time.Second, "n5 takes it back, before its own time is over", func() error {
				if m, _ := away.Member("n2"); m.State != Alive {
					return fmt.Errorf("it is %v (%s)", m.State, m.Evidence)
				}
				return nil
			})
			if got := away.saw(func(ch Change) bool { return ch.New.ID == "n2" && ch.Trigger == "quarantine" }); len(got) != 0 {
				t.Errorf("its quarantine there ended by itself: %+v", got)
			}
		})
	}
}

func TestClosestAndWatchersFollowDistanceAndZones(t *testing.T) {
	simulateWith(t, seedOf(t, 14), 12, func(cfg *Config) {
		cfg.Self.Zone = map[bool]string{true: "west", false: "east"}[cfg.Self.ID < "n4"] // n1 n10 n11 n12 n2 n3
	}, func(c *cluster) {
		want := c.nodes["n1"].Closest("/app/x", 12, nil)
		for _, n := range c.nodes {
			if got := n.Closest("/app/x", 12, nil); !slices.EqualFunc(got, want, func(a, b Member) bool { return a.ID == b.ID }) {
				t.Errorf("%s orders otherwise", n.id)
			}
			zones := map[string]int{}
			for _, id := range n.Self().Watchers {
				m, _ := n.Member(id)
				zones[m.Zone]++
			}
			if len(n.Self().Watchers) != 5 || zones["west"] > 3 || zones["east"] > 3 {
				t.Errorf("%s is watched by %v of %v", n.id, n.Self().Watchers, zones)
			}
			for _, id := range n.Self().Watchers {
				if m, _ := n.Member(id); m.RTT <= 0 || m.Connection != "direct" {
					t.Errorf("%s knows no round trip to its watcher %s", n.id, id)
				}
			}
		}
		some := c.nodes["n1"].Closest("/app/x", 2, func(m Member) bool { return m.ID != want[0].ID })
		if len(some) != 2 || some[0].ID != want[1].ID {
			t.Errorf("filtered: %v", some)
		}
	})
}

// Between most pairs of a larger cluster no heartbeats pass: the round trip is measured when somebody asks for it, over connections that are there.
func TestRoundTripsAreMeasuredWhenAskedFor(t *testing.T) {
	simulate(t, seedOf(t, 22), 12, func(c *cluster) {
		c.jitter(20*time.Millisecond, time.Millisecond)
		n := c.nodes["n1"]
		far := func() (ids []peer.ID) {
			for _, o := range n.All() {
				if o.RTT == 0 && o.ID != n.id && o.Connection != "" {
					ids = append(ids, o.ID)
				}
			}
			return ids
		}
		ids := far()
		if len(ids) < 3 {
			t.Fatalf("only %v are far", ids)
		}
		c.freeze(ids[0])
		start := time.Now()
		got := n.Measure(context.Background(), append(ids, "n1", "nobody"))
		if took := time.Since(start); took > measureFor {
			t.Errorf("it took %v", took)
		}
		if len(got) != len(ids)-1 {
			t.Errorf("measured %v of %v, of whom the first does not answer", got, ids)
		}
		for id, rtt := range got {
			if rtt < 40*time.Millisecond || rtt > 50*time.Millisecond {
				t.Errorf("%s is %v away", id, rtt)
			}
		}
		before, _ := n.end.Sent()
		if again := n.Measure(context.Background(), ids[1:]); !maps.Equal(again, got) {
			t.Errorf("asked again at once: %v, was %v", again, got)
		}
		if after, _ := n.end.Sent(); after != before {
			t.Error("asked again at once it measured again")
		}
		if now := far(); len(now) != len(ids) {
			t.Errorf("what was asked for is taken for a heartbeat's: far are %v, were %v", now, ids)
		}
		c.thaw(ids[0])
	})
}

func TestIdleTrafficIsSmall(t *testing.T) {
	for _, p := range []Profile{LAN, WAN} {
		simulateWith(t, seedOf(t, 15), 12, func(cfg *Config) { cfg.Profile = p }, func(c *cluster) {
			time.Sleep(20 * time.Second)
			before := map[peer.ID][2]uint64{}
			for id, n := range c.nodes {
				w, b := n.end.Sent()
				before[id] = [2]uint64{w, b}
			}
			time.Sleep(time.Minute)
			var writes, bytes uint64
			for id, n := range c.nodes {
				w, b := n.end.Sent()
				writes += w - before[id][0]
				bytes += b - before[id][1]
			}
			const perWrite = 12 + 22 + 52 // yamux, TLS, TCP/IP; a bare TCP ACK for at most every write comes back
			rate := float64(bytes+writes*(perWrite+52)) / 12 / 60
			limit := map[string]float64{"lan": 6000, "wan": 1500}[p.Name]
			t.Logf("%s: %.1f writes/s, %.0f B/s of payload, about %.0f B/s on the wire per node", p.Name, float64(writes)/12/60, float64(bytes)/12/60, rate)
			if rate > limit {
				t.Errorf("%s: %.0f B/s, limit %.0f", p.Name, rate, limit)
			}
		})
	}
}

func TestAnUpdateSentJustBeforeADeathDoesNotUndoIt(t *testing.T) {
	simulate(t, seedOf(t, 16), 5, func(c *cluster) {
		last := c.nodes["n2"].Self().Info
		c.kill("n2")
		if c.eventually(time.Second, "dead", func() error { return c.holds("n2", Dead) }); t.Failed() {
			return
		}
		last.Counter += 2 // sent to n4 alone in its last moment
		n4 := c.nodes["n4"]
		n4.locked(func() { n4.merge("n3", state{info: &last}) })
		time.Sleep(15 * time.Second)
		if err := c.holds("n2", Dead); err != nil {
			t.Error(err)
		}
		if got := n4.saw(func(ch Change) bool { return ch.New.ID == "n2" && ch.Old.State == Dead }); len(got) != 0 {
			t.Errorf("it rose: %+v", got)
		}
	})
}

func TestAfterAStandstillNobodyIsEvenSuspect(t *testing.T) {
	simulate(t, seedOf(t, 17), 5, func(c *cluster) {
		n1 := c.nodes["n1"]
		n1.clock.jump(time.Minute) // a suspended laptop wakes
		time.Sleep(10 * time.Second)
		if got := n1.saw(func(ch Change) bool { return ch.New.State == Suspect || ch.New.State == Dead }); len(got) != 0 {
			t.Errorf("%+v", got)
		}
	})
}

func TestANodeThatDiesWithAllItsWatchersIsMissed(t *testing.T) {
	simulate(t, seedOf(t, 18), 20, func(c *cluster) {
		gone := append(slices.Clone(c.nodes["n1"].Self().Watchers), "n1")
		for _, id := range gone {
			c.net.Isolate(id)
		}
		rest := slices.DeleteFunc(slices.Clone(c.ids), func(id peer.ID) bool { return slices.Contains(gone, id) })
		d := c.eventually(5*time.Second, "all six are found dead", func() error { return c.agree(rest) })
		t.Logf("found after %v", d)
		away := map[peer.ID]*node{} // they hold everybody dead, but nobody else is to believe it
		for _, id := range gone {
			away[id] = c.nodes[id]
			delete(c.nodes, id)
		}
		check := c.never(rest...)
		maps.Copy(c.nodes, away)
		time.Sleep(2 * time.Minute) // redials are far apart by now
		c.net.Heal()
		d = c.eventually(redialMost, "the first is met again", func() error {
			if len(c.nodes[rest[0]].Alive()) == len(rest) {
				return fmt.Errorf("none is")
			}
			return nil
		})
		e := c.eventually(20*time.Second, "then all are, soon", func() error { return c.agree(c.ids) })
		t.Logf("first after %v, all %v later", d, e)
		check()
	})
}

func TestSilenceOverAWideNetwork(t *testing.T) {
	simulateWith(t, seedOf(t, 19), 6, func(cfg *Config) { cfg.Profile = WAN }, func(c *cluster) {
		c.jitter(40*time.Millisecond, 40*time.Millisecond)
		time.Sleep(time.Minute)
		check := c.without("n3", func() func() { return c.never("n1", "n2", "n4", "n5", "n6") })
		c.net.Isolate("n3")
		d := c.eventually(6*time.Second, "confirmed", func() error { return c.holds("n3", Dead) })
		t.Logf("after %v", d)
		time.Sleep(time.Minute)
		if n := c.nodes["n3"]; len(n.Alive()) != 1 {
			t.Errorf("the cut-off one holds %d to be alive", len(n.Alive()))
		}
		check()
	})
}
