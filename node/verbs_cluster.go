package node

import (
	"cmp"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/supervisor"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/dht/keys"
	"github.com/coppice-project/coppice/dht/members"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// readmitWithin bounds what a node that is to be readmitted gets to answer and to tell the others.
const readmitWithin = 10 * time.Second

// verbs carries out the control API on a node. Each method is one verb of the command line.
type verbs struct{ n *Node }

func (v *verbs) Token(ctx context.Context, r *apiv1.TokenRequest) (*apiv1.TokenResponse, error) {
	text, expires, err := v.n.newToken(ctx, time.Duration(r.GetTtlMs())*time.Millisecond, r.GetUses())
	if err != nil {
		return nil, fail("make a token", err)
	}
	return &apiv1.TokenResponse{Token: text, Expires: timestamppb.New(expires), Uses: r.GetUses()}, nil
}

func (v *verbs) RevokeToken(ctx context.Context, r *apiv1.RevokeTokenRequest) (*apiv1.RevokeTokenResponse, error) {
	revoked, err := v.n.revokeToken(ctx, r.GetToken())
	if errors.Is(err, errNoRegister) {
		return nil, api.Fail(connect.CodeNotFound, "revoke the token", "this cluster did not make it", "")
	}
	if err != nil {
		return nil, fail("revoke the token", err)
	}
	return &apiv1.RevokeTokenResponse{Revoked: revoked}, nil
}

func (v *verbs) Nodes(ctx context.Context, r *apiv1.NodesRequest) (*apiv1.NodesResponse, error) {
	n := v.n
	st := n.arbiter.Status()
	owned := map[peer.ID]uint32{}
	for _, reg := range n.arbiter.List(components.InstancePrefix) {
		owned[reg.Owner]++
	}
	out := &apiv1.NodesResponse{}
	var far []peer.ID // no heartbeats pass between them and this node
	for _, m := range n.members.All() {
		if r.GetNode() != "" && r.GetNode() != m.Name && r.GetNode() != m.ID.String() {
			continue
		}
		a := &apiv1.Node{
			Name: m.Name, Id: m.ID.String(), State: m.State.String(), Addrs: m.Addrs, Connection: cmp.Or(m.Connection, "none"), Labels: m.Labels, Version: m.Version,
			Since: timestamppb.New(m.Since), Evidence: m.Evidence, Zone: m.Zone, Role: m.Role, Platform: m.Platform, Voter: slices.Contains(st.Voters, m.ID),
			Coordinator: st.Coordinator == m.ID, Draining: m.Draining, CpuMillis: m.CPUMillis, MemoryBytes: m.MemoryBytes, DiskBytes: m.DiskBytes,
			Instances: owned[m.ID], Started: timestamppb.New(time.UnixMilli(m.StartedUnixMs)),
		}
		for _, id := range m.Watchers {
			a.Watchers = append(a.Watchers, n.nameOf(id))
		}
		switch {
		case m.ID == n.id:
			a.Connection, a.RttMs = "self", proto.Float64(0)
		case m.RTT > 0:
			a.RttMs = proto.Float64(ms(m.RTT))
		default:
			far = append(far, m.ID)
		}
		out.Nodes = append(out.Nodes, a)
	}
	measured := n.members.Measure(ctx, far)
	for _, a := range out.Nodes {
		if id, err := peer.Decode(a.Id); err == nil && measured[id] > 0 {
			a.RttMs = proto.Float64(ms(measured[id]))
		}
	}
	if r.GetNode() != "" && len(out.Nodes) == 0 {
		return nil, api.Fail(connect.CodeNotFound, "show node "+r.GetNode(), "no member has this name or id", "coppice nodes")
	}
	slices.SortFunc(out.Nodes, func(a, b *apiv1.Node) int { return cmp.Or(cmp.Compare(a.Name, b.Name), cmp.Compare(a.Id, b.Id)) })
	return out, nil
}

func (v *verbs) Status(context.Context, *apiv1.StatusRequest) (*apiv1.StatusResponse, error) {
	n := v.n
	st := n.arbiter.Status()
	out := &apiv1.StatusResponse{
		Cluster: n.state.Cluster, Nodes: &apiv1.NodeCounts{}, Components: &apiv1.ComponentCounts{}, Node: n.cfg.Name, Version: n.cfg.Version, Paused: n.paused(),
		Pages: n.pageStatus(), Unsaved: &apiv1.UnsavedStatus{},
		Arbiter: &apiv1.ArbiterStatus{Incarnation: st.Incarnation, Index: st.Index, Format: st.Format},
	}
	if st.HasLeader {
		out.Arbiter.Leader = n.nameOf(st.Leader)
	}
	if st.Coordinator != "" {
		out.Arbiter.Coordinator = n.nameOf(st.Coordinator)
	}
	if st.Primary != "" {
		out.Arbiter.Primary, out.Arbiter.Paired = n.nameOf(st.Primary), st.Paired
	}
	for _, id := range st.Voters {
		out.Arbiter.Voters = append(out.Arbiter.Voters, n.nameOf(id))
	}
	for _, id := range st.Learners {
		out.Arbiter.Learners = append(out.Arbiter.Learners, n.nameOf(id))
	}
	for _, m := range n.members.All() {
		switch m.State {
		case members.Alive:
			out.Nodes.Alive++
		case members.Suspect:
			out.Nodes.Suspect++
		case members.Dead:
			out.Nodes.Dead++
		case members.Left:
			out.Nodes.Left++
		case members.Quarantined:
			out.Nodes.Quarantined++
		}
	}
	for _, in := range n.instances("") {
		switch components.State(in.GetState()) {
		case components.Running, components.Degraded, components.Frozen:
			out.Components.Started++
		default:
			out.Components.Other++
		}
		n.unsaved(out.Unsaved, in)
		if why := n.unsafe(in); why != "" {
			out.Unsafe = append(out.Unsafe, &apiv1.Unsafe{Subject: in.GetInstance(), Why: why})
		}
	}
	if why := n.unsafeVotes(st, out.Nodes.Alive); why != "" {
		out.Unsafe = append(out.Unsafe, &apiv1.Unsafe{Subject: "cluster", Why: why})
	}
	out.Unsafe = append(out.Unsafe, n.zoneRisks()...)
	out.Warnings = n.warnings(st)
	return out, nil
}

// unsaved adds what one instance has answered since its last acknowledged checkpoint.
func (n *Node) unsaved(sum *apiv1.UnsavedStatus, in *apiv1.Instance) {
	if k := in.GetCallsSinceCheckpoint(); k > 0 {
		sum.Calls += k
		sum.Instances++
	}
	holders := 0
	for _, m := range n.members.Alive() {
		if holds(m) {
			holders++
		}
	}
	want := min(supervisor.Replicas, holders)
	if in.GetReplicasWanted() > 0 {
		want = int(in.GetReplicasWanted()) // whether there are so many nodes or not
	}
	if in.GetCheckpointSeq() > 0 && in.GetDurable() != "none" && int(in.GetReplicasAlive()) < want {
		sum.FewHolders++
	}
}

// pageStatus says what became of the pages that lie here.
func (n *Node) pageStatus() *apiv1.PageStatus {
	u := n.blobs.Usage()
	out := &apiv1.PageStatus{Corrupt: u.Corrupt, Repaired: u.Repaired, ScrubbedBytes: u.Scrub.Bytes}
	if !u.Scrub.Last.IsZero() {
		out.LastScrubAgeMs = proto.Uint64(uint64(time.Since(u.Scrub.Last).Milliseconds()))
	}
	return out
}

// unsafeVotes says whose loss would stop decisions now; "": nobody's.
func (n *Node) unsafeVotes(st arbiter.Status, alive uint32) string {
	switch {
	case len(st.Voters) == 1 && alive > 1:
		return "one voter: without " + n.nameOf(st.Voters[0]) + " nothing can be decided until it is back; the others are about to vote, too"
	case len(st.Voters) == 2 && st.Primary == "":
		return "two voters, and neither may go on without the other yet"
	case len(st.Voters) == 2:
		return "two voters: a killed process of either is survived, but without a proof of death only " + n.nameOf(st.Primary) +
			" goes on alone; a third node cures it"
	}
	return ""
}

// unsafe says what the loss of one node would cost an instance now; "" nothing.
func (n *Node) unsafe(in *apiv1.Instance) string {
	state := components.State(in.GetState())
	switch {
	case in.GetQuarantined():
		return "quarantined: it is started nowhere; try coppice start " + in.GetComponent()
	case in.GetDurable() == "none":
		return ""
	case in.GetCheckpointSeq() > 0 && in.GetReplicasAlive() == 0:
		return "no living node is known to hold its checkpoint"
	case in.GetCheckpointSeq() > 0 && in.GetReplicasAlive() < 2:
		return "its checkpoint lies on one node only"
	case state == components.Degraded:
		return cmp.Or(in.GetReason(), "degraded")
	case state.Serves() && in.GetWouldRestartOn() == "" && len(n.members.Alive()) > 1:
		return "no other node could take it over"
	}
	return ""
}

func (n *Node) warnings(st arbiter.Status) []string {
	var out []string
	if !st.HasLeader {
		out = append(out, "the arbiter has no leader that this node can reach: nothing can be placed, moved or committed until a majority of the voters is back; if they are gone for good: coppice recover")
	}
	if st.Halted != "" {
		out = append(out, "this node stopped voting: "+st.Halted)
	}
	if n.store.Low() {
		out = append(out, "the disk of this node is low: it is no holder and no voter")
	}
	if was := n.renewedWarning(); was != "" {
		out = append(out, was)
	}
	return append(out, n.faults.list()...)
}

func (v *verbs) Doctor(ctx context.Context, _ *apiv1.DoctorRequest) (*apiv1.DoctorResponse, error) {
	n := v.n
	out := &apiv1.DoctorResponse{Healthy: true}
	add := func(severity, subject, finding, cause, fix string) {
		out.Healthy = out.Healthy && severity != "error"
		out.Findings = append(out.Findings, &apiv1.Finding{Severity: severity, Subject: subject, Finding: finding, Cause: cause, Fix: fix})
	}
	st, err := v.Status(ctx, &apiv1.StatusRequest{})
	if err != nil {
		return nil, err
	}
	if st.GetArbiter().GetLeader() == "" {
		add("error", "arbiter", "no leader", "a majority of the voters cannot be reached from here", "start the missing nodes, or mend the link to them: if they run, they go on without this node; coppice recover if they are gone for good")
	} else {
		add("ok", "arbiter", fmt.Sprintf("led by %s, %d voters", st.GetArbiter().GetLeader(), len(st.GetArbiter().GetVoters())), "", "")
	}
	for _, m := range n.members.All() {
		switch m.State {
		case members.Suspect:
			add("warning", m.Name, "node is suspect", m.Evidence, "coppice doctor in some seconds: it is alive or dead then; if it is suspect again and again, look at its load, and at the link from "+n.cfg.Name)
		case members.Quarantined:
			add("warning", m.Name, "node is quarantined", m.Evidence, "nothing, it is used again then by itself; coppice readmit "+m.Name+" to end it now, once it is stable")
		case members.Dead:
			fix := "start it again, or coppice revoke " + m.Name
			if st.GetArbiter().GetLeader() == "" { // it may be this side that is cut off
				fix = "start it again; if it runs, mend the link between it and " + n.cfg.Name
			}
			add("warning", m.Name, "node is dead", m.Evidence, fix)
		}
	}
	for _, in := range n.instances("") {
		switch components.State(in.GetState()) {
		case components.Running, components.Stopped, components.Frozen:
		case components.Failed:
			add("error", in.GetInstance(), "failed", in.GetReason(), "coppice logs "+in.GetComponent())
		default:
			add("warning", in.GetInstance(), in.GetState(), in.GetReason(), "coppice why "+in.GetComponent())
		}
	}
	for _, u := range st.GetUnsafe() {
		if zone, ok := strings.CutPrefix(u.GetSubject(), "zone "); ok {
			add("warning", u.GetSubject(), "its loss stops all writes", u.GetWhy(), "coppice drill --zone "+zone)
			continue
		}
		add("warning", u.GetSubject(), "not safe against the loss of one node", u.GetWhy(), "add a node: coppice token")
	}
	for _, w := range st.GetWarnings() {
		add("warning", n.cfg.Name, w, "", "")
	}
	pagesFinding(st.GetPages(), n.cfg.Name, add)
	if lag := n.members.Lag(); lag > 200*time.Millisecond {
		add("warning", n.cfg.Name, fmt.Sprintf("this node is starved: it runs %s late", lag.Round(time.Millisecond)), "too little CPU for what runs here", "fewer components here, or coppice drain "+n.cfg.Name)
	}
	for _, d := range n.registry.Drops() {
		if d.State == "refused" || d.State == "incomplete" {
			add("warning", "registry", d.File+" is "+d.State, d.Reason, "remove it from "+n.cfg.Plugins)
		}
	}
	return out, nil
}

// pagesFinding tells how the pages of a node are.
func pagesFinding(p *apiv1.PageStatus, node string, add func(severity, subject, finding, cause, fix string)) {
	checked := "not all of them were read and checked yet since it started"
	if p.LastScrubAgeMs != nil {
		checked = "all of them were read and checked " + (time.Duration(p.GetLastScrubAgeMs()) * time.Millisecond).Round(time.Second).String() + " ago"
	}
	switch {
	case p.GetCorrupt() > p.GetRepaired():
		add("warning", node, fmt.Sprintf("%d pages were corrupt, %d could not be fetched again yet", p.GetCorrupt(), p.GetCorrupt()-p.GetRepaired()), checked, "look at the disk; coppice events /nodes/"+node)
	case p.GetCorrupt() > 0:
		add("warning", node, fmt.Sprintf("%d pages were corrupt, all are fetched again", p.GetCorrupt()), checked, "look at the disk; coppice events /nodes/"+node)
	default:
		add("ok", node, "no page was found corrupt", checked, "")
	}
}

func (v *verbs) Drain(ctx context.Context, r *apiv1.DrainRequest, s *connect.ServerStream[apiv1.DrainUpdate]) error {
	m, err := v.n.findNode("drain", r.GetNode())
	if err != nil {
		return err
	}
	if m.ID != v.n.id {
		c, err := api.Forward(ctx, v.n, m.ID.String())
		if err != nil {
			return err
		}
		from, err := c.Drain(ctx, r)
		if err != nil {
			return err
		}
		return api.Relay(from, s)
	}
	return v.n.drain(ctx, time.Duration(r.GetTimeoutMs())*time.Millisecond, s.Send)
}

func (v *verbs) Leave(ctx context.Context, r *apiv1.LeaveRequest, s *connect.ServerStream[apiv1.DrainUpdate]) error {
	if v.n.votes() && !v.n.othersMayVote() {
		return api.Fail(connect.CodeFailedPrecondition, "leave", "no other node may vote: nothing could be decided without it", "coppice down for a stop; else coppice token, and join another node first")
	}
	if err := v.n.drain(ctx, time.Duration(r.GetTimeoutMs())*time.Millisecond, s.Send); err != nil {
		return err
	}
	if err := v.n.arbiter.StepDown(ctx); err != nil { // it has, unless the only other node that may vote is gone since
		return fail("leave", fmt.Errorf("hand over the vote: %w", err))
	}
	if err := v.n.sup.Retire(ctx); err != nil { // what belongs to each node stays with it
		v.n.log.Warn("leases were not given up: others wait for their end", "error", err)
	}
	v.n.members.Goodbye(ctx)
	v.n.stopSoon("left the cluster")
	return nil
}

func (v *verbs) Revoke(ctx context.Context, r *apiv1.RevokeRequest) (*apiv1.RevokeResponse, error) {
	m, err := v.n.findNode("revoke", r.GetNode())
	if err != nil {
		return nil, err
	}
	if m.ID == v.n.id {
		return nil, api.Fail(connect.CodeFailedPrecondition, "revoke "+m.Name, "it is the node that answers", "coppice leave, or revoke it from another node")
	}
	if err := v.n.expel(ctx, m.ID, "revoked by an operator"); err != nil {
		return nil, fail("revoke "+m.Name, err)
	}
	v.n.members.Expel(m.ID)
	return &apiv1.RevokeResponse{Node: m.Name, Id: m.ID.String()}, nil
}

// Readmit ends a quarantine, or a drain. Only the node itself can say so to all: each of the others holds a quarantine by what it has seen itself,
// and this one may have seen nothing of it.
func (v *verbs) Readmit(ctx context.Context, r *apiv1.ReadmitRequest) (*apiv1.ReadmitResponse, error) {
	n := v.n
	m, err := n.findNode("readmit", r.GetNode())
	if err != nil {
		return nil, err
	}
	what := "readmit " + m.Name
	switch m.State {
	case members.Alive, members.Quarantined:
	case members.Suspect:
		return nil, api.Fail(connect.CodeFailedPrecondition, what, "it is suspect ("+m.Evidence+"): it must answer for that", "the same command in some seconds: it is alive or dead then")
	default:
		return nil, api.Fail(connect.CodeFailedPrecondition, what, "it is "+m.State.String()+": it must run for that", "start it; if it is quarantined then, the same command again")
	}
	if m.ID != n.id {
		ctx, cancel := context.WithTimeout(ctx, readmitWithin)
		defer cancel()
		c, err := api.Forward(ctx, n, m.ID.String())
		if err != nil {
			return nil, err
		}
		return c.Readmit(ctx, &apiv1.ReadmitRequest{Node: m.ID.String()})
	}
	n.members.UpdateSelf(func(i *members.Info) { i.Draining = false })
	n.members.Readmit(ctx)
	n.events.Publish(events.Event{
		Channel: "/nodes/" + n.cfg.Name, Type: "readmitted", Trigger: "operator", Message: n.cfg.Name + " is used again: what it had died of, or was drained for, counts no more",
	})
	m = n.members.Self()
	return &apiv1.ReadmitResponse{Node: m.Name, Id: m.ID.String(), State: m.State.String()}, nil
}

func (v *verbs) DhtClosest(_ context.Context, r *apiv1.DhtClosestRequest) (*apiv1.DhtClosestResponse, error) {
	n := v.n
	key := r.GetKey()
	if key == "" {
		return nil, api.Fail(connect.CodeInvalidArgument, "dht closest", "a key is needed", "coppice dht closest /system/placement")
	}
	count := int(r.GetCount())
	if count == 0 {
		count = 8
	}
	point := keys.Of(key)
	out := &apiv1.DhtClosestResponse{Key: key, Hash: hex.EncodeToString(point[:])}
	for i, m := range n.members.Closest(key, count, func(m members.Member) bool { return m.State != members.Left }) {
		out.Nodes = append(out.Nodes, n.dhtNode(i+1, m.ID, point))
	}
	return out, nil
}

// dhtNode is one of those responsible for a point of the key space.
func (n *Node) dhtNode(rank int, id peer.ID, point keys.Point) *apiv1.DhtNode {
	d := keys.Distance(point, keys.OfPeer(id))
	out := &apiv1.DhtNode{Rank: uint32(rank), Name: n.nameOf(id), Id: id.String(), Distance: hex.EncodeToString(d[:8])}
	if m, ok := n.members.Member(id); ok {
		out.State = m.State.String()
		out.Eligible = m.State == members.Alive && !m.NoVoter && !m.Draining && m.Role != components.RoleWorker
		out.Voter = slices.Contains(n.arbiter.Status().Voters, id)
	}
	return out
}

// findNode returns a member by name or id.
func (n *Node) findNode(what, node string) (members.Member, error) {
	if node == "" {
		return n.members.Self(), nil
	}
	if m, ok := n.members.ByName(node); ok {
		return m, nil
	}
	if id, err := peer.Decode(node); err == nil {
		if m, ok := n.members.Member(id); ok {
			return m, nil
		}
	}
	var names []string
	for _, m := range n.members.All() {
		names = append(names, m.Name)
	}
	slices.Sort(names)
	return members.Member{}, api.FailWith(connect.CodeNotFound, &apiv1.Problem{
		What: what + " " + node, Why: fmt.Sprintf("no member has this name or id; there are %v", names), Try: "coppice nodes", Candidates: names,
	})
}

func (n *Node) nameOf(id peer.ID) string {
	if m, ok := n.members.Member(id); ok && m.Name != "" {
		return m.Name
	}
	if id == "" {
		return ""
	}
	return id.String()
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}
