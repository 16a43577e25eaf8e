package node

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/records"
	"github.com/coppice-project/coppice/internal/unison"
)

// Committed ownership and desired state are mirrored into the DHT as signed records, ordered by (incarnation, index): a reader without a
// way to the arbiter, a stock kad-dht client among them, finds who owns what, and with all voters lost the ownership can be read from its
// copies (DESIGN.md §4). The checkpoint index of an instance lies beside its mirror and is told by the owner.
const (
	ownPrefix        = "/kb/own/"
	appPrefix        = "/kb/app/"
	checkpointPrefix = "/kb/ckpt/"
	registerPrefix   = "/kb/reg/"      // the registers that are no instances, as they are
	partPrefix       = "/kb/reg-part/" // + n + / + key: what did not fit into one record
	mirrorTimeout    = 5 * time.Second
	// maxMirror keeps a mirror below the size of a record; a larger desired state is mirrored without its manifest.
	maxMirror = 14 << 10
)

// ownMirror is what a record under /kb/own/ says.
type ownMirror struct {
	Instance    string   `json:"instance"`
	Incarnation uint64   `json:"incarnation"`
	Epoch       uint64   `json:"epoch"`
	Index       uint64   `json:"index"`
	Owner       string   `json:"owner"`
	Node        string   `json:"node"`
	Boot        uint64   `json:"boot"`
	Seq         uint64   `json:"seq"`
	Root        string   `json:"root,omitempty"`
	Holders     []string `json:"holders,omitempty"`
	Version     string   `json:"version"`
	Digest      string   `json:"digest"`
	Successors  []string `json:"successors,omitempty"`
	Register    []byte   `json:"register,omitempty"` // all of it, as it lies on the voters' disks: what recover puts back
}

// mirror is told by the arbiter's leader what was committed.
func (n *Node) mirror(regs []arbiter.Register) {
	if n.records == nil {
		return
	}
	var entries []records.Entry
	var of []arbiter.Register
	for _, reg := range regs {
		list, err := n.mirrorOf(reg)
		n.faults.set("mirror "+reg.Key, err)
		entries = append(entries, list...)
		for range list {
			of = append(of, reg)
		}
	}
	for _, i := range n.putMirrors(entries) {
		n.unmirrored.add(of[i])
	}
}

// putMirrors returns which of the entries did not get their acknowledgements.
func (n *Node) putMirrors(entries []records.Entry) (failed []int) {
	if len(entries) == 0 {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), mirrorTimeout)
	defer cancel()
	var why error
	for i, res := range n.records.PutMany(ctx, entries) {
		if res.Err != nil && !isOlder(res.Err) {
			why = fmt.Errorf("%s: %w", entries[i].Key, res.Err)
			failed = append(failed, i)
		}
	}
	n.faults.set("mirror into the DHT", why)
	return failed
}

// mirrorOf are the records of a register; none for what is not mirrored: join tokens, which admit whoever knows them.
func (n *Node) mirrorOf(reg arbiter.Register) ([]records.Entry, error) {
	e := records.Entry{Incarnation: reg.Incarnation, Epoch: reg.Index, Revision: 1, Deleted: reg.Deleted}
	switch {
	case strings.HasPrefix(reg.Key, tokenPrefix):
		return nil, nil
	case strings.HasPrefix(reg.Key, components.InstancePrefix):
		return n.mirrorOfInstance(reg, e)
	case strings.HasPrefix(reg.Key, components.ApplicationPrefix):
		e.Key = appPrefix + strings.TrimPrefix(reg.Key, components.ApplicationPrefix)
		if !reg.Deleted {
			var app componentsv1.Application
			if err := proto.Unmarshal(reg.Body, &app); err != nil {
				return nil, err
			}
			b, err := protojson.Marshal(&app)
			if err == nil && len(b) > maxMirror {
				app.Manifest = nil
				b, err = protojson.Marshal(&app)
			}
			if err != nil {
				return nil, err
			}
			e.Value = b
		}
		whole, err := copyOf(reg)
		return append(whole, e), err
	}
	return copyOf(reg)
}

func (n *Node) mirrorOfInstance(reg arbiter.Register, e records.Entry) ([]records.Entry, error) {
	name := components.InstanceOfKey(reg.Key)
	e.Key = ownPrefix + name
	if reg.Deleted {
		return []records.Entry{e}, nil
	}
	body, err := bodyOf(reg)
	if err != nil {
		return nil, err
	}
	m := ownMirror{
		Instance: name, Incarnation: reg.Incarnation, Epoch: reg.Epoch, Index: reg.Index, Owner: reg.Owner.String(), Node: n.nameOf(reg.Owner), Boot: reg.Boot, Seq: reg.Seq,
		Root: fmt.Sprintf("%x", reg.Root), Holders: texts(reg), Version: body.GetVersion(), Digest: body.GetDigest(), Successors: body.GetSuccessors(),
	}
	if m.Register, err = proto.Marshal(arbiter.EncodeRegister(reg)); err != nil {
		return nil, err
	}
	if e.Value, err = json.Marshal(m); err != nil {
		return nil, err
	}
	if len(e.Value) <= maxMirror {
		return []records.Entry{e}, nil
	}
	m.Register = nil
	if e.Value, err = json.Marshal(m); err != nil {
		return nil, err
	}
	whole, err := copyOf(reg)
	return append(whole, e), err
}

func texts(reg arbiter.Register) []string {
	var out []string
	for _, h := range reg.Holders {
		out = append(out, h.String())
	}
	return out
}

// checkpointIndex is what a record under /kb/ckpt/ says: where the last acknowledged checkpoint of an instance lies.
type checkpointIndex struct {
	Instance    string   `json:"instance"`
	Incarnation uint64   `json:"incarnation"`
	Epoch       uint64   `json:"epoch"`
	Seq         uint64   `json:"seq"`
	Root        string   `json:"root"`
	Bytes       uint64   `json:"bytes"`
	Holders     []string `json:"holders"`
	Nodes       []string `json:"nodes"`
	Digest      string   `json:"digest"`
	Version     string   `json:"version"`
}

const indexEvery = time.Second

// indexCheckpoints tells the DHT, at most once a second for each instance of this node, where its last checkpoint lies.
func (n *Node) indexCheckpoints(ctx context.Context) error {
	tick := unison.New(indexEvery, string(n.id))
	defer tick.Stop()
	told := map[string]string{}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
			tick.Next()
		}
		var entries []records.Entry
		for _, in := range n.sup.Infos() {
			if in.Saved.Seq == 0 || in.Epoch == 0 {
				continue
			}
			word := fmt.Sprint(in.Epoch, in.Saved.Seq, in.Saved.Holders)
			if told[in.Instance] == word {
				continue
			}
			reg, ok := n.arbiter.Get(components.InstanceRegister(in.Instance))
			if !ok {
				continue
			}
			x := checkpointIndex{
				Instance: in.Instance, Incarnation: reg.Incarnation, Epoch: in.Epoch, Seq: in.Saved.Seq, Root: in.Saved.Root.String(), Bytes: in.Saved.Bytes,
				Digest: in.Digest, Version: in.Version,
			}
			for _, h := range in.Saved.Holders {
				x.Holders, x.Nodes = append(x.Holders, h.String()), append(x.Nodes, n.nameOf(h))
			}
			b, err := json.Marshal(x)
			if err != nil {
				return err
			}
			told[in.Instance] = word
			entries = append(entries, records.Entry{Key: checkpointPrefix + in.Instance, Value: b, Incarnation: reg.Incarnation, Epoch: in.Epoch, Revision: 1 + 64*in.Saved.Seq + uint64(len(in.Saved.Holders))})
		}
		n.putMirrors(entries)
	}
}
