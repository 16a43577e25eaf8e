package sim

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/internal/sim/history"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// nodeKind is the node as `coppice up` runs it: node.New and Run with all their parts, libp2p's host and kad-dht over libp2p's simulated network (QUIC), the
// door that newcomers join by, placement with its solver, the registry, and the control API, through which everything is asked and told here. What is replaced:
// sockets, the disk below Pebble and the state files, CLOCK_BOOTTIME, and the processes of components.
//
// It knows the cluster as a user does, and asks what a user relies on: no answered call is lost or carried out twice; who acted in an epoch is one node, and with
// exactly-one nobody acts after a later epoch has; after healing every node knows every other, the voters are as many as they should be, each instance runs
// once, its checkpoint lies on living nodes, and every node answers calls.
var nodeKind = kind{"node", func(s *schedule) { newNodes(s).run() }}

// wellWithin is when all that must be so after healing, or after a start. QUIC has no resets: what was said to a machine that is gone is given up by time, and a
// connection over which nothing came for 30 s is dialled again.
const wellWithin = time.Minute

type nodes struct {
	*schedule
	air       *air
	opening   chan struct{} // held while a node is being built
	guarantee string
	instances []string
	deployed  bool
	ails      string // what was in the way when all was looked at last

	mu    sync.Mutex // guards list
	list  []*machine
	acts  sync.Mutex // guards the rest
	epoch map[string][2]uint64
	actor map[string]*machine // by instance and epoch: who carried calls out
	hist  map[string][]history.Count
}

func newNodes(s *schedule) *nodes {
	w := &nodes{
		schedule: s, air: newAir(s.dice().Uint64), opening: make(chan struct{}, 1), guarantee: components.Safe,
		epoch: map[string][2]uint64{}, actor: map[string]*machine{}, hist: map[string][]history.Count{},
	}
	if w.oneIn(2) {
		w.guarantee = components.ExactlyOne
	}
	for i := range 1 + w.intn(2) {
		w.instances = append(w.instances, fmt.Sprintf("%s/store%d-0", simApp, i))
	}
	return w
}

func (w *nodes) run() {
	defer w.close()
	if !w.grow(4 + w.intn(2)) {
		return
	}
	if !w.deploy() {
		return
	}
	end := time.Now().Add(w.between(15*time.Second, 30*time.Second))
	f := &nodeFaults{w: w, losses: 1, joins: 1}
	long := w.oneIn(12)
	if long {
		end = end.Add(longest)
	}
	var callers sync.WaitGroup
	for i := range 2 {
		r := w.dice()
		callers.Go(func() { w.call(i, r, f, end) })
	}
	if long {
		f.longCut()
		end = time.Now().Add(15 * time.Second)
		f.over.Store(end.UnixNano())
	}
	f.run(end)
	callers.Wait()
	if w.failed() {
		return
	}
	f.heal()
	w.afterwards()
	for _, name := range w.instances {
		w.checks = append(w.checks, func() (history.Verdict, string) {
			if why := history.CheckCount(w.hist[name]); why != "" {
				return history.Impossible, "the calls of " + name + ": " + why
			}
			return history.Fits, ""
		})
	}
}

func (w *nodes) close() {
	w.air.clear()
	for _, m := range w.all() {
		m.cutPower()
	}
	w.air.sim.Close()
}

func (w *nodes) all() []*machine {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.list)
}

// live lists the machines whose node serves.
func (w *nodes) live() []*machine {
	return slices.DeleteFunc(w.all(), func(m *machine) bool { l := m.cur.Load(); return l == nil || !l.serves() })
}

// grow founds a cluster and has others join it by the token that the founder printed.
func (w *nodes) grow(size int) bool {
	first := w.add().power("")
	if !w.serving(first) {
		return false
	}
	w.logf("%s has founded the cluster", first.m.name)
	for range size - 1 {
		w.add().power(first.token)
	}
	if took, ok := w.eventually(wellWithin, func() bool { return len(w.live()) == size && w.unwell() == "" }); !ok {
		w.failf("%d nodes do not make a cluster within %s: %s", size, took, w.unwell())
		return false
	}
	w.logf("%d nodes are a cluster", size)
	return true
}

func (w *nodes) serving(l *nodeLife) bool {
	select {
	case <-l.ready:
		return true
	case <-l.done:
	case <-time.After(wellWithin):
		w.failf("%s is not ready after %s", l.m.name, wellWithin)
	}
	return false
}

func (w *nodes) deploy() bool {
	l := w.live()[w.intn(len(w.live()))].cur.Load()
	ctx, cancel := within(wellWithin)
	defer cancel()
	if err := l.push(ctx); err != nil {
		w.failf("push at %s: %v", l.m.name, err)
		return false
	}
	manifest := "application: " + simApp + "\ncomponents:\n"
	for i := range w.instances {
		manifest += fmt.Sprintf("  - name: store%d\n    artifact: counter@^1\n    durable: each-call\n    guarantee: %s\n", i, w.guarantee)
	}
	if err := l.deploy(ctx, manifest, wellWithin); err != nil {
		w.failf("deploy at %s: %v; %s", l.m.name, err, w.why(l))
		return false
	}
	w.deployed = true
	w.logf("%v is deployed, %s", w.instances, w.guarantee)
	return true
}

// acted is told of each call that a process carries out.
func (w *nodes) acted(m *machine, instance string, incarnation, epoch uint64) {
	w.acts.Lock()
	defer w.acts.Unlock()
	now, last := [2]uint64{incarnation, epoch}, w.epoch[instance]
	key := fmt.Sprint(instance, now)
	if was := w.actor[key]; was != nil && was != m {
		w.failf("I1: in epoch %d of %s both %s and %s act", epoch, instance, was.name, m.name)
	}
	w.actor[key] = m
	if slices.Compare(now[:], last[:]) >= 0 {
		w.epoch[instance] = now
		return
	}
	if w.guarantee == components.ExactlyOne {
		w.failf("I3: %s acts for %s in epoch %d after epoch %d has acted", m.name, instance, epoch, last[1])
	}
}

// call makes calls from here and there until the end.
func (w *nodes) call(number int, r *rand.Rand, f *nodeFaults, end time.Time) {
	for time.Now().Before(f.until(end)) && !w.failed() {
		pause := time.Duration(20+r.IntN(300)) * time.Millisecond
		if f.slow.Load() {
			pause *= 30
		}
		time.Sleep(pause)
		live := w.live()
		if len(live) == 0 {
			continue
		}
		m := live[r.IntN(len(live))]
		w.once(number, m, w.instances[r.IntN(len(w.instances))], time.Duration(500+r.IntN(5000))*time.Millisecond)
	}
}

// once makes one call, as `coppice call` does, and records it.
func (w *nodes) once(number int, m *machine, name string, limit time.Duration) error {
	l := m.cur.Load()
	if l == nil {
		return nil
	}
	ctx, cancel := within(limit)
	defer cancel()
	o := history.Count{Call: w.now()}
	res, err := l.client.Call(ctx, &apiv1.CallRequest{Component: strings.TrimSuffix(name, "-0"), Method: "Add", Json: `{"n": 1}`, TimeoutMs: uint64(limit.Milliseconds())})
	o.Return = w.now()
	var v struct {
		Value int64 `json:"value,string"`
	}
	if err == nil {
		err = json.Unmarshal([]byte(res.GetJson()), &v)
	}
	o.Value = v.Value
	w.logf("caller %d: add to %s at %s = %d, since %.4f: %v", number, name, m.name, v.Value, o.Call.Seconds(), err)
	w.acts.Lock()
	defer w.acts.Unlock()
	if err != nil {
		o.Unknown = true
		w.count.InDoubt++
	} else {
		w.count.Answers++
	}
	w.hist[name] = append(w.hist[name], o)
	return err
}

// well says whether all is as it must be, and logs what is in the way.
func (w *nodes) well() bool {
	why := w.unwell()
	if why != w.ails {
		w.logf("not yet: %s", why)
		w.ails = why
	}
	return why == ""
}

// unwell says what is not as it must be; "": nothing.
func (w *nodes) unwell() string {
	live := w.live()
	for _, m := range live {
		l := m.cur.Load()
		if l == nil {
			return m.name + " is off"
		}
		if why := w.unwellAt(l, live); why != "" {
			return m.name + ": " + why
		}
	}
	return ""
}

func (w *nodes) unwellAt(l *nodeLife, live []*machine) string {
	ctx, cancel := within(5 * time.Second)
	defer cancel()
	known, err := l.client.Nodes(ctx, &apiv1.NodesRequest{})
	if err != nil {
		return "nodes: " + err.Error()
	}
	state := map[string]string{}
	for _, n := range known.GetNodes() {
		state[n.GetName()] = n.GetState()
	}
	for _, m := range live {
		if s := state[m.name]; s == "quarantined" { // too often found dead: an operator lets it in again
			if _, err := l.client.Readmit(ctx, &apiv1.ReadmitRequest{Node: m.name}); err != nil {
				return fmt.Sprintf("readmit %s: %v", m.name, err)
			}
			return m.name + " was quarantined"
		} else if s != "alive" {
			return fmt.Sprintf("%s is %q there", m.name, s)
		}
	}
	st, err := l.client.Status(ctx, &apiv1.StatusRequest{})
	if err != nil {
		return "status: " + err.Error()
	}
	if a := st.GetArbiter(); a.GetLeader() == "" || len(a.GetVoters()) != wantedVoters(len(live)) {
		return fmt.Sprintf("the arbiter's leader is %q, its voters are %v, with %d nodes", a.GetLeader(), a.GetVoters(), len(live))
	}
	if !w.deployed {
		return ""
	}
	ps, err := l.client.Ps(ctx, &apiv1.PsRequest{Application: simApp})
	if err != nil {
		return "ps: " + err.Error()
	}
	for _, in := range ps.GetInstances() {
		if in.GetQuarantined() { // two of its owners lost power soon after they had started it: an operator who knows that lets it go on
			if _, err := l.client.Start(ctx, &apiv1.LifecycleRequest{Component: in.GetComponent(), TimeoutMs: 3000}); err != nil {
				return fmt.Sprintf("start %s: %v", in.GetComponent(), err)
			}
			return in.GetInstance() + " was quarantined"
		}
		if why := w.unwellInstance(in, live); why != "" {
			return why
		}
	}
	return ""
}

// unwellInstance compares what a node says of an instance with the processes that there are.
func (w *nodes) unwellInstance(in *apiv1.Instance, live []*machine) string {
	name := in.GetInstance()
	if in.GetState() != string(components.Running) {
		return fmt.Sprintf("%s is %s: %s", name, in.GetState(), in.GetReason())
	}
	var on []string
	for _, m := range live {
		if l := m.cur.Load(); l != nil && len(l.procs.running(name)) > 0 {
			on = append(on, m.name)
		}
	}
	if len(on) != 1 || on[0] != in.GetNode() {
		return fmt.Sprintf("%s is said to run on %s and runs on %v", name, in.GetNode(), on)
	}
	if in.GetCheckpointSeq() > 0 && in.GetReplicasAlive() < 2 {
		return fmt.Sprintf("checkpoint %d of %s lies on %d living nodes of %v", in.GetCheckpointSeq(), name, in.GetReplicasAlive(), in.GetReplicas())
	}
	return ""
}

// afterwards asserts that all is well again, and stays so while every node is called (I10).
func (w *nodes) afterwards() {
	took, ok := w.eventually(wellWithin, w.well)
	if !ok {
		w.failf("I10: %s after healing: %s", took, w.unwell())
		return
	}
	w.logf("all is well after %s", took)
	w.count.Heal = took
	for _, m := range w.live() {
		for _, name := range w.instances {
			if err := w.once(9, m, name, 10*time.Second); err != nil {
				w.failf("I10: %s is not answered at %s: %v", name, m.name, err)
				return
			}
		}
	}
}

// eventually waits for a condition, in virtual time, and says how long that took; false: it did not come.
func (w *nodes) eventually(within time.Duration, cond func() bool) (time.Duration, bool) {
	begun := time.Now()
	for !cond() {
		if time.Since(begun) > within {
			return within, false
		}
		time.Sleep(250 * time.Millisecond)
	}
	return time.Since(begun), true
}

// why says what a node says of the instances and of what went wrong with placement.
func (w *nodes) why(l *nodeLife) string {
	ctx, cancel := within(5 * time.Second)
	defer cancel()
	var out []string
	ps, err := l.client.Ps(ctx, &apiv1.PsRequest{})
	for _, in := range ps.GetInstances() {
		out = append(out, fmt.Sprintf("%s on %q: %s %s", in.GetInstance(), in.GetNode(), in.GetState(), in.GetReason()))
	}
	for _, name := range w.instances {
		why, werr := l.client.Why(ctx, &apiv1.WhyRequest{Component: strings.TrimSuffix(name, "-0")})
		for _, d := range why.GetDecisions() {
			out = append(out, d.String())
		}
		err = errors.Join(err, werr)
	}
	st, serr := l.client.Status(ctx, &apiv1.StatusRequest{})
	return fmt.Sprint(out, st.GetWarnings(), errors.Join(err, serr))
}
