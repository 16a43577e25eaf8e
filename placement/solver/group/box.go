package group

import (
	"slices"
)

// box is a part of the search: the groups of one size of which radius and diameter lie in the intervals.
type box struct {
	s        *sized
	rlo, rhi int32
	dlo, dhi int32
	cands    []int32 // candidates that may still be members, most valuable first
	bound    float64 // no group of the box is worth more
	near     *paths  // shortest paths over a superset of cands
	at       []int32 // by cands: its place in near
	work     int     // depth-first steps that were not enough
}

// paths are the shortest paths between candidates where any of them may be on the way: none inside a group of them is shorter.
type paths struct {
	n int
	d []int32
}

func makePaths(p *problem, cands []int32, limit int32) *paths {
	if len(cands) > siteLimit {
		return bySite(p, cands, limit)
	}
	return newPaths(p, cands, limit)
}

// newPaths relaxes all pairs of cands; above limit it need not be right.
func newPaths(p *problem, cands []int32, limit int32) *paths {
	n := len(cands)
	f := &paths{n: n, d: make([]int32, n*n)}
	for a, c := range cands {
		row := f.d[a*n : (a+1)*n]
		for b, d := range cands {
			row[b] = p.between(c, d)
		}
	}
	shorten(f.d, n, limit)
	return f
}

// shorten is Floyd and Warshall's; ways over a first leg beyond limit are not followed.
func shorten(d []int32, n int, limit int32) {
	for m := range n {
		via := d[m*n : (m+1)*n]
		for a := range n {
			first := d[a*n+m]
			if first > limit || a == m {
				continue
			}
			row := d[a*n : (a+1)*n : (a+1)*n]
			for b, second := range via {
				if v := first + second; v < row[b] {
					row[b] = v
				}
			}
		}
	}
}

// bySite is newPaths for many candidates: shortest paths between their sites, where a site on the way costs the least access twice.
func bySite(p *problem, cands []int32, limit int32) *paths {
	l := &p.g.Latency
	id := make([]int, l.Sites) // by site, from 1
	at := make([]int, len(cands))
	var sites []int32
	var access []int32
	for n, c := range cands {
		s := p.site[c]
		if id[s] == 0 {
			sites, access = append(sites, s), append(access, p.access[c])
			id[s] = len(sites)
		}
		at[n] = id[s] - 1
		access[at[n]] = min(access[at[n]], p.access[c])
	}
	k := len(sites)
	// with the least access at both ends the relays count twice by themselves; the ends are corrected below
	d := make([]int32, k*k)
	for a, s := range sites {
		for b, t := range sites {
			if a != b {
				d[a*k+b] = l.Base[int(s)*l.Sites+int(t)] + access[a] + access[b]
			}
		}
	}
	shorten(d, k, limit)
	n := len(cands)
	f := &paths{n: n, d: make([]int32, n*n)}
	more := make([]int32, n) // access beyond the least of the site
	for a, c := range cands {
		more[a] = p.access[c] - access[at[a]]
	}
	for a, c := range cands {
		row, from := f.d[a*n:(a+1)*n], d[at[a]*k:(at[a]+1)*k]
		for b, e := range cands {
			switch {
			case at[a] != at[b]:
				row[b] = from[at[b]] + more[a] + more[b]
			case a != b:
				row[b] = p.access[c] + p.access[e]
			}
		}
	}
	return f
}

// tally counts members of regions.
type tally []int

// top is the most that n of the candidates of list (most valuable first) which ok takes can be worth with at most room of one region,
// one less of region less. It is -inf when there are not enough.
func (s *sized) top(p *problem, list []int32, n, less int, count tally) float64 {
	clear(count)
	if less >= 0 {
		count[less]++
	}
	sum := 0.0
	for _, c := range list {
		if n == 0 {
			break
		}
		if r := p.region[c]; count[r] < s.room {
			count[r]++
			sum += s.value[c]
			n--
		}
	}
	if n > 0 {
		return -inf
	}
	return sum
}

// worth of the ends of the box.
func (b *box) ends(p *problem) float64 { return p.near(b.rlo) + p.wide(b.dlo) - p.fixed }

// narrow drops candidates of groups that cannot be above best, raises the lower ends, and sets the bound. It tells whether any group of
// the box can be above best.
func (b *box) narrow(p *problem, best float64) bool {
	count := make(tally, p.g.Regions)
	for {
		before := len(b.cands)
		if !b.cover(p) {
			return false
		}
		ends := b.ends(p)
		b.bound = min(b.bound, b.s.top(p, b.cands, b.s.size, -1, count)+ends)
		if b.bound <= best+pruned {
			return false
		}
		b.trim(p, best-(b.s.top(p, b.cands, b.s.size, -1, count)-p.fixed)+pruned)
		rest := make([]float64, p.g.Regions)
		for r := range rest {
			rest[r] = b.s.top(p, b.cands, b.s.size-1, r, count)
		}
		b.keep(func(i int) bool { c := b.cands[i]; return b.s.value[c]+rest[p.region[c]]+ends > best+pruned })
		if len(b.cands) == before {
			return len(b.cands) >= b.s.size
		}
	}
}

// trim lowers the upper ends to where radius and diameter together can still be worth more than least.
func (b *box) trim(p *problem, least float64) {
	longest := func(from, to int32, worth func(int32) float64) int32 {
		for from < to { // the last one that is worth enough; worth falls
			mid := from + (to-from+1)/2
			if worth(mid) > least {
				from = mid
			} else {
				to = mid - 1
			}
		}
		return from
	}
	b.rhi = longest(b.rlo, b.rhi, func(r int32) float64 { return p.near(r) + p.wide(b.dlo) })
	b.dhi = longest(b.dlo, b.dhi, func(d int32) float64 { return p.near(b.rlo) + p.wide(d) })
}

// cover raises the lower end of the radius to what the worst served anchor gets at best.
func (b *box) cover(p *problem) bool {
	for _, dist := range p.anchor {
		near := noLink
		for _, c := range b.cands {
			near = min(near, dist[c])
		}
		if near > b.rhi {
			return false
		}
		b.rlo = max(b.rlo, near)
	}
	return true
}

// keep drops the candidates that ok refuses.
func (b *box) keep(ok func(i int) bool) {
	n := 0
	for i := range b.cands {
		if ok(i) {
			b.cands[n] = b.cands[i]
			if b.at != nil {
				b.at[n] = b.at[i]
			}
			n++
		}
	}
	b.cands = b.cands[:n]
	if b.at != nil {
		b.at = b.at[:n]
	}
}

// siteLimit is the number of candidates above which paths go over sites.
const siteLimit = 400

// connect makes the shortest paths over the candidates, anew when far fewer are left than those were made for.
func (b *box) connect(p *problem) {
	n := len(b.cands)
	if b.near != nil && (b.near.n <= 24 || n*2 > b.near.n) {
		return
	}
	b.near = makePaths(p, b.cands, b.dhi)
	b.at = make([]int32, n)
	for i := range b.at {
		b.at[i] = int32(i)
	}
}

// split halves the box where it is slackest; nil: it is as narrow as it gets.
func (b *box) split(p *problem) (low, high *box) {
	r, d := p.near(b.rlo)-p.near(b.rhi), p.wide(b.dlo)-p.wide(b.dhi)
	low, high = b.clone(), b.clone()
	switch {
	case b.rhi > b.rlo && (r >= d || b.dhi == b.dlo):
		mid := b.rlo + (b.rhi-b.rlo)/2
		low.rhi, high.rlo = mid, mid+1
	case b.dhi > b.dlo:
		mid := b.dlo + (b.dhi-b.dlo)/2
		low.dhi, high.dlo = mid, mid+1
	default:
		return nil, nil
	}
	return low, high
}

func (b *box) clone() *box {
	c := *b
	c.cands, c.at = slices.Clone(b.cands), slices.Clone(b.at)
	return &c
}

// slack is how much of the bound may be due to the width of the box.
func (b *box) slack(p *problem) float64 {
	return p.near(b.rlo) - p.near(b.rhi) + p.wide(b.dlo) - p.wide(b.dhi)
}
