package sim

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/internal/sim/history"
	counterv1 "github.com/coppice-project/coppice/plugins/counter/v1"
)

// wholeKind is all of a node but its sockets and real processes: members, arbiter, records, blobs, supervisor, membranes and the SDK. Instances of
// a counter are called from everywhere while everything goes wrong; what was answered must be linearizable.
var wholeKind = kind{"whole", func(s *schedule) { newWhole(s).run() }}

const (
	simApp    = "shop"
	protoGate = protocol.ID("/sim/gate/1")
	// lapse is when a component's process ends itself because its node does not grant its lease.
	lapse = 2 * time.Second
	// collectAfter is the collector's grace in the simulation: longer than faults that follow on each other keep a commit waiting (a split, the
	// leader's death and flapping took 9 s: whole/120), as ten minutes are longer than any real upload.
	collectAfter = 15 * time.Second
	// ownedWithin is when every instance must be served again after healing: reconnected (netTimeout), found dead (1.6 s), the lease of the
	// last owner waited for (3.1 s), and 5 s.
	ownedWithin = netTimeout + 1600*time.Millisecond + 3100*time.Millisecond + 5*time.Second
)

// grantedLeases says that an exactly-one instance needs a lease which the arbiter's leader grants and claims wait for. While it is false the
// lease is only what its owner has heard, and the simulation has shown where that is too little: an owner that hears the arbiter through
// somebody else, or hears and is not heard, goes on beside its successor; one that led the arbiter itself takes a second longer to notice that it
// is cut off; and a process that waits for the arbiter outlives its lease. So for exactly-one such cuts are left out, a process counts only
// while it may serve, for leadersDoubt beside its successor it is borne with, and reads are in no history.
const grantedLeases = true

// leadersDoubt is what a leader that is cut off takes to find out.
const leadersDoubt = time.Second

// whole is a world of whole nodes.
type whole struct {
	*world
	shelf     *shelf
	guarantee string
	reconcile string // of always-on
	dark      bool   // owners are rebooted without their uplink
	standby   string
	instances []string

	hist   sync.Mutex // guards the rest
	ops    map[string][]history.Op[int64]
	frozen map[*life]time.Time  // since when
	beside map[string]time.Time // by instance: since when two may serve it
	adds   map[string][]added   // of always-on, instead of ops
}

func newWhole(s *schedule) *whole {
	w := &whole{world: newWorld(s), ops: map[string][]history.Op[int64]{}, frozen: map[*life]time.Time{}, beside: map[string]time.Time{}, adds: map[string][]added{}}
	w.guarantee = components.Safe
	if w.oneIn(2) {
		w.guarantee = components.ExactlyOne
	}
	// By the seed alone, so that schedules are those that they were before there were standbys.
	w.standby = []string{components.StandbyHot, components.StandbyCold, components.StandbyHot, components.StandbyWarm}[s.seed%4]
	for i := range 1 + w.intn(2) {
		w.instances = append(w.instances, fmt.Sprintf("%s/store-%d", simApp, i))
	}
	w.build = w.buildLife
	return w
}

func (w *whole) run() {
	defer func() {
		w.close()
		if !w.failed() {
			w.eyes.group()
		}
	}()
	var err error
	if w.shelf, err = newShelf(); err != nil {
		w.failf("the component cannot be described: %v", err)
		return
	}
	w.net.SetTimeout(netTimeout)
	size := 4 + w.intn(2)
	if w.dark {
		size += 2 // some are outside of the group
	}
	for range size {
		w.add()
	}
	for i, n := range w.all() {
		n.start(i == 0)
	}
	if _, ok := w.eventually(15*time.Second, w.met); !ok {
		w.statuses()
		w.failf("%d nodes have not met, or have no group", size)
		return
	}
	if !w.deploy() {
		return
	}
	w.goes.Go(w.look)
	w.goes.Go(w.operate)
	if _, ok := w.eventually(10*time.Second, w.served); !ok {
		w.failf("the instances do not run before the first fault")
		w.owners()
		return
	}
	w.copies()
	end := time.Now().Add(w.between(6*time.Second, 12*time.Second))
	if w.keeps() {
		end = end.Add(12 * time.Second) // branches take their time
	}
	var callers sync.WaitGroup
	for i := range 3 {
		r := w.dice()
		callers.Go(func() { w.call(i, r, end) })
	}
	f := newFaults(w.world, size+1)
	f.losses = 1
	f.harms = append(f.harms, harm{"crash of a process", 4, w.crashProcess}, harm{"crash of an owner", 4, w.crashOwner},
		harm{"owner cut off", 4, w.isolateOwner}, harm{"owner stands still", 3, w.freezeOwner}, harm{"move", 3, w.move})
	if w.keeps() {
		w.alwaysHarms(f)
	}
	if w.standby == components.StandbyHot {
		w.goes.Go(func() { w.crashStandbys(rand.New(rand.NewPCG(w.seed, 11)), end) })
	}
	if w.trusting() {
		f.harms = slices.DeleteFunc(f.harms, func(h harm) bool { return h.name == "bridge" || h.name == "one way" })
	}
	f.run(time.Until(end))
	callers.Wait()
	if w.failed() {
		return
	}
	f.over()
	w.afterwards()
	switch {
	case !w.keeps():
		w.histories()
	case !w.failed():
		w.kept()
	}
}

// trusting says that the lease of this schedule's instances is what their owner has heard.
func (w *whole) trusting() bool { return w.guarantee == components.ExactlyOne && !grantedLeases }

// met says whether all know all, and the group is what it should be.
func (w *whole) met() bool {
	for _, n := range w.live() {
		p := n.part()
		if s := p.l.arb.Status(); len(p.members.Alive()) != len(w.live()) || !s.HasLeader || len(s.Voters) != wantedVoters(len(w.live())) {
			return false
		}
	}
	return true
}

// deploy commits the application and places its instances, as placement does.
func (w *whole) deploy() bool {
	spec := &componentsv1.ComponentSpec{Name: "store", Artifact: counterName + "@" + counterVersion, Guarantee: w.guarantee, Count: fmt.Sprint(len(w.instances)), State: &componentsv1.State{Standby: w.standby}}
	app := &componentsv1.Application{
		Format: components.ApplicationFormat, Name: simApp, Version: 1, Manifest: &componentsv1.Manifest{Application: simApp, Components: []*componentsv1.ComponentSpec{spec}},
		Pinned: []*componentsv1.Pinned{{Component: "store", Digest: counterDigest, Name: counterName, Version: counterVersion, Durable: componentsv1.Durability_DURABILITY_EACH_CALL}},
	}
	if w.keeps() {
		spec.Guarantee, spec.OnPartition, spec.Reconcile = "", components.PartitionKeep, w.reconcile
	}
	body, err := proto.Marshal(app)
	if err != nil {
		w.failf("encode the application: %v", err)
		return false
	}
	nodes := w.live()
	ctx, cancel := within(healed)
	defer cancel()
	arb := nodes[0].part().l.arb
	if _, err := arb.Txn(ctx, arbiter.TxnRequest{Then: []arbiter.Op{{Put: &arbiter.PutOp{Key: components.ApplicationRegister(simApp), Body: body}}}}); err != nil {
		w.failf("deploy: %v", err)
		return false
	}
	eff, err := components.EffectiveOf(app, "store")
	if err != nil {
		w.failf("deploy: %v", err)
		return false
	}
	for i, name := range w.instances {
		on := nodes[w.intn(len(nodes))]
		first := components.FirstBody(components.InstanceSpec{Name: name, Component: eff, Ordinal: i}, time.Now())
		for k := 1; k <= 2; k++ {
			first.Successors = append(first.Successors, nodes[(slices.Index(nodes, on)+k)%len(nodes)].id.String())
		}
		if body, err = proto.Marshal(first); err != nil {
			w.failf("encode %s: %v", name, err)
			return false
		}
		_, err := arb.Claim(ctx, arbiter.ClaimRequest{Key: components.InstanceRegister(name), Owner: on.id, Boot: on.cur.Load().boot, Body: body})
		if err != nil {
			w.failf("place %s: %v", name, err)
			return false
		}
		w.logf("%s (%s) is placed on %s", name, w.guarantee, on.name)
	}
	return true
}

// register reads an instance's register in the view of the node that is furthest.
func (w *whole) register(name string) (reg arbiter.Register, ok bool) {
	for _, n := range w.live() {
		if p := n.part(); p != nil {
			if r, there := p.l.arb.Get(components.InstanceRegister(name)); there && (!ok || r.Incarnation > reg.Incarnation || r.Incarnation == reg.Incarnation && r.Index > reg.Index) {
				reg, ok = r, true
			}
		}
	}
	return reg, ok
}

// owner is the node that owns an instance, if it runs.
func (w *whole) owner(name string) *node {
	reg, ok := w.register(name)
	if !ok {
		return nil
	}
	if n := w.of(reg.Owner); n != nil && n.cur.Load() != nil && n.cur.Load().boot == reg.Boot {
		return n
	}
	return nil
}

// served says whether every instance runs on its owner, and nowhere else.
func (w *whole) served() bool {
	for _, name := range w.instances {
		on := w.owner(name)
		if on == nil {
			return false
		}
		for _, n := range w.live() {
			p := n.part()
			if p == nil {
				return false
			}
			all, begun := len(p.procs.running(name)), len(p.procs.begun(name))
			if info, _ := p.sup.Info(name); n == on && (info.State != components.Running || all != 1) || n != on && (begun != 0 || all > w.standbys()) {
				return false
			}
		}
	}
	return true
}

// standbys is how many processes of an instance may wait at a node that does not own it.
func (w *whole) standbys() int {
	if w.standby == components.StandbyHot {
		return 1
	}
	return 0
}

// owners logs what every node holds of the instances.
func (w *whole) owners() {
	w.statuses()
	for _, name := range w.instances {
		for _, n := range w.live() {
			if p := n.part(); p != nil {
				reg, _ := p.sup.Register(components.InstanceRegister(name))
				info, here := p.sup.Info(name)
				w.logf("%s: %s is of %s (boot %x) in epoch %d, seq %d; here %v: %s %q, %d processes", n.name, name, w.named(reg.Owner), reg.Boot, reg.Epoch, reg.Seq, here, info.State, info.Reason, len(p.procs.running(name)))
			}
		}
	}
}

// copies asserts, before the first fault, that a checkpoint is acknowledged by as many holders as it takes (G3).
func (w *whole) copies() {
	for _, name := range w.instances {
		n := w.live()[0]
		ctx, cancel := within(healed)
		_, err := counterv1.NewCounterClient(n.part().router.Conn(name, "")).Add(ctx, &counterv1.AddRequest{N: 0})
		cancel()
		if err != nil {
			w.failf("the first call of %s fails: %v", name, err)
			return
		}
		if reg, _ := w.register(name); reg.Seq > 0 && reg.W < 2 {
			w.failf("I6: with %d nodes the checkpoint %d of %s was committed with %d holders", len(w.live()), reg.Seq, name, reg.W)
		}
	}
}

// call makes calls from here and there until the end.
func (w *whole) call(number int, r *rand.Rand, end time.Time) {
	for time.Now().Before(end) && !w.failed() {
		time.Sleep(time.Duration(5+r.IntN(120)) * time.Millisecond)
		live := w.live()
		if len(live) == 0 {
			continue
		}
		n := live[r.IntN(len(live))]
		p := n.part()
		if p == nil || p.l.frozen.Load() {
			continue
		}
		name := w.instances[r.IntN(len(w.instances))]
		w.once(number, r, n, p, name)
	}
}

// once makes one call and records it. Reads belong to the history only where they may not be stale.
func (w *whole) once(number int, r *rand.Rand, n *node, p *part, name string) {
	ctx, cancel := within(time.Duration(500+r.IntN(5000)) * time.Millisecond)
	defer cancel()
	client := counterv1.NewCounterClient(p.router.Conn(name, ""))
	o := history.Op[int64]{Client: number, Call: w.now()}
	var v *counterv1.Value
	var err error
	var header metadata.MD
	read := w.guarantee == components.ExactlyOne && r.IntN(3) == 0
	if read {
		o.Name = "get " + name
		v, err = client.Get(ctx, &counterv1.GetRequest{})
		o.Step = func(s int64) (int64, bool) { return s, s == v.GetValue() }
	} else {
		o.Name = "add to " + name
		v, err = client.Add(ctx, &counterv1.AddRequest{N: 1}, grpc.Header(&header))
		failed := err != nil
		o.Step = func(s int64) (int64, bool) { return s + 1, failed || s+1 == v.GetValue() }
	}
	o.Return = w.now()
	o.Name += fmt.Sprintf(" at %s = %d", n.name, v.GetValue())
	if err != nil {
		o.Name += " " + err.Error()
	}
	w.logf("caller %d: %s, since %.4f", number, o.Name, o.Call.Seconds())
	if w.keeps() {
		w.answered(name, added{o.Call, o.Return, v.GetValue(), lineOf(header, err)})
		return
	}
	w.hist.Lock()
	defer w.hist.Unlock()
	switch {
	case read && (err != nil || w.trusting()):
		return
	case err != nil:
		o.Unknown = true
		w.count.InDoubt++
	default:
		w.count.Answers++
	}
	w.ops[name] = append(w.ops[name], o)
}

// lineOf is the epoch of the process that answered a call; "": none did.
func lineOf(h metadata.MD, err error) string {
	if at := h.Get(lineHeader); err == nil && len(at) == 1 {
		return at[0]
	}
	return ""
}

func (w *whole) histories() {
	w.hist.Lock()
	defer w.hist.Unlock()
	for _, name := range w.instances {
		ops := w.ops[name]
		w.checks = append(w.checks, func() (history.Verdict, string) {
			v, why := history.Check(int64(0), ops, decide)
			return v, "the calls of " + name + ": " + why
		})
	}
}
