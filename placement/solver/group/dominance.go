package group

// dominators lists, for each candidate, those that could take its place in any group of the size without making it worse: at the same
// site and in the same region, with no more access, and worth no less. So there is a best group in which with each member all its
// dominators are members, and only such groups are searched. An anchor is nearest to itself and has none. It is transitive.
func (s *sized) dominators(p *problem) [][]int32 {
	bySite := map[int32][]int32{}
	out := make([][]int32, len(p.node))
	for _, c := range s.order { // most valuable first, so dominators come before those that they dominate
		for _, d := range bySite[p.site[c]] {
			if !p.isPoint[c] && p.region[d] == p.region[c] && p.access[d] <= p.access[c] {
				out[c] = append(out[c], d)
			}
		}
		bySite[p.site[c]] = append(bySite[p.site[c]], c)
	}
	return out
}
