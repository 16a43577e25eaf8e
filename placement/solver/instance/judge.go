package instance

import (
	"fmt"
	"math"
)

// Score of a solution: Objective = Utility − Cost.
type Score struct{ Objective, Utility, Cost float64 }

// exceeds compares a with b as the decimals that they were written as, where floats are too close to tell.
func exceeds(a, b float64) bool {
	if math.Abs(a-b) > 1e-9*math.Max(1, math.Abs(b)) {
		return a > b
	}
	return decimal(a).Cmp(decimal(b)) > 0
}

// Eligible tells whether node i may be a member, and why not.
func (g *Group) Eligible(i int) (string, bool) {
	n := &g.Nodes
	switch {
	case !n.Alive[i]:
		return "not alive", false
	case n.Blacklisted[i]:
		return "blacklisted", false
	case exceeds(n.Load5[i], g.MaxLoad5):
		return "load5", false
	case exceeds(n.LiveSlices[i], g.MaxSlices):
		return "live_slices", false
	case exceeds(n.MemPressure[i], g.MaxMemory):
		return "mem_pressure", false
	case !g.freeEnough(i):
		return "free cpu", false
	}
	return "", true
}

func (g *Group) freeEnough(i int) bool {
	f := g.Nodes.FreeGHz(i)
	if math.Abs(f-g.MinFreeGHz) > 1e-9*math.Max(1, g.MinFreeGHz) {
		return f > g.MinFreeGHz
	}
	exact := decimal(g.Nodes.CPUGHz[i])
	exact.Mul(exact, decimal(g.Nodes.FreeCPU[i]))
	want := decimal(g.MinFreeGHz)
	return exact.Cmp(want.Mul(want, decimal(100))) > 0
}

// RegionCap is the most members of one region in a group of size.
func (g *Group) RegionCap(size int) int {
	if !g.Balanced {
		return size
	}
	return (size-1)/g.Regions + 1
}

// Measure is the longest of the shortest paths inside set, and how far the anchor is that is farthest from it. At least None: no path.
func (g *Group) Measure(set []int) (diameter, neighbour int32) {
	k := len(set)
	d := make([]int32, k*k)
	for a, i := range set {
		for b, j := range set {
			d[a*k+b] = g.Latency.Between(i, j)
		}
	}
	for m := range k {
		for a := range k {
			for b := range k {
				d[a*k+b] = min(d[a*k+b], d[a*k+m]+d[m*k+b])
			}
		}
	}
	for _, v := range d {
		diameter = max(diameter, v)
	}
	for _, p := range g.Anchors {
		near := None
		for _, i := range set {
			near = min(near, g.Latency.Between(int(p), i))
		}
		neighbour = max(neighbour, near)
	}
	return diameter, neighbour
}

// Judge scores a group and lists what it violates.
func (g *Group) Judge(set []int) (Score, []string) {
	var wrong []string
	k := len(set)
	if k < g.MinNodes || k > g.MaxNodes {
		wrong = append(wrong, fmt.Sprintf("size %d is not in [%d, %d]", k, g.MinNodes, g.MaxNodes))
	}
	current, in := map[int]bool{}, map[int]bool{}
	for _, i := range g.Current {
		current[int(i)] = true
	}
	regions := make([]int, g.Regions)
	var s Score
	var worth, prices, adds float64
	for _, i := range set {
		if in[i] {
			wrong = append(wrong, fmt.Sprintf("node %d is there twice", i))
		}
		in[i] = true
		if why, ok := g.Eligible(i); !ok {
			wrong = append(wrong, fmt.Sprintf("node %d: %s", i, why))
		}
		regions[g.Nodes.Region[i]]++
		worth += g.Worth(i)
		prices += g.Nodes.Price[i]
		if !current[i] {
			adds++
		}
		delete(current, i)
	}
	for r, c := range regions {
		if c > g.RegionCap(k) {
			wrong = append(wrong, fmt.Sprintf("region %d: %d members, at most %d", r+1, c, g.RegionCap(k)))
		}
	}
	d, n := g.Measure(set)
	if d > g.Latency.Below(g.MaxDiameterMs, true) {
		wrong = append(wrong, "diameter")
	}
	s.Cost = g.AddCost*adds + g.RemoveCost*float64(len(current)) + g.PriceOfAPrice*prices
	s.Utility = (worth/float64(max(k, 1)) + g.Neighbour.Weight*g.Neighbour.Low(g.Latency.Ms(n)) + g.Diameter.Weight*g.Diameter.Low(g.Latency.Ms(d))) / g.Weights()
	s.Objective = s.Utility - s.Cost
	return s, wrong
}
