package arbiter

import (
	"testing"
	"testing/synctest"
	"time"
)

func TestOneNode(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 1)
		defer c.close()
		c.grow(1)
		n := c.nodes[0]
		if err := put(n.a, "a", "1", 10*time.Second); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := within(time.Second)
		defer cancel()
		r, ok, err := n.a.Read(ctx, "a")
		if err != nil || !ok || string(r.Body) != "1" {
			t.Fatalf("read: %+v %v %v", r, ok, err)
		}
		if err := n.a.Sync(ctx); err != nil {
			t.Fatal(err)
		}
		if r, ok := n.a.Get("a"); !ok || string(r.Body) != "1" {
			t.Fatalf("get: %+v", r)
		}
		s := n.a.Status()
		if s.Role != "leader" || s.Cluster == "" || s.Coordinator != n.id || s.FeedAge != 0 {
			t.Fatalf("status: %+v", s)
		}
	})
}

func TestGroupGrowsAndShrinks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(t, 2)
		defer c.close()
		c.grow(1)
		c.settled(5*time.Second, 1, 0)
		c.grow(1)
		c.settled(5*time.Second, 1, 1)
		c.grow(1)
		c.settled(5*time.Second, 3, 0)
		c.grow(2)
		c.settled(5*time.Second, 5, 0)
		c.grow(2)
		c.settled(5*time.Second, 5, 0)
	})
}
