package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/supervisor"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/membrane"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

const defaultCall = 10 * time.Second

// Call calls a method of a component with JSON in and out, from any node, through the same gates as every other call.
func (v *verbs) Call(ctx context.Context, r *apiv1.CallRequest) (*apiv1.CallResponse, error) {
	n, begin := v.n, time.Now()
	s, err := n.find("call", r.GetComponent())
	if err != nil {
		return nil, err
	}
	what := fmt.Sprintf("call %s %s", s.component, r.GetMethod())
	methods, err := n.methods(ctx, s)
	if err != nil {
		return nil, fail(what, err)
	}
	m, err := methods.Find(r.GetMethod())
	if err != nil {
		return nil, api.Fail(connect.CodeNotFound, what, err.Error(), "coppice inspect "+s.component)
	}
	if m.Kind != membrane.KindUnary {
		return nil, api.Fail(connect.CodeUnimplemented, what, "it is a streaming method; coppice call calls unary ones", "a gRPC client")
	}
	desc, err := methods.Descriptor(m.Name)
	if err != nil {
		return nil, fail(what, err)
	}
	in, out := dynamicpb.NewMessage(desc.Input()), dynamicpb.NewMessage(desc.Output())
	text := r.GetJson()
	if strings.TrimSpace(text) == "" {
		text = "{}"
	}
	if err := protojson.Unmarshal([]byte(text), in); err != nil {
		return nil, api.Fail(connect.CodeInvalidArgument, what, fmt.Sprintf("the JSON is no %s: %v", desc.Input().FullName(), err), "coppice inspect "+s.component)
	}
	timeout := time.Duration(r.GetTimeoutMs()) * time.Millisecond
	if timeout <= 0 {
		timeout = defaultCall
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if r.GetIdempotencyKey() != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, componentv1.MetaKey, r.GetIdempotencyKey())
	}
	target := s.component
	if len(s.instances) == 1 {
		target = s.instances[0]
	}
	if err := n.router.Conn(target, r.GetShardKey()).Invoke(ctx, m.Name, in, out); err != nil {
		return nil, callFailed(what, s.component, err)
	}
	b, err := (protojson.MarshalOptions{EmitUnpopulated: true}).Marshal(out)
	if err != nil {
		return nil, fail(what, err)
	}
	res := &apiv1.CallResponse{Json: string(b), TookMs: ms(time.Since(begin)), Instance: target}
	if owner, err := n.owner("", target); err == nil {
		res.Node = n.nameOf(owner)
	}
	return res, nil
}

// callFailed gives a component's refusal the words of the command line.
func callFailed(what, component string, err error) error {
	st := status.Convert(err)
	code, try := connect.Code(st.Code()), ""
	switch st.Code() {
	case codes.Unavailable, codes.DeadlineExceeded:
		try = "coppice ps " + strings.SplitN(component, "/", 2)[0]
	case codes.Unknown:
		code = connect.CodeFailedPrecondition
	}
	return api.Fail(code, what, st.Message(), try)
}

// methods is what is known of a component's calls.
func (n *Node) methods(ctx context.Context, s subject) (*membrane.Methods, error) {
	if strings.HasPrefix(s.eff.Digest, supervisor.BuiltinPrefix) {
		for _, name := range s.instances {
			if m := n.router.Local(name); m != nil && m.Methods() != nil {
				return m.Methods(), nil
			}
		}
		return nil, fmt.Errorf("%s is described on the node that runs it; ask that one", s.component)
	}
	return n.direct.loaded(ctx, s.eff.Digest)
}

func (v *verbs) Inspect(ctx context.Context, r *apiv1.InspectRequest) (*apiv1.InspectResponse, error) {
	n := v.n
	s, err := n.find("inspect", r.GetComponent())
	if err != nil {
		return nil, err
	}
	out := &apiv1.InspectResponse{
		Component: s.component, Application: s.app.GetName(), Artifact: s.eff.ArtifactName, Version: s.eff.Version, Digest: s.eff.Digest, Kind: kindOf(s.eff),
		Durable: components.DurableName(s.eff.Durable, s.eff.Interval), Guarantee: s.eff.Guarantee, Overlay: n.overlayOut(s),
	}
	desc, err := n.description(ctx, s)
	if err == nil {
		methods := membrane.NewMethods(desc)
		out.Type, out.Features, out.DurableBy = desc.GetType(), desc.GetFeatures(), durableBy(s.eff, desc)
		out.Provides, out.Requires = interfacesOf(desc.GetProvides(), methods), interfacesOf(desc.GetRequires(), nil)
		for _, p := range out.GetProvides() {
			if path, ok := s.eff.Spec.GetExpose()[p.GetName()]; ok {
				p.Path = "/app/" + s.app.GetName() + path
			}
		}
		out.Attributes = attributeInfos(desc, s)
		if out.Bindings, err = n.bindings(ctx, s); err != nil {
			return nil, fail("inspect "+s.component, err)
		}
	}
	out.Calls = &apiv1.CallStats{}
	for _, in := range n.instances(s.app.GetName()) {
		if !slices.Contains(s.instances, in.GetInstance()) {
			continue
		}
		i := n.inspectInstance(ctx, in)
		i.MinReplicas = uint32(s.eff.MinReplicas)
		addCalls(out.Calls, i.GetCalls())
		out.Instances = append(out.Instances, i)
		if out.State == "" || in.GetState() != string(components.Running) {
			out.State = in.GetState()
		}
	}
	return out, nil
}

// kindOf is the kind of what a component is, in a word.
func kindOf(eff *components.Effective) string {
	if eff.Spec.GetRun() != nil {
		return components.KindProgram
	}
	return "component"
}

func (n *Node) description(ctx context.Context, s subject) (*componentv1.Description, error) {
	if strings.HasPrefix(s.eff.Digest, supervisor.BuiltinPrefix) || s.eff.Spec.GetRun() != nil {
		for _, name := range s.instances {
			if m := n.router.Local(name); m != nil && m.Backend() != nil {
				return m.Backend().Description(), nil
			}
		}
		if s.eff.Spec.GetRun() != nil {
			return n.artifacts().Description(ctx, s.eff.Digest)
		}
		return nil, fmt.Errorf("%s runs on another node", s.component)
	}
	return n.registry.Description(ctx, s.eff.Digest)
}

// durableBy says how a durability is reached, as the component's version can: what lacks txn-calls is saved at intervals, whatever was asked for.
func durableBy(eff *components.Effective, desc *componentv1.Description) string {
	switch name := components.DurableName(eff.Durable, eff.Interval); {
	case name == "each-call" && !breaksEachCall(eff, desc):
		return componentv1.FeatureTxnCalls
	case name == "none" || name == "on-demand":
		return name
	}
	return "interval"
}

// breaksEachCall says that a version cannot keep what durable: each-call promises of the component.
func breaksEachCall(eff *components.Effective, desc *componentv1.Description) bool {
	return eff.Durable == componentsv1.Durability_DURABILITY_EACH_CALL && !slices.Contains(desc.GetFeatures(), componentv1.FeatureTxnCalls)
}

// inspectInstance asks the owner's membrane where the owner is this node; elsewhere what the owner told has to do, and its calls are asked
// of it once.
func (n *Node) inspectInstance(ctx context.Context, in *apiv1.Instance) *apiv1.InspectInstance {
	out := &apiv1.InspectInstance{
		Instance: in.GetInstance(), Node: in.GetNode(), State: in.GetState(), Reason: in.GetReason(), Epoch: in.GetEpoch(), UptimeMs: in.GetUptimeMs(), Restarts: in.GetRestarts(),
		Successors: in.GetSuccessors(), Version: in.GetVersion(), Calls: &apiv1.CallStats{}, Listen: in.GetListen(),
		Checkpoint: &apiv1.CheckpointInfo{Seq: in.GetCheckpointSeq(), Bytes: in.GetCheckpointBytes(), AgeMs: in.CheckpointAgeMs, Replicas: in.GetReplicas(), ReplicasAlive: in.GetReplicasAlive(), CallsSince: in.CallsSinceCheckpoint},
	}
	out.Standby, out.StandbyNode, out.StandbyBehind, out.ReplicasWanted = in.GetStandby(), in.GetStandbyNode(), in.StandbyBehind, in.GetReplicasWanted()
	n.inspectHistory(out)
	reg, ok := n.arbiter.Get(components.InstanceRegister(in.GetInstance()))
	if !ok {
		return out
	}
	out.Incarnation, out.Checkpoint.W, out.Checkpoint.Root = reg.Incarnation, reg.W, fmt.Sprintf("%x", reg.Root)
	if body, err := bodyOf(reg); err == nil {
		out.Settled, out.Trigger, out.Cause, out.PreviousVersion = body.GetSettled(), body.GetTrigger(), body.GetCause(), body.GetPrevious().GetVersion()
	}
	if reg.Owner != n.id {
		n.inspectThere(ctx, reg.Owner.String(), out)
		return out
	}
	if info, ok := n.sup.Info(in.GetInstance()); ok {
		out.Pid = uint32(info.Pid)
	}
	if m := n.router.Local(in.GetInstance()); m != nil {
		out.Calls = callStats(m.Stats())
	}
	return out
}

// inspectThere asks the owner for what only its membrane knows.
func (n *Node) inspectThere(ctx context.Context, owner string, out *apiv1.InspectInstance) {
	if api.ForwardedFrom(ctx) != "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	c, err := api.Forward(ctx, n, owner)
	if err != nil {
		return
	}
	res, err := c.Inspect(ctx, &apiv1.InspectRequest{Component: out.GetInstance()})
	if err != nil {
		n.log.Debug("inspect at the owner", "instance", out.GetInstance(), "error", err)
		return
	}
	for _, in := range res.GetInstances() {
		if in.GetInstance() == out.GetInstance() {
			out.Pid, out.Calls = in.GetPid(), in.GetCalls()
			out.Checkpoint.CallsSince = in.GetCheckpoint().CallsSince
		}
	}
}

func callStats(s membrane.Stats) *apiv1.CallStats {
	return &apiv1.CallStats{
		Total: s.Calls, Failed: s.Errors, Held: uint64(s.Held), InFlight: uint32(max(0, s.InFlight)), P50Ms: proto.Float64(ms(s.P50)), P99Ms: proto.Float64(ms(s.P99)),
	}
}

func addCalls(sum, one *apiv1.CallStats) {
	sum.Total += one.GetTotal()
	sum.Failed += one.GetFailed()
	sum.Held += one.GetHeld()
	sum.InFlight += one.GetInFlight()
	if one.P50Ms != nil && one.GetP50Ms() > sum.GetP50Ms() {
		sum.P50Ms = one.P50Ms
	}
	if one.P99Ms != nil && one.GetP99Ms() > sum.GetP99Ms() {
		sum.P99Ms = one.P99Ms
	}
}

func interfacesOf(list []*componentv1.Interface, methods *membrane.Methods) []*apiv1.Interface {
	var out []*apiv1.Interface
	for _, i := range list {
		o := &apiv1.Interface{Name: i.GetName(), Service: i.GetService(), Optional: i.GetOptional(), Many: i.GetMany(), Kind: strings.ToLower(strings.TrimPrefix(i.GetKind().String(), "KIND_"))}
		if methods != nil {
			for _, m := range methods.List() {
				if !strings.HasPrefix(m.Name, "/"+i.GetService()+"/") {
					continue
				}
				am := &apiv1.Method{Name: strings.TrimPrefix(m.Name, "/"), ServerStreaming: m.Kind == membrane.KindServerStream, ClientStreaming: m.Kind == membrane.KindStream}
				switch {
				case m.NoSideEffects:
					am.Idempotency = "no side effects"
				case m.Idempotent:
					am.Idempotency = "idempotent"
				case methods.TxnCalls:
					am.Idempotency = "by key"
				}
				if d, err := methods.Descriptor(m.Name); err == nil {
					am.Input, am.Output = string(d.Input().FullName()), string(d.Output().FullName())
				}
				o.Methods = append(o.Methods, am)
			}
		}
		out = append(out, o)
	}
	return out
}

func attributeSpec(desc *componentv1.Description, name string) *componentv1.AttributeSpec {
	for _, a := range desc.GetAttributes() {
		if a.GetName() == name {
			return a
		}
	}
	return nil
}

// attributeInfos lists the attributes of a component as they should be, and where each value comes from.
func attributeInfos(desc *componentv1.Description, s subject) []*apiv1.AttributeInfo {
	var out []*apiv1.AttributeInfo
	for _, a := range desc.GetAttributes() {
		i := &apiv1.AttributeInfo{
			Name: a.GetName(), Value: string(a.GetDefaultJson()), Type: a.GetMessageType(), ReadOnly: a.GetReadOnly(), RestartToApply: a.GetRestartToApply(), Secret: a.GetSecret(), From: "default",
		}
		if v, ok := s.eff.Spec.GetAttributes()[a.GetName()]; ok {
			i.Value, i.From = v, "manifest"
		}
		if _, ok := s.eff.Overlay.GetAttributes()[a.GetName()]; ok {
			i.From = "command"
		}
		if a.GetSecret() {
			i.Value = `""`
		}
		out = append(out, i)
	}
	return out
}

func (n *Node) overlayOut(s subject) *apiv1.Overlay {
	o := s.eff.Overlay
	if o == nil {
		return nil
	}
	nodes := map[string]string{}
	for instance, id := range o.GetNodes() {
		nodes[instance] = n.shownValue(components.OverlayItem{Key: "node of " + instance, Value: id})
	}
	return &apiv1.Overlay{
		Version: o.GetVersion(), Digest: o.GetDigest(), Nodes: nodes, Stopped: o.GetStopped(), Frozen: o.GetFrozen(), Attributes: o.GetAttributes(), Bindings: o.GetBindings(),
	}
}

// bindings lists the required interfaces of a component and where they lead.
func (n *Node) bindings(ctx context.Context, s subject) ([]*apiv1.Binding, error) {
	desc, err := n.description(ctx, s)
	if err != nil {
		return nil, err
	}
	targets, err := n.targets(ctx, s.eff)
	if err != nil {
		return nil, err
	}
	var out []*apiv1.Binding
	for _, r := range desc.GetRequires() {
		b := &apiv1.Binding{Interface: r.GetName(), Service: r.GetService(), Optional: r.GetOptional()}
		if t, ok := targets[r.GetName()]; ok {
			b.Targets, b.Bound, b.From = []string{t}, true, "name"
			if _, ok := s.eff.Spec.GetBindings()[r.GetName()]; ok {
				b.From = "manifest"
			}
			if _, ok := s.eff.Overlay.GetBindings()[r.GetName()]; ok {
				b.From = "command"
			}
			if owners := n.ownersOf(n.instancesOf(t)); len(owners) == 1 {
				b.Node = n.nameOf(owners[0])
			}
		}
		out = append(out, b)
	}
	return out, nil
}

// instancesOf lists the instances a target means.
func (n *Node) instancesOf(target string) []string {
	t, err := components.ParseTarget(target)
	if err != nil {
		return nil
	}
	if t.IsInstance() {
		return []string{t.Instance()}
	}
	var out []string
	for _, reg := range n.arbiter.List(components.InstancePrefix + t.Key()) {
		if name := components.InstanceOfKey(reg.Key); componentOf(name) == t.Key() {
			out = append(out, name)
		}
	}
	return out
}

// checkAttributes has the values checked: by their types, and by a running instance on this node, which may know more.
func (v *verbs) checkAttributes(ctx context.Context, what string, s subject, set map[string]string) error {
	desc, err := v.n.description(ctx, s)
	if err != nil {
		return fail(what, err)
	}
	values := map[string][]byte{}
	for k, val := range set {
		values[k] = []byte(val)
	}
	if err := membrane.CheckAttributes(desc, membrane.NewMethods(desc), values); err != nil {
		return api.Fail(connect.CodeInvalidArgument, what, err.Error(), "coppice attr "+s.component)
	}
	for _, name := range s.instances {
		m := v.n.router.Local(name)
		if m == nil {
			continue
		}
		if _, err := m.SetAttributes(ctx, values, 0, true); err != nil && !membrane.IsUnimplemented(err) {
			return api.Fail(connect.CodeInvalidArgument, what, refusal(err), "coppice attr "+s.component)
		}
	}
	return nil
}

// refusal is what a component said, without the words that gRPC and the membrane put round it.
func refusal(err error) string {
	var st interface{ GRPCStatus() *status.Status }
	if errors.As(err, &st) {
		return st.GRPCStatus().Message()
	}
	return err.Error()
}
