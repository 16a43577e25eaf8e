package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/supervisor"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// application is an application's desired state as this node knows it.
type application struct {
	*componentsv1.Application
	revision uint64
}

func (n *Node) application(name string) (application, bool) {
	reg, ok := n.arbiter.Get(components.ApplicationRegister(name))
	if !ok {
		return application{}, false
	}
	var a componentsv1.Application
	if err := proto.Unmarshal(reg.Body, &a); err != nil {
		n.faults.set("application "+name, err)
		return application{}, false
	}
	return application{&a, reg.Revision}, true
}

// applications lists every application, by name.
func (n *Node) applications() []application {
	var out []application
	for _, reg := range n.arbiter.List(components.ApplicationPrefix) {
		if a, ok := n.application(strings.TrimPrefix(reg.Key, components.ApplicationPrefix)); ok {
			out = append(out, a)
		}
	}
	slices.SortFunc(out, func(a, b application) int { return strings.Compare(a.GetName(), b.GetName()) })
	return out
}

// modelNodes are the members as the model wants them.
func (n *Node) modelNodes() []components.Node {
	var out []components.Node
	for _, m := range n.members.All() {
		if m.State != members.Left {
			out = append(out, components.Node{ID: m.ID.String(), Name: m.Name, Role: m.Role})
		}
	}
	return out
}

// instances lists the instances of one application (empty: of all), each with what is committed about it and what its owner told.
func (n *Node) instances(app string) []*apiv1.Instance {
	ctx, cancel := context.WithTimeout(context.Background(), scatterWithin)
	defer cancel()
	told := n.factRecords(ctx)
	reports := n.reportsIn(told)
	hosts, _ := n.hostFactsIn(told)
	var out []*apiv1.Instance
	for _, a := range n.applications() {
		if app != "" && a.GetName() != app {
			continue
		}
		expected, err := components.Expected(a.Application, n.modelNodes())
		if err != nil {
			n.faults.set("application "+a.GetName(), err)
			continue
		}
		seen := map[string]bool{}
		for _, spec := range expected {
			seen[spec.Name] = true
			out = append(out, n.instance(a.GetName(), spec.Name, spec.Component, reports, hosts))
		}
		for _, reg := range n.arbiter.List(components.InstancePrefix + a.GetName() + "/") {
			name := components.InstanceOfKey(reg.Key)
			if !seen[name] {
				in := n.instance(a.GetName(), name, nil, reports, hosts)
				in.Reason = "it is being removed"
				out = append(out, in)
			}
		}
	}
	return out
}

// instance puts together what is known about one instance.
func (n *Node) instance(app, name string, eff *components.Effective, reports map[string]instanceReport, hosts map[peer.ID]hostReport) *apiv1.Instance {
	out := &apiv1.Instance{Application: app, Instance: name, Component: componentOf(name), State: string(components.Pending)}
	if eff != nil {
		out.Artifact, out.Version, out.Durable, out.Guarantee = eff.ArtifactName, eff.Version, components.DurableName(eff.Durable, eff.Interval), eff.Guarantee
		out.Standby, out.ReplicasWanted = eff.Standby, uint32(max(eff.Replicas, eff.MinReplicas))
	}
	reg, ok := n.arbiter.Get(components.InstanceRegister(name))
	if !ok || reg.Owner == "" {
		out.Reason = "no node owns it yet; try coppice why " + out.Component
		if eff != nil && eff.Stopped {
			out.State, out.Reason = string(components.Stopped), "stopped by a command"
		}
		return out
	}
	var body componentsv1.InstanceBody
	if err := proto.Unmarshal(reg.Body, &body); err != nil {
		out.Reason = "its register cannot be read: " + err.Error()
		return out
	}
	out.Node, out.Epoch, out.CheckpointSeq = n.nameOf(reg.Owner), reg.Epoch, reg.Seq
	out.Artifact, out.Version, out.Quarantined = body.GetArtifactName(), body.GetVersion(), body.GetQuarantined()
	n.replicas(out, reg.Holders)
	next := n.successors(out, &body)
	owner, alive := n.members.Member(reg.Owner)
	switch {
	case body.GetQuarantined():
		out.State, out.Reason = string(components.Failed), "quarantined: its owners died after they started it"
	case !alive || !owner.State.Running():
		out.State, out.Reason = string(components.Pending), "its node "+out.Node+" is "+owner.State.String()+"; a successor takes it over"
	default:
		n.told(out, reg, reports)
		if r := reports[out.Instance]; out.WouldRestartOn != "" && r.Node == reg.Owner.String() {
			out.PredictedRestartMs = proto.Float64(predictRestart(out, r, next, hosts))
		}
	}
	if owner.State == members.Suspect && components.State(out.State).Serves() {
		out.State, out.Reason = string(components.Degraded), "its node "+out.Node+" is suspect: it was not heard from for a moment"
	}
	return out
}

// replicas says who holds its checkpoint.
func (n *Node) replicas(out *apiv1.Instance, holders []peer.ID) {
	out.Replicas, out.ReplicasAlive = nil, uint32(n.living(holders))
	for _, id := range holders {
		out.Replicas = append(out.Replicas, n.nameOf(id))
	}
}

// living counts those who are alive.
func (n *Node) living(ids []peer.ID) (count int) {
	for _, id := range ids {
		if m, ok := n.members.Member(id); ok && m.State == members.Alive {
			count++
		}
	}
	return count
}

// told adds what the owner told about the instance.
func (n *Node) told(out *apiv1.Instance, reg arbiter.Register, reports map[string]instanceReport) {
	r, ok := reports[out.Instance]
	if !ok || r.Node != reg.Owner.String() || r.Epoch < reg.Epoch && r.State == string(components.Running) {
		out.State, out.Reason = string(components.Starting), "its node has not told about it yet"
		return
	}
	out.State, out.Reason, out.Restarts, out.DurableNow = r.State, r.Reason, uint32(r.Restarts), r.Durable
	if components.State(r.State).Serves() {
		out.Listen = r.Listen
	}
	if id, err := peer.Decode(r.Standby); err == nil {
		if m, ok := n.members.Member(id); ok && m.State == members.Alive {
			out.StandbyNode, out.StandbyBehind = m.Name, proto.Uint64(r.StandbyBehind)
		}
	}
	if r.State == string(components.Running) || r.State == string(components.Frozen) || r.State == string(components.Degraded) {
		out.UptimeMs = uint64(max(0, r.UptimeMs+r.age.Milliseconds()))
	}
	if r.Seq >= reg.Seq && r.Seq > 0 {
		out.CheckpointSeq, out.CheckpointBytes = r.Seq, r.Bytes
	}
	if r.Seq > reg.Seq { // else who holds it is committed, and newer than what was told
		var ids []peer.ID
		for _, h := range r.Holders {
			if id, err := peer.Decode(h); err == nil {
				ids = append(ids, id)
			}
		}
		n.replicas(out, ids)
	}
	if out.Durable != "none" && components.State(r.State).Serves() {
		out.CallsSinceCheckpoint = proto.Uint64(r.Unsaved)
	}
	if r.SavedAgeMs >= 0 {
		out.CheckpointAgeMs = proto.Uint64(uint64(r.SavedAgeMs + r.age.Milliseconds()))
	}
	if r.Durable == "each-call" { // in fact, whatever is desired
		out.WouldLoseMs = proto.Uint64(0)
	} else if r.SavedAgeMs >= 0 {
		out.WouldLoseMs = out.CheckpointAgeMs
	}
}

// successors names them, and returns the one where it would restart now; "": nowhere.
func (n *Node) successors(out *apiv1.Instance, body *componentsv1.InstanceBody) (next peer.ID) {
	for _, s := range body.GetSuccessors() {
		id, err := peer.Decode(s)
		if err != nil {
			continue
		}
		out.Successors = append(out.Successors, n.nameOf(id))
		if m, ok := n.members.Member(id); ok && out.WouldRestartOn == "" && m.State == members.Alive && !m.Draining {
			out.WouldRestartOn, next = m.Name, id
		}
	}
	return next
}

// noticeMs is what a restart elsewhere takes besides the start: the notice of a death and a claim.
const noticeMs = 30

// predictRestart says how long it would take until an instance answers on its next owner: the start of a process as its owner has measured it, and the restore of
// a state of this size as fast as the next owner has restored others, or, where that has restored none yet, the mean of those that have. With a standby that
// is ready there only the process's Start is left. Where nobody has restored anything the owner's own last start is what is known.
func predictRestart(in *apiv1.Instance, r instanceReport, next peer.ID, hosts map[peer.ID]hostReport) float64 {
	if in.GetStandbyNode() != "" && in.GetStandbyNode() == in.GetWouldRestartOn() {
		return noticeMs + r.BeginMs
	}
	fixed := noticeMs + r.LaunchMs + r.BeginMs
	if in.GetCheckpointBytes() == 0 {
		return fixed
	}
	speed := hosts[next].Facts[restoreFact]
	if speed <= 0 {
		var sum, count float64
		for _, h := range hosts {
			if x := h.Facts[restoreFact]; x > 0 {
				sum, count = sum+x, count+1
			}
		}
		if count == 0 {
			return max(fixed, noticeMs+r.StartedMs)
		}
		speed = sum / count
	}
	return fixed + float64(in.GetCheckpointBytes())/(1<<20)/speed*1000
}

func componentOf(instance string) string {
	t, err := components.ParseTarget(instance)
	if err != nil {
		return instance
	}
	return t.Key()
}

// subject is what a verb is about: a component, or one of its instances.
type subject struct {
	app       application
	eff       *components.Effective
	component string
	instances []string // those meant
}

// find resolves an address: app/name, app/name-0, or a short name where that is unique.
func (n *Node) find(what, address string) (subject, error) {
	var hits []subject
	var candidates []string
	for _, a := range n.applications() {
		effs, err := components.Effectives(a.Application)
		if err != nil {
			return subject{}, fail(what, err)
		}
		expected, err := components.Expected(a.Application, n.modelNodes())
		if err != nil {
			return subject{}, fail(what, err)
		}
		for _, eff := range effs {
			s := subject{app: a, eff: eff, component: eff.Key()}
			var all []string
			for _, in := range expected {
				if in.Component.Key() == eff.Key() {
					all = append(all, in.Name)
				}
			}
			switch {
			case address == eff.Key() || address == eff.Name:
				s.instances = all
				hits = append(hits, s)
			default:
				for _, in := range all {
					if address == in || address == strings.TrimPrefix(in, a.GetName()+"/") {
						s.instances = []string{in}
						hits = append(hits, s)
					}
				}
			}
		}
	}
	if len(hits) == 1 {
		return hits[0], nil
	}
	for _, h := range hits {
		candidates = append(candidates, h.component)
	}
	return subject{}, api.Ambiguous(what+" "+address, address, candidates)
}

// one returns the single instance a state verb is about.
func (s subject) one(what string) (string, error) {
	if len(s.instances) == 1 {
		return s.instances[0], nil
	}
	return "", api.FailWith(connect.CodeInvalidArgument, &apiv1.Problem{
		What: what + " " + s.component, Why: fmt.Sprintf("it has %d instances; name one of %s", len(s.instances), strings.Join(s.instances, ", ")), Candidates: s.instances,
	})
}

// owner returns the node that owns an instance, as this node knows it best: what calls are routed by.
func (n *Node) owner(what, instance string) (peer.ID, error) {
	reg, ok := n.sup.Register(components.InstanceRegister(instance))
	if !ok || reg.Owner == "" {
		return "", api.Fail(connect.CodeFailedPrecondition, what+" "+instance, "no node owns it yet", "coppice why "+componentOf(instance))
	}
	return reg.Owner, nil
}

// fail gives an error of the platform the code and the words that a user gets.
func fail(what string, err error) error {
	if _, ok := api.ProblemOf(err); ok {
		return err
	}
	return api.Fail(codeOf(err), what, err.Error(), "")
}

func codeOf(err error) connect.Code {
	switch {
	case isDeadline(err):
		return connect.CodeDeadlineExceeded
	case isUnavailable(err):
		return connect.CodeUnavailable
	case errors.Is(err, supervisor.ErrNotHere), errors.Is(err, supervisor.ErrBranch):
		return connect.CodeAborted // it changed its owner meanwhile, or is about to commit what it did alone
	}
	return connect.CodeFailedPrecondition
}

// waitFor looks again until ok says yes, ctx ends, or the time is over. It is woken by changes of the registers and reports.
func (n *Node) waitFor(ctx context.Context, timeout time.Duration, ok func() bool) bool {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if ok() {
			return true
		}
		select {
		case <-ctx.Done():
			return ok()
		case <-tick.C:
		}
	}
}
