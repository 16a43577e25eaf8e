package placement

import (
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/protobuf/proto"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/placement/solver"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

const shop = `
application: shop
components:
- {name: store, artifact: kv}
- {name: web, artifact: web, count: 3, spread: node}
`

func TestADeployIsPlacedAtOnceAndNamesSuccessors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, 5)
		defer w.run()()
		time.Sleep(time.Second)
		w.deploy(shop)
		time.Sleep(200 * time.Millisecond)
		if bad := w.unwell(); len(bad) > 0 {
			t.Fatal(bad)
		}
		r := w.register("shop/web-0")
		if r.Epoch != 1 || r.Body.GetDigest() != "sha256:web" || r.Body.GetTrigger() != "placement" || len(r.Body.GetSuccessors()) != 2 {
			t.Errorf("register %+v", r)
		}
		why, d, ok := w.c.Why("shop/web")
		if !ok || len(why) != 3 || d.Plan.GetObjective() < d.Plan.GetObjectiveBefore() {
			t.Errorf("why: %v %v", ok, why)
		}
		// nothing changes any more, and nothing is recorded that decides nothing
		made := func() []Decision { return read(w, func() []Decision { return slices.Clone(w.decisions) }) }
		log, decisions := len(w.notes()), len(made())
		time.Sleep(5 * time.Minute)
		if len(w.notes()) != log || len(made()) > decisions+1 {
			t.Errorf("an idle cluster: %v, %d decisions more", w.notes()[log:], len(made())-decisions)
		}
		first := made()[0]
		replay, err := solver.Solve(first.Request)
		if err != nil || !proto.Equal(replay, first.Plan) {
			t.Errorf("the first decision does not replay: %v\n%v\n%v", err, replay, first.Plan)
		}
	})
}

func TestADeadOwnersInstancesAreLeftToSuccessorsForASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, 3)
		defer w.run()()
		w.deploy(shop)
		time.Sleep(time.Second)
		store := w.register("shop/store-0")
		w.setState(store.Owner, "dead")
		time.Sleep(900 * time.Millisecond)
		if r := w.register("shop/store-0"); r.Epoch != store.Epoch {
			t.Fatalf("claimed too early: %+v", r)
		}
		time.Sleep(300 * time.Millisecond)
		r := w.register("shop/store-0")
		if r.Epoch != store.Epoch+1 || r.Owner == store.Owner || !strings.Contains(r.Body.GetCause(), "died") || slices.Contains(r.Body.GetSuccessors(), r.Owner) {
			t.Errorf("after the delay: %+v", r)
		}
		if len(r.Body.GetDeaths()) != 1 {
			t.Errorf("a death right after the start is not counted: %v", r.Body)
		}
	})
}

// Of an exactly-one instance the first epoch says that it is leased, and so do those after it: by that the arbiter makes claims wait. Placement itself waits
// no longer than for others.
func TestExactlyOneIsLeasedFromItsFirstEpochOn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, 4)
		defer w.run()()
		w.deploy("application: a\ncomponents:\n- {name: x, artifact: x, guarantee: exactly-one}\n- {name: y, artifact: y}\n")
		time.Sleep(time.Second)
		x, y := w.register("a/x-0"), w.register("a/y-0")
		if !x.Body.GetLeased() || y.Body.GetLeased() {
			t.Errorf("leased: x %v, y %v", x.Body.GetLeased(), y.Body.GetLeased())
		}
		w.setState(x.Owner, "dead")
		time.Sleep(1500 * time.Millisecond)
		if r := w.register("a/x-0"); r.Epoch != 2 || !r.Body.GetLeased() {
			t.Errorf("after the owner's death: epoch %d, leased %v", r.Epoch, r.Body.GetLeased())
		}
	})
}

func TestADrainedNodeIsVacatedTwoMovesAtATime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, 3)
		defer w.run()()
		w.deploy("application: a\ncomponents:\n- {name: x, artifact: x, count: 15}\n- {name: log, artifact: l, count: each-node}\n")
		time.Sleep(time.Second)
		w.change(func() {
			w.nodes["n2"].Node = proto.CloneOf(w.nodes["n2"].Node)
			w.nodes["n2"].Draining = true
		})
		time.Sleep(5 * time.Second)
		if bad, most := w.unwell(), read(w, func() int { return w.mostMoves }); len(bad) > 0 || most != 2 {
			t.Errorf("%v; %d moves at once", bad, most)
		}
		if w.register("a/log@n2").Owner != "n2" {
			t.Errorf("the node's own instance left it: %v", w.owners())
		}
	})
}

func TestASolverThatFailsCostsRoundsAndNotTheSystemComponents(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, 3)
		var hang Solver = solverFunc(func(ctx context.Context, _ *placementv1.SolveRequest) (*placementv1.Plan, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		})
		w.solver = hang
		w.apps["system"] = &componentsv1.Application{Name: "system", Version: 1, Manifest: &componentsv1.Manifest{
			Application: "system", Components: []*componentsv1.ComponentSpec{{Name: "placement", Artifact: "placement", Attributes: map[string]string{"successors": "1", "max_moves": `"x"`}}},
		}}
		defer w.run()()
		w.deploy(shop)
		time.Sleep(12 * time.Second)
		s := w.c.Status()
		if s.SkippedNow < 2 || s.Err == nil || !strings.Contains(s.Err.Error(), "no plan within 5s") {
			t.Errorf("status %+v", s)
		}
		if got := w.owners(); !slices.Equal(got, []string{"system/placement-0=n1"}) {
			t.Fatalf("owners %v", got)
		}
		w.change(func() { w.solver = InProcess{} })
		time.Sleep(10 * time.Second)
		if bad := w.unwell(); len(bad) != 1 || bad[0] != "system/placement-0 has no successors" {
			t.Error(bad)
		}
		if s := w.c.Status(); s.Err != nil || s.SkippedNow != 0 || s.Skipped == 0 {
			t.Errorf("status %+v", s)
		}
		if n := len(w.register("shop/store-0").Body.GetSuccessors()); n != 1 {
			t.Errorf("%d successors; the attribute says 1", n)
		}
		if d, _ := w.c.Last(); len(d.Problems) != 1 || !strings.Contains(d.Problems[0], "max_moves") {
			t.Errorf("problems %v", d.Problems)
		}
		// a plan that breaks constraints is not carried out
		w.change(func() {
			w.solver = solverFunc(func(_ context.Context, req *placementv1.SolveRequest) (*placementv1.Plan, error) {
				return &placementv1.Plan{Assignments: []*placementv1.Assignment{{Instance: "shop/web-0", Node: w.register("shop/web-1").Owner}}}, nil
			})
		})
		before := w.owners()
		time.Sleep(time.Second)
		if s := w.c.Status(); s.Err == nil || !strings.Contains(s.Err.Error(), "cannot be carried out") || !slices.Equal(before, w.owners()) {
			t.Errorf("status %+v, owners %v", s, w.owners())
		}
	})
}

type solverFunc func(context.Context, *placementv1.SolveRequest) (*placementv1.Plan, error)

func (f solverFunc) Solve(ctx context.Context, req *placementv1.SolveRequest) (*placementv1.Plan, error) {
	return f(ctx, req)
}

func TestAnInstanceThatFailsOnANodeGoesElsewhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, 3)
		defer w.run()()
		w.deploy("application: a\ncomponents:\n- {name: x, artifact: x}\n")
		time.Sleep(time.Second)
		was := w.register("a/x-0").Owner
		w.c.Failed("a/x-0", was, "never healthy")
		time.Sleep(2 * time.Second)
		now := w.register("a/x-0").Owner
		if now == was {
			t.Fatalf("it is still on %s", now)
		}
		for _, n := range []string{"n1", "n2", "n3"} {
			w.c.Failed("a/x-0", n, "never healthy")
		}
		time.Sleep(time.Second)
		if w.register("a/x-0").Owner != now {
			t.Error("it is thrown from node to node")
		}
	})
}

func TestARemovedApplicationIsForgottenWhenNothingOfItIsLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, 3)
		defer w.run()()
		w.deploy(shop)
		time.Sleep(time.Second)
		dead := w.register("shop/store-0").Owner
		w.setState(dead, "dead")
		w.change(func() { w.apps["shop"].Removing = true })
		time.Sleep(500 * time.Millisecond)
		for _, o := range w.owners() {
			if strings.HasSuffix(o, "="+dead) {
				t.Errorf("not retired: %s", o)
			}
		}
		apps := func() int { return read(w, func() int { return len(w.apps) }) }
		if apps() != 1 {
			t.Fatal("forgotten while its owners have not ended it")
		}
		w.change(func() { clear(w.registers) }) // the living owners ended theirs
		time.Sleep(500 * time.Millisecond)
		if apps() != 0 {
			t.Error("not forgotten")
		}
	})
}

func TestOnlyTheCoordinatorActs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, 3)
		w.leader = false
		defer w.run()()
		w.deploy(shop)
		time.Sleep(time.Minute)
		if len(w.owners()) != 0 || w.c.Status().Coordinator {
			t.Fatal(w.owners())
		}
		app := read(w, func() *componentsv1.Application { return proto.CloneOf(w.apps["shop"]) })
		app.Name = "other"
		_, plan, err := w.c.Plan(t.Context(), Whatif{Application: app})
		if err != nil || !plan.GetFeasible() || len(plan.GetAssignments()) != 8 {
			t.Errorf("what-if on a node that does not lead: %v, %v", plan, err)
		}
		w.change(func() { w.leader, w.blind = true, errors.New("catching up") })
		time.Sleep(time.Second)
		if s := w.c.Status(); s.Err == nil || len(w.owners()) != 0 {
			t.Errorf("without a view: %+v %v", s, w.owners())
		}
		w.change(func() { w.blind, w.paused = nil, true })
		time.Sleep(30 * time.Second)
		if len(w.owners()) != 0 {
			t.Errorf("a paused cluster places %v", w.owners())
		}
		w.change(func() { w.paused = false })
		time.Sleep(time.Second)
		if len(w.owners()) != 4 {
			t.Error(w.owners())
		}
	})
}

func TestANodeThatCameBackAndDoesNotClaimLosesItsInstances(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, 1)
		defer w.run()()
		w.deploy("application: a\ncomponents:\n- {name: x, artifact: x}\n")
		time.Sleep(time.Minute)
		w.change(func() { w.nodes["n1"].Boot, w.nodes["n1"].Since = 2, time.Now() })
		time.Sleep(2 * time.Second)
		if r := w.register("a/x-0"); r.Epoch != 1 {
			t.Fatalf("claimed too early %+v", r)
		}
		time.Sleep(2 * time.Second)
		if r := w.register("a/x-0"); r.Epoch != 2 || r.Boot != 2 || len(r.Body.GetDeaths()) != 0 {
			t.Errorf("%+v", r)
		}
	})
}

// TestSimulation lets nodes die, come back and be drained, proposals fail with and without effect, the solver crash and the coordinator
// change, from a seed; then all is well within a minute, and stays as it is.
func TestSimulation(t *testing.T) {
	for seed := range uint64(60) {
		synctest.Test(t, func(t *testing.T) { simulate(t, seed) })
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}

func simulate(t *testing.T, seed uint64) {
	w := newWorld(t, seed, 5)
	w.refuse = 0.2 // before it runs
	defer w.run()()
	w.deploy(shop)
	r := rand.New(rand.NewPCG(seed, 6)) // the faults' own: the proposals draw from the world's
	crash := solverFunc(func(context.Context, *placementv1.SolveRequest) (*placementv1.Plan, error) {
		return nil, errors.New("crashed")
	})
	ids := []string{"n1", "n2", "n3", "n4", "n5"}
	for range 30 {
		time.Sleep(time.Duration(r.IntN(4000)) * time.Millisecond)
		id := ids[1+r.IntN(len(ids)-1)]
		switch r.IntN(9) {
		case 0, 1:
			w.setState(id, "dead")
		case 2:
			w.setState(id, "suspect")
		case 3, 4:
			w.change(func() { w.nodes[id].Boot++ })
			w.setState(id, "alive")
		case 5:
			w.change(func() { w.solver = crash })
		case 6:
			w.change(func() { w.solver = InProcess{} })
		case 7:
			w.change(func() { w.leader = !w.leader })
		case 8:
			w.change(func() {
				w.nodes[id].Node = proto.CloneOf(w.nodes[id].Node)
				w.nodes[id].Draining = !w.nodes[id].GetDraining()
			})
		}
	}
	w.change(func() { w.solver, w.leader, w.refuse = InProcess{}, true, 0 })
	for _, id := range ids {
		w.change(func() {
			w.nodes[id].Node = proto.CloneOf(w.nodes[id].Node)
			w.nodes[id].Draining = false
		})
		w.setState(id, "alive")
	}
	w.change(func() { // an operator looked after what was quarantined
		for _, r := range w.registers {
			r.Body.Quarantined, r.Body.Deaths = false, nil
		}
	})
	time.Sleep(4 * time.Minute)
	if bad := w.unwell(); len(bad) > 0 {
		t.Errorf("seed %d: %v\nstatus %+v\n%s", seed, bad, w.c.Status(), strings.Join(w.notes(), "\n"))
	}
	n := len(w.notes())
	time.Sleep(10 * time.Minute)
	if len(w.notes()) != n {
		t.Errorf("seed %d: does not rest: %v", seed, w.notes()[n:])
	}
}

func TestAnEffectThatIsNotSeenIsNotProposedInAHotLoop(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, 1, 3)
		defer w.run()()
		w.deploy("application: a\ncomponents:\n- {name: x, artifact: x}\n")
		time.Sleep(time.Second)
		w.change(func() { w.lost = true }) // claims are answered and nothing comes of them
		w.deploy("application: b\ncomponents:\n- {name: y, artifact: y}\n")
		time.Sleep(time.Minute)
		if n := read(w, func() int { return w.calls }); n > 12 {
			t.Errorf("%d proposals in a minute", n)
		}
		w.change(func() { w.lost = false })
		time.Sleep(time.Minute)
		if bad := w.unwell(); len(bad) > 0 {
			t.Error(bad)
		}
	})
}
