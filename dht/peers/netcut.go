package peers

import "github.com/libp2p/go-libp2p/core/peer"

// SetCuts replaces all cuts made by Cut and SetCuts at once: what one endpoint sends to another is lost where blocked says so. Endpoints that
// join later are not cut. blocked is called with Net's lock held.
func (n *Net) SetCuts(blocked func(from, to peer.ID) bool) {
	n.change(func() {
		clear(n.cuts)
		for a := range n.ends {
			for b := range n.ends {
				if a != b && blocked(a, b) {
					n.cuts[netRoute{a, b}] = true
				}
			}
		}
	})
}
