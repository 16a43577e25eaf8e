package node

import "github.com/coppice-project/coppice/dht/members"

// holds says whether a member keeps copies for others.
func holds(m members.Member) bool { return m.State == members.Alive && !m.NoHolder }
