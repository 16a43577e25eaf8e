package instance

import "fmt"

// Judge scores a placement, one list of nodes a component, and lists what it violates.
func (a *Assignment) Judge(placement [][]int32) (Score, []string) {
	if len(placement) != len(a.Components) {
		return Score{}, []string{fmt.Sprintf("%d lists for %d components", len(placement), len(a.Components))}
	}
	var wrong []string
	var s Score
	var quality float64
	total := 0
	cpu, memory := make([]int64, a.N), make([]int64, a.N)
	hosts := make([]map[int32]int, len(placement))
	used := map[int32]bool{}
	for c, nodes := range placement {
		k := &a.Components[c]
		if len(nodes) != k.Replicas {
			wrong = append(wrong, fmt.Sprintf("%s: %d replicas, want %d", k.Name, len(nodes), k.Replicas))
		}
		hosts[c] = map[int32]int{}
		for _, i := range nodes {
			hosts[c][i]++
			cpu[i] += k.CPU
			memory[i] += k.Memory
			quality += a.Quality(int(i))
			used[i] = true
		}
		total += len(nodes)
		w, moves := a.judgeComponent(c, hosts[c])
		wrong = append(wrong, w...)
		s.Cost += k.MoveCost * float64(moves)
	}
	for i := range a.N {
		if cpu[i] > a.Nodes.CPU[i] || memory[i] > a.Nodes.Memory[i] {
			wrong = append(wrong, fmt.Sprintf("node %d: %d millis of %d, %d MiB of %d", i, cpu[i], a.Nodes.CPU[i], memory[i], a.Nodes.Memory[i]))
		}
		if used[int32(i)] {
			s.Cost += a.PriceCoef * a.Nodes.Price[i]
		}
	}
	for _, p := range a.Apart {
		for i := range hosts[p[0]] {
			if hosts[p[1]][i] > 0 {
				wrong = append(wrong, fmt.Sprintf("components %d and %d are both on node %d", p[0], p[1], i))
			}
		}
	}
	bound, w := a.judgeBindings(placement)
	s.Utility = (a.QualityWeight*quality/float64(max(total, 1)) + bound) / a.Weight()
	s.Objective = s.Utility - s.Cost
	return s, append(wrong, w...)
}

func (a *Assignment) judgeComponent(c int, hosts map[int32]int) (wrong []string, moves int) {
	k := &a.Components[c]
	old := map[int32]int{}
	if a.Current != nil {
		for _, i := range a.Current[c] {
			old[i]++
		}
	}
	regions := map[int32]int{}
	say := func(format string, args ...any) { wrong = append(wrong, k.Name+": "+fmt.Sprintf(format, args...)) }
	for i, n := range hosts {
		region := a.Nodes.Region[i]
		regions[region] += n
		moves += max(0, n-old[i])
		switch {
		case !a.Nodes.Alive[i]:
			say("node %d is not alive", i)
		case a.Nodes.Blacklisted[i]:
			say("node %d is blacklisted", i)
		case a.Nodes.Quarantined[i] && n > old[i]:
			say("a new replica on quarantined node %d", i)
		case n > k.MaxPerNode:
			say("%d replicas on node %d", n, i)
		case !k.Regions[region]:
			say("node %d is in region %d", i, region+1)
		}
	}
	for r, n := range regions {
		if n > k.MaxPerRegion {
			say("%d replicas in region %d", n, r+1)
		}
	}
	if len(regions) < k.MinRegions {
		say("%d regions, at least %d", len(regions), k.MinRegions)
	}
	for _, i := range k.Pinned {
		if hosts[i] == 0 {
			say("pinned node %d has none", i)
		}
	}
	return wrong, moves
}

func (a *Assignment) judgeBindings(placement [][]int32) (worth float64, wrong []string) {
	limits := a.Latency.Limits()
	for i, b := range a.Bindings {
		limit := None - 1
		if b.MaxMs > 0 {
			limit = limits.Below(b.MaxMs, false)
		}
		sum := 0.0
		for _, x := range placement[b.From] {
			near := None
			for _, y := range placement[b.To] {
				near = min(near, a.Latency.Between(int(x), int(y)))
			}
			if b.MaxMs > 0 && near > limit {
				wrong = append(wrong, fmt.Sprintf("binding %d: the replica on node %d is too far", i, x))
			}
			sum += 1 - min(a.Latency.Ms(near), b.XMaxMs)/b.XMaxMs
		}
		if n := len(placement[b.From]); n > 0 {
			worth += b.Weight * sum / float64(n)
		}
	}
	return worth, wrong
}
