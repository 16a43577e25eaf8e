package node

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/supervisor"
	"github.com/coppice-project/coppice/dht/keys"
	"github.com/coppice-project/coppice/dht/records"
	"github.com/coppice-project/coppice/node/facts"
)

// What a node tells about itself lies in records that only it writes: /kb/facts/<peer id>/host and, for each instance it runs,
// /kb/facts/<peer id>/inst/<instance>. They are told when they change and at least every third of facts.Pace.Reports.
const (
	factsPrefix   = "/kb/facts/"
	sampleEvery   = 5 * time.Second
	clocksEvery   = time.Minute            // once another node's clock is known: each look asks all members
	retryEvery    = 250 * time.Millisecond // of telling what could not be told
	scatterWithin = 500 * time.Millisecond
	// restoreFact is how fast processes of a node take their states, as it measured.
	restoreFact = "restore_mib_per_s"
	// maxRTTs bounds how many distances a node tells about: those of its watchers and whom it watches.
	maxRTTs = 32
)

// hostReport is what a node tells about its machine.
type hostReport struct {
	Node  string      `json:"node"`
	Facts facts.Facts `json:"facts"`
	// WallUnixMs is what its clock says.
	WallUnixMs int64 `json:"wall_unix_ms,omitempty"`
	// RTTMs is how far other nodes are from this one, by linkName.
	RTTMs map[string]float64 `json:"rtt_ms,omitempty"`
}

// linkName names a node within a report: half of all names in it would be peer ids of 52 letters otherwise. That two nodes share one costs a
// wrong distance.
func linkName(id peer.ID) string {
	p := keys.OfPeer(id)
	return base64.RawURLEncoding.EncodeToString(p[:6])
}

// instanceReport is what an owner tells about one instance.
type instanceReport struct {
	Instance   string   `json:"instance"`
	Node       string   `json:"node"` // peer id
	State      string   `json:"state"`
	Reason     string   `json:"reason,omitempty"`
	Epoch      uint64   `json:"epoch"`
	Version    string   `json:"version,omitempty"`
	Artifact   string   `json:"artifact,omitempty"`
	Digest     string   `json:"digest,omitempty"`
	Pid        int      `json:"pid,omitempty"`
	UptimeMs   int64    `json:"uptime_ms"`
	Restarts   int      `json:"restarts"`
	Seq        uint64   `json:"checkpoint_seq"`
	SavedAgeMs int64    `json:"checkpoint_age_ms"` // -1: none
	Bytes      uint64   `json:"checkpoint_bytes"`
	Holders    []string `json:"holders,omitempty"`
	StartedMs  float64  `json:"started_ms"`
	Durable    string   `json:"durable,omitempty"`
	Failures   int      `json:"failures,omitempty"` // starts in a row
	Unsaved    uint64   `json:"unsaved,omitempty"`  // answered since the last acknowledged checkpoint
	Listen     string   `json:"listen,omitempty"`   // host:port on its node, beside the gate
	Standby    string   `json:"standby,omitempty"`  // peer id of the node where a process waits that has its state
	// StandbyBehind is how many acknowledged checkpoints that has not been given yet.
	StandbyBehind uint64 `json:"standby_behind,omitempty"`

	LaunchMs float64 `json:"launch_ms,omitempty"` // of its process, and of its Start
	BeginMs  float64 `json:"begin_ms,omitempty"`

	age time.Duration // since the reader's record was written
}

// report tells what this node is and runs, until ctx ends.
func (n *Node) report(ctx context.Context) error {
	var last facts.Facts
	var told, lookedAt time.Time
	looked := false
	tick := time.NewTicker(sampleEvery)
	defer tick.Stop()
	for {
		f, err := n.sensor.Sample(ctx)
		n.faults.set("facts", err)
		if speed := n.sup.RestoreSpeed(); speed > 0 && f != nil {
			f[restoreFact] = speed / (1 << 20)
		}
		if !looked || time.Since(lookedAt) >= clocksEvery {
			looked, lookedAt = n.lookAtClocks(ctx), time.Now()
		}
		// A busy machine's numbers change all the time, which a slow link is not to carry.
		ttl := facts.PaceOf(n.cfg.Profile).Reports
		var untold error
		if ago := time.Since(told); ago >= ttl/6 && facts.Changed(last, f) || ago >= ttl/3 {
			untold = n.tellHost(ctx, f)
			n.faults.set("report", untold)
			last, told = f, time.Now()
			n.faults.set("report instances", n.tellInstances(ctx, true))
			if n.toldDrops == "[]" {
				n.toldDrops = ""
			} else if n.toldDrops != "" {
				n.toldDrops = "again"
			}
		}
		n.faults.set("report drops", n.tellDrops(ctx))
		for sampled := false; !sampled; {
			// What could not be told, for the others were not there yet, is told as soon as they are.
			var again <-chan time.Time
			err := n.tellInstances(ctx, false)
			n.faults.set("report instances", err)
			if untold != nil {
				untold = n.tellHost(ctx, f)
				n.faults.set("report", untold)
			}
			if err != nil || untold != nil {
				again = time.After(retryEvery)
			}
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-tick.C:
				sampled = true
			case <-n.instancesChanged:
			case <-again:
			}
		}
	}
}

func (n *Node) tellHost(ctx context.Context, f facts.Facts) error {
	h := hostReport{Node: n.cfg.Name, Facts: f, WallUnixMs: time.Now().UnixMilli(), RTTMs: map[string]float64{}}
	for _, m := range n.members.Alive() {
		if m.RTT > 0 && len(h.RTTMs) < maxRTTs {
			h.RTTMs[linkName(m.ID)] = ms(m.RTT)
		}
	}
	b, err := json.Marshal(h)
	if err != nil {
		return err
	}
	return n.tell(ctx, factsPrefix+n.id.String()+"/host", b)
}

func (n *Node) tell(ctx context.Context, key string, value []byte) error {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if _, _, err := n.records.Put(ctx, key, value, facts.PaceOf(n.cfg.Profile).Reports); err != nil {
		return fmt.Errorf("tell %s: %w", key, err)
	}
	return nil
}

// tellInstances tells about the instances whose state changed, or about all.
func (n *Node) tellInstances(ctx context.Context, all bool) error {
	for _, in := range n.sup.Infos() {
		word := string(in.State) + "\x00" + in.Reason + "\x00" + fmt.Sprint(in.Epoch, in.Restarts, in.Version, in.Failures, in.Standby)
		if !all && n.toldInstances[in.Instance] == word {
			continue
		}
		b, err := json.Marshal(n.instanceReport(in))
		if err != nil {
			return err
		}
		if err := n.tell(ctx, factsPrefix+n.id.String()+"/inst/"+in.Instance, b); err != nil {
			return err
		}
		n.toldInstances[in.Instance] = word
	}
	return nil
}

func (n *Node) instanceReport(in supervisor.Info) instanceReport {
	r := instanceReport{
		Instance: in.Instance, Node: n.id.String(), State: string(in.State), Reason: in.Reason, Epoch: in.Epoch, Version: in.Version, Artifact: in.Artifact,
		Digest: in.Digest, Pid: in.Pid, UptimeMs: in.Uptime().Milliseconds(), Restarts: in.Restarts, Seq: in.Saved.Seq, SavedAgeMs: -1, Bytes: in.Saved.Bytes,
		StartedMs: in.StartedMs, LaunchMs: ms(in.LaunchTook), BeginMs: ms(in.BeginTook), Durable: in.Durable, Failures: in.Failures, Unsaved: in.Unsaved, Listen: in.Listen,
	}
	if in.Saved.Seq > 0 && !in.Saved.At.IsZero() {
		r.SavedAgeMs = time.Since(in.Saved.At).Milliseconds()
	}
	if in.Standby != "" {
		r.Standby, r.StandbyBehind = in.Standby.String(), in.StandbyBehind
	}
	for _, h := range in.Saved.Holders {
		r.Holders = append(r.Holders, h.String())
	}
	return r
}

// factRecords lists the reports of all nodes: what lies here, where every node holds every record, else what all that are alive hold. Dead
// members count: right after a death what the dead told has not been copied to all who should hold it now.
func (n *Node) factRecords(ctx context.Context) []records.Record {
	if n.records.Replicas() >= len(n.members.All()) {
		return n.records.Local(factsPrefix)
	}
	ctx, cancel := context.WithTimeout(ctx, scatterWithin)
	defer cancel()
	recs, _, _ := n.records.Scan(ctx, factsPrefix)
	return recs
}

// reports lists what the owners told about their instances, the newest for each, this node's own fresh.
func (n *Node) reports(ctx context.Context) map[string]instanceReport {
	return n.reportsIn(n.factRecords(ctx))
}

func (n *Node) reportsIn(recs []records.Record) map[string]instanceReport {
	out := map[string]instanceReport{}
	for _, rec := range recs {
		rest, ok := strings.CutPrefix(rec.Key, factsPrefix)
		if !ok || rec.Deleted {
			continue
		}
		id, what, _ := strings.Cut(rest, "/")
		if !strings.HasPrefix(what, "inst/") || id == n.id.String() {
			continue
		}
		var r instanceReport
		if err := json.Unmarshal(rec.Value, &r); err != nil {
			n.faults.set("report of "+id, err)
			continue
		}
		r.age = rec.Age
		if have, ok := out[r.Instance]; !ok || have.Epoch < r.Epoch {
			out[r.Instance] = r
		}
	}
	for _, in := range n.sup.Infos() {
		r := n.instanceReport(in)
		if have, ok := out[in.Instance]; !ok || have.Epoch <= r.Epoch {
			out[in.Instance] = r
		}
	}
	return out
}

// hostFacts lists what is known about each node's machine.
func (n *Node) hostFacts(ctx context.Context) (map[peer.ID]hostReport, map[peer.ID]time.Duration) {
	return n.hostFactsIn(n.factRecords(ctx))
}

func (n *Node) hostFactsIn(recs []records.Record) (map[peer.ID]hostReport, map[peer.ID]time.Duration) {
	out, ages := map[peer.ID]hostReport{}, map[peer.ID]time.Duration{}
	for _, rec := range recs {
		rest, ok := strings.CutPrefix(rec.Key, factsPrefix)
		id, what, _ := strings.Cut(rest, "/")
		if !ok || what != "host" || rec.Deleted {
			continue
		}
		p, err := peer.Decode(id)
		if err != nil {
			continue
		}
		var h hostReport
		if err := json.Unmarshal(rec.Value, &h); err != nil {
			n.faults.set("report of "+id, err)
			continue
		}
		out[p], ages[p] = h, rec.Age
	}
	return out, ages
}

func systemComponent(component string) bool {
	return strings.HasPrefix(component, components.SystemApplication+"/")
}
