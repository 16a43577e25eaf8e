package arbiter

import (
	"context"
	"fmt"
	"testing"
	"time"
)

// outsider is a node outside of the group that shows what is committed.
func (c *cluster) outsider() *node {
	c.t.Helper()
	var out *node
	c.eventually(30*time.Second, "a node outside of the group", func() bool {
		for _, n := range c.live() {
			if n.arb().Status().Role == "follower" && n.arb().Status().FeedAge >= 0 {
				out = n
			}
		}
		return out != nil
	})
	return out
}

// A node outside of the group that is started again without a way to anybody shows what it showed before, and knows that this may be old. In touch again it
// goes on from there: what was changed and deleted meanwhile is.
func TestANodeOutsideOfTheGroupRemembersOverARestart(t *testing.T) {
	inCluster(t, 16, 7, func(c *cluster) {
		time.Sleep(20 * time.Second)
		out := c.outsider()
		ctx, cancel := within(time.Minute)
		defer cancel()
		c.must(put(c.leader().arb(), "gone", "1", time.Second))
		for i := range 50 {
			c.must(put(c.leader().arb(), fmt.Sprintf("k%02d", i), "old", time.Second))
		}
		claimed, err := c.leader().arb().Claim(ctx, ClaimRequest{Key: "mine", Owner: out.id, Boot: 1, Body: []byte("what it is to do")})
		c.must(err)
		c.must(out.arb().Sync(ctx))
		time.Sleep(recallEvery + 100*time.Millisecond)
		was := out.arb().Status().Index

		c.kill(out)
		c.net.Isolate(out.id)
		c.up(out, false)
		c.net.Isolate(out.id) // a new life, a new connection to the net
		reg, ok := out.arb().Get("mine")
		if !ok || reg.Owner != out.id || reg.Epoch != claimed.Epoch || string(reg.Body) != "what it is to do" {
			c.t.Errorf("what it owned: %+v, %v", reg, ok)
		}
		if n := len(out.arb().List("k")); n != 50 {
			c.t.Errorf("%d registers of 50", n)
		}
		if s := out.arb().Status(); s.FeedAge >= 0 || s.Index < was || s.Cluster == "" {
			c.t.Errorf("what it knows of itself: %+v", s)
		}

		c.must(put(c.leader().arb(), "k07", "new", 5*time.Second))
		_, err = c.leader().arb().Txn(ctx, TxnRequest{Then: []Op{{Delete: "gone"}}})
		c.must(err)
		time.Sleep(3 * time.Second)
		if r, _ := out.arb().Get("k07"); string(r.Body) != "old" {
			c.t.Errorf("cut off it shows %q", r.Body)
		}
		c.net.Heal()
		c.eventually(10*time.Second, "it shows what was changed meanwhile", func() bool {
			r, _ := out.arb().Get("k07")
			_, there := out.arb().Get("gone")
			return string(r.Body) == "new" && !there && len(out.arb().List("k")) == 50
		})
		time.Sleep(recallEvery + 100*time.Millisecond)
		c.kill(out)
		c.net.Isolate(out.id)
		c.up(out, false)
		c.net.Isolate(out.id)
		if _, there := out.arb().Get("gone"); there {
			c.t.Error("what was deleted is back after another restart")
		}
		c.net.Heal()
	})
}

// What a node remembers of an incarnation that is over is not shown once a higher one was met, and not mixed with it; what a voter remembers is its log.
func TestWhatIsRememberedIsOfTheNewestIncarnation(t *testing.T) {
	inCluster(t, 17, 7, func(c *cluster) {
		time.Sleep(20 * time.Second)
		out := c.outsider()
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		c.must(put(c.leader().arb(), "a", "1", time.Second))
		c.must(out.arb().Sync(ctx))
		time.Sleep(recallEvery + 100*time.Millisecond)
		_, seen := out.arb().disk.incarnations()
		_, _, err := out.arb().disk.setIncarnations(func(group, seen incarnation) (incarnation, incarnation) {
			return group, incarnation{seen.number + 1, 7}
		})
		c.must(err)
		c.kill(out)
		c.net.Isolate(out.id)
		c.up(out, false)
		c.net.Isolate(out.id)
		if _, there := out.arb().Get("a"); there {
			c.t.Errorf("it shows a register of incarnation %s, and has met a higher one", seen)
		}
		if st, err := out.arb().disk.recalled(); err != nil || st != nil {
			c.t.Errorf("it still holds that: %v, %v", st, err)
		}
		voter := c.leader()
		if st, err := voter.arb().disk.recalled(); err != nil || st != nil {
			c.t.Errorf("a voter holds a second copy of what its log says: %v, %v", st, err)
		}
	})
}

func (c *cluster) must(err error) {
	c.t.Helper()
	if err != nil {
		c.t.Fatal(err)
	}
}
