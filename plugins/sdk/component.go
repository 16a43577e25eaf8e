package sdk

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"google.golang.org/grpc"

	"github.com/coppice-project/coppice/plugins/sdk/state"
)

// Component is what an author writes: who it is, what it provides, what it needs, what it remembers. Fill in what applies and hand it to Serve.
type Component struct {
	// Type names the kind of component, by convention the artifact's name ("counter"). Required.
	Type string
	// Version is the semver of this binary. Required. Set it at build time: -ldflags "-X main.version=1.2.0".
	Version string

	// Register registers the component's own gRPC services; call the generated Register…Server functions in it. Each service becomes a provided
	// interface whose name is the service's in lower case: counter.v1.Counter provides "counter".
	Register func(grpc.ServiceRegistrar)
	// HTTP, if set, is the provided interface "http". GET, HEAD, OPTIONS and TRACE are read-only; every other request is one transaction with its
	// response, which is sent when the handler has returned. A status of 400 or above rolls back and is not remembered.
	HTTP http.Handler

	// State, if set, makes the component stateful: every call is a transaction, see Tx. Without it there is no Tx.
	State *State
	// Opaque, if set instead of State, is a state of the component's own form, see Opaque. There is no Tx then.
	Opaque Opaque
	// Info, if set, is added to what each heartbeat tells, for people: where something listens, for example. It must return quickly.
	Info func() map[string]string
	// Requires lists the bindings made by Require and Wants.
	Requires []*Binding
	// Attributes lists the attributes made by NewAttribute.
	Attributes []Attr
	// Publishes lists the event channels that the component publishes to, for people and tools.
	Publishes []string
	// Resources are a hint to placement where the manifest says nothing.
	Resources Resources

	// OnStart runs in Start, after the state was restored and the attributes were set and before the first call. An error makes the start fail.
	OnStart func(ctx context.Context, in *Instance) error
	// Run, if set, is background work. It runs while the component is started, is cancelled and waited for when it is frozen or stopped, and runs
	// again after a thaw. An error makes the component unhealthy; a return of nil is the end of the work. Use Instance.Update to change state.
	Run func(ctx context.Context, in *Instance) error
	// Healthy, if set, is asked with each heartbeat; an error makes the component unhealthy with that text. It must return quickly.
	Healthy func(ctx context.Context) error
	// OnStop runs in Stop, after the last call. The state is not lost if it never runs.
	OnStop func(ctx context.Context) error
	// OnLapse, if set, runs right before the process ends itself because no node vouches for it any more: what it started must end with it. It has no
	// time: it must not wait for anything.
	OnLapse func()
}

// State describes the state of a stateful component.
type State struct {
	// Schema is the author's number for the meaning of keys and values; it rises when a version writes something that older ones cannot read.
	// Required, at least 1.
	Schema uint32
	// Reads lists the older schemas that this version can be given; Schema itself need not be in it.
	Reads []uint32
	// Migrate turns a map of schema from, one of Reads, into one of Schema. It runs as one transaction in Start. Nil: nothing needs to be turned.
	Migrate func(from uint32, tx *Txn) error
	// Merge, if set, brings two states with a common base together, after a cut on both sides of which the component went on (guarantee: always-on).
	// base is the state before the cut, ours that of the owner that the cluster knows, theirs that of the other side; into begins as ours, and
	// what it holds at the end is the result. It runs as one transaction, on no instance's own state, and must give the same for the same. Replies
	// remembered on either side are remembered in the result. An error leaves ours as it is, and theirs is kept beside.
	Merge func(base, ours, theirs, into *Txn) error
	// Limits of the dedupe table and the journal; the zero value is right for almost everyone.
	Limits state.Limits
}

func (s *State) reads() []uint32 {
	all := append([]uint32{s.Schema}, s.Reads...)
	slices.Sort(all)
	return slices.Compact(all)
}

// Resources are hints for placement; 0 = no idea.
type Resources struct {
	MemoryBytes        uint64
	CPUs               float64
	MaxConcurrentCalls uint32
	NeedsNetwork       bool
}

// Txn is one transaction over the component's map; see package state for its methods.
type Txn = state.Txn

func (c *Component) validate() error {
	var errs []error
	if c.Type == "" {
		errs = append(errs, errors.New("type is empty: name the component"))
	}
	if c.Version == "" {
		errs = append(errs, errors.New("version is empty: give a semver, for example with -ldflags \"-X main.version=1.0.0\""))
	}
	if c.State != nil && c.State.Schema == 0 {
		errs = append(errs, errors.New("schema of State is 0: start with 1"))
	}
	if c.State != nil && c.Opaque != nil {
		errs = append(errs, errors.New("State and Opaque are both set: a component has one state"))
	}
	if c.State != nil && slices.Contains(c.State.Reads, 0) {
		errs = append(errs, errors.New("reads of State holds 0: schemas start with 1"))
	}
	seen := map[string]bool{}
	for _, b := range c.Requires {
		if seen["binding "+b.name] {
			errs = append(errs, fmt.Errorf("binding %q is required twice", b.name))
		}
		seen["binding "+b.name] = true
	}
	for _, a := range c.Attributes {
		name := a.spec().GetName()
		if seen["attribute "+name] {
			errs = append(errs, fmt.Errorf("attribute %q is there twice", name))
		}
		seen["attribute "+name] = true
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("component %q: %w", c.Type, err)
	}
	return nil
}
