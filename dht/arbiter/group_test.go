package arbiter

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// inCluster runs a test on a settled cluster of n nodes.
func inCluster(t *testing.T, seed uint64, n int, f func(c *cluster)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, seed)
		defer c.close()
		c.grow(n)
		switch {
		case n == 1:
			c.settled(10*time.Second, 1, 0)
		case n == 2:
			c.settled(10*time.Second, 2, 0)
		case n < 5:
			c.settled(10*time.Second, 3, 0)
		default:
			c.settled(10*time.Second, 5, 0)
		}
		f(c)
	})
}

func TestOneNode(t *testing.T) {
	inCluster(t, 1, 1, func(c *cluster) {
		n := c.nodes[0]
		if err := put(n.arb(), "a", "1", 10*time.Second); err != nil {
			c.t.Fatal(err)
		}
		ctx, cancel := within(time.Second)
		defer cancel()
		r, ok, err := n.arb().Read(ctx, "a")
		if err != nil || !ok || string(r.Body) != "1" {
			c.t.Fatalf("read: %+v %v %v", r, ok, err)
		}
		if err := n.arb().Sync(ctx); err != nil {
			c.t.Fatal(err)
		}
		if r, ok := n.arb().Get("a"); !ok || string(r.Body) != "1" {
			c.t.Fatalf("get: %+v", r)
		}
		s := n.arb().Status()
		if s.Role != "leader" || s.Cluster == "" || s.Coordinator != n.id || s.FeedAge != 0 || s.Boots != 1 {
			c.t.Fatalf("status: %+v", s)
		}
	})
}

func TestVotersFollowMembership(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 2)
		defer c.close()
		c.grow(1)
		c.settled(5*time.Second, 1, 0)
		c.grow(1)
		c.settled(5*time.Second, 2, 0)
		c.grow(1)
		c.settled(5*time.Second, 3, 0)
		c.grow(2)
		c.settled(5*time.Second, 5, 0)
		if err := put(c.nodes[4].arb(), "x", "five", time.Second); err != nil {
			t.Fatal(err)
		}
		// They die one by one, two seconds apart; each is confirmed, and the group shrinks down to the last.
		for i, want := range []int{3, 3, 2, 1} {
			victims := c.live()
			c.kill(victims[c.intn(len(victims))])
			begun := time.Now()
			c.settled(2*time.Second, want, 0)
			t.Logf("%d nodes left: %d voters after %s", 4-i, want, time.Since(begun))
			time.Sleep(max(0, 2*time.Second-time.Since(begun)))
		}
		last := c.live()[0]
		ctx, cancel := within(time.Second)
		defer cancel()
		if r, ok, err := last.arb().Read(ctx, "x"); err != nil || !ok || string(r.Body) != "five" {
			t.Fatalf("read at the last node: %+v %v %v", r, ok, err)
		}
		// And back, with their old disks.
		for _, n := range c.nodes {
			if n.arb() == nil {
				c.up(n, false)
			}
		}
		c.settled(15*time.Second, 5, 0)
		want := nearest(ids(c.nodes))[0]
		c.eventually(10*time.Second, "the closest is coordinator, everywhere", func() bool {
			return !slices.ContainsFunc(c.live(), func(n *node) bool { return n.arb().Status().Coordinator != want })
		})
	})
}

// TestAJoinStormAfterARestartOfTheLeader: a leader that was started anew sees everybody as if he had just come. The cluster is not young for that: who joins
// now votes only once it has been up for Settle.
func TestAJoinStormAfterARestartOfTheLeader(t *testing.T) {
	inCluster(t, 55, 3, func(c *cluster) {
		time.Sleep(2 * testTimings.Settle)
		old := ids(c.nodes)
		for _, n := range c.nodes {
			c.kill(n)
		}
		time.Sleep(time.Second)
		for _, n := range c.nodes {
			c.up(n, false)
		}
		c.settled(10*time.Second, 3, 0)
		c.grow(4)
		for end := time.Now().Add(testTimings.Settle - time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			for _, id := range c.leader2(nil).arb().Status().Voters {
				if !slices.Contains(old, id) {
					t.Fatalf("a newcomer votes %s before its time", time.Until(end))
				}
			}
		}
		c.settled(10*time.Second, 5, 0)
	})
}

// TestANewcomerThatOnlyTheLeaderReachesDoesNotVote: it would vote for nobody else, and be of no use without this leader.
func TestANewcomerThatOnlyTheLeaderReachesDoesNotVote(t *testing.T) {
	inCluster(t, 56, 3, func(c *cluster) {
		time.Sleep(2 * testTimings.Settle)
		lead := c.leader()
		c.grow(2)
		far := c.nodes[3]
		for _, n := range c.nodes {
			if n != lead && n != far {
				c.net.Cut(far.id, n.id, true)
			}
		}
		for end := time.Now().Add(3 * testTimings.Settle); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			if s := lead.arb().Status(); slices.Contains(s.Voters, far.id) || slices.Contains(s.Learners, far.id) {
				t.Fatalf("it votes or learns: %v, %v", s.Voters, s.Learners)
			}
		}
		c.net.Heal()
		c.settled(time.Minute, 5, 0)
	})
}

func ids(ns []*node) []peer.ID {
	var out []peer.ID
	for _, n := range ns {
		out = append(out, n.id)
	}
	return out
}

func TestClosestNodesVote(t *testing.T) {
	inCluster(t, 3, 9, func(c *cluster) {
		want := nearest(ids(c.nodes))[:5]
		c.eventually(time.Minute, "the closest five vote and the first of them leads", func() bool {
			s := c.nodes[0].arb().Status()
			return slices.Equal(s.Voters, want) && s.Coordinator == want[0] && s.Leader == want[0]
		})
	})
}

func TestLeaderDiesNextCommit(t *testing.T) {
	for _, n := range []int{3, 5, 8} {
		t.Run(fmt.Sprint(n), func(t *testing.T) {
			inCluster(t, 4, n, func(c *cluster) {
				time.Sleep(5 * time.Second)
				for i := range 3 {
					leader := c.leader()
					other := c.live()[c.intn(len(c.live()))]
					for other == leader {
						other = c.live()[c.intn(len(c.live()))]
					}
					if err := put(other.arb(), "k", fmt.Sprint(i), time.Second); err != nil {
						c.t.Fatal(err)
					}
					c.kill(leader)
					begun := time.Now()
					if err := put(other.arb(), "k", fmt.Sprint(i, "after"), 5*time.Second); err != nil {
						c.t.Fatal(err)
					}
					took := time.Since(begun)
					c.t.Logf("%d nodes: next commit after %s", n, took)
					if took > 100*time.Millisecond {
						c.t.Errorf("next commit took %s", took)
					}
					time.Sleep(5 * time.Second)
					c.up(leader, false)
					time.Sleep(5 * time.Second)
				}
			})
		})
	}
}

// A leader that has said goodbye sees itself gone. Were it to stand for election then, it would be in the way of its successor.
func TestALeaderDoesNotStandAgainstItself(t *testing.T) {
	inCluster(t, 3, 3, func(c *cluster) {
		l := c.leader()
		r := l.arb().raft.Load()
		term := r.CurrentTerm()
		l.arb().leaderDied(l.id)
		time.Sleep(2 * time.Second)
		if now := r.CurrentTerm(); now != term || r.State() != raft.Leader {
			c.t.Errorf("term %d became %d, and it is %s", term, now, r.State())
		}
		ctx, cancel := within(5 * time.Second)
		defer cancel()
		if err := l.arb().HandOver(ctx); err != nil {
			c.t.Error(err)
		}
		if r.State() == raft.Leader {
			c.t.Error("it still leads")
		}
	})
}

func TestFollowersApplyPromptly(t *testing.T) {
	inCluster(t, 5, 5, func(c *cluster) {
		time.Sleep(5 * time.Second)
		for i := range 5 {
			time.Sleep(3 * time.Second) // idle
			if err := put(c.leader().arb(), "k", fmt.Sprint(i), time.Second); err != nil {
				c.t.Fatal(err)
			}
			begun := time.Now()
			c.eventually(50*time.Millisecond, "all voters show it", func() bool {
				return !slices.ContainsFunc(c.live(), func(n *node) bool { r, _ := n.arb().Get("k"); return string(r.Body) != fmt.Sprint(i) })
			})
			if took := time.Since(begun); took > 20*time.Millisecond {
				c.t.Errorf("took %s", took)
			}
		}
	})
}

func TestFollowerOutsideTheGroup(t *testing.T) {
	inCluster(t, 6, 7, func(c *cluster) {
		time.Sleep(20 * time.Second)
		var out *node
		for _, n := range c.live() {
			if n.arb().Status().Role == "follower" {
				out = n
			}
		}
		var mu sync.Mutex
		var seen []string
		cancel := out.arb().Watch(func(old, now *Register) {
			mu.Lock()
			defer mu.Unlock()
			switch {
			case now == nil:
				seen = append(seen, "-"+old.Key)
			default:
				seen = append(seen, fmt.Sprintf("%s=%s/%d/%d", now.Key, now.Body, now.Epoch, now.Seq))
			}
		})
		defer cancel()
		ctx, done := within(10 * time.Second)
		defer done()
		must := func(err error) {
			c.t.Helper()
			if err != nil {
				c.t.Fatal(err)
			}
		}
		must(put(out.arb(), "a", "1", time.Second))
		r, err := c.leader().arb().Claim(ctx, ClaimRequest{Key: "a", Owner: out.id, Boot: 1})
		must(err)
		commit := func(seq uint64) {
			_, err := c.leader().arb().Commit(ctx, CommitRequest{Key: "a", Epoch: r.Epoch, Nonce: r.Nonce, Seq: seq, Root: []byte{byte(seq)}, Holders: []peer.ID{out.id}, W: 1})
			must(err)
		}
		// A run of checkpoints: the feed passes about one a second, Sync gets the last.
		for seq := uint64(1); seq <= 40; seq++ {
			commit(seq)
			time.Sleep(50 * time.Millisecond)
		}
		begun := time.Now()
		must(out.arb().Sync(ctx))
		if x, _ := out.arb().Get("a"); x.Seq != 40 || time.Since(begun) > 100*time.Millisecond {
			c.t.Errorf("after Sync (%s): seq %d", time.Since(begun), x.Seq)
		}
		_, err = out.arb().Txn(ctx, TxnRequest{Then: []Op{{Delete: "a"}}})
		must(err)
		must(out.arb().Sync(ctx))
		mu.Lock()
		n := len(seen)
		first, last := seen[0], seen[n-1]
		mu.Unlock()
		if first != "a=1/0/0" || last != "-a" || n > 10 {
			c.t.Errorf("seen: %v", seen)
		}
		if s := out.arb().Status(); s.FeedAge < 0 || s.FeedAge > 2*time.Second || s.Role != "follower" {
			c.t.Errorf("status: %+v", s)
		}
		// Its feeder dies: another one feeds on.
		feeder := c.of(out.arb().follow.from)
		c.kill(feeder)
		must(put(c.leader2(feeder).arb(), "b", "2", 5*time.Second))
		c.eventually(2*time.Second, "fed by another", func() bool { r, _ := out.arb().Get("b"); return string(r.Body) == "2" })
		// A cut shows as age.
		c.net.Isolate(out.id)
		time.Sleep(10 * time.Second)
		if age := out.arb().Status().FeedAge; age < 8*time.Second {
			c.t.Errorf("cut off for 10 s, but the view claims to be %s old", age)
		}
		c.net.Heal()
		c.eventually(5*time.Second, "fresh again", func() bool { return out.arb().Status().FeedAge < 2*time.Second })
	})
}

// leader2 waits for a leader other than n.
func (c *cluster) leader2(n *node) *node {
	c.t.Helper()
	var l *node
	c.eventually(5*time.Second, "a leader", func() bool { l = c.leader(); return l != nil && l != n })
	return l
}

func TestAllDownAndUp(t *testing.T) {
	inCluster(t, 7, 5, func(c *cluster) {
		ctx, done := within(time.Minute)
		defer done()
		c.adjust = func(cfg *Config) { cfg.Timings.Snapshot, cfg.Timings.SnapshotAfter = time.Second, 50 }
		for round := range 3 {
			for i := range 100 {
				if err := put(c.live()[i%5].arb(), fmt.Sprintf("r%d/%03d", round, i), "v", 5*time.Second); err != nil {
					c.t.Fatal(err)
				}
				if round > 0 && i%10 == 0 {
					time.Sleep(300 * time.Millisecond) // room for snapshots
				}
			}
			for _, n := range c.nodes {
				c.kill(n)
			}
			time.Sleep(100 * time.Millisecond)
			for _, n := range c.nodes {
				c.up(n, false)
				if got := len(n.arb().List(fmt.Sprintf("r%d/", round))); got < 90 {
					c.t.Errorf("right after its start, without a leader, node shows %d of 100", got)
				}
			}
			for _, n := range c.nodes {
				if err := n.arb().Sync(ctx); err != nil {
					c.t.Fatal(err)
				}
				if got := len(n.arb().List("r")); got != 100*(round+1) {
					c.t.Errorf("node has %d registers of %d", got, 100*(round+1))
				}
			}
			c.settled(20*time.Second, 5, 0)
		}
		if s := c.nodes[0].arb().Status(); s.Boots != 4 {
			c.t.Errorf("boots: %d", s.Boots)
		}
	})
}

func TestNewcomerGetsSnapshot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 8)
		c.adjust = func(cfg *Config) { cfg.Timings.Snapshot, cfg.Timings.SnapshotAfter = time.Second, 500 }
		defer c.close()
		c.grow(1)
		for i := range 12000 { // beyond TrailingLogs
			if err := put(c.nodes[0].arb(), fmt.Sprint("k", i%100), "v", time.Second); err != nil {
				t.Fatal(err)
			}
		}
		time.Sleep(5 * time.Second)
		if first, _ := c.nodes[0].arb().disk.FirstIndex(); first == 1 {
			t.Fatal("the log was not compacted: the test shows nothing")
		}
		c.grow(2)
		c.settled(20*time.Second, 3, 0)
		for _, n := range c.nodes {
			if len(n.arb().List("k")) != 100 {
				t.Errorf("node has %d registers", len(n.arb().List("k")))
			}
		}
		c.kill(c.nodes[0])
		if err := put(c.nodes[2].arb(), "k", "on", 5*time.Second); err != nil {
			t.Fatal(err)
		}
	})
}

func TestDrain(t *testing.T) {
	inCluster(t, 9, 6, func(c *cluster) {
		time.Sleep(15 * time.Second)
		leader := c.leader()
		for _, n := range c.live() {
			n.view().change(leader.id, func(m *Member) { m.Draining = true })
		}
		ctx, done := within(20 * time.Second)
		defer done()
		begun := time.Now()
		if err := leader.arb().StepDown(ctx); err != nil {
			c.t.Fatal(err)
		}
		c.t.Logf("stepped down after %s", time.Since(begun))
		c.settled(10*time.Second, 5, 0)
		s := leader.arb().Status()
		if slices.Contains(s.Voters, leader.id) || s.Leader == leader.id || s.Coordinator == leader.id {
			c.t.Errorf("after stepping down: %+v", s)
		}
		if err := put(leader.arb(), "x", "1", time.Second); err != nil {
			c.t.Error("a node outside the group proposes:", err)
		}
	})
}

// Who was drained and is readmitted may vote again at once: its wish to stop voting, which the leader keeps for a minute, ended with the drain.
func TestReadmittedAfterADrainANodeMayVoteAtOnce(t *testing.T) {
	inCluster(t, 9, 4, func(c *cluster) {
		c.settled(20*time.Second, 3, 0)
		voter := func(but ...*node) *node {
			for _, n := range c.live() {
				if !slices.Contains(but, n) && slices.Contains(n.arb().Status().Voters, n.id) {
					return n
				}
			}
			c.t.Fatal("there is no other voter")
			return nil
		}
		drained := voter(c.leader())
		drains := func(is bool) {
			for _, n := range c.live() {
				n.view().change(drained.id, func(m *Member) { m.Draining = is })
			}
		}
		drains(true)
		ctx, done := within(20 * time.Second)
		defer done()
		if err := drained.arb().StepDown(ctx); err != nil {
			c.t.Fatal(err)
		}
		c.settled(20*time.Second, 3, 0)
		drains(false)
		c.kill(voter(c.leader(), drained))
		c.eventually(20*time.Second, "it votes in place of the dead one", func() bool {
			return slices.Contains(c.leader().arb().Status().Voters, drained.id)
		})
	})
}

// A voter that is expelled is replaced although no view names it any more, and although the leader changes: a group whose dead are expelled one by one must not
// keep them until they are the majority.
func TestAnExpelledVoterIsReplacedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 9)
		defer c.close()
		var mu sync.Mutex
		gone := map[peer.ID]bool{}
		c.adjust = func(cfg *Config) {
			cfg.Timings.Unknown = time.Hour
			cfg.Expelled = func(id peer.ID) bool {
				mu.Lock()
				defer mu.Unlock()
				return gone[id]
			}
		}
		c.grow(8)
		c.settled(20*time.Second, 5, 0)
		for range 3 {
			time.Sleep(time.Second)
			victim := c.leader()
			c.kill(victim)
			mu.Lock()
			gone[victim.id] = true
			mu.Unlock()
			time.Sleep(100 * time.Millisecond) // the news of its death is forgotten, too
			for _, n := range c.live() {
				n.view().forget(victim.id)
			}
			c.eventually(20*time.Second, "the expelled voter is out of the group", func() bool {
				l := c.leader()
				return l != nil && !slices.Contains(l.arb().Status().Voters, victim.id)
			})
			if err := put(c.leader().arb(), "k", victim.id.String(), 5*time.Second); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// A step that was decided on for another group than the present one is not taken: meanwhile another node may have led, and have taken out the learner that is to
// vote now.
func TestAStepForAnotherGroupIsNotTaken(t *testing.T) {
	inCluster(t, 12, 4, func(c *cluster) {
		a := c.leader().arb()
		r := a.raft.Load()
		voters, learners, index := a.configurationAt(r)
		for _, st := range []step{{kind: stepVoter, id: testID(99)}, {kind: stepLearner, id: testID(99)}, {kind: stepRemove, id: voters[0]}, {kind: stepDemote, id: voters[0]}} {
			if err := a.keeper.do(t.Context(), r, st, index-1); err == nil {
				t.Errorf("%s was done", st.kind)
			}
		}
		if v, l, at := a.configurationAt(r); !slices.Equal(v, voters) || !slices.Equal(l, learners) || at != index {
			t.Errorf("the group was %v and %v at %d, and is %v and %v at %d", voters, learners, index, v, l, at)
		}
	})
}

func TestOnlyVoterCannotStepDown(t *testing.T) {
	inCluster(t, 10, 1, func(c *cluster) {
		ctx, done := within(3 * time.Second)
		defer done()
		if err := c.nodes[0].arb().StepDown(ctx); err == nil {
			c.t.Fatal("the only voter stepped down")
		}
		if err := put(c.nodes[0].arb(), "x", "1", time.Second); err != nil {
			c.t.Error(err)
		}
	})
}

func TestUnknownCommandStopsTheNode(t *testing.T) {
	inCluster(t, 11, 5, func(c *cluster) {
		time.Sleep(5 * time.Second)
		leader := c.leader()
		// A newer leader would do this: an entry with a field that this build does not know.
		b, err := proto.Marshal(&wirev1.ArbiterEntry{Format: 1, Commands: []*wirev1.ArbiterCommand{{Kind: &wirev1.ArbiterCommand_Release{Release: &wirev1.ArbiterRelease{Key: "k"}}}}})
		if err != nil {
			c.t.Fatal(err)
		}
		b = append(b, 0xfa, 0x3f, 0x01, 'x') // field 1023
		if resp := leader.arb().propose(t.Context(), b, 1); resp.GetCode() != wirev1.ArbiterResponse_FORMAT {
			c.t.Fatalf("the leader let it through: %v", resp)
		}
		before := leader.arb().Status().Index
		if err := leader.arb().raft.Load().Apply(b, time.Second).Error(); err != nil {
			c.t.Fatal(err)
		}
		stopped := func() (n int) {
			for _, x := range c.live() {
				if s := x.arb().Status(); s.Role == "halted" && s.Halted != "" && x.arb().raft.Load().State() == raft.Shutdown {
					n++
				}
			}
			return n
		}
		c.eventually(10*time.Second, "a majority has stopped; the others do not know that it is committed", func() bool { return stopped() >= 3 })
		for _, n := range c.live() {
			if s := n.arb().Status(); s.Index > before {
				c.t.Errorf("went on: %+v", s)
			}
		}
		// And stops there again after a restart.
		n := c.nodes[0]
		n.stop()
		c.up(n, false)
		time.Sleep(5 * time.Second)
		if err := put(n.arb(), "k", "v", 3*time.Second); err == nil {
			c.t.Error("something was applied behind what is unknown")
		}
	})
}

func TestRolledBackDiskIsRefused(t *testing.T) {
	inCluster(t, 12, 5, func(c *cluster) {
		time.Sleep(5 * time.Second)
		n := c.nodes[2]
		old := n.fs.CrashClone(vfs.CrashCloneCfg{})
		for i := range 20 {
			if err := put(n.arb(), fmt.Sprint(i), "v", time.Second); err != nil {
				c.t.Fatal(err)
			}
		}
		refused := func(what string, fs *vfs.MemFS) {
			c.t.Helper()
			n.fs = fs
			c.up(n, false)
			select {
			case err := <-n.done:
				if !errors.Is(err, ErrRolledBack) {
					c.t.Errorf("%s: %v", what, err)
				}
				c.t.Log(err)
			case <-time.After(10 * time.Second):
				c.t.Errorf("%s: it takes part: %+v", what, n.arb().Status())
				n.cancel()
				<-n.done
			}
			n.end()
			c.net.Kill(n.id)
			c.announce(n, false, 0)
			time.Sleep(time.Second)
		}
		c.kill(n)
		current := n.fs
		time.Sleep(5 * time.Second)
		refused("emptied", vfs.NewCrashableMem())
		refused("old copy", old)
		n.fs = current
		c.up(n, false)
		c.settled(10*time.Second, 5, 0)
		// Another node's disk.
		other := c.add()
		other.fs = n.fs.CrashClone(vfs.CrashCloneCfg{})
		if err := other.tryStart(false); !errors.Is(err, ErrRolledBack) {
			c.t.Errorf("another node's disk: %v", err)
		}
	})
}
