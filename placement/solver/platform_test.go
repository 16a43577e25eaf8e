package solver

import (
	"testing"

	placementv1 "github.com/coppice-project/coppice/plugins/contract/placement/v1"

	"github.com/coppice-project/coppice/components"
)

// A script runs on every platform, and on this one beside files that were built for another.
func TestAnyPlatform(t *testing.T) {
	n := &node{receives: true, Node: &placementv1.Node{Platform: "linux/arm64"}}
	for _, c := range []struct {
		has     []string
		refused bool
	}{
		{nil, false},
		{[]string{"linux/amd64"}, true},
		{[]string{"linux/amd64", "linux/arm64"}, false},
		{[]string{components.AnyPlatform}, false},
		{[]string{"linux/amd64", components.AnyPlatform}, false},
	} {
		if r := refused(n, &placementv1.Component{Platforms: c.has}, nil, nil); (r.constraint == "platform") != c.refused {
			t.Errorf("an artifact with %v on linux/arm64: %+v", c.has, r)
		}
	}
}
