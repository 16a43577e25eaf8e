package supervisor

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/components"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
)

func TestWhoIsToBeGivenACopy(t *testing.T) {
	zones := map[peer.ID]string{"a": "x", "b": "x", "c": "x", "d": "y", "e": ""}
	apart := func(ids []peer.ID) bool {
		seen := map[string]bool{}
		for _, id := range ids {
			if z := zones[id]; z != "" {
				seen[z] = true
			}
		}
		return len(seen) > 1
	}
	for _, c := range []struct{ to, have, want []peer.ID }{
		{[]peer.ID{"a", "b", "c"}, []peer.ID{"a", "b", "c"}, nil},
		{[]peer.ID{"a", "b", "c"}, []peer.ID{"a"}, []peer.ID{"b", "c"}},
		{[]peer.ID{"a", "b", "d"}, []peer.ID{"a", "b", "c"}, []peer.ID{"d"}},
		{[]peer.ID{"a", "b", "d"}, []peer.ID{"a", "b"}, []peer.ID{"d"}},
		{[]peer.ID{"a", "b", "e"}, []peer.ID{"a", "b", "c"}, nil},            // it brings nothing
		{[]peer.ID{"a", "b", "c"}, []peer.ID{"a", "b", "d"}, nil},            // they are apart
		{[]peer.ID{"a", "b", "d"}, []peer.ID{"a", "b", "c", "d"}, nil},       // more than it takes
		{[]peer.ID{"a", "b"}, []peer.ID{"a", "b", "c"}, nil},                 // there is no other zone
		{[]peer.ID{"a", "b", "d"}, []peer.ID{"a"}, []peer.ID{"b", "d"}},      // both at once
		{[]peer.ID{"a"}, nil, []peer.ID{"a"}},                                // nobody has it
		{[]peer.ID{"a", "d", "c"}, []peer.ID{"b", "c", "a"}, []peer.ID{"d"}}, // others than those
	} {
		if got := lacking(c.to, c.have, apart); !slices.Equal(got, c.want) {
			t.Errorf("%v should keep it, %v do: %v are given it, want %v", c.to, c.have, got, c.want)
		}
	}
	if got := lacking([]peer.ID{"a", "b", "d"}, []peer.ID{"a", "b", "c"}, nil); got != nil {
		t.Errorf("where zones do not matter %v is given a copy", got)
	}
}

// inZones is a world whose nodes are in zones.
func inZones(t *testing.T, zones []string, f func(w *world)) {
	t.Helper()
	seed := seedOf(t, 7)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, seed)
		defer w.close()
		for i, z := range zones {
			w.nodes = append(w.nodes, &simNode{w: w, id: testID(i + 1), name: fmt.Sprintf("n%d", i+1), fs: vfs.NewCrashableMem(), zone: z})
		}
		w.meet()
		f(w)
	})
}

// heldBy says whether a register names living nodes only, a node among them, and all of those have its pages.
func (w *world) heldBy(key string, n *simNode, least int) bool {
	reg, ok := w.up()[0].arb.Get(key)
	if !ok || len(reg.Holders) < least || !slices.Contains(reg.Holders, n.id) {
		return false
	}
	return !slices.ContainsFunc(reg.Holders, func(id peer.ID) bool {
		h := w.node(id)
		return h.sup == nil || !h.blobs.Complete(hashFrom(reg.Root))
	})
}

// The only node of another zone is back: it is given a copy, although nothing is committed and there are as many as there should be.
func TestACopyIsBroughtIntoAnotherZone(t *testing.T) {
	inZones(t, []string{"hall", "hall", "hall", "shed"}, func(w *world) {
		n := w.nodes
		n[3].kill()
		w.eventually(30*time.Second, "its death is known", func() bool { return len(n[0].members.Alive()) == 3 })
		w.deploy("1.0.0")
		w.place(n[0], n[1], n[2])
		w.running(n[0], "1.0.0")
		n[1].adds(5)
		w.eventually(20*time.Second, "all of the zone hold it", func() bool {
			return w.heldBy(testKey, n[0], 3) && w.heldBy(testKey, n[1], 3) && w.heldBy(testKey, n[2], 3)
		})
		before, _ := w.register()
		n[3].start(false)
		took := w.eventually(30*time.Second, "the other zone has a copy", func() bool { return w.heldBy(testKey, n[3], 3) })
		after, _ := w.register()
		if after.Seq != before.Seq || after.Epoch != before.Epoch {
			w.t.Errorf("it took a commit: checkpoint %d of epoch %d, then %d of %d", before.Seq, before.Epoch, after.Seq, after.Epoch)
		}
		w.t.Logf("%s after its start", took)
		n[1].adds(1) // the next commit goes there by itself
		w.eventually(20*time.Second, "so does the next", func() bool { return w.heldBy(testKey, n[3], 3) })
	})
}

// A holder of a stored branch dies: another node is given its copy, though nobody runs the branch and the node it is from may be the one that died.
func TestTheCopiesOfABranchAreRepaired(t *testing.T) {
	keptAmong(t, 5, "each-call", components.KeepMajority, nil, func(w *world) {
		n := w.nodes
		n[1].adds(3)
		w.net.Isolate(n[0].id)
		w.takenOver()
		n[0].adds(2)
		w.net.Heal()
		w.eventually(30*time.Second, "the branch is stored", func() bool { return len(w.storedBranches()) == 1 && len(n[0].sup.Branches()) == 0 })
		key := components.BranchRegister(testInstance, "n1", 1)
		held := func() arbiter.Register { reg, _ := w.up()[0].arb.Get(key); return reg }
		w.eventually(20*time.Second, "its register names its holders", func() bool { return len(held().Holders) >= replicas })
		for range 2 { // the node it is from first, if it holds it, then another one
			w.eventually(20*time.Second, "who was started knows it", func() bool { return len(held().Holders) > 0 })
			gone := w.node(held().Holders[0])
			if slices.Contains(held().Holders, n[0].id) {
				gone = n[0]
			}
			gone.kill()
			var live *simNode
			took := w.eventually(60*time.Second, "it has as many holders again", func() bool {
				for _, x := range w.up() {
					if w.heldBy(key, x, replicas) {
						live = x
						return true
					}
				}
				return false
			})
			w.t.Logf("%s died: %s, %s after that", gone.name, live.name, took)
			gone.start(false)
			w.eventually(60*time.Second, "it is back", func() bool { return len(n[1].members.Alive()) == 5 && len(n[2].members.Alive()) == 5 })
		}
	})
}

// Nobody runs a stopped instance, and its holders die one after another, its owner among them: each time there are as many copies again, of what is kept of earlier,
// too, and the state goes on where it is started again. What is not started anywhere because its owners died of it is looked after by its holders.
func TestTheCopiesOfWhatDoesNotRunAreRepaired(t *testing.T) {
	for name, rests := range map[string]func(w *world){
		"stopped": func(w *world) { w.overlay(func(o *componentsv1.Overlay) { o.Stopped = true }) },
		"quarantined": func(w *world) {
			reg, body := w.register()
			body.Quarantined = true
			w.claimFor(w.nodes[0], reg.Epoch, body)
		},
	} {
		t.Run(name, func(t *testing.T) {
			if underRace && name != "stopped" {
				t.Skip("the same code as where it is stopped")
			}
			scene(t, 6, func(w *world) {
				n := w.nodes[0]
				w.raise(n, 3)
				kept := w.kept(n)
				w.raise(n, 4)
				rests(w)
				w.eventually(20*time.Second, "it rests", func() bool { s := n.state(); return s == components.Stopped || s == components.Failed })
				earlier := func() (out []peer.ID) {
					e, err := components.Find(w.history(), id(kept))
					if err != nil {
						w.t.Fatal(err)
					}
					return idsFrom(e.GetHolders())
				}
				whole := func() bool {
					reg, _ := w.register()
					e, _ := components.Find(w.history(), id(kept))
					for root, list := range map[blobs.Hash][]peer.ID{hashFrom(reg.Root): reg.Holders, hashFrom(e.GetRoot()): earlier()} {
						alive := 0
						for _, h := range list {
							if x := w.node(h); x.sup != nil && x.blobs.Complete(root) {
								alive++
							}
						}
						if alive < min(replicas, len(w.up())) {
							return false
						}
					}
					return true
				}
				w.eventually(time.Minute, "both are on three nodes", whole)
				for range 4 {
					reg, _ := w.register()
					gone := w.node(reg.Owner)
					if gone.sup == nil {
						gone = w.node(reg.Holders[0])
					}
					gone.kill()
					took := w.eventually(3*time.Minute, "they have as many holders again", whole)
					w.t.Logf("%s died: whole again after %s", gone.name, took)
					if len(w.up()) == 3 { // the next death needs a majority of the voters
						break
					}
				}
				reg, body := w.register()
				if body.GetQuarantined() {
					body.Quarantined = false
					w.claimFor(w.up()[0], reg.Epoch, body)
				}
				w.overlay(func(o *componentsv1.Overlay) { o.Stopped = false })
				w.eventually(time.Minute, "it runs again", func() bool {
					return slices.ContainsFunc(w.up(), func(x *simNode) bool { return x.runs("1.0.0") })
				})
				w.shows(w.up()[0], 7)
			})
		})
	}
}
