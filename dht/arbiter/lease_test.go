package arbiter

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

// rated is a clock whose rate differs from real time.
type rated struct {
	begun time.Time
	rate  float64
}

func (r rated) now() time.Duration {
	return time.Duration(float64(time.Since(r.begun))*r.rate) + time.Hour
}

// real is the moment at which the clock will show d.
func (r rated) real(d time.Duration) time.Time {
	return r.begun.Add(time.Duration(float64(d-time.Hour) / r.rate))
}

// leaseCluster is a cluster in which keys that begin with "x" are leased. Rates of clocks are given by node, in order.
func leaseCluster(t *testing.T, seed uint64, n int, rates ...float64) (*cluster, map[peer.ID]rated) {
	c := newCluster(t, seed)
	var mu sync.Mutex
	clocks := map[peer.ID]rated{}
	c.adjust = func(cfg *Config) {
		mu.Lock()
		defer mu.Unlock()
		r := 1.0
		if i := len(clocks); i < len(rates) {
			r = rates[i]
		}
		if old, again := clocks[cfg.Self]; again {
			r = old.rate
		}
		clock := rated{time.Now(), r}
		clocks[cfg.Self] = clock
		cfg.BootTime = clock.now
		cfg.Leased = func(key string, _ []byte) bool { return key[0] == 'x' }
	}
	c.grow(n)
	c.await("a leader", 10*time.Second, func() bool { return c.leader() != nil })
	time.Sleep(4 * time.Second) // the voters, and the first leader's own wait
	return c, clocks
}

func (c *cluster) await(what string, within time.Duration, cond func() bool) {
	c.t.Helper()
	for end := time.Now().Add(within); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			c.t.Fatalf("not within %s: %s", within, what)
		}
	}
}

func claimBy(ctx context.Context, via, owner *node, key string, expect uint64) (Register, error) {
	return via.arb().Claim(ctx, ClaimRequest{Key: key, Expect: expect, Owner: owner.id, Boot: owner.boot})
}

// insist claims until it need not wait any more, and returns the epoch.
func (c *cluster) insist(via, owner *node, key string, expect uint64, within time.Duration) Register {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), within)
	defer cancel()
	for {
		reg, err := claimBy(ctx, via, owner, key, expect)
		if err == nil {
			return reg
		}
		wait, ok := errors.AsType[*WaitError](err)
		if !ok || ctx.Err() != nil {
			c.t.Fatalf("claim %s: %v", key, err)
		}
		time.Sleep(wait.For)
	}
}

func hold(ctx context.Context, o *node, seq uint64, keys ...LeaseKey) (Leases, error) {
	return o.arb().Lease(ctx, LeaseRequest{Boot: o.boot, Seq: seq, Keys: keys})
}

func TestAClaimWaitsForTheLeaseOfTheEpochThatItEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := leaseCluster(t, 1, 3)
		defer c.close()
		a, b := c.nodes[1], c.nodes[2]
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		reg := c.insist(a, a, "x", 0, time.Second)
		key := LeaseKey{"x", reg.Epoch}
		got, err := hold(ctx, a, 1, key)
		if err != nil || len(got.Held) != 1 || got.For != 3*time.Second {
			t.Fatalf("the owner asked for its lease: %+v, %v", got, err)
		}
		if other, err := hold(ctx, b, 1, key); err != nil || len(other.Held) != 0 {
			t.Fatalf("another node got the owner's lease: %+v, %v", other, err)
		}
		begin := time.Now()
		if _, err := claimBy(ctx, b, b, "x", 1); err == nil {
			t.Fatal("the claim went through while the lease was held")
		} else if _, wait := errors.AsType[*WaitError](err); !wait {
			t.Fatal(err)
		}
		if late, err := hold(ctx, a, 2, key); err != nil || len(late.Held) != 0 {
			t.Errorf("the lease of a revoked epoch was renewed: %+v, %v", late, err)
		}
		now := c.insist(b, b, "x", 1, 10*time.Second)
		if took := time.Since(begin); took < 3*time.Second || took > 3500*time.Millisecond || now.Epoch != 2 {
			t.Errorf("epoch %d after %s, want 2 after a little more than 3 s", now.Epoch, took)
		}
		// What is not leased does not wait, nor does the owner itself.
		if reg := c.insist(a, a, "free", 0, time.Second); reg.Epoch != 1 {
			t.Error(reg.Epoch)
		}
		if reg, err := claimBy(ctx, b, b, "free", 1); err != nil || reg.Epoch != 2 {
			t.Error(reg.Epoch, err)
		}
		if got, err := hold(ctx, b, 2, LeaseKey{"x", 2}); err != nil || len(got.Held) != 1 {
			t.Fatal(got, err)
		}
		if reg, err := claimBy(ctx, b, b, "x", 2); err != nil || reg.Epoch != 3 {
			t.Error("the holder's own next epoch", reg.Epoch, err)
		}
		// The lease was for epoch 2, and the owner of epoch 3 still believes in it.
		if _, err := claimBy(ctx, a, a, "x", 3); err == nil {
			t.Error("the claim went through while the owner believed in the lease of its epoch before")
		}
	})
}

func TestALeaseThatIsGivenUpNeedNotBeWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := leaseCluster(t, 2, 3)
		defer c.close()
		a, b := c.nodes[1], c.nodes[2]
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		key := LeaseKey{"x", c.insist(a, a, "x", 0, time.Second).Epoch}
		if got, err := hold(ctx, a, 1, key); err != nil || len(got.Held) != 1 {
			t.Fatal(got, err)
		}
		if _, err := a.arb().Lease(ctx, LeaseRequest{Boot: a.boot, Seq: 3, GiveUp: []LeaseKey{key}}); err != nil {
			t.Fatal(err)
		}
		if late, err := hold(ctx, a, 2, key); err != nil || len(late.Held) != 0 {
			t.Errorf("a request sent before the lease was given up renewed it: %+v, %v", late, err)
		}
		if reg, err := claimBy(ctx, b, b, "x", 1); err != nil || reg.Epoch != 2 {
			t.Errorf("epoch %d, %v", reg.Epoch, err)
		}
	})
}

func TestARevokedEpochIsRenewedAgainWhenNobodyClaimsIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := leaseCluster(t, 3, 3)
		defer c.close()
		a, b := c.nodes[1], c.nodes[2]
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		key := LeaseKey{"x", c.insist(a, a, "x", 0, time.Second).Epoch}
		if got, err := hold(ctx, a, 1, key); err != nil || len(got.Held) != 1 {
			t.Fatal(got, err)
		}
		if _, err := claimBy(ctx, b, b, "x", 1); err == nil {
			t.Fatal("the claim went through while the lease was held")
		}
		time.Sleep(revocationHolds)
		got, err := hold(ctx, a, 2, key)
		if err != nil || len(got.Held) != 1 {
			t.Fatalf("the claimer has given up, and the lease is not renewed: %+v, %v", got, err)
		}
		if _, err := claimBy(ctx, b, b, "x", 1); err == nil {
			t.Error("the claim went through by what was known before the renewal")
		}
	})
}

func TestADeletedRegisterWaitsForItsLeaseToo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := leaseCluster(t, 4, 3)
		defer c.close()
		a, b := c.nodes[1], c.nodes[2]
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		key := LeaseKey{"x", c.insist(a, a, "x", 0, time.Second).Epoch}
		if got, err := hold(ctx, a, 1, key); err != nil || len(got.Held) != 1 {
			t.Fatal(got, err)
		}
		if _, err := b.arb().Txn(ctx, TxnRequest{Then: []Op{{Delete: "x"}}}); err == nil {
			t.Error("another node deleted it while the lease was held: the register could be made anew")
		}
		if _, err := a.arb().Txn(ctx, TxnRequest{Then: []Op{{Delete: "x"}}}); err != nil {
			t.Error("its owner could not delete it:", err)
		}
	})
}

// The waiting commands of an entry do not hold up the others, and each caller gets its own answer.
func TestWhatWaitsHoldsNothingElseUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := leaseCluster(t, 5, 3)
		defer c.close()
		a, b := c.nodes[1], c.nodes[2]
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c.insist(a, a, "x", 0, time.Second)
		if got, err := hold(ctx, a, 1, LeaseKey{"x", 1}); err != nil || len(got.Held) != 1 {
			t.Fatal(got, err)
		}
		var wg sync.WaitGroup
		var mu sync.Mutex
		waits, done := 0, 0
		for i := range 40 {
			wg.Go(func() {
				key, expect := "x", uint64(1)
				if i%2 == 0 {
					key, expect = fmt.Sprint("y", i), 0
				}
				reg, err := claimBy(ctx, b, b, key, expect)
				mu.Lock()
				defer mu.Unlock()
				if _, wait := errors.AsType[*WaitError](err); wait && key == "x" {
					waits++
				} else if err == nil && reg.Key == key {
					done++
				}
			})
		}
		wg.Wait()
		if waits != 20 || done != 20 {
			t.Errorf("%d waited, %d were done; want 20 and 20", waits, done)
		}
	})
}

// A host that refuses the connection runs no process of the owner: what the process left behind has ended after its last grant.
func TestARefusedConnectionShortensTheWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, _ := leaseCluster(t, 6, 3)
		defer c.close()
		lead := c.leader()
		var rest []*node
		for _, n := range c.nodes {
			if n != lead {
				rest = append(rest, n)
			}
		}
		a, b := rest[0], rest[1]
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		c.insist(a, a, "x", 0, time.Second)
		if got, err := hold(ctx, a, 1, LeaseKey{"x", 1}); err != nil || len(got.Held) != 1 {
			t.Fatal(got, err)
		}
		begin := time.Now()
		c.kill(a)
		c.insist(b, b, "x", 1, 10*time.Second)
		if took := time.Since(begin); took < processLease || took > 2500*time.Millisecond {
			t.Errorf("it took %s; want a little more than the %s that an orphan has left", took, processLease)
		}
	})
}

// I3, I4, I5 for the leader's side: whatever happens to leaders and owners, with clocks at the limit of their rates, no claim goes through before
// the moment at which the owner's last acknowledged lease has ended in real time.
func TestNoClaimBeforeTheLeaseHasEndedInRealTime(t *testing.T) {
	from, n := schedules(t)
	for seed := from; seed < from+n; seed++ {
		t.Run(fmt.Sprint("seed", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { leaseSchedule(t, seed) })
		})
	}
}

func leaseSchedule(t *testing.T, seed uint64) {
	rates := []float64{0.99, 1.01, 0.99, 1.01, 1}
	if seed%2 == 0 {
		rates = []float64{1.01, 0.99, 1.01, 0.99, 1}
	}
	c, clocks := leaseCluster(t, seed, 5, rates...)
	defer c.close()
	ctx, cancel := context.WithCancel(context.Background())
	var mu sync.Mutex
	believes := map[uint64]time.Time{} // by epoch: until when its owner believes in its lease, in real time
	var epochs []uint64
	var wg sync.WaitGroup
	for i, o := range c.nodes[:3] { // those who want to own it
		wg.Go(func() {
			var reg Register
			seq := uint64(0)
			for ctx.Err() == nil {
				part, done := context.WithTimeout(ctx, 700*time.Millisecond)
				a := o.arb()
				now, ok, err := a.Read(part, "x")
				if err == nil {
					reg = now
				}
				switch {
				case ok && reg.Owner == o.id:
					seq++
					got, err := a.Lease(part, LeaseRequest{Boot: o.boot, Seq: seq, Keys: []LeaseKey{{"x", reg.Epoch}}})
					if err == nil && len(got.Held) == 1 {
						until := clocks[o.id].real(got.Asked + got.For)
						mu.Lock()
						if until.After(believes[reg.Epoch]) {
							believes[reg.Epoch] = until
						}
						mu.Unlock()
					}
				case err == nil:
					now, err := claimBy(part, o, o, "x", reg.Epoch)
					if err == nil && now.Owner == o.id {
						mu.Lock()
						for e, until := range believes {
							if e < now.Epoch && time.Now().Before(until) {
								t.Errorf("epoch %d was claimed %s before the lease of epoch %d ended", now.Epoch, time.Until(until), e)
							}
						}
						epochs = append(epochs, now.Epoch)
						mu.Unlock()
					}
				}
				done()
				time.Sleep(time.Duration(50+i*37) * time.Millisecond)
			}
		})
	}
	for range 7 {
		time.Sleep(time.Duration(2000+c.intn(2500)) * time.Millisecond)
		x := c.nodes[c.intn(5)]
		lead := c.leader()
		switch c.intn(4) {
		case 0:
			if lead != nil { // the leader with one of the owners
				for _, o := range c.nodes {
					if o != lead && o != x {
						c.net.Cut(lead.id, o.id, true)
						c.net.Cut(x.id, o.id, true)
					}
				}
			}
		case 1:
			if lead != nil {
				c.net.Isolate(lead.id)
			}
		case 2:
			c.net.Isolate(x.id)
		case 3:
			c.net.Freeze(x.id)
			time.Sleep(time.Duration(500+c.intn(3000)) * time.Millisecond)
			c.net.Thaw(x.id)
		}
		time.Sleep(time.Duration(1000+c.intn(5000)) * time.Millisecond)
		c.net.Heal()
	}
	time.Sleep(5 * time.Second)
	cancel()
	wg.Wait()
	mu.Lock()
	defer mu.Unlock()
	if len(epochs) < 2 {
		t.Errorf("%d claims went through: nothing was shown", len(epochs))
	}
	t.Logf("%d claims", len(epochs))
}
