package components

import (
	"cmp"
	"slices"
	"strings"
)

// The roles of a node.
const (
	RoleFull   = "full"   // votes and runs components
	RoleVoter  = "voter"  // votes, runs no components
	RoleWorker = "worker" // runs components, does not vote
)

// NodeNames returns the nodes sorted by id, each with the name that instances use for it: its own, or its id where it has none, where a
// node of a smaller id has the same, or where it could not stand in an instance's name.
func NodeNames(nodes []Node) []Node {
	out := slices.Clone(nodes)
	slices.SortFunc(out, func(a, b Node) int { return cmp.Compare(a.ID, b.ID) })
	taken := make(map[string]bool, len(out))
	for i := range out {
		n := &out[i]
		if n.Name == "" || taken[n.Name] || strings.ContainsAny(n.Name, "/@ \t\r\n") {
			n.Name = n.ID
		}
		taken[n.Name] = true
	}
	return out
}
