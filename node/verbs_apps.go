package node

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

const defaultWait = time.Minute

func (v *verbs) Deploy(ctx context.Context, r *apiv1.DeployRequest, s *connect.ServerStream[apiv1.DeployUpdate]) error {
	begin := time.Now()
	apps, err := v.n.desire(ctx, r.GetFile(), r.GetManifest(), r.GetArtifacts())
	if err != nil {
		return fail("deploy "+r.GetFile(), err)
	}
	update, err := v.n.commitApps(ctx, apps)
	if err != nil {
		return fail("deploy "+r.GetFile(), err)
	}
	update.TookMs, update.Done = ms(time.Since(begin)), !r.GetWait()
	if err := s.Send(update); err != nil || !r.GetWait() {
		return err
	}
	timeout := time.Duration(r.GetTimeoutMs()) * time.Millisecond
	if timeout <= 0 {
		timeout = defaultWait
	}
	return v.n.waitHealthy(ctx, apps, timeout, begin, s.Send)
}

// waitHealthy reports until every instance of the applications runs as deployed.
func (n *Node) waitHealthy(ctx context.Context, apps []*desired, timeout time.Duration, begin time.Time, send func(*apiv1.DeployUpdate) error) error {
	var last string
	var sendErr error
	var waiting []*apiv1.Waiting
	healthy := n.waitFor(ctx, timeout, func() bool {
		waiting = nil
		for _, a := range apps {
			waiting = append(waiting, n.waiting(a.next.GetName())...)
		}
		if len(waiting) == 0 {
			return true
		}
		if words := fmt.Sprint(waiting); words != last && sendErr == nil {
			last = words
			sendErr = send(&apiv1.DeployUpdate{Waiting: waiting, TookMs: ms(time.Since(begin))})
		}
		return sendErr != nil
	})
	if sendErr != nil {
		return sendErr
	}
	if ctx.Err() != nil && !healthy {
		return ctx.Err()
	}
	if healthy {
		return send(&apiv1.DeployUpdate{Healthy: true, Done: true, TookMs: ms(time.Since(begin))})
	}
	var what []string
	for _, w := range waiting {
		what = append(what, fmt.Sprintf("%s is %s: %s", w.GetInstance(), w.GetState(), w.GetReason()))
	}
	return api.Fail(connect.CodeDeadlineExceeded, "deploy", fmt.Sprintf("not healthy after %s: %s", timeout, strings.Join(what, "; ")), "coppice why "+componentOf(waiting[0].GetInstance()))
}

// waiting lists the instances of an application that do not run as they should.
func (n *Node) waiting(app string) []*apiv1.Waiting {
	a, ok := n.application(app)
	if !ok {
		return []*apiv1.Waiting{{Instance: app, State: string(components.Pending), Reason: "this node does not see the application yet"}}
	}
	want := map[string]*components.Effective{}
	if expected, err := components.Expected(a.Application, n.modelNodes()); err == nil {
		for _, e := range expected {
			want[e.Name] = e.Component
		}
	}
	var out []*apiv1.Waiting
	for _, in := range n.instances(app) {
		eff := want[in.GetInstance()]
		switch {
		case eff == nil:
			out = append(out, &apiv1.Waiting{Instance: in.GetInstance(), Node: in.GetNode(), State: in.GetState(), Reason: "it is being removed"})
		case eff.Stopped && in.GetState() == string(components.Stopped), eff.Frozen && in.GetState() == string(components.Frozen):
		case in.GetState() != string(components.Running):
			out = append(out, &apiv1.Waiting{Instance: in.GetInstance(), Node: in.GetNode(), State: in.GetState(), Reason: in.GetReason()})
		case in.GetVersion() != eff.Version:
			out = append(out, &apiv1.Waiting{Instance: in.GetInstance(), Node: in.GetNode(), State: in.GetState(), Reason: fmt.Sprintf("it runs %s, %s is wanted", in.GetVersion(), eff.Version)})
		}
	}
	return out
}

// desired is one application as a deploy wants it.
type desired struct {
	old     application
	have    bool
	next    *componentsv1.Application
	cleared []components.OverlayItem
	changed bool
}

// desire reads a manifest file and works out what the applications become. Nothing is written.
func (n *Node) desire(ctx context.Context, file string, manifest []byte, local []*apiv1.LocalArtifact) ([]*desired, error) {
	list, err := components.ParseManifests(file, manifest)
	if err != nil {
		return nil, api.Fail(connect.CodeInvalidArgument, "read "+file, strings.ReplaceAll(err.Error(), "\n", " · "), "")
	}
	digests := map[string]string{}
	for _, l := range local {
		digests[l.GetPath()] = l.GetDigest()
	}
	available := n.registry.List()
	var out []*desired
	for _, m := range list {
		d := &desired{}
		d.old, d.have = n.application(m.GetApplication())
		if d.have && d.old.GetRemoving() {
			return nil, api.Fail(connect.CodeFailedPrecondition, "deploy "+m.GetApplication(), "it is being removed; wait until coppice apps no longer lists it", "")
		}
		var pinned []*componentsv1.Pinned
		for _, spec := range m.GetComponents() {
			p, err := n.pin(ctx, m.GetApplication(), spec, digests, available)
			if err != nil {
				return nil, err
			}
			pinned = append(pinned, p)
		}
		var old *componentsv1.Application
		if d.have {
			old = d.old.Application
		}
		d.next, d.cleared = components.Redeploy(old, m, pinned)
		d.changed = !d.have || !sameDesired(old, d.next)
		out = append(out, d)
	}
	next := make([]*componentsv1.Application, 0, len(out))
	for _, d := range out {
		next = append(next, d.next)
	}
	w, err := n.wiringWith(next...)
	if err != nil {
		return nil, err
	}
	return out, w.check(ctx, "read "+file)
}

func sameDesired(a, b *componentsv1.Application) bool {
	x, y := proto.CloneOf(a), proto.CloneOf(b)
	x.Version, y.Version = 0, 0
	return proto.Equal(x, y)
}

// pin fixes the artifact of one component and checks that it can be what the manifest wants.
func (n *Node) pin(ctx context.Context, app string, spec *componentsv1.ComponentSpec, local map[string]string, available []*componentsv1.Artifact) (*componentsv1.Pinned, error) {
	what := "deploy " + components.ComponentKey(app, spec.GetName())
	ref := spec.GetArtifact()
	if ref == "" {
		return n.pinInstalled(what, spec)
	}
	digest, isFile := local[ref]
	if isFile {
		ref = digest
	}
	art, err := components.ResolveArtifact(ref, available)
	if err != nil && isFile {
		return nil, api.Fail(connect.CodeNotFound, what, "the registry does not have the file "+spec.GetArtifact()+" yet, and only what was pushed and described can be planned",
			"coppice registry push "+spec.GetArtifact())
	}
	if err != nil {
		return nil, api.Fail(connect.CodeNotFound, what, err.Error(), "coppice registry list")
	}
	desc, err := n.pinProgram(what, spec, art)
	if err == nil && desc == nil {
		if desc, err = n.registry.Description(ctx, art.GetDigest()); err != nil {
			err = fail(what, err)
		}
	}
	if err != nil {
		return nil, err
	}
	durable, err := components.ResolveDurability(spec, desc)
	if err != nil {
		return nil, fail(what, err)
	}
	if durable == componentsv1.Durability_DURABILITY_EACH_CALL && !slices.Contains(desc.GetFeatures(), componentv1.FeatureTxnCalls) {
		return nil, api.Fail(connect.CodeFailedPrecondition, what, art.GetName()+" does not offer "+componentv1.FeatureTxnCalls+", which durable: each-call needs", "durable: 5s")
	}
	for name := range spec.GetAttributes() {
		if !slices.ContainsFunc(desc.GetAttributes(), func(a *componentv1.AttributeSpec) bool { return a.GetName() == name }) {
			return nil, api.Fail(connect.CodeInvalidArgument, what, fmt.Sprintf("%s has no attribute %q; it has %s", art.GetName(), name, attributeNames(desc)), "coppice registry show "+art.GetName())
		}
	}
	p := &componentsv1.Pinned{Component: spec.GetName(), Digest: art.GetDigest(), Name: art.GetName(), Version: art.GetVersion(), Durable: durable}
	for _, pl := range art.GetPlatforms() {
		p.Platforms = append(p.Platforms, pl.GetOsArch())
	}
	return p, nil
}

func attributeNames(d *componentv1.Description) string {
	var out []string
	for _, a := range d.GetAttributes() {
		out = append(out, a.GetName())
	}
	return listed(out)
}

// listed are names in a sentence.
func listed(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// commitApps makes what a file wants the desired state, all of its applications in one transaction.
func (n *Node) commitApps(ctx context.Context, apps []*desired) (*apiv1.DeployUpdate, error) {
	if err := n.mayChange(); err != nil {
		return nil, err
	}
	var compares []arbiter.Compare
	var ops []arbiter.Op
	out := &apiv1.DeployUpdate{}
	for _, d := range apps {
		out.Applications = append(out.Applications, d.deployed())
		if !d.changed {
			continue
		}
		body, err := proto.Marshal(d.next)
		if err != nil {
			return nil, err
		}
		key := components.ApplicationRegister(d.next.GetName())
		compares = append(compares, arbiter.Compare{Key: key, Field: "revision", Equal: d.old.revision})
		ops = append(ops, arbiter.Op{Put: &arbiter.PutOp{Key: key, Body: body}})
	}
	if len(ops) == 0 {
		return out, nil
	}
	res, err := n.arbiter.Txn(ctx, arbiter.TxnRequest{Nonce: n.nonce(), Compares: compares, Then: ops})
	if err != nil {
		return nil, err
	}
	if !res.Succeeded {
		return nil, api.Fail(connect.CodeAborted, "deploy", "somebody else changed the desired state meanwhile", "coppice plan, then deploy again")
	}
	for _, d := range apps {
		if d.changed {
			n.events.Publish(events.Event{
				Channel: "/apps/" + d.next.GetName(), Type: "deployed", Trigger: "operator", Message: fmt.Sprintf("%s version %d deployed", d.next.GetName(), d.next.GetVersion()),
			})
		}
	}
	// The answer is given once this node sees it too, so that the next command does not look at the state before.
	n.waitFor(ctx, 5*time.Second, func() bool {
		for _, d := range apps {
			if a, ok := n.application(d.next.GetName()); !ok || (d.changed && a.GetVersion() < d.next.GetVersion()) {
				return false
			}
		}
		return true
	})
	return out, nil
}

func (d *desired) deployed() *apiv1.DeployedApplication {
	out := &apiv1.DeployedApplication{Application: d.next.GetName(), Version: d.next.GetVersion(), Changed: d.changed}
	if !d.changed {
		out.Version = d.old.GetVersion()
	}
	was := map[string]*componentsv1.Pinned{}
	if d.have {
		for _, p := range d.old.GetPinned() {
			was[p.GetComponent()] = p
		}
	}
	for i, p := range d.next.GetPinned() {
		spec := d.next.GetManifest().GetComponents()[i]
		c := &apiv1.DeployedComponent{Component: components.ComponentKey(d.next.GetName(), p.GetComponent()), Artifact: p.GetName(), Version: p.GetVersion(), Digest: p.GetDigest(), Change: "added"}
		if count, each, err := components.ParseCount(spec.GetCount()); err == nil && !each {
			c.Instances = uint32(count)
		}
		if old := was[p.GetComponent()]; old != nil {
			c.Change = "unchanged"
			if d.changed && (old.GetDigest() != p.GetDigest() || !slices.ContainsFunc(d.old.GetManifest().GetComponents(), func(o *componentsv1.ComponentSpec) bool { return proto.Equal(o, spec) })) {
				c.Change = "updated"
			}
			delete(was, p.GetComponent())
		}
		out.Components = append(out.Components, c)
	}
	for name, p := range was {
		out.Components = append(out.Components, &apiv1.DeployedComponent{Component: components.ComponentKey(d.next.GetName(), name), Artifact: p.GetName(), Version: p.GetVersion(), Change: "removed"})
	}
	return out
}

func (v *verbs) Remove(ctx context.Context, r *apiv1.RemoveRequest) (*apiv1.RemoveResponse, error) {
	begin, n := time.Now(), v.n
	app, what := r.GetApplication(), "remove "+r.GetApplication()
	if app == components.SystemApplication {
		return nil, api.Fail(connect.CodeFailedPrecondition, what, "the cluster needs it", "")
	}
	a, ok := n.application(app)
	if !ok {
		return nil, api.Fail(connect.CodeNotFound, what, "there is no such application", "coppice apps")
	}
	out := &apiv1.RemoveResponse{Application: app}
	for _, c := range a.GetManifest().GetComponents() {
		out.Components = append(out.Components, components.ComponentKey(app, c.GetName()))
	}
	err := n.update(ctx, components.ApplicationRegister(app), func(body []byte) ([]byte, error) {
		var a componentsv1.Application
		if err := proto.Unmarshal(body, &a); err != nil {
			return nil, err
		}
		a.Removing = true
		return proto.Marshal(&a)
	})
	if err != nil && !errors.Is(err, errNoRegister) {
		return nil, fail(what, err)
	}
	n.events.Publish(events.Event{Channel: "/apps/" + app, Type: "removing", Trigger: "operator", Message: app + " is being removed"})
	timeout := time.Duration(r.GetTimeoutMs()) * time.Millisecond
	if timeout <= 0 {
		timeout = defaultWait
	}
	if r.GetWait() {
		out.Done = n.waitFor(ctx, timeout, func() bool { _, ok := n.application(app); return !ok })
		if !out.Done {
			return nil, api.Fail(connect.CodeDeadlineExceeded, what, fmt.Sprintf("still there after %s: %s", timeout, instanceList(n.instances(app))), "coppice ps "+app)
		}
	}
	out.TookMs = ms(time.Since(begin))
	return out, nil
}

func instanceList(list []*apiv1.Instance) string {
	var names []string
	for _, in := range list {
		names = append(names, in.GetInstance()+" on "+in.GetNode())
	}
	return strings.Join(names, ", ")
}

func (v *verbs) Apps(context.Context, *apiv1.AppsRequest) (*apiv1.AppsResponse, error) {
	out := &apiv1.AppsResponse{}
	all := v.n.instances("")
	for _, a := range v.n.applications() {
		app := &apiv1.App{Application: a.GetName(), Version: a.GetVersion(), Components: uint32(len(a.GetManifest().GetComponents()))}
		states := map[components.State]uint32{}
		for _, in := range all {
			if in.GetApplication() != a.GetName() {
				continue
			}
			app.Instances++
			states[components.State(in.GetState())]++
			if in.GetState() != string(components.Running) && app.Reason == "" && in.GetReason() != "" {
				app.Reason = in.GetInstance() + ": " + in.GetReason()
			}
		}
		app.Running = states[components.Running] + states[components.Degraded]
		switch {
		case a.GetRemoving():
			app.State = "removing"
		case states[components.Failed] > 0:
			app.State = "failed"
		case app.Instances > 0 && states[components.Stopped] == app.Instances:
			app.State = "stopped"
		case states[components.Degraded] > 0:
			app.State = "degraded"
		case app.Running == app.Instances:
			app.State, app.Reason = "running", ""
		default:
			app.State = "deploying"
		}
		for _, c := range a.GetManifest().GetComponents() {
			for _, path := range c.GetExpose() {
				app.Urls = append(app.Urls, "/app/"+a.GetName()+path)
			}
		}
		slices.Sort(app.Urls)
		out.Apps = append(out.Apps, app)
	}
	return out, nil
}

func (v *verbs) Ps(_ context.Context, r *apiv1.PsRequest) (*apiv1.PsResponse, error) {
	if app := r.GetApplication(); app != "" {
		if _, ok := v.n.application(app); !ok {
			return nil, api.Fail(connect.CodeNotFound, "ps "+app, "there is no such application", "coppice apps")
		}
	}
	list := v.n.instances(r.GetApplication())
	if r.GetApplication() == "" {
		list = slices.DeleteFunc(list, func(in *apiv1.Instance) bool { return in.GetApplication() == components.SystemApplication })
	}
	return &apiv1.PsResponse{Instances: list}, nil
}
