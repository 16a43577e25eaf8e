package supervisor

import (
	"context"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	counterv1 "github.com/coppice-project/coppice/plugins/counter/v1"
)

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), d)
	t.Cleanup(cancel)
	return ctx
}

// deploy commits the application: one component "store" of a version, changed by edit.
func (w *world) deploy(version string, edit ...func(spec *componentsv1.ComponentSpec, app *componentsv1.Application)) {
	w.t.Helper()
	b, err := w.shelf.get("sha256:counter-" + version)
	if err != nil {
		w.t.Fatal(err)
	}
	spec := &componentsv1.ComponentSpec{Name: "store", Artifact: "counter@" + version}
	durable := componentsv1.Durability_DURABILITY_EACH_CALL
	if b.stateless {
		durable = componentsv1.Durability_DURABILITY_NONE
	}
	app := &componentsv1.Application{
		Format: components.ApplicationFormat, Name: testApp, Version: 1, Manifest: &componentsv1.Manifest{Application: testApp, Components: []*componentsv1.ComponentSpec{spec}},
		Pinned: []*componentsv1.Pinned{{Component: "store", Digest: b.digest(), Name: b.name, Version: version, Durable: durable}},
	}
	for _, f := range edit {
		f(spec, app)
	}
	if d, _, _ := components.ParseDurable(spec.GetDurable()); spec.GetDurable() != "" {
		app.Pinned[0].Durable = d
	}
	w.putApp(app)
}

func (w *world) putApp(app *componentsv1.Application) {
	w.t.Helper()
	body, err := proto.Marshal(app)
	if err == nil {
		_, err = w.up()[0].arb.Txn(within(w.t, 20*time.Second), arbiter.TxnRequest{Then: []arbiter.Op{{Put: &arbiter.PutOp{Key: components.ApplicationRegister(testApp), Body: body}}}})
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// overlay lays something over the component, as a command does.
func (w *world) overlay(edit func(o *componentsv1.Overlay)) {
	w.t.Helper()
	app := w.app()
	if app.Overlays == nil {
		app.Overlays = map[string]*componentsv1.Overlay{}
	}
	o := app.Overlays["store"]
	if o == nil {
		o = &componentsv1.Overlay{}
	}
	edit(o)
	app.Overlays["store"] = o
	w.putApp(app)
}

func (w *world) app() *componentsv1.Application {
	w.t.Helper()
	reg, ok, err := w.up()[0].arb.Read(within(w.t, 20*time.Second), components.ApplicationRegister(testApp))
	var app componentsv1.Application
	if err == nil && ok {
		err = proto.Unmarshal(reg.Body, &app)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return &app
}

// place claims the instance for a node, as placement does.
func (w *world) place(on *simNode, successors ...*simNode) {
	w.t.Helper()
	app := w.app()
	eff, err := components.EffectiveOf(app, "store")
	if err != nil {
		w.t.Fatal(err)
	}
	body := components.FirstBody(components.InstanceSpec{Name: testInstance, Component: eff}, time.Now())
	for _, s := range successors {
		body.Successors = append(body.Successors, s.id.String())
	}
	w.claimFor(on, 0, body)
}

func (w *world) claimFor(on *simNode, expect uint64, body *componentsv1.InstanceBody) arbiter.Register {
	w.t.Helper()
	data, err := proto.Marshal(body)
	if err != nil {
		w.t.Fatal(err)
	}
	reg, err := w.up()[0].arb.Claim(within(w.t, 20*time.Second), arbiter.ClaimRequest{Key: testKey, Expect: expect, Owner: on.id, Boot: on.boot, Body: data})
	if err != nil {
		w.t.Fatal(err)
	}
	return reg
}

// register reads the instance's register through the log.
func (w *world) register() (arbiter.Register, *componentsv1.InstanceBody) {
	w.t.Helper()
	reg, ok, err := w.up()[0].arb.Read(within(w.t, 20*time.Second), testKey)
	if err != nil || !ok {
		w.t.Fatalf("read the register: %v, there %v", err, ok)
	}
	var body componentsv1.InstanceBody
	if err := proto.Unmarshal(reg.Body, &body); err != nil {
		w.t.Fatal(err)
	}
	return reg, &body
}

// state is what a node shows of the instance.
func (n *simNode) state() components.State {
	if n.sup == nil {
		return ""
	}
	info, _ := n.sup.Info(testInstance)
	return info.State
}

// runs says whether a node runs the instance in a version; "" any.
func (n *simNode) runs(version string) bool {
	if n.sup == nil {
		return false
	}
	info, ok := n.sup.Info(testInstance)
	return ok && info.State == components.Running && (version == "" || info.Version == version)
}

func (w *world) running(on *simNode, version string) time.Duration {
	w.t.Helper()
	return w.eventually(20*time.Second, "it runs "+version+" on "+on.name, func() bool { return on.runs(version) })
}

// scene is a world whose store runs on the first node, with the others as its successors.
func scene(t *testing.T, nodes int, f func(w *world)) {
	t.Helper()
	inWorld(t, nodes, func(w *world) {
		w.deploy("1.0.0")
		w.place(w.nodes[0], w.nodes[1:min(3, nodes)]...)
		w.running(w.nodes[0], "1.0.0")
		f(w)
	})
}

// add adds 1 by a node's router.
func (n *simNode) add(ctx context.Context) (int64, error) {
	v, err := counterv1.NewCounterClient(n.router.Conn(testInstance, "")).Add(ctx, &counterv1.AddRequest{N: 1})
	return v.GetValue(), err
}

func (n *simNode) get(ctx context.Context) (int64, error) {
	v, err := counterv1.NewCounterClient(n.router.Conn(testInstance, "")).Get(ctx, &counterv1.GetRequest{})
	return v.GetValue(), err
}

// load adds 1 again and again, by the routers of some nodes, and keeps the answers. Every answer is another number as long as nothing
// that was answered is lost, and the numbers have no gap as long as nothing is done twice.
type load struct {
	w        *world
	cancel   context.CancelFunc
	goes     sync.WaitGroup
	patience time.Duration // of a caller with a call
	pace     time.Duration // between a caller's calls

	mu      sync.Mutex
	answers []int64
	failed  int
	last    error
	worst   time.Duration
}

func (w *world) load(callers int, by ...*simNode) *load {
	return w.loadAt(callers, 15*time.Second, 20*time.Millisecond, by...)
}

func (w *world) loadAt(callers int, patience, pace time.Duration, by ...*simNode) *load {
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{w: w, cancel: cancel, patience: patience, pace: pace}
	w.loads = append(w.loads, l)
	for i := range callers {
		n := by[i%len(by)]
		l.goes.Go(func() {
			for ctx.Err() == nil {
				cctx, done := context.WithTimeout(context.Background(), l.patience)
				begin := time.Now()
				v, err := n.add(cctx)
				done()
				l.mu.Lock()
				l.worst = max(l.worst, time.Since(begin))
				if err == nil {
					l.answers = append(l.answers, v)
				} else {
					l.failed++
					l.last = err
				}
				l.mu.Unlock()
				time.Sleep(l.pace)
			}
		})
	}
	return l
}

func (l *load) count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.answers)
}

// more waits for n more answers.
func (l *load) more(n int) {
	l.w.t.Helper()
	want := l.count() + n
	l.w.eventually(30*time.Second, "more calls are answered", func() bool { return l.count() >= want })
}

// end stops the load and audits the answers: none lost, none doubled, none failed.
func (l *load) end(ask *simNode) {
	l.w.t.Helper()
	l.cancel()
	l.goes.Wait()
	if l.failed > 0 {
		l.w.t.Errorf("%d calls failed: %v", l.failed, l.last)
	}
	slices.Sort(l.answers)
	for i, v := range l.answers {
		if v != int64(i+1) {
			l.w.t.Fatalf("answer %d of %d is %d: an answered call was lost (a number twice) or done twice (a gap)", i+1, len(l.answers), v)
		}
	}
	v, err := ask.get(within(l.w.t, 10*time.Second))
	if err != nil || v != int64(len(l.answers)) {
		l.w.t.Fatalf("the counter says %d (%v), %d were answered", v, err, len(l.answers))
	}
	l.w.t.Logf("%d calls answered, the slowest after %s", len(l.answers), l.worst)
}
