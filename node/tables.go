package node

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sort"
	"strings"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/kb"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// eventRows is how many events a query sees.
const eventRows = 10_000

func text(name, doc string) kb.Column    { return kb.Column{Name: name, Type: "TEXT", Doc: doc} }
func integer(name, doc string) kb.Column { return kb.Column{Name: name, Type: "INTEGER", Doc: doc} }
func number(name, doc string) kb.Column  { return kb.Column{Name: name, Type: "REAL", Doc: doc} }

// registerTables gives the query engine the tables of the platform.
func (n *Node) registerTables() error {
	n.kb = kb.New()
	for _, t := range []kb.Table{n.nodesTable(), n.factsTable(), n.componentsTable(), n.instancesTable(), n.checkpointsTable(), n.historyTable(), n.branchesTable(), n.eventsTable(), n.artifactsTable(), n.appsTable(), n.trafficTable(), n.decisionsTable()} {
		if err := n.kb.Register(t); err != nil {
			return err
		}
	}
	return nil
}

// freshen brings the local view up to what a query asks for.
func (n *Node) freshen(ctx context.Context, f kb.Freshness) error {
	if f.Linearizable {
		return n.arbiter.Sync(ctx)
	}
	return nil
}

func (n *Node) nodesTable() kb.Table {
	return kb.Table{
		Name: "nodes", Doc: "members and their machines",
		Columns: []kb.Column{
			text("name", ""), text("id", "peer id"), text("state", ""), text("zone", ""), text("role", ""), text("version", ""), text("platform", "os/arch"), integer("voter", ""),
			integer("cpu_millis", "offered"), integer("memory_mib", "offered"), number("free_mib", "memory"), number("free_disk_mib", ""), number("load1", ""), number("load5", ""),
			number("cpu_percent", ""), number("node_rss_mib", "of coppice itself"), number("rtt_ms", "from here"), number("age_ms", ""), text("source", ""),
		},
		List: func(ctx context.Context, f kb.Freshness) (kb.Rows, error) {
			if err := n.freshen(ctx, f); err != nil {
				return kb.Rows{}, err
			}
			facts, ages := n.hostFacts(ctx)
			voters := n.arbiter.Status().Voters
			out := kb.Rows{}
			for _, m := range n.members.All() {
				h := facts[m.ID].Facts
				age := any(nil)
				if a, ok := ages[m.ID]; ok {
					age = ms(a)
					out.MaxAge = max(out.MaxAge, a)
				}
				out.Rows = append(out.Rows, []any{
					m.Name, m.ID.String(), m.State.String(), m.Zone, m.Role, m.Version, m.Platform, slices.Contains(voters, m.ID), int64(m.CPUMillis), int64(m.MemoryBytes >> 20),
					fact(h, "free_mib"), fact(h, "free_disk_mib"), fact(h, "load1"), fact(h, "load5"), fact(h, "cpu_percent"), fact(h, "node_rss_mib"), ms(m.RTT), age, m.Name,
				})
				out.Asked++
				if age != nil {
					out.Answered++
				}
			}
			return out, nil
		},
	}
}

// maybe is NULL where a number is not known.
func maybe(v *uint64) any {
	if v == nil {
		return nil
	}
	return int64(*v)
}

func fact(f map[string]float64, name string) any {
	if v, ok := f[name]; ok {
		return v
	}
	return nil
}

func (n *Node) factsTable() kb.Table {
	return kb.Table{
		Name: "facts", Doc: "everything observed, one row a fact",
		Columns: []kb.Column{text("subject", "node"), text("name", ""), number("value", ""), number("age_ms", ""), text("source", "")},
		List: func(ctx context.Context, _ kb.Freshness) (kb.Rows, error) {
			facts, ages := n.hostFacts(ctx)
			out := kb.Rows{}
			for id, h := range facts {
				out.MaxAge = max(out.MaxAge, ages[id])
				names := make([]string, 0, len(h.Facts))
				for k := range h.Facts {
					names = append(names, k)
				}
				sort.Strings(names)
				for _, k := range names {
					out.Rows = append(out.Rows, []any{h.Node, k, h.Facts[k], ms(ages[id]), h.Node})
				}
			}
			out.Asked, out.Answered = len(n.members.Alive()), len(facts)
			return out, nil
		},
	}
}

// trafficTable is about the node that answers: who wants to know where the bytes go asks the node that sends them.
func (n *Node) trafficTable() kb.Table {
	return kb.Table{
		Name: "traffic", Doc: "what each protocol of the node that answers has moved since it started, without the framing of yamux, TLS and TCP",
		Columns: []kb.Column{
			text("node", ""), text("protocol", ""), integer("sent", "bytes"), integer("received", "bytes"), integer("writes", ""), integer("reads", ""), number("age_ms", ""), text("source", ""),
		},
		List: func(context.Context, kb.Freshness) (kb.Rows, error) {
			out := kb.Rows{Asked: 1, Answered: 1}
			for _, f := range n.overlay.Traffic() {
				out.Rows = append(out.Rows, []any{n.cfg.Name, f.Protocol, int64(f.Sent), int64(f.Received), int64(f.Writes), int64(f.Reads), 0.0, n.cfg.Name})
			}
			return out, nil
		},
	}
}

func (n *Node) appsTable() kb.Table {
	return kb.Table{
		Name: "apps", Doc: "applications", Columns: []kb.Column{text("application", ""), integer("version", ""), integer("removing", ""), number("age_ms", ""), text("source", "")},
		List: func(ctx context.Context, f kb.Freshness) (kb.Rows, error) {
			if err := n.freshen(ctx, f); err != nil {
				return kb.Rows{}, err
			}
			age := n.viewAge()
			out := kb.Rows{MaxAge: age, Asked: 1, Answered: 1}
			for _, a := range n.applications() {
				out.Rows = append(out.Rows, []any{a.GetName(), int64(a.GetVersion()), a.GetRemoving(), ms(age), "arbiter"})
			}
			return out, nil
		},
	}
}

// jsonList is a list as one value of a row: json_each takes it apart.
func jsonList(list []string) string {
	if len(list) == 0 {
		return "[]"
	}
	b, err := json.Marshal(list)
	if err != nil { // text always marshals
		return "[]"
	}
	return string(b)
}

// viewAge is how old what this node knows of the registers may be.
func (n *Node) viewAge() time.Duration {
	if age := n.arbiter.Status().FeedAge; age > 0 {
		return age
	}
	return 0
}

func (n *Node) componentsTable() kb.Table {
	return kb.Table{
		Name: "components", Doc: "components as they should be",
		Columns: []kb.Column{
			text("component", "app/name"), text("application", ""), text("artifact", ""), text("version", ""), text("digest", ""), text("durable", ""), text("guarantee", ""),
			integer("instances", "wanted"), integer("running", ""), number("age_ms", ""), text("source", ""),
		},
		List: func(ctx context.Context, f kb.Freshness) (kb.Rows, error) {
			if err := n.freshen(ctx, f); err != nil {
				return kb.Rows{}, err
			}
			age := n.viewAge()
			out := kb.Rows{MaxAge: age, Asked: 1, Answered: 1}
			type sum struct{ all, running int64 }
			sums := map[string]*sum{}
			rows := map[string][]any{}
			var order []string
			for _, in := range n.instances("") {
				s := sums[in.GetComponent()]
				if s == nil {
					s = &sum{}
					sums[in.GetComponent()] = s
					order = append(order, in.GetComponent())
					digest := ""
					if sub, err := n.find("", in.GetComponent()); err == nil {
						digest = sub.eff.Digest
					}
					rows[in.GetComponent()] = []any{in.GetComponent(), in.GetApplication(), in.GetArtifact(), in.GetVersion(), digest, in.GetDurable(), in.GetGuarantee()}
				}
				s.all++
				if in.GetState() == "running" {
					s.running++
				}
			}
			for _, c := range order {
				out.Rows = append(out.Rows, append(rows[c], sums[c].all, sums[c].running, ms(age), "arbiter"))
			}
			return out, nil
		},
	}
}

func (n *Node) instancesTable() kb.Table {
	return kb.Table{
		Name: "instances", Doc: "instances as their owners tell of them",
		Columns: []kb.Column{
			text("instance", ""), text("component", ""), text("application", ""), text("node", ""), text("state", ""), text("reason", ""), text("version", ""), integer("epoch", ""),
			integer("uptime_ms", ""), integer("restarts", ""), integer("checkpoint_seq", ""), text("would_restart_on", ""), integer("checkpoint_age_ms", "of the last acknowledged"),
			integer("calls_since_checkpoint", "answered since then; 0 with each-call"), integer("replicas_alive", "living nodes that hold it"), text("durable_now", "how it is saved in fact"),
			text("standby", "cold, warm or hot"), text("standby_node", "hot: where a process waits that has its state"), integer("standby_behind", "checkpoints that it has not been given yet"),
			number("age_ms", ""), text("source", ""),
		},
		List: func(ctx context.Context, f kb.Freshness) (kb.Rows, error) {
			if err := n.freshen(ctx, f); err != nil {
				return kb.Rows{}, err
			}
			reports := n.reports(ctx)
			out := kb.Rows{}
			for _, in := range n.instances("") {
				age, source := n.viewAge(), "arbiter"
				if r, ok := reports[in.GetInstance()]; ok {
					age, source = r.age, in.GetNode()
				}
				out.MaxAge = max(out.MaxAge, age)
				out.Rows = append(out.Rows, []any{
					in.GetInstance(), in.GetComponent(), in.GetApplication(), in.GetNode(), in.GetState(), in.GetReason(), in.GetVersion(), int64(in.GetEpoch()), int64(in.GetUptimeMs()),
					int64(in.GetRestarts()), int64(in.GetCheckpointSeq()), in.GetWouldRestartOn(), maybe(in.CheckpointAgeMs), maybe(in.CallsSinceCheckpoint),
					int64(in.GetReplicasAlive()), in.GetDurableNow(), in.GetStandby(), in.GetStandbyNode(), maybe(in.StandbyBehind), ms(age), source,
				})
			}
			out.Asked = len(n.members.Alive())
			out.Answered = out.Asked
			return out, nil
		},
	}
}

func (n *Node) checkpointsTable() kb.Table {
	return kb.Table{
		Name: "checkpoints", Doc: "the last acknowledged checkpoint of each instance",
		Columns: []kb.Column{
			text("instance", ""), integer("seq", ""), text("root", "hex"), integer("replicas", ""), text("holders", "JSON list of nodes"), integer("w", "how many had to acknowledge"), integer("epoch", ""),
			integer("bytes", ""), number("age_ms", "of the checkpoint"), text("source", ""),
		},
		List: func(ctx context.Context, f kb.Freshness) (kb.Rows, error) {
			if err := n.freshen(ctx, f); err != nil {
				return kb.Rows{}, err
			}
			out := kb.Rows{MaxAge: n.viewAge(), Asked: 1, Answered: 1}
			for _, in := range n.instances("") {
				reg, ok := n.arbiter.Get("inst/" + in.GetInstance())
				if !ok || reg.Seq == 0 {
					continue
				}
				age := any(nil)
				if in.CheckpointAgeMs != nil {
					age = float64(in.GetCheckpointAgeMs())
				}
				out.Rows = append(out.Rows, []any{
					in.GetInstance(), int64(max(reg.Seq, in.GetCheckpointSeq())), fmt.Sprintf("%x", reg.Root), int64(len(in.GetReplicas())), jsonList(in.GetReplicas()), int64(reg.W), int64(reg.Epoch),
					int64(in.GetCheckpointBytes()), age, "arbiter",
				})
			}
			return out, nil
		},
	}
}

func (n *Node) artifactsTable() kb.Table {
	return kb.Table{
		Name: "artifacts", Doc: "the registry",
		Columns: []kb.Column{text("name", ""), text("version", ""), text("digest", ""), text("kind", ""), integer("bytes", ""), text("platforms", "JSON list"), number("age_ms", ""), text("source", "")},
		List: func(ctx context.Context, f kb.Freshness) (kb.Rows, error) {
			if err := n.freshen(ctx, f); err != nil {
				return kb.Rows{}, err
			}
			out := kb.Rows{MaxAge: n.viewAge(), Asked: 1, Answered: 1}
			for _, art := range n.registry.List() {
				a := n.artifact(art)
				out.Rows = append(out.Rows, []any{a.GetName(), a.GetVersion(), a.GetDigest(), a.GetKind(), int64(a.GetBytes()), jsonList(a.GetPlatforms()), ms(out.MaxAge), "arbiter"})
			}
			return out, nil
		},
	}
}

// branchesTable are what owners did that went on without the arbiter: those stored in the cluster, and those of this node that are not yet.
func (n *Node) branchesTable() kb.Table {
	return kb.Table{
		Name: "branches", Doc: "what owners did alone while they were cut off (on_partition: keep)",
		Columns: []kb.Column{
			text("branch", "app/name-0@branch-node-n"), text("instance", ""), text("node", "where it went on"), integer("epoch", ""), integer("base_seq", "the checkpoint that it began from"),
			integer("checkpoints", "of the branch"), text("outcome", "kept | merged | newest; empty: not decided yet"), text("reason", ""), text("root", "hex, of its last checkpoint"), text("version", ""),
			text("began", "RFC 3339, by its node's clock"), text("ended", "the same"), number("age_ms", ""), text("source", ""),
		},
		List: func(ctx context.Context, f kb.Freshness) (kb.Rows, error) {
			if err := n.freshen(ctx, f); err != nil {
				return kb.Rows{}, err
			}
			out := kb.Rows{MaxAge: n.viewAge(), Asked: 1, Answered: 1}
			stored := map[string]bool{}
			for _, reg := range n.arbiter.List(components.BranchPrefix) {
				var b componentsv1.Branch
				if err := proto.Unmarshal(reg.Body, &b); err != nil {
					return out, fmt.Errorf("register %s: %w", reg.Key, err)
				}
				name := strings.TrimPrefix(reg.Key, components.BranchPrefix)
				stored[name] = true
				out.Rows = append(out.Rows, branchRow(name, &b, ms(out.MaxAge), "arbiter"))
			}
			for _, b := range n.sup.Branches() {
				name := ""
				if b.GetNumber() > 0 {
					name = components.BranchName(b.GetInstance(), b.GetNodeName(), b.GetNumber())
				}
				if !stored[name] {
					out.Rows = append(out.Rows, branchRow(name, b, 0, n.cfg.Name))
				}
			}
			return out, nil
		},
	}
}

func branchRow(name string, b *componentsv1.Branch, age float64, source string) []any {
	at := func(unixMs uint64) string { return time.UnixMilli(int64(unixMs)).UTC().Format(time.RFC3339Nano) }
	return []any{
		name, b.GetInstance(), b.GetNodeName(), int64(b.GetEpoch()), int64(b.GetBaseSeq()), int64(b.GetCommits()), b.GetOutcome(), b.GetReason(), fmt.Sprintf("%x", b.GetRoot()),
		b.GetVersion(), at(b.GetSinceUnixMs()), at(b.GetUntilUnixMs()), age, source,
	}
}

func (n *Node) eventsTable() kb.Table {
	return kb.Table{
		Name: "events", Doc: "what happened, oldest first",
		Columns: []kb.Column{
			text("time", "RFC 3339"), text("channel", ""), text("type", ""), text("node", ""), text("trigger", ""), text("cause", ""), text("message", ""), text("fields", "JSON"), text("id", ""),
			number("age_ms", ""), text("source", ""),
		},
		List: func(context.Context, kb.Freshness) (kb.Rows, error) {
			out := kb.Rows{Asked: 1, Answered: 1}
			for _, ev := range n.events.List("/", time.Time{}, eventRows) {
				fields := []byte("{}")
				if len(ev.Fields) > 0 {
					var err error
					if fields, err = json.Marshal(ev.Fields); err != nil {
						return out, err
					}
				}
				out.Rows = append(out.Rows, []any{
					ev.Time.UTC().Format(time.RFC3339Nano), ev.Channel, ev.Type, ev.Node, ev.Trigger, ev.Cause, ev.Message, string(fields), ev.ID, ms(time.Since(ev.Time)), ev.Node,
				})
			}
			return out, nil
		},
	}
}

// queryFor answers a component's query of the knowledge base.
func (n *Node) queryFor(ctx context.Context, _ string, q *componentv1.QueryRequest, send func(*componentv1.QueryRow) error) error {
	if q.GetWatch() {
		return status.Error(codes.Unimplemented, "this version answers queries once; it does not watch them")
	}
	res, err := n.kb.Query(ctx, q.GetQuery(), kb.Options{Limit: int(q.GetLimit())})
	if err != nil {
		return status.Error(codes.InvalidArgument, err.Error())
	}
	for _, row := range res.Rows {
		obj := map[string]any{}
		for i, c := range res.Columns {
			obj[c] = row[i]
		}
		b, err := json.Marshal(obj)
		if err != nil {
			return err
		}
		if err := send(&componentv1.QueryRow{Json: b}); err != nil {
			return err
		}
	}
	return nil
}
