package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

// epoch is now in these tests.
var epoch = time.Date(2026, 11, 21, 12, 0, 0, 0, time.UTC)

func ago(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(epoch.Add(-d)) }

// fake is a cluster of three nodes with one application.
type fake struct {
	apiv1connect.UnimplementedControlHandler
	pushed   map[string][]byte // by file name
	deployed *apiv1.DeployRequest
	asked    proto.Message // the last request of a simple verb
	unwell   bool          // nothing becomes healthy
	hang     bool          // nodes is not answered, a backup breaks off
	backup   []byte
	asking   chan struct{} // closed when it hangs
}

func (f *fake) Token(_ context.Context, r *apiv1.TokenRequest) (*apiv1.TokenResponse, error) {
	f.asked = r
	return &apiv1.TokenResponse{Token: "cpt1.abc", Expires: timestamppb.New(epoch.Add(time.Duration(r.TtlMs) * time.Millisecond)), Uses: r.Uses}, nil
}

func (f *fake) Nodes(ctx context.Context, _ *apiv1.NodesRequest) (*apiv1.NodesResponse, error) {
	if f.hang {
		if f.asking != nil {
			close(f.asking)
		}
		<-ctx.Done()
		return nil, ctx.Err()
	}
	return &apiv1.NodesResponse{Nodes: []*apiv1.Node{
		{Name: "n1", Id: "12D3KooWAAAAAAAAAAAAAAAAn1", State: "alive", Addrs: []string{"/ip4/10.0.0.1/tcp/7400"}, RttMs: proto.Float64(0), Connection: "self", Version: "0.1.0", Since: ago(90 * time.Second), Role: "full", Voter: true, Coordinator: true, CpuMillis: 4000, MemoryBytes: 8 << 30, Instances: 2, Labels: map[string]string{"region": "eu", "disk": "ssd"}},
		{Name: "n2", Id: "12D3KooWBBBBBBBBBBBBBBBBn2", State: "suspect", RttMs: proto.Float64(0.4213), Connection: "direct", Version: "0.1.0", Since: ago(2 * time.Second), Role: "full", Voter: true, Watchers: []string{"n1", "n3"}, Evidence: "silent for 1.3s"},
		{Name: "n3", Id: "12D3KooWCCCCCCCCCCCCCCCCn3", State: "dead", Connection: "none", Version: "0.1.0", Since: ago(26 * time.Hour), Role: "worker", Zone: "b"},
	}}, nil
}

func (f *fake) Status(context.Context, *apiv1.StatusRequest) (*apiv1.StatusResponse, error) {
	return &apiv1.StatusResponse{
		Cluster: "c1", Node: "n1", Version: "0.1.0",
		Nodes:      &apiv1.NodeCounts{Alive: 1, Suspect: 1, Dead: 1},
		Arbiter:    &apiv1.ArbiterStatus{Leader: "n1", Voters: []string{"n1", "n2"}, Incarnation: 1, Coordinator: "n1", Index: 42},
		Components: &apiv1.ComponentCounts{Started: 2, Other: 1},
		Unsafe:     []*apiv1.Unsafe{{Subject: "shop/web-0", Why: "its last checkpoint is on n1 only"}},
		Pages:      &apiv1.PageStatus{Corrupt: 2, Repaired: 1, LastScrubAgeMs: proto.Uint64(3_600_000), ScrubbedBytes: 1 << 30}, Unsaved: &apiv1.UnsavedStatus{Calls: 12, Instances: 1, FewHolders: 1},
	}, nil
}

func (f *fake) Doctor(context.Context, *apiv1.DoctorRequest) (*apiv1.DoctorResponse, error) {
	return &apiv1.DoctorResponse{Findings: []*apiv1.Finding{
		{Severity: "ok", Subject: "disk", Finding: "fsync takes 0.2 ms"},
		{Severity: "error", Subject: "n3", Finding: "dead for 1d02h", Cause: "refused the redial", Fix: "coppice up on its machine"},
	}}, nil
}

func (f *fake) Drain(_ context.Context, r *apiv1.DrainRequest, s *connect.ServerStream[apiv1.DrainUpdate]) error {
	for _, u := range []*apiv1.DrainUpdate{
		{Node: r.Node, State: "handing over"},
		{Node: r.Node, State: "handed over", To: "n1"},
		{Node: r.Node, Remaining: 2},
		{Node: r.Node, Instance: "shop/store-0", To: "n1", State: "moving", Remaining: 2},
		{Node: r.Node, Instance: "shop/store-0", To: "n1", State: "moved", Moved: 1, Remaining: 1},
		{Node: r.Node, Instance: "shop/web-0", State: "moved", To: "n3", Moved: 2},
		{Node: r.Node, Moved: 2, Done: true, TookMs: 321},
	} {
		if err := s.Send(u); err != nil {
			return err
		}
	}
	return nil
}

func (f *fake) Down(_ context.Context, r *apiv1.DownRequest) (*apiv1.DownResponse, error) {
	if !r.All {
		return &apiv1.DownResponse{Nodes: []*apiv1.DownNode{{Node: "n1", Stopped: true}}}, nil
	}
	return &apiv1.DownResponse{Nodes: []*apiv1.DownNode{{Node: "n1", Stopped: true}, {Node: "n2", Reason: "it does not answer"}}, Checkpoints: 2, TookMs: 55}, nil
}

func (f *fake) RegistryPush(_ context.Context, s *connect.ClientStream[apiv1.RegistryPushRequest]) (*apiv1.RegistryPushResponse, error) {
	var header *apiv1.RegistryPushHeader
	var total uint64
	for s.Receive() {
		if h := s.Msg().GetHeader(); h != nil {
			header = h
			continue
		}
		ch := s.Msg().GetChunk()
		name := header.Files[ch.File].Name
		f.pushed[name] = append(f.pushed[name], ch.Data...)
		total += uint64(len(ch.Data))
	}
	if err := s.Err(); err != nil {
		return nil, err
	}
	if strings.Contains(header.Files[0].Name, "bad") {
		return nil, api.Fail(connect.CodeInvalidArgument, "push "+header.Files[0].Name, "Describe did not answer within 5s", "coppice registry list")
	}
	return &apiv1.RegistryPushResponse{
		Name: header.Files[0].Name, Version: "1.0.0", Digest: "sha256:" + header.Files[0].Sha256, Platforms: []string{"linux/amd64"}, Bytes: total,
		Kind: "component", Holders: []string{"n1", "n2"}, TookMs: 12,
	}, nil
}

func (f *fake) RegistryList(context.Context, *apiv1.RegistryListRequest) (*apiv1.RegistryListResponse, error) {
	return &apiv1.RegistryListResponse{Artifacts: []*apiv1.Artifact{
		{Name: "kv", Version: "1.2.0", Digest: "sha256:" + strings.Repeat("ab", 32), Platforms: []string{"linux/amd64", "linux/arm64"}, Bytes: 12_345_678, Kind: "component", State: "ready", Pushed: ago(time.Hour), PushedBy: "n1", Holders: []string{"n1", "n2"}},
		{File: "junk.bin", Node: "n2", State: "refused", Reason: "no executable", Bytes: 10},
	}}, nil
}

func (f *fake) Plan(_ context.Context, r *apiv1.PlanRequest) (*apiv1.PlanResponse, error) {
	f.asked = r
	if r.Replay != "" {
		return &apiv1.PlanResponse{Feasible: true, Replay: &apiv1.Replay{Digest: "sha256:" + r.Replay, Node: "n1", Same: r.Replay == "abc", Time: ago(time.Minute), RequestBytes: 4096, PlanBytes: 512, TookMs: 1.5, Objective: 0.75}}, nil
	}
	return &apiv1.PlanResponse{
		Objective: 0.75, Bound: 0.8, ObjectiveBefore: 0.5, Changes: []string{"start shop/store-0 on n1"},
		Components: []*apiv1.PlannedInstance{
			{Instance: "shop/store-0", Node: "n1", Score: 0.75, RunnerUp: "n2", RunnerUpScore: 0.7, Successors: []string{"n2"}, Reason: "most free memory", Refused: []*apiv1.Refusal{{Node: "n3", Constraint: "alive", Detail: "dead"}}},
			{
				Instance: "shop/gpu-0", Refused: []*apiv1.Refusal{{Node: "n1", Constraint: `node.labels.gpu == "yes"`}, {Node: "n2", Constraint: `node.labels.gpu == "yes"`}},
				Conflict: []string{"capacity cpu", `require node.labels.gpu == "yes"`}, Remedies: []string{"without capacity cpu: n1 (cpu: 4 cores wanted, 2 cores left)"},
			},
		},
	}, nil
}

func (f *fake) Deploy(_ context.Context, r *apiv1.DeployRequest, s *connect.ServerStream[apiv1.DeployUpdate]) error {
	f.deployed = r
	apps := []*apiv1.DeployedApplication{{Application: "shop", Version: 3, Changed: true, Components: []*apiv1.DeployedComponent{
		{Component: "shop/store", Artifact: "kv", Version: "1.2.0", Digest: "sha256:abc", Instances: 1, Change: "added"},
	}}}
	if !r.Wait {
		return s.Send(&apiv1.DeployUpdate{Applications: apps, Done: true, TookMs: 4})
	}
	waiting := []*apiv1.Waiting{{Instance: "shop/store-0", Node: "n1", State: "starting", Reason: "restoring"}}
	if err := s.Send(&apiv1.DeployUpdate{Applications: apps, Waiting: waiting}); err != nil {
		return err
	}
	if f.unwell {
		return api.Fail(connect.CodeDeadlineExceeded, "deploy "+r.File, "waited 1s for shop/store-0: starting on n1 (never healthy: exit 3)", "coppice logs shop/store-0")
	}
	return s.Send(&apiv1.DeployUpdate{Applications: apps, Healthy: true, Done: true, TookMs: 812})
}

func (f *fake) Apps(context.Context, *apiv1.AppsRequest) (*apiv1.AppsResponse, error) {
	return &apiv1.AppsResponse{Apps: []*apiv1.App{{Application: "shop", Version: 3, State: "degraded", Reason: "web-1 has no node", Components: 2, Instances: 3, Running: 2, Urls: []string{"/app/shop/"}}}}, nil
}

func (f *fake) Ps(_ context.Context, r *apiv1.PsRequest) (*apiv1.PsResponse, error) {
	f.asked = r
	return &apiv1.PsResponse{Instances: []*apiv1.Instance{
		{
			Application: "shop", Component: "shop/store", Instance: "shop/store-0", Node: "n1", Artifact: "kv", Version: "1.2.0", State: "running", Epoch: 3, UptimeMs: 65_000,
			CheckpointAgeMs: proto.Uint64(0), CheckpointSeq: 17, Replicas: []string{"n1", "n2"}, WouldRestartOn: "n2", PredictedRestartMs: proto.Float64(48.5), Durable: "each-call", Guarantee: "safe",
			DurableNow: "100ms", CallsSinceCheckpoint: proto.Uint64(12), ReplicasAlive: 1,
		},
		{Application: "shop", Component: "shop/web", Instance: "shop/web-1", State: "pending", Reason: "no node is feasible", Epoch: 0},
	}}, nil
}

func (f *fake) Inspect(_ context.Context, r *apiv1.InspectRequest) (*apiv1.InspectResponse, error) {
	if r.Component == "web" {
		return nil, api.Ambiguous("inspect web", "web", []string{"shop/web", "blog/web"})
	}
	return &apiv1.InspectResponse{
		Component: "shop/store", Application: "shop", Artifact: "kv", Version: "1.2.0", Digest: "sha256:" + strings.Repeat("ab", 32), Type: "coppice.kv", Kind: "component", State: "running",
		Durable: "each-call", DurableBy: "txn-calls", Guarantee: "safe", Features: []string{"txn-calls"},
		Provides: []*apiv1.Interface{{Name: "store", Kind: "grpc", Service: "coppice.kv.v1.Kv", Methods: []*apiv1.Method{
			{Name: "coppice.kv.v1.Kv/Get", Input: "GetRequest", Output: "GetReply", Idempotency: "no side effects"},
			{Name: "coppice.kv.v1.Kv/Put", Input: "PutRequest", Output: "PutReply"},
		}}},
		Requires:   []*apiv1.Interface{{Name: "audit", Kind: "grpc", Service: "audit.v1.Audit", Optional: true}},
		Attributes: []*apiv1.AttributeInfo{{Name: "capacity", Value: "5000", Type: "int64", From: "command"}, {Name: "password", Secret: true, From: "manifest"}},
		Bindings:   []*apiv1.Binding{{Interface: "audit", Service: "audit.v1.Audit", Optional: true}},
		Overlay:    &apiv1.Overlay{Version: "1.2.0", Nodes: map[string]string{"shop/store-0": "n1"}, Attributes: map[string]string{"capacity": "5000"}},
		Calls:      &apiv1.CallStats{Total: 1000, Held: 3, P50Ms: proto.Float64(0.25), P99Ms: proto.Float64(1.5), PerSecond: 20.25},
		Instances: []*apiv1.InspectInstance{{
			Instance: "shop/store-0", Node: "n1", State: "running", Epoch: 3, Incarnation: 1, Settled: true, Pid: 4711, UptimeMs: 65_000, Restarts: 1, Trigger: "operator", Cause: "swap from 1.1.0",
			Checkpoint: &apiv1.CheckpointInfo{Seq: 17, Bytes: 1 << 20, AgeMs: proto.Uint64(120), Replicas: []string{"n1", "n2"}, ReplicasAlive: 1, CallsSince: proto.Uint64(12)}, Successors: []string{"n2"}, PreviousVersion: "1.1.0",
		}},
	}, nil
}

func (f *fake) Attr(_ context.Context, r *apiv1.AttrRequest) (*apiv1.AttrResponse, error) {
	f.asked = r
	res := &apiv1.AttrResponse{Component: r.Component, Revision: 2, DryRun: r.DryRun}
	for k, v := range r.Set {
		res.Attributes = append(res.Attributes, &apiv1.AttributeInfo{Name: k, Value: v, From: "command"})
	}
	return res, nil
}

func (f *fake) Freeze(_ context.Context, r *apiv1.LifecycleRequest) (*apiv1.LifecycleResponse, error) {
	return &apiv1.LifecycleResponse{Component: r.Component, State: "frozen", TookMs: 3.25, Instances: []*apiv1.Waiting{{Instance: "shop/store-0", Node: "n1", State: "frozen"}}}, nil
}

func (f *fake) Swap(_ context.Context, r *apiv1.SwapRequest) (*apiv1.ReplaceResponse, error) {
	f.asked = r
	return &apiv1.ReplaceResponse{Component: r.Component, From: "1.2.0", To: r.Version, PauseMs: 7.5, Bytes: 1 << 20, CallsHeld: 14, TookMs: 140}, nil
}

func (f *fake) Checkpoint(_ context.Context, r *apiv1.CheckpointRequest) (*apiv1.CheckpointResponse, error) {
	return &apiv1.CheckpointResponse{Component: r.Component, Seq: 18, Bytes: 1 << 20, Replicas: []string{"n1", "n2"}, TookMs: 9, Id: "c7"}, nil
}

func (f *fake) Checkpoints(_ context.Context, r *apiv1.CheckpointsRequest) (*apiv1.CheckpointsResponse, error) {
	at := timestamppb.New(time.Date(2026, 11, 21, 9, 30, 0, 0, time.UTC))
	return &apiv1.CheckpointsResponse{Component: r.Component, History: 10, Checkpoints: []*apiv1.Checkpoint{
		{Instance: "shop/store-0", Id: "c3", Seq: 11, Time: at, AgeMs: 5_400_000, Version: "1.1.0", Bytes: 1 << 20, Why: "before swap", Holders: []string{"n1", "n2", "n3"}, HoldersAlive: 2},
		{Instance: "shop/store-0", Id: "c7", Seq: 18, Time: at, AgeMs: 61_000, Version: "1.2.0", Bytes: 3 << 19, Why: "by hand", Holders: []string{"n1", "n2"}, HoldersAlive: 2, Present: true},
		{Instance: "shop/store-0", Id: "@branch-n2-1", Branch: "shop/store-0@branch-n2-1", Seq: 14, Time: at, AgeMs: 5_400_000, Version: "1.1.0", Bytes: 1 << 20, Why: "branch, kept", Holders: []string{"n1", "n2"}, HoldersAlive: 1},
	}}, nil
}

func (f *fake) Restore(_ context.Context, r *apiv1.RestoreRequest) (*apiv1.ReplaceResponse, error) {
	f.asked = r
	return &apiv1.ReplaceResponse{Component: r.Component, From: "1.2.0", To: "1.2.0", PauseMs: 7.5, Bytes: 1 << 20, CallsHeld: 3, TookMs: 140, State: "that of c3 (checkpoint 11)", Kept: "c8"}, nil
}

func (f *fake) Call(_ context.Context, r *apiv1.CallRequest) (*apiv1.CallResponse, error) {
	f.asked = r
	return &apiv1.CallResponse{Json: `{"value":"9007199254740993"}`}, nil
}

func (f *fake) Why(_ context.Context, r *apiv1.WhyRequest) (*apiv1.WhyResponse, error) {
	return &apiv1.WhyResponse{Component: r.Component, Decisions: []*apiv1.Decision{{
		Instance: "shop/store-0", Node: "n1", ObjectiveBefore: 0.5, Objective: 0.75, Score: 0.75, RunnerUp: "n2", RunnerUpScore: 0.7, Reason: "most free memory",
		Refused: []*apiv1.Refusal{{Node: "n3", Constraint: "alive", Detail: "dead"}}, Trigger: "placement", Time: ago(time.Minute), Epoch: 3, DecidedBy: "n1", PreviousNode: "n2", Successors: []string{"n2"},
	}}}, nil
}

func (f *fake) Logs(_ context.Context, r *apiv1.LogsRequest, s *connect.ServerStream[apiv1.LogLine]) error {
	for i := range 2 {
		if err := s.Send(&apiv1.LogLine{Time: ago(time.Second), Instance: "shop/store-0", Node: "n1", Stream: []string{"stdout", "stderr"}[i], Text: fmt.Sprintf("line %d \x1b[31mred", i)}); err != nil {
			return err
		}
	}
	return nil
}

func (f *fake) Events(ctx context.Context, r *apiv1.EventsRequest, s *connect.ServerStream[apiv1.Event]) error {
	err := s.Send(&apiv1.Event{
		Id: "1", Channel: "/apps/shop/store-0", Type: "failover", Time: ago(time.Second), Node: "n1", Trigger: "neighbour", Cause: "n2 refused the redial", Message: "epoch 4 on n1", Fields: map[string]string{"took_ms": "48"},
	})
	if r.Follow {
		<-ctx.Done()
	}
	return err
}

func (f *fake) Query(_ context.Context, r *apiv1.QueryRequest) (*apiv1.QueryResponse, error) {
	if !strings.HasPrefix(r.Sql, "select") {
		return nil, api.Fail(connect.CodeInvalidArgument, "query", `near "selec": syntax error`, "coppice query \"select name from sqlite_master\"")
	}
	text := func(s string) *apiv1.Value { return &apiv1.Value{Kind: &apiv1.Value_Text{Text: s}} }
	num := func(n int64) *apiv1.Value { return &apiv1.Value{Kind: &apiv1.Value_Integer{Integer: n}} }
	return &apiv1.QueryResponse{
		Columns: []string{"name", "free_mib", "load1", "name"},
		Rows: []*apiv1.Row{
			{Values: []*apiv1.Value{text("n1"), num(9007199254740993), {Kind: &apiv1.Value_Real{Real: 0.5}}, text("x")}},
			{Values: []*apiv1.Value{text("n2"), {}, {Kind: &apiv1.Value_Boolean{Boolean: true}}, {Kind: &apiv1.Value_Blob{Blob: []byte{1, 2}}}}},
		},
		AsOf: timestamppb.New(epoch), MaxAgeMs: 210, NodesAsked: 3, NodesAnswered: 2,
	}, nil
}

func (f *fake) DhtClosest(_ context.Context, r *apiv1.DhtClosestRequest) (*apiv1.DhtClosestResponse, error) {
	return &apiv1.DhtClosestResponse{Key: r.Key, Hash: "5f1c", Nodes: []*apiv1.DhtNode{
		{Rank: 1, Name: "n1", Id: "12D3KooWAAAAAAAAAAAAAAAAn1", Distance: "03aa", State: "alive", Eligible: true, Voter: true},
		{Rank: 2, Name: "n2", Id: "12D3KooWBBBBBBBBBBBBBBBBn2", Distance: "41f0", State: "suspect", Voter: true},
	}}, nil
}

func (f *fake) DhtGet(_ context.Context, r *apiv1.DhtGetRequest) (*apiv1.DhtGetResponse, error) {
	if r.Key != "/kb/ckpt/shop/store-0" {
		return &apiv1.DhtGetResponse{Key: r.Key}, nil
	}
	return &apiv1.DhtGetResponse{Key: r.Key, Found: true, Value: []byte("seq 17"), Text: "seq 17", Writer: "n1", Incarnation: 1, Epoch: 3, Revision: 17, AgeMs: 120, Hops: 1, Copies: 3, Agree: 3, Signed: true, TookMs: 2.5, KadKey: "/kb/ckpt/shop/store-0"}, nil
}

func (f *fake) Recover(_ context.Context, r *apiv1.RecoverRequest) (*apiv1.RecoverResponse, error) {
	f.asked = r
	if r.From == "n2" {
		return &apiv1.RecoverResponse{From: "n2", Reason: "2 of 3 voters answer: that is a majority, and nothing needs to be recovered"}, nil
	}
	if r.From == "n4" {
		return lostAll(r), nil
	}
	out := &apiv1.RecoverResponse{
		Possible: true, From: "n1", Incarnation: 1,
		Survivors: []*apiv1.Survivor{
			{Node: "n1", Id: "12D3KooWAAAAAAAAAAAAAAAAn1", Role: "voter", Incarnation: 1, Term: 4, LastIndex: 33, Committed: 33, Applied: 33, Registers: 13, Voters: []string{"n1", "n2", "n3"}},
			{Node: "n4", Id: "12D3KooWDDDDDDDDDDDDDDDDn4", Role: "none"},
		},
		Missing: []*apiv1.Missing{{Node: "n2", Id: "12D3KooWBBBBBBBBBBBBBBBBn2", State: "dead", Since: ago(90 * time.Second)}},
		Adopted: []*apiv1.Adopted{
			{Instance: "shop/store-0", RegisterSeq: 3, Seq: 5, Holders: []string{"n1", "n4"}}, {Instance: "shop/web-0", RegisterSeq: 1, Seq: 2, Reason: "none of its holders is alive"},
		},
		Lost: []string{"what the arbiter committed after entry 33, if anything: only the missing voters know"}, TookMs: 2.5,
	}
	if r.Really {
		out.Done, out.Incarnation = true, 2
	}
	return out, nil
}

// lostAll is the answer of a cluster that has lost all of its voters.
func lostAll(r *apiv1.RecoverRequest) *apiv1.RecoverResponse {
	out := &apiv1.RecoverResponse{
		Possible: true, Rebuild: true, From: "n4", Incarnation: 1,
		Survivors: []*apiv1.Survivor{
			{Node: "n4", Id: "12D3KooWDDDDDDDDDDDDDDDDn4", Role: "none", ShownIncarnation: 1, ShownIndex: 174, ShownRegisters: 16},
			{Node: "n5", Id: "12D3KooWEEEEEEEEEEEEEEEEn5", Role: "none"},
		},
		Missing: []*apiv1.Missing{{Node: "n1", Id: "12D3KooWAAAAAAAAAAAAAAAAn1", State: "dead", Since: ago(time.Minute)}},
		Rebuilt: &apiv1.Rebuilt{Registers: 16, Applications: 2, Instances: 3, Artifacts: 2, Members: 5, FromView: 15, FromDht: 1, Asked: 2, Answered: 2},
		Lost:    []string{"what the arbiter committed after entry 174 and had not copied into the DHT: only the missing voters know"}, TookMs: 11,
	}
	if r.Really {
		out.Done, out.Incarnation = true, 2
	}
	return out
}

// Backup streams a small file, and breaks off, or sends something else than it says, when it is told to.
func (f *fake) Backup(_ context.Context, r *apiv1.BackupRequest, s *connect.ServerStream[apiv1.BackupChunk]) error {
	f.asked = r
	sum := sha256.Sum256(f.backup)
	done := &apiv1.BackupSummary{
		Cluster: "c1", Node: "n1", Incarnation: 1, Index: 42, Taken: ago(0), Registers: 3, Applications: 1, Artifacts: 2, Checkpoints: 2, Bytes: uint64(len(f.backup)),
		Sha256: hex.EncodeToString(sum[:]), TookMs: 12,
	}
	if f.unwell {
		done.Sha256 = "0"
	}
	if r.Partial {
		done.Omitted = []string{"checkpoint 7 of shop/web-0: node 0011 is at none of the 2 holders asked"}
	}
	if err := s.Send(&apiv1.BackupChunk{Kind: &apiv1.BackupChunk_State{State: "writing registers (3)"}}); err != nil {
		return err
	}
	for part := range slices.Chunk(f.backup, 100) {
		if err := s.Send(&apiv1.BackupChunk{Kind: &apiv1.BackupChunk_Data{Data: part}}); err != nil {
			return err
		}
	}
	if f.hang {
		return api.Fail(connect.CodeFailedPrecondition, "backup", "checkpoint 7 of shop/web-0: it is nowhere", "coppice doctor")
	}
	return s.Send(&apiv1.BackupChunk{Kind: &apiv1.BackupChunk_Done{Done: done}})
}

func (f *fake) Revoke(context.Context, *apiv1.RevokeRequest) (*apiv1.RevokeResponse, error) {
	return nil, errors.New("line one\nline two")
}

func (f *fake) Drill(_ context.Context, r *apiv1.DrillRequest, s *connect.ServerStream[apiv1.DrillUpdate]) error {
	f.asked = r
	if r.Zone != "" {
		return s.Send(&apiv1.DrillUpdate{
			Lost: []string{"n1", "n2"}, Voters: 3, VotersLeft: 1, WritesStop: true, Cure: "a node in a third zone", Done: true,
			Instances: []*apiv1.DrillInstance{{Instance: "shop/store-0", From: "n2", Durable: "5s", WouldLoseMs: proto.Uint64(2100), CopiesLeft: 1, Reason: "nobody can take it over"}},
		})
	}
	out := &apiv1.DrillUpdate{
		Lost: []string{"n2"}, Voters: 3, VotersLeft: 2, Coordinator: "n1",
		Instances: []*apiv1.DrillInstance{
			{Instance: "shop/store-0", From: "n2", To: "n1", Durable: "each-call", WouldLoseMs: proto.Uint64(0), CopiesLeft: 2, PredictedMs: proto.Float64(58)},
			{Instance: "shop/web-0", From: "n2", To: "n3", Durable: "none", PredictedMs: proto.Float64(40)},
		},
	}
	if !r.Really {
		out.Done = true
		return s.Send(out)
	}
	if err := s.Send(out); err != nil {
		return err
	}
	out.Done, out.CommitMs, out.TookMs = true, proto.Float64(31), proto.Float64(131)
	for _, i := range out.Instances {
		i.CameTo, i.TookMs = i.To, proto.Float64(131)
	}
	return s.Send(out)
}
