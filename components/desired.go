package components

import (
	"cmp"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
)

// Formats of what is committed. A reader refuses a newer one.
const (
	ApplicationFormat = 1
	InstanceFormat    = 1
	ArtifactFormat    = 1
)

// OverlayItem is one thing a command laid over the manifest.
type OverlayItem struct {
	Component string // app/name
	Key       string // version | node of app/name-0 | stopped | frozen | attributes.capacity | bindings.store
	Value     string
	Manifest  string // what the manifest says there; "" = nothing
}

// Overlays lists what commands laid over an application, sorted by component and key. Empty: the manifest holds as deployed.
func Overlays(app *componentsv1.Application) []OverlayItem {
	var out []OverlayItem
	specs := map[string]*componentsv1.ComponentSpec{}
	for _, s := range app.GetManifest().GetComponents() {
		specs[s.GetName()] = s
	}
	for _, name := range slices.Sorted(maps.Keys(app.GetOverlays())) {
		o, spec := app.GetOverlays()[name], specs[name]
		add := func(key, value, manifest string) {
			out = append(out, OverlayItem{Component: ComponentKey(app.GetName(), name), Key: key, Value: value, Manifest: manifest})
		}
		for _, k := range slices.Sorted(maps.Keys(o.GetAttributes())) {
			add("attributes."+k, o.GetAttributes()[k], spec.GetAttributes()[k])
		}
		for _, k := range slices.Sorted(maps.Keys(o.GetBindings())) {
			add("bindings."+k, o.GetBindings()[k], spec.GetBindings()[k])
		}
		if o.GetFrozen() {
			add("frozen", strconv.FormatBool(true), "")
		}
		for _, k := range slices.Sorted(maps.Keys(o.GetNodes())) {
			add("node of "+k, o.GetNodes()[k], "")
		}
		if o.GetStopped() {
			add("stopped", strconv.FormatBool(true), "")
		}
		if o.GetDigest() != "" {
			add("version", cmp.Or(o.GetVersion(), o.GetDigest()), spec.GetArtifact())
		}
	}
	return out
}

// Redeploy is the desired state after a deploy of m over old (nil: a first deploy): the next version, the manifest, what the deploy
// pinned, and those overlays that the manifest has no key for. What a deployed key clears: artifact a swap; attributes.X and bindings.X
// the same key's; moves, stopped and frozen have no key and stay until unpin. A component that is gone takes its overlay along. cleared
// lists what the deploy took away.
func Redeploy(old *componentsv1.Application, m *componentsv1.Manifest, pinned []*componentsv1.Pinned) (next *componentsv1.Application, cleared []OverlayItem) {
	next = &componentsv1.Application{
		Format:   ApplicationFormat,
		Name:     m.GetApplication(),
		Version:  old.GetVersion() + 1,
		Manifest: proto.CloneOf(m),
		Pinned:   pinned,
	}
	for _, spec := range m.GetComponents() {
		o := old.GetOverlays()[spec.GetName()]
		if o == nil {
			continue
		}
		kept := proto.CloneOf(o)
		kept.Digest, kept.Version, kept.ArtifactName, kept.Platforms = "", "", "", nil
		maps.DeleteFunc(kept.Attributes, func(k, _ string) bool { _, ok := spec.GetAttributes()[k]; return ok })
		maps.DeleteFunc(kept.Bindings, func(k, _ string) bool { _, ok := spec.GetBindings()[k]; return ok })
		dropGoneInstances(next.GetName(), spec, kept)
		if proto.Size(kept) == 0 {
			continue
		}
		if next.Overlays == nil {
			next.Overlays = map[string]*componentsv1.Overlay{}
		}
		next.Overlays[spec.GetName()] = kept
	}
	left := map[[2]string]bool{}
	for _, it := range Overlays(next) {
		left[[2]string{it.Component, it.Key}] = true
	}
	for _, it := range Overlays(old) {
		if !left[[2]string{it.Component, it.Key}] {
			cleared = append(cleared, it)
		}
	}
	return next, cleared
}

// dropGoneInstances forgets moves of instances that the new count no longer has.
func dropGoneInstances(app string, spec *componentsv1.ComponentSpec, o *componentsv1.Overlay) {
	count, eachNode, err := ParseCount(spec.GetCount())
	if err != nil || eachNode {
		return
	}
	maps.DeleteFunc(o.Nodes, func(instance, _ string) bool {
		t, err := ParseTarget(instance)
		return err != nil || t.Application != app || t.Ordinal >= count
	})
}

// DeathWindow: an owner that dies this soon after an instance was started counts against the instance, unless the instance had settled:
// what has answered and held is not what kills its nodes.
const DeathWindow = 30 * time.Second

// MaxDeaths of owners in a row quarantine an instance, not the nodes it kills.
const MaxDeaths = 2

// OwnerDeath is the end of one process of one node, seen from one of its instances.
type OwnerDeath struct {
	Node     string // id
	Name     string
	Boot     uint64
	Reboot   bool // the node is back with another boot: its end says nothing about the instance
	Planned  bool // it said goodbye, or was expelled: nobody has died of anything
	Evidence string
	Trigger  string // neighbour | placement: who claims
	To       string // id of the node that claims
	Now      time.Time
	// Lasted is how long the epoch has lasted, as the claimer measured it. 0: it did not, and dates that two nodes wrote are compared.
	Lasted time.Duration
}

// Takeover is the body of the epoch that follows an owner's death: an unsettled epoch goes back to its fallback, the claimer leaves the
// list of successors, and an owner's death soon after the start counts against the instance (MaxDeaths in a row: quarantined). body
// stays as it is.
func Takeover(body *componentsv1.InstanceBody, d OwnerDeath) *componentsv1.InstanceBody {
	next := proto.CloneOf(body)
	now := d.Now.UnixMilli()
	next.Trigger = d.Trigger
	next.Cause = cmp.Or(d.Name, d.Node) + " died: " + cmp.Or(d.Evidence, "silent")
	next.ClaimedUnixMs = uint64(max(now, 0))
	next.Successors = slices.DeleteFunc(next.Successors, func(id string) bool { return id == d.To })
	if fb := body.GetFallback(); fb != nil && !body.GetSettled() {
		next.Digest, next.ArtifactName, next.Version = fb.GetDigest(), fb.GetArtifactName(), fb.GetVersion()
	}
	next.Fallback, next.Settled = nil, false
	age := time.Duration(now-int64(body.GetClaimedUnixMs())) * time.Millisecond
	if d.Lasted > 0 {
		age = d.Lasted
	}
	switch {
	case d.Planned && !body.GetSettled(): // it tells nothing, for or against; nodes are stopped one after the other for an upgrade
	case !d.Reboot && !body.GetSettled() && age < DeathWindow:
		next.Deaths = append(next.Deaths, &componentsv1.Death{Node: d.Node, Boot: d.Boot, UnixMs: next.ClaimedUnixMs})
	default:
		next.Deaths = nil
	}
	// The cluster's own components are not given up: without placement nothing else would be placed any more.
	ours := strings.HasPrefix(body.GetComponent(), SystemApplication+"/")
	next.Quarantined = body.GetQuarantined() || len(next.Deaths) >= MaxDeaths && !ours
	return next
}

// FirstBody is the body of an instance's first epoch, as placement claims it.
func FirstBody(s InstanceSpec, now time.Time) *componentsv1.InstanceBody {
	return &componentsv1.InstanceBody{
		Format:        InstanceFormat,
		Component:     s.Component.Key(),
		Ordinal:       uint32(max(s.Ordinal, 0)),
		Digest:        s.Component.Digest,
		ArtifactName:  s.Component.ArtifactName,
		Version:       s.Component.Version,
		Trigger:       "placement",
		Cause:         "first placement",
		ClaimedUnixMs: uint64(max(now.UnixMilli(), 0)),
		EachNode:      s.Node,
		Leased:        s.Component.Leased(),
	}
}
