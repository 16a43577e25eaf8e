package instance

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
)

// maker draws instances: a network of sites in four regions, nodes at sites, and what nodes are like. RTTs between regions are of the
// size that wide-area measurements show; some pairs are far slower than the way over a third site, as in reality.
type maker struct {
	r *rand.Rand
	n int
}

// regionRTT is the typical RTT in ms between and within the four regions.
var regionRTT = [4][4]float64{{40, 140, 190, 180}, {140, 25, 270, 240}, {190, 270, 60, 330}, {180, 240, 330, 45}}

// mix is the share of nodes of each region.
var mix = [4]float64{0.38, 0.44, 0.13, 0.05}

const (
	generatedUnit  = 0.01 // ms
	generatedSites = 490  // more nodes share sites
	metroMs        = 3.0  // RTT at most within a metropolitan area
	areasPerSite   = 6    // sites of one area, on average
)

func newMaker(seed uint64, n int) *maker { return &maker{rand.New(rand.NewPCG(seed, uint64(n))), n} }

// network draws sites, and nodes at them.
func (m *maker) network(missing float64) (Latency, []int32) {
	sites := min(m.n, generatedSites)
	l := Latency{Unit: generatedUnit, Sites: sites, Base: make([]int32, sites*sites), Site: make([]int32, m.n), Access: make([]int32, m.n)}
	region, area := make([]int32, sites), make([]int, sites)
	x, y := make([]float64, sites), make([]float64, sites)
	for s := range sites {
		region[s] = m.region()
		if s < 4 {
			region[s] = int32(s) // each region has a site
		}
		area[s] = m.r.IntN(sites/areasPerSite + 1)
		p := rand.New(rand.NewPCG(uint64(area[s]), uint64(region[s])))
		x[s], y[s] = p.Float64(), p.Float64()
	}
	for a := range sites {
		for b := range a {
			rtt := regionRTT[region[a]][region[b]] * (0.35 + 0.8*math.Hypot(x[a]-x[b], y[a]-y[b])) * (0.9 + 0.25*m.r.Float64())
			switch {
			case region[a] == region[b] && area[a] == area[b]:
				rtt = 0.05 + metroMs*m.r.Float64()
			case m.r.IntN(12) == 0:
				rtt *= 1.3 + 2*m.r.Float64() // a detour
			}
			v := int32(rtt / generatedUnit)
			if m.r.Float64() < missing {
				v = None
			}
			l.Base[a*sites+b], l.Base[b*sites+a] = v, v
		}
	}
	regions := make([]int32, m.n)
	for i := range m.n {
		l.Site[i] = int32(i % sites)
		if i >= sites {
			l.Site[i], l.Access[i] = int32(m.r.IntN(sites)), int32(m.r.ExpFloat64()*80)
		}
		regions[i] = region[l.Site[i]]
	}
	return l, regions
}

func (m *maker) region() int32 {
	v := m.r.Float64()
	for i, share := range mix {
		if v -= share; v < 0 {
			return int32(i)
		}
	}
	return 0
}

// round keeps a number as short as a file wants it.
func round(v float64) float64 { return math.Round(v*1000) / 1000 }

func (m *maker) nodes(regions []int32) Nodes {
	out := Nodes{Region: regions}
	for range m.n {
		busy := m.r.Float64() * m.r.Float64() * 110
		out.Alive = append(out.Alive, m.r.IntN(14) > 0)
		out.Blacklisted = append(out.Blacklisted, m.r.IntN(50) == 0)
		out.Quarantined = append(out.Quarantined, m.r.IntN(25) == 0)
		out.Load5 = append(out.Load5, round(m.r.ExpFloat64()*3+busy/30))
		out.LiveSlices = append(out.LiveSlices, float64(m.r.IntN(9)+int(busy/25)))
		out.CPUGHz = append(out.CPUGHz, round(1.8+2.2*m.r.Float64()))
		out.FreeCPU = append(out.FreeCPU, round(max(0, 100-busy)))
		out.MemPressure = append(out.MemPressure, round(30+65*m.r.Float64()))
		out.Price = append(out.Price, round(1+3*m.r.Float64()*m.r.Float64()+m.r.Float64()))
		out.CPU = append(out.CPU, int64([]int{1, 1, 2, 2, 4, 4, 8, 16}[m.r.IntN(8)])*1000*int64(50+m.r.IntN(45))/100)
		out.Memory = append(out.Memory, int64([]int{2, 4, 4, 8, 8, 16, 32}[m.r.IntN(7)])*1024)
	}
	return out
}

// GroupSpec says what group problem to draw.
type GroupSpec struct {
	Name        string
	N           int
	Seed        uint64
	Anchors     float64 // weight of their term; 2 is Rhizoma's
	Diameter    float64 // limit in ms, 0: 1000
	Missing     float64 // share of links that are missing
	Current     bool    // a random current group
	Least, Most int     // size, 0: 6 to 10
}

// NewGroup draws a group problem.
func NewGroup(spec GroupSpec) *Group {
	m := newMaker(spec.Seed, spec.N)
	g := &Group{
		Name: spec.Name, N: spec.N, Regions: 4, MinNodes: 6, MaxNodes: 10, MaxLoad5: 10, MaxSlices: 10, MaxMemory: 90, MinFreeGHz: 1.5,
		MaxDiameterMs: 1000, Balanced: true, AddCost: 0.012,
		Load5: Term{0, 10, 2}, LiveSlices: Term{0, 10, 1}, FreeGHz: Term{1, 4, 3}, Neighbour: Term{0, 500, 2}, Diameter: Term{0, 1000, 2},
	}
	if spec.Most > 0 {
		g.MinNodes, g.MaxNodes = spec.Least, spec.Most
	}
	if spec.Anchors > 0 {
		g.Neighbour.Weight = spec.Anchors
		if spec.Anchors > 4 {
			g.AddCost = 0.003
		}
	}
	if spec.Diameter > 0 {
		g.MaxDiameterMs = spec.Diameter
	}
	var regions []int32
	g.Latency, regions = m.network(spec.Missing)
	g.Nodes = m.nodes(regions)
	shortest := None
	for i := range min(spec.N, 2000) {
		for j := range i {
			shortest = min(shortest, g.Latency.Between(i, j))
		}
	}
	g.Neighbour.Min, g.Diameter.Min = g.Latency.Ms(shortest), g.Latency.Ms(shortest)
	for len(g.Anchors) < min(10, spec.N) {
		if i := int32(m.r.IntN(spec.N)); !slices.Contains(g.Anchors, i) {
			g.Anchors = append(g.Anchors, i)
		}
	}
	g.Current = []int32{}
	if spec.Current {
		for i := range spec.N {
			if _, ok := g.Eligible(i); ok && len(g.Current) < g.MinNodes && m.r.IntN(4) == 0 {
				g.Current = append(g.Current, int32(i))
			}
		}
	}
	return g
}

// AssignmentSpec says what assignment problem to draw.
type AssignmentSpec struct {
	Name          string
	N, Components int
	Seed          uint64
	Replicas      int // of each component at most
	Plain         bool
}

// NewAssignment draws an assignment problem that has a solution: a random placement is drawn first, which becomes the current one, and
// the constraints so that it keeps them. Plain ones have replicas of equal number and hardly any constraints.
func NewAssignment(spec AssignmentSpec) (*Assignment, error) {
	m := newMaker(spec.Seed, spec.N)
	a := &Assignment{
		Name: spec.Name, N: spec.N, Regions: 4, Load5: Term{0, 10, 2}, LiveSlices: Term{0, 10, 1}, FreeGHz: Term{1, 4, 3}, QualityWeight: 4,
	}
	var regions []int32
	a.Latency, regions = m.network(0)
	a.Nodes = m.nodes(regions)
	total := 0
	for c := range spec.Components {
		k := Component{Name: fmt.Sprintf("c%d", c), Replicas: 1 + m.r.IntN(spec.Replicas), CPU: int64(400 + m.r.IntN(1300)), Memory: int64(200 + m.r.IntN(2300))}
		if spec.Plain {
			k.Replicas = spec.Replicas
		}
		total += k.Replicas
		a.Components = append(a.Components, k)
	}
	if err := m.plant(a, total, spec); err != nil {
		return nil, err
	}
	a.PriceCoef = math.Round(0.18/float64(total)*1e7) / 1e7
	for c := range a.Components {
		a.Components[c].MoveCost = math.Round([]float64{0.012, 0.024, 0.048, 0.096}[m.r.IntN(4)]/float64(total)*1e7) / 1e7
	}
	return a, nil
}

// plant draws the current placement and constraints around it.
func (m *maker) plant(a *Assignment, total int, spec AssignmentSpec) error {
	cpu, memory := slices.Clone(a.Nodes.CPU), slices.Clone(a.Nodes.Memory)
	for c := range a.Components {
		k := &a.Components[c]
		k.MaxPerNode, k.MaxPerRegion, k.MinRegions, k.Regions, k.Pinned = 1, k.Replicas, 1, []bool{true, true, true, true}, []int32{}
		var at []int32
		for tries := 0; len(at) < k.Replicas; tries++ {
			if tries > 100*a.N {
				return fmt.Errorf("%d nodes are too few for %d replicas", a.N, total)
			}
			i := m.r.IntN(a.N)
			if a.Nodes.Alive[i] && !a.Nodes.Blacklisted[i] && cpu[i] >= k.CPU && memory[i] >= k.Memory && !slices.Contains(at, int32(i)) {
				cpu[i], memory[i] = cpu[i]-k.CPU, memory[i]-k.Memory
				at = append(at, int32(i))
			}
		}
		a.Current = append(a.Current, at)
		if spec.Plain {
			continue
		}
		m.constrain(a, k, at)
	}
	m.relate(a, spec)
	return nil
}

func (m *maker) constrain(a *Assignment, k *Component, at []int32) {
	used := map[int32]int{}
	most := 0
	for _, i := range at {
		used[a.Nodes.Region[i]]++
		most = max(most, used[a.Nodes.Region[i]])
	}
	if m.r.IntN(3) == 0 {
		k.MaxPerNode = k.Replicas
	}
	k.MaxPerRegion = min(k.Replicas, most+m.r.IntN(3))
	k.MinRegions = 1 + m.r.IntN(len(used))
	if m.r.IntN(4) == 0 {
		for r := range k.Regions {
			k.Regions[r] = used[int32(r)] > 0
		}
	}
	if m.r.IntN(6) == 0 {
		k.Pinned = []int32{at[0]}
	}
}

// relate draws who calls whom and who must be apart.
func (m *maker) relate(a *Assignment, spec AssignmentSpec) {
	for range spec.Components * 6 / 5 {
		b := Binding{From: m.r.IntN(spec.Components), To: m.r.IntN(spec.Components), Weight: float64(1 + m.r.IntN(3)), XMaxMs: []float64{100, 200, 300, 500}[m.r.IntN(4)]}
		if b.From == b.To {
			continue
		}
		far := int32(0)
		for _, x := range a.Current[b.From] {
			near := None
			for _, y := range a.Current[b.To] {
				near = min(near, a.Latency.Between(int(x), int(y)))
			}
			far = max(far, near)
		}
		if m.r.IntN(2) == 0 && far < None {
			b.MaxMs = math.Ceil(max(250, a.Latency.Ms(far)))
		}
		a.Bindings = append(a.Bindings, b)
	}
	for range spec.Components / 2 {
		c, d := m.r.IntN(spec.Components), m.r.IntN(spec.Components)
		shared := c == d || slices.ContainsFunc(a.Current[c], func(i int32) bool { return slices.Contains(a.Current[d], i) })
		if !shared {
			a.Apart = append(a.Apart, [2]int{c, d})
		}
	}
}
