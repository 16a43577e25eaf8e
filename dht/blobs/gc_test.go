package blobs

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

func TestCollectionKeepsWhatIsLiveOrPinned(t *testing.T) {
	inGrove(t, 2, func(t *testing.T, g *grove) {
		a := g.nodes[0]
		liveBytes, deadBytes, pinnedBytes := content(1, 1<<20), content(2, 1<<20), content(3, 1<<20)
		live, dead, pinned := a.write(liveBytes), a.write(deadBytes), a.write(pinnedBytes)
		a.SetLive(func() []Hash { return []Hash{live.Hash} })
		a.Pin("restore", time.Hour, pinned.Hash)
		time.Sleep(9 * time.Minute)
		if !a.Complete(dead.Hash) {
			t.Fatal("collected while young")
		}
		time.Sleep(8 * time.Minute)
		if a.Complete(dead.Hash) {
			t.Errorf("still there: %+v", a.Usage())
		}
		if ok, err := a.Has(dead.Hash); ok || err != nil {
			t.Errorf("the dead root is still there (%v)", err)
		}
		a.mustRead(live.Hash, liveBytes)
		a.mustRead(pinned.Hash, pinnedBytes)
		u := a.Usage()
		if u.LastSweep.Skipped || u.Nodes > 150 || u.Nodes < 130 {
			t.Errorf("usage %+v", u)
		}
		a.Unpin("restore")
		time.Sleep(5 * time.Minute)
		if ok, err := a.Has(pinned.Hash); ok || err != nil {
			t.Errorf("unpinned, unreferenced and still there (%v)", err)
		}
		if bad, err := a.Verify(ctx, live.Hash); len(bad) > 0 || err != nil {
			t.Errorf("%v %v", bad, err)
		}
	})
}

func TestNothingIsCollectedWhileTheLiveRootsAreUnknown(t *testing.T) {
	inGrove(t, 1, func(t *testing.T, g *grove) {
		a := g.nodes[0]
		l := a.put(Node{Kind: "x"})
		a.SetLive(func() []Hash { return nil })
		time.Sleep(time.Hour)
		if !a.Complete(l.Hash) || !a.Usage().LastSweep.Skipped {
			t.Errorf("%+v", a.Usage())
		}
	})
}

// Writers, pushers and have-answers go on while collections run all the time; whatever was promised complete is complete.
func TestCollectionNeverTakesWhatIsReliedOn(t *testing.T) {
	for seed := range uint64(5) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) { collectUnderLoad(t, seed) })
	}
}

func collectUnderLoad(t *testing.T, seed uint64) {
	tune := func(c *Config) {
		// Pins shorter than the load lasts, so that every kind of expiry happens.
		c.PinFor, c.SweepEvery = 2*time.Second, 50*time.Millisecond
	}
	inGrove(t, 2, func(t *testing.T, g *grove) {
		rng := rand.New(rand.NewPCG(seed, 2))
		a, b := g.nodes[0], g.nodes[1]
		var mu sync.Mutex
		current := map[peer.ID]Hash{}
		for _, nd := range g.nodes {
			nd.SetLive(func() []Hash {
				mu.Lock()
				defer mu.Unlock()
				return append([]Hash{}, current[nd.id])
			})
		}
		old := [][]byte{}
		state := content(seed, 200<<10)
		for round := range 60 {
			// Now and then an old state comes back: its pages are just being collected.
			if len(old) > 0 && rng.IntN(3) == 0 {
				state = bytes.Clone(old[rng.IntN(len(old))])
			} else {
				copy(state[rng.IntN(len(state)-100):], content(seed+uint64(round), 100))
			}
			old = append(old, bytes.Clone(state))
			base := a.write(state)
			root := a.put(Node{Kind: "delta", Links: []Link{base}, Data: []byte{byte(round)}})
			if _, err := a.Push(ctx, root.Hash, g.ids(1), 1); err != nil {
				t.Fatalf("round %d: %v", round, err)
			}
			mu.Lock()
			current[a.id], current[b.id] = root.Hash, root.Hash
			mu.Unlock()
			time.Sleep(time.Duration(rng.IntN(400)) * time.Millisecond)
			for _, nd := range g.nodes {
				if bad, err := nd.Verify(ctx, root.Hash); len(bad) > 0 || err != nil {
					t.Fatalf("round %d: %s lost %v (%v)", round, nd.id, bad, err)
				}
				if rng.IntN(10) == 0 && nd == b {
					nd.crash(g)
					nd.SetLive(func() []Hash { mu.Lock(); defer mu.Unlock(); return []Hash{current[b.id]} })
				}
			}
		}
		if a.Usage().LastSweep.Removed == 0 && a.Usage().Nodes > 400 {
			t.Errorf("nothing was ever collected: %+v", a.Usage())
		}
		// What is marked complete is complete, for every node there is.
		for _, nd := range g.nodes {
			var all []Hash
			if err := nd.eachHead(nd.db, func(h Hash, _ head) error { all = append(all, h); return nil }); err != nil {
				t.Fatal(err)
			}
			for _, h := range all {
				if ok, err := nd.isComplete(h); err != nil || !ok {
					continue
				}
				if bad, err := nd.Verify(ctx, h); len(bad) > 0 || err != nil {
					t.Fatalf("%s: marked complete without %v (%v)", nd.id, bad, err)
				}
			}
		}
	}, tune)
}
