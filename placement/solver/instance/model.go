package instance

// Limits, so that a file cannot ask for more memory than a machine has.
const (
	MaxNodes    = 20_000
	MaxReplicas = 50_000
	maxCapacity = 1 << 40
	maxFile     = 256 << 20 // bytes, unpacked
)

// Nodes by column. Region counts from 0.
type Nodes struct {
	Region      []int32
	Alive       []bool
	Blacklisted []bool
	Quarantined []bool // assignment only
	Load5       []float64
	LiveSlices  []float64
	CPUGHz      []float64
	FreeCPU     []float64 // percent of the clock
	MemPressure []float64
	Price       []float64
	CPU         []int64 // millis, assignment only
	Memory      []int64 // MiB, assignment only
}

// FreeGHz is the free part of the clock of node i.
func (n *Nodes) FreeGHz(i int) float64 { return n.CPUGHz[i] * n.FreeCPU[i] / 100 }

// Term is Rhizoma's util_value: where a value lies between Min and Max, and how much that counts.
type Term struct{ Min, Max, Weight float64 }

// Low is the worth of x where less is better.
func (t Term) Low(x float64) float64 { return (t.Max - min(max(x, t.Min), t.Max)) / (t.Max - t.Min) }

// High is the worth of x where more is better.
func (t Term) High(x float64) float64 { return (min(max(x, t.Min), t.Max) - t.Min) / (t.Max - t.Min) }

// Group is the group problem: choose the nodes of one overlay.
type Group struct {
	Name    string
	N       int
	Regions int
	Nodes   Nodes
	Latency Latency
	Anchors []int32
	Current []int32

	MinNodes, MaxNodes                 int
	MaxLoad5, MaxSlices, MaxMemory     float64
	MinFreeGHz                         float64 // strictly above
	MaxDiameterMs                      float64 // strictly below
	Balanced                           bool    // at most ⌈size/regions⌉ of each region
	Load5, LiveSlices, FreeGHz         Term
	Neighbour, Diameter                Term
	AddCost, RemoveCost, PriceOfAPrice float64 // a node added, removed, and the factor of the nodes' prices

	// Expected replaces, by node, what the terms of load, slices and free clock are worth together, in units of the weights: a forecast. nil: they are
	// worth what the nodes say now. Who is eligible is decided by the nodes in either case.
	Expected []float64
}

// Worth of node i: its terms of load, slices and free clock, weighted.
func (g *Group) Worth(i int) float64 {
	if g.Expected != nil {
		return g.Expected[i]
	}
	n := &g.Nodes
	return g.Load5.Weight*g.Load5.Low(n.Load5[i]) + g.LiveSlices.Weight*g.LiveSlices.Low(n.LiveSlices[i]) + g.FreeGHz.Weight*g.FreeGHz.High(n.FreeGHz(i))
}

// Weights is the sum of the weights of all terms.
func (g *Group) Weights() float64 {
	return g.Load5.Weight + g.LiveSlices.Weight + g.FreeGHz.Weight + g.Neighbour.Weight + g.Diameter.Weight
}

// Assignment is the assignment problem: place the replicas of components.
type Assignment struct {
	Name       string
	N          int
	Regions    int
	Nodes      Nodes
	Latency    Latency
	Components []Component
	Apart      [][2]int // pairs of components that share no node
	Bindings   []Binding

	Load5, LiveSlices, FreeGHz Term
	QualityWeight              float64
	PriceCoef                  float64
	Current                    [][]int32 // nil: nothing runs
}

// Component of an assignment. All its replicas are alike.
type Component struct {
	Name         string
	Replicas     int
	CPU, Memory  int64
	MaxPerNode   int
	MaxPerRegion int
	MinRegions   int
	Regions      []bool // allowed
	Pinned       []int32
	MoveCost     float64
}

// Binding says that From calls To: each replica of From its nearest replica of To.
type Binding struct {
	From, To int
	Weight   float64
	XMaxMs   float64 // worth nothing from here on
	MaxMs    float64 // hard limit, 0: none
}

// Quality of node i in [0,1]: the weighted mean of load, slices and free clock.
func (a *Assignment) Quality(i int) float64 {
	n := &a.Nodes
	weights := a.Load5.Weight + a.LiveSlices.Weight + a.FreeGHz.Weight
	return (a.Load5.Weight*a.Load5.Low(n.Load5[i]) + a.LiveSlices.Weight*a.LiveSlices.Low(n.LiveSlices[i]) +
		a.FreeGHz.Weight*a.FreeGHz.High(n.FreeGHz(i))) / weights
}

// Weight is the sum of the weights of quality and bindings.
func (a *Assignment) Weight() float64 {
	w := a.QualityWeight
	for _, b := range a.Bindings {
		w += b.Weight
	}
	return w
}

// Replicas of all components.
func (a *Assignment) Replicas() int {
	n := 0
	for i := range a.Components {
		n += a.Components[i].Replicas
	}
	return n
}
