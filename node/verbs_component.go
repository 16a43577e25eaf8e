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
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

func (v *verbs) Start(ctx context.Context, r *apiv1.LifecycleRequest) (*apiv1.LifecycleResponse, error) {
	return v.lifecycle(ctx, "start", r, components.Running, func(o *componentsv1.Overlay) { o.Stopped = false })
}

func (v *verbs) Stop(ctx context.Context, r *apiv1.LifecycleRequest) (*apiv1.LifecycleResponse, error) {
	return v.lifecycle(ctx, "stop", r, components.Stopped, func(o *componentsv1.Overlay) { o.Stopped = true })
}

func (v *verbs) Freeze(ctx context.Context, r *apiv1.LifecycleRequest) (*apiv1.LifecycleResponse, error) {
	return v.lifecycle(ctx, "freeze", r, components.Frozen, func(o *componentsv1.Overlay) { o.Frozen = true })
}

func (v *verbs) Thaw(ctx context.Context, r *apiv1.LifecycleRequest) (*apiv1.LifecycleResponse, error) {
	return v.lifecycle(ctx, "thaw", r, components.Running, func(o *componentsv1.Overlay) { o.Frozen = false })
}

// lifecycle lays a state over the manifest and waits until the instances have it.
func (v *verbs) lifecycle(ctx context.Context, what string, r *apiv1.LifecycleRequest, want components.State, change func(*componentsv1.Overlay)) (*apiv1.LifecycleResponse, error) {
	n, begin := v.n, time.Now()
	s, err := n.find(what, r.GetComponent())
	if err != nil {
		return nil, err
	}
	if (s.eff.EachNode || s.eff.Count > 1) && len(s.instances) == 1 && !slices.Contains([]string{s.component, s.eff.Name}, r.GetComponent()) {
		return nil, api.Fail(connect.CodeFailedPrecondition, what+" "+s.instances[0], "it is one instance of "+s.component+", and what is laid over a manifest holds for all of them",
			"coppice "+what+" "+s.component)
	}
	what += " " + s.component
	if err := n.layOver(ctx, s, change); err != nil {
		return nil, fail(what, err)
	}
	if want == components.Running {
		for _, name := range s.instances {
			if err := n.unquarantine(ctx, name); err != nil {
				return nil, fail(what, err)
			}
		}
	}
	n.events.Publish(events.Event{Channel: "/apps/" + s.component, Type: strings.Fields(what)[0], Trigger: "operator", Message: what})
	timeout := time.Duration(r.GetTimeoutMs()) * time.Millisecond
	if timeout <= 0 {
		timeout = defaultWait
	}
	out := &apiv1.LifecycleResponse{Component: s.component}
	done := n.waitFor(ctx, timeout, func() bool {
		out.Instances = nil
		all := true
		for _, in := range n.instances(s.app.GetName()) {
			if in.GetComponent() != s.component {
				continue
			}
			out.Instances = append(out.Instances, &apiv1.Waiting{Instance: in.GetInstance(), Node: in.GetNode(), State: in.GetState(), Reason: in.GetReason()})
			all = all && in.GetState() == string(want)
		}
		return all
	})
	out.State, out.TookMs = string(want), ms(time.Since(begin))
	if !done {
		var what2 []string
		for _, in := range out.GetInstances() {
			what2 = append(what2, fmt.Sprintf("%s is %s (%s)", in.GetInstance(), in.GetState(), in.GetReason()))
		}
		return nil, api.Fail(connect.CodeDeadlineExceeded, what, fmt.Sprintf("not %s after %s: %s", want, timeout, strings.Join(what2, "; ")), "coppice ps "+s.app.GetName())
	}
	return out, nil
}

// layOver changes what commands laid over a component's manifest.
func (n *Node) layOver(ctx context.Context, s subject, change func(*componentsv1.Overlay)) error {
	key := components.ApplicationRegister(s.app.GetName())
	if err := n.update(ctx, key, func(body []byte) ([]byte, error) {
		app, err := overlaid(body, s.eff.Name, change)
		if err != nil {
			return nil, err
		}
		return proto.Marshal(app)
	}); err != nil {
		return err
	}
	// Other commands of the same client must see it.
	return n.arbiter.Sync(ctx)
}

func overlaid(body []byte, component string, change func(*componentsv1.Overlay)) (*componentsv1.Application, error) {
	var app componentsv1.Application
	if err := proto.Unmarshal(body, &app); err != nil {
		return nil, err
	}
	if app.Overlays == nil {
		app.Overlays = map[string]*componentsv1.Overlay{}
	}
	o := app.Overlays[component]
	if o == nil {
		o = &componentsv1.Overlay{}
	}
	change(o)
	app.Overlays[component] = o
	if proto.Size(o) == 0 {
		delete(app.Overlays, component)
	}
	return &app, nil
}

// unquarantine lets an instance start again after an operator said so.
func (n *Node) unquarantine(ctx context.Context, name string) error {
	err := n.update(ctx, components.InstanceRegister(name), func(b []byte) ([]byte, error) {
		var body componentsv1.InstanceBody
		if err := proto.Unmarshal(b, &body); err != nil {
			return nil, err
		}
		if !body.GetQuarantined() {
			return nil, nil
		}
		body.Quarantined, body.Deaths = false, nil
		return proto.Marshal(&body)
	})
	if errors.Is(err, errNoRegister) {
		return nil
	}
	return err
}

func (v *verbs) Swap(ctx context.Context, r *apiv1.SwapRequest) (*apiv1.ReplaceResponse, error) {
	n, begin := v.n, time.Now()
	s, err := n.find("swap", r.GetComponent())
	if err != nil {
		return nil, err
	}
	what := "swap " + s.component
	art, err := n.wanted(what, s, r.GetVersion())
	if err != nil {
		return nil, err
	}
	if !r.GetForce() {
		desc, err := n.artifacts().Description(ctx, art.GetDigest())
		if err != nil {
			return nil, fail(what, err)
		}
		if breaksEachCall(s.eff, desc) {
			return nil, api.Fail(connect.CodeFailedPrecondition, what,
				fmt.Sprintf("%s@%s does not offer txn-calls, which durable: each-call needs: answers would not wait until they are durable", art.GetName(), art.GetVersion()),
				"deploy it with durable: 5s; or the same with --force, and it is saved every "+components.MinInterval.String())
		}
		if lost := n.unfit(ctx, s.eff.Digest, art.GetDigest()); len(lost) > 0 {
			return nil, api.Fail(connect.CodeFailedPrecondition, what, fmt.Sprintf("%s@%s cannot take the place of %s: %s", art.GetName(), art.GetVersion(), s.eff.Version, strings.Join(lost, "; ")),
				"the same with --force, if nobody calls what is missing")
		}
	}
	if err := n.fitsBindings(ctx, what, s, art); err != nil {
		return nil, err
	}
	out := &apiv1.ReplaceResponse{Component: s.component}
	for _, name := range s.instances {
		res, err := v.onOwner(ctx, what, name, r.GetTimeoutMs(), func(ctx context.Context) (supervisor.Replaced, error) {
			wish, err := n.wish(s, art, "swapped by a command")
			if err != nil {
				return supervisor.Replaced{}, err
			}
			return n.sup.Swap(ctx, name, wish)
		}, func(ctx context.Context, c apiv1connect.ControlClient) (*apiv1.ReplaceResponse, error) {
			return c.Swap(ctx, &apiv1.SwapRequest{Component: name, Version: art.GetDigest(), TimeoutMs: r.GetTimeoutMs(), Force: r.GetForce()})
		})
		if err != nil {
			return nil, err
		}
		merge(out, res, name)
	}
	out.To, out.TookMs = art.GetVersion(), ms(time.Since(begin))
	return out, nil
}

// wanted finds the artifact of a swap: a version or constraint of the component's own artifact, name@constraint, or a digest.
func (n *Node) wanted(what string, s subject, version string) (*componentsv1.Artifact, error) {
	ref := version
	if !strings.HasPrefix(ref, "sha256:") && !strings.Contains(ref, "@") {
		ref = s.eff.ArtifactName + "@" + version
	}
	art, err := components.ResolveArtifact(ref, n.registry.List())
	if err != nil {
		return nil, api.Fail(connect.CodeNotFound, what, err.Error(), "coppice registry show "+s.eff.ArtifactName)
	}
	if _, err := n.pinProgram(what, s.eff.Spec, art); err != nil {
		return nil, err
	}
	return art, nil
}

// fitsBindings checks the bindings of a component, and those that lead to it, as they are with another artifact.
func (n *Node) fitsBindings(ctx context.Context, what string, s subject, art *componentsv1.Artifact) error {
	w, err := n.wiringWith()
	if err != nil {
		return fail(what, err)
	}
	next := *s.eff
	next.Digest, next.ArtifactName, next.Version = art.GetDigest(), art.GetName(), art.GetVersion()
	w.effs[s.component] = &next
	w.affected = func(component string) bool { return component == s.component }
	return w.check(ctx, what)
}

// wish is a swap together with the desired state that says the same.
func (n *Node) wish(s subject, art *componentsv1.Artifact, cause string) (supervisor.Wish, error) {
	reg, ok := n.arbiter.Get(components.ApplicationRegister(s.app.GetName()))
	if !ok {
		return supervisor.Wish{}, fmt.Errorf("%s is gone", s.app.GetName())
	}
	app, err := overlaid(reg.Body, s.eff.Name, func(o *componentsv1.Overlay) {
		o.Digest, o.Version, o.ArtifactName, o.Platforms = art.GetDigest(), art.GetVersion(), art.GetName(), nil
		for _, p := range art.GetPlatforms() {
			o.Platforms = append(o.Platforms, p.GetOsArch())
		}
		for _, p := range s.app.GetPinned() { // back to what is deployed: nothing is laid over it any more
			if p.GetComponent() == s.eff.Name && p.GetDigest() == art.GetDigest() {
				o.Digest, o.Version, o.ArtifactName, o.Platforms = "", "", "", nil
			}
		}
	})
	if err != nil {
		return supervisor.Wish{}, err
	}
	body, err := proto.Marshal(app)
	return supervisor.Wish{Digest: art.GetDigest(), Artifact: art.GetName(), Version: art.GetVersion(), App: body, Revision: reg.Revision, Trigger: "operator", Cause: cause}, err
}

func (v *verbs) Undo(ctx context.Context, r *apiv1.UndoRequest) (*apiv1.ReplaceResponse, error) {
	n, begin := v.n, time.Now()
	s, err := n.find("undo", r.GetComponent())
	if err != nil {
		return nil, err
	}
	what := "undo " + s.component
	out := &apiv1.ReplaceResponse{Component: s.component}
	for _, name := range s.instances {
		res, err := v.onOwner(ctx, what, name, r.GetTimeoutMs(), func(ctx context.Context) (supervisor.Replaced, error) {
			return n.sup.Undo(ctx, name, func(prev *componentsv1.Previous) (supervisor.Wish, error) {
				art, ok := n.registry.Artifact(prev.GetDigest())
				if !ok {
					return supervisor.Wish{}, fmt.Errorf("%s@%s is no longer in the registry", prev.GetArtifactName(), prev.GetVersion())
				}
				return n.wish(s, art, "undone by a command")
			})
		}, func(ctx context.Context, c apiv1connect.ControlClient) (*apiv1.ReplaceResponse, error) {
			return c.Undo(ctx, &apiv1.UndoRequest{Component: name, TimeoutMs: r.GetTimeoutMs()})
		})
		if err != nil {
			return nil, err
		}
		merge(out, res, name)
	}
	out.TookMs = ms(time.Since(begin))
	return out, nil
}

func (v *verbs) Move(ctx context.Context, r *apiv1.MoveRequest) (*apiv1.ReplaceResponse, error) {
	n := v.n
	s, err := n.find("move", r.GetComponent())
	if err != nil {
		return nil, err
	}
	name, err := s.one("move")
	if err != nil {
		return nil, err
	}
	what := "move " + name
	to, err := n.findNode("move to", r.GetNode())
	if err != nil {
		return nil, err
	}
	var res *apiv1.ReplaceResponse
	if owner, err := n.owner(what, name); err == nil && owner == to.ID && api.ForwardedFrom(ctx) == "" {
		// There is nothing to move; it still stays there from now on.
		res = &apiv1.ReplaceResponse{From: to.Name, To: to.Name, Instances: []string{name}}
	} else if res, err = v.onOwner(ctx, what, name, r.GetTimeoutMs(), func(ctx context.Context) (supervisor.Replaced, error) {
		return n.sup.Move(ctx, name, to.ID, supervisor.Wish{Trigger: "operator", Cause: "moved by a command"})
	}, func(ctx context.Context, c apiv1connect.ControlClient) (*apiv1.ReplaceResponse, error) {
		return c.Move(ctx, &apiv1.MoveRequest{Component: name, Node: to.ID.String(), TimeoutMs: r.GetTimeoutMs()})
	}); err != nil {
		return nil, err
	}
	if api.ForwardedFrom(ctx) == "" {
		// It stays where the operator put it, until unpin.
		if err := n.layOver(ctx, s, func(o *componentsv1.Overlay) {
			if o.Nodes == nil {
				o.Nodes = map[string]string{}
			}
			o.Nodes[name] = to.ID.String()
		}); err != nil {
			return nil, fail(what, fmt.Errorf("it was moved, but not pinned there: %w", err))
		}
	}
	res.Component = s.component
	return res, nil
}

// ownersAgree bounds how long a command waits for the nodes' views of who owns an instance to agree, just after it changed its owner.
const ownersAgree = 5 * time.Second

// onOwner runs a replace where the instance is: here, or by the owner's own API. A node that does not own it any more, or does not know yet that it does, has done
// nothing, so the owner is asked for again.
func (v *verbs) onOwner(ctx context.Context, what, name string, timeoutMs uint64, here func(context.Context) (supervisor.Replaced, error),
	there func(context.Context, apiv1connect.ControlClient) (*apiv1.ReplaceResponse, error),
) (*apiv1.ReplaceResponse, error) {
	timeout := time.Duration(timeoutMs) * time.Millisecond
	if timeout <= 0 {
		timeout = defaultWait
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	for until := time.Now().Add(ownersAgree); ; {
		out, err := v.onceOnOwner(ctx, what, name, here, there)
		if connect.CodeOf(err) != connect.CodeAborted || api.ForwardedFrom(ctx) != "" || time.Now().After(until) {
			return out, err
		}
		select {
		case <-ctx.Done():
			return nil, err
		case <-time.After(50 * time.Millisecond):
		}
	}
}

func (v *verbs) onceOnOwner(ctx context.Context, what, name string, here func(context.Context) (supervisor.Replaced, error),
	there func(context.Context, apiv1connect.ControlClient) (*apiv1.ReplaceResponse, error),
) (*apiv1.ReplaceResponse, error) {
	owner, err := v.n.owner(what, name)
	if err != nil {
		return nil, err
	}
	if owner != v.n.id {
		c, err := api.Forward(ctx, v.n, owner.String())
		if err != nil {
			return nil, err
		}
		return there(ctx, c)
	}
	res, err := here(ctx)
	if err != nil {
		return nil, fail(what, err)
	}
	return &apiv1.ReplaceResponse{
		Component: componentOf(name), From: res.From, To: res.To, PauseMs: ms(res.Pause), Bytes: res.Bytes, CallsHeld: res.CallsHeld, TookMs: ms(res.Took), Instances: []string{name},
		State: res.State, Kept: res.Kept,
	}, nil
}

func merge(out, one *apiv1.ReplaceResponse, name string) {
	if out.From == "" {
		out.From = one.GetFrom()
	}
	out.To, out.State, out.Kept = one.GetTo(), one.GetState(), one.GetKept()
	out.PauseMs = max(out.PauseMs, one.GetPauseMs())
	out.Bytes += one.GetBytes()
	out.CallsHeld += one.GetCallsHeld()
	out.Instances = append(out.Instances, name)
}

func (v *verbs) Unpin(ctx context.Context, r *apiv1.UnpinRequest) (*apiv1.UnpinResponse, error) {
	n := v.n
	s, err := n.find("unpin", r.GetComponent())
	if err != nil {
		return nil, err
	}
	out := &apiv1.UnpinResponse{Component: s.component}
	for _, it := range components.Overlays(s.app.Application) {
		if it.Component == s.component {
			out.Cleared = append(out.Cleared, it.Key+"="+n.shownValue(it))
		}
	}
	if err := n.layOver(ctx, s, func(o *componentsv1.Overlay) { proto.Reset(o) }); err != nil {
		return nil, fail("unpin "+s.component, err)
	}
	return out, nil
}

// shownValue is what a command laid over a manifest, for people: a node by its name.
func (n *Node) shownValue(it components.OverlayItem) string {
	if id, err := peer.Decode(it.Value); err == nil && strings.HasPrefix(it.Key, "node of ") {
		return n.nameOf(id)
	}
	return it.Value
}

func (v *verbs) Checkpoint(ctx context.Context, r *apiv1.CheckpointRequest) (*apiv1.CheckpointResponse, error) {
	n, begin := v.n, time.Now()
	s, err := n.find("checkpoint", r.GetComponent())
	if err != nil {
		return nil, err
	}
	name, err := s.one("checkpoint")
	if err != nil {
		return nil, err
	}
	what := "checkpoint " + name
	timeout := time.Duration(r.GetTimeoutMs()) * time.Millisecond
	if timeout <= 0 {
		timeout = defaultWait
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	owner, err := n.owner(what, name)
	if err != nil {
		return nil, err
	}
	if owner != n.id {
		c, err := api.Forward(ctx, n, owner.String())
		if err != nil {
			return nil, err
		}
		return c.Checkpoint(ctx, &apiv1.CheckpointRequest{Component: name, TimeoutMs: r.GetTimeoutMs()})
	}
	saved, id, err := n.sup.Keep(ctx, name)
	if err != nil {
		return nil, fail(what, err)
	}
	out := &apiv1.CheckpointResponse{Component: s.component, Id: id, Seq: saved.Seq, Bytes: saved.Bytes, TookMs: ms(time.Since(begin))}
	for _, h := range saved.Holders {
		out.Replicas = append(out.Replicas, n.nameOf(h))
	}
	return out, nil
}

func (v *verbs) Why(ctx context.Context, r *apiv1.WhyRequest) (*apiv1.WhyResponse, error) {
	n := v.n
	s, err := n.find("why", r.GetComponent())
	if err != nil {
		return nil, err
	}
	out := &apiv1.WhyResponse{Component: s.component}
	for _, name := range s.instances {
		out.Decisions = append(out.Decisions, n.decision(ctx, name))
	}
	return out, nil
}

// ownersOf lists where the instances are, each node once.
func (n *Node) ownersOf(instances []string) []peer.ID {
	var out []peer.ID
	for _, name := range instances {
		if reg, ok := n.arbiter.Get(components.InstanceRegister(name)); ok && reg.Owner != "" && !slices.Contains(out, reg.Owner) {
			out = append(out, reg.Owner)
		}
	}
	return out
}
