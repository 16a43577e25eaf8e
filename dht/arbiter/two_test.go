package arbiter

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

// pair runs a test on two nodes that go by the rule of two: the primary and the secondary.
func inPair(t *testing.T, seed uint64, f func(c *cluster, primary, secondary *node)) {
	t.Helper()
	inCluster(t, seed, 2, func(c *cluster) {
		a, b := c.nodes[0], c.nodes[1]
		c.paired(a, b)
		f(c, a, b)
	})
}

// paired waits until both know the rule and have had contact.
func (c *cluster) paired(primary, secondary *node) {
	c.t.Helper()
	c.eventually(10*time.Second, "both go by the rule of two nodes", func() bool {
		for _, n := range []*node{primary, secondary} {
			x := n.arb().two
			other, first, on := x.partner(n.arb().raft.Load())
			inc, err := n.arb().speaks()
			if !on || err != nil || first != (n == primary) || !x.look(other, first, on, inc).met {
				return false
			}
		}
		return true
	})
}

func (n *node) incarnation() uint64 { return n.arb().Status().Incarnation }

// lostFound reads what a node put aside.
func (n *node) lostFound(name string) (lost, error) {
	var doc lost
	f, err := n.fs.Open("lost+found/" + name)
	if err != nil {
		return doc, err
	}
	b, err := io.ReadAll(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return doc, err
	}
	return doc, json.Unmarshal(b, &doc)
}

// has asserts what a node shows once it is in step.
func (c *cluster) has(n *node, key, want string) {
	c.t.Helper()
	ctx, done := within(5 * time.Second)
	defer done()
	r, ok, err := n.arb().Read(ctx, key)
	if err != nil || !ok || string(r.Body) != want {
		c.t.Errorf("%s at %s: %q %v %v, want %q", key, n.id.String()[:8], r.Body, ok, err, want)
	}
}

// TestTwoNodesKillEither: of two nodes either one is killed, and the other goes on within a second, with everything that was committed; the
// dead one returns, puts aside what it held, and both vote again.
func TestTwoNodesKillEither(t *testing.T) {
	for i, who := range []string{"primary", "secondary"} {
		t.Run(who, func(t *testing.T) {
			inPair(t, uint64(40+i), func(c *cluster, a, b *node) {
				for round := range 3 {
					victim, other := a, b
					if (who == "secondary") == (round%2 == 0) { // the one that stays is primary afterwards
						victim, other = b, a
					}
					if err := put(victim.arb(), "k", fmt.Sprint(round), time.Second); err != nil {
						t.Fatal(err)
					}
					before := other.incarnation()
					c.kill(victim)
					begun := time.Now()
					if err := put(other.arb(), "k2", fmt.Sprint(round), 5*time.Second); err != nil {
						t.Fatal(err)
					}
					took := time.Since(begun)
					t.Logf("round %d: next commit after %s", round, took)
					if took > 500*time.Millisecond {
						t.Errorf("round %d: the next commit took %s", round, took)
					}
					if now := other.incarnation(); now != before+1 {
						t.Errorf("incarnation %d before, %d after", before, now)
					}
					c.has(other, "k", fmt.Sprint(round))
					time.Sleep(3 * time.Second)
					c.up(victim, false)
					c.settled(10*time.Second, 2, 0)
					c.paired(other, victim)
					c.has(victim, "k2", fmt.Sprint(round))
					doc, err := victim.lostFound(fmt.Sprintf("%d.json", before))
					if err != nil || doc.Incarnation != before || doc.SupersededBy != before+1 || len(doc.Registers) == 0 {
						t.Errorf("lost+found: %+v %v", doc, err)
					}
				}
			})
		})
	}
}

// TestTwoNodesKillAgainAtOnce: the dead node returns and is killed again as soon as the two have had contact, less than a second after the
// other went on alone.
func TestTwoNodesKillAgainAtOnce(t *testing.T) {
	inPair(t, 52, func(c *cluster, a, b *node) {
		for round := range 4 {
			c.kill(b)
			begun := time.Now()
			if err := put(a.arb(), "k", fmt.Sprint(round), 5*time.Second); err != nil {
				t.Fatal(err)
			}
			if took := time.Since(begun); took > 500*time.Millisecond {
				t.Errorf("round %d: the next commit took %s", round, took)
			}
			c.up(b, false)
			c.paired(a, b)
		}
	})
}

// TestTwoNodesSilence: without a proof only the primary goes on, after Alone; the secondary never.
func TestTwoNodesSilence(t *testing.T) {
	inPair(t, 42, func(c *cluster, a, b *node) {
		c.net.Isolate(b.id)
		begun := time.Now()
		if err := put(a.arb(), "k", "alone", 20*time.Second); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begun); took < 2*time.Second || took > 5*time.Second {
			t.Errorf("the primary went on after %s", took)
		}
		if err := put(b.arb(), "k", "never", 10*time.Second); err == nil {
			t.Error("the secondary went on, too")
		}
		c.net.Heal()
		c.settled(20*time.Second, 2, 0)
		c.paired(a, b)
		c.has(b, "k", "alone")
		if inc := b.incarnation(); inc != 2 {
			t.Errorf("incarnation %d", inc)
		}

		// The other way round: the primary is cut off and the secondary waits for it. Its power is lost then: still no proof.
		c.net.Isolate(a.id)
		if err := put(b.arb(), "k", "waits", 2*time.Second); err == nil {
			t.Error("the secondary did not wait")
		}
		c.net.Heal()
		if err := put(b.arb(), "k", "again", 10*time.Second); err != nil {
			t.Error(err)
		}
	})
}

// TestTwoNodesLateProof: the link goes down, the primary goes on alone and dies, the link comes back: the secondary now has proof of its
// death, too late. It must not go on from its old state.
func TestTwoNodesLateProof(t *testing.T) {
	inPair(t, 43, func(c *cluster, a, b *node) {
		c.net.SetTimeout(time.Second) // what the two said last does not arrive when the link comes back
		c.net.Isolate(b.id)
		if err := put(a.arb(), "k", "alone", 20*time.Second); err != nil {
			t.Fatal(err)
		}
		c.eventually(10*time.Second, "the secondary has found the link gone", func() bool { return b.arb().two.isDown(a.id) })
		time.Sleep(3 * time.Second)
		c.kill(a)
		c.net.Heal()
		time.Sleep(20 * time.Second)
		if inc := b.incarnation(); inc != 1 {
			t.Fatalf("the secondary is in incarnation %d", inc)
		}
		if _, seen := b.arb().disk.incarnations(); seen.number != 1 {
			t.Fatalf("the secondary has heard of incarnation %s: the test shows nothing", seen)
		}
		c.up(a, false)
		c.settled(20*time.Second, 2, 0)
		c.has(b, "k", "alone")
		if inc := b.incarnation(); inc != 2 {
			t.Errorf("incarnation %d after meeting the primary", inc)
		}
	})
}

// TestTwoNodesFreshlyBooted: a node that was started after the other was gone goes on alone in no case, proof or not.
func TestTwoNodesFreshlyBooted(t *testing.T) {
	for i, who := range []string{"primary", "secondary"} {
		// Without a snapshot it does not even know of the rule before it hears the other.
		for j, snapshots := range []string{"log", "snapshot"} {
			t.Run(who+"/"+snapshots, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					c := newCluster(t, uint64(44+2*i+100*j))
					defer c.close()
					if snapshots == "snapshot" {
						c.adjust = func(cfg *Config) { cfg.Timings.Snapshot, cfg.Timings.SnapshotAfter = 100*time.Millisecond, 1 }
					}
					c.grow(2)
					c.settled(10*time.Second, 2, 0)
					c.paired(c.nodes[0], c.nodes[1])
					first, second := c.nodes[0], c.nodes[1]
					if who == "secondary" {
						first, second = second, first
					}
					if err := put(first.arb(), "k", "both", time.Second); err != nil {
						t.Fatal(err)
					}
					time.Sleep(time.Second)
					c.kill(first)
					if err := put(second.arb(), "k", "alone", 5*time.Second); err != nil {
						t.Fatal(err)
					}
					c.kill(second)
					c.up(first, false)
					time.Sleep(20 * time.Second)
					if s := first.arb().Status(); s.HasLeader || s.Incarnation != 1 {
						t.Fatalf("it goes on: %+v", s)
					}
					c.up(second, false)
					c.settled(20*time.Second, 2, 0)
					c.has(first, "k", "alone")
				})
			})
		}
	}
}

// TestTwoToThreeAndBack: a third node joins and is gone, again and again; whoever is killed then, nothing is lost.
func TestTwoToThreeAndBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 46)
		defer c.close()
		c.grow(2)
		c.settled(10*time.Second, 2, 0)
		for round := range 3 {
			c.grow(1)
			c.settled(20*time.Second, 3, 0)
			if s := c.leader2(nil).arb().fsm.shown.Load().meta.TwoNode; s != "" {
				t.Errorf("the rule of two nodes holds with three voters: %s", s)
			}
			if err := put(c.live()[2].arb(), "k", fmt.Sprint(round), 5*time.Second); err != nil {
				t.Fatal(err)
			}
			c.kill(c.live()[c.intn(3)])
			c.settled(10*time.Second, 2, 0)
			l := c.live()
			c.eventually(5*time.Second, "the rule holds", func() bool {
				_, _, on := l[0].arb().two.partner(l[0].arb().raft.Load())
				return on
			})
			time.Sleep(2 * time.Second)
			c.kill(l[c.intn(2)])
			if err := put(c.live()[0].arb(), "k2", fmt.Sprint(round), 5*time.Second); err != nil {
				t.Fatal(err)
			}
			c.has(c.live()[0], "k", fmt.Sprint(round))
			c.grow(1)
			c.settled(20*time.Second, 2, 0)
			time.Sleep(2 * time.Second)
		}
	})
}

// TestStaleGroupCannotTalk: a node of a lower incarnation that missed everything gets neither a stream nor a vote from one of a higher.
func TestStaleGroupCannotTalk(t *testing.T) {
	inPair(t, 47, func(c *cluster, a, b *node) {
		c.kill(b)
		if err := put(a.arb(), "k", "alone", 5*time.Second); err != nil {
			t.Fatal(err)
		}
		at, ok := a.arb().greet(incarnation{1, 0})
		if ok || at.number != 2 {
			t.Errorf("a stream of incarnation 1 was admitted: %s %v", at, ok)
		}
		if at, ok := a.arb().greet(incarnation{}); ok {
			t.Errorf("a stream of no incarnation was admitted: %s", at)
		}
		resp := a.arb().two.serveBeat(b.id, incarnation{1, 0})
		if resp.GetReason() == "" {
			t.Error("a beat of incarnation 1 counted")
		}
		// What was met is remembered beyond the process.
		c.up(b, false)
		c.settled(10*time.Second, 2, 0)
		if _, seen := b.arb().disk.incarnations(); seen.number != 2 {
			t.Errorf("seen %s", seen)
		}
		b.stop()
		d, err := openDisk(b.fs, "raft", b.c.logger())
		if err != nil {
			t.Fatal(err)
		}
		group, seen := d.incarnations()
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		if group.number != 2 || seen != group {
			t.Errorf("on disk: %s, seen %s", group, seen)
		}
	})
}

// TestNothingCountsAsContactWhileANodeGoesAlone: between the question whether the other is dead and what is done about the answer a process that was
// started there is not taken for the one that was met.
func TestNothingCountsAsContactWhileANodeGoesAlone(t *testing.T) {
	inPair(t, 53, func(c *cluster, a, b *node) {
		inc, err := a.arb().speaks()
		if err != nil {
			t.Fatal(err)
		}
		if resp := a.arb().two.serveBeat(b.id, inc); resp.GetReason() != "" {
			t.Fatalf("a beat does not count: %s", resp.GetReason())
		}
		a.arb().two.leave(true)
		if resp := a.arb().two.serveBeat(b.id, inc); resp.GetReason() == "" {
			t.Error("a beat counted while the node was about to go on alone")
		}
		a.arb().two.leave(false)
	})
}

// TestDivergentTailIsPutAside: of a group of three two die, having committed what the third does not know; the third is recovered. The dead
// return, put aside what only they had, and follow.
func TestDivergentTailIsPutAside(t *testing.T) {
	inCluster(t, 48, 3, func(c *cluster) {
		time.Sleep(3 * time.Second)
		l := c.leader()
		var rest []*node
		for _, n := range c.live() {
			if n != l {
				rest = append(rest, n)
			}
		}
		last := rest[0]
		if err := put(l.arb(), "k", "known to all", time.Second); err != nil {
			t.Fatal(err)
		}
		ctx, done := within(time.Minute)
		defer done()
		r, err := l.arb().Claim(ctx, ClaimRequest{Key: "x", Owner: l.id, Boot: 1})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		c.net.Isolate(last.id)
		if err := put(l.arb(), "tail", "of two", 5*time.Second); err != nil {
			t.Fatal(err)
		}
		time.Sleep(15 * time.Second) // the connections break: what is under way on them would arrive after all
		c.kill(l)
		c.kill(rest[1])
		c.net.Heal()
		time.Sleep(3 * time.Second)
		if err := put(last.arb(), "k", "no", time.Second); err == nil {
			t.Fatal("one of three went on")
		}
		s := last.arb().Survivors(ctx)
		if len(s) != 1 || s[0].Role != "voter" || s[0].Incarnation != 1 || len(s[0].Voters) != 3 || s[0].Leader != "" {
			t.Errorf("survivors: %+v", s)
		}
		inc, err := last.arb().Recover(ctx, Recovery{Adopt: []Adoption{
			{Key: "x", Seq: 7, Root: []byte("newer"), Holders: []peer.ID{last.id}}, {Key: "gone", Seq: 1, Root: []byte("r"), Holders: []peer.ID{last.id}},
		}})
		if err != nil || inc != 2 {
			t.Fatalf("recover: %d %v", inc, err)
		}
		got, _, err := last.arb().Read(ctx, "x")
		if err != nil || got.Seq != 7 || string(got.Root) != "newer" || got.Incarnation != 2 || got.Epoch != r.Epoch || got.Nonce != r.Nonce {
			t.Errorf("after the recovery: %+v %v", got, err)
		}
		// The owner's epoch goes on in the new incarnation.
		if _, err := last.arb().Commit(ctx, CommitRequest{Key: "x", Epoch: r.Epoch, Nonce: r.Nonce, Seq: 8, Root: []byte("r8"), Holders: []peer.ID{last.id}, W: 1}); err != nil {
			t.Error(err)
		}
		c.up(l, false)
		c.up(rest[1], false)
		c.settled(20*time.Second, 3, 0)
		for _, n := range []*node{l, rest[1]} {
			doc, err := n.lostFound("1.json")
			if err != nil {
				t.Fatal(err)
			}
			found := false
			for _, r := range doc.Registers {
				found = found || r.Key == "tail" && string(r.Body) == "of two"
			}
			if !found || doc.SupersededBy != 2 {
				t.Errorf("lost+found does not tell what was lost: %+v", doc)
			}
			c.has(n, "k", "known to all")
			if _, there := n.arb().Get("tail"); there {
				t.Error("a register of the lower incarnation is still shown")
			}
		}
	})
}

// TestRecoveredOnBothSides: an operator recovers on one side of a cut while the other goes on by itself: two incarnations of one number. When
// they meet one of them wins, by its lineage, and the other's commits are put aside; nothing of both is mixed.
func TestRecoveredOnBothSides(t *testing.T) {
	for seed := range uint64(4) {
		inPair(t, 60+seed, func(c *cluster, a, b *node) {
			if err := put(a.arb(), "common", "v", time.Second); err != nil {
				t.Fatal(err)
			}
			time.Sleep(time.Second)
			c.net.Isolate(b.id)
			for i := range 3 + int(seed) {
				if err := put(a.arb(), fmt.Sprint("a", i), "a", 10*time.Second); err != nil {
					t.Fatal(err)
				}
			}
			ctx, done := within(time.Minute)
			defer done()
			if inc, err := b.arb().Recover(ctx, Recovery{}); err != nil || inc != 2 {
				t.Fatalf("recover: %d %v", inc, err)
			}
			for i := range 5 - int(seed) {
				if err := put(b.arb(), fmt.Sprint("b", i), "b", time.Second); err != nil {
					t.Fatal(err)
				}
			}
			c.net.Heal()
			c.settled(20*time.Second, 2, 0)
			winner, loser, letter := a, b, "a"
			if _, there := b.arb().Get("b0"); there {
				winner, loser, letter = b, a, "b"
			}
			doc, err := loser.lostFound("2.json")
			if err != nil || doc.Incarnation != 2 || doc.SupersededBy != 2 {
				t.Errorf("lost+found: %+v %v", doc, err)
			}
			for _, n := range []*node{winner, loser} {
				if err := n.arb().Sync(ctx); err != nil {
					t.Fatal(err)
				}
				for _, r := range n.arb().List("") {
					if r.Key != "common" && !strings.HasPrefix(r.Key, letter) {
						t.Errorf("%s shows %s, and %s won", n.id.String()[:8], r.Key, letter)
					}
				}
				c.has(n, "common", "v")
				c.has(n, letter+"0", letter)
			}
		})
	}
}

// TestRecoverRefuses: a group that has its majority is not recovered, nor one that a node knows nothing of.
func TestRecoverRefuses(t *testing.T) {
	inCluster(t, 49, 4, func(c *cluster) {
		time.Sleep(5 * time.Second)
		ctx, done := within(10 * time.Second)
		defer done()
		for _, n := range c.live() {
			_, err := n.arb().Recover(ctx, Recovery{})
			// One that has learned before, and is out of the group again, has a log, too.
			if !errors.Is(err, ErrMajority) && !(errors.Is(err, ErrNoLog) && n.arb().Status().Role == "follower") || strings.Contains(err.Error(), "\n") {
				t.Errorf("recover at a %s: %v", n.arb().Status().Role, err)
			}
			if n.incarnation() != 1 {
				t.Error("it was done")
			}
		}
	})
}
