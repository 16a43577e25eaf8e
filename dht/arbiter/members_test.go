package arbiter

import (
	"testing"
	"time"

	"github.com/coppice-project/coppice/dht/members"
)

// What the keeper and the elections go by: a restarted process is another boot, and a member that flaps runs, is not dead, and may not vote.
func TestAMemberAsTheArbiterSeesIt(t *testing.T) {
	of := func(s members.State, edit func(*members.Member)) Member {
		m := members.Member{Info: members.Info{ID: "a", Boot: 7, Zone: "z", Role: "full", MaxFormat: 3}, State: s, Since: time.Now().Add(-time.Hour)}
		if edit != nil {
			edit(&m)
		}
		return fromMember(m)
	}
	for _, c := range []struct {
		name                  string
		m                     Member
		alive, dead, eligible bool
	}{
		{"alive", of(members.Alive, nil), true, false, true},
		{"suspect", of(members.Suspect, nil), false, false, false},
		{"dead", of(members.Dead, nil), false, true, false},
		{"left", of(members.Left, nil), false, true, false},
		{"quarantined", of(members.Quarantined, nil), true, false, false},
		{"draining", of(members.Alive, func(m *members.Member) { m.Draining = true }), true, false, false},
		{"with a low disk", of(members.Alive, func(m *members.Member) { m.NoVoter = true }), true, false, false},
	} {
		if can := eligible(c.m, false, false, time.Minute); c.m.Alive != c.alive || c.m.Dead != c.dead || can != c.eligible {
			t.Errorf("%s: alive %v, dead %v, eligible %v; want %v, %v, %v", c.name, c.m.Alive, c.m.Dead, can, c.alive, c.dead, c.eligible)
		}
		if c.m.Boot != 7 || c.m.Zone != "z" || c.m.Format != 3 || c.m.For < time.Hour {
			t.Errorf("%s: %+v", c.name, c.m)
		}
	}
}
