package group

import (
	"cmp"
	"math"
	"slices"

	"github.com/coppice-project/coppice/placement/solver/instance"
)

// problem is an instance reduced to its eligible nodes, called candidates and counted from 0.
type problem struct {
	g       *instance.Group
	node    []int32   // candidate → node
	site    []int32   // by candidate
	access  []int32   // by candidate
	region  []int32   // by candidate
	worth   []float64 // by candidate: share of the utility in a group of one
	cost    []float64 // by candidate: of being a member
	anchor  [][]int32 // by anchor, by candidate: latency
	closest []int32   // by anchor: latency of the nearest candidate
	isPoint []bool    // by candidate: it is an anchor
	fixed   float64   // cost of leaving all of the current group
	limit   int32     // the longest diameter
	weights float64
	least   int // sizes
	most    int
	sizes   []*sized
}

// sized is what depends on the size of the group.
type sized struct {
	size   int
	room   int       // members of one region
	value  []float64 // by candidate: what it adds to the objective
	order  []int32   // candidates by descending value
	byArea [][]int32 // the same by region
}

func newProblem(g *instance.Group) *problem {
	p := &problem{g: g, limit: g.Latency.Below(g.MaxDiameterMs, true)}
	p.weights = g.Weights()
	current := make([]bool, g.N)
	for _, i := range g.Current {
		if !current[i] {
			p.fixed += g.RemoveCost
		}
		current[i] = true
	}
	point := make([]bool, g.N)
	for _, i := range g.Anchors {
		point[i] = true
	}
	for i := range g.N {
		if _, ok := g.Eligible(i); !ok {
			continue
		}
		n := &g.Nodes
		p.node = append(p.node, int32(i))
		p.site = append(p.site, g.Latency.Site[i])
		p.access = append(p.access, g.Latency.Access[i])
		p.region = append(p.region, n.Region[i])
		p.isPoint = append(p.isPoint, point[i])
		p.worth = append(p.worth, g.Worth(i)/p.weights)
		c := g.PriceOfAPrice * n.Price[i]
		if current[i] {
			c -= g.RemoveCost
		} else {
			c += g.AddCost
		}
		p.cost = append(p.cost, c)
	}
	p.anchor = make([][]int32, len(g.Anchors))
	p.closest = make([]int32, len(g.Anchors))
	for a, i := range g.Anchors {
		p.closest[a] = noLink
		p.anchor[a] = make([]int32, len(p.node))
		for c, j := range p.node {
			p.anchor[a][c] = g.Latency.Between(int(i), int(j))
			p.closest[a] = min(p.closest[a], p.anchor[a][c])
		}
	}
	p.least, p.most = g.MinNodes, min(g.MaxNodes, len(p.node))
	p.sizes = make([]*sized, p.most+1)
	return p
}

// sized is what there is for groups of size, made when first asked for.
func (p *problem) sized(size int) *sized {
	if s := p.sizes[size]; s != nil {
		return s
	}
	s := &sized{size: size, room: p.g.RegionCap(size), value: make([]float64, len(p.node)), order: make([]int32, len(p.node)), byArea: make([][]int32, p.g.Regions)}
	for c := range p.node {
		s.value[c] = p.worth[c]/float64(size) - p.cost[c]
		s.order[c] = int32(c)
	}
	slices.SortFunc(s.order, func(a, b int32) int { return cmp.Or(cmp.Compare(s.value[b], s.value[a]), cmp.Compare(a, b)) })
	for _, c := range s.order {
		s.byArea[p.region[c]] = append(s.byArea[p.region[c]], c)
	}
	p.sizes[size] = s
	return s
}

// between is the direct latency of two candidates.
func (p *problem) between(a, b int32) int32 {
	if a == b {
		return 0
	}
	l := &p.g.Latency
	return l.Base[int(p.site[a])*l.Sites+int(p.site[b])] + p.access[a] + p.access[b]
}

// tightest is the radius that no group is within.
func (p *problem) tightest() int32 { return slices.Max(p.closest) }

// near is the worth of a radius, wide that of a diameter.
func (p *problem) near(r int32) float64 {
	return p.g.Neighbour.Weight * p.g.Neighbour.Low(p.g.Latency.Ms(r)) / p.weights
}

func (p *problem) wide(d int32) float64 {
	return p.g.Diameter.Weight * p.g.Diameter.Low(p.g.Latency.Ms(d)) / p.weights
}

// score of a group with its sum of values, radius and diameter; a diameter over the limit is worse than anything that is within it, and
// the worse the longer it is.
func (p *problem) score(sum float64, radius, diameter int32) float64 {
	v := sum - p.fixed + p.near(radius) + p.wide(diameter)
	if diameter > p.limit {
		v -= penalty * (1 + float64(diameter-p.limit)/float64(p.limit+1))
	}
	return v
}

// penalty is above the span of all objectives that matter: utilities are in [0,1] and costs are small.
const penalty = 100

// measure is the plain evaluation of a group.
func (p *problem) measure(set []int32) (sum float64, radius, diameter int32) {
	nodes := make([]int, len(set))
	s := p.sized(len(set))
	for i, c := range set {
		nodes[i] = int(p.node[c])
		sum += s.value[c]
	}
	diameter, radius = p.g.Measure(nodes)
	return sum, radius, diameter
}

var inf = math.Inf(1)
