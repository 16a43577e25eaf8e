package placement

import (
	"context"
	"time"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// View is everything a round looks at, read at one moment. Slices may come in any order. The loop changes nothing in it.
type View struct {
	Self         string    // id of this node
	Incarnation  uint64    // of the arbiter
	Index        uint64    // the arbiter's index the committed parts were read at
	Paused       bool      // the cluster was put down as a whole: nothing is placed
	Date         time.Time // what time it is in the cluster, for dates that other nodes compare with theirs; zero: what this machine's clock says
	Applications []*componentsv1.Application
	Instances    []Register
	Nodes        []Node
	Links        []*placementv1.Link
}

// Node is a member with what the loop needs besides the solver's view of it.
type Node struct {
	*placementv1.Node
	Since    time.Time // when it came into its state, by this node's clock
	Evidence string    // of its death; "refused": nothing of it runs any more
	Boot     uint64    // of its process; 0: not known
}

// Register is the ownership of one instance.
type Register struct {
	Instance   string // app/name-0 or app/name@node
	Owner      string // node id; "": none
	Boot       uint64
	Epoch      uint64
	StateBytes uint64 // of its last acknowledged checkpoint
	Holders    []string
	Body       *componentsv1.InstanceBody
}

// Leader tells whether this node is the coordinator now.
type Leader interface{ Coordinator() bool }

// Facts gives the view. It fails when this node cannot have one now (its copy of the arbiter's state is behind).
type Facts interface {
	View(ctx context.Context) (View, error)
}

// Proposer carries out, each effect fenced: by the epoch that the action expects, or a transaction. An action that comes too late is
// refused and changes nothing. Calls come concurrently, for different instances.
type Proposer interface {
	// Place claims the instance for a node.
	Place(ctx context.Context, p Placing) error
	// Move has the owner hand the instance over, live. It returns when the new owner serves, or when nothing has changed.
	Move(ctx context.Context, m Moving) error
	// SetSuccessors writes successors of instances whose epochs are still those expected.
	SetSuccessors(ctx context.Context, all []Succession) error
	// Retire deletes the register of an instance that should no longer exist and whose owner is gone. (A living owner does it itself.)
	Retire(ctx context.Context, r Retiring) error
	// Forget deletes the desired state of an application that is being removed, in that version, once none of its instances is left.
	Forget(ctx context.Context, application string, version uint64) error
}

// Placing claims Instance for Node in the epoch after Epoch (0: there is no register yet), with Body.
type Placing struct {
	Instance string
	Node     string
	Epoch    uint64
	Body     *componentsv1.InstanceBody
}

// Moving takes Instance from its living owner to another node.
type Moving struct {
	Instance   string
	From, To   string
	Epoch      uint64 // the current one
	Successors []string
	Cause      string
}

// Succession names who takes Instance over, best first.
type Succession struct {
	Instance   string
	Epoch      uint64 // the current one
	Successors []string
}

// Retiring ends an instance nobody wants and nobody runs.
type Retiring struct {
	Instance string
	Epoch    uint64
	Cause    string
}

// Forgetting ends an application that is being removed.
type Forgetting struct {
	Application string
	Version     uint64
}

// Solver proposes a plan; it is the plugin process in a node. It must honour the context.
type Solver interface {
	Solve(ctx context.Context, req *placementv1.SolveRequest) (*placementv1.Plan, error)
}

// Recorder keeps decisions for why, replay and the knowledge base. It must not block.
type Recorder interface{ Record(d Decision) }

// Decision is one round that decided something, or failed to.
type Decision struct {
	Time     time.Time
	Digest   string                    // sha256 of the request's deterministic encoding
	Request  *placementv1.SolveRequest // solving it again gives Plan, byte for byte
	Plan     *placementv1.Plan         // nil when Err is set
	Actions  []Action                  // started in this round
	Problems []string                  // desired state that could not be read
	Err      error                     // why the round was skipped
	Skipped  int                       // rounds skipped in a row, with this one
}
