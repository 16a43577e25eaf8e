package assign

import "github.com/coppice-project/coppice/placement/solver/instance"

// state is a placement under search with what is needed to change it in small steps. Capacity, separation, limits a node and a region,
// quarantine hold at all times; a replica that is nowhere, too few regions and calls that are too far are violations that cost.
type state struct {
	p       *problem
	at      [][]int32    // by component, by replica: its node, -1: nowhere
	fixed   [][]bool     // by component, by replica: it holds a pinned node
	on      [][]tenant   // by node
	tenants []int32      // by node: replicas
	cpu     []int64      // by node: free
	memory  []int64      // by node: free
	areas   [][]int32    // by component, by region: replicas
	spread  []int32      // by component: regions with replicas
	near    [][]neighbor // by binding, by replica of from
	value   float64      // objective less violations
	lost    int          // replicas that are nowhere
	broken  int          // other violations
	used    []int32      // nodes with replicas
	usedAt  []int32      // by node: its place in used
}

// tenant is a component on a node.
type tenant struct{ comp, count int32 }

// neighbor is the replica that is called and how far it is.
type neighbor struct{ distance, replica int32 }

func newState(p *problem) *state {
	n := p.a.N
	s := &state{
		p: p, at: make([][]int32, len(p.parts)), fixed: make([][]bool, len(p.parts)), on: make([][]tenant, n), tenants: make([]int32, n),
		cpu: make([]int64, n), memory: make([]int64, n), areas: make([][]int32, len(p.parts)), spread: make([]int32, len(p.parts)),
		near: make([][]neighbor, len(p.links)), usedAt: make([]int32, n),
	}
	copy(s.cpu, p.a.Nodes.CPU)
	copy(s.memory, p.a.Nodes.Memory)
	for c := range p.parts {
		k := &p.parts[c]
		s.at[c], s.fixed[c] = make([]int32, k.Replicas), make([]bool, k.Replicas)
		for r := range s.at[c] {
			s.at[c][r] = -1
		}
		s.areas[c] = make([]int32, p.a.Regions)
		s.lost += k.Replicas
		s.broken += k.MinRegions
	}
	for b, l := range p.links {
		s.near[b] = make([]neighbor, p.parts[l.from].Replicas)
		for r := range s.near[b] {
			s.near[b][r] = neighbor{instance.None, -1}
		}
	}
	s.value = -s.penalty()
	return s
}

// penalty is what the violations cost.
func (s *state) penalty() float64 { return nowhere*float64(s.lost) + s.p.strict*float64(s.broken) }

// rank is what placements are compared by: violations, then what they are worth.
func (s *state) rank() rank { return rank{s.lost + s.broken, s.value} }

type rank struct {
	broken int
	value  float64
}

// above tells whether r is better than q, by more than sums of floats are off.
func (r rank) above(q rank) bool {
	return r.broken < q.broken || r.broken == q.broken && r.value > q.value+gainful
}

// count is how many replicas of c are on node n.
func (s *state) count(c int, n int32) int32 {
	for _, t := range s.on[n] {
		if int(t.comp) == c {
			return t.count
		}
	}
	return 0
}

// fits tells whether a replica of c that is on node from (-1: nowhere) may be on node to.
func (s *state) fits(c int, from, to int32) bool {
	p := s.p
	k := &p.parts[c]
	if !p.usable[to] || s.cpu[to] < k.CPU || s.memory[to] < k.Memory {
		return false
	}
	area := p.a.Nodes.Region[to]
	if !k.Regions[area] || (from < 0 || p.a.Nodes.Region[from] != area) && int(s.areas[c][area]) >= k.MaxPerRegion {
		return false
	}
	x := s.count(c, to)
	if int(x) >= k.MaxPerNode || p.a.Nodes.Quarantined[to] && x >= k.was(to) {
		return false
	}
	if k.apart {
		for _, t := range s.on[to] {
			if p.areApart(c, int(t.comp)) {
				return false
			}
		}
	}
	return true
}

// gain is what moving replica r of c to node to (-1: nowhere) adds to the value.
func (s *state) gain(c, r int, to int32) float64 {
	p := s.p
	k := &p.parts[c]
	from := s.at[c][r]
	v := s.local(c, k, from, to)
	for _, b := range k.out {
		l := &p.links[b]
		if from >= 0 {
			v -= l.value(s.near[b][r].distance)
		}
		if to >= 0 {
			v += l.value(s.nearest(l.to, to, -1).distance)
		}
	}
	for _, b := range k.in {
		l := &p.links[b]
		near := s.near[b]
		for x, n := range s.at[l.from] {
			if n < 0 {
				continue
			}
			d := near[x].distance
			if int(near[x].replica) == r {
				d = s.nearest(c, n, r).distance
			}
			if to >= 0 {
				d = min(d, p.between(n, to))
			}
			if d != near[x].distance {
				v += l.value(d) - l.value(near[x].distance)
			}
		}
	}
	return v
}

// local is the part of the gain that does not depend on other components.
func (s *state) local(c int, k *part, from, to int32) float64 {
	p := s.p
	v := 0.0
	if from >= 0 {
		v -= p.quality[from] + nowhere
		if s.tenants[from] == 1 {
			v += p.price[from]
		}
		if k.MoveCost > 0 && s.count(c, from) > k.was(from) {
			v += k.MoveCost
		}
	}
	if to >= 0 {
		v += p.quality[to] + nowhere
		if s.tenants[to] == 0 {
			v -= p.price[to]
		}
		if k.MoveCost > 0 && s.count(c, to) >= k.was(to) {
			v -= k.MoveCost
		}
	}
	if k.MinRegions > 1 || from < 0 || to < 0 {
		v += p.strict * float64(s.spreads(c, k, from, to))
	}
	return v
}

// spreads is how many missing regions of c are gained by going from one node to another.
func (s *state) spreads(c int, k *part, from, to int32) int {
	regions := s.p.a.Nodes.Region
	before := int(s.spread[c])
	after := before
	switch {
	case from >= 0 && to >= 0 && regions[from] == regions[to]:
		return 0
	case from >= 0 && s.areas[c][regions[from]] == 1:
		after--
	}
	if to >= 0 && s.areas[c][regions[to]] == 0 {
		after++
	}
	return min(after, k.MinRegions) - min(before, k.MinRegions)
}

// nearest is the replica of c that is nearest to node n, without replica but.
func (s *state) nearest(c int, n int32, but int) neighbor {
	best := neighbor{instance.None, -1}
	l := &s.p.a.Latency
	row := l.Base[int(l.Site[n])*l.Sites:][:l.Sites]
	access := l.Access[n]
	for r, at := range s.at[c] {
		if at < 0 || r == but {
			continue
		}
		d := int32(0)
		if at != n {
			d = row[l.Site[at]] + l.Access[at] + access
		}
		if d < best.distance {
			best = neighbor{d, int32(r)}
		}
	}
	return best
}

// move puts replica r of c on node to (-1: nowhere), which fits, and returns the gain.
func (s *state) move(c, r int, to int32) float64 {
	p := s.p
	k := &p.parts[c]
	from := s.at[c][r]
	if from == to {
		return 0
	}
	v := s.local(c, k, from, to)
	s.broken -= s.spreads(c, k, from, to)
	if from >= 0 {
		s.leave(c, k, from)
		s.lost++
	}
	if to >= 0 {
		s.enter(c, k, to)
		s.lost--
	}
	s.at[c][r] = to
	for _, b := range k.out {
		v += s.call(b, r, from >= 0, to)
	}
	for _, b := range k.in {
		v += s.answer(b, r, to)
	}
	s.value += v
	return v
}

// call finds anew what replica r of the caller of b calls.
func (s *state) call(b, r int, was bool, to int32) (v float64) {
	l := &s.p.links[b]
	old := s.near[b][r]
	if was {
		v -= l.value(old.distance)
		if old.distance > l.limit {
			s.broken--
		}
	}
	s.near[b][r] = neighbor{instance.None, -1}
	if to >= 0 {
		now := s.nearest(l.to, to, -1)
		s.near[b][r] = now
		v += l.value(now.distance)
		if now.distance > l.limit {
			s.broken++
		}
	}
	return v
}

// answer tells the callers of b that replica r of what they call is on node to now.
func (s *state) answer(b, r int, to int32) (v float64) {
	l := &s.p.links[b]
	near := s.near[b]
	for x, n := range s.at[l.from] {
		if n < 0 {
			continue
		}
		old := near[x]
		now := old
		if int(old.replica) == r {
			now = s.nearest(l.to, n, -1)
		} else if to >= 0 {
			if d := s.p.between(n, to); d < old.distance {
				now = neighbor{d, int32(r)}
			}
		}
		if now == old {
			continue
		}
		near[x] = now
		if now.distance != old.distance {
			v += l.value(now.distance) - l.value(old.distance)
			if old.distance > l.limit {
				s.broken--
			}
			if now.distance > l.limit {
				s.broken++
			}
		}
	}
	return v
}

func (s *state) leave(c int, k *part, n int32) {
	s.cpu[n] += k.CPU
	s.memory[n] += k.Memory
	list := s.on[n]
	for i := range list {
		if int(list[i].comp) == c {
			if list[i].count--; list[i].count == 0 {
				list[i] = list[len(list)-1]
				s.on[n] = list[:len(list)-1]
			}
			break
		}
	}
	area := s.p.a.Nodes.Region[n]
	if s.areas[c][area]--; s.areas[c][area] == 0 {
		s.spread[c]--
	}
	if s.tenants[n]--; s.tenants[n] == 0 {
		last := s.used[len(s.used)-1]
		s.used[s.usedAt[n]], s.usedAt[last] = last, s.usedAt[n]
		s.used = s.used[:len(s.used)-1]
	}
}

func (s *state) enter(c int, k *part, n int32) {
	s.cpu[n] -= k.CPU
	s.memory[n] -= k.Memory
	found := false
	for i := range s.on[n] {
		if int(s.on[n][i].comp) == c {
			s.on[n][i].count++
			found = true
			break
		}
	}
	if !found {
		s.on[n] = append(s.on[n], tenant{int32(c), 1})
	}
	area := s.p.a.Nodes.Region[n]
	if s.areas[c][area]++; s.areas[c][area] == 1 {
		s.spread[c]++
	}
	if s.tenants[n]++; s.tenants[n] == 1 {
		s.usedAt[n] = int32(len(s.used))
		s.used = append(s.used, n)
	}
}

// snapshot copies where everything is.
func (s *state) snapshot(into [][]int32) [][]int32 {
	if into == nil {
		into = make([][]int32, len(s.at))
	}
	for c, nodes := range s.at {
		into[c] = append(into[c][:0], nodes...)
	}
	return into
}

// restore puts everything where a snapshot says.
func (s *state) restore(from [][]int32) {
	for c, nodes := range from {
		for r, n := range nodes {
			if s.at[c][r] != n && s.at[c][r] >= 0 {
				s.move(c, r, -1)
			}
		}
	}
	for c, nodes := range from {
		for r, n := range nodes {
			if s.at[c][r] != n {
				s.move(c, r, n)
			}
		}
	}
}
