package placement

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/placement/solver"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// Times and bounds of the loop.
const (
	debounce    = 20 * time.Millisecond // changes come in bunches
	spacing     = 50 * time.Millisecond // at least, between the starts of two rounds
	retryLeast  = 250 * time.Millisecond
	retryMost   = 5 * time.Second
	MaxInFlight = 64 // actions at once; moves are bounded by the policy besides

	avoidLeast = 30 * time.Second // an instance that failed on a node keeps away from it, longer each time
	avoidMost  = 10 * time.Minute
)

// Config is what a Coordinator needs. All but Log, Recorder and the times must be set.
type Config struct {
	Leader       Leader
	Facts        Facts
	Proposer     Proposer
	Solver       Solver
	Recorder     Recorder      // nil: decisions are only kept for Last and Why
	Log          *slog.Logger  // nil: slog.Default
	Interval     time.Duration // of rounds without a trigger; 0: 10 s
	SolveTimeout time.Duration // of one call of the solver; 0: 5 s
	FactsLast    time.Duration // how long facts count; from half of it on they widen into intervals; 0: 3 min
	PlaceTimeout time.Duration // of one claim, succession or retirement; 0: 10 s
	MoveTimeout  time.Duration // of one move, with all its state; 0: 10 min
}

// Status is the loop at one moment.
type Status struct {
	Coordinator bool
	Rounds      uint64 // solved and carried out
	Skipped     uint64 // in all
	SkippedNow  int    // in a row; 0: the last round was well
	Err         error  // of the last round; nil: it was well
	InFlight    int
	Failing     []string // actions that failed and will be tried again: instance and why
	LastRound   time.Time
	Infeasible  []string // instances without an acceptable node in the last plan
}

// Coordinator is the loop. Every node has one; it acts only where Leader says so.
type Coordinator struct {
	cfg     Config
	trigger chan struct{}
	goes    sync.WaitGroup

	mu       sync.Mutex // guards what is below
	status   Status
	last     Decision
	since    map[string]seen
	avoid    map[string]map[string]*avoided
	inFlight map[string]Kind
	retry    map[string]*backoff
}

type seen struct {
	owner string
	epoch uint64
	at    time.Time
}

type avoided struct {
	until time.Time
	times int
	why   string
}

// backoff is of an action that failed (err), or that was said to be done and is wanted again all the same (print): the view it was
// decided on may be behind, so it is tried again later each time, not at once.
type backoff struct {
	until time.Time
	times int
	err   error
	print string
}

// New makes a Coordinator; Run runs it.
func New(cfg Config) (*Coordinator, error) {
	if cfg.Leader == nil || cfg.Facts == nil || cfg.Proposer == nil || cfg.Solver == nil {
		return nil, errors.New("placement: Leader, Facts, Proposer and Solver must be set")
	}
	if cfg.Log == nil {
		cfg.Log = slog.Default()
	}
	cfg.Interval = cmp.Or(cfg.Interval, 10*time.Second)
	cfg.SolveTimeout = cmp.Or(cfg.SolveTimeout, 5*time.Second)
	cfg.FactsLast = cmp.Or(cfg.FactsLast, 3*time.Minute)
	cfg.PlaceTimeout = cmp.Or(cfg.PlaceTimeout, 10*time.Second)
	cfg.MoveTimeout = cmp.Or(cfg.MoveTimeout, 10*time.Minute)
	c := &Coordinator{cfg: cfg, trigger: make(chan struct{}, 1)}
	c.forget()
	return c, nil
}

// forget begins a new time in office.
func (c *Coordinator) forget() {
	c.since = map[string]seen{}
	c.avoid = map[string]map[string]*avoided{}
	c.retry = map[string]*backoff{}
	if c.inFlight == nil {
		c.inFlight = map[string]Kind{}
	}
}

// Trigger asks for a round soon: something changed that a round looks at (desired state, ownership, members, who is coordinator). It
// never blocks; many triggers are one round.
func (c *Coordinator) Trigger() {
	select {
	case c.trigger <- struct{}{}:
	default:
	}
}

// Failed tells that an instance could not be started, or never became healthy, on a node: it is kept away from there for a while,
// longer each time.
func (c *Coordinator) Failed(instance, node, why string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.avoid[instance] == nil {
		c.avoid[instance] = map[string]*avoided{}
	}
	a := c.avoid[instance][node]
	if a == nil {
		a = &avoided{}
		c.avoid[instance][node] = a
	}
	a.until, a.why = time.Now().Add(min(avoidLeast<<min(a.times, 10), avoidMost)), why
	a.times++
	c.Trigger()
}

// Run rounds until ctx ends, and returns when all it started has ended.
func (c *Coordinator) Run(ctx context.Context) error {
	defer c.goes.Wait()
	timer := time.NewTimer(debounce)
	defer timer.Stop()
	var started time.Time
	hurried := true // the timer runs for a trigger: further ones do not put it off
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-c.trigger:
			if !hurried {
				hurried = true
				timer.Reset(max(debounce, spacing-time.Since(started)))
			}
			continue
		case <-timer.C:
		}
		started, hurried = time.Now(), false
		timer.Reset(max(c.round(ctx), spacing))
	}
}

// round looks once and starts what is to be done. It returns when to look again at the latest.
func (c *Coordinator) round(ctx context.Context) time.Duration {
	if !c.takeOffice(c.cfg.Leader.Coordinator()) {
		return c.cfg.Interval
	}
	view, err := c.cfg.Facts.View(ctx)
	if err != nil {
		return c.skip(ctx, Decision{Time: time.Now(), Err: fmt.Errorf("no view of the cluster: %w", err)}, nil, nil)
	}
	if view.Paused {
		return c.cfg.Interval
	}
	mem := c.remember(view)
	snap, expected, problems := Snapshot(view, mem)
	policy, more := c.policy(view.Applications)
	d := Decision{Time: mem.Now, Request: &placementv1.SolveRequest{Snapshot: snap, Policy: policy}, Problems: append(problems, more...)}
	if d.Digest, err = Digest(d.Request); err != nil {
		return c.skip(ctx, Decision{Time: mem.Now, Err: err}, &view, expected)
	}
	c.bringSolver(ctx, view, expected, mem.Now)
	d.Plan, d.Err = c.solve(ctx, d.Request)
	if d.Err != nil {
		return c.skip(ctx, d, &view, expected)
	}
	actions, next := Decide(view, expected, d.Plan, mem.Now)
	var due time.Duration
	d.Actions, due = c.start(ctx, actions, int(policy.GetMaxMoves()))
	c.conclude(d)
	wait := c.cfg.Interval
	for _, w := range []time.Duration{next, due} {
		if w > 0 {
			wait = min(wait, w)
		}
	}
	return wait
}

// bringSolver starts the placing of the system's own components before the solver is asked: it is one of them, and the call to it waits
// until it is there.
func (c *Coordinator) bringSolver(ctx context.Context, view View, expected map[string]components.InstanceSpec, now time.Time) {
	actions, _ := Decide(view, expected, nil, now)
	actions = slices.DeleteFunc(actions, func(a Action) bool { return a.Kind != Place && a.Kind != Move })
	c.start(ctx, actions, len(actions))
}

// takeOffice notes whether this node is coordinator; a new time in office starts with no memory.
func (c *Coordinator) takeOffice(now bool) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now && !c.status.Coordinator {
		c.forget()
	}
	c.status.Coordinator = now
	if !now {
		c.status.SkippedNow, c.status.Err, c.status.Infeasible = 0, nil, nil
	}
	return now
}

// solve calls the solver and checks what it says.
func (c *Coordinator) solve(ctx context.Context, req *placementv1.SolveRequest) (*placementv1.Plan, error) {
	if !slices.ContainsFunc(req.GetSnapshot().GetComponents(), func(c *placementv1.Component) bool { return !c.GetSystem() }) {
		return &placementv1.Plan{Feasible: true, Optimal: true}, nil // nothing to ask for
	}
	ctx, cancel := context.WithTimeoutCause(ctx, c.cfg.SolveTimeout, fmt.Errorf("no plan within %s", c.cfg.SolveTimeout))
	defer cancel()
	plan, err := c.cfg.Solver.Solve(ctx, req)
	if err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return nil, fmt.Errorf("the solver (%s) failed: %w", components.PlacementComponent, err)
	}
	if err := solver.Verify(req, plan); err != nil {
		return nil, fmt.Errorf("the solver (%s) answered what cannot be carried out: %w", components.PlacementComponent, err)
	}
	return plan, nil
}

// skip ends a round without a plan. What needs none is started all the same: the solver itself may be what has to be placed.
func (c *Coordinator) skip(ctx context.Context, d Decision, view *View, expected map[string]components.InstanceSpec) time.Duration {
	if ctx.Err() != nil {
		return c.cfg.Interval
	}
	if view != nil {
		actions, _ := Decide(*view, expected, nil, d.Time)
		d.Actions, _ = c.start(ctx, actions, len(actions))
	}
	c.mu.Lock()
	c.status.Skipped++
	c.status.SkippedNow++
	changed := c.status.Err == nil || c.status.Err.Error() != d.Err.Error()
	c.status.Err = d.Err
	d.Skipped = c.status.SkippedNow
	n := c.status.SkippedNow
	c.mu.Unlock()
	if changed || len(d.Actions) > 0 {
		c.cfg.Log.Warn("round of placement skipped; nothing is placed or moved until one succeeds", "error", d.Err, "in_a_row", n)
		c.record(d)
	}
	return min(retryLeast<<min(n-1, 10), retryMost)
}

// conclude records a round that had a plan, when it decided something new.
func (c *Coordinator) conclude(d Decision) {
	c.mu.Lock()
	recovered := c.status.SkippedNow > 0
	same := c.last.Plan != nil && !recovered && len(d.Actions) == 0 && samePlan(c.last.Plan, d.Plan) && slices.Equal(c.last.Problems, d.Problems)
	c.status.Rounds++
	c.status.SkippedNow, c.status.Err, c.status.LastRound = 0, nil, d.Time
	c.status.Infeasible = nil
	for _, a := range d.Plan.GetAssignments() {
		if a.GetNode() == "" && len(a.GetRefused()) > 0 {
			c.status.Infeasible = append(c.status.Infeasible, a.GetInstance())
		}
	}
	c.last = d
	c.mu.Unlock()
	if !same {
		c.record(d)
	}
}

func (c *Coordinator) record(d Decision) {
	if c.cfg.Recorder != nil {
		c.cfg.Recorder.Record(d)
	}
}

// samePlan tells whether two plans place alike; scores change with every fact.
func samePlan(a, b *placementv1.Plan) bool {
	return slices.EqualFunc(a.GetAssignments(), b.GetAssignments(), func(x, y *placementv1.Assignment) bool {
		return x.GetInstance() == y.GetInstance() && x.GetNode() == y.GetNode() && slices.Equal(x.GetSuccessors(), y.GetSuccessors())
	})
}

// Digest names a request: the sha256 of its deterministic encoding.
func Digest(req *placementv1.SolveRequest) (string, error) {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(req)
	if err != nil {
		return "", fmt.Errorf("encode the snapshot: %w", err)
	}
	sum := sha256.Sum256(data)
	return "sha256:" + hex.EncodeToString(sum[:]), nil
}

// policy is the knobs in force. How old facts may be follows how long they count, where nobody says otherwise.
func (c *Coordinator) policy(apps []*componentsv1.Application) (*placementv1.Policy, []string) {
	policy, problems := Policy(apps)
	if policy.GetFreshMs() == 0 {
		policy.FreshMs = float64(c.cfg.FactsLast) / 2 / float64(time.Millisecond)
	}
	if policy.GetStaleMs() == 0 {
		policy.StaleMs = max(2*policy.GetFreshMs(), float64(c.cfg.FactsLast)/float64(time.Millisecond))
	}
	return policy, problems
}

// Plan is the plan as it would be, were the cluster as q says. It changes nothing and works on any node whose Facts and Solver do.
func (c *Coordinator) Plan(ctx context.Context, q Whatif) (*placementv1.SolveRequest, *placementv1.Plan, error) {
	view, err := c.cfg.Facts.View(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("no view of the cluster: %w", err)
	}
	if err := q.apply(&view); err != nil {
		return nil, nil, err
	}
	snap, _, problems := Snapshot(view, c.remember(view))
	if len(problems) > 0 {
		c.cfg.Log.Debug("plan leaves out desired state that cannot be read", "problems", problems)
	}
	policy, _ := c.policy(view.Applications)
	req := &placementv1.SolveRequest{Snapshot: snap, Policy: policy}
	plan, err := c.solve(ctx, req)
	if err != nil {
		return nil, nil, err
	}
	return req, plan, nil
}

// Last is the last decision of this time in office; false: there is none.
func (c *Coordinator) Last() (Decision, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.last, c.last.Plan != nil
}

// Why finds the last plan's word on each instance of a component (app/name) or on one instance.
func (c *Coordinator) Why(target string) ([]*placementv1.Assignment, Decision, bool) {
	d, ok := c.Last()
	if !ok {
		return nil, d, false
	}
	var out []*placementv1.Assignment
	for _, a := range d.Plan.GetAssignments() {
		t, err := components.ParseTarget(a.GetInstance())
		if a.GetInstance() == target || err == nil && t.Key() == target {
			out = append(out, a)
		}
	}
	return out, d, len(out) > 0
}

// Status tells how the loop is.
func (c *Coordinator) Status() Status {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.status
	s.InFlight = len(c.inFlight)
	s.Infeasible = slices.Clone(s.Infeasible)
	for _, instance := range slices.Sorted(maps.Keys(c.retry)) {
		if c.retry[instance].err == nil {
			continue
		}
		s.Failing = append(s.Failing, fmt.Sprintf("%s: %v", instance, c.retry[instance].err))
	}
	return s
}
