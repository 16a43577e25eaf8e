package components

import (
	"cmp"
	"fmt"
	"slices"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// The grades of guarantee (DESIGN.md §5). Each stands for a set of the finer keys.
const (
	Safe       = "safe"
	ExactlyOne = "exactly-one"
	AlwaysOn   = "always-on"
)

// Values of takeover: when the next owner of an instance may start.
const (
	TakeoverFenced = "fenced" // at once: what the one before still does inside the system does not count
	TakeoverLeased = "leased" // when the one before certainly runs nothing any more
)

// Values of on_partition: what an owner does that has lost touch with the arbiter.
const (
	PartitionStop = "stop" // it stops serving
	PartitionKeep = "keep" // it goes on, and what it saves becomes a branch
)

// Values of reconcile: what becomes of a branch when the cut is over.
const (
	KeepMajority = "keep_majority" // the owner that the arbiter knows goes on; the branch is stored beside
	ReconMerge   = "merge"         // the component merges both, and the owner commits the result
	ReconNewest  = "newest"        // the state of more checkpoints goes on; the other is stored beside
)

// Policy is what a guarantee stands for.
type Policy struct{ Takeover, OnPartition, Reconcile string }

// shorthands are what the grades stand for.
var shorthands = map[string]Policy{
	Safe:       {TakeoverFenced, PartitionStop, KeepMajority},
	ExactlyOne: {TakeoverLeased, PartitionStop, KeepMajority},
	AlwaysOn:   {TakeoverFenced, PartitionKeep, ReconMerge},
}

// PolicyOf is the policy in force: what the finer keys say, and for those left out what the guarantee stands for; it is exactly-one for a program
// and safe for a component that says nothing.
func PolicyOf(spec *componentsv1.ComponentSpec) Policy {
	p := shorthands[cmp.Or(spec.GetGuarantee(), defaultGuarantee(spec))]
	return Policy{
		Takeover: cmp.Or(spec.GetTakeover(), p.Takeover), OnPartition: cmp.Or(spec.GetOnPartition(), p.OnPartition),
		Reconcile: cmp.Or(spec.GetReconcile(), p.Reconcile),
	}
}

func defaultGuarantee(spec *componentsv1.ComponentSpec) string {
	if spec.GetRun() != nil {
		return ExactlyOne
	}
	return Safe
}

// Name is the grade that the policy is; one that is none of them is written out.
func (p Policy) Name() string {
	for _, name := range []string{Safe, ExactlyOne, AlwaysOn} {
		if shorthands[name] == p {
			return name
		}
	}
	return fmt.Sprintf("takeover: %s, on_partition: %s, reconcile: %s", p.Takeover, p.OnPartition, p.Reconcile)
}

// Guarantee is the grade in force, in a word or in the words of the finer keys.
func Guarantee(spec *componentsv1.ComponentSpec) string { return PolicyOf(spec).Name() }

// keepsCalls says that the policy could lose answered calls of durable: each-call: a branch that is not merged holds some.
func (p Policy) keepsCalls() bool { return p.OnPartition != PartitionKeep || p.Reconcile == ReconMerge }

// policies checks durable, guarantee and the finer keys, alone and together (what the manifest's language refuses together).
func (c *checker) policies(spec *componentsv1.ComponentSpec, path string) {
	durable, _, err := ParseDurable(spec.GetDurable())
	c.wrap(path+".durable", err)
	ok := c.oneOf(path+".guarantee", spec.GetGuarantee(), Safe, ExactlyOne, AlwaysOn)
	ok = c.oneOf(path+".takeover", spec.GetTakeover(), TakeoverFenced, TakeoverLeased) && ok
	ok = c.oneOf(path+".on_partition", spec.GetOnPartition(), PartitionStop, PartitionKeep) && ok
	ok = c.oneOf(path+".reconcile", spec.GetReconcile(), KeepMajority, ReconMerge, ReconNewest) && ok
	if !ok || err != nil {
		return
	}
	if c.agree(spec, path) {
		c.together(spec, path, durable)
	}
	if durable == componentsv1.Durability_DURABILITY_NONE && spec.GetState() != nil {
		c.problem(path+".state", "found state with durable: none, expected one of them: nothing is saved that could have replicas or a history")
	}
	if p := PolicyOf(spec); spec.GetSandbox().GetNetwork() == "host" && p.Takeover != TakeoverLeased {
		c.problem(path+".sandbox.network", "found network: host with guarantee: %s, expected guarantee: exactly-one: "+
			"a port of the host cannot be served by two instances", p.Name())
	}
}

// agree reports finer keys that are not what the guarantee beside them stands for.
func (c *checker) agree(spec *componentsv1.ComponentSpec, path string) bool {
	stands, said := shorthands[spec.GetGuarantee()]
	if !said {
		return true
	}
	ok := true
	for _, k := range []struct{ key, value, want string }{
		{"takeover", spec.GetTakeover(), stands.Takeover},
		{"on_partition", spec.GetOnPartition(), stands.OnPartition},
		{"reconcile", spec.GetReconcile(), stands.Reconcile},
	} {
		if k.value != "" && k.value != k.want {
			c.problem(path+"."+k.key, "found %s: %s with guarantee: %s, expected %s: %s, which that stands for, or no guarantee",
				k.key, k.value, spec.GetGuarantee(), k.key, k.want)
			ok = false
		}
	}
	return ok
}

// together reports keys that contradict each other.
func (c *checker) together(spec *componentsv1.ComponentSpec, path string, durable componentsv1.Durability) {
	p := PolicyOf(spec)
	switch {
	case p.OnPartition == PartitionKeep && p.Takeover == TakeoverLeased:
		at := path + ".on_partition"
		if spec.GetOnPartition() == "" {
			at = path + ".takeover"
		}
		c.problem(at, "found on_partition: keep with takeover: leased, expected on_partition: stop or takeover: fenced: "+
			"an owner that goes on without the arbiter is not the only one")
	case p.OnPartition == PartitionStop && spec.GetReconcile() != "" && p.Reconcile != KeepMajority:
		c.problem(path+".reconcile", "found reconcile: %s with on_partition: stop, expected on_partition: keep: an owner that stops leaves nothing to reconcile", p.Reconcile)
	case durable == componentsv1.Durability_DURABILITY_NONE && spec.GetReconcile() != "" && p.Reconcile != KeepMajority:
		c.problem(path+".reconcile", "found reconcile: %s with durable: none, expected another durable: nothing is saved that could be reconciled", p.Reconcile)
	case durable == componentsv1.Durability_DURABILITY_EACH_CALL && !p.keepsCalls():
		c.problem(path+".durable", "found durable: each-call with on_partition: keep and reconcile: %s, expected reconcile: merge, or an interval such as 5s: "+
			"calls that the branch answered would be lost", p.Reconcile)
	}
}

// checkReconcile refuses a policy that the artifact cannot carry out. d is nil for a program.
func checkReconcile(spec *componentsv1.ComponentSpec, d *componentv1.Description, durable componentsv1.Durability) error {
	p := PolicyOf(spec)
	if p.OnPartition != PartitionKeep || p.Reconcile != ReconMerge || durable == componentsv1.Durability_DURABILITY_NONE || !d.GetState().GetStateful() {
		return nil
	}
	if slices.Contains(d.GetFeatures(), componentv1.FeatureMerge) {
		return nil
	}
	if spec.GetGuarantee() == AlwaysOn {
		return fmt.Errorf("guarantee of %s: found always-on with durable: %s, expected durable: none, or a component with a Merge: %s has none, so its state on both sides of a cut could not be brought together",
			spec.GetName(), DurableName(durable, 0), cmp.Or(d.GetType(), spec.GetArtifact()))
	}
	return fmt.Errorf("reconcile of %s: found merge, expected keep_majority or newest: %s has no Merge", spec.GetName(), cmp.Or(d.GetType(), spec.GetArtifact()))
}
