package placement

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

const (
	// ClaimDelay is how long a dead owner's instances are left to their successors.
	ClaimDelay = time.Second
	// RebootDelay is how long a node that came back gets to claim its own instances.
	RebootDelay = 3 * time.Second
)

// Kind of an action.
type Kind string

// What a round may start.
const (
	Place      Kind = "place"
	Move       Kind = "move"
	Successors Kind = "successors"
	Retire     Kind = "retire"
	Forget     Kind = "forget"
)

// Action is one effect a round wants. The field of its kind is set.
type Action struct {
	Kind       Kind
	Instance   string // for forget: the application
	Node       string // where to; "" for successors and retire
	Cause      string
	Placing    *Placing
	Moving     *Moving
	Succession *Succession
	Retiring   *Retiring
	Forgetting *Forgetting
}

// Decide compares what is with what should be: plan is the solver's (nil: only what needs none, the components of the application
// system and what nobody wants any more). It is pure. next is after how long something that is waited for is due, 0: nothing is.
func Decide(v View, expected map[string]components.InstanceSpec, plan *placementv1.Plan, now time.Time) (actions []Action, next time.Duration) {
	date := v.Date
	if date.IsZero() {
		date = now
	}
	d := &decider{view: v, now: now, date: date, nodes: map[string]Node{}, registers: map[string]Register{}}
	for _, n := range v.Nodes {
		d.nodes[n.GetId()] = n
	}
	for _, r := range v.Instances {
		d.registers[r.Instance] = r
	}
	if v.Paused {
		return nil, 0
	}
	d.system(expected)
	for _, a := range plan.GetAssignments() {
		if spec, ok := expected[a.GetInstance()]; ok && spec.Component.Application != components.SystemApplication {
			d.assignment(spec, a)
		}
	}
	d.surplus(expected)
	d.removed()
	slices.SortStableFunc(d.actions, func(a, b Action) int { return cmp.Compare(urgency[a.Kind], urgency[b.Kind]) })
	return d.actions, d.next
}

// urgency: what does not run comes first.
var urgency = map[Kind]int{Place: 0, Retire: 1, Forget: 2, Successors: 3, Move: 4}

type decider struct {
	view      View
	now       time.Time // for ages
	date      time.Time // for what is written down
	nodes     map[string]Node
	registers map[string]Register
	actions   []Action
	next      time.Duration
}

// system is the coordinator's rule: the components of the application system live on the coordinator's node.
func (d *decider) system(expected map[string]components.InstanceSpec) {
	var names []string
	for name, spec := range expected {
		if spec.Component.Application == components.SystemApplication {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		spec := expected[name]
		node := cmp.Or(spec.Node, d.view.Self)
		d.assignment(spec, &placementv1.Assignment{
			Instance: name, Node: node, Reason: "it lives with the coordinator", Successors: d.registers[name].Body.GetSuccessors(),
		})
	}
}

// assignment wants spec's instance on a's node.
func (d *decider) assignment(spec components.InstanceSpec, a *placementv1.Assignment) {
	r, exists := d.registers[spec.Name]
	if spec.Component.Stopped || r.Body.GetQuarantined() || a.GetNode() == "" {
		return
	}
	owner, known := d.nodes[r.Owner]
	gone := !known || owner.GetState() == "dead" || owner.GetState() == "left"
	rebooted := !gone && r.Boot != 0 && owner.Boot != 0 && r.Boot != owner.Boot
	switch {
	case !exists || r.Owner == "":
		d.placeFirst(spec, r, a)
	case spec.Node != "" && gone: // it waits for its node
	case gone:
		d.placeAfter(spec, r, a, owner, ClaimDelay, false) // of a leased one the arbiter says how long the lease may last
	case rebooted:
		d.placeAfter(spec, r, a, owner, RebootDelay, true)
	case a.GetNode() != r.Owner && spec.Node == "":
		d.actions = append(d.actions, Action{Kind: Move, Instance: spec.Name, Node: a.GetNode(), Cause: a.GetReason(), Moving: &Moving{
			Instance: spec.Name, From: r.Owner, To: a.GetNode(), Epoch: r.Epoch, Successors: a.GetSuccessors(), Cause: a.GetReason(),
		}})
	case spec.Node == "":
		next := d.steady(spec, r, a.GetSuccessors())
		if slices.Equal(r.Body.GetSuccessors(), next) {
			return
		}
		d.actions = append(d.actions, Action{Kind: Successors, Instance: spec.Name, Cause: "successors changed", Succession: &Succession{
			Instance: spec.Name, Epoch: r.Epoch, Successors: next,
		}})
	}
}

// steady leaves first who is named first, where that one keeps a process ready (state.standby: hot): noise in the facts may give the same nodes in another order,
// and each time another one would have to build a standby. Another zone than the owner's is a reason, noise is not.
func (d *decider) steady(spec components.InstanceSpec, r Register, next []string) []string {
	was := r.Body.GetSuccessors()
	if spec.Component.Standby != components.StandbyHot || len(was) == 0 {
		return next
	}
	i := slices.Index(next, was[0])
	own := d.nodes[r.Owner].GetZone()
	if i <= 0 || d.nodes[was[0]].GetZone() == own && d.nodes[next[0]].GetZone() != own {
		return next
	}
	return append([]string{was[0]}, slices.Delete(slices.Clone(next), i, i+1)...)
}

func (d *decider) placeFirst(spec components.InstanceSpec, r Register, a *placementv1.Assignment) {
	body := components.FirstBody(spec, d.date)
	if r.Body.GetDigest() != "" { // it ran before and was released: in the version it ran
		body = proto.CloneOf(r.Body)
		body.Trigger, body.Cause, body.ClaimedUnixMs = "placement", "it had no owner", uint64(max(d.date.UnixMilli(), 0))
	}
	body.Successors = a.GetSuccessors()
	d.place(spec, r, a, body)
}

// placeAfter claims from an owner that died (or came back and did not claim), once its successors have had their time.
func (d *decider) placeAfter(spec components.InstanceSpec, r Register, a *placementv1.Assignment, owner Node, delay time.Duration, reboot bool) {
	age := d.now.Sub(owner.Since)
	if owner.Node == nil { // no member any more: nobody else waits
		age = delay
	}
	if age < delay {
		d.wake(delay - age)
		return
	}
	evidence := cmp.Or(owner.Evidence, owner.GetState(), "it is no member")
	if reboot {
		evidence = "it came back as another process"
	}
	body := components.Takeover(r.Body, components.OwnerDeath{
		Node: r.Owner, Name: owner.GetName(), Boot: r.Boot, Reboot: reboot, Planned: owner.GetState() == "left", Evidence: evidence, Trigger: "placement", To: a.GetNode(), Now: d.date,
	})
	if !body.GetQuarantined() {
		body.Successors = a.GetSuccessors()
	}
	d.place(spec, r, a, body)
}

func (d *decider) wake(after time.Duration) {
	if d.next == 0 || after < d.next {
		d.next = after
	}
}

// surplus are registers of instances that should not exist. A living owner ends its own; here are those of owners that are gone.
func (d *decider) surplus(expected map[string]components.InstanceSpec) {
	unreadable := map[string]bool{}
	for _, app := range d.view.Applications {
		if _, err := components.Effectives(app); err != nil {
			unreadable[app.GetName()] = true
		}
	}
	var names []string
	for name := range d.registers {
		if _, ok := expected[name]; !ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	for _, name := range names {
		r := d.registers[name]
		t, err := components.ParseTarget(name)
		owner, known := d.nodes[r.Owner]
		alive := known && owner.GetState() != "dead" && owner.GetState() != "left"
		if err != nil || unreadable[t.Application] || alive {
			continue
		}
		cause := fmt.Sprintf("%s is no longer wanted, and its owner is gone", name)
		d.actions = append(d.actions, Action{Kind: Retire, Instance: name, Cause: cause, Retiring: &Retiring{Instance: name, Epoch: r.Epoch, Cause: cause}})
	}
}

// removed are applications that are being removed and have no instance left.
func (d *decider) removed() {
	left := map[string]bool{}
	for name := range d.registers {
		if app, _, ok := strings.Cut(name, "/"); ok {
			left[app] = true
		}
	}
	for _, app := range d.view.Applications {
		if app.GetRemoving() && !left[app.GetName()] {
			d.actions = append(d.actions, Action{
				Kind: Forget, Instance: app.GetName(), Cause: "it was removed, and no instance of it is left",
				Forgetting: &Forgetting{Application: app.GetName(), Version: app.GetVersion()},
			})
		}
	}
}

func (d *decider) place(spec components.InstanceSpec, r Register, a *placementv1.Assignment, body *componentsv1.InstanceBody) {
	d.actions = append(d.actions, Action{Kind: Place, Instance: spec.Name, Node: a.GetNode(), Cause: a.GetReason(), Placing: &Placing{
		Instance: spec.Name, Node: a.GetNode(), Epoch: r.Epoch, Body: body,
	}})
}
