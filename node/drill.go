package node

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/keys"
	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// drillWait is how long a drill waits for what comes back when it was not told.
const drillWait = time.Minute

// noSuccessor is why nobody is named for what placement will yet find a node for.
const noSuccessor = "placement has named no successor that would be left; it looks for another node"

// Drill says what the loss of a node or a zone would do, and with Really causes it.
func (v *verbs) Drill(ctx context.Context, r *apiv1.DrillRequest, s *connect.ServerStream[apiv1.DrillUpdate]) error {
	n := v.n
	if r.GetDie() {
		return n.dieByDrill(ctx)
	}
	what, lost, err := n.drilled(r)
	if err != nil {
		return err
	}
	if r.GetReally() && slices.ContainsFunc(lost, func(m members.Member) bool { return m.ID == n.id }) {
		why, try := "no node would be left to tell what came of it", "coppice "+what+" without --really"
		for _, m := range n.members.Alive() {
			if !slices.ContainsFunc(lost, func(l members.Member) bool { return l.ID == m.ID }) {
				why, try = n.cfg.Name+", which is asked, would die with what it has to tell", "the same command on "+m.Name
				break
			}
		}
		return api.Fail(connect.CodeFailedPrecondition, what, why, try)
	}
	out := n.predict(lost, r.GetReally())
	if !r.GetReally() {
		out.Done = true
		return s.Send(out)
	}
	if err := s.Send(out); err != nil {
		return err
	}
	begun := time.Now()
	for _, m := range lost {
		if m.State != members.Alive && m.State != members.Quarantined {
			continue
		}
		c, err := api.Forward(ctx, n, m.ID.String())
		if err != nil {
			return err
		}
		st, err := c.Drill(ctx, &apiv1.DrillRequest{Node: m.Name, Die: true})
		if err == nil {
			for st.Receive() { // it answers by dying
			}
			err = st.Err()
		}
		switch connect.CodeOf(err) {
		case connect.CodeFailedPrecondition, connect.CodePermissionDenied, connect.CodeUnimplemented, connect.CodeNotFound, connect.CodeInvalidArgument:
			return err // it refused; anything else is how a call to a node that dies ends
		}
	}
	n.observe(ctx, out, begun, r)
	out.Done = true
	return s.Send(out)
}

// drilled finds the nodes that a drill is about.
func (n *Node) drilled(r *apiv1.DrillRequest) (what string, lost []members.Member, err error) {
	switch {
	case (r.GetNode() == "") == (r.GetZone() == ""):
		return "", nil, api.Fail(connect.CodeInvalidArgument, "drill", "it wants one of a node and a zone", "coppice drill n2, or coppice drill --zone z1")
	case r.GetNode() != "":
		what = "drill " + r.GetNode()
		m, err := n.findNode("drill", r.GetNode())
		if err != nil {
			return what, nil, err
		}
		return what, []members.Member{m}, nil
	}
	what = "drill --zone " + r.GetZone()
	var zones []string
	for _, m := range n.members.All() {
		if m.Zone == r.GetZone() && m.State.Running() {
			lost = append(lost, m)
		} else if m.Zone != "" && !slices.Contains(zones, m.Zone) {
			zones = append(zones, m.Zone)
		}
	}
	if len(lost) == 0 {
		return what, nil, api.FailWith(connect.CodeNotFound, &apiv1.Problem{What: what, Why: "no node of that zone runs", Try: "coppice nodes", Candidates: zones})
	}
	return what, lost, nil
}

// dieByDrill ends this node and what it runs as the loss of its machine would.
func (n *Node) dieByDrill(ctx context.Context) error {
	what := "drill " + n.cfg.Name
	switch {
	case api.ForwardedFrom(ctx) == "":
		return api.Fail(connect.CodePermissionDenied, what, "only another node may ask a node to die, for it has to tell what came of it", "coppice "+what+" --really")
	case n.cfg.Die == nil:
		return api.Fail(connect.CodeFailedPrecondition, what, "this process is not a node's alone", "")
	}
	n.log.Warn("this node dies for a drill", "asked by", api.ForwardedFrom(ctx))
	for _, in := range n.sup.Infos() {
		if in.Pid > 0 {
			if err := syscall.Kill(-in.Pid, syscall.SIGKILL); err != nil {
				n.log.Warn("end a component for a drill", "instance", in.Instance, "error", err)
			}
		}
	}
	n.cfg.Die()
	return nil
}

// predict says what the loss of nodes would do: of their power or, when killed, of their processes alone.
func (n *Node) predict(lost []members.Member, killed bool) *apiv1.DrillUpdate {
	out := &apiv1.DrillUpdate{}
	gone := map[peer.ID]bool{}
	names := map[string]bool{}
	for _, m := range lost {
		gone[m.ID], names[m.Name] = true, true
		out.Lost = append(out.Lost, m.Name)
	}
	st := n.arbiter.Status()
	left := n.votersLeft(st, gone)
	out.Voters, out.VotersLeft = uint32(len(st.Voters)), uint32(len(left))
	out.WritesStop = writesStop(st, left, killed)
	if out.WritesStop {
		out.Cure = n.voterCure(st)
	} else if len(left) > 0 {
		next := keys.Sort(keys.Of(arbiter.PlacementKey), left)[0]
		if st.Coordinator != "" && !gone[st.Coordinator] {
			next = st.Coordinator
		}
		out.Coordinator = n.nameOf(next)
	}
	for _, in := range n.instances("") {
		if !names[in.GetNode()] {
			continue
		}
		d := &apiv1.DrillInstance{Instance: in.GetInstance(), From: in.GetNode(), Durable: cmp.Or(in.GetDurableNow(), in.GetDurable()), WouldLoseMs: in.WouldLoseMs}
		if strings.HasSuffix(in.GetInstance(), "@"+in.GetNode()) { // components.EachNodeInstance
			d.Reason = "one runs on each node: it comes back with its node"
			out.Instances = append(out.Instances, d)
			continue
		}
		for _, h := range in.GetReplicas() {
			if !names[h] {
				d.CopiesLeft++
			}
		}
		for _, to := range in.GetSuccessors() {
			if m, ok := n.memberNamed(to); ok && !names[to] && m.State == members.Alive && !m.Draining {
				d.To = to
				break
			}
		}
		if systemComponent(in.GetComponent()) {
			d.To = out.Coordinator // it runs where the coordinator is
		}
		switch {
		case out.WritesStop:
			d.To, d.Reason = "", "nobody can take it over while no majority of the voters is left"
		case in.GetCheckpointSeq() > 0 && d.CopiesLeft == 0 && in.GetDurable() != "none":
			d.To, d.Reason = "", "no copy of its state would be left"
		case d.To == "":
			d.Reason = noSuccessor
		}
		if d.To != "" {
			d.PredictedMs = in.PredictedRestartMs
		}
		out.Instances = append(out.Instances, d)
	}
	return out
}

func (n *Node) memberNamed(name string) (members.Member, bool) {
	for _, m := range n.members.All() {
		if m.Name == name {
			return m, true
		}
	}
	return members.Member{}, false
}

// votersLeft are the voters that run and are not among the gone.
func (n *Node) votersLeft(st arbiter.Status, gone map[peer.ID]bool) []peer.ID {
	var left []peer.ID
	for _, id := range st.Voters {
		if m, ok := n.members.Member(id); ok && m.State.Running() && !gone[id] {
			left = append(left, id)
		}
	}
	return left
}

// writesStop says whether nothing could be committed with only these voters left. Of two, which go by the rule of two nodes, the primary
// goes on alone, and the other only from a proof of death: a process that was killed is one, lost power is not.
func writesStop(st arbiter.Status, left []peer.ID, killed bool) bool {
	if len(st.Voters) == 2 && len(left) == 1 && st.Primary != "" {
		return !killed && left[0] != st.Primary
	}
	return len(st.Voters) > 0 && len(left) < len(st.Voters)/2+1
}

// zoneRisks tells for each zone whether its loss would stop writes, and what would cure it.
func (n *Node) zoneRisks() []*apiv1.Unsafe {
	st := n.arbiter.Status()
	zones := map[string]map[peer.ID]bool{}
	for _, id := range st.Voters {
		if m, ok := n.members.Member(id); ok && m.Zone != "" {
			if zones[m.Zone] == nil {
				zones[m.Zone] = map[peer.ID]bool{}
			}
			zones[m.Zone][id] = true
		}
	}
	var out []*apiv1.Unsafe
	for z, ids := range zones {
		if left := n.votersLeft(st, ids); writesStop(st, left, false) && len(n.members.Alive()) > len(ids) {
			out = append(out, &apiv1.Unsafe{Subject: "zone " + z, Why: fmt.Sprintf("%d of %d voters are in it: its loss would stop all writes; %s", len(ids), len(st.Voters), n.voterCure(st))})
		}
	}
	slices.SortFunc(out, func(a, b *apiv1.Unsafe) int { return strings.Compare(a.GetSubject(), b.GetSubject()) })
	return out
}

// voterCure says what would let the voters be spread so that no zone holds a majority.
func (n *Node) voterCure(st arbiter.Status) string {
	zones := map[string]bool{}
	able := 0
	for _, m := range n.members.Alive() {
		if !m.NoVoter && !m.Draining && m.Role != "worker" {
			able++
			zones[m.Zone] = true
		}
	}
	switch {
	case able < 3:
		return "a third node that may vote cures it: coppice token, then coppice up --role voter --join …"
	case len(zones) < 3:
		return "a node in a third zone that may vote cures it, even a small one: coppice up --role voter --zone … --join …"
	case len(st.Voters) < 3:
		return "the voters are being completed; look again in a moment"
	}
	return "the voters are spread over the zones one by one, within minutes"
}

// observe waits for what was lost to come back and writes down when it did. What cannot come back elsewhere is not waited for.
func (n *Node) observe(ctx context.Context, out *apiv1.DrillUpdate, begun time.Time, r *apiv1.DrillRequest) {
	wait := time.Duration(r.GetTimeoutMs()) * time.Millisecond
	if wait <= 0 {
		wait = drillWait
	}
	if out.GetWritesStop() {
		return // nothing comes back before the nodes do
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	committed := make(chan time.Duration, 1)
	n.goes.Go(func() {
		defer close(committed)
		for ctx.Err() == nil {
			if n.arbiter.Sync(ctx) == nil {
				committed <- time.Since(begun)
				return
			}
			select { // there may be no leader to ask, which is known at once
			case <-time.After(5 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	})
	lost := map[string]bool{}
	for _, name := range out.GetLost() {
		lost[name] = true
	}
	n.waitFor(ctx, wait, func() bool {
		all := true
		now := map[string]*apiv1.Instance{}
		for _, in := range n.instances("") {
			now[in.GetInstance()] = in
		}
		for _, d := range out.GetInstances() {
			in := now[d.GetInstance()]
			if d.CameTo == "" && in != nil && in.GetState() == string(components.Running) && !lost[in.GetNode()] {
				d.CameTo, d.TookMs = in.GetNode(), proto.Float64(ms(time.Since(begun)))
			}
			all = all && (d.GetCameTo() != "" || !canComeBack(d))
		}
		return all
	})
	out.TookMs = proto.Float64(ms(time.Since(begun)))
	select { // with nothing to come back the commit is what is waited for
	case d, ok := <-committed:
		if ok {
			out.CommitMs = proto.Float64(ms(d))
		}
	case <-ctx.Done():
	}
}

// canComeBack says whether a lost instance can run elsewhere: a copy of its state is left, or it needs none, and it belongs to no one node.
func canComeBack(d *apiv1.DrillInstance) bool { return d.GetTo() != "" || d.GetReason() == noSuccessor }
