package node

import (
	"context"
	"crypto/rand"
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
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	"github.com/coppice-project/coppice/placement"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

const (
	// forkPin keeps the state that a fork begins with until the views of all show its register.
	forkPin = 10 * time.Minute
	// forkCopy bounds the bringing of the state to where the fork will run.
	forkCopy = 10 * time.Minute
)

// origin is what a fork or an export is made from.
type origin struct {
	subject
	instance string
	entry    supervisor.Earlier
	art      *componentsv1.Artifact // the version that the state is for
	durable  componentsv1.Durability
	pin      string
}

// origin finds the checkpoint, or the branch, that is meant and brings its pages here; they are pinned for forkPin.
func (v *verbs) origin(ctx context.Context, what, component string, at *apiv1.Moment) (*origin, error) {
	n := v.n
	s, err := n.find(what, component)
	if err != nil {
		return nil, err
	}
	name, err := s.one(what)
	if err != nil {
		return nil, err
	}
	what += " " + name
	if s.app.GetName() == components.SystemApplication {
		return nil, api.Fail(connect.CodeInvalidArgument, what, "it is part of every node", "")
	}
	if at == nil {
		saved, err := v.Checkpoint(ctx, &apiv1.CheckpointRequest{Component: name})
		switch {
		case err != nil:
			return nil, err
		case saved.GetId() == "":
			return nil, api.Fail(connect.CodeFailedPrecondition, what, "its manifest says history: 0, so none of its checkpoints is kept", "state: {history: 1} in the manifest")
		}
		at = &apiv1.Moment{Id: saved.GetId()}
	}
	m, err := n.moment(what, at)
	if err != nil {
		return nil, err
	}
	o := &origin{subject: s, instance: name, pin: "fork/" + rand.Text()}
	if err := o.find(ctx, n, m); err != nil {
		return nil, failHistory(what, name, err)
	}
	return o, nil
}

func (o *origin) find(ctx context.Context, n *Node, m components.Moment) error {
	var err error
	if o.entry, err = supervisor.FindEarlier(ctx, n.arbiter, o.instance, m); err != nil {
		return err
	}
	root, err := blobs.ParseHash(o.entry.GetRoot())
	if err != nil {
		return err
	}
	n.blobs.Pin(o.pin, forkPin, root)
	if err := n.blobs.Fetch(ctx, root, n.aliveIDs()); err != nil {
		return fmt.Errorf("its pages: %w", err)
	}
	n.blobs.Pin(o.pin, forkPin, root)
	return o.version(ctx, n)
}

// version is today's where that can read the state, else the one that wrote it.
func (o *origin) version(ctx context.Context, n *Node) error {
	for _, p := range o.app.GetPinned() {
		if p.GetComponent() == o.eff.Name {
			o.durable = p.GetDurable()
		}
	}
	if o.eff.Digest == components.ExecDigest { // every node has what runs it
		o.art = &componentsv1.Artifact{Digest: components.ExecDigest, Name: components.ExecName, Version: n.cfg.Version}
		return nil
	}
	why := error(nil)
	for _, digest := range []string{o.eff.Digest, o.entry.GetDigest()} {
		art, ok := n.registry.Artifact(digest)
		if !ok {
			why = fmt.Errorf("%s is no longer in the registry", digest)
			continue
		}
		desc, err := n.artifacts().Description(ctx, digest)
		if err != nil {
			why = err
			continue
		}
		schema := o.entry.GetSchema()
		if st := desc.GetState(); schema == 0 || schema == st.GetWritesSchema() || slices.Contains(st.GetReadsSchemas(), schema) {
			o.art = art
			return nil
		}
		why = fmt.Errorf("version %s cannot read schema %d", art.GetVersion(), schema)
	}
	return fmt.Errorf("no version of it can read the state of %s: %w", o.entry.Name, why)
}

// spec is the manifest's part of a fork: what the origin is now, but alone, and not exposed. In another application it names what it is bound to in full.
func (o *origin) spec(app, name string) *componentsv1.ComponentSpec {
	var out *componentsv1.ComponentSpec
	for _, c := range o.app.GetManifest().GetComponents() {
		if c.GetName() == o.eff.Name {
			out = proto.CloneOf(c)
		}
	}
	out.Name, out.Count, out.Expose = name, "", nil
	if o.art.GetDigest() != components.ExecDigest {
		out.Artifact = o.art.GetName() + "@" + o.art.GetVersion()
	}
	out.Attributes, out.Bindings = o.eff.Spec.GetAttributes(), o.eff.Spec.GetBindings()
	if app == o.app.GetName() {
		return out
	}
	out.Near = nil
	for k, to := range out.GetBindings() {
		if !strings.Contains(to, "/") {
			out.Bindings[k] = o.app.GetName() + "/" + to
		}
	}
	return out
}

// into is the application that holds the fork: the one that is there, or a new one, with the origin's constraints.
func (o *origin) into(old *componentsv1.Application, app, name string) *componentsv1.Application {
	next := proto.CloneOf(old)
	if old == nil {
		from := o.app.GetManifest()
		next = &componentsv1.Application{
			Format: components.ApplicationFormat, Name: app,
			Manifest: &componentsv1.Manifest{Application: app, Require: from.GetRequire(), Objective: from.GetObjective(), Cost: from.GetCost()},
		}
	}
	next.Version++
	next.Manifest.Components = append(next.Manifest.Components, o.spec(app, name))
	pinned := &componentsv1.Pinned{Component: name, Digest: o.art.GetDigest(), Name: o.art.GetName(), Version: o.art.GetVersion(), Durable: o.durable}
	for _, p := range o.art.GetPlatforms() {
		pinned.Platforms = append(pinned.Platforms, p.GetOsArch())
	}
	next.Pinned = append(next.Pinned, pinned)
	return next
}

// forkName reads what a fork is to be: a name beside the origin, or application/name.
func forkName(what, app, as string) (string, string, error) {
	name := as
	if a, rest, ok := strings.Cut(as, "/"); ok {
		app, name = a, rest
	}
	err := components.CheckName(app)
	if err == nil {
		err = components.CheckComponentName(name)
	}
	if err == nil && app == components.SystemApplication {
		err = fmt.Errorf("%s is part of every node", app)
	}
	if err != nil {
		return "", "", api.Fail(connect.CodeInvalidArgument, what, err.Error(), "--as NAME or --as APPLICATION/NAME")
	}
	return app, name, nil
}

// Fork makes a component with the state of another one's earlier checkpoint.
func (v *verbs) Fork(ctx context.Context, r *apiv1.ForkRequest) (*apiv1.ForkResponse, error) {
	n, begin, what := v.n, time.Now(), "fork "+r.GetComponent()
	timeout := time.Duration(r.GetTimeoutMs()) * time.Millisecond
	if timeout <= 0 {
		timeout = defaultWait
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := n.mayChange(); err != nil {
		return nil, fail(what, err)
	}
	s, err := n.find("fork", r.GetComponent())
	if err != nil {
		return nil, err
	}
	app, name, err := forkName(what, s.app.GetName(), r.GetAs())
	if err != nil {
		return nil, err
	}
	if err := n.free(ctx, what, app, name); err != nil { // before anything is done
		return nil, err
	}
	o, err := v.origin(ctx, "fork", r.GetComponent(), r.GetAt())
	if err != nil {
		return nil, err
	}
	old, have := n.application(app)
	b := &beginning{
		n: n, what: what, next: o.into(old.Application, app, name), name: name, root: blobs.Hash(o.entry.GetRoot()),
		cause: fmt.Sprintf("forked from %s of %s", o.entry.Name, o.instance),
	}
	if have {
		b.revision = old.revision
	}
	to, err := b.commit(ctx)
	if err != nil {
		return nil, err
	}
	out := &apiv1.ForkResponse{
		Component: components.ComponentKey(app, name), From: o.instance, Id: o.entry.Name, Seq: o.entry.GetSeq(),
		Artifact: o.art.GetName(), Version: o.art.GetVersion(), Node: n.nameOf(to), Bytes: o.entry.GetBytes(),
	}
	err = b.running(ctx)
	out.TookMs = ms(time.Since(begin))
	return out, err
}

// free says that a component may be made: nobody has its name.
func (n *Node) free(ctx context.Context, what, app, name string) error {
	if err := n.arbiter.Sync(ctx); err != nil {
		return fail(what, err)
	}
	key := components.ComponentKey(app, name)
	taken := func(why, try string) error { return api.Fail(connect.CodeAlreadyExists, what, why, try) }
	a, ok := n.application(app)
	switch {
	case ok && a.GetRemoving():
		return taken(app+" is being removed", "the same command once coppice apps no longer lists it")
	case ok && slices.ContainsFunc(a.GetManifest().GetComponents(), func(c *componentsv1.ComponentSpec) bool { return c.GetName() == name }):
		return taken("there is a component "+key+" already", "--as with another name")
	case len(n.instancesOf(key)) > 0:
		return taken("what was "+key+" is still being removed", "the same command once coppice ps no longer lists it")
	}
	return nil
}

// beginning is a component that begins with a state.
type beginning struct {
	n        *Node
	what     string
	next     *componentsv1.Application
	revision uint64 // of the application that is there; 0: there is none
	name     string
	root     blobs.Hash
	cause    string
	// more goes into the same transaction.
	compares []arbiter.Compare
	ops      []arbiter.Op
	at       peer.ID // where it is to run; "": where placement says
}

func (b *beginning) instance() string { return components.InstanceName(b.next.GetName(), b.name, 0) }

// where asks the solver for the fork's place, as a plan does.
func (b *beginning) where(ctx context.Context) (members.Member, error) {
	n := b.n
	if b.at == "" {
		_, plan, err := n.coord.Plan(ctx, placement.Whatif{Application: b.next})
		if err != nil {
			return members.Member{}, api.Fail(connect.CodeUnavailable, b.what, err.Error(), "coppice status")
		}
		at := slices.IndexFunc(plan.GetAssignments(), func(a *placementv1.Assignment) bool { return a.GetInstance() == b.instance() })
		if at < 0 || plan.GetAssignments()[at].GetNode() == "" {
			why := []string{"no node can run it"}
			if at >= 0 {
				for _, r := range plan.GetAssignments()[at].GetRefused() {
					why = append(why, fmt.Sprintf("%s: %s %s", n.nameText(r.GetNode()), r.GetConstraint(), r.GetDetail()))
				}
			}
			return members.Member{}, api.Fail(connect.CodeFailedPrecondition, b.what, strings.Join(why, "; "), "coppice why")
		}
		if b.at, err = peer.Decode(plan.GetAssignments()[at].GetNode()); err != nil {
			return members.Member{}, err
		}
	}
	m, ok := n.members.Member(b.at)
	if !ok || m.State != members.Alive {
		return m, api.Fail(connect.CodeUnavailable, b.what, n.nameOf(b.at)+", where it is to run, is not alive", "the same command again")
	}
	return m, nil
}

// commit brings the state to where it is to run and makes the component part of desired state, in one transaction with its instance, which owns the state.
func (b *beginning) commit(ctx context.Context) (peer.ID, error) {
	n, named := b.n, 0
	for _, c := range b.next.GetManifest().GetComponents() {
		named += btoi(c.GetName() == b.name)
	}
	if named > 1 { // it was made meanwhile
		return "", api.Fail(connect.CodeAlreadyExists, b.what, "there is a component "+components.ComponentKey(b.next.GetName(), b.name)+" already", "--as with another name")
	}
	m, err := b.where(ctx)
	if err != nil {
		return "", err
	}
	cctx, cancel := context.WithTimeout(ctx, forkCopy)
	kept, err := n.blobs.Push(cctx, b.root, []peer.ID{m.ID}, 1)
	cancel()
	if err != nil {
		return "", fail(b.what, fmt.Errorf("copy the state to %s: %w", m.Name, err))
	}
	eff, err := components.EffectiveOf(b.next, b.name)
	if err != nil {
		return "", fail(b.what, err)
	}
	first := components.FirstBody(components.InstanceSpec{Name: b.instance(), Component: eff}, n.clusterNow())
	first.Trigger, first.Cause = "operator", b.cause
	body, err := proto.Marshal(first)
	if err != nil {
		return "", err
	}
	app, err := proto.Marshal(b.next)
	if err != nil {
		return "", err
	}
	key, inst := components.ApplicationRegister(b.next.GetName()), components.InstanceRegister(b.instance())
	res, err := n.arbiter.Txn(ctx, arbiter.TxnRequest{
		Nonce:    n.nonce(),
		Compares: append([]arbiter.Compare{{Key: key, Field: "revision", Equal: b.revision}, {Key: inst, Field: "exists", Equal: 0}}, b.compares...),
		Then: append([]arbiter.Op{
			{Claim: &arbiter.ClaimRequest{Key: inst, Nonce: n.nonce(), Owner: m.ID, Boot: m.Boot, Body: body, SetRoot: true, Root: b.root[:], Holders: kept}},
			{Put: &arbiter.PutOp{Key: key, Body: app}},
		}, b.ops...),
	})
	switch {
	case err != nil:
		return "", fail(b.what, err)
	case !res.Succeeded:
		return "", api.Fail(connect.CodeAborted, b.what, "somebody else changed the desired state meanwhile", "the same command again")
	}
	for _, reg := range res.Registers {
		n.sup.Adopt(reg)
	}
	n.coord.Trigger()
	n.events.Publish(events.Event{
		Channel: "/apps/" + b.instance(), Type: "forked", Trigger: "operator", Cause: b.cause, Message: fmt.Sprintf("%s begins on %s: %s", b.instance(), m.Name, b.cause),
	})
	return m.ID, nil
}

// running waits until it does.
func (b *beginning) running(ctx context.Context) error {
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(defaultWait)
	}
	reason := "it is not known yet"
	if b.n.waitFor(ctx, time.Until(deadline)-100*time.Millisecond, func() bool {
		for _, in := range b.n.instances(b.next.GetName()) {
			if in.GetInstance() == b.instance() {
				reason = in.GetState() + " (" + in.GetReason() + ")"
				return in.GetState() == string(components.Running)
			}
		}
		return false
	}) {
		return nil
	}
	return api.Fail(connect.CodeDeadlineExceeded, b.what, b.instance()+" was made, and does not run yet: "+reason, "coppice why "+components.ComponentKey(b.next.GetName(), b.name))
}
