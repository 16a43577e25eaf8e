package arbiter

import (
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/members"
)

// FromMembers shows the node's view of the cluster as the arbiter wants it. A quarantined member runs but may not vote, nor may this node while it
// knows that it is one to the others: else a leader that flaps would go on leading.
func FromMembers(m *members.Members) Members { return membersView{m} }

type membersView struct{ m *members.Members }

func (v membersView) List() []Member {
	all := v.m.All()
	self := v.m.Self()
	out := make([]Member, 0, len(all)+1)
	met := false
	for _, m := range all {
		met = met || m.ID == self.ID
		out = append(out, fromMember(m))
	}
	if !met {
		out = append(out, fromMember(self))
	}
	if v.m.Flapping() {
		for i := range out {
			out[i].NoVoter = out[i].NoVoter || out[i].ID == self.ID
		}
	}
	return out
}

func (v membersView) Subscribe(f func(old, new Member)) (cancel func()) {
	return v.m.Subscribe(func(c members.Change) { f(fromMember(c.Old), fromMember(c.New)) })
}

func fromMember(m members.Member) Member {
	if m.ID == peer.ID("") {
		return Member{}
	}
	return Member{
		ID: m.ID, Boot: m.Boot, Alive: m.State == members.Alive || m.State == members.Quarantined,
		Dead: m.State == members.Dead || m.State == members.Left, For: time.Since(m.Since), Zone: m.Zone, Role: m.Role,
		NoVoter: m.NoVoter || m.State == members.Quarantined, Draining: m.Draining, Left: m.State == members.Left, Format: m.MaxFormat,
	}
}
