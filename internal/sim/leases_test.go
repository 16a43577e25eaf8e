package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
)

// leasesKind is the arbiter's leases alone: nodes claim registers from each other, renew, let lapse and give up, with clocks of different
// rates, while everything goes wrong. I4: nobody becomes owner while another node, or a process that a dead one left behind, may still act. I5: no leader
// acknowledges a renewal of an epoch that a claim is about to end.
var leasesKind = kind{"leases", func(s *schedule) { newLeases(s).run() }}

const (
	leaseOf = 3 * time.Second // arbiter.Timings.Lease of the profile lan
	// orphan is how long a process runs on without its node (components/supervisor; arbiter/lease.go counts with it).
	orphan = 2 * time.Second
	// claimed is how long a claim that was told to wait counts (arbiter.WaitError).
	claimed = 500 * time.Millisecond
)

type leases struct {
	*world
	keys []string
	body []byte

	held sync.Mutex // guards the rest
	acts []*act
	// ends is what leaders have decided about the ends of epochs.
	ends map[ending]*decisions
}

// ending is an epoch as a leader knows it: in one life and one term.
type ending struct {
	by    *life
	term  uint64
	key   string
	epoch uint64
}

// decisions are what a leader has decided about the end of an epoch.
type decisions struct {
	asked    time.Duration // when a claim was told to wait last, by the leader's clock; 0 never
	proposed int           // claims under way
	doubt    bool          // nobody knows what became of one
}

// act is a time in which a process may act as the owner of an epoch, in the schedule's time.
type act struct {
	key      string
	epoch    uint64
	by       *life
	from, to time.Duration
	leased   bool // false: it was told that it owns the epoch, and may not act yet
}

func newLeases(s *schedule) *leases {
	body, err := proto.Marshal(&componentsv1.InstanceBody{Component: "app/c", Leased: true})
	if err != nil {
		panic(err)
	}
	g := &leases{world: newWorld(s), keys: []string{components.InstanceRegister("app/c-0"), components.InstanceRegister("app/c-1")}, body: body, ends: map[ending]*decisions{}}
	g.audit = g.decided
	g.build = func(n *node, l *life) error {
		g.startsAnew(n)
		o := &owner{g: g, l: l, r: g.dice(), gaveUp: map[arbiter.LeaseKey]bool{}}
		l.runs = append(l.runs, o.run)
		l.dies = append(l.dies, func() { g.died(l) })
		return nil
	}
	return g
}

func (g *leases) run() {
	defer func() {
		g.close()
		if !g.failed() {
			g.eyes.group()
			g.apart()
		}
	}()
	g.net.SetTimeout(netTimeout)
	g.hear = newHearing(g.world)
	g.echoes = g.oneIn(2)
	g.goes.Go(g.hear.run)
	size := []int{1, 2, 3, 3, 3, 4, 5, 5}[g.intn(8)]
	for range size {
		g.add()
	}
	for i, n := range g.all() {
		n.start(i == 0)
	}
	g.hear.look()
	f := newFaults(g.world, size+2)
	if g.seed%3 == 0 {
		f.more(harm{"hung disk", 4, (*faults).hungDisk})
	}
	f.run(g.between(8*time.Second, 25*time.Second))
	if g.failed() {
		return
	}
	f.over()
	g.afterwards()
}

// afterwards asserts that a lease is in nobody's way for long: what belongs to another node can be claimed once its lease has run out.
func (g *leases) afterwards() {
	n := g.live()[g.intn(len(g.live()))]
	l := n.cur.Load()
	if l == nil {
		return
	}
	for _, key := range g.keys {
		ctx, cancel := within(healed + 2*leaseOf)
		err := g.insist(ctx, l, key)
		cancel()
		if err != nil && n.cur.Load() == l {
			g.statuses()
			g.failf("I10: %s cannot claim %s within %s after healing: %v", n.name, key, healed+2*leaseOf, err)
		}
	}
}

// insist claims a register from whoever has it, as often as it takes.
func (g *leases) insist(ctx context.Context, l *life, key string) error {
	for {
		reg, _ := l.arb.Get(key)
		if reg.Owner == l.n.id && reg.Boot == l.boot {
			return nil
		}
		got, err := l.arb.Claim(ctx, arbiter.ClaimRequest{Key: key, Expect: reg.Epoch, Nonce: l.rand.Uint64() | 1, Owner: l.n.id, Boot: l.boot, Body: g.body})
		var wait *arbiter.WaitError
		switch {
		case err == nil:
			g.owns(l, key, got.Epoch)
			return nil
		case errors.As(err, &wait):
			time.Sleep(wait.For)
		default:
			time.Sleep(5 * time.Millisecond)
		}
		if ctx.Err() != nil {
			return err
		}
	}
}

// owner is what a life does about leases: it claims, renews and acts.
type owner struct {
	g      *leases
	l      *life
	r      *rand.Rand
	seq    uint64
	gaveUp map[arbiter.LeaseKey]bool
}

func (o *owner) run(ctx context.Context) error {
	var lapse time.Time // nothing is renewed before
	for ctx.Err() == nil && !o.g.failed() {
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(time.Duration(20+o.r.IntN(400)) * time.Millisecond):
		}
		var keep, drop []arbiter.LeaseKey
		for _, key := range o.g.keys {
			reg, _ := o.l.arb.Get(key)
			k := arbiter.LeaseKey{Key: key, Epoch: reg.Epoch}
			switch {
			case reg.Owner == o.l.n.id && reg.Boot == o.l.boot && o.r.IntN(30) == 0:
				drop = append(drop, k)
			case reg.Owner == o.l.n.id && reg.Boot == o.l.boot && !o.gaveUp[k]:
				keep = append(keep, k)
			case o.r.IntN(8) == 0:
				o.take(ctx, key)
			}
		}
		if o.r.IntN(12) == 0 { // it runs late: about as late as a lease lasts
			lapse = time.Now().Add(o.g.between(leaseOf-500*time.Millisecond, leaseOf+300*time.Millisecond))
		}
		if time.Now().Before(lapse) && len(drop) == 0 {
			continue
		}
		o.renew(ctx, keep, drop)
	}
	return nil
}

// take claims a register, for as long as the claim is told to wait.
func (o *owner) take(ctx context.Context, key string) {
	ctx, cancel := context.WithTimeout(ctx, 2*leaseOf)
	defer cancel()
	reg, _ := o.l.arb.Get(key)
	nonce := o.r.Uint64() | 1
	for {
		got, err := o.l.arb.Claim(ctx, arbiter.ClaimRequest{Key: key, Expect: reg.Epoch, Nonce: nonce, Owner: o.l.n.id, Boot: o.l.boot, Body: o.g.body})
		wait, waits := errors.AsType[*arbiter.WaitError](err)
		o.g.logf("%s claims %s over %d = %d %v", o.l.n.name, key, reg.Epoch, got.Epoch, err)
		if err == nil {
			o.g.owns(o.l, key, got.Epoch)
		}
		if !waits {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait.For):
		}
	}
}

// renew asks for leases. What is given up it does not act on any more from before it says so.
func (o *owner) renew(ctx context.Context, keep, drop []arbiter.LeaseKey) {
	if len(keep)+len(drop) == 0 {
		return
	}
	for _, k := range drop {
		o.gaveUp[k] = true
		o.g.rests(o.l, k)
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	o.seq++
	got, err := o.l.arb.Lease(ctx, arbiter.LeaseRequest{Boot: o.l.boot, Seq: o.seq, Keys: keep, GiveUp: drop})
	if err != nil {
		return
	}
	o.g.held.Lock()
	o.g.count.Answers++
	o.g.held.Unlock()
	for _, k := range got.Held {
		o.g.acting(o.l, k, got)
	}
}

// owns notes that a life was told that it owns an epoch.
func (g *leases) owns(l *life, key string, epoch uint64) {
	g.held.Lock()
	defer g.held.Unlock()
	now := g.now()
	g.acts = append(g.acts, &act{key: key, epoch: epoch, by: l, from: now, to: now})
}

// acting notes that a life may act, from now until its clock shows the end of the lease.
func (g *leases) acting(l *life, k arbiter.LeaseKey, got arbiter.Leases) {
	g.held.Lock()
	defer g.held.Unlock()
	now := g.now()
	end := l.clock.start.Sub(g.begun) + time.Duration(float64(got.Asked+got.For)/l.n.rate)
	if l.n.cur.Load() != l || end <= now {
		return
	}
	g.logf("%s may act on %s in epoch %d until %.4f", l.n.name, k.Key, k.Epoch, end.Seconds())
	g.acts = append(g.acts, &act{key: k.Key, epoch: k.Epoch, by: l, from: now, to: end, leased: true})
}

// until cuts the acts of which f says so down to a time.
func (g *leases) until(at time.Duration, f func(a *act) bool) {
	g.held.Lock()
	defer g.held.Unlock()
	for _, a := range g.acts {
		if f(a) && a.to > at {
			a.to = max(at, a.from)
		}
	}
}

// rests notes that a life has ended what it ran in an epoch.
func (g *leases) rests(l *life, k arbiter.LeaseKey) {
	g.until(g.now(), func(a *act) bool { return a.by == l && a.key == k.Key && a.epoch == k.Epoch })
}

// died notes that a node is dead; what it ran goes on for a while.
func (g *leases) died(l *life) {
	g.until(g.now()+time.Duration(float64(orphan)/l.n.rate), func(a *act) bool { return a.by == l })
}

// startsAnew notes that a node begins another life, and ends first what the one before left behind.
func (g *leases) startsAnew(n *node) {
	g.until(g.now(), func(a *act) bool { return a.by.n == n })
}

// decided asserts I5.
func (g *leases) decided(l *life, s arbiter.LeaseStep) {
	g.held.Lock()
	defer g.held.Unlock()
	at := ending{l, s.Term, s.Key, s.Epoch}
	d := g.ends[at]
	if d == nil {
		d = &decisions{}
		g.ends[at] = d
	}
	switch s.Kind {
	case arbiter.LeaseRenewed:
		what := fmt.Sprintf("I5: %s acknowledged a renewal of epoch %d of %s in term %d", l.n.name, s.Epoch, s.Key, s.Term)
		switch {
		case d.proposed > 0:
			g.failf("%s while a claim that ends it was being decided", what)
		case d.doubt:
			g.failf("%s although nobody knows what became of a claim that ends it", what)
		case d.asked > 0 && s.At-d.asked < claimed:
			g.failf("%s %s after a claim of it was told to wait", what, s.At-d.asked)
		}
	case arbiter.LeaseAsked:
		d.asked = max(s.At, 1)
	case arbiter.LeaseEnding:
		d.proposed++
	case arbiter.LeaseDecided:
		d.proposed--
	case arbiter.LeaseDoubted:
		d.proposed--
		d.doubt = true
	}
}

// apart asserts I4.
func (g *leases) apart() {
	g.held.Lock()
	defer g.held.Unlock()
	for i, a := range g.acts {
		for _, b := range g.acts[:i] {
			if a.key != b.key || a.by.n == b.by.n {
				continue
			}
			older, newer := a, b
			if newer.epoch < older.epoch {
				older, newer = newer, older
			}
			switch {
			case older.epoch == newer.epoch:
				g.failf("I1: epoch %d of %s is %s's and %s's", a.epoch, a.key, a.by.n.name, b.by.n.name)
			case older.leased && newer.from < older.to: // a claim alone lets nobody act: its owner may hear of it late
				g.failf("I4: %s owns %s in epoch %d at %.4f, and %s may act in epoch %d until %.4f", newer.by.n.name, newer.key, newer.epoch,
					newer.from.Seconds(), older.by.n.name, older.epoch, older.to.Seconds())
			}
		}
	}
}
