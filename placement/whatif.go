package placement

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"slices"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"
)

// Whatif is what a plan is asked for: the cluster as it is, but for this.
type Whatif struct {
	Application *componentsv1.Application // in place of what there is of that name; nil: nothing else is desired
	Without     []string                  // nodes, by name or id, that are dead
	With        []NewNode
	Prices      map[string]float64 // of nodes, by name or id
}

// NewNode is a node that is not there, with what is known of its round trips.
type NewNode struct {
	Node *placementv1.Node
	RTT  map[string]float64 // ms, by name or id of another node
}

// apply changes a view. Nodes that are named and not there are errors.
func (q *Whatif) apply(v *View) error {
	if q.Application != nil {
		v.Applications = slices.DeleteFunc(slices.Clone(v.Applications), func(a *componentsv1.Application) bool { return a.GetName() == q.Application.GetName() })
		v.Applications = append(v.Applications, q.Application)
	}
	v.Nodes = slices.Clone(v.Nodes)
	for _, add := range q.With {
		if find(v.Nodes, add.Node.GetId()) >= 0 || find(v.Nodes, add.Node.GetName()) >= 0 {
			return fmt.Errorf("with %s: there is a node of that name", add.Node.GetName())
		}
		v.Nodes = append(v.Nodes, Node{Node: add.Node, Boot: 1})
		v.Links = slices.Clone(v.Links)
		for _, to := range slices.Sorted(maps.Keys(add.RTT)) {
			k := find(v.Nodes, to)
			if k < 0 {
				return fmt.Errorf("with %s: rtt_ms names %s, which is no node", add.Node.GetName(), to)
			}
			v.Links = append(v.Links, &placementv1.Link{From: add.Node.GetId(), To: v.Nodes[k].GetId(), RttMs: add.RTT[to]})
		}
	}
	change := func(what, name string, f func(n *placementv1.Node)) error {
		k := find(v.Nodes, name)
		if k < 0 {
			return fmt.Errorf("%s %s: there is no node of that name or id", what, name)
		}
		v.Nodes[k].Node = proto.CloneOf(v.Nodes[k].Node)
		f(v.Nodes[k].Node)
		return nil
	}
	var errs []error
	for _, name := range q.Without {
		errs = append(errs, change("without", name, func(n *placementv1.Node) { n.State = "dead" }))
	}
	for _, name := range slices.Sorted(maps.Keys(q.Prices)) {
		price := q.Prices[name]
		if price < 0 || math.IsNaN(price) || math.IsInf(price, 0) {
			errs = append(errs, fmt.Errorf("price %s: found %v, expected a number that is not negative", name, price))
			continue
		}
		errs = append(errs, change("price", name, func(n *placementv1.Node) {
			if n.Labels == nil {
				n.Labels = map[string]string{}
			}
			n.Labels["price"] = fmt.Sprint(price)
		}))
	}
	return errors.Join(errs...)
}

func find(nodes []Node, name string) int {
	if k := slices.IndexFunc(nodes, func(n Node) bool { return n.GetId() == name }); k >= 0 {
		return k
	}
	return slices.IndexFunc(nodes, func(n Node) bool { return n.GetName() == name })
}

// nodeFile is how a person writes a node that is not there.
type nodeFile struct {
	Name     string             `json:"name"`
	Zone     string             `json:"zone"`
	Role     string             `json:"role"`
	Platform string             `json:"platform"`
	CPU      float64            `json:"cpu"`
	Memory   string             `json:"memory"`
	Disk     string             `json:"disk"`
	Labels   map[string]string  `json:"labels"`
	Facts    map[string]float64 `json:"facts"`
	Price    *float64           `json:"price"`
	RTT      map[string]float64 `json:"rtt_ms"`
}

// ParseNodes reads nodes that are not there from JSON: one, or a list. Errors have their place in the file.
func ParseNodes(file string, data []byte) ([]NewNode, error) {
	place := func(at int64) string {
		before := data[:min(max(at, 0), int64(len(data)))]
		return fmt.Sprintf("%s:%d:%d", file, 1+bytes.Count(before, []byte("\n")), len(before)-bytes.LastIndexByte(before, '\n'))
	}
	var all []nodeFile
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	var err error
	if bytes.HasPrefix(bytes.TrimSpace(data), []byte("[")) {
		err = dec.Decode(&all)
	} else {
		var one nodeFile
		err = dec.Decode(&one)
		all = append(all, one)
	}
	if err != nil {
		at := dec.InputOffset()
		if wrong, ok := errors.AsType[*json.SyntaxError](err); ok {
			at = wrong.Offset - 1
		} else if wrong, ok := errors.AsType[*json.UnmarshalTypeError](err); ok {
			return nil, fmt.Errorf("%s: %s: found %s, expected %s", place(wrong.Offset-1), wrong.Field, wrong.Value, wrong.Type)
		}
		return nil, fmt.Errorf("%s: %w; expected a node such as {\"name\": \"n9\", \"cpu\": 8, \"memory\": \"16GiB\", \"labels\": {\"region\": \"eu\"}, \"rtt_ms\": {\"n1\": 5}}", place(at), err)
	}
	if _, err := dec.Token(); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("%s: found more after the first value, expected one node or one list", place(dec.InputOffset()))
	}
	var out []NewNode
	for _, f := range all {
		n, err := f.node()
		if err != nil {
			return nil, fmt.Errorf("%s: node %q: %w", file, f.Name, err)
		}
		out = append(out, n)
	}
	return out, nil
}

func (f *nodeFile) node() (NewNode, error) {
	if err := components.CheckName(f.Name); err != nil {
		return NewNode{}, err
	}
	memory, errMemory := components.ParseSize(cmp.Or(f.Memory, "8GiB"))
	disk, errDisk := components.ParseSize(cmp.Or(f.Disk, "20GiB"))
	err := errors.Join(errMemory, errDisk)
	if f.CPU < 0 {
		err = errors.Join(err, fmt.Errorf("cpu: found %v, expected a number of cores", f.CPU))
	}
	for name, ms := range f.RTT {
		if ms < 0 {
			err = errors.Join(err, fmt.Errorf("rtt_ms to %s: found %v, expected milliseconds", name, ms))
		}
	}
	n := &placementv1.Node{
		Id: f.Name, Name: f.Name, Zone: f.Zone, Role: cmp.Or(f.Role, components.RoleFull), Platform: cmp.Or(f.Platform, "linux/amd64"), State: "alive",
		CpuMillis: components.MilliCPU(cmp.Or(f.CPU, 4)), MemoryBytes: memory, DiskBytes: disk, Labels: maps.Clone(f.Labels), Facts: maps.Clone(f.Facts),
	}
	if f.Price != nil {
		if *f.Price < 0 {
			err = errors.Join(err, fmt.Errorf("price: found %v, expected a number that is not negative", *f.Price))
		}
		if n.Labels == nil {
			n.Labels = map[string]string{}
		}
		n.Labels["price"] = fmt.Sprint(*f.Price)
	}
	return NewNode{n, f.RTT}, err
}
