package supervisor

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/events"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// applied is what desired state was last given to the process.
type applied struct {
	attributes map[string]string
	bindings   map[string]string
	frozen     bool
	durable    componentsv1.Durability
	interval   time.Duration
}

func appliedFrom(eff *components.Effective) applied {
	return applied{
		attributes: maps.Clone(eff.Spec.GetAttributes()), bindings: maps.Clone(eff.Spec.GetBindings()), frozen: eff.Frozen,
		durable: eff.Durable, interval: eff.Interval,
	}
}

// keep compares a running process with what it should be.
func (i *instance) keep(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective) time.Duration {
	g := i.gen
	i.mu.Lock()
	i.info.Settled = body.GetSettled()
	h := i.hung
	i.mu.Unlock()
	if err, ended := g.saver.over(); ended {
		return i.saverEnded(ctx, reg, eff, err)
	}
	token := tokenIn(reg)
	switch {
	case g.dead():
		i.died()
		return time.Millisecond
	case token.Compare(g.token) < 0:
		return 20 * time.Millisecond // the local view is behind what a claim answered
	case token.Compare(g.token) > 0:
		return i.retoken(ctx, reg, eff)
	case h != nil && h.process == g.back && i.hangs(ctx, h):
		return time.Millisecond
	case i.quiet:
		return i.unrest(ctx)
	case i.behind(body, eff):
		return i.follow(ctx, reg, body, eff)
	case g.run != nil && !eff.Frozen && !proto.Equal(g.run, eff.Spec.GetRun()) && g.digest == eff.Digest:
		return i.rerun(ctx)
	case eff.Frozen != i.applied.frozen:
		return i.freeze(ctx, eff)
	case !maps.Equal(eff.Spec.GetAttributes(), i.applied.attributes):
		return i.attributes(ctx, eff)
	case !maps.Equal(eff.Spec.GetBindings(), i.applied.bindings):
		return i.rebind(eff)
	case eff.Durable != i.applied.durable || eff.Interval != i.applied.interval:
		return i.retoken(ctx, reg, eff)
	}
	i.health(body, eff)
	if body.GetSettled() {
		return 0
	}
	if wait := i.sup.cfg.Settle - time.Since(g.since); wait > 0 {
		return wait
	}
	return i.settle(ctx, reg, body)
}

// behind says whether another version than the running one is desired and worth a try now.
func (i *instance) behind(body *componentsv1.InstanceBody, eff *components.Effective) bool {
	return eff.Digest != i.gen.digest && eff.Digest != "" && i.refused[eff.Digest] == "" && eff.Digest != body.GetReturnedFrom() && !eff.Frozen &&
		!time.Now().Before(i.follows.until)
}

// saverEnded: the epoch was fenced, the log has another checkpoint, or the saver was stopped to be replaced.
func (i *instance) saverEnded(ctx context.Context, reg arbiter.Register, eff *components.Effective, err error) time.Duration {
	if !errors.Is(err, errFenced) {
		if ctx.Err() != nil {
			return 0
		}
		if errors.Is(err, errForeign) {
			return i.relaunch("the log has a checkpoint that its process did not write")
		}
		return i.retoken(ctx, reg, eff)
	}
	rctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	now, ok, rerr := i.sup.cfg.Arbiter.Read(rctx, i.key)
	if rerr == nil && ok {
		i.sup.adopt(now)
		if now.Owner != i.sup.cfg.Self {
			return i.fenced(now)
		}
	}
	return i.relaunch("its epoch is over")
}

// retoken continues the running process in a newer epoch of the same owner, or under another durability. It needs to be the state that the
// log names.
func (i *instance) retoken(ctx context.Context, reg arbiter.Register, eff *components.Effective) time.Duration {
	g := i.gen
	sctx, cancel := context.WithTimeout(ctx, settleWithin)
	defer cancel()
	g.stopSaver()
	err := g.saver.settle(sctx)
	var now arbiter.Register
	if err == nil {
		now, _, err = i.sup.cfg.Arbiter.Read(sctx, i.key)
	}
	switch {
	case err != nil:
		i.show(components.Degraded, "it cannot be saved now: "+err.Error())
		return 100 * time.Millisecond
	case now.Epoch != reg.Epoch || now.Owner != i.sup.cfg.Self:
		i.sup.adopt(now)
		return 20 * time.Millisecond
	}
	saved, _ := g.saver.Saved()
	if now.Seq != saved.Seq || hashFrom(now.Root) != saved.Root {
		return i.relaunch("another checkpoint was made its state")
	}
	have := g.saver.keepers()
	g.head, g.saved, g.token = g.lastHead(), saved, tokenIn(now)
	i.save(g, now, eff, have)
	if now.Boot == i.sup.cfg.Boot {
		i.sup.service(i.name).stale.Store(false) // it ran on without the arbiter over a restart of this node
	}
	if err := i.mem().SetToken(tokenOf(g.token)); err != nil {
		return i.relaunch("the membrane does not take the new epoch: " + err.Error())
	}
	i.mem().SetDurable(waits(g, eff))
	frozen := i.applied.frozen
	i.note(g, eff)
	i.applied.frozen = frozen
	return time.Millisecond
}

// follow swaps to the version that is desired now. A version that fails is not tried again until desired state changes; what was not its
// fault is tried again after a while.
func (i *instance) follow(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective) time.Duration {
	_, err := i.swap(ctx, reg, body, eff, swapPlan{digest: eff.Digest, artifact: eff.ArtifactName, version: eff.Version, trigger: "operator", cause: "deployed", again: true, why: components.WhyBeforeSwap})
	if err == nil {
		return time.Millisecond
	}
	if ctx.Err() != nil || i.gen == nil {
		return time.Millisecond
	}
	if _, unfit := errors.AsType[*versionError](err); unfit {
		i.refused[eff.Digest] = err.Error()
	}
	i.follows.failed(err)
	i.sup.cfg.Log.Warn("the desired version does not come up; the old one goes on", "instance", i.name, "version", eff.Version, "error", err)
	i.sup.cfg.Events.Publish(events.Event{
		Channel: "/apps/" + i.name, Type: "swap-failed", Trigger: "operator", Cause: err.Error(),
		Message: fmt.Sprintf("%s stays on %s: %s did not come up", i.name, i.gen.version, eff.Version),
	})
	return time.Millisecond
}

const whyFrozen = "frozen by a command; try coppice thaw "

func (i *instance) freeze(ctx context.Context, eff *components.Effective) time.Duration {
	ctx, cancel := context.WithTimeout(ctx, 2*drainDeadline)
	defer cancel()
	var err error
	if eff.Frozen {
		if err = i.mem().Freeze(ctx, reasonFreeze); err == nil {
			i.show(components.Frozen, whyFrozen+i.name)
		}
	} else if err = i.mem().Thaw(ctx); err == nil {
		i.show(components.Running, "")
	}
	if err != nil {
		i.sup.cfg.Log.Warn("freeze or thaw failed; it is tried again", "instance", i.name, "error", err)
		return time.Second
	}
	i.applied.frozen = eff.Frozen
	return time.Millisecond
}

// attributes gives the process its attributes as they should be.
func (i *instance) attributes(ctx context.Context, eff *components.Effective) time.Duration {
	ctx, cancel := context.WithTimeout(ctx, drainDeadline)
	defer cancel()
	set := map[string][]byte{}
	for k, v := range eff.Spec.GetAttributes() {
		if i.applied.attributes[k] != v {
			set[k] = []byte(v)
		}
	}
	for k := range i.applied.attributes {
		if _, ok := eff.Spec.GetAttributes()[k]; !ok {
			set[k] = i.defaultOf(k)
		}
	}
	_, err := i.gen.comp.SetAttributes(ctx, &componentv1.SetAttributesRequest{Json: set})
	switch status.Code(err) {
	case codes.Unavailable, codes.DeadlineExceeded, codes.Canceled:
		i.sup.cfg.Log.Warn("attributes could not be set; it is tried again", "instance", i.name, "error", err)
		return time.Second
	case codes.OK, codes.Unimplemented:
	default:
		i.sup.cfg.Log.Warn("attributes were refused", "instance", i.name, "error", err)
		i.sup.cfg.Events.Publish(events.Event{Channel: "/apps/" + i.name, Type: "attributes-refused", Cause: err.Error(), Message: i.name + " refused its attributes"})
	}
	i.applied.attributes = maps.Clone(eff.Spec.GetAttributes())
	return time.Millisecond
}

// rebind gives the membrane the bindings as they should be.
func (i *instance) rebind(eff *components.Effective) time.Duration {
	if err := i.shell.Bind(eff); err != nil {
		i.sup.cfg.Log.Warn("bindings were refused", "instance", i.name, "error", err)
		i.sup.cfg.Events.Publish(events.Event{Channel: "/apps/" + i.name, Type: "bindings-refused", Cause: err.Error(), Message: i.name + " keeps its bindings"})
	}
	i.applied.bindings = maps.Clone(eff.Spec.GetBindings())
	return time.Millisecond
}

// promiseGrace is how long a promise may be broken before that is shown: copies on a node that dies are made again within a second or two, and a manifest may
// take a component away and another bring it back.
const promiseGrace = 5 * time.Second

// broken is a promise that did not hold when it was last looked at.
type broken struct{ since time.Time }

// lasting is why once it has held for longer than the grace, whatever it says meanwhile; "" ends it.
func (b *broken) lasting(why string) string {
	switch {
	case why == "":
		b.since = time.Time{}
	case b.since.IsZero():
		b.since = time.Now()
	case time.Since(b.since) >= promiseGrace:
		return why
	}
	return ""
}

// unhealthy says what is promised for a running process and does not hold now; "" nothing.
func (i *instance) unhealthy(eff *components.Effective) string {
	thin, loose := i.thin.lasting(i.gen.saver.thin()), i.loose.lasting(i.unbound())
	if _, err := i.gen.saver.Saved(); err != nil {
		return "its state cannot be saved now: " + err.Error()
	}
	if eff.Durable == componentsv1.Durability_DURABILITY_EACH_CALL && i.gen.stateful() && !waits(i.gen, eff) {
		return fmt.Sprintf("durable: each-call needs the feature %s, which it does not have: it is saved every %s, and answers do not wait for that",
			componentv1.FeatureTxnCalls, interval(i.gen, eff))
	}
	return cmp.Or(thin, loose)
}

// unbound names a required interface that leads nowhere: it is not bound, or to what no application has.
func (i *instance) unbound() string {
	for _, b := range i.mem().Bindings() {
		if !b.Declared || b.Optional || b.Kind == componentv1.Kind_KIND_EVENT {
			continue
		}
		if len(b.Targets) == 0 {
			return fmt.Sprintf("its required interface %s is not bound; try coppice bind", b.Name)
		}
		if !slices.ContainsFunc(b.Targets, i.sup.wanted) {
			return fmt.Sprintf("its required interface %s is bound to %s, which does not exist", b.Name, strings.Join(b.Targets, ", "))
		}
	}
	return ""
}

// wanted says whether a binding's target is part of an application. What cannot be read counts as there.
func (s *Supervisor) wanted(target string) bool {
	t, err := components.ParseTarget(target)
	if err != nil {
		return true
	}
	eff, err := s.effective(t.Key())
	return err != nil || eff != nil
}

func (i *instance) defaultOf(attribute string) []byte {
	for _, a := range i.gen.desc.GetAttributes() {
		if a.GetName() == attribute {
			return a.GetDefaultJson()
		}
	}
	return nil
}

// health shows what is promised and does not hold now.
func (i *instance) health(body *componentsv1.InstanceBody, eff *components.Effective) {
	why := i.unhealthy(eff)
	switch {
	case eff.Frozen && why != "":
		i.show(components.Degraded, "frozen by a command, and "+why)
	case eff.Frozen:
		i.show(components.Frozen, whyFrozen+i.name)
	case eff.Digest != i.gen.digest && eff.Digest == body.GetReturnedFrom():
		i.show(components.Degraded, fmt.Sprintf("version %s was never healthy, %s goes on (%s); try coppice swap with another version, or undo", eff.Version, i.gen.version, body.GetCause()))
	case eff.Digest != i.gen.digest && i.refused[eff.Digest] != "":
		i.show(components.Degraded, fmt.Sprintf("version %s did not come up, %s goes on: %s", eff.Version, i.gen.version, i.refused[eff.Digest]))
	case eff.Digest != i.gen.digest && i.follows.why != "":
		i.show(components.Degraded, fmt.Sprintf("version %s is desired, %s goes on: %s", eff.Version, i.gen.version, i.follows.why))
	case why != "":
		i.show(components.Degraded, why)
	default:
		i.show(components.Running, "")
	}
}

// settle records that the epoch has answered and held: there is nothing to fall back to any more.
func (i *instance) settle(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody) time.Duration {
	b := proto.CloneOf(body)
	b.Settled, b.Fallback, b.Deaths = true, nil, nil
	data, err := proto.Marshal(b)
	if err != nil {
		i.sup.cfg.Log.Error("encode a register", "key", i.key, "error", err)
		return time.Second
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	res, err := i.sup.cfg.Arbiter.Txn(ctx, arbiter.TxnRequest{
		Nonce:    i.sup.nonce(),
		Compares: []arbiter.Compare{{Key: i.key, Field: "revision", Equal: reg.Revision}},
		Then:     []arbiter.Op{{Put: &arbiter.PutOp{Key: i.key, Body: data}}},
	})
	if err != nil {
		return time.Second
	}
	for _, r := range res.Registers {
		i.sup.adopt(r)
	}
	return 100 * time.Millisecond
}
