package arbiter

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

// lostAnswer has proposer p send something to leader l whose answer is lost, runs meanwhile, and heals. f is called on p.
func lostAnswer(c *cluster, p, l *node, request bool, meanwhile func(), f func(ctx context.Context)) {
	if err := put(p.arb(), "warm", "up", time.Second); err != nil { // so that the stream is there
		c.t.Fatal(err)
	}
	c.net.Cut(l.id, p.id, false)
	if request {
		c.net.Cut(p.id, l.id, false)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		ctx, done := within(20 * time.Second)
		defer done()
		f(ctx)
	})
	time.Sleep(300 * time.Millisecond)
	meanwhile()
	time.Sleep(3 * time.Second) // the proposer gives the answer up
	c.net.Heal()
	wg.Wait()
}

func TestInDoubt(t *testing.T) {
	inCluster(t, 21, 5, func(c *cluster) {
		time.Sleep(15 * time.Second)
		l := c.leader()
		var p, q *node
		for _, n := range c.live() {
			if n != l && p == nil {
				p = n
			} else if n != l {
				q = n
			}
		}
		ctx, done := within(time.Minute)
		defer done()
		claimBy := func(n *node, key string, expect uint64) (Register, error) {
			return n.arb().Claim(ctx, ClaimRequest{Key: key, Expect: expect, Owner: n.id, Boot: 1})
		}
		nothing := func() {}

		lostAnswer(c, p, l, false, nothing, func(ctx context.Context) {
			r, err := p.arb().Claim(ctx, ClaimRequest{Key: "once", Owner: p.id, Boot: 1})
			if err != nil || r.Epoch != 1 || r.Owner != p.id {
				c.t.Errorf("a claim whose answer was lost: %+v %v", r, err)
			}
		})
		lostAnswer(c, p, l, false, func() {
			if _, err := claimBy(q, "overtaken", 1); err != nil {
				c.t.Errorf("the second claim: %v", err)
			}
		}, func(ctx context.Context) {
			_, err := p.arb().Claim(ctx, ClaimRequest{Key: "overtaken", Owner: p.id, Boot: 1})
			var d *InDoubtError
			if !errors.Is(err, ErrInDoubt) || !errors.As(err, &d) || d.Current == nil || d.Current.Owner != q.id {
				c.t.Errorf("a claim that happened and was overtaken: %v", err)
			}
		})
		lostAnswer(c, p, l, true, func() {
			if _, err := claimBy(q, "slower", 0); err != nil {
				c.t.Errorf("the faster claim: %v", err)
			}
		}, func(ctx context.Context) {
			_, err := p.arb().Claim(ctx, ClaimRequest{Key: "slower", Owner: p.id, Boot: 1})
			if r, refused := errors.AsType[*RefusedError](err); !refused || r.Current.Owner != q.id {
				c.t.Errorf("a claim that certainly came too late: %v", err)
			}
		})

		// A commit, its answer lost, then the register claimed: the restore point shows that it happened, so no word of failure.
		own, err := claimBy(p, "state", 0)
		if err != nil {
			c.t.Fatal(err)
		}
		lostAnswer(c, p, l, false, func() {
			r, err := claimBy(q, "state", 1)
			if err != nil || r.Seq != 1 {
				c.t.Errorf("the next owner: %+v %v", r, err)
			}
		}, func(ctx context.Context) {
			_, err := p.arb().Commit(ctx, CommitRequest{Key: "state", Epoch: 1, Nonce: own.Nonce, Seq: 1, Root: []byte("r"), Holders: []peer.ID{p.id}, W: 1})
			if !errors.Is(err, ErrInDoubt) {
				c.t.Errorf("a commit that happened before the fence: %v", err)
			}
		})

		// A transaction answers with its first result, however often it goes out and whatever came after.
		lostAnswer(c, p, l, false, func() {
			if err := put(q.arb(), "counter", "other", time.Second); err != nil {
				c.t.Error(err)
			}
		}, func(ctx context.Context) {
			res, err := p.arb().Txn(ctx, TxnRequest{Nonce: 77, Compares: []Compare{{"counter", "exists", 0}}, Then: []Op{{Put: &PutOp{Key: "counter", Body: []byte("mine")}}}})
			if err != nil || !res.Succeeded || string(res.Registers[0].Body) != "mine" {
				c.t.Errorf("a transaction whose answer was lost: %+v %v", res, err)
			}
		})
		r, _, err := p.arb().Read(ctx, "counter")
		if err != nil || string(r.Body) != "other" || r.Revision != 2 {
			c.t.Errorf("done twice: %+v %v", r, err)
		}
	})
}

func TestNothingDoneWithoutALeader(t *testing.T) {
	inCluster(t, 22, 3, func(c *cluster) {
		l := c.leader()
		for _, n := range c.live() {
			if n != l {
				c.kill(n)
			}
		}
		time.Sleep(3 * time.Second) // the leader has stepped down
		err := put(l.arb(), "k", "v", time.Second)
		if !errors.Is(err, ErrNoLeader) || errors.Is(err, ErrInDoubt) {
			c.t.Errorf("without a leader: %v", err)
		}
		if _, _, err := func() (Register, bool, error) {
			ctx, done := within(time.Second)
			defer done()
			return l.arb().Read(ctx, "k")
		}(); !errors.Is(err, ErrNoLeader) {
			c.t.Errorf("read without a leader: %v", err)
		}
		if s := l.arb().Status(); s.HasLeader || s.FeedAge < time.Second {
			c.t.Errorf("status: %+v", s)
		}
	})
}

func TestBadRequests(t *testing.T) {
	inCluster(t, 23, 1, func(c *cluster) {
		a := c.nodes[0].arb()
		ctx, done := within(time.Second)
		defer done()
		long := string(make([]byte, MaxKey+1))
		for what, err := range map[string]error{
			"no key":     second(a.Claim(ctx, ClaimRequest{Owner: "n"})),
			"long key":   second(a.Claim(ctx, ClaimRequest{Key: long, Owner: "n"})),
			"bad key":    second(a.Claim(ctx, ClaimRequest{Key: "\xff", Owner: "n"})),
			"no owner":   second(a.Claim(ctx, ClaimRequest{Key: "k"})),
			"long body":  second(a.Claim(ctx, ClaimRequest{Key: "k", Owner: "n", Body: make([]byte, MaxBody+1)})),
			"field":      second2(a.Txn(ctx, TxnRequest{Compares: []Compare{{"k", "colour", 1}}})),
			"two in one": second2(a.Txn(ctx, TxnRequest{Then: []Op{{Put: &PutOp{Key: "k"}, Delete: "k"}}})),
			"nothing":    second2(a.Txn(ctx, TxnRequest{Then: []Op{{}}})),
			"no nonce":   second2(a.Txn(ctx, TxnRequest{Then: []Op{{Claim: &ClaimRequest{Key: "k", Owner: "n"}}}})),
		} {
			if err == nil || errors.Is(err, ErrInDoubt) || errors.Is(err, ErrNoLeader) {
				c.t.Errorf("%s: %v", what, err)
			}
		}
		if len(a.List("")) != 0 {
			c.t.Error("something was done")
		}
		if _, err := New(Config{}); err == nil {
			c.t.Error("an empty configuration was taken")
		}
		if _, err := a.Bootstrap(""); err == nil {
			c.t.Error("a group was bootstrapped twice")
		}
	})
}

func second(_ Register, err error) error   { return err }
func second2(_ TxnResult, err error) error { return err }

// TestBatching: commands of one node that come together go into few entries.
func TestBatching(t *testing.T) {
	inCluster(t, 24, 3, func(c *cluster) {
		time.Sleep(3 * time.Second)
		var n *node
		for _, x := range c.live() {
			if x != c.leader() {
				n = x
			}
		}
		before := c.leader().arb().Status().Commits
		var wg sync.WaitGroup
		for i := range 1000 {
			wg.Go(func() {
				ctx, done := within(10 * time.Second)
				defer done()
				r, err := n.arb().Claim(ctx, ClaimRequest{Key: fmt.Sprint("k", i), Owner: n.id, Boot: 1})
				if err != nil || r.Key != fmt.Sprint("k", i) || r.Epoch != 1 {
					c.t.Errorf("claim %d: %+v %v", i, r, err)
				}
			})
		}
		wg.Wait()
		if used := c.leader().arb().Status().Commits - before; used > 20 {
			c.t.Errorf("1000 claims took %d entries", used)
		}
	})
}
