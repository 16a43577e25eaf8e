package group

// depth is a depth-first search of an arena.
type depth struct {
	*arena
	s      *search
	avail  []bitset
	open   [][]int32
	chosen []int
	count  []int
	cands  []int32 // the arena's own, as the box's are peeled
	at     []int32
	steps  int
	most   int // steps; 0: no limit
	group  []int32
}

// explore searches all groups of the arena that may be above the best one, and tells whether it came to the end.
func (s *search) explore(a *arena, cands, at []int32, most int) bool {
	size := a.b.s.size
	d := &depth{arena: a, s: s, count: make([]int, a.p.g.Regions), cands: cands, at: at, most: most, group: make([]int32, size)}
	for range size + 1 {
		d.avail = append(d.avail, newBitset(a.n))
		d.open = append(d.open, make([]int32, 0, len(a.serves)))
	}
	copy(d.avail[0], a.alive)
	for p := range a.serves {
		d.open[0] = append(d.open[0], int32(p))
	}
	d.step(0, 0)
	s.steps += d.steps
	a.b.work += d.steps
	return !d.over()
}

func (d *depth) over() bool { return d.s.ended || d.most > 0 && d.steps > d.most }

// step extends the chosen members, which are worth sum, as level d.avail[len(chosen)] allows; wide is the least diameter.
func (d *depth) step(sum float64, wide int32) {
	d.steps++
	if d.steps&255 == 0 {
		d.s.check()
	}
	k := len(d.chosen)
	n := d.b.s.size - k
	if n == 0 {
		d.leaf()
		return
	}
	avail, open := d.avail[k], d.open[k]
	ends := d.p.near(d.b.rlo) - d.p.fixed + d.p.wide(max(d.b.dlo, wide))
	for !d.over() {
		if sum+d.rest(avail, n, d.count, open)+ends <= d.s.best+pruned {
			return
		}
		i := d.pick(avail, open)
		if i < 0 {
			return
		}
		d.with(i, sum, wide)
		avail.drop(i)
	}
}

// pick is the member to try next: the most valuable server of the anchor with the fewest, or the most valuable of all. It is then left
// out, so that each group is met once.
func (d *depth) pick(avail bitset, open []int32) int {
	if len(open) == 0 {
		return avail.next(0)
	}
	fewest, found := 1<<30, -1
	for _, p := range open {
		if c, first := avail.common(d.serves[p]); c < fewest {
			fewest, found = c, first
		}
	}
	return found
}

// with searches the groups with i and its dominators.
func (d *depth) with(i int, sum float64, wide int32) {
	k := len(d.chosen)
	for _, j := range d.before[i] {
		if d.isChosen(int(j)) {
			continue
		}
		if len(d.chosen) == d.b.s.size || !d.choose(int(j), &sum, &wide) {
			d.back(k)
			return
		}
	}
	if len(d.chosen) < d.b.s.size && d.choose(i, &sum, &wide) {
		d.step(sum, wide)
	}
	d.back(k)
}

func (d *depth) isChosen(i int) bool {
	for _, c := range d.chosen {
		if c == i {
			return true
		}
	}
	return false
}

// choose makes i a member; false: it does not fit the others.
func (d *depth) choose(i int, sum *float64, wide *int32) bool {
	k := len(d.chosen)
	if !d.avail[k].has(i) {
		return false
	}
	row := d.b.near.d[int(d.at[i])*d.b.near.n:]
	for _, c := range d.chosen {
		*wide = max(*wide, row[d.at[c]])
	}
	d.chosen = append(d.chosen, i)
	*sum += d.value[i]
	next := d.avail[k+1]
	next.and(d.avail[k], d.fits[i])
	next.drop(i)
	if d.count[d.area[i]]++; d.count[d.area[i]] >= d.b.s.room {
		next.without(d.region[d.area[i]])
	}
	open := d.open[k+1][:0]
	for _, p := range d.open[k] {
		if !d.serves[p].has(i) {
			open = append(open, p)
		}
	}
	d.open[k+1] = open
	return true
}

// back undoes choices until k members are left.
func (d *depth) back(k int) {
	for len(d.chosen) > k {
		last := d.chosen[len(d.chosen)-1]
		d.count[d.area[last]]--
		d.chosen = d.chosen[:len(d.chosen)-1]
	}
}

// leaf evaluates a whole group.
func (d *depth) leaf() {
	for i, c := range d.chosen {
		d.group[i] = d.cands[c]
	}
	sum, radius, diameter := d.p.measure(d.group)
	if v := d.p.score(sum, radius, diameter); v > d.s.best && diameter <= d.p.limit {
		d.s.improve(d.group, v)
	}
}
