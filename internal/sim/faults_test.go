package sim

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/arbiter"
)

// faults does harm, one or two things at a time, until its time is over.
type faults struct {
	w      *world
	r      *rand.Rand
	max    int // nodes at most
	losses int // disks that may yet be lost
	harms  []harm
	wg     sync.WaitGroup

	mu   sync.Mutex // guards the rest
	loss float64
	slow time.Duration
	base time.Duration
}

// harm is one kind of fault; weight is how often it is drawn. do returns when it is over, and "" when it could not be done now.
type harm struct {
	name   string
	weight int
	do     func(f *faults) string
}

var harms = []harm{
	{"crash", 5, (*faults).crash},
	{"crash of the leader", 3, (*faults).crashLeader},
	{"crash of all", 1, (*faults).crashAll},
	{"crash of some", 2, (*faults).crashSome},
	{"crashes while electing", 2, (*faults).crashElecting},
	{"lost disk", 2, (*faults).loseDisk},
	{"wiped disk", 2, (*faults).wipeDisk},
	{"split", 3, (*faults).split},
	{"isolation", 3, (*faults).isolate},
	{"one way", 2, (*faults).oneWay},
	{"bridge", 1, (*faults).bridge},
	{"flapping", 1, (*faults).flap},
	{"loss", 2, (*faults).lose},
	{"delay", 2, (*faults).delay},
	{"freeze", 3, (*faults).freeze},
	{"starvation", 1, (*faults).starve},
	{"slander", 2, (*faults).slander},
	{"join", 1, (*faults).join},
	{"leave", 1, (*faults).leave},
}

func newFaults(w *world, most int) *faults {
	f := &faults{w: w, r: w.dice(), max: most, harms: slices.Clone(harms), base: time.Duration(1+w.intn(8)) * time.Millisecond}
	if w.oneIn(5) {
		f.base = w.between(20*time.Millisecond, 200*time.Millisecond)
	}
	f.losses = 1
	if len(w.all()) >= 5 {
		f.losses = 2
	}
	f.weather()
	return f
}

// choose restricts the faults to some.
func (f *faults) choose(names ...string) {
	f.harms = slices.DeleteFunc(f.harms, func(h harm) bool { return !slices.Contains(names, h.name) })
}

// more adds harm that only some kinds do.
func (f *faults) more(list ...harm) { f.harms = append(f.harms, list...) }

// weather sets delay and loss of the network.
func (f *faults) weather() {
	f.mu.Lock()
	loss, spread := f.loss, int64(max(f.base, f.slow))
	f.mu.Unlock()
	r := f.w.dice()
	f.w.net.SetDelay(func(_, _ peer.ID) time.Duration { return 100*time.Microsecond + time.Duration(r.Int64N(spread)) })
	f.w.net.SetLoss(loss)
}

// run does harm for a while and returns when all of it is over.
func (f *faults) run(d time.Duration) {
	end := time.Now().Add(d)
	all := f.harms
	total := 0
	for _, h := range all {
		total += h.weight
	}
	for time.Now().Before(end) && !f.w.failed() {
		time.Sleep(f.w.between(50*time.Millisecond, 900*time.Millisecond))
		pick := f.w.intn(total)
		i := 0
		for ; pick >= all[i].weight; i++ {
			pick -= all[i].weight
		}
		h := all[i]
		run := func() {
			if what := h.do(f); what != "" {
				f.w.mu.Lock()
				f.w.count.Faults++
				f.w.mu.Unlock()
				f.w.logf("end of %s: %s", h.name, what)
			}
		}
		if f.w.oneIn(3) {
			f.wg.Go(run)
		} else {
			run()
		}
	}
	f.wg.Wait()
}

// pause waits as long as a fault lasts.
func (f *faults) pause(from, to time.Duration) { time.Sleep(f.w.between(from, to)) }

// any reserves a node that runs; leader prefers the one that leads.
func (f *faults) any(leader bool) *node {
	live := f.w.live()
	if len(live) == 0 {
		return nil
	}
	n := live[f.w.intn(len(live))]
	if leader {
		for _, o := range live {
			if l := o.cur.Load(); l != nil && l.arb != nil && l.arb.Status().Role == "leader" {
				n = o
			}
		}
	}
	if !n.take() {
		return nil
	}
	if n.cur.Load() == nil {
		n.give()
		return nil
	}
	return n
}

func (w *world) kill(n *node) {
	w.logf("%s dies", n.name)
	n.kill()
	if w.hear != nil {
		w.hear.died(n)
	}
}

func (w *world) begin(n *node) {
	w.logf("%s starts", n.name)
	n.start(false)
}

func (f *faults) crash() string       { return f.crashOf(f.any(false)) }
func (f *faults) crashLeader() string { return f.crashOf(f.any(true)) }

func (f *faults) crashOf(n *node) string {
	if n == nil {
		return ""
	}
	defer n.give()
	f.w.kill(n)
	f.pause(20*time.Millisecond, 2500*time.Millisecond)
	f.w.begin(n)
	return n.name
}

func (f *faults) crashAll() string { return f.crashMany(f.w.live()) }

// crashSome kills a random half, often a majority.
func (f *faults) crashSome() string {
	live := f.w.live()
	f.r.Shuffle(len(live), func(i, j int) { live[i], live[j] = live[j], live[i] })
	return f.crashMany(live[:(len(live)+1)/2])
}

func (f *faults) crashMany(list []*node) string {
	var mine []*node
	for _, n := range list {
		if n.take() {
			if n.cur.Load() == nil {
				n.give()
				continue
			}
			mine = append(mine, n)
			f.w.kill(n)
		}
	}
	f.pause(20*time.Millisecond, 1500*time.Millisecond)
	for _, n := range mine {
		f.w.begin(n)
		n.give()
		time.Sleep(f.w.between(0, 50*time.Millisecond))
	}
	return fmt.Sprint(len(mine), " nodes")
}

// crashElecting kills the leader, and then, while another is being elected, now this voter and now that for a moment.
func (f *faults) crashElecting() string {
	n := f.any(true)
	if n == nil {
		return ""
	}
	defer n.give()
	f.w.kill(n)
	times := 1 + f.w.intn(4)
	for range times {
		f.pause(0, 120*time.Millisecond)
		o := f.any(f.w.oneIn(2))
		if o == nil {
			continue
		}
		f.w.kill(o)
		f.pause(0, 10*time.Millisecond)
		f.w.begin(o)
		o.give()
	}
	f.pause(0, 500*time.Millisecond)
	f.w.begin(n)
	return fmt.Sprintf("%s, and %d times others", n.name, times)
}

// mayLose says whether a disk may be lost now: the group must be able to do without it, whatever configuration anybody believes in.
func (f *faults) mayLose(n *node) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.losses == 0 || len(f.w.back()) < 4 {
		return false
	}
	for _, o := range f.w.live() {
		l := o.cur.Load()
		if l == nil {
			continue
		}
		voters := l.arb.Status().Voters
		gone := 0
		for _, id := range voters {
			if v := f.w.of(id); v != nil && (v == n || v.isLost()) {
				gone++
			}
		}
		if len(voters) == 0 || gone > (len(voters)-1)/2 {
			return false
		}
	}
	f.losses--
	return true
}

// loseDisk takes a node away for good. A machine with a new identity joins in its place.
func (f *faults) loseDisk() string {
	n := f.any(false)
	if n == nil {
		return ""
	}
	defer n.give()
	if !f.mayLose(n) {
		return ""
	}
	f.w.logf("the disk of %s is lost", n.name)
	f.w.kill(n)
	n.mu.Lock()
	n.lost = true
	n.mu.Unlock()
	f.pause(100*time.Millisecond, 1500*time.Millisecond)
	m := f.w.add()
	f.w.begin(m)
	return fmt.Sprintf("of %s, %s came", n.name, m.name)
}

// wipeDisk brings a node back with its identity and an empty disk. If it ever voted it must be refused, or what it promised is forgotten.
func (f *faults) wipeDisk() string {
	n := f.any(false)
	if n == nil {
		return ""
	}
	defer n.give()
	if l := n.cur.Load(); l == nil || l.ext != nil || !f.mayLose(n) {
		return "" // what lies on its disk besides the log is not this fault's matter
	}
	s := n.cur.Load().arb.Status()
	voted := slices.Contains(s.Voters, n.id)
	f.w.logf("the disk of %s is wiped; it voted: %v", n.name, voted)
	f.w.kill(n)
	n.mu.Lock()
	n.fs, n.wiped = vfs.NewCrashableMem(), true
	n.mu.Unlock()
	f.pause(20*time.Millisecond, 1000*time.Millisecond)
	f.w.begin(n)
	time.Sleep(2 * time.Second)
	l := n.cur.Load()
	if l == nil {
		return n.name + ", and it was refused"
	}
	if s := l.arb.Status(); voted && (s.Role == "voter" || s.Role == "leader") {
		f.w.failf("I7: %s voted, came back with an empty disk and is a %s again", n.name, s.Role)
	}
	// Nobody could tell yet, or it had never voted. It goes, for good: its owner gives the machine a new identity.
	f.w.kill(n)
	n.mu.Lock()
	n.lost = true
	n.mu.Unlock()
	return n.name
}

// sides divides the nodes in two.
func (f *faults) sides() map[*node]bool {
	side := map[*node]bool{}
	for _, n := range f.w.all() {
		side[n] = f.w.oneIn(2)
	}
	return side
}

func (f *faults) split() string {
	side := f.sides()
	f.w.logf("split: %s", names(side))
	heal := f.w.cut(func(a, b *node) bool { return side[a] != side[b] })
	f.pause(200*time.Millisecond, 5*time.Second)
	heal()
	return names(side)
}

func names(side map[*node]bool) string {
	var in []string
	for n, is := range side {
		if is {
			in = append(in, n.name)
		}
	}
	slices.Sort(in)
	return fmt.Sprint(in, " apart from the others")
}

// isolate cuts one node off, mostly the leader.
func (f *faults) isolate() string {
	n := f.any(!f.w.oneIn(3))
	if n == nil {
		return ""
	}
	n.give()
	f.w.logf("%s is cut off", n.name)
	heal := f.w.cut(func(a, b *node) bool { return a == n || b == n })
	f.pause(200*time.Millisecond, 6*time.Second)
	heal()
	return n.name
}

// oneWay loses what some send to others, and not the other way.
func (f *faults) oneWay() string {
	side := f.sides()
	if f.w.oneIn(2) { // one node is heard by nobody, or hears nobody
		n := f.any(true)
		if n == nil {
			return ""
		}
		n.give()
		in := f.w.oneIn(2)
		for _, o := range f.w.all() {
			side[o] = (o == n) == in
		}
	}
	f.w.logf("one way: what %s say is lost", names(side))
	heal := f.w.cut(func(a, b *node) bool { return side[a] && !side[b] })
	f.pause(200*time.Millisecond, 4*time.Second)
	heal()
	return names(side)
}

// bridge leaves one node in touch with both sides.
func (f *faults) bridge() string {
	side := f.sides()
	n := f.any(false)
	if n == nil {
		return ""
	}
	n.give()
	f.w.logf("bridge: %s, but for %s", names(side), n.name)
	heal := f.w.cut(func(a, b *node) bool { return side[a] != side[b] && a != n && b != n })
	f.pause(200*time.Millisecond, 5*time.Second)
	heal()
	return n.name
}

// hungDisk has the fsync of the leader hang, under a write, while it is cut off from most of the others. Raft's loop waits for the disk, so it does not
// notice that it leads no more; whoever still hears it takes it for the leader.
func (f *faults) hungDisk() string {
	n := f.any(true)
	if n == nil {
		return ""
	}
	defer n.give()
	l := n.cur.Load()
	side := map[*node]bool{n: true}
	if others := slices.DeleteFunc(f.w.live(), func(o *node) bool { return o == n }); len(others) > 0 && !f.w.oneIn(3) {
		side[others[f.w.intn(len(others))]] = true
	}
	f.w.logf("the fsync of %s hangs; %s", n.name, names(side))
	l.disk.hang()
	nonce := l.rand.Uint64() | 1
	f.wg.Go(func() {
		ctx, cancel := within(time.Second)
		defer cancel()
		_, err := l.arb.Claim(ctx, arbiter.ClaimRequest{Key: "hung/" + n.name, Nonce: nonce, Owner: n.id, Boot: l.boot})
		f.w.logf("what %s writes while its fsync hangs: %v", n.name, err)
	})
	f.pause(5*time.Millisecond, 100*time.Millisecond)
	heal := f.w.cut(func(a, b *node) bool { return side[a] != side[b] })
	f.pause(500*time.Millisecond, 9*time.Second)
	if f.w.oneIn(2) {
		l.disk.cont()
	}
	heal()
	f.pause(0, 300*time.Millisecond)
	l.disk.cont()
	return names(side)
}

func (f *faults) flap() string {
	side := f.sides()
	f.w.logf("flapping: %s", names(side))
	times := 3 + f.w.intn(12)
	for range times {
		heal := f.w.cut(func(a, b *node) bool { return side[a] != side[b] })
		f.pause(20*time.Millisecond, 500*time.Millisecond)
		heal()
		f.pause(20*time.Millisecond, 300*time.Millisecond)
	}
	return fmt.Sprint(times, " times")
}

func (f *faults) set(loss float64, slow time.Duration) {
	f.mu.Lock()
	f.loss, f.slow = loss, slow
	f.mu.Unlock()
	f.weather()
}

func (f *faults) lose() string {
	p := float64(1+f.w.intn(25)) / 100
	f.w.logf("loss: %.0f %%", 100*p)
	f.set(p, 0)
	f.pause(100*time.Millisecond, 2*time.Second)
	f.set(0, 0)
	return fmt.Sprintf("%.0f %%", 100*p)
}

func (f *faults) delay() string {
	d := f.w.between(50*time.Millisecond, 800*time.Millisecond)
	f.w.logf("delay: up to %s", d)
	f.set(0, d)
	f.pause(500*time.Millisecond, 3*time.Second)
	f.set(0, 0)
	return d.String()
}

func (f *faults) freeze() string {
	n := f.any(f.w.oneIn(2))
	if n == nil {
		return ""
	}
	defer n.give()
	f.w.logf("%s stands still", n.name)
	n.freeze()
	f.pause(100*time.Millisecond, 6*time.Second)
	n.thaw()
	f.w.logf("%s goes on", n.name)
	return n.name
}

// starve has a node run in short spells.
func (f *faults) starve() string {
	n := f.any(false)
	if n == nil {
		return ""
	}
	defer n.give()
	f.w.logf("%s runs late", n.name)
	for range 3 + f.w.intn(8) {
		n.freeze()
		f.pause(50*time.Millisecond, 700*time.Millisecond)
		n.thaw()
		f.pause(5*time.Millisecond, 200*time.Millisecond)
	}
	return n.name
}

// slander has everybody hold a node dead that lives.
func (f *faults) slander() string {
	if f.w.hear == nil {
		return ""
	}
	n := f.any(true)
	if n == nil {
		return ""
	}
	n.give()
	f.w.logf("%s is called dead", n.name)
	f.w.hear.mu.Lock()
	f.w.hear.slander[n] = time.Now().Add(f.w.between(100*time.Millisecond, 3*time.Second))
	f.w.hear.mu.Unlock()
	f.w.hear.look()
	return n.name
}

// join brings a storm of newcomers.
func (f *faults) join() string {
	joined := 0
	for range 1 + f.w.intn(3) {
		if len(f.w.back()) >= f.max {
			break
		}
		n := f.w.add()
		f.w.begin(n)
		joined++
		time.Sleep(f.w.between(0, 300*time.Millisecond))
	}
	if joined == 0 {
		return ""
	}
	return fmt.Sprint(joined, " nodes")
}

// leave has a node go in order, for good.
func (f *faults) leave() string {
	n := f.any(false)
	if n == nil {
		return ""
	}
	defer n.give()
	if len(f.w.back()) < 5 || !f.mayLose(n) {
		return ""
	}
	l := n.cur.Load()
	if l == nil {
		return ""
	}
	f.w.logf("%s leaves", n.name)
	for _, o := range f.w.live() {
		if ol := o.cur.Load(); ol != nil && ol.oracle != nil {
			ol.oracle.drain(n)
		}
	}
	ctx, cancel := within(5 * time.Second)
	err := l.arb.StepDown(ctx)
	cancel()
	f.w.kill(n)
	n.mu.Lock()
	n.lost = true
	n.mu.Unlock()
	return fmt.Sprintf("%s (%v)", n.name, err)
}

// over ends all harm: the network is whole, everybody who can be is up.
func (f *faults) over() {
	w := f.w
	w.logf("all is healed")
	w.heal()
	f.mu.Lock()
	f.base = 2 * time.Millisecond
	f.mu.Unlock()
	f.set(0, 0)
	if w.hear != nil {
		w.hear.mu.Lock()
		clear(w.hear.slander)
		w.hear.mu.Unlock()
	}
	for _, n := range w.back() {
		if l := n.cur.Load(); l == nil {
			w.begin(n)
		} else if l.frozen.Load() {
			n.thaw()
		}
	}
}
