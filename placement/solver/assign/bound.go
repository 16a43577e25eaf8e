package assign

import (
	"container/heap"

	"github.com/coppice-project/coppice/placement/solver/instance"
)

// bounds are worths that no placement exceeds.
type bounds struct {
	p     *problem
	share [][2]float64 // by node: what a milli of CPU and a MiB on it cost at least: its replicas together fill it once at most
	call  [][]float64  // by binding, by node: the most a caller there can win; nil: all a call is worth
}

func newBounds(p *problem) *bounds {
	b := &bounds{p: p, share: make([][2]float64, p.a.N), call: make([][]float64, len(p.links))}
	var cpu, memory, allCPU, allMemory float64
	for c := range p.parts {
		cpu += float64(p.parts[c].CPU) * float64(p.parts[c].Replicas)
		memory += float64(p.parts[c].Memory) * float64(p.parts[c].Replicas)
	}
	for i, ok := range p.usable {
		if ok {
			allCPU, allMemory = allCPU+float64(p.a.Nodes.CPU[i]), allMemory+float64(p.a.Nodes.Memory[i])
		}
	}
	byCPU := cpu*allMemory >= memory*allCPU // which of the two is scarcer; either is sound
	for i := range b.share {
		if have := p.a.Nodes.CPU[i]; byCPU && have > 0 {
			b.share[i][0] = p.price[i] / float64(have)
		} else if have := p.a.Nodes.Memory[i]; !byCPU && have > 0 {
			b.share[i][1] = p.price[i] / float64(have)
		}
	}
	for i, l := range p.links {
		if len(p.links)*p.a.N <= detailed || p.areApart(l.from, l.to) && len(p.parts)*p.a.N <= detailed {
			b.call[i] = b.calls(i)
		}
	}
	return b
}

// detailed is the number of components × nodes, and bindings × nodes, up to which each is looked at; above it bounds are coarser.
const detailed = 2_000_000

// mayHost tells whether node i can have a replica of c at all.
func (p *problem) mayHost(c, i int) bool {
	k := &p.parts[c]
	return p.usable[i] && k.Regions[p.a.Nodes.Region[i]] && p.a.Nodes.CPU[i] >= k.CPU && p.a.Nodes.Memory[i] >= k.Memory &&
		(!p.a.Nodes.Quarantined[i] || k.was(int32(i)) > 0) && k.MaxPerNode > 0 && k.MaxPerRegion > 0
}

// calls is the worth of a call from each node to the nearest node that may host what is called.
func (b *bounds) calls(i int) []float64 {
	p, link := b.p, &b.p.links[i]
	l := &p.a.Latency
	const most = int32(instance.None)
	// by site: the least access of a host and which it is, and the least of the others
	first, second := make([]int32, l.Sites), make([]int32, l.Sites)
	who := make([]int, l.Sites)
	for s := range first {
		first[s], second[s], who[s] = most, most, -1
	}
	hosts := make([]bool, p.a.N)
	for n := range p.a.N {
		if hosts[n] = p.mayHost(link.to, n); !hosts[n] {
			continue
		}
		s, access := l.Site[n], l.Access[n]
		if access < first[s] {
			first[s], second[s], who[s] = access, first[s], n
		} else {
			second[s] = min(second[s], access)
		}
	}
	apart := p.areApart(link.from, link.to)
	k, o := &p.parts[link.from], &p.parts[link.to]
	out := make([]float64, p.a.N)
	for n := range p.a.N {
		if !p.mayHost(link.from, n) {
			continue
		}
		beside := hosts[n] && !apart && p.a.Nodes.CPU[n] >= k.CPU+o.CPU && p.a.Nodes.Memory[n] >= k.Memory+o.Memory
		d := int32(0)
		if !beside {
			d = most
			row := l.Base[int(l.Site[n])*l.Sites:][:l.Sites]
			for s, access := range first {
				if who[s] == n {
					access = second[s]
				}
				d = min(d, row[s]+access)
			}
			d = min(d+l.Access[n], most)
		}
		if d <= link.far {
			out[n] = link.worth - link.perUnit*float64(d)
		}
		if d > link.limit {
			out[n] = -nowhere // not feasible there
		}
	}
	return out
}

// replica bounds what a replica of c on node i wins, with its part of the price of the node where priced, without the cost of moving.
func (b *bounds) replica(c, i int, priced bool) float64 {
	k := &b.p.parts[c]
	v := b.p.quality[i]
	if priced {
		v -= b.share[i][0]*float64(k.CPU) + b.share[i][1]*float64(k.Memory)
	}
	for _, l := range k.out {
		if b.call[l] != nil {
			v += b.call[l][i]
		} else {
			v += b.p.links[l].worth
		}
	}
	return v
}

// coarse bounds what all replicas of c win together without looking at each node: all on the best one, where nothing costs.
func (b *bounds) coarse(c int, best []float64) float64 {
	k := &b.p.parts[c]
	v := 0.0
	for r, ok := range k.Regions {
		if ok {
			v = max(v, best[r])
		}
	}
	for _, l := range k.out {
		v += b.p.links[l].worth
	}
	return v * float64(k.Replicas)
}

// least is a heap of the best values so far, the least on top.
type least []float64

func (h least) Len() int           { return len(h) }
func (h least) Less(i, j int) bool { return h[i] < h[j] }
func (h least) Swap(i, j int)      { h[i], h[j] = h[j], h[i] }
func (h *least) Push(x any)        { *h = append(*h, x.(float64)) }
func (h *least) Pop() any {
	last := (*h)[len(*h)-1]
	*h = (*h)[:len(*h)-1]
	return last
}

// component bounds what all replicas of c win together: the best places, as many on a node and in a region as may be.
func (b *bounds) component(c int, priced bool) float64 {
	p, k := b.p, &b.p.parts[c]
	areas := make([]least, p.a.Regions)
	offer := func(area int32, v float64) {
		h := &areas[area]
		if len(*h) < min(k.MaxPerRegion, k.Replicas) {
			heap.Push(h, v)
		} else if len(*h) > 0 && v > (*h)[0] {
			(*h)[0] = v
			heap.Fix(h, 0)
		}
	}
	for i := range p.a.N {
		if !p.mayHost(c, i) {
			continue
		}
		v, was := b.replica(c, i, priced), int(k.was(int32(i)))
		most := min(k.MaxPerNode, k.Replicas)
		if p.a.Nodes.Quarantined[i] {
			most = min(most, was)
		}
		for x := range most {
			if x >= was {
				offer(p.a.Nodes.Region[i], v-k.MoveCost)
			} else {
				offer(p.a.Nodes.Region[i], v)
			}
		}
	}
	var top least
	for _, h := range areas {
		for _, v := range h {
			if len(top) < k.Replicas {
				heap.Push(&top, v)
			} else if v > top[0] {
				top[0] = v
				heap.Fix(&top, 0)
			}
		}
	}
	sum := 0.0
	for _, v := range top {
		sum += v
	}
	if len(top) < k.Replicas { // there is no placement; any bound holds
		return 0
	}
	return sum
}

// all bounds the objective.
func (b *bounds) all() float64 {
	sum := 0.0
	best := make([]float64, b.p.a.Regions)
	for i, ok := range b.p.usable {
		if r := b.p.a.Nodes.Region[i]; ok {
			best[r] = max(best[r], b.p.quality[i])
		}
	}
	for c := range b.p.parts {
		if len(b.p.parts)*b.p.a.N <= detailed {
			sum += b.component(c, true)
		} else {
			sum += b.coarse(c, best)
		}
	}
	return sum
}
