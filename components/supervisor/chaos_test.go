package supervisor

import (
	"fmt"
	"testing"
	"time"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/members"
)

// Faults of every kind, one after another, under load from a node that lives: every answered call is there once at the end, no epoch has two
// owners, and the instance is back each time.
func TestFaultsUnderLoad(t *testing.T) {
	const rounds = 8
	voter := func(n *simNode, _ *Config) {
		if n.name == "n6" { // the client: it is given no component
			n.members.UpdateSelf(func(i *members.Info) { i.Role = components.RoleVoter })
		}
	}
	inWorldWith(t, 6, voter, func(w *world) {
		w.shelf.add(&binary{name: "counter", version: "1.1.0", ballast: 100 << 10})
		owners := map[uint64]string{} // by epoch
		watch := w.nodes[5].arb.Watch(func(_, now *arbiter.Register) {
			if now == nil || now.Key != testKey {
				return
			}
			if was := owners[now.Epoch]; was != "" && was != w.nameOf(now.Owner) {
				w.t.Errorf("epoch %d belongs to %s and to %s", now.Epoch, was, w.nameOf(now.Owner))
			}
			owners[now.Epoch] = w.nameOf(now.Owner)
		})
		defer watch()
		w.deploy("1.0.0")
		w.place(w.nodes[0], w.nodes[1], w.nodes[2])
		w.running(w.nodes[0], "1.0.0")
		w.settled()
		client := w.nodes[5]
		l := w.loadAt(3, time.Minute, 100*time.Millisecond, client)
		for round := range rounds {
			reg, _ := w.register()
			owner := w.node(reg.Owner)
			what := w.fault(owner, client)
			w.eventually(40*time.Second, fmt.Sprintf("round %d: it runs again after %s", round, what), func() bool {
				reg, _ := w.register()
				n := w.node(reg.Owner)
				return n.sup != nil && n.runs("") && len(n.runner.running(testInstance)) == 1
			})
			l.more(10)
			w.eventually(40*time.Second, "it settles", func() bool { _, body := w.register(); return body.GetSettled() })
			for _, n := range w.nodes {
				if n.sup == nil {
					n.start(false)
				}
			}
			w.eventually(30*time.Second, "all are members again", func() bool {
				for _, n := range w.nodes {
					if len(n.members.Alive()) != len(w.nodes) || n.arb.HeardLeader() > time.Second {
						return false
					}
				}
				return true
			})
		}
		l.end(client)
		w.one()
	})
}

// fault does something bad to the instance's owner, or something brave with the instance, and says what.
func (w *world) fault(owner, client *simNode) string {
	other := w.nodes[w.rng.IntN(5)]
	for other == owner {
		other = w.nodes[w.rng.IntN(5)]
	}
	var what string
	switch w.rng.IntN(9) {
	case 0:
		what = "the death of " + owner.name
		owner.kill()
	case 1:
		what = "the death of " + owner.name + " and " + other.name
		owner.kill()
		time.Sleep(time.Duration(w.rng.IntN(300)) * time.Millisecond)
		other.kill()
	case 2:
		what = "a suspension of " + owner.name
		owner.freeze()
		time.Sleep(time.Duration(1+w.rng.IntN(6)) * time.Second)
		owner.thaw()
	case 3:
		what = "a cut round " + owner.name
		w.net.Isolate(owner.id)
		time.Sleep(time.Duration(1+w.rng.IntN(8)) * time.Second)
		w.net.Heal()
	case 4:
		what = "a crash of its process"
		if ps := owner.runner.running(testInstance); len(ps) > 0 {
			ps[0].die("killed")
		}
	case 5:
		what = "a hang of its process"
		if ps := owner.runner.running(testInstance); len(ps) > 0 {
			ps[0].freeze()
		}
	case 6:
		what = "a move to " + other.name
		if _, err := w.move(owner, other); err != nil {
			what += " that failed: " + err.Error()
		}
	case 7:
		what = "a move to " + other.name + " that dies meanwhile"
		time.AfterFunc(time.Duration(w.rng.IntN(30))*time.Millisecond, func() { w.net.Isolate(other.id) })
		if _, err := w.move(owner, other); err != nil {
			what += ": " + err.Error()
		}
		time.Sleep(3 * time.Second)
		w.net.Heal()
	case 8:
		version := "1.1.0"
		if info, _ := owner.sup.Info(testInstance); info.Version == version {
			version = "1.0.0"
		}
		what = "a swap to " + version
		if _, err := w.swap(owner, version); err != nil {
			what += " that failed: " + err.Error()
		}
	}
	w.t.Log(what)
	return what
}
