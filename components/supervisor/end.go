package supervisor

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/events"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

const (
	// lastBeat is what a process that missed its heartbeats gets to answer one more, lastBeatStarved when this node itself runs late.
	lastBeat        = time.Second
	lastBeatStarved = 4 * time.Second
	// restWithin bounds the saving of an instance that is to stop; after it the saving is tried again.
	restWithin = 30 * time.Second
)

// died: the process ended of itself. It is started again here, with its state; the ownership stays.
func (i *instance) died() {
	g := i.gen
	if g == nil {
		return
	}
	if !i.leaseHeld() {
		i.endForLease() // most likely it was ended for that
		return
	}
	exit := g.proc.Exit()
	why := "exit status unknown"
	if exit.Known {
		why = fmt.Sprintf("exit status %d", exit.Code)
		if exit.Signal != "" {
			why = "killed by " + exit.Signal
		} else if exit.Code == componentv1.ExitLeaseLapsed {
			why = "its lease lapsed: this node did not grant it in time, or nothing here had time to run"
		} else if exit.Code == componentv1.ExitProgramEnded {
			why = saidLast(g.proc.Output())
		}
	}
	i.fell("crashed", "its process ended ("+why+")", why)
}

// hangs deals with a process that missed its heartbeats: when it does not answer one more, it is killed and started again.
func (i *instance) hangs(ctx context.Context, h *hung) (killed bool) {
	i.mu.Lock()
	i.hung = nil
	i.mu.Unlock()
	wait := lastBeat
	if i.sup.lease.starved() {
		wait = lastBeatStarved
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	if _, err := i.gen.back.Heartbeat(ctx, tokenOf(i.gen.token)); err == nil {
		i.sup.cfg.Log.Info("the component missed heartbeats and answers again", "instance", i.name, "error", h.why)
		return false
	}
	i.fell("hung", "its process does not answer", h.why.Error())
	return true
}

// fell ends what is left of a process that did not serve any more and says when the next is started.
func (i *instance) fell(what, short, why string) {
	g := i.gen
	lived := time.Since(g.since)
	i.mem().Fail(short) // calls wait for the next one
	i.sup.end(i.shell, g, 0)
	i.ended()
	i.mu.Lock()
	i.info.Restarts++
	settled := i.info.Settled
	i.mu.Unlock()
	if !settled {
		i.unfit = unfit{g.nonce, short + ": " + why}
	}
	if lived > healthyAfter {
		i.failures = 0
	}
	i.failures++
	if i.failures > 1 || lived < time.Second {
		i.notUntil = time.Now().Add(backoff(i.failures))
	}
	i.show(components.Starting, short+"; it is started again")
	i.sup.cfg.Log.Warn("component process is over", "instance", i.name, "pid", g.proc.Ident().Pid, "what", what, "reason", why, "lived", lived)
	i.sup.cfg.Events.Publish(events.Event{
		Channel: "/apps/" + i.name, Type: what, Trigger: "crash", Cause: why, Message: fmt.Sprintf("%s: %s; it is started again on %s", i.name, short, i.sup.cfg.Name),
		Fields: map[string]string{"pid": fmt.Sprint(g.proc.Ident().Pid), "output": g.proc.Output()},
	})
}

// ended: the running process is none any more.
func (i *instance) ended() {
	if i.gen.saver != nil {
		i.prev = i.gen
	}
	i.gen, i.quiet = nil, false
}

// kill ends the process at once: its epoch is over.
func (i *instance) kill(why string) {
	if i.gen == nil {
		return
	}
	reg, ok := i.sup.register(i.key)
	if !ok {
		reg = arbiter.Register{}
	}
	i.shut(why, &reg)
	i.sup.end(i.shell, i.gen, 0)
	i.ended()
}

// relaunch ends the process at once; calls wait for the next one, which is given the state that the log names.
func (i *instance) relaunch(why string) time.Duration {
	i.sup.cfg.Log.Warn("the process is started anew", "instance", i.name, "epoch", i.gen.token.Epoch, "reason", why)
	i.mem().Fail(why)
	i.sup.end(i.shell, i.gen, 0)
	i.ended()
	i.show(components.Starting, why)
	return time.Millisecond
}

// halt ends the process gently.
func (i *instance) halt(why string) {
	if i.gen == nil {
		return
	}
	i.shut(why, nil)
	i.sup.end(i.shell, i.gen, stopGrace)
	i.ended()
}

// rest ends the process with its state saved. The owner stays; its lease, if there is one, is given up.
func (i *instance) rest(ctx context.Context, as components.State, why string) time.Duration {
	i.sup.dropStandby(i.name)
	if i.gen != nil && !i.gen.dead() {
		sctx, cancel := context.WithTimeout(ctx, restWithin)
		defer cancel()
		i.quiet = true
		qctx, qcancel := half(sctx)
		err := i.quiesce(qctx, reasonFreeze)
		qcancel()
		if err != nil {
			i.sup.cfg.Log.Warn("calls under way are cut off by the stop", "instance", i.name, "error", err)
		}
		inside := err != nil || i.gen.back.Streams() > 0
		if err := i.flush(sctx); i.unsaved(err) {
			i.show(components.Degraded, "not stopped yet: its state could not be saved: "+err.Error())
			return time.Second
		}
		if inside {
			// What is still inside may have answered since: from here on it does not, and what it did until here is saved, too.
			i.shut(why, nil)
			if err := i.flush(sctx); i.unsaved(err) {
				i.sup.cfg.Log.Error("what calls did during the stop could not be saved", "instance", i.name, "error", err)
			}
		}
	}
	i.halt(why)
	i.handBack(ctx)
	i.show(as, why)
	return 0
}

// unsaved says whether a flush's error means that something is not saved that could be.
func (i *instance) unsaved(err error) bool {
	return err != nil && !i.gen.dead() && !errors.Is(err, errSaverEnded)
}

// half bounds a first step to half of the time that there is, so that some is left for the second.
func half(ctx context.Context) (context.Context, context.CancelFunc) {
	end, ok := ctx.Deadline()
	if !ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, time.Until(end)/2)
}

// unrest takes a process back that was held for a stop which is not wanted any more.
func (i *instance) unrest(ctx context.Context) time.Duration {
	if i.applied.frozen {
		i.quiet = false // it was frozen before, and stays so
		return time.Millisecond
	}
	if err := i.resume(ctx, i.gen); err != nil {
		return i.relaunch("it does not go on after a stop that was called off: " + err.Error())
	}
	i.quiet = false
	i.release()
	return time.Millisecond
}

// remove ends an instance that should not exist any more, and its register with it. The log is asked first: what the local view does not
// know yet must not cost a state.
func (i *instance) remove(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody) time.Duration {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := i.sup.cfg.Arbiter.Sync(ctx); err != nil {
		return time.Second
	}
	eff, revision, err := i.sup.desired(body.GetComponent())
	if err != nil || !surplus(eff, body) {
		return 20 * time.Millisecond
	}
	i.halt("it is being removed")
	app, _, _ := strings.Cut(body.GetComponent(), "/")
	res, err := i.sup.cfg.Arbiter.Txn(ctx, arbiter.TxnRequest{
		Nonce: i.sup.nonce(), Then: []arbiter.Op{{Delete: i.key}, {Delete: i.hist.key}},
		Compares: []arbiter.Compare{{Key: i.key, Field: "epoch", Equal: reg.Epoch}, {Key: components.ApplicationRegister(app), Field: "revision", Equal: revision}},
	})
	if err != nil || !res.Succeeded {
		i.show(components.Stopped, "it is being removed")
		return 500 * time.Millisecond
	}
	i.sup.cfg.Events.Publish(events.Event{Channel: "/apps/" + i.name, Type: "removed", Trigger: "operator", Message: i.name + " removed"})
	if err := i.sup.cfg.Arbiter.Sync(ctx); err != nil { // else this node would take it for its own once more
		i.sup.cfg.Log.Debug("removed", "instance", i.name, "error", err)
	}
	return -1
}

// canRetreat says whether an epoch has a version to return to.
func canRetreat(body *componentsv1.InstanceBody) bool {
	return !body.GetSettled() && body.GetFallback().GetDigest() != ""
}

// retreat returns an epoch that never was healthy to the version before it: with the state as it is committed now where that version can
// read it, else with the state it left behind. Calls are held meanwhile.
func (i *instance) retreat(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody, why string) time.Duration {
	fb := body.GetFallback()
	next := proto.CloneOf(body)
	next.Digest, next.ArtifactName, next.Version = fb.GetDigest(), fb.GetArtifactName(), fb.GetVersion()
	next.Trigger, next.Cause, next.ClaimedUnixMs = "crash", fmt.Sprintf("%s was never healthy: %s", body.GetVersion(), why), i.sup.date()
	next.Settled, next.Fallback, next.Previous, next.ReturnedFrom = false, nil, nil, body.GetDigest()
	claim := i.sup.fallbackRoot(ctx, reg, body)
	if err := i.claim(ctx, reg, next, claim); err != nil {
		i.show(components.Failed, fmt.Sprintf("%s is not healthy (%s), and the return to %s does not succeed: %v", body.GetVersion(), why, fb.GetVersion(), err))
		return 500 * time.Millisecond
	}
	i.failures, i.notUntil, i.unfit = 0, time.Time{}, unfit{}
	i.sup.cfg.Log.Warn("an unhealthy version is returned from", "instance", i.name, "from", body.GetVersion(), "to", fb.GetVersion(), "reason", why)
	ev := events.Event{
		Channel: "/apps/" + i.name, Type: "returned", Trigger: "crash", Cause: why,
		Message: fmt.Sprintf("%s returned from %s to %s by itself", i.name, body.GetVersion(), fb.GetVersion()),
		Fields:  map[string]string{"from": body.GetVersion(), "to": fb.GetVersion()},
	}
	if claim.SetRoot {
		ev.Message += fmt.Sprintf(", with its state of checkpoint %d: what came after is in a schema that it cannot read", fb.GetSeq())
	}
	i.sup.cfg.Events.Publish(ev)
	return time.Millisecond
}

// fallbackRoot is the part of a claim that returns an unsettled epoch to its fallback which says about the state: nothing where that version
// can read what is committed, else the state that it left behind.
func (s *Supervisor) fallbackRoot(ctx context.Context, reg arbiter.Register, body *componentsv1.InstanceBody) arbiter.ClaimRequest {
	fb := body.GetFallback()
	root := hashFrom(fb.GetRoot())
	if root.IsZero() || isBuiltin(body.GetDigest()) || isBuiltin(fb.GetDigest()) { // reg's root says little: local views lag with checkpoints
		return arbiter.ClaimRequest{}
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	bad, err := s.cfg.Artifacts.Description(ctx, body.GetDigest())
	if err != nil {
		s.cfg.Log.Warn("the schema of a state is not known; the version before is tried with it", "instance", instanceOf(reg.Key), "error", err)
		return arbiter.ClaimRequest{}
	}
	good, err := s.cfg.Artifacts.Description(ctx, fb.GetDigest())
	if err != nil {
		s.cfg.Log.Warn("it is not known which states a version can read; it is tried", "instance", instanceOf(reg.Key), "error", err)
		return arbiter.ClaimRequest{}
	}
	if readsSchema(good, bad.GetState().GetWritesSchema()) {
		return arbiter.ClaimRequest{}
	}
	return arbiter.ClaimRequest{SetRoot: true, Root: root[:]}
}
