package supervisor

import (
	"context"
	"errors"
	"fmt"
	"maps"
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
	select {
	case err := <-g.saverEnd:
		return i.saverEnded(ctx, reg, eff, err)
	default:
	}
	token := components.Token{Incarnation: reg.Incarnation, Epoch: reg.Epoch}
	switch {
	case token.Compare(g.token) < 0:
		return 20 * time.Millisecond // the local view is behind what a claim answered
	case token.Compare(g.token) > 0:
		return i.retoken(reg, eff, token)
	case eff.Digest != g.digest && i.refused[eff.Digest] == "" && !eff.Frozen:
		return i.follow(ctx, reg, body, eff)
	case eff.Frozen != i.applied.frozen:
		return i.freeze(ctx, eff)
	case !maps.Equal(eff.Spec.GetAttributes(), i.applied.attributes):
		return i.attributes(ctx, eff)
	case !maps.Equal(eff.Spec.GetBindings(), i.applied.bindings):
		return i.rebind(eff)
	case eff.Durable != i.applied.durable || eff.Interval != i.applied.interval:
		return i.retoken(reg, eff, token)
	}
	i.health(reg, eff)
	if !body.GetSettled() {
		if wait := i.sup.cfg.Settle - time.Since(g.since); wait > 0 {
			return wait
		}
		return i.settle(ctx, reg, body)
	}
	return 0
}

// saverEnded: the epoch was fenced, or the node is stopping.
func (i *instance) saverEnded(ctx context.Context, reg arbiter.Register, eff *components.Effective, err error) time.Duration {
	if !errors.Is(err, errFenced) {
		if ctx.Err() == nil {
			i.retoken(reg, eff, i.gen.token)
		}
		return 20 * time.Millisecond
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
	i.kill("its epoch is over")
	i.crashed = true
	return time.Millisecond
}

// retoken continues the running process in a newer epoch of the same owner, or under another durability.
func (i *instance) retoken(reg arbiter.Register, eff *components.Effective, token components.Token) time.Duration {
	g := i.gen
	saved, _ := g.saver.Saved()
	g.stopSaver()
	g.head, g.saved, g.token = g.lastHead(), saved, token
	i.save(i.sup.ctx, g, reg, eff)
	if err := i.mem().SetToken(tokenOf(token)); err != nil {
		i.sup.cfg.Log.Warn("the membrane does not take the new epoch", "instance", i.name, "error", err)
	}
	i.mem().SetDurable(eff.Durable == componentsv1.Durability_DURABILITY_EACH_CALL && g.stateful())
	i.note(g, eff)
	return time.Millisecond
}

// follow swaps to the version that is desired now. A version that fails is not tried again until desired state changes.
func (i *instance) follow(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, eff *components.Effective) time.Duration {
	_, err := i.swap(ctx, reg, body, eff, swapPlan{digest: eff.Digest, artifact: eff.ArtifactName, version: eff.Version, trigger: "operator", cause: "deployed"})
	if err == nil {
		return time.Millisecond
	}
	if ctx.Err() != nil {
		return 0
	}
	i.refused[eff.Digest] = err.Error()
	i.sup.cfg.Log.Warn("the desired version does not come up; the old one goes on", "instance", i.name, "version", eff.Version, "error", err)
	i.sup.cfg.Events.Publish(events.Event{
		Channel: "/apps/" + i.name, Type: "swap-failed", Trigger: "operator", Cause: err.Error(),
		Message: fmt.Sprintf("%s stays on %s: %s did not come up", i.name, i.gen.version, eff.Version),
	})
	return time.Millisecond
}

func (i *instance) freeze(ctx context.Context, eff *components.Effective) time.Duration {
	ctx, cancel := context.WithTimeout(ctx, 2*drainDeadline)
	defer cancel()
	var err error
	if eff.Frozen {
		if err = i.mem().Freeze(ctx, reasonFreeze); err == nil {
			i.show(components.Frozen, "frozen by a command; try coppice thaw "+i.name)
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
	i.applied.attributes = maps.Clone(eff.Spec.GetAttributes())
	if err != nil && !unimplemented(err) {
		i.sup.cfg.Log.Warn("attributes were refused", "instance", i.name, "error", err)
		i.sup.cfg.Events.Publish(events.Event{Channel: "/apps/" + i.name, Type: "attributes-refused", Cause: err.Error(), Message: i.name + " refused its attributes"})
	}
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

// unhealthy says what is wrong with a process that runs; "" nothing.
func (i *instance) unhealthy() string {
	i.mu.Lock()
	hung, sv := i.hung, i.sv
	i.mu.Unlock()
	if hung != nil {
		return hung.Error()
	}
	if sv != nil {
		if _, err := sv.Saved(); err != nil {
			return "its state cannot be saved now: " + err.Error()
		}
	}
	return ""
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
func (i *instance) health(reg arbiter.Register, eff *components.Effective) {
	if eff.Frozen {
		return
	}
	switch why := i.refused[eff.Digest]; {
	case eff.Digest != i.gen.digest && why != "":
		i.show(components.Degraded, fmt.Sprintf("version %s did not come up, %s goes on: %s", eff.Version, i.gen.version, why))
	case i.unhealthy() != "":
		i.show(components.Degraded, i.unhealthy())
	default:
		i.show(components.Running, "")
	}
}

// settle records that the epoch has answered and held: there is nothing to fall back to any more.
func (i *instance) settle(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody) time.Duration {
	if why := i.unhealthy(); why != "" && body.GetFallback() != nil {
		return i.fallBack(ctx, reg, body, why)
	}
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

// fallBack returns an unsettled epoch to the version before it.
func (i *instance) fallBack(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, why string) time.Duration {
	fb := body.GetFallback()
	eff, err := i.sup.effective(body.GetComponent())
	if err != nil || eff == nil {
		return time.Second
	}
	bad := i.gen.digest
	if _, err := i.swap(ctx, reg, body, eff, swapPlan{digest: fb.GetDigest(), artifact: fb.GetArtifactName(), version: fb.GetVersion(), trigger: "crash", cause: "never healthy: " + why, undo: true}); err != nil {
		i.sup.cfg.Log.Warn("return to the version before failed; it is tried again", "instance", i.name, "error", err)
		return time.Second
	}
	i.refused[bad] = why
	return time.Millisecond
}

func unimplemented(err error) bool { return status.Code(err) == codes.Unimplemented }
