package sim

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// Cuts that last: longer than pages stay pinned for a commit that waits (10 min), and than anybody retries anything.
const (
	longCutLeast = 11 * time.Minute
	longest      = 15 * time.Minute
)

// nodeFaults does harm to machines, one or two things at a time.
type nodeFaults struct {
	w             *nodes
	losses, joins int // disks that may yet be lost, newcomers that may yet come; of run's goroutine
	wg            sync.WaitGroup
	slow          atomic.Bool  // callers are to take their time
	over          atomic.Int64 // when callers end, in Unix nanoseconds; 0: as they were told
}

type nodeHarm struct {
	name   string
	weight int
	do     func(f *nodeFaults) string
}

var nodeHarms = []nodeHarm{
	{"power cut", 5, (*nodeFaults).crash},
	{"power cut of an owner", 5, (*nodeFaults).crashOwner},
	{"power cut of all", 1, (*nodeFaults).crashAll},
	{"restart", 2, (*nodeFaults).restart},
	{"lost disk", 2, (*nodeFaults).loseDisk},
	{"split", 3, (*nodeFaults).split},
	{"isolation", 3, (*nodeFaults).isolate},
	{"owner cut off", 4, (*nodeFaults).isolateOwner},
	{"one way", 3, (*nodeFaults).oneWay},
	{"weather", 3, (*nodeFaults).weather},
	{"death of a process", 2, (*nodeFaults).killProcess},
	{"join", 1, (*nodeFaults).join},
}

func (f *nodeFaults) until(end time.Time) time.Time {
	if at := f.over.Load(); at != 0 {
		return time.Unix(0, at)
	}
	return end
}

// run does harm until the end, and returns when all of it is over.
func (f *nodeFaults) run(end time.Time) {
	total := 0
	for _, h := range nodeHarms {
		total += h.weight
	}
	for time.Now().Before(end) && !f.w.failed() {
		time.Sleep(f.w.between(200*time.Millisecond, 3*time.Second))
		pick, i := f.w.intn(total), 0
		for ; pick >= nodeHarms[i].weight; i++ {
			pick -= nodeHarms[i].weight
		}
		f.one(nodeHarms[i])
	}
	f.wg.Wait()
}

func (f *nodeFaults) one(h nodeHarm) {
	run := func() {
		if what := h.do(f); what != "" {
			f.w.acts.Lock()
			f.w.count.Faults++
			f.w.acts.Unlock()
			f.w.logf("end of %s: %s", h.name, what)
		}
	}
	// Who may lose a disk or join is counted here, so those two wait for nobody.
	if f.w.oneIn(3) && h.name != "lost disk" && h.name != "join" {
		f.wg.Go(run)
	} else {
		run()
	}
}

// heal ends all faults, and starts what is off.
func (f *nodeFaults) heal() {
	f.w.air.clear()
	f.w.air.weather(2*time.Millisecond, 0)
	for _, m := range f.w.all() {
		if m.cur.Load() == nil && !m.isLost() {
			f.w.serving(m.power(""))
		}
	}
	f.w.logf("all is healed")
}

func (f *nodeFaults) pause(from, to time.Duration) { time.Sleep(f.w.between(from, to)) }

// any reserves a machine that runs.
func (f *nodeFaults) any() *machine {
	live := f.w.live()
	if len(live) == 0 {
		return nil
	}
	if m := live[f.w.intn(len(live))]; m.take() {
		return m
	}
	return nil
}

// owner reserves the machine that runs an instance.
func (f *nodeFaults) owner() *machine {
	name := f.w.instances[f.w.intn(len(f.w.instances))]
	for _, m := range f.w.live() {
		if l := m.cur.Load(); l != nil && len(l.procs.running(name)) > 0 && m.take() {
			return m
		}
	}
	return nil
}

func (f *nodeFaults) crash() string      { return f.crashOf(f.any()) }
func (f *nodeFaults) crashOwner() string { return f.crashOf(f.owner()) }

func (f *nodeFaults) crashOf(m *machine) string {
	if m == nil {
		return ""
	}
	defer m.give()
	f.w.logf("the power of %s is cut", m.name)
	m.cutPower()
	f.pause(20*time.Millisecond, 6*time.Second)
	f.w.logf("%s starts", m.name)
	f.w.serving(m.power(""))
	return m.name
}

func (f *nodeFaults) crashAll() string {
	var mine []*machine
	for _, m := range f.w.live() {
		if m.take() {
			mine = append(mine, m)
		}
	}
	f.w.logf("the power of %d machines is cut", len(mine))
	var wg sync.WaitGroup
	for _, m := range mine {
		wg.Go(m.cutPower)
	}
	wg.Wait()
	f.pause(20*time.Millisecond, 2*time.Second)
	for _, m := range mine {
		l := m.power("")
		defer func() { f.w.serving(l); m.give() }()
	}
	return fmt.Sprint(len(mine), " machines")
}

func (f *nodeFaults) restart() string {
	m := f.any()
	if m == nil {
		return ""
	}
	defer m.give()
	f.w.logf("%s is told to stop", m.name)
	m.shut()
	f.pause(20*time.Millisecond, 2*time.Second)
	f.w.serving(m.power(""))
	return m.name
}

// loseDisk takes a machine away for good, with what it holds. Another one joins in its place.
func (f *nodeFaults) loseDisk() string {
	if f.losses == 0 {
		return ""
	}
	// Nothing else is broken meanwhile: with three voters of which one is down, a lost disk would be a lost majority.
	f.wg.Wait()
	if _, ok := f.w.eventually(wellWithin, f.w.well); !ok {
		f.w.failf("I10: not well before a disk is to be lost: %s", f.w.unwell())
		return ""
	}
	m := f.any()
	if m == nil {
		return ""
	}
	f.losses--
	f.w.logf("the disk of %s is lost", m.name)
	m.cutPower()
	m.mu.Lock()
	m.lost = true
	m.mu.Unlock()
	return fmt.Sprintf("of %s; %s", m.name, f.newcomer())
}

func (f *nodeFaults) join() string {
	if f.joins == 0 {
		return ""
	}
	f.joins--
	return f.newcomer()
}

// newcomer has a machine join by a token that some node makes.
func (f *nodeFaults) newcomer() string {
	var token string
	made := func() bool {
		live := f.w.live()
		if len(live) == 0 {
			return false
		}
		l := live[f.w.intn(len(live))].cur.Load()
		if l == nil {
			return false
		}
		ctx, cancel := within(5 * time.Second)
		defer cancel()
		res, err := l.client.Token(ctx, &apiv1.TokenRequest{})
		token = res.GetToken()
		return err == nil
	}
	if _, ok := f.w.eventually(wellWithin, made); !ok {
		f.w.failf("no node makes a token")
		return ""
	}
	m := f.w.add()
	f.w.logf("%s joins", m.name)
	f.w.serving(m.power(token))
	return m.name + " has joined"
}

// sides divides the machines in two, by address.
func (f *nodeFaults) sides() (side map[string]bool, names string) {
	side = map[string]bool{}
	for _, m := range f.w.all() {
		if side[m.ip] = f.w.oneIn(2); side[m.ip] {
			names += " " + m.name
		}
	}
	return side, names
}

func (f *nodeFaults) split() string {
	side, names := f.sides()
	f.w.logf("split:%s apart", names)
	heal := f.w.air.cut(func(from, to string) bool { return side[from] != side[to] })
	f.pause(500*time.Millisecond, 10*time.Second)
	heal()
	return names
}

func (f *nodeFaults) isolate() string {
	return f.isolateOf(f.any(), 500*time.Millisecond, 10*time.Second)
}

func (f *nodeFaults) isolateOwner() string {
	return f.isolateOf(f.owner(), 500*time.Millisecond, 12*time.Second)
}

func (f *nodeFaults) isolateOf(m *machine, from, to time.Duration) string {
	if m == nil {
		return ""
	}
	m.give() // it may crash meanwhile, too
	f.w.logf("%s is cut off", m.name)
	heal := f.w.air.cut(func(a, b string) bool { return a == m.ip || b == m.ip })
	f.pause(from, to)
	heal()
	return m.name
}

// oneWay loses what some send to others, or what one machine sends or is sent.
func (f *nodeFaults) oneWay() string {
	side, names := f.sides()
	if f.w.oneIn(2) {
		m := f.any()
		if m == nil {
			return ""
		}
		m.give()
		in := f.w.oneIn(2)
		for _, o := range f.w.all() {
			side[o.ip] = (o == m) == in
		}
		names = fmt.Sprintf(" %s alone: %v", m.name, in)
	}
	f.w.logf("one way: what is lost is said by%s", names)
	heal := f.w.air.cut(func(a, b string) bool { return side[a] && !side[b] })
	f.pause(500*time.Millisecond, 8*time.Second)
	heal()
	return names
}

// weather is delay and loss for a while.
func (f *nodeFaults) weather() string {
	delay, loss := f.w.between(2*time.Millisecond, 300*time.Millisecond), uint64(f.w.intn(100))
	f.w.logf("packets take up to %s, %d of a thousand are lost", delay, loss)
	f.w.air.weather(delay, loss)
	f.pause(time.Second, 8*time.Second)
	f.w.air.weather(2*time.Millisecond, 0)
	return fmt.Sprint(delay, " ", loss)
}

func (f *nodeFaults) killProcess() string {
	name := f.w.instances[f.w.intn(len(f.w.instances))]
	for _, m := range f.w.live() {
		if l := m.cur.Load(); l != nil {
			for _, p := range l.procs.running(name) {
				f.w.logf("a process of %s on %s dies", name, m.name)
				p.die("killed")
				return name
			}
		}
	}
	return ""
}

// longCut cuts machines off for longer than anything waits: an owner, or some. One that is off meanwhile starts while it is cut off, now and then.
func (f *nodeFaults) longCut() {
	f.slow.Store(true)
	defer f.slow.Store(false)
	side, names := f.sides()
	if m := f.owner(); m != nil {
		m.give()
		if f.w.oneIn(2) {
			clear(side)
			side[m.ip], names = true, " "+m.name
		}
	}
	all := f.w.between(longCutLeast, longest)
	f.w.logf("a long cut:%s apart for %s", names, all.Round(time.Second))
	heal := f.w.air.cut(func(from, to string) bool { return side[from] != side[to] })
	first := f.w.between(0, all)
	time.Sleep(first)
	if f.w.oneIn(2) {
		f.crash()
	}
	time.Sleep(all - first)
	heal()
	f.w.count.Faults++
	f.w.logf("the long cut is over")
	if took, ok := f.w.eventually(wellWithin, f.w.well); !ok {
		f.w.failf("I10: %s after a long cut: %s", took, f.w.unwell())
	}
}
