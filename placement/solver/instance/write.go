package instance

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

func bit(v []bool) []int {
	out := make([]int, len(v))
	for i, b := range v {
		if b {
			out[i] = 1
		}
	}
	return out
}

func (n *Nodes) columns(assignment bool) map[string]any {
	region := make([]int32, len(n.Region))
	for i, r := range n.Region {
		region[i] = r + 1
	}
	out := map[string]any{
		"region": region, "alive": bit(n.Alive), "blacklisted": bit(n.Blacklisted), "load5": n.Load5, "live_slices": n.LiveSlices,
		"cpu_ghz": n.CPUGHz, "free_cpu": n.FreeCPU, "mem_pressure": n.MemPressure, "price": n.Price,
	}
	if assignment {
		out["quarantined"], out["cpu_m"], out["mem_mib"] = bit(n.Quarantined), n.CPU, n.Memory
	}
	return out
}

func (l *Latency) document() map[string]any {
	base := [][]int32{}
	for a := range l.Sites - 1 {
		row := make([]int32, 0, l.Sites-a-1)
		for _, v := range l.Base[a*l.Sites+a+1 : (a+1)*l.Sites] {
			if v >= None {
				v = -1
			}
			row = append(row, v)
		}
		base = append(base, row)
	}
	return map[string]any{"unit_ms": l.Unit, "sites": l.Sites, "base": base, "site": l.Site, "access": l.Access}
}

func (t Term) list() []float64 { return []float64{t.Min, t.Max, t.Weight} }

// some is an empty list instead of none.
func some[T any](v []T) []T {
	if v == nil {
		return []T{}
	}
	return v
}

func (g *Group) document() map[string]any {
	group := "none"
	if g.Balanced {
		group = "ceil"
	}
	return map[string]any{
		"format": groupFormat, "name": g.Name, "n": g.N, "regions": g.Regions, "nodes": g.Nodes.columns(false), "latency": g.Latency.document(),
		"anchors": g.Anchors, "current": some(g.Current),
		"constraints": map[string]any{
			"min_nodes": g.MinNodes, "max_nodes": g.MaxNodes, "max_load5": g.MaxLoad5, "max_live_slices": g.MaxSlices,
			"max_mem_pressure": g.MaxMemory, "min_free_ghz": g.MinFreeGHz, "max_diameter_ms": g.MaxDiameterMs, "group": group,
		},
		"utility": map[string]any{
			"load5": g.Load5.list(), "live_slices": g.LiveSlices.list(), "free_ghz": g.FreeGHz.list(), "max_neighbour_ms": g.Neighbour.list(),
			"diameter_ms": g.Diameter.list(),
		},
		"cost": map[string]any{"add": g.AddCost, "remove": g.RemoveCost, "price": g.PriceOfAPrice},
	}
}

func (a *Assignment) document() map[string]any {
	components := []any{}
	for i := range a.Components {
		c := &a.Components[i]
		regions := []int{}
		for r, ok := range c.Regions {
			if ok {
				regions = append(regions, r+1)
			}
		}
		components = append(components, map[string]any{
			"name": c.Name, "replicas": c.Replicas, "cpu_m": c.CPU, "mem_mib": c.Memory, "max_per_node": c.MaxPerNode,
			"max_per_region": c.MaxPerRegion, "min_regions": c.MinRegions, "regions": regions, "pinned": some(c.Pinned), "move_cost": c.MoveCost,
		})
	}
	bindings := []any{}
	for _, b := range a.Bindings {
		bindings = append(bindings, map[string]any{"from": b.From, "to": b.To, "weight": b.Weight, "x_max_ms": b.XMaxMs, "max_ms": b.MaxMs})
	}
	var current any
	if a.Current != nil {
		current = a.Current
	}
	return map[string]any{
		"format": assignmentFormat, "name": a.Name, "n": a.N, "regions": a.Regions, "nodes": a.Nodes.columns(true), "latency": a.Latency.document(),
		"components": components, "anti_affinity": some(a.Apart), "bindings": bindings, "price_coef": a.PriceCoef, "current": current,
		"quality": map[string]any{
			"load5": a.Load5.list(), "live_slices": a.LiveSlices.list(), "free_ghz": a.FreeGHz.list(), "weight": a.QualityWeight,
		},
	}
}

// Write writes the instance, packed where path ends with .gz.
func (f *File) Write(path string) error {
	var doc map[string]any
	if f.Group != nil {
		doc = f.Group.document()
	} else {
		doc = f.Assignment.document()
	}
	return writeJSON(path, doc)
}

// WriteGroup writes a solution of a group problem: what the judges of such files read.
func WriteGroup(path, name string, nodes []int, objective float64) error {
	return writeJSON(path, map[string]any{"instance": name, "nodes": some(nodes), "objective": objective})
}

// WriteAssignment writes a solution of an assignment problem.
func WriteAssignment(path, name string, placement [][]int32, objective float64) error {
	return writeJSON(path, map[string]any{"instance": name, "placement": some(placement), "objective": objective})
}

func writeJSON(path string, doc any) error {
	raw, err := json.Marshal(doc)
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if strings.HasSuffix(path, ".gz") {
		var b bytes.Buffer
		z := gzip.NewWriter(&b)
		if _, err := z.Write(raw); err != nil {
			return fmt.Errorf("write %s: %w", path, err)
		}
		if err := z.Close(); err != nil {
			return fmt.Errorf("write %s: %w", path, err)
		}
		raw = b.Bytes()
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := os.WriteFile(path, raw, 0o644); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}
