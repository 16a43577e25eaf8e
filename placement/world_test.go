package placement

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// world is a cluster as a coordinator sees it: registers with epochs, nodes that live and die, a proposer that fences.
type world struct {
	t *testing.T

	mu        sync.Mutex
	leader    bool
	blind     error // View fails
	paused    bool
	apps      map[string]*componentsv1.Application
	registers map[string]*Register
	nodes     map[string]*Node
	solver    Solver
	rand      *rand.Rand
	refuse    float64 // share of proposals that fail, half of them after they took effect
	lost      bool    // claims are answered and do nothing
	calls     int     // answered so
	moving    int
	mostMoves int
	log       []string
	decisions []Decision
	c         *Coordinator
}

func newWorld(t *testing.T, seed uint64, nodes int) *world {
	w := &world{
		t: t, leader: true, apps: map[string]*componentsv1.Application{}, registers: map[string]*Register{}, nodes: map[string]*Node{},
		solver: InProcess{}, rand: rand.New(rand.NewPCG(seed, 5)),
	}
	for i := 1; i <= nodes; i++ {
		id := fmt.Sprint("n", i)
		w.nodes[id] = &Node{Since: time.Now(), Boot: 1, Node: &placementv1.Node{
			Id: id, Name: id, State: "alive", Role: "full", Platform: "linux/amd64", CpuMillis: 4000, MemoryBytes: 8 << 30, DiskBytes: 9 << 30,
		}}
	}
	c, err := New(Config{Leader: w, Facts: w, Proposer: w, Solver: w, Recorder: w, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	w.c = c
	return w
}

// run starts the loop; the returned function ends it.
func (w *world) run() func() {
	ctx, cancel := context.WithCancel(w.t.Context())
	done := make(chan error)
	go func() { done <- w.c.Run(ctx) }()
	return func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Error(err)
		}
	}
}

// change alters the world and tells the loop.
func (w *world) change(f func()) {
	w.mu.Lock()
	f()
	w.mu.Unlock()
	w.c.Trigger()
}

func (w *world) deploy(manifest string) {
	w.t.Helper()
	all, err := components.ParseManifests("test.yaml", []byte(manifest))
	if err != nil {
		w.t.Fatal(err)
	}
	w.change(func() {
		for _, m := range all {
			var pinned []*componentsv1.Pinned
			for _, c := range m.GetComponents() {
				pinned = append(pinned, &componentsv1.Pinned{Component: c.GetName(), Digest: "sha256:" + c.GetArtifact(), Name: c.GetArtifact(), Version: "1.0.0"})
			}
			next, _ := components.Redeploy(w.apps[m.GetApplication()], m, pinned)
			w.apps[m.GetApplication()] = next
		}
	})
}

func (w *world) setState(id, state string) {
	w.change(func() {
		n := w.nodes[id]
		n.Node = proto.CloneOf(n.Node)
		n.State, n.Since = state, time.Now()
	})
}

func (w *world) Coordinator() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.leader
}

func (w *world) View(context.Context) (View, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.blind != nil {
		return View{}, w.blind
	}
	v := View{Self: "n1", Incarnation: 1, Paused: w.paused}
	for _, a := range w.apps {
		v.Applications = append(v.Applications, proto.CloneOf(a))
	}
	for _, r := range w.registers {
		c := *r
		c.Body = proto.CloneOf(r.Body)
		v.Instances = append(v.Instances, c)
	}
	for _, n := range w.nodes {
		v.Nodes = append(v.Nodes, *n)
	}
	return v, nil
}

func (w *world) Solve(ctx context.Context, req *placementv1.SolveRequest) (*placementv1.Plan, error) {
	w.mu.Lock()
	s := w.solver
	w.mu.Unlock()
	return s.Solve(ctx, req)
}

func (w *world) Record(d Decision) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.decisions = append(w.decisions, d)
}

var errRefused = errors.New("refused: another epoch")

// fault draws whether a proposal fails, and whether it takes effect all the same (the answer is lost).
func (w *world) fault() (fails, effect bool) {
	if w.rand.Float64() >= w.refuse {
		return false, true
	}
	return true, w.rand.IntN(2) == 0
}

func (w *world) Place(ctx context.Context, p Placing) error {
	if err := pause(ctx, 2*time.Millisecond); err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	r := w.registers[p.Instance]
	if r == nil {
		r = &Register{Instance: p.Instance}
	}
	if r.Epoch != p.Epoch {
		return errRefused
	}
	if w.lost {
		w.calls++
		return nil
	}
	n := w.nodes[p.Node]
	if n == nil || n.GetState() != "alive" {
		return fmt.Errorf("claim for %s: it is not alive", p.Node)
	}
	if o := w.nodes[r.Owner]; o != nil && r.Owner != "" && o.GetState() == "alive" && o.Boot == r.Boot {
		w.t.Errorf("%s is claimed for %s while its owner %s lives", p.Instance, p.Node, r.Owner)
	}
	fails, effect := w.fault()
	if effect {
		w.registers[p.Instance] = &Register{Instance: p.Instance, Owner: p.Node, Boot: n.Boot, Epoch: r.Epoch + 1, Body: p.Body, StateBytes: r.StateBytes, Holders: r.Holders}
		w.note("place %s on %s: %s", p.Instance, p.Node, p.Body.GetCause())
	}
	if fails {
		return context.DeadlineExceeded
	}
	return nil
}

func (w *world) Move(ctx context.Context, m Moving) error {
	w.mu.Lock()
	w.moving++
	w.mostMoves = max(w.mostMoves, w.moving)
	w.mu.Unlock()
	err := pause(ctx, 300*time.Millisecond)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.moving--
	if err != nil {
		return err
	}
	r := w.registers[m.Instance]
	if r == nil || r.Epoch != m.Epoch || r.Owner != m.From {
		return errRefused
	}
	n := w.nodes[m.To]
	if n == nil || n.GetState() != "alive" || w.nodes[m.From].GetState() == "dead" {
		return fmt.Errorf("move to %s: one of the nodes is not alive", m.To)
	}
	fails, effect := w.fault()
	if effect {
		body := proto.CloneOf(r.Body)
		body.Successors, body.Cause = m.Successors, m.Cause
		w.registers[m.Instance] = &Register{Instance: m.Instance, Owner: m.To, Boot: n.Boot, Epoch: r.Epoch + 1, Body: body, StateBytes: r.StateBytes}
		w.note("move %s to %s", m.Instance, m.To)
	}
	if fails {
		return context.DeadlineExceeded
	}
	return nil
}

func (w *world) SetSuccessors(_ context.Context, all []Succession) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, s := range all {
		r := w.registers[s.Instance]
		if r == nil || r.Epoch != s.Epoch {
			return errRefused
		}
	}
	fails, effect := w.fault()
	if effect {
		for _, s := range all {
			w.registers[s.Instance].Body = proto.CloneOf(w.registers[s.Instance].Body)
			w.registers[s.Instance].Body.Successors = s.Successors
		}
		w.note("successors of %d", len(all))
	}
	if fails {
		return context.DeadlineExceeded
	}
	return nil
}

func (w *world) Retire(_ context.Context, r Retiring) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if old := w.registers[r.Instance]; old == nil || old.Epoch != r.Epoch {
		return errRefused
	}
	delete(w.registers, r.Instance)
	w.note("retire %s", r.Instance)
	return nil
}

func (w *world) Forget(_ context.Context, app string, version uint64) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.apps[app].GetVersion() != version {
		return errRefused
	}
	delete(w.apps, app)
	w.note("forget %s", app)
	return nil
}

func (w *world) note(format string, args ...any) { w.log = append(w.log, fmt.Sprintf(format, args...)) }

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

// read looks at the world while nobody changes it.
func read[T any](w *world, f func() T) T {
	w.mu.Lock()
	defer w.mu.Unlock()
	return f()
}

func (w *world) notes() []string { return read(w, func() []string { return slices.Clone(w.log) }) }

// owners is who owns what, sorted.
func (w *world) owners() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var out []string
	for name, r := range w.registers {
		out = append(out, name+"="+r.Owner)
	}
	slices.Sort(out)
	return out
}

func (w *world) register(name string) Register {
	w.mu.Lock()
	defer w.mu.Unlock()
	if r := w.registers[name]; r != nil {
		return *r
	}
	return Register{}
}

// unwell lists what is not as desired: instances without a living owner, owners that may not have them, registers nobody wants.
func (w *world) unwell() []string {
	v, err := w.View(context.Background())
	if err != nil {
		return []string{err.Error()}
	}
	_, expected, problems := Snapshot(v, Memory{Now: time.Now()})
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, spec := range expected {
		r := w.registers[name]
		switch {
		case r == nil || r.Owner == "":
			problems = append(problems, name+" has no owner")
		case spec.Node != "":
		case w.nodes[r.Owner].GetState() != "alive" || w.nodes[r.Owner].GetDraining():
			problems = append(problems, name+" is owned by "+r.Owner)
		case len(r.Body.GetSuccessors()) == 0:
			problems = append(problems, name+" has no successors")
		}
	}
	for name := range w.registers {
		if _, ok := expected[name]; !ok && w.nodes[w.registers[name].Owner].GetState() != "alive" {
			problems = append(problems, name+" is not wanted")
		}
	}
	slices.Sort(problems)
	return problems
}
