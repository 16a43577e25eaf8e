package arbiter

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

// schedules is how many seeds TestChaos runs: ARBITER_SCHEDULES, or a few. ARBITER_SEED runs one.
func schedules(t *testing.T) (from, n uint64) {
	n = 12
	if testing.Short() {
		n = 4
	}
	if s := os.Getenv("ARBITER_SCHEDULES"); s != "" {
		v, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("ARBITER_SCHEDULES: %v", err)
		}
		n = v
	}
	from = 1
	if s := os.Getenv("ARBITER_SEED"); s != "" {
		v, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatalf("ARBITER_SEED: %v", err)
		}
		from = v
		if os.Getenv("ARBITER_SCHEDULES") == "" {
			n = 1
		}
	}
	return from, n
}

// TestChaos runs clients against a cluster whose nodes crash, restart, are cut off, wrongly suspected, and whose network delays and
// loses. What the clients saw must be linearizable; I1 and I2 hold on every node at every time; and all nodes agree in the end.
func TestChaos(t *testing.T) { runChaos(t, []int{3, 5, 5, 6}) }

// TestChaosOfTwo is the same with two nodes, and with three of which one is often away: what goes by the rule of two nodes, and into and
// out of it. Nothing that was acknowledged is lost, whoever goes on alone.
func TestChaosOfTwo(t *testing.T) { runChaos(t, []int{2, 2, 3}) }

func runChaos(t *testing.T, sizes []int) {
	from, n := schedules(t)
	for seed := from; seed < from+n; seed++ {
		ok := t.Run(fmt.Sprint("seed", seed), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newChaos(t, seed)
				c.sizes = sizes
				c.run()
			})
		})
		if !ok {
			t.Fatalf("ARBITER_SEED=%d go test ./dht/arbiter -run '%s$'", seed, t.Name())
		}
	}
}

type chaos struct {
	*cluster
	begun time.Time
	keys  []string
	sizes []int // one of them is drawn

	mu      sync.Mutex
	history map[string][]linOp
	owners  map[string]uint64 // "inc/key/epoch" -> nonce (I1)
	roots   map[string]string // "inc/key/seq" -> root (I2)
	acked   map[string]uint64 // key -> highest seq acknowledged (I2)
	doubts  int
	answers int
}

func newChaos(t *testing.T, seed uint64) *chaos {
	return &chaos{
		cluster: newCluster(t, seed), keys: []string{"x", "y"}, history: map[string][]linOp{},
		owners: map[string]uint64{}, roots: map[string]string{}, acked: map[string]uint64{},
	}
}

func (c *chaos) now() time.Duration { return time.Since(c.begun) }

func (c *chaos) run() {
	defer c.close()
	c.begun = time.Now()
	c.adjust = func(cfg *Config) { cfg.Timings.Snapshot, cfg.Timings.SnapshotAfter = 2*time.Second, 60 }
	c.grow(c.sizes[c.intn(len(c.sizes))])
	time.Sleep(3 * time.Second)
	for _, n := range c.nodes {
		c.inspect(n)
	}
	end := time.Now().Add(20 * time.Second)
	var wg sync.WaitGroup
	for i := range 5 {
		r := rand.New(rand.NewPCG(c.draw(), uint64(i)))
		wg.Go(func() { c.client(r, end) })
	}
	c.faults(end)
	wg.Wait()
	c.heal()
	c.agree()
	for _, key := range c.keys {
		if stuck := linearizable(c.history[key]); stuck != "" {
			c.t.Errorf("key %s is not linearizable: %s", key, stuck)
		}
	}
	c.t.Logf("%d answers, %d in doubt, incarnation %d, %.0f s simulated", c.answers, c.doubts, c.nodes[0].incarnation(), c.now().Seconds())
}

// inspect asserts I1 and I2 on everything that a node shows.
func (c *chaos) inspect(n *node) {
	n.arb().Watch(func(_, r *Register) {
		if r == nil {
			return
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if r.Epoch > 0 {
			k := fmt.Sprintf("%d/%s/%d", r.Incarnation, r.Key, r.Epoch)
			if was, known := c.owners[k]; known && was != r.Nonce {
				c.t.Errorf("I1: %s has the nonces %d and %d", k, was, r.Nonce)
			}
			c.owners[k] = r.Nonce
		}
		if r.Seq > 0 {
			k := fmt.Sprintf("%d/%s/%d", r.Incarnation, r.Key, r.Seq)
			if was, known := c.roots[k]; known && was != string(r.Root) {
				c.t.Errorf("I2: %s has the roots %q and %q", k, was, r.Root)
			}
			c.roots[k] = string(r.Root)
		}
	})
}

func (c *chaos) anyNode(r *rand.Rand) *node {
	l := c.live()
	if len(l) == 0 {
		return nil
	}
	return l[r.IntN(len(l))]
}

// client makes operations until the end. It remembers the last register that it saw of each key.
func (c *chaos) client(r *rand.Rand, end time.Time) {
	last := map[string]Register{}
	for time.Now().Before(end) {
		n := c.anyNode(r)
		if n == nil {
			time.Sleep(50 * time.Millisecond)
			continue
		}
		a := n.arb()
		if a == nil {
			continue
		}
		key := c.keys[r.IntN(len(c.keys))]
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(100+r.IntN(4000))*time.Millisecond)
		switch op := r.IntN(10); {
		case op < 3:
			c.claim(ctx, a, n.id, r, key, last)
		case op < 6:
			c.commit(ctx, a, n.id, r, key, last)
		case op < 8:
			c.put(ctx, a, r, key, last)
		default:
			c.read(ctx, a, key, last)
		}
		cancel()
		time.Sleep(time.Duration(r.IntN(150)) * time.Millisecond)
	}
}

// record notes what a client saw; true: the outcome is known.
func (c *chaos) record(key string, op linOp, err error) bool {
	op.ret = c.now()
	if err != nil {
		op.name += ": " + err.Error()
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case errors.Is(err, ErrInDoubt):
		op.unknown = true
		c.doubts++
	case errors.Is(err, ErrNoLeader), errors.Is(err, ErrClosed):
		return false // certainly not done
	default:
		c.answers++
	}
	c.history[key] = append(c.history[key], op)
	return !op.unknown
}

func (c *chaos) claim(ctx context.Context, a *Arbiter, id peer.ID, r *rand.Rand, key string, last map[string]Register) {
	expect, nonce := last[key].Epoch, r.Uint64()|1
	op := linOp{name: fmt.Sprintf("claim %d", expect), call: c.now()}
	c.mu.Lock()
	acked := c.acked[key]
	c.mu.Unlock()
	reg, err := a.Claim(ctx, ClaimRequest{Key: key, Expect: expect, Nonce: nonce, Owner: id, Boot: 1})
	apply := func(s linState) linState {
		if s.epoch == expect {
			s.exists, s.epoch, s.nonce = true, expect+1, nonce
		}
		return s
	}
	refused, isRefused := errors.AsType[*RefusedError](err)
	op.step = func(s linState) (linState, bool) {
		switch {
		case err == nil:
			// A repeated claim answers with the register as it is by then: others here commit in its epoch, too.
			fits := s.epoch == expect && reg.Epoch == expect+1
			return apply(s), fits && (reg.Seq > s.seq || reg.Seq == s.seq && string(reg.Root) == s.root)
		case isRefused:
			return s, s.epoch != expect && s.epoch == refused.Current.Epoch
		}
		return apply(s), true
	}
	if c.record(key, op, err) && err == nil {
		last[key] = reg
		if reg.Seq < acked {
			c.t.Errorf("I2: %s claimed at seq %d after seq %d was acknowledged", key, reg.Seq, acked)
		}
	} else if isRefused {
		last[key] = refused.Current
	}
}

func (c *chaos) commit(ctx context.Context, a *Arbiter, id peer.ID, r *rand.Rand, key string, last map[string]Register) {
	l := last[key]
	if l.Epoch == 0 {
		return
	}
	seq, root := l.Seq+1, fmt.Sprintf("r%x", r.Uint32())
	op := linOp{name: fmt.Sprintf("commit %d.%d %s", l.Epoch, seq, root), call: c.now()}
	reg, err := a.Commit(ctx, CommitRequest{Key: key, Epoch: l.Epoch, Nonce: l.Nonce, Seq: seq, Root: []byte(root), Holders: []peer.ID{id}, W: 1})
	fits := func(s linState) bool { return s.epoch == l.Epoch && s.nonce == l.Nonce && s.seq+1 == seq }
	apply := func(s linState) linState {
		if fits(s) {
			s.seq, s.root = seq, root
		}
		return s
	}
	fenced, isFenced := errors.AsType[*FencedError](err)
	refused, isRefused := errors.AsType[*RefusedError](err)
	op.step = func(s linState) (linState, bool) {
		switch {
		case err == nil:
			return apply(s), fits(s)
		case isFenced:
			return s, (s.epoch != l.Epoch || s.nonce != l.Nonce) && s.epoch == fenced.Current.Epoch
		case isRefused:
			return s, s.epoch == l.Epoch && s.seq+1 != seq && s.seq == refused.Current.Seq
		}
		return apply(s), true
	}
	known := c.record(key, op, err)
	switch {
	case known && err == nil:
		last[key] = reg
		c.mu.Lock()
		c.acked[key] = max(c.acked[key], seq)
		c.mu.Unlock()
	case isFenced:
		last[key] = fenced.Current
	case isRefused:
		last[key] = refused.Current
	}
}

// put sets the body if the epoch is the one last seen.
func (c *chaos) put(ctx context.Context, a *Arbiter, r *rand.Rand, key string, last map[string]Register) {
	epoch, body := last[key].Epoch, fmt.Sprintf("b%x", r.Uint32())
	op := linOp{name: fmt.Sprintf("put %d %s", epoch, body), call: c.now()}
	res, err := a.Txn(ctx, TxnRequest{
		Compares: []Compare{{Key: key, Field: "epoch", Equal: epoch}}, Then: []Op{{Put: &PutOp{Key: key, Body: []byte(body)}}},
	})
	apply := func(s linState) linState {
		if s.epoch == epoch {
			s.exists, s.body = true, body
		}
		return s
	}
	op.step = func(s linState) (linState, bool) {
		if err != nil {
			return apply(s), true
		}
		return apply(s), res.Succeeded == (s.epoch == epoch)
	}
	if c.record(key, op, err) && err == nil && len(res.Registers) == 1 {
		last[key] = res.Registers[0]
	}
}

func (c *chaos) read(ctx context.Context, a *Arbiter, key string, last map[string]Register) {
	op := linOp{name: "read", call: c.now()}
	reg, exists, err := a.Read(ctx, key)
	if err != nil {
		return
	}
	op.name = fmt.Sprintf("read %v %d.%d %s %s", exists, reg.Epoch, reg.Seq, reg.Root, reg.Body)
	op.step = func(s linState) (linState, bool) {
		return s, s == linState{exists, reg.Epoch, reg.Nonce, reg.Seq, string(reg.Root), string(reg.Body)}
	}
	c.record(key, op, nil)
	last[key] = reg
}

// faults does harm until the end.
func (c *chaos) faults(end time.Time) {
	spread := time.Duration(1+c.intn(8)) * time.Millisecond
	if c.intn(3) == 0 {
		spread = time.Duration(50+c.intn(300)) * time.Millisecond
	}
	r := rand.New(rand.NewPCG(c.draw(), 3))
	var mu sync.Mutex
	c.net.SetDelay(func(_, _ peer.ID) time.Duration {
		mu.Lock()
		defer mu.Unlock()
		return time.Duration(r.Int64N(int64(spread)))
	})
	c.net.SetTimeout(3 * time.Second)
	for time.Now().Before(end) {
		time.Sleep(time.Duration(200+c.intn(1500)) * time.Millisecond)
		n := c.nodes[c.intn(len(c.nodes))]
		if l := c.leader(); l != nil && c.intn(3) == 0 {
			n = l
		}
		kinds := 8
		if len(c.nodes) <= 3 {
			kinds = 13
		}
		switch c.intn(kinds) {
		case 0, 1, 2:
			c.crash(n)
		case 3:
			c.isolate(n)
		case 4: // one way
			o := c.nodes[c.intn(len(c.nodes))]
			if o != n {
				c.net.Cut(n.id, o.id, false)
				time.Sleep(time.Duration(c.intn(2500)) * time.Millisecond)
				c.net.Heal()
			}
		case 5: // wrongly suspected, by all
			if n.arb() != nil {
				c.suspect(n)
			}
		case 6:
			c.net.SetLoss(float64(c.intn(10)) / 100)
			time.Sleep(time.Duration(c.intn(2000)) * time.Millisecond)
			c.net.SetLoss(0)
		case 8, 9:
			c.away(n, true)
		case 10:
			c.away(n, false)
		case 11, 12: // it stands still, and everybody finds it dead
			c.net.Freeze(n.id)
			time.Sleep(time.Duration(1000+c.intn(4500)) * time.Millisecond)
			if n.arb() != nil && c.intn(2) == 0 {
				c.suspect(n)
			}
			c.net.Thaw(n.id)
		case 7: // everybody dies
			if c.intn(4) == 0 {
				for _, n := range c.live() {
					c.kill(n)
				}
				time.Sleep(time.Duration(c.intn(1000)) * time.Millisecond)
				c.restart()
			}
		}
		if len(c.live()) <= len(c.nodes)/2 && c.intn(2) == 0 {
			time.Sleep(time.Duration(c.intn(1500)) * time.Millisecond)
			c.restart()
		}
	}
}

// away has a node dead or cut off for longer than the other of two waits.
func (c *chaos) away(n *node, dead bool) {
	if n.arb() == nil {
		return
	}
	if dead {
		c.kill(n)
	} else {
		c.net.Isolate(n.id)
		time.Sleep(1600 * time.Millisecond)
		c.suspect(n)
	}
	time.Sleep(time.Duration(2500+c.intn(3000)) * time.Millisecond)
	if dead {
		c.up(n, false)
		c.inspect(n)
		return
	}
	if c.intn(3) == 0 { // the one that went on alone dies before anybody hears of it
		for _, o := range c.live() {
			if o != n && c.intn(2) == 0 {
				c.kill(o)
			}
		}
	}
	c.net.Heal()
	c.unsuspect(n)
}

func (c *chaos) crash(n *node) {
	if n.arb() != nil {
		c.kill(n)
		return
	}
	c.up(n, false)
	c.inspect(n)
}

func (c *chaos) restart() {
	for _, n := range c.nodes {
		if n.arb() == nil {
			c.up(n, false)
			c.inspect(n)
		}
	}
}

// isolate cuts a node off; after a while all believe the other side dead.
func (c *chaos) isolate(n *node) {
	c.net.Isolate(n.id)
	time.Sleep(1600 * time.Millisecond)
	if n.arb() != nil {
		c.suspect(n)
	}
	time.Sleep(time.Duration(c.intn(3000)) * time.Millisecond)
	c.net.Heal()
	c.unsuspect(n)
}

func (c *chaos) suspect(n *node) {
	for _, o := range c.live() {
		if o != n {
			o.view().set(n, false)
			if n.arb() != nil {
				n.view().set(o, false)
			}
		}
	}
	if c.intn(2) == 0 {
		time.Sleep(time.Duration(c.intn(2500)) * time.Millisecond)
	}
	c.unsuspect(n)
}

func (c *chaos) unsuspect(n *node) {
	for _, o := range c.live() {
		for _, p := range c.live() {
			o.view().set(p, true)
		}
	}
}

func (c *chaos) heal() {
	c.net.Heal()
	c.net.SetLoss(0)
	c.net.SetDelay(func(_, _ peer.ID) time.Duration { return time.Millisecond })
	c.restart()
	c.unsuspect(nil)
}

// agree asserts progress after healing, and that all nodes show the same.
func (c *chaos) agree() {
	time.Sleep(5 * time.Second) // I10
	ctx, cancel := within(2 * time.Minute)
	defer cancel()
	if err := put(c.nodes[0].arb(), "end", "end", 5*time.Second); err != nil {
		c.t.Errorf("no progress 10 s after healing: %v", err)
		return
	}
	var want []Register
	for i, n := range c.nodes {
		if err := n.arb().Sync(ctx); err != nil {
			c.t.Errorf("sync %s: %v\nits status: %+v\nthe leader's: %+v", n.id, err, n.arb().Status(), c.leader2(nil).arb().Status())
			return
		}
		got := n.arb().List("")
		if i == 0 {
			want = got
		}
		if !slices.EqualFunc(got, want, func(x, y Register) bool {
			return fmt.Sprintf("%+v", x) == fmt.Sprintf("%+v", y)
		}) {
			c.t.Errorf("node %s shows\n%+v, node %s\n%+v", n.id, got, c.nodes[0].id, want)
		}
	}
}
