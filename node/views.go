package node

import (
	"time"

	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/members"
)

// arbiterView gives the arbiter what it needs of the member view.
type arbiterView struct{ m *members.Members }

func (v arbiterView) List() []arbiter.Member {
	all := v.m.All()
	out := make([]arbiter.Member, len(all))
	for i, m := range all {
		out[i] = arbiterMember(m)
	}
	return out
}

func (v arbiterView) Subscribe(f func(old, now arbiter.Member)) func() {
	return v.m.Subscribe(func(c members.Change) { f(arbiterMember(c.Old), arbiterMember(c.New)) })
}

func arbiterMember(m members.Member) arbiter.Member {
	return arbiter.Member{
		ID: m.ID, Alive: m.State == members.Alive, Dead: m.State == members.Dead || m.State == members.Left, For: time.Since(m.Since),
		Zone: m.Zone, Role: m.Role, NoVoter: m.NoVoter, Draining: m.Draining, Left: m.State == members.Left, Format: m.MaxFormat,
	}
}

// holds says whether a member keeps copies for others.
func holds(m members.Member) bool { return m.State == members.Alive && !m.NoHolder }
