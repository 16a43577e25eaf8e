package components

import componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"

// State is what ps shows of an instance.
type State string

// The states of ps, in the order an instance usually passes them.
const (
	Pending  State = "pending"
	Fetching State = "fetching"
	Starting State = "starting"
	Running  State = "running"
	Frozen   State = "frozen"
	Degraded State = "degraded"
	Failed   State = "failed"
	Stopped  State = "stopped"
)

// Serves says that a process is there and has a state that may have changed: calls pass, or are held.
func (s State) Serves() bool { return s == Running || s == Frozen || s == Degraded }

// Lifecycle is the state of a membrane's lifecycle controller (DESIGN.md §5).
type Lifecycle string

// The lifecycle: created → starting → running ⇄ frozen → stopped, failed from anywhere.
const (
	LifecycleNone     Lifecycle = "" // no membrane: nothing of the instance is on the node
	LifecycleCreated  Lifecycle = "created"
	LifecycleStarting Lifecycle = "starting"
	LifecycleRunning  Lifecycle = "running"
	LifecycleFrozen   Lifecycle = "frozen"
	LifecycleStopped  Lifecycle = "stopped"
	LifecycleFailed   Lifecycle = "failed"
)

// StateRow is one row of the table that maps the three vocabularies; docs/states.md shows it.
type StateRow struct {
	State     State
	Lifecycle []Lifecycle         // of the membrane
	Contract  []componentv1.State // of the component's process
	When      string
}

// States is the one table that maps the states of ps, of the membrane and of the contract.
var States = []StateRow{
	{Pending, []Lifecycle{LifecycleNone}, nil, "no node owns it yet, or its owner has not begun; reason says why"},
	{Fetching, []Lifecycle{LifecycleNone}, nil, "its owner fetches the artifact or the pages of its state"},
	{Starting, []Lifecycle{LifecycleCreated, LifecycleStarting}, []componentv1.State{componentv1.State_CREATED}, "its process is started and its state restored"},
	{Running, []Lifecycle{LifecycleRunning}, []componentv1.State{componentv1.State_STARTED}, "it serves"},
	{Frozen, []Lifecycle{LifecycleFrozen}, []componentv1.State{componentv1.State_FROZEN}, "calls are held; a command froze it, or it is being replaced"},
	{Degraded, []Lifecycle{LifecycleRunning, LifecycleFrozen}, []componentv1.State{componentv1.State_STARTED, componentv1.State_FROZEN}, "it serves, and something promised does not hold now: reason says what"},
	{Failed, []Lifecycle{LifecycleFailed, LifecycleNone}, []componentv1.State{componentv1.State_FAILED}, "it ended or never became healthy and waits for its next start, or is quarantined"},
	{Stopped, []Lifecycle{LifecycleStopped, LifecycleNone}, []componentv1.State{componentv1.State_STOPPED}, "a command stopped it; it keeps its owner and its state"},
}

// Observed is what is known about an instance when its state is shown.
type Observed struct {
	Lifecycle   Lifecycle
	Owned       bool   // a living node owns it
	Fetching    bool   // its owner fetches something it needs
	Stopped     bool   // desired: a command stopped it
	Quarantined bool   // it killed its owners, or a command put it there
	BackingOff  bool   // its next start is waited for
	Unmet       string // a promise that does not hold now: fewer holders than wanted, a mandatory binding unbound, its owner suspect
}

// StateOf is the state ps shows.
func StateOf(o Observed) State {
	switch {
	case o.Quarantined:
		return Failed
	case o.Stopped && (o.Lifecycle == LifecycleNone || o.Lifecycle == LifecycleStopped || !o.Owned):
		return Stopped
	case !o.Owned:
		return Pending
	case o.Lifecycle == LifecycleFailed || o.BackingOff:
		return Failed
	case o.Lifecycle == LifecycleCreated || o.Lifecycle == LifecycleStarting:
		return Starting
	case (o.Lifecycle == LifecycleRunning || o.Lifecycle == LifecycleFrozen) && o.Unmet != "":
		return Degraded
	case o.Lifecycle == LifecycleRunning:
		return Running
	case o.Lifecycle == LifecycleFrozen:
		return Frozen
	case o.Lifecycle == LifecycleStopped:
		return Stopped
	case o.Fetching:
		return Fetching
	}
	return Pending
}

// LifecycleOf is the lifecycle that a component's own report corresponds to.
func LifecycleOf(s componentv1.State) Lifecycle {
	switch s {
	case componentv1.State_CREATED:
		return LifecycleCreated
	case componentv1.State_STARTED:
		return LifecycleRunning
	case componentv1.State_FROZEN:
		return LifecycleFrozen
	case componentv1.State_STOPPED:
		return LifecycleStopped
	}
	return LifecycleFailed
}
