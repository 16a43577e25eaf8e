package components

import (
	"fmt"
	"strconv"
	"strings"
)

// SystemApplication is the application whose components the nodes bring along; no manifest may use its name. Its components are placed
// by the coordinator's rule (they live on the coordinator's node), not by a solver.
const SystemApplication = "system"

// PlacementComponent is the component that proposes plans.
const PlacementComponent = "system/placement"

// MaxNameBytes bounds the name of an application and of a component (a DNS label: both appear in host names and paths).
const MaxNameBytes = 63

// CheckName returns nil when s may name an application: a DNS label, that is 1 to 63 of a-z, 0-9 and "-", beginning with a letter and
// not ending with "-".
func CheckName(s string) error {
	const want = "expected 1 to 63 of a-z, 0-9 and -, beginning with a letter and not ending with -"
	if s == "" || len(s) > MaxNameBytes || s[0] < 'a' || s[0] > 'z' || s[len(s)-1] == '-' {
		return fmt.Errorf("found name %q, %s", shorten(s), want)
	}
	for i := range len(s) {
		c := s[i]
		if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' {
			return fmt.Errorf("found name %q, %s", shorten(s), want)
		}
	}
	return nil
}

// CheckComponentName is CheckName, and the name must not look like an instance's ("store-0"), so that a target is never ambiguous.
func CheckComponentName(s string) error {
	if err := CheckName(s); err != nil {
		return err
	}
	if _, _, ok := cutOrdinal(s); ok {
		return fmt.Errorf("found name %q, expected one that does not end in - and a number: that is how instances are named", s)
	}
	return nil
}

// ComponentKey names a component in the cluster: "app/name".
func ComponentKey(app, name string) string { return app + "/" + name }

// InstanceName names one instance of a component with a count: "app/name-0".
func InstanceName(app, name string, ordinal int) string {
	return app + "/" + name + "-" + strconv.Itoa(ordinal)
}

// EachNodeInstance names the instance of an each-node component that belongs to a node: "app/name@node". It is never claimed by
// another node.
func EachNodeInstance(app, name, node string) string { return app + "/" + name + "@" + node }

// Register keys (the arbiter's names for what the model commits).
const (
	ApplicationPrefix  = "app/"
	InstancePrefix     = "inst/"
	ArtifactPrefix     = "artifact/"
	ArtifactNamePrefix = "artifact-name/"
	BranchPrefix       = "branch/"
	HistoryPrefix      = "history/"
)

// ApplicationRegister is the key of an application's desired state.
func ApplicationRegister(app string) string { return ApplicationPrefix + app }

// InstanceRegister is the key of an instance's ownership; instance is "app/name-0" or "app/name@node".
func InstanceRegister(instance string) string { return InstancePrefix + instance }

// BranchName names a branch of an instance, what an owner saved that went on without the arbiter: "app/name-0@branch-n2-1".
func BranchName(instance, node string, n uint32) string {
	return instance + BranchID(node, n)
}

// branchMark begins what tells a branch from its instance.
const branchMark = "@branch-"

// BranchID is a branch's name where it is known which instance is spoken of: "@branch-n2-1".
func BranchID(node string, n uint32) string {
	return branchMark + node + "-" + strconv.FormatUint(uint64(n), 10)
}

// BranchesOf is the prefix of the keys of an instance's branches.
func BranchesOf(instance string) string { return BranchPrefix + instance + branchMark }

// BranchRegister is the key of a branch.
func BranchRegister(instance, node string, n uint32) string {
	return BranchPrefix + BranchName(instance, node, n)
}

// HistoryRegister is the key of an instance's earlier checkpoints.
func HistoryRegister(instance string) string { return HistoryPrefix + instance }

// InstanceOfKey is the reverse of InstanceRegister; "" when key is not the register of an instance.
func InstanceOfKey(key string) string {
	if name, ok := strings.CutPrefix(key, InstancePrefix); ok {
		return name
	}
	return ""
}

// ArtifactRegister is the key of an artifact's record; digest is "sha256:…".
func ArtifactRegister(digest string) string { return ArtifactPrefix + digest }

// ArtifactNameRegister is the key that leads from a name and version to a digest.
func ArtifactNameRegister(name, version string) string {
	return ArtifactNamePrefix + name + "/" + version
}

// Target is what a call, a binding or a command names: a component, or one instance of it.
type Target struct {
	Application string
	Component   string // the name within the application
	Ordinal     int    // -1: not an instance of a counted component
	Node        string // the node's name in "app/name@node"; "" else
}

// Key is "app/name".
func (t Target) Key() string { return ComponentKey(t.Application, t.Component) }

// IsInstance tells whether one instance is named, not the whole component.
func (t Target) IsInstance() bool { return t.Ordinal >= 0 || t.Node != "" }

// Instance is the instance's name, "" where only the component is named.
func (t Target) Instance() string {
	switch {
	case t.Ordinal >= 0:
		return InstanceName(t.Application, t.Component, t.Ordinal)
	case t.Node != "":
		return EachNodeInstance(t.Application, t.Component, t.Node)
	}
	return ""
}

func (t Target) String() string {
	if t.IsInstance() {
		return t.Instance()
	}
	return t.Key()
}

// ParseTarget reads "app/name", "app/name-0" or "app/name@node".
func ParseTarget(s string) (Target, error) {
	app, rest, ok := strings.Cut(s, "/")
	if !ok {
		return Target{}, fmt.Errorf("%q names no component: expected app/name, app/name-0 or app/name@node", shorten(s))
	}
	if err := CheckName(app); err != nil {
		return Target{}, fmt.Errorf("application of %q: %w", shorten(s), err)
	}
	t := Target{Application: app, Component: rest, Ordinal: -1}
	if name, node, ok := strings.Cut(rest, "@"); ok {
		if node == "" || strings.ContainsAny(node, "/@ \t\n") {
			return Target{}, fmt.Errorf("%q names no node after the @: expected app/name@node", shorten(s))
		}
		t.Component, t.Node = name, node
	} else if name, n, ok := cutOrdinal(rest); ok {
		t.Component, t.Ordinal = name, n
	}
	if err := CheckComponentName(t.Component); err != nil {
		return Target{}, fmt.Errorf("component of %q: %w", shorten(s), err)
	}
	return t, nil
}

// ParseTargetIn is ParseTarget, and a target without application is one of app: "store" is "app/store".
func ParseTargetIn(app, s string) (Target, error) {
	if !strings.Contains(s, "/") {
		s = app + "/" + s
	}
	return ParseTarget(s)
}

// cutOrdinal splits "store-12" into "store" and 12. A number with a leading zero or beyond MaxCount is no ordinal.
func cutOrdinal(s string) (name string, n int, ok bool) {
	i := strings.LastIndexByte(s, '-')
	if i <= 0 || i == len(s)-1 {
		return "", 0, false
	}
	digits := s[i+1:]
	if len(digits) > 1 && digits[0] == '0' {
		return "", 0, false
	}
	for j := range len(digits) {
		if digits[j] < '0' || digits[j] > '9' {
			return "", 0, false
		}
	}
	n, err := strconv.Atoi(digits)
	if err != nil {
		return "", 0, false
	}
	return s[:i], n, true
}

// shorten keeps hostile input out of messages.
func shorten(s string) string {
	const limit = 80
	if len(s) <= limit {
		return s
	}
	return s[:limit] + "…"
}
