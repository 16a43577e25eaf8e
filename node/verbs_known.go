package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/dht/events"
	"github.com/coppice-project/coppice/dht/kb"
	"github.com/coppice-project/coppice/dht/keys"
	"github.com/coppice-project/coppice/dht/records"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

const (
	defaultEvents = 200
	maxEvents     = 10_000
	defaultTail   = 1000
)

func (v *verbs) Query(ctx context.Context, r *apiv1.QueryRequest) (*apiv1.QueryResponse, error) {
	res, err := v.n.kb.Query(ctx, r.GetSql(), kb.Options{
		Freshness: kb.Freshness{Within: time.Duration(r.GetFreshMs()) * time.Millisecond, Linearizable: r.GetLinearizable()}, Limit: int(r.GetLimit()),
	})
	var bad *kb.Error
	if errors.As(err, &bad) {
		return nil, api.Fail(connect.CodeInvalidArgument, "query", bad.Why, bad.Try)
	}
	if err != nil {
		return nil, fail("query", err)
	}
	out := &apiv1.QueryResponse{
		Columns: res.Columns, AsOf: timestamppb.New(res.AsOf), MaxAgeMs: ms(res.MaxAge), NodesAsked: uint32(res.Asked), NodesAnswered: uint32(res.Answered), Truncated: res.Truncated,
	}
	for _, row := range res.Rows {
		o := &apiv1.Row{}
		for _, val := range row {
			o.Values = append(o.Values, value(val))
		}
		out.Rows = append(out.Rows, o)
	}
	return out, nil
}

func value(v any) *apiv1.Value {
	switch v := v.(type) {
	case int64:
		return &apiv1.Value{Kind: &apiv1.Value_Integer{Integer: v}}
	case float64:
		return &apiv1.Value{Kind: &apiv1.Value_Real{Real: v}}
	case string:
		return &apiv1.Value{Kind: &apiv1.Value_Text{Text: v}}
	case []byte:
		return &apiv1.Value{Kind: &apiv1.Value_Blob{Blob: v}}
	case bool:
		return &apiv1.Value{Kind: &apiv1.Value_Boolean{Boolean: v}}
	case nil:
		return &apiv1.Value{}
	}
	return &apiv1.Value{Kind: &apiv1.Value_Text{Text: fmt.Sprint(v)}}
}

func (v *verbs) Events(ctx context.Context, r *apiv1.EventsRequest, s *connect.ServerStream[apiv1.Event]) error {
	n := v.n
	prefix := r.GetChannel()
	if prefix == "" {
		prefix = "/"
	}
	limit := int(r.GetLimit())
	if limit == 0 {
		limit = defaultEvents
	}
	limit = min(limit, maxEvents)
	prefix, wanted := eventsOf(prefix)
	var since time.Time
	if r.GetSince() != nil {
		since = r.GetSince().AsTime()
	}
	var feed chan events.Event
	if r.GetFollow() { // subscribed before the list is read: nothing falls between
		feed = make(chan events.Event, 1024)
		cancel := n.events.Subscribe(prefix, func(ev events.Event) {
			if !wanted(ev.Channel) {
				return
			}
			select {
			case feed <- ev:
			default: // a reader that is this slow reads the rest from the list
			}
		})
		defer cancel()
	}
	seen := map[string]bool{}
	list := slices.DeleteFunc(n.events.List(prefix, since, maxEvents), func(ev events.Event) bool { return !wanted(ev.Channel) })
	for _, ev := range list[max(0, len(list)-limit):] {
		seen[ev.ID] = true
		if err := s.Send(eventOut(ev)); err != nil {
			return err
		}
	}
	for r.GetFollow() {
		select {
		case <-ctx.Done():
			return nil
		case <-n.stopped:
			return nil
		case ev := <-feed:
			if seen[ev.ID] {
				continue
			}
			if err := s.Send(eventOut(ev)); err != nil {
				return err
			}
		}
	}
	return nil
}

// eventsOf is the channel to read for one that somebody asked for, and which events of it he means: a component's are those of its instances,
// which have channels of their own beside its.
func eventsOf(channel string) (prefix string, wanted func(string) bool) {
	const apps = "/apps/"
	name, ok := strings.CutPrefix(events.CleanChannel(channel), apps)
	t, err := components.ParseTarget(name)
	if !ok || err != nil || t.Ordinal >= 0 || t.Node != "" {
		return channel, func(string) bool { return true }
	}
	return apps + t.Application, func(ch string) bool {
		parts := strings.SplitN(strings.TrimPrefix(ch, apps), "/", 3)
		return len(parts) > 1 && (parts[1] == t.Component || componentOf(parts[0]+"/"+parts[1]) == t.Key())
	}
}

func eventOut(ev events.Event) *apiv1.Event {
	return &apiv1.Event{
		Id: ev.ID, Channel: ev.Channel, Type: ev.Type, Time: timestamppb.New(ev.Time), Node: ev.Node, Trigger: ev.Trigger, Cause: ev.Cause, Message: ev.Message, Fields: ev.Fields,
	}
}

func (v *verbs) Logs(ctx context.Context, r *apiv1.LogsRequest, s *connect.ServerStream[apiv1.LogLine]) error {
	n := v.n
	sub, err := n.find("logs", r.GetComponent())
	if err != nil {
		return err
	}
	if len(sub.instances) != 1 {
		if _, err := sub.one("logs"); err != nil {
			return err
		}
	}
	name := sub.instances[0]
	owner, err := n.owner("logs", name)
	if err != nil {
		return err
	}
	if owner != n.id && api.ForwardedFrom(ctx) == "" {
		c, err := api.Forward(ctx, n, owner.String())
		if err != nil {
			return err
		}
		from, err := c.Logs(ctx, &apiv1.LogsRequest{Component: name, Follow: r.GetFollow(), Tail: r.GetTail(), Since: r.GetSince()})
		if err == nil {
			return api.Relay(from, s)
		}
		return err
	}
	return n.tailLog(ctx, name, int(r.GetTail()), r.GetFollow(), s.Send)
}

func (v *verbs) DhtGet(ctx context.Context, r *apiv1.DhtGetRequest) (*apiv1.DhtGetResponse, error) {
	n, begin := v.n, time.Now()
	key := kadKey(r.GetKey())
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	out := &apiv1.DhtGetResponse{Key: r.GetKey(), KadKey: key}
	raw, hops, copies, err := n.overlay.Kad().GetValue(ctx, key)
	out.Hops, out.Copies, out.TookMs = uint32(hops), uint32(copies), ms(time.Since(begin))
	if err != nil {
		return out, nil // not found is an answer
	}
	rec, err := records.Decode(raw)
	if err != nil {
		return nil, api.Fail(connect.CodeDataLoss, "dht get "+key, "what was found is no record of ours: "+err.Error(), "")
	}
	out.Found, out.Signed, out.Value, out.Writer = true, true, rec.Value, n.nameOf(rec.Writer)
	out.Incarnation, out.Epoch, out.Revision = rec.Incarnation, rec.Epoch, rec.Revision
	out.Text = shown(withoutRegister(key, rec.Value))
	if own, agree, err := n.records.Get(ctx, key); err == nil {
		out.Agree, out.AgeMs = uint32(agree), ms(own.Age)
	}
	holders, err := n.records.Holders(ctx, key)
	if err != nil {
		return nil, api.Fail(connect.CodeUnavailable, "dht get "+key, "who holds it could not be found: "+err.Error(), "")
	}
	for i, id := range holders {
		holder := n.dhtNode(i+1, id, keys.Of(key))
		holder.Holds = true
		out.Holders = append(out.Holders, holder)
	}
	return out, nil
}

// kadKey lets people leave the namespace out, and name an instance's checkpoint index by the instance alone.
func kadKey(key string) string {
	switch {
	case strings.HasPrefix(key, "/kb/"):
		return key
	case strings.HasPrefix(key, "/"):
		return "/kb" + key
	}
	return "/kb/ckpt/" + key
}

// shown is a value as text, where it is text.
func shown(b []byte) string {
	if json.Valid(b) {
		return string(b)
	}
	for _, c := range b {
		if c < 9 || c > 126 {
			return ""
		}
	}
	return string(b)
}

// decision is what was recorded about where an instance is.
func (n *Node) decision(ctx context.Context, name string) *apiv1.Decision {
	out := &apiv1.Decision{Instance: name}
	if rec, _, err := n.records.Get(ctx, decisionKey(name)); err == nil {
		var d decisionRecord
		if err := json.Unmarshal(rec.Value, &d); err != nil {
			out.Reason = "the recorded decision cannot be read: " + err.Error()
		} else {
			d.fill(n, out)
		}
	}
	reg, ok := n.arbiter.Get(components.InstanceRegister(name))
	if !ok {
		if out.Reason == "" {
			out.Reason = "not placed yet: no decision was recorded"
		} else {
			out.Trigger = "placement"
		}
		return out
	}
	out.Epoch = reg.Epoch
	if body, err := bodyOf(reg); err == nil {
		out.Trigger, out.Cause = body.GetTrigger(), body.GetCause()
		if at := body.GetClaimedUnixMs(); at > 0 {
			out.Time = timestamppb.New(time.UnixMilli(int64(at)))
		}
		out.Successors = nil
		for _, s := range body.GetSuccessors() {
			if id, err := peer.Decode(s); err == nil {
				out.Successors = append(out.Successors, n.nameOf(id))
			}
		}
	}
	if now := n.nameOf(reg.Owner); now != out.Node {
		out.PreviousNode, out.Node = out.Node, now
	}
	return out
}

// decisionRecord is what the coordinator records of a decision, under decisionKey.
type decisionRecord struct {
	Instance   string           `json:"instance"`
	Node       string           `json:"node"` // peer ids
	By         string           `json:"by"`
	Before     float64          `json:"objective_before"`
	After      float64          `json:"objective"`
	Score      float64          `json:"score"`
	RunnerUp   string           `json:"runner_up,omitempty"`
	RunnerUpAt float64          `json:"runner_up_score,omitempty"`
	Refused    []decisionRefuse `json:"refused,omitempty"`
	Reason     string           `json:"reason"`
	UnixMs     int64            `json:"unix_ms"`
	Bound      float64          `json:"bound"`
	Optimal    bool             `json:"optimal"`
	Conflict   []string         `json:"conflict,omitempty"`
	Remedies   []string         `json:"remedies,omitempty"`
	Digest     string           `json:"digest"`
}

type decisionRefuse struct {
	Node       string `json:"node"`
	Constraint string `json:"constraint"`
	Detail     string `json:"detail,omitempty"`
}

func decisionKey(instance string) string { return "/kb/why/" + instance }

func (d decisionRecord) fill(n *Node, out *apiv1.Decision) {
	out.Node, out.DecidedBy = n.nameText(d.Node), n.nameText(d.By)
	out.ObjectiveBefore, out.Objective, out.Score = d.Before, d.After, d.Score
	out.RunnerUp, out.RunnerUpScore, out.Reason = n.nameText(d.RunnerUp), d.RunnerUpAt, d.Reason
	out.Time = timestamppb.New(time.UnixMilli(d.UnixMs))
	out.Bound, out.Optimal, out.Conflict, out.Remedies, out.Digest = d.Bound, d.Optimal, d.Conflict, d.Remedies, d.Digest
	for _, r := range d.Refused {
		out.Refused = append(out.Refused, &apiv1.Refusal{Node: n.nameText(r.Node), Constraint: r.Constraint, Detail: r.Detail})
	}
	slices.SortFunc(out.Refused, func(a, b *apiv1.Refusal) int { return strings.Compare(a.GetNode(), b.GetNode()) })
}

// nameText is the name of a node given by its id in text.
func (n *Node) nameText(id string) string {
	p, err := peer.Decode(id)
	if err != nil {
		return id
	}
	return n.nameOf(p)
}
