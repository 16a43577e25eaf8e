package components

import (
	"cmp"
	"fmt"
	"strconv"
	"time"

	"google.golang.org/protobuf/proto"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
)

// AnyPlatform stands among an artifact's platforms for a file that runs on every one: a script, whose interpreter the node has to have.
const AnyPlatform = "any"

// Effective is one component as it should be now: the manifest, with what the application says for all of its components, and what
// commands laid over it. It is a copy; changing it changes no desired state.
type Effective struct {
	Application string
	Name        string

	// Spec is the manifest's part with attributes and bindings merged, require = the application's and its own, objective = its own or
	// else the application's.
	Spec *componentsv1.ComponentSpec
	// Cost is the application's, nil where it says nothing.
	Cost *componentsv1.Cost
	// Budget is the application's, nil: none.
	Budget *float64

	Digest       string // of the artifact that should run; "" before it is pinned
	ArtifactName string
	Version      string
	Platforms    []string // os/arch it has; empty: not known

	Count    int // instances; 0 with EachNode
	EachNode bool

	Durable   componentsv1.Durability
	Interval  time.Duration // with DURABILITY_INTERVAL
	Guarantee string        // the grade that Policy is, in words
	Policy

	// Replicas is how many nodes should keep each checkpoint, MinReplicas how many a commit waits for; 0: the manifest does not say.
	Replicas, MinReplicas int
	Standby               string // cold | warm | hot

	CPUMillis, MemoryBytes, DiskBytes uint64

	Stopped bool              // a command stopped it: it keeps its owner and its state, and no process runs
	Frozen  bool              // a command froze it
	Nodes   map[string]string // instance name -> node id, from move

	Overlay *componentsv1.Overlay // nil: nothing is laid over the manifest
}

// Leased says whether its instances run under a lease of the arbiter: taken over only when the owner certainly runs nothing any more.
func (e *Effective) Leased() bool { return e.Takeover == TakeoverLeased }

// Keeps says whether an owner goes on that has lost touch with the arbiter.
func (e *Effective) Keeps() bool { return e.OnPartition == PartitionKeep }

// Key is "app/name".
func (e *Effective) Key() string { return ComponentKey(e.Application, e.Name) }

// Effectives lists the components of an application in the manifest's order. An application that is being removed still has them; see
// Expected. It fails on a desired state that no parsed manifest can give.
func Effectives(app *componentsv1.Application) ([]*Effective, error) {
	out := make([]*Effective, 0, len(app.GetManifest().GetComponents()))
	for _, spec := range app.GetManifest().GetComponents() {
		e, err := effective(app, spec)
		if err != nil {
			return nil, fmt.Errorf("component %s: %w", ComponentKey(app.GetName(), spec.GetName()), err)
		}
		out = append(out, e)
	}
	return out, nil
}

// EffectiveOf finds one component of an application by its name; nil when the application has none of that name.
func EffectiveOf(app *componentsv1.Application, name string) (*Effective, error) {
	for _, spec := range app.GetManifest().GetComponents() {
		if spec.GetName() == name {
			return effective(app, spec)
		}
	}
	return nil, nil
}

func effective(app *componentsv1.Application, spec *componentsv1.ComponentSpec) (*Effective, error) {
	e := &Effective{
		Application: app.GetName(),
		Name:        spec.GetName(),
		Spec:        proto.CloneOf(spec),
		Cost:        app.GetManifest().GetCost(),
		Budget:      app.GetManifest().Budget,
		Guarantee:   Guarantee(spec),
		Policy:      PolicyOf(spec),
	}
	e.Spec.Require = append(append([]string(nil), app.GetManifest().GetRequire()...), spec.GetRequire()...)
	if len(e.Spec.Objective) == 0 {
		e.Spec.Objective = app.GetManifest().GetObjective()
	}
	e.Replicas, e.MinReplicas = int(spec.GetState().GetReplicas()), int(spec.GetState().GetMinReplicas())
	e.Standby = cmp.Or(spec.GetState().GetStandby(), StandbyCold)
	var err error
	if e.Count, e.EachNode, err = ParseCount(spec.GetCount()); err != nil {
		return nil, fmt.Errorf("count: %w", err)
	}
	if e.Durable, e.Interval, err = ParseDurable(spec.GetDurable()); err != nil {
		return nil, fmt.Errorf("durable: %w", err)
	}
	e.CPUMillis = MilliCPU(spec.GetResources().GetCpu())
	if e.MemoryBytes, err = ParseSize(spec.GetResources().GetMemory()); err != nil {
		return nil, fmt.Errorf("resources.memory: %w", err)
	}
	if e.DiskBytes, err = ParseSize(spec.GetResources().GetDisk()); err != nil {
		return nil, fmt.Errorf("resources.disk: %w", err)
	}
	e.pin(app)
	e.overlay(app.GetOverlays()[spec.GetName()])
	return e, nil
}

// pin takes over what the deploy fixed.
func (e *Effective) pin(app *componentsv1.Application) {
	for _, p := range app.GetPinned() {
		if p.GetComponent() != e.Name {
			continue
		}
		e.Digest, e.ArtifactName, e.Version, e.Platforms = p.GetDigest(), p.GetName(), p.GetVersion(), p.GetPlatforms()
		if p.GetDurable() != componentsv1.Durability_DURABILITY_UNSPECIFIED {
			e.Durable = p.GetDurable()
		}
	}
	if e.Durable == componentsv1.Durability_DURABILITY_INTERVAL && e.Interval == 0 {
		e.Interval = DefaultInterval
	}
}

func (e *Effective) overlay(o *componentsv1.Overlay) {
	if o == nil || proto.Size(o) == 0 {
		return
	}
	e.Overlay = o
	if o.GetDigest() != "" {
		e.Digest, e.Version = o.GetDigest(), o.GetVersion()
		if o.GetArtifactName() != "" {
			e.ArtifactName = o.GetArtifactName()
		}
		if len(o.GetPlatforms()) > 0 {
			e.Platforms = o.GetPlatforms()
		}
	}
	e.Stopped, e.Frozen, e.Nodes = o.GetStopped(), o.GetFrozen(), o.GetNodes()
	for k, v := range o.GetAttributes() {
		if e.Spec.Attributes == nil {
			e.Spec.Attributes = map[string]string{}
		}
		e.Spec.Attributes[k] = v
	}
	for k, v := range o.GetBindings() {
		if v == "" { // unbound by a command
			delete(e.Spec.Bindings, k)
			continue
		}
		if e.Spec.Bindings == nil {
			e.Spec.Bindings = map[string]string{}
		}
		e.Spec.Bindings[k] = v
	}
}

// ParseCount reads the manifest's count: "each-node", or how many; "" is 1.
func ParseCount(s string) (n int, eachNode bool, err error) {
	switch s {
	case "":
		return 1, false, nil
	case EachNode:
		return 0, true, nil
	}
	n, err = strconv.Atoi(s)
	if err != nil || n < 0 || n > MaxCount || strconv.Itoa(n) != s {
		return 0, false, fmt.Errorf("found %q, expected a whole number from 0 to %d, or each-node", shorten(s), MaxCount)
	}
	return n, false, nil
}

// Node is what the model needs to know of a member.
type Node struct {
	ID   string
	Name string // unique by convention; of two nodes of one name the one of the smaller id has it
	Role string // full | voter | worker; a voter runs no components
}

// InstanceSpec is one instance that should exist.
type InstanceSpec struct {
	Name      string // "app/name-0" or "app/name@node"
	Ordinal   int    // -1 for each-node
	Node      string // the node id it belongs to, for each-node
	Pinned    string // the node id a command moved it to; "" = none
	Component *Effective
}

// Register is the key of the instance's ownership.
func (s InstanceSpec) Register() string { return InstanceRegister(s.Name) }

// Expected lists the instances an application should have, in the manifest's order and by ordinal or node id. nodes are the members
// that are not gone (dead ones included: their each-node instances wait for them); those of role voter run none. An application that is
// being removed expects none. Stopped components keep their instances.
func Expected(app *componentsv1.Application, nodes []Node) ([]InstanceSpec, error) {
	if app.GetRemoving() {
		return nil, nil
	}
	all, err := Effectives(app)
	if err != nil {
		return nil, err
	}
	var out []InstanceSpec
	for _, e := range all {
		out = append(out, expected(e, nodes)...)
	}
	return out, nil
}

func expected(e *Effective, nodes []Node) []InstanceSpec {
	var out []InstanceSpec
	for i := range e.Count {
		name := InstanceName(e.Application, e.Name, i)
		out = append(out, InstanceSpec{Name: name, Ordinal: i, Pinned: e.Nodes[name], Component: e})
	}
	if !e.EachNode {
		return out
	}
	for _, n := range NodeNames(nodes) {
		if n.Role != RoleVoter {
			out = append(out, InstanceSpec{Name: EachNodeInstance(e.Application, e.Name, n.Name), Ordinal: -1, Node: n.ID, Component: e})
		}
	}
	return out
}
