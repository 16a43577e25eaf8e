package records

import (
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/members"
)

// FromMembers is the View of the member table: members that are alive, or merely suspect, and not told to hold nothing.
func FromMembers(m *members.Members) View { return memberView{m} }

type memberView struct{ m *members.Members }

func holds(m members.Member) bool { return !m.NoHolder }

func (v memberView) Alive() []peer.ID {
	var ids []peer.ID
	for _, m := range v.m.Alive() {
		if holds(m) {
			ids = append(ids, m.ID)
		}
	}
	return ids
}

func (v memberView) Closest(key string, n int) []peer.ID {
	list := v.m.Closest(key, n, holds)
	ids := make([]peer.ID, len(list))
	for i, m := range list {
		ids[i] = m.ID
	}
	return ids
}

func (v memberView) OnChange(f func()) (cancel func()) {
	return v.m.Subscribe(func(members.Change) { f() })
}
