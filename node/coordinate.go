package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/supervisor"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/coppice-project/coppice/internal/unison"
	"github.com/coppice-project/coppice/placement"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

const (
	protoMoveAway protocol.ID = "/coppice/move-away/1"

	// builtinPlacement is the digest of the solver that the binary brings along.
	builtinPlacement = supervisor.BuiltinPrefix + "placement"

	// failuresElsewhere is after how many starts that failed in a row an instance is tried on another node.
	failuresElsewhere = 3
	// officeEvery is how often a node looks whether it is coordinator.
	officeEvery = 250 * time.Millisecond
)

// coordinator is what the placement loop needs of the node: who leads, what is known, and how to carry a plan out.
type coordinator struct{ n *Node }

// Coordinator implements placement.Leader.
func (c coordinator) Coordinator() bool {
	st := c.n.arbiter.Status()
	return st.HasLeader && st.Coordinator == c.n.id
}

// View implements placement.Facts.
func (c coordinator) View(ctx context.Context) (placement.View, error) {
	n := c.n
	st := n.arbiter.Status()
	if st.FeedAge < 0 {
		return placement.View{}, errors.New("this node has not heard the arbiter yet")
	}
	v := placement.View{Self: n.id.String(), Incarnation: st.Incarnation, Index: st.Index, Paused: n.paused(), Date: n.clusterNow()}
	for _, a := range n.applications() {
		v.Applications = append(v.Applications, a.Application)
	}
	told := n.factRecords(ctx)
	reports := n.reportsIn(told)
	for _, reg := range n.arbiter.List(components.InstancePrefix) {
		body, err := bodyOf(reg)
		if err != nil {
			return v, fmt.Errorf("register %s: %w", reg.Key, err)
		}
		name := components.InstanceOfKey(reg.Key)
		c.failing(reg, reports[name])
		r := placement.Register{Instance: name, Boot: reg.Boot, Epoch: reg.Epoch, StateBytes: reports[name].Bytes, Body: body}
		if reg.Owner != "" {
			r.Owner = reg.Owner.String()
		}
		for _, h := range reg.Holders {
			r.Holders = append(r.Holders, h.String())
		}
		v.Instances = append(v.Instances, r)
	}
	facts, ages := n.hostFactsIn(told)
	inOffice := n.inOffice()
	all := n.members.All()
	named := make(map[string]string, len(all))
	for _, m := range all {
		named[linkName(m.ID)] = m.ID.String()
	}
	for _, m := range all {
		if !m.State.Running() && m.Since.Before(inOffice) {
			// A node that was cut off called the others dead. It may be coordinator again before they could tell it better: what it held
			// against them until then counts from now on only.
			m.Since = inOffice
		}
		p := placement.Node{
			Node: &placementv1.Node{
				Id: m.ID.String(), Name: m.Name, Zone: m.Zone, Role: m.Role, Labels: m.Labels, Platform: m.Platform, State: m.State.String(), Draining: m.Draining,
				CpuMillis: m.CPUMillis, MemoryBytes: m.MemoryBytes, DiskBytes: m.DiskBytes, Facts: facts[m.ID].Facts, FactAgeMs: ms(ages[m.ID]),
			},
			Since: m.Since, Evidence: m.Evidence, Boot: m.Boot,
		}
		v.Nodes = append(v.Nodes, p)
		for to, rtt := range facts[m.ID].RTTMs {
			if id, ok := named[to]; ok {
				v.Links = append(v.Links, &placementv1.Link{From: m.ID.String(), To: id, RttMs: rtt})
			}
		}
	}
	return v, nil
}

// failing tells placement, once for each epoch, that an instance does not come up where it is: it is tried elsewhere.
func (c coordinator) failing(reg arbiter.Register, r instanceReport) {
	if r.Failures < failuresElsewhere || r.Epoch != 0 && r.Epoch > reg.Epoch || r.Node != reg.Owner.String() {
		return
	}
	n := c.n
	n.failedMu.Lock()
	told := n.failed[reg.Key] >= reg.Epoch
	n.failed[reg.Key] = reg.Epoch
	n.failedMu.Unlock()
	if !told {
		n.coord.Failed(r.Instance, r.Node, r.Reason)
	}
}

func bodyOf(reg arbiter.Register) (*componentsv1.InstanceBody, error) {
	var body componentsv1.InstanceBody
	if err := proto.Unmarshal(reg.Body, &body); err != nil {
		return nil, err
	}
	return &body, nil
}

// Place implements placement.Proposer.
func (c coordinator) Place(ctx context.Context, p placement.Placing) error {
	n := c.n
	id, err := peer.Decode(p.Node)
	if err != nil {
		return err
	}
	m, ok := n.members.Member(id)
	if !ok || m.State != members.Alive {
		return fmt.Errorf("%s is not alive any more", n.nameOf(id))
	}
	body, err := proto.Marshal(p.Body)
	if err != nil {
		return err
	}
	reg, err := n.arbiter.Claim(ctx, arbiter.ClaimRequest{Key: components.InstanceRegister(p.Instance), Expect: p.Epoch, Nonce: n.nonce(), Owner: id, Boot: m.Boot, Body: body})
	var refused *arbiter.RefusedError
	if errors.As(err, &refused) {
		return nil // somebody was faster: the next round sees it
	}
	if wait, ok := errors.AsType[*arbiter.WaitError](err); ok { // its last owner may still hold its lease
		time.AfterFunc(wait.For, n.coord.Trigger)
		return nil
	}
	if err != nil {
		return err
	}
	n.events.Publish(events.Event{
		Channel: "/apps/" + p.Instance, Type: "placed", Trigger: p.Body.GetTrigger(), Cause: p.Body.GetCause(),
		Message: fmt.Sprintf("%s placed on %s in epoch %d", p.Instance, m.Name, reg.Epoch), Fields: map[string]string{"node": m.Name, "epoch": fmt.Sprint(reg.Epoch)},
	})
	n.sup.Adopt(reg)
	return nil
}

// Move implements placement.Proposer.
func (c coordinator) Move(ctx context.Context, m placement.Moving) error {
	from, err := peer.Decode(m.From)
	if err != nil {
		return err
	}
	req := &componentsv1.MoveAwayRequest{Instance: m.Instance, Epoch: m.Epoch, To: m.To, Cause: m.Cause}
	if from == c.n.id {
		_, err = c.n.moveAway(ctx, from, req)
		return err
	}
	return c.n.caller.Call(ctx, from, protoMoveAway, req, &componentsv1.MoveAwayReply{})
}

// moveAway hands an instance of this node over because the coordinator wants it elsewhere.
func (n *Node) moveAway(ctx context.Context, _ peer.ID, req *componentsv1.MoveAwayRequest) (*componentsv1.MoveAwayReply, error) {
	reg, ok := n.arbiter.Get(components.InstanceRegister(req.GetInstance()))
	if !ok || reg.Owner != n.id || reg.Epoch != req.GetEpoch() {
		return nil, peers.Fail(wirev1.Failure_REFUSED, "%s is not this node's in epoch %d", req.GetInstance(), req.GetEpoch())
	}
	to, err := peer.Decode(req.GetTo())
	if err != nil {
		return nil, err
	}
	if _, err := n.sup.Move(ctx, req.GetInstance(), to, supervisor.Wish{Trigger: "placement", Cause: req.GetCause()}); err != nil {
		return nil, err
	}
	return &componentsv1.MoveAwayReply{}, nil
}

// SetSuccessors implements placement.Proposer.
func (c coordinator) SetSuccessors(ctx context.Context, all []placement.Succession) error {
	var errs []error
	for _, s := range all {
		key := components.InstanceRegister(s.Instance)
		reg, ok := c.n.arbiter.Get(key)
		if !ok || reg.Epoch != s.Epoch {
			continue
		}
		body, err := bodyOf(reg)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if slices.Equal(body.GetSuccessors(), s.Successors) {
			continue
		}
		body.Successors = s.Successors
		data, err := proto.Marshal(body)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		// A change of the body meanwhile makes this a no-op; the next round tries again.
		_, err = c.n.arbiter.Txn(ctx, arbiter.TxnRequest{
			Nonce: c.n.nonce(), Compares: []arbiter.Compare{{Key: key, Field: "revision", Equal: reg.Revision}}, Then: []arbiter.Op{{Put: &arbiter.PutOp{Key: key, Body: data}}},
		})
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Retire implements placement.Proposer.
func (c coordinator) Retire(ctx context.Context, r placement.Retiring) error {
	key := components.InstanceRegister(r.Instance)
	_, err := c.n.arbiter.Txn(ctx, arbiter.TxnRequest{
		Nonce: c.n.nonce(), Compares: []arbiter.Compare{{Key: key, Field: "epoch", Equal: r.Epoch}},
		Then: []arbiter.Op{{Delete: key}, {Delete: components.HistoryRegister(r.Instance)}},
	})
	if wait, ok := errors.AsType[*arbiter.WaitError](err); ok {
		time.AfterFunc(wait.For, c.n.coord.Trigger)
		return nil
	}
	return err
}

// Solve implements placement.Solver: it asks the component system/placement, wherever it is.
func (c coordinator) Solve(ctx context.Context, req *placementv1.SolveRequest) (*placementv1.Plan, error) {
	return placementv1.NewPlacementClient(c.n.router.Conn(components.PlacementComponent, "")).Solve(ctx, req)
}

// Record implements placement.Recorder: each instance's part of a decision becomes a record that any node can read.
func (c coordinator) Record(d placement.Decision) {
	n := c.n
	n.faults.set("keep decisions", n.decisions.Add(d))
	if d.Err != nil {
		n.events.Publish(events.Event{Channel: "/system/placement", Type: "round-skipped", Cause: d.Err.Error(), Message: "a round of placement was skipped"})
		return
	}
	for _, p := range d.Problems {
		n.events.Publish(events.Event{Channel: "/system/placement", Type: "problem", Cause: p, Message: "desired state that cannot be placed"})
	}
	n.goes.Go(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		n.faults.set("tell decisions", n.tellDecisions(ctx))
		for _, a := range d.Plan.GetAssignments() {
			if n.decided(ctx, a) {
				continue
			}
			rec := decisionRecord{
				Instance: a.GetInstance(), Node: a.GetNode(), By: n.id.String(), Before: d.Plan.GetObjectiveBefore(), After: d.Plan.GetObjective(), Score: a.GetScore(),
				RunnerUp: a.GetRunnerUp(), RunnerUpAt: a.GetRunnerUpScore(), Reason: a.GetReason(), UnixMs: d.Time.UnixMilli(),
				Bound: d.Plan.GetBound(), Optimal: d.Plan.GetOptimal(), Conflict: shortened(a.GetConflict()), Remedies: shortened(a.GetRemedies()), Digest: d.Digest,
			}
			for _, r := range a.GetRefused() {
				if len(rec.Refused) < 64 {
					rec.Refused = append(rec.Refused, decisionRefuse{Node: r.GetNode(), Constraint: r.GetConstraint(), Detail: shorten(r.GetDetail(), 120)})
				}
			}
			b, err := json.Marshal(rec)
			if err == nil {
				_, _, err = n.records.Put(ctx, decisionKey(a.GetInstance()), b, 0)
			}
			n.faults.set("record decisions", err)
		}
	})
}

// shortened bounds what is recorded of texts, of which there are a few.
func shortened(all []string) []string {
	var out []string
	for _, s := range all[:min(len(all), 8)] {
		out = append(out, shorten(s, 240))
	}
	return out
}

// decided says whether what is recorded of an instance is the decision that brought it to the node it stays on: later rounds that change
// nothing do not replace it, for why is to tell why it is there.
func (n *Node) decided(ctx context.Context, a *placementv1.Assignment) bool {
	rec, _, err := n.records.Get(ctx, decisionKey(a.GetInstance()))
	if err != nil {
		return false
	}
	var d decisionRecord
	return json.Unmarshal(rec.Value, &d) == nil && d.Node == a.GetNode() && strings.HasPrefix(a.GetReason(), "stays ")
}

// Forget implements placement.Proposer.
func (c coordinator) Forget(ctx context.Context, application string, version uint64) error {
	a, ok := c.n.application(application)
	if !ok || a.GetVersion() != version || !a.GetRemoving() {
		return nil
	}
	key := components.ApplicationRegister(application)
	_, err := c.n.arbiter.Txn(ctx, arbiter.TxnRequest{
		Nonce: c.n.nonce(), Compares: []arbiter.Compare{{Key: key, Field: "revision", Equal: a.revision}}, Then: []arbiter.Op{{Delete: key}},
	})
	return err
}

// inOffice is since when this node has been coordinator without a break; now when that has just begun.
func (n *Node) inOffice() time.Time {
	if at := n.office.Load(); at != 0 {
		return time.Unix(0, at)
	}
	return time.Now()
}

// followOffice wakes the placement loop when this node becomes coordinator or ceases to be.
func (n *Node) followOffice(ctx context.Context) error {
	tick := unison.New(officeEvery, string(n.id))
	defer tick.Stop()
	was := false
	for {
		if is := (coordinator{n}).Coordinator(); is != was {
			was = is
			if is {
				n.office.Store(time.Now().UnixNano())
			} else {
				n.office.Store(0)
			}
			n.log.Info("placement", "coordinator", is)
			n.coord.Trigger()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
			tick.Next()
		}
	}
}

// found commits what a new cluster begins with: its first member and the application of its own components.
func (n *Node) found(ctx context.Context) error {
	member, err := proto.Marshal(&wirev1.MemberRecord{
		Format: admissionFormat, Id: []byte(n.id), Info: members.EncodeInfo(n.members.Self().Info), AdmittedBy: []byte(n.id), AdmittedUnixMs: uint64(time.Now().UnixMilli()),
	})
	if err != nil {
		return err
	}
	system, err := proto.Marshal(&componentsv1.Application{
		Format: components.ApplicationFormat, Name: components.SystemApplication, Version: 1,
		Manifest: &componentsv1.Manifest{Application: components.SystemApplication, Components: []*componentsv1.ComponentSpec{{Name: "placement", Artifact: "placement", Durable: "none"}}},
		Pinned: []*componentsv1.Pinned{{
			Component: "placement", Digest: builtinPlacement, Name: "placement", Version: n.cfg.Version, Durable: componentsv1.Durability_DURABILITY_NONE,
		}},
	})
	if err != nil {
		return err
	}
	systemKey := components.ApplicationRegister(components.SystemApplication)
	itself := arbiter.Op{Put: &arbiter.PutOp{Key: memberKey(n.id), Body: member}}
	if _, err = n.arbiter.Txn(ctx, arbiter.TxnRequest{
		Nonce: n.nonce(), Compares: []arbiter.Compare{{Key: systemKey, Field: "exists", Equal: 0}},
		Then: []arbiter.Op{itself, {Put: &arbiter.PutOp{Key: systemKey, Body: system}}},
		Else: []arbiter.Op{itself}, // of a cluster that was restored
	}); err != nil || !n.state.Restored {
		return err
	}
	n.state.Restored = false
	return n.state.save(n.cfg.FS, n.cfg.Data, n.statePath())
}
