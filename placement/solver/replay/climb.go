package replay

import (
	"context"
	"math/rand/v2"
	"slices"

	"github.com/coppice-project/coppice/placement/solver/instance"
)

// keep never changes anything.
type keep struct{}

// Decide implements Policy.
func (keep) Decide(_ context.Context, g *instance.Group) []int { return current(g) }

func current(g *instance.Group) []int {
	out := make([]int, len(g.Current))
	for i, n := range g.Current {
		out[i] = int(n)
	}
	return out
}

// climber is Rhizoma's solver: of all groups that at most that many actions (adding or removing a node) reach, the best, which is the one with the fewest
// violations, and among these the one of the highest objective. It tries all of them; the paper's own stopped after some seconds.
type climber struct{ actions int }

// Decide implements Policy.
func (c *climber) Decide(ctx context.Context, g *instance.Group) []int {
	return newClimb(g).step(ctx, current(g), c.actions)
}

// Bootstrap is a group as Rhizoma begins: one node drawn at random, and then its climber, until nothing changes.
func Bootstrap(ctx context.Context, t *instance.Trace, seed uint64) []int {
	g := t.At(0)
	rng := rand.New(rand.NewPCG(seed, 0x5bf03635))
	var eligible []int
	for i := range g.N {
		if _, ok := g.Eligible(i); ok {
			eligible = append(eligible, i)
		}
	}
	if len(eligible) == 0 {
		return nil
	}
	set := []int{eligible[rng.IntN(len(eligible))]}
	for range 4 * g.MaxNodes {
		g.Current = nil
		for _, i := range set {
			g.Current = append(g.Current, int32(i))
		}
		next := newClimb(g).step(ctx, slices.Clone(set), 2)
		if slices.Equal(next, set) {
			break
		}
		set = next
	}
	return set
}

// climb evaluates the neighbours of a group.
type climb struct {
	g        *instance.Group
	limit    int32 // the longest diameter
	eligible []bool
	list     []int // the eligible nodes
	worth    []float64
	begun    []bool // in g.Current
	anchors  [][]int32
	count    []int
	dist     []int32
	best     candidate
	found    []int
}

// candidate is what a group is worth.
type candidate struct {
	violations int
	value      float64
}

func newClimb(g *instance.Group) *climb {
	c := &climb{
		g: g, limit: g.Latency.Below(g.MaxDiameterMs, true), eligible: make([]bool, g.N), worth: make([]float64, g.N), begun: make([]bool, g.N),
		count: make([]int, g.Regions), dist: make([]int32, (g.MaxNodes+3)*(g.MaxNodes+3)),
	}
	for i := range g.N {
		if _, c.eligible[i] = g.Eligible(i); c.eligible[i] {
			c.list = append(c.list, i)
		}
		c.worth[i] = g.Worth(i)
	}
	for _, i := range g.Current {
		c.begun[i] = true
	}
	for _, a := range g.Anchors {
		row := make([]int32, g.N)
		for i := range g.N {
			row[i] = g.Latency.Between(int(a), i)
		}
		c.anchors = append(c.anchors, row)
	}
	return c
}

// step returns the best group within h actions, sorted.
func (c *climb) step(ctx context.Context, set []int, h int) []int {
	slices.Sort(set)
	c.best = candidate{violations: 1 << 30}
	c.try(set)
	c.walk(ctx, set, h, -1)
	return slices.Sorted(slices.Values(c.found))
}

// walk tries everything that up to h actions make of set. Nodes are added in rising order only, so that no pair comes twice.
func (c *climb) walk(ctx context.Context, set []int, h, last int) {
	if h == 0 || ctx.Err() != nil {
		return
	}
	if len(set) <= c.g.MaxNodes {
		grown := append(slices.Clone(set), 0)
		for _, i := range c.list {
			if i <= last || slices.Contains(set, i) {
				continue
			}
			grown[len(set)] = i
			c.try(grown)
			if h > 1 {
				c.walk(ctx, grown, h-1, i)
			}
		}
	}
	if last >= 0 {
		return // what is removed is removed before anything is added
	}
	for x := range set {
		less := slices.Delete(slices.Clone(set), x, x+1)
		c.try(less)
		c.walk(ctx, less, h-1, -1)
	}
}

// try keeps a group if it is the best so far. What takes longest, the diameter, is computed only where the group may win.
func (c *climb) try(set []int) {
	g := c.g
	violations := max(g.MinNodes-len(set), 0) + max(len(set)-g.MaxNodes, 0)
	clear(c.count)
	worth, cost, kept := 0.0, 0.0, 0
	for _, i := range set {
		if !c.eligible[i] {
			violations++
		}
		c.count[g.Nodes.Region[i]]++
		worth += c.worth[i]
		cost += g.PriceOfAPrice * g.Nodes.Price[i]
		if c.begun[i] {
			kept++
		} else {
			cost += g.AddCost
		}
	}
	cost += g.RemoveCost * float64(len(g.Current)-kept)
	room := g.RegionCap(max(len(set), 1))
	for _, n := range c.count {
		violations += max(n-room, 0)
	}
	if violations > c.best.violations {
		return
	}
	far := int32(0)
	for _, row := range c.anchors {
		near := instance.None
		for _, i := range set {
			near = min(near, row[i])
		}
		far = max(far, near)
	}
	u := worth/float64(max(len(set), 1)) + g.Neighbour.Weight*g.Neighbour.Low(g.Latency.Ms(far))
	if violations == c.best.violations && (u+g.Diameter.Weight)/g.Weights()-cost <= c.best.value {
		return
	}
	d := c.diameter(set)
	if d > c.limit {
		violations++
	}
	v := candidate{violations, (u+g.Diameter.Weight*g.Diameter.Low(g.Latency.Ms(d)))/g.Weights() - cost}
	if v.violations < c.best.violations || v.violations == c.best.violations && v.value > c.best.value {
		c.best, c.found = v, append(c.found[:0], set...)
	}
}

// diameter is the longest of the shortest paths between members.
func (c *climb) diameter(set []int) int32 {
	k := len(set)
	d := c.dist[:k*k]
	for a, i := range set {
		for b, j := range set[:a] {
			v := c.g.Latency.Between(i, j)
			d[a*k+b], d[b*k+a] = v, v
		}
		d[a*k+a] = 0
	}
	longest := int32(0)
	for m := range k {
		for a := range k {
			am := d[a*k+m]
			for b := range a {
				if v := am + d[m*k+b]; v < d[a*k+b] {
					d[a*k+b], d[b*k+a] = v, v
				}
			}
		}
	}
	for _, v := range d {
		longest = max(longest, v)
	}
	return longest
}
