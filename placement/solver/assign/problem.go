package assign

import (
	"slices"

	"github.com/coppice-project/coppice/placement/solver/instance"
)

// problem is an instance with everything worked out that does not depend on where replicas are. Worths are shares of the objective.
type problem struct {
	a        *instance.Assignment
	usable   []bool    // by node: alive and not blacklisted
	quality  []float64 // by node: worth of a replica there for its quality
	price    []float64 // by node: cost of using it
	parts    []part    // by component
	links    []link    // by binding
	replicas int
	apart    []uint64 // bit matrix of components
	words    int
	strict   float64   // cost of a call that is too far and of a region that is missing
	rank     [][]int32 // by region: usable nodes, those first that promise most
}

// part is a component.
type part struct {
	*instance.Component
	old   []place // where its replicas are now, by node
	apart bool    // from any
	out   []int   // bindings from it
	in    []int   // bindings to it
}

type place struct{ node, count int32 }

// link is a binding.
type link struct {
	from, to int
	worth    float64 // of a replica of from that has one of to beside it
	perUnit  float64 // less for each unit of latency
	far      int32   // from here on it is worth nothing
	limit    int32   // hard; the largest number: none
	strict   float64 // cost of being beyond the limit
}

func newProblem(a *instance.Assignment) *problem {
	p := &problem{a: a, words: (len(a.Components) + 63) / 64, replicas: a.Replicas(), strict: strict}
	total := a.Weight()
	p.usable, p.quality, p.price = make([]bool, a.N), make([]float64, a.N), make([]float64, a.N)
	for i := range a.N {
		p.usable[i] = a.Nodes.Alive[i] && !a.Nodes.Blacklisted[i]
		p.quality[i] = a.QualityWeight * a.Quality(i) / total / float64(max(p.replicas, 1))
		p.price[i] = a.PriceCoef * a.Nodes.Price[i]
	}
	p.parts = make([]part, len(a.Components))
	for c := range p.parts {
		p.parts[c].Component = &a.Components[c]
		if a.Current != nil {
			p.parts[c].old = counted(a.Current[c])
		}
	}
	p.apart = make([]uint64, len(a.Components)*p.words)
	for _, pair := range a.Apart {
		for _, x := range [][2]int{{pair[0], pair[1]}, {pair[1], pair[0]}} {
			p.apart[x[0]*p.words+x[1]>>6] |= 1 << (x[1] & 63)
			p.parts[x[0]].apart = true
		}
	}
	limits := a.Latency.Limits()
	for i, b := range a.Bindings {
		l := link{from: b.From, to: b.To, limit: 1<<31 - 1, strict: strict}
		if k := a.Components[b.From].Replicas; k > 0 {
			l.worth = b.Weight / total / float64(k)
		}
		l.perUnit = l.worth * a.Latency.Unit / b.XMaxMs
		l.far = limits.Below(b.XMaxMs, false)
		if b.MaxMs > 0 {
			l.limit = limits.Below(b.MaxMs, false)
		}
		p.links = append(p.links, l)
		p.parts[b.From].out = append(p.parts[b.From].out, i)
		p.parts[b.To].in = append(p.parts[b.To].in, i)
	}
	p.order()
	return p
}

func counted(nodes []int32) []place {
	var out []place
	for _, n := range slices.Sorted(slices.Values(nodes)) {
		if len(out) > 0 && out[len(out)-1].node == n {
			out[len(out)-1].count++
			continue
		}
		out = append(out, place{n, 1})
	}
	return out
}

// was is how many replicas the component has on node n now.
func (c *part) was(n int32) int32 {
	if len(c.old) > 16 {
		if i, ok := slices.BinarySearchFunc(c.old, n, func(p place, n int32) int { return int(p.node - n) }); ok {
			return c.old[i].count
		}
		return 0
	}
	for _, p := range c.old {
		if p.node == n {
			return p.count
		}
	}
	return 0
}

// promise of a node: what its quality wins over the usual one for as many replicas as it holds, less its price.
func (p *problem) order() {
	var cpu, memory, quality float64
	nodes := 0
	for c := range p.parts {
		cpu += float64(p.parts[c].CPU * int64(p.parts[c].Replicas))
		memory += float64(p.parts[c].Memory * int64(p.parts[c].Replicas))
	}
	for i, ok := range p.usable {
		if ok {
			quality += p.quality[i]
			nodes++
		}
	}
	if p.replicas == 0 || nodes == 0 {
		p.rank = make([][]int32, p.a.Regions)
		return
	}
	cpu, memory, quality = cpu/float64(p.replicas), memory/float64(p.replicas), quality/float64(nodes)
	promise := make([]float64, p.a.N)
	p.rank = make([][]int32, p.a.Regions)
	for i, ok := range p.usable {
		if !ok {
			continue
		}
		holds := min(float64(p.a.Nodes.CPU[i])/max(cpu, 1), float64(p.a.Nodes.Memory[i])/max(memory, 1))
		if holds < 1 {
			promise[i] = -1 + holds // hardly anything fits
		} else {
			promise[i] = (p.quality[i] - quality) - p.price[i]/holds // a replica
		}
		r := p.a.Nodes.Region[i]
		p.rank[r] = append(p.rank[r], int32(i))
	}
	for _, list := range p.rank {
		slices.SortStableFunc(list, func(a, b int32) int {
			switch {
			case promise[a] > promise[b]:
				return -1
			case promise[a] < promise[b]:
				return 1
			}
			return 0
		})
	}
}

func (p *problem) between(i, j int32) int32 {
	if i == j {
		return 0
	}
	l := &p.a.Latency
	return l.Base[int(l.Site[i])*l.Sites+int(l.Site[j])] + l.Access[i] + l.Access[j]
}

// value of a link at a distance; beyond the limit it is a violation.
func (l *link) value(d int32) float64 {
	v := 0.0
	if d <= l.far {
		v = l.worth - l.perUnit*float64(d)
	}
	if d > l.limit {
		v -= l.strict
	}
	return v
}

// What a violation costs while searching. A replica that is nowhere costs more than it can win anywhere; calls that are too far and
// regions that are missing cost little enough to be crossed on the way to something better.
const (
	nowhere = 1.0
	strict  = 0.05
)

// harden makes violations cost more, for where the search ends in one.
func (p *problem) harden() {
	p.strict *= 3
	for i := range p.links {
		p.links[i].strict = p.strict
	}
}

func (p *problem) areApart(c, d int) bool { return p.apart[c*p.words+d>>6]>>(d&63)&1 != 0 }
