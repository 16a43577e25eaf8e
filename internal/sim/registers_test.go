package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/internal/sim/history"
)

// registersKind is the arbiter alone: clients at all nodes claim, commit, read and write registers while everything goes wrong. What they saw
// must be linearizable.
var registersKind = kind{"registers", func(s *schedule) { newRegisters(s).run() }}

// netTimeout is how long a silent connection lasts before it is reset.
const netTimeout = 2 * time.Second

// healed is how long all may take to be well again after healing: 5 s, and until stuck connections are given up.
const healed = 5*time.Second + netTimeout

func within(d time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.Background(), d)
}

// reg is a register in the model.
type reg struct {
	exists       bool
	epoch, nonce uint64
	seq          uint64
	root, body   string
	holders      string
}

// pair is the state of one history: one register, or two that are written together.
type pair [2]reg

type op = history.Op[pair]

type registers struct {
	*world
	single []string // registers with a history each
	double []string // two in one history

	hist sync.Mutex // guards the rest
	ops  map[string][]op
}

func newRegisters(s *schedule) *registers {
	return &registers{world: newWorld(s), single: []string{"x", "y"}, double: []string{"p", "q"}, ops: map[string][]op{}}
}

func (g *registers) run() {
	defer func() {
		g.close()
		if !g.failed() {
			g.eyes.group()
		}
	}()
	g.net.SetTimeout(netTimeout)
	g.hear = newHearing(g.world)
	g.echoes = g.oneIn(2)
	g.goes.Go(g.hear.run)
	size := []int{1, 2, 3, 3, 3, 3, 4, 5, 5, 6}[g.intn(10)]
	for range size {
		g.add()
	}
	for i, n := range g.all() {
		n.start(i == 0)
	}
	g.hear.look()
	if took, ok := g.eventually(15*time.Second, func() bool { return g.settled(wantedVoters(size)) }); !ok {
		g.statuses()
		g.failf("%d nodes have no group after %s", size, took)
		return
	}
	g.first()
	end := time.Now().Add(g.between(4*time.Second, 10*time.Second))
	var clients sync.WaitGroup
	for i := range 4 {
		r := g.dice()
		clients.Go(func() { g.client(i, r, end) })
	}
	r := g.dice()
	clients.Go(func() { g.eager(r, end) })
	f := newFaults(g.world, size+3)
	f.run(time.Until(end))
	clients.Wait()
	if g.failed() {
		return
	}
	f.over()
	g.afterwards()
	g.quiet()
	g.histories()
}

// first claims the registers once before anything is deleted: deletions raise the epoch that the first claim of any register makes, and the
// model does not know of deletions.
func (g *registers) first() {
	n := g.live()[0]
	c := &client{g: g, number: 4, r: g.dice(), at: n, arb: n.cur.Load().arb, last: map[string]arbiter.Register{}}
	ctx, cancel := within(healed)
	defer cancel()
	for _, key := range g.single {
		c.claim(ctx, key)
		if c.last[key].Epoch == 0 {
			g.failf("%s could not be claimed before the first fault", key)
		}
	}
}

func wantedVoters(n int) int {
	switch {
	case n <= 2:
		return 1
	case n < 5:
		return 3
	}
	return 5
}

// settled says whether a leader and all its voters agree on the group, and it has so many voters. Others may lag: a voter that was taken out
// while it was cut off is told by nobody that it is one no more.
func (g *registers) settled(voters int) bool {
	lead := g.leading()
	if lead == nil || len(lead.Voters) != voters {
		return false
	}
	for _, id := range lead.Voters {
		l := g.of(id).cur.Load()
		if l == nil {
			return false
		}
		if s := l.arb.Status(); s.Leader != lead.Leader || !slices.Equal(s.Voters, lead.Voters) {
			return false
		}
	}
	return true
}

// leading is what the leader of the highest term shows; nil when nobody leads.
func (w *world) leading() *arbiter.Status {
	var lead *arbiter.Status
	for _, n := range w.live() {
		if l := n.cur.Load(); l != nil {
			if s := l.arb.Status(); s.Role == "leader" && (lead == nil || s.Term > lead.Term) {
				lead = &s
			}
		}
	}
	return lead
}

// client makes operations until the end.
func (g *registers) client(number int, r *rand.Rand, end time.Time) {
	c := &client{g: g, number: number, r: r, last: map[string]arbiter.Register{}}
	for time.Now().Before(end) && !g.failed() {
		live := g.live()
		if len(live) == 0 {
			time.Sleep(20 * time.Millisecond)
			continue
		}
		n := live[r.IntN(len(live))]
		l := n.cur.Load()
		if l == nil || l.frozen.Load() {
			time.Sleep(time.Millisecond)
			continue
		}
		c.at, c.arb = n, l.arb
		ctx, cancel := within(time.Duration(50+r.IntN(3000)) * time.Millisecond)
		c.once(ctx)
		cancel()
		time.Sleep(time.Duration(r.IntN(120)) * time.Millisecond)
	}
}

// eager reads at each new leader at once: what it answers before it knows what its predecessors committed would be stale.
func (g *registers) eager(r *rand.Rand, end time.Time) {
	c := &client{g: g, number: 5, r: r, last: map[string]arbiter.Register{}}
	led := map[*life]uint64{}
	for time.Now().Before(end) && !g.failed() {
		time.Sleep(time.Millisecond)
		for _, n := range g.live() {
			l := n.cur.Load()
			if l == nil || l.frozen.Load() {
				continue
			}
			s := l.arb.Status()
			if s.Role != "leader" || led[l] == s.Term {
				continue
			}
			led[l] = s.Term
			c.at, c.arb = n, l.arb
			for _, key := range g.single {
				ctx, cancel := within(200 * time.Millisecond)
				c.read(ctx, g.single, key)
				cancel()
			}
		}
	}
}

// client is one that asks now here, now there, and remembers what it was told last.
type client struct {
	g      *registers
	number int
	r      *rand.Rand
	at     *node
	arb    *arbiter.Arbiter
	last   map[string]arbiter.Register
}

func (c *client) once(ctx context.Context) {
	key := c.g.single[c.r.IntN(len(c.g.single))]
	switch what := c.r.IntN(24); {
	case what < 6:
		c.claim(ctx, key)
	case what < 12:
		c.commit(ctx, key)
	case what < 14:
		c.put(ctx, key)
	case what < 15:
		c.setHolders(ctx, key)
	case what < 18:
		c.read(ctx, c.g.single, key)
	case what < 20:
		c.both(ctx)
	case what < 22:
		c.read(ctx, c.g.double, c.g.double[c.r.IntN(2)])
	default:
		c.comeAndGo(ctx)
	}
}

// record notes what came of an operation; true: the outcome is known.
func (c *client) record(history string, o op, err error) bool {
	g := c.g
	o.Client, o.Return = c.number, g.now()
	if err != nil {
		o.Name += ": " + err.Error()
	}
	g.logf("client %d at %s: %s, since %.4f", c.number, c.at.name, o.Name, o.Call.Seconds())
	g.hist.Lock()
	defer g.hist.Unlock()
	switch {
	case errors.Is(err, arbiter.ErrInDoubt):
		o.Unknown = true
		g.count.InDoubt++
	case errors.Is(err, arbiter.ErrNoLeader), errors.Is(err, arbiter.ErrClosed):
		if !g.echoes {
			return false // certainly not done
		}
		// An echo comes also of a request that was answered "not the leader", and later its peer may lead. No real caller sends one again
		// without counting it as in doubt.
		o.Unknown = true
	default:
		g.count.Answers++
	}
	g.ops[history] = append(g.ops[history], o)
	return !o.Unknown
}

// on makes a step on one register of a history.
func on(which int, f func(s reg) (reg, bool)) func(pair) (pair, bool) {
	return func(p pair) (pair, bool) {
		var fits bool
		p[which], fits = f(p[which])
		return p, fits
	}
}

func (c *client) claim(ctx context.Context, key string) {
	expect, nonce := c.last[key].Epoch, c.r.Uint64()|1
	o := op{Name: fmt.Sprintf("claim %s over %d by %x", key, expect, nonce), Call: c.g.now()}
	acked := c.g.eyes.lastAcked(key)
	got, err := c.arb.Claim(ctx, arbiter.ClaimRequest{Key: key, Expect: expect, Nonce: nonce, Owner: c.at.id, Boot: 1})
	refused, isRefused := errors.AsType[*arbiter.RefusedError](err)
	if err == nil {
		o.Name += fmt.Sprintf(" = %d, seq %d", got.Epoch, got.Seq)
	}
	o.Step = on(0, func(s reg) (reg, bool) {
		next := s
		if s.epoch == expect {
			next.exists, next.epoch, next.nonce = true, expect+1, nonce
		}
		switch {
		case err == nil:
			// A repeated claim answers with the register as it is by then, and others here commit in its epoch, too.
			return next, s.epoch == expect && got.Epoch == expect+1 && (got.Seq > s.seq || got.Seq == s.seq && string(got.Root) == s.root)
		case isRefused:
			return s, s.epoch != expect && s.epoch == refused.Current.Epoch
		}
		return next, true
	})
	known := c.record(key, o, err)
	switch {
	case known && err == nil:
		c.last[key] = got
		if got.Seq < acked {
			c.g.failf("I2: %s was claimed at seq %d after seq %d was acknowledged", key, got.Seq, acked)
		}
	case isRefused:
		c.last[key] = refused.Current
	}
}

func (c *client) commit(ctx context.Context, key string) {
	l := c.last[key]
	if l.Epoch == 0 {
		return
	}
	seq, root := l.Seq+1, fmt.Sprintf("r%x", c.r.Uint32())
	holders, w := c.holders(), uint32(2)
	switch c.r.IntN(12) {
	case 0:
		if !c.g.echoes { // an echo could bring it when its time has come, and no real caller leaves one out
			seq++
		}
	case 1:
		seq = max(seq, 2) - 1 // or go back
	case 2:
		w = uint32(len(holders) + 1) // or do with fewer than it takes
	}
	distinct := len(slices.Compact(slices.Sorted(slices.Values(holders))))
	o := op{Name: fmt.Sprintf("commit %s %d.%d %s at %v of %d", key, l.Epoch, seq, root, c.g.names(holders), w), Call: c.g.now()}
	got, err := c.arb.Commit(ctx, arbiter.CommitRequest{Key: key, Epoch: l.Epoch, Nonce: l.Nonce, Seq: seq, Root: []byte(root), Holders: holders, W: w})
	fits := func(s reg) bool {
		return s.epoch == l.Epoch && s.nonce == l.Nonce && s.seq+1 == seq && distinct >= int(w)
	}
	held := fmt.Sprint(c.g.names(holders))
	fenced, isFenced := errors.AsType[*arbiter.FencedError](err)
	refused, isRefused := errors.AsType[*arbiter.RefusedError](err)
	o.Step = on(0, func(s reg) (reg, bool) {
		next := s
		if fits(s) {
			next.seq, next.root, next.holders = seq, root, held
		}
		switch {
		case err == nil:
			return next, fits(s)
		case isFenced:
			return s, (s.epoch != l.Epoch || s.nonce != l.Nonce) && s.epoch == fenced.Current.Epoch
		case isRefused:
			return s, s.epoch == l.Epoch && (s.seq+1 != seq || distinct < int(w)) && s.seq == refused.Current.Seq
		}
		return next, true
	})
	known := c.record(key, o, err)
	switch {
	case known && err == nil:
		c.last[key] = got
		c.g.eyes.acknowledged(key, seq, holders, w)
	case isFenced:
		c.last[key] = fenced.Current
	case isRefused:
		c.last[key] = refused.Current
	}
}

// holders draws two or three nodes, perhaps one twice.
func (c *client) holders() []peer.ID {
	all := c.g.all()
	out := make([]peer.ID, 0, 3)
	for range 2 + c.r.IntN(2) {
		out = append(out, all[c.r.IntN(len(all))].id)
	}
	return out
}

// setHolders says who holds the checkpoint that was seen last.
func (c *client) setHolders(ctx context.Context, key string) {
	l := c.last[key]
	if l.Seq == 0 {
		return
	}
	holders := c.holders()
	held := fmt.Sprint(c.g.names(holders))
	o := op{Name: fmt.Sprintf("holders of %s seq %d are %s", key, l.Seq, held), Call: c.g.now()}
	got, err := c.arb.SetHolders(ctx, key, l.Seq, holders)
	refused, isRefused := errors.AsType[*arbiter.RefusedError](err)
	o.Step = on(0, func(s reg) (reg, bool) {
		next := s
		if s.exists && s.seq == l.Seq {
			next.holders = held
		}
		switch {
		case err == nil:
			return next, s.exists && s.seq == l.Seq
		case isRefused:
			return s, s.seq != l.Seq && s.seq == refused.Current.Seq
		}
		return next, true
	})
	if c.record(key, o, err) && err == nil {
		c.last[key] = got
	}
}

// put sets the body if the epoch is the one last seen.
func (c *client) put(ctx context.Context, key string) {
	epoch, body := c.last[key].Epoch, fmt.Sprintf("b%x", c.r.Uint32())
	o := op{Name: fmt.Sprintf("put %s %s in epoch %d", key, body, epoch), Call: c.g.now()}
	res, err := c.arb.Txn(ctx, arbiter.TxnRequest{
		Compares: []arbiter.Compare{{Key: key, Field: "epoch", Equal: epoch}}, Then: []arbiter.Op{{Put: &arbiter.PutOp{Key: key, Body: []byte(body)}}},
	})
	if err == nil {
		o.Name += fmt.Sprintf(" = %v", res.Succeeded)
	}
	o.Step = on(0, func(s reg) (reg, bool) {
		next := s
		if s.epoch == epoch {
			next.exists, next.body = true, body
		}
		return next, err != nil || res.Succeeded == (s.epoch == epoch)
	})
	if c.record(key, o, err) && err == nil && len(res.Registers) == 1 {
		c.last[key] = res.Registers[0]
	}
}

// both writes two registers together if the first is as last seen, else only the second.
func (c *client) both(ctx context.Context) {
	first, second := c.g.double[0], c.g.double[1]
	seen, body := string(c.last[first].Body), fmt.Sprintf("d%x", c.r.Uint32())
	revision := c.last[first].Revision
	o := op{Name: fmt.Sprintf("put %s and %s %s if the first is %q, revision %d", first, second, body, seen, revision), Call: c.g.now()}
	res, err := c.arb.Txn(ctx, arbiter.TxnRequest{
		Compares: []arbiter.Compare{{Key: first, Field: "revision", Equal: revision}},
		Then:     []arbiter.Op{{Put: &arbiter.PutOp{Key: first, Body: []byte(body)}}, {Put: &arbiter.PutOp{Key: second, Body: []byte(body)}}},
		Else:     []arbiter.Op{{Put: &arbiter.PutOp{Key: second, Body: []byte("else " + body)}}},
	})
	if err == nil {
		o.Name += fmt.Sprintf(" = %v", res.Succeeded)
	}
	o.Step = func(p pair) (pair, bool) {
		holds := p[0].body == seen // bodies are unique, so they stand for revisions
		if holds {
			p[0].exists, p[0].body = true, body
			p[1].exists, p[1].body = true, body
		} else {
			p[1].exists, p[1].body = true, "else "+body
		}
		return p, err != nil || res.Succeeded == holds
	}
	if c.record(first, o, err) && err == nil {
		for _, r := range res.Registers {
			c.last[r.Key] = r
		}
	}
}

func (c *client) read(ctx context.Context, among []string, key string) {
	o := op{Name: "read " + key, Call: c.g.now()}
	got, exists, err := c.arb.Read(ctx, key)
	if err != nil {
		return
	}
	held := ""
	if got.Seq > 0 {
		held = fmt.Sprint(c.g.names(got.Holders))
	}
	o.Name += fmt.Sprintf(" = %v %d.%d %s %s %s", exists, got.Epoch, got.Seq, got.Root, got.Body, held)
	want := reg{exists: exists, epoch: got.Epoch, nonce: got.Nonce, seq: got.Seq, root: string(got.Root), body: string(got.Body), holders: held}
	which, name := 0, key
	if slices.Equal(among, c.g.double) {
		which, name = slices.Index(among, key), among[0]
	}
	o.Step = on(which, func(s reg) (reg, bool) { return s, s == want })
	c.record(name, o, nil)
	c.last[key] = got
}

// comeAndGo claims and deletes a register. It has no history: that no epoch of it is used twice and no late repetition brings it back is seen by
// the observers.
func (c *client) comeAndGo(ctx context.Context) {
	const key = "z"
	l, exists := c.arb.Get(key)
	if exists && c.r.IntN(2) == 0 {
		res, err := c.arb.Txn(ctx, arbiter.TxnRequest{
			Compares: []arbiter.Compare{{Key: key, Field: "revision", Equal: l.Revision}}, Then: []arbiter.Op{{Delete: key}},
		})
		c.g.logf("client %d at %s: delete %s of epoch %d = %v %v", c.number, c.at.name, key, l.Epoch, res.Succeeded, err)
		return
	}
	nonce := c.r.Uint64() | 1
	got, err := c.arb.Claim(ctx, arbiter.ClaimRequest{Key: key, Expect: l.Epoch, Nonce: nonce, Owner: c.at.id, Boot: 1})
	c.g.logf("client %d at %s: claim %s over %d by %x = %d %v", c.number, c.at.name, key, l.Epoch, nonce, got.Epoch, err)
	if err == nil {
		c.g.eyes.saw(c.at, &got)
	}
}

// histories has what the clients saw checked when the bubble is over.
func (g *registers) histories() {
	g.hist.Lock()
	defer g.hist.Unlock()
	for _, key := range slices.Sorted(func(yield func(string) bool) {
		for k := range g.ops {
			if !yield(k) {
				return
			}
		}
	}) {
		ops := g.ops[key]
		g.checks = append(g.checks, func() (history.Verdict, string) {
			v, why := history.Check(pair{}, ops, decide)
			return v, "the history of " + key + ": " + why
		})
	}
}

// afterwards asserts I10: every node can claim and commit again soon, and all show the same.
func (g *registers) afterwards() {
	begun := time.Now()
	var wg sync.WaitGroup
	for i, n := range g.live() {
		wg.Go(func() {
			l := n.cur.Load()
			if l == nil {
				return
			}
			ctx, cancel := within(healed)
			defer cancel()
			if err := claimAndCommit(ctx, l.arb, n.id, fmt.Sprint("end-", i), l.rand.Uint64()|1); err != nil && n.cur.Load() == l {
				g.failf("I10: %s cannot claim and commit %s after healing: %v", n.name, healed, err)
			}
		})
	}
	wg.Wait()
	g.count.Heal = time.Since(begun)
	if g.failed() {
		g.statuses()
		return
	}
	g.agree()
}

// claimAndCommit tries until it has done both, or the context ends. What is in doubt is tried again as it was.
func claimAndCommit(ctx context.Context, a *arbiter.Arbiter, id peer.ID, key string, nonce uint64) error {
	var made arbiter.Register
	err := again(ctx, func() (err error) {
		made, err = a.Claim(ctx, arbiter.ClaimRequest{Key: key, Nonce: nonce, Owner: id, Boot: 1})
		return err
	})
	if err != nil {
		return err
	}
	return again(ctx, func() error {
		_, err := a.Commit(ctx, arbiter.CommitRequest{Key: key, Epoch: made.Epoch, Nonce: nonce, Seq: 1, Root: []byte("end"), Holders: []peer.ID{id}, W: 1})
		return err
	})
}

func again(ctx context.Context, f func() error) error {
	for {
		err := f()
		if err == nil || ctx.Err() != nil || !errors.Is(err, arbiter.ErrInDoubt) {
			return err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// agree asserts that all nodes show the same, once they have caught up.
func (g *registers) agree() {
	var first *node
	var want []arbiter.Register
	for _, n := range g.live() {
		l := n.cur.Load()
		ctx, cancel := within(healed)
		err := l.arb.Sync(ctx)
		cancel()
		if err != nil {
			g.failf("I10: %s cannot catch up %s after healing: %v", n.name, healed, err)
			g.statuses()
			return
		}
		got := l.arb.List("")
		if first == nil {
			first, want = n, got
			continue
		}
		if !slices.EqualFunc(got, want, func(x, y arbiter.Register) bool { return fmt.Sprintf("%+v", x) == fmt.Sprintf("%+v", y) }) {
			g.failf("I9: %s shows\n%+v\nand %s\n%+v", n.name, got, first.name, want)
		}
	}
}

// quiet asserts, on some schedules, what must happen when nothing but one death happens: the dead voter is replaced, and its successor learns
// before the dead one goes (I7).
func (g *registers) quiet() {
	if g.failed() || !g.oneIn(4) {
		return
	}
	live := g.live()
	want := wantedVoters(len(live))
	if want < 3 || len(live) <= want {
		return
	}
	if _, ok := g.eventually(15*time.Second, func() bool { return g.settled(want) }); !ok {
		g.statuses()
		g.failf("I7: %d nodes do not agree on %d voters 15 s after healing", len(live), want)
		return
	}
	time.Sleep(timings.Settle + 2*time.Second) // everybody may vote by now
	lead := g.leading()
	if lead == nil {
		return // it was asked for too soon
	}
	voters := lead.Voters
	dead := g.of(voters[g.intn(len(voters))])
	g.logf("quiet death of %s", dead.name)
	g.kill(dead)
	want = wantedVoters(len(live) - 1)
	replaced := func() bool {
		lead := g.leading()
		return lead != nil && g.settled(want) && !slices.Contains(lead.Voters, dead.id)
	}
	if _, ok := g.eventually(15*time.Second, replaced); !ok {
		g.statuses()
		g.failf("I7: %s is dead and was not replaced within 15 s", dead.name)
		return
	}
	g.logf("%s is replaced", dead.name)
	if want == len(voters) {
		g.quietOrder(dead)
	}
}

// quietOrder asserts that a voter which could be replaced went after another had begun to learn.
func (g *registers) quietOrder(dead *node) {
	lead := g.leading()
	if lead == nil {
		return
	}
	n := g.of(lead.Leader)
	l := n.cur.Load()
	ctx, cancel := within(healed)
	defer cancel()
	if err := l.arb.Sync(ctx); err != nil {
		g.failf("sync %s: %v", n.name, err)
		return
	}
	n.kill()
	list, err := arbiter.GroupChanges(n.fs, "raft")
	if err != nil {
		g.failf("the log of %s cannot be read: %v", n.name, err)
		return
	}
	i := lastWith(list, dead.id)
	if i < 0 || i+1 == len(list) {
		return // its log says less than its view
	}
	if was, now := list[i], list[i+1]; len(was.Learners) == 0 && len(now.Voters) < len(was.Voters) && len(now.Voters) < wantedVoters(len(g.live())+1) {
		g.failf("I7: %s was taken out of %v at %d before anybody learned in its place", dead.name, g.names(was.Voters), now.Index)
	}
}

// lastWith is the last configuration in which a node votes.
func lastWith(list []arbiter.GroupChange, id peer.ID) int {
	last := -1
	for i, c := range list {
		if slices.Contains(c.Voters, id) {
			last = i
		}
	}
	return last
}
