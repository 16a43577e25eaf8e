package instance

func (s *scanner) group(at map[string]int) *Group {
	g := &Group{}
	g.Name, g.N, g.Regions, g.Nodes, g.Latency = s.head(at, false)
	s.at = at["anchors"]
	if g.Anchors = s.list("anchors", g.N); len(g.Anchors) == 0 {
		s.fail(at["anchors"], "anchors: at least one is needed")
	}
	s.at = at["current"]
	g.Current = s.list("current", g.N)
	s.groupRules(g, at)
	return g
}

// groupRules reads constraints, utility and costs.
func (s *scanner) groupRules(g *Group, at map[string]int) {
	s.at = at["constraints"]
	s.groupConstraints(g)
	s.at = at["utility"]
	terms := map[string]*Term{
		"load5": &g.Load5, "live_slices": &g.LiveSlices, "free_ghz": &g.FreeGHz, "max_neighbour_ms": &g.Neighbour, "diameter_ms": &g.Diameter,
	}
	s.object("utility", required(terms), func(name string) { *terms[name] = s.term(name) })
	weights := 0.0
	for _, t := range terms {
		weights += t.Weight
	}
	if !(weights > 0) {
		s.fail(at["utility"], "utility: all weights are 0")
	}
	s.at = at["cost"]
	costs := map[string]*float64{"add": &g.AddCost, "remove": &g.RemoveCost, "price": &g.PriceOfAPrice}
	s.object("cost", required(costs), func(name string) { *costs[name] = s.number(name, 0) })
}

func required[T any](in map[string]T) map[string]bool {
	out := make(map[string]bool, len(in))
	for k := range in {
		out[k] = true
	}
	return out
}

func (s *scanner) groupConstraints(g *Group) {
	limits := map[string]*float64{
		"max_load5": &g.MaxLoad5, "max_live_slices": &g.MaxSlices, "max_mem_pressure": &g.MaxMemory, "min_free_ghz": &g.MinFreeGHz,
		"max_diameter_ms": &g.MaxDiameterMs,
	}
	want := required(limits)
	want["min_nodes"], want["max_nodes"], want["group"] = true, true, true
	begin := s.at
	s.object("constraints", want, func(name string) {
		at := s.at
		switch name {
		case "min_nodes":
			g.MinNodes = s.whole(name, 1, MaxNodes)
		case "max_nodes":
			g.MaxNodes = s.whole(name, 1, MaxNodes)
		case "group":
			switch v := s.text(name); v {
			case "ceil":
				g.Balanced = true
			case "none":
			default:
				s.fail(at, "group %q, want ceil or none", v)
			}
		default:
			*limits[name] = s.number(name, 0)
		}
	})
	if g.MinNodes > g.MaxNodes {
		s.fail(begin, "constraints: min_nodes %d is above max_nodes %d", g.MinNodes, g.MaxNodes)
	}
}

func (s *scanner) assignment(at map[string]int) *Assignment {
	a := &Assignment{}
	a.Name, a.N, a.Regions, a.Nodes, a.Latency = s.head(at, true)
	s.at = at["components"]
	replicas := 0
	s.array("components", func(int) {
		here := s.at
		a.Components = append(a.Components, s.component(a))
		if replicas += a.Components[len(a.Components)-1].Replicas; replicas > MaxReplicas {
			s.fail(here, "components: more than %d replicas", MaxReplicas)
		}
	})
	if len(a.Components) == 0 {
		s.fail(at["components"], "components: at least one is needed")
	}
	s.at = at["anti_affinity"]
	s.array("anti_affinity", func(int) {
		here := s.at
		p := s.list("anti_affinity", len(a.Components))
		if len(p) != 2 || p[0] == p[1] {
			s.fail(here, "anti_affinity: want two different components")
		}
		a.Apart = append(a.Apart, [2]int{int(p[0]), int(p[1])})
	})
	s.at = at["bindings"]
	s.array("bindings", func(int) { a.Bindings = append(a.Bindings, s.binding(len(a.Components))) })
	s.at = at["quality"]
	terms := map[string]*Term{"load5": &a.Load5, "live_slices": &a.LiveSlices, "free_ghz": &a.FreeGHz}
	want := required(terms)
	want["weight"] = true
	s.object("quality", want, func(name string) {
		if name == "weight" {
			a.QualityWeight = s.number(name, 0)
			return
		}
		*terms[name] = s.term(name)
	})
	if !(a.Load5.Weight+a.LiveSlices.Weight+a.FreeGHz.Weight > 0) || !(a.Weight() > 0) {
		s.fail(at["quality"], "quality: all weights are 0")
	}
	s.at = at["price_coef"]
	a.PriceCoef = s.number("price_coef", 0)
	s.at = at["current"]
	if !s.null() {
		s.array("current", func(int) { a.Current = append(a.Current, s.list("current", a.N)) })
		if len(a.Current) != len(a.Components) {
			s.fail(at["current"], "current: %d lists, want one for each of %d components", len(a.Current), len(a.Components))
		}
	}
	return a
}

func (s *scanner) component(a *Assignment) Component {
	var c Component
	want := map[string]bool{
		"name": true, "replicas": true, "cpu_m": true, "mem_mib": true, "max_per_node": true, "max_per_region": true, "min_regions": true,
		"regions": true, "pinned": true, "move_cost": true,
	}
	wholes := map[string]*int{"replicas": &c.Replicas, "max_per_node": &c.MaxPerNode, "max_per_region": &c.MaxPerRegion, "min_regions": &c.MinRegions}
	s.object("component", want, func(name string) {
		switch name {
		case "name":
			c.Name = s.text(name)
		case "cpu_m":
			c.CPU = int64(s.whole(name, 0, maxCapacity))
		case "mem_mib":
			c.Memory = int64(s.whole(name, 0, maxCapacity))
		case "regions":
			c.Regions = make([]bool, a.Regions)
			s.array(name, func(int) { c.Regions[s.whole(name, 1, a.Regions)-1] = true })
		case "pinned":
			c.Pinned = s.list(name, a.N)
		case "move_cost":
			c.MoveCost = s.number(name, 0)
		default:
			*wholes[name] = s.whole(name, 0, MaxReplicas)
		}
	})
	return c
}

func (s *scanner) binding(components int) Binding {
	var b Binding
	begin := s.at
	want := map[string]bool{"from": true, "to": true, "weight": true, "x_max_ms": true, "max_ms": true}
	s.object("binding", want, func(name string) {
		switch name {
		case "from":
			b.From = s.whole(name, 0, components-1)
		case "to":
			b.To = s.whole(name, 0, components-1)
		case "weight":
			b.Weight = s.number(name, 0)
		case "x_max_ms":
			at := s.at
			if b.XMaxMs = s.number(name, 0); b.XMaxMs <= 0 {
				s.fail(at, "x_max_ms must be above 0")
			}
		case "max_ms":
			b.MaxMs = s.number(name, 0)
		}
	})
	if b.From == b.To {
		s.fail(begin, "binding: from and to are the same component")
	}
	return b
}
