package records

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/keys"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

func randomID(rng *rand.Rand) peer.ID {
	b := make([]byte, 38)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return peer.ID(b)
}

// A capped view knows as many as it may, somebody in each part of the key space, and is sure of a key only when what it says is right;
// of nearly every key that its own node should hold it is.
func TestCappedViewIsSureOnlyWhenItIsRight(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	held, unsure := 0, 0
	for range 30 {
		whole := &simView{}
		for range 2 + rng.IntN(1000) {
			whole.alive = append(whole.alive, randomID(rng))
		}
		self := whole.alive[0]
		most := MinView + rng.IntN(100)
		v := Cap(whole, self, most)
		checkCap(t, v, whole, self, most)
		for i := range 100 {
			key := fmt.Sprintf("/kb/%d", rng.Uint64())
			want, _ := whole.Closest(key, 8)
			got, sure := v.Closest(key, 8)
			if sure && !slices.Equal(got, want) {
				t.Fatalf("%d members, cap %d: sure of %v, want %v", len(whole.alive), most, got, want)
			}
			if !sure && len(whole.alive) <= most {
				t.Fatalf("%d members, cap %d: not sure", len(whole.alive), most)
			}
			if five, sure := v.Closest(key, 5); slices.Contains(want[:min(5, len(want))], self) && most >= 64 {
				if held++; !sure {
					unsure++
				} else if !slices.Equal(five, want[:min(5, len(want))]) {
					t.Fatalf("five of key %d", i)
				}
			}
		}
	}
	if held < 5 || unsure*100 > held {
		t.Errorf("of %d keys that a node holds its view of 64 or more was not sure of %d", held, unsure)
	}
}

func checkCap(t *testing.T, v View, whole *simView, self peer.ID, most int) {
	t.Helper()
	known := v.Alive()
	if len(known) != min(most, len(whole.alive)) || !slices.Contains(known, self) {
		t.Fatalf("%d of %d members known, cap %d", len(known), len(whole.alive), most)
	}
	parts := map[int]bool{}
	at := keys.OfPeer(self)
	for _, id := range known {
		parts[shared(keys.Distance(at, keys.OfPeer(id)))] = true
	}
	for _, id := range whole.alive {
		if s := shared(keys.Distance(at, keys.OfPeer(id))); !parts[s] {
			t.Fatalf("%d members, cap %d: nobody known who shares %d bits", len(whole.alive), most, s)
		}
	}
}

// Only what concerns a node's own few is told to it.
func TestCappedViewTellsOfItsOwnOnly(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 5))
	whole := &simView{}
	for range 300 {
		whole.alive = append(whole.alive, randomID(rng))
	}
	v := Cap(whole, whole.alive[0], 32)
	told := 0
	cancel := v.OnChange(func() { told++ })
	known := v.Alive()
	for _, id := range slices.Clone(whole.alive) {
		if !slices.Contains(known, id) {
			whole.set(id, false)
			break
		}
	}
	if told != 0 {
		t.Error("told of a member that it does not know")
	}
	whole.set(known[7], false)
	if told != 1 || slices.Contains(v.Alive(), known[7]) || len(v.Alive()) != 32 {
		t.Errorf("told %d times, %d known", told, len(v.Alive()))
	}
	cancel()
	whole.set(known[8], false)
	if told != 1 {
		t.Error("told after the end")
	}
}

// strangers is a view of some members that are anywhere: it is never sure.
type strangers struct {
	*simView
	known []peer.ID
}

func (v strangers) Alive() []peer.ID {
	return slices.DeleteFunc(v.simView.Alive(), func(id peer.ID) bool { return !slices.Contains(v.known, id) })
}

func (v strangers) Closest(key string, n int) ([]peer.ID, bool) {
	ids := keys.Sort(keys.Of(key), v.Alive())
	return ids[:min(n, len(ids))], false
}

// routes is a lookup that always finds the closest, unless it is broken.
type routes struct {
	all    *simView
	asked  atomic.Int64
	broken atomic.Bool
}

func (r *routes) route(_ context.Context, key string, n int) ([]peer.ID, int, error) {
	r.asked.Add(1)
	if r.broken.Load() {
		return nil, 0, errors.New("nobody answers")
	}
	ids, _ := r.all.Closest(key, n)
	return ids, 2, nil
}

// inCapped is inGrove with views of 16 members, which are neighbours or strangers.
func inCapped(t *testing.T, n int, neighbours bool, f func(t *testing.T, g *grove, r *routes)) {
	r := &routes{}
	inGrove(t, n, func(t *testing.T, g *grove) { f(t, g, r) }, func(c *Config) {
		r.all = c.View.(*simView)
		if neighbours {
			c.View = Cap(r.all, c.Self, MinView)
		} else {
			v := strangers{simView: r.all, known: []peer.ID{c.Self}}
			for _, i := range rand.New(rand.NewPCG(uint64(c.Self[len(c.Self)-1]), 9)).Perm(n)[:MinView-1] {
				v.known = append(v.known, simID(i))
			}
			c.View = v
		}
		c.Route = r.route
	})
}

// fullDegree waits until just the five closest hold a key, and the writer.
func (g *grove) fullDegree(key string, revision uint64, within time.Duration) {
	g.t.Helper()
	eventually(g.t, within, "the five closest hold "+key, func() bool {
		have := g.holders(key, revision)
		return !slices.ContainsFunc(g.closest(key, 5), func(i int) bool { return !slices.Contains(have, i) })
	})
}

// Records lie with the closest of all members and are found from everywhere, though no node knows all; a death is made up for within a
// minute. With views of strangers every single step needs a lookup.
func TestCappedViews(t *testing.T) {
	for _, neighbours := range []bool{true, false} {
		t.Run(fmt.Sprintf("neighbours=%v", neighbours), func(t *testing.T) {
			inCapped(t, 40, neighbours, func(t *testing.T, g *grove, r *routes) {
				var list []string
				for i := range 30 {
					key := fmt.Sprintf("/kb/own/app/x-%d", i)
					list = append(list, key)
					g.nodes[i].mustPut(key, key, 0)
				}
				for i, key := range list {
					g.fullDegree(key, 1, time.Second)
					g.nodes[39-i].mustGet(key, key)
				}
				if r.asked.Load() == 0 {
					t.Error("nothing was looked up")
				}
				var dead []int
				for i := range 3 {
					dead = append(dead, g.closest(list[0], 1)[0])
					g.kill(dead[i], true)
					for _, key := range list {
						g.fullDegree(key, 1, time.Minute)
					}
				}
				back := g.nodes[dead[0]] // with an empty disk
				back.fs = vfs.NewCrashableMem()
				back.start(g)
				g.view.set(back.id, true)
				for _, key := range list {
					g.fullDegree(key, 1, time.Minute)
				}
				for i, key := range list {
					if nd := g.nodes[39-i]; nd.up {
						nd.mustGet(key, key)
					}
				}
			})
		})
	}
}

// Who wrote a record and could not find its holders says so, keeps it, and brings it when they are found.
func TestLookupThatFails(t *testing.T) {
	inCapped(t, 20, false, func(t *testing.T, g *grove, r *routes) {
		key, nd := "/kb/own/app/x-0", g.nodes[3]
		r.broken.Store(true)
		if acked, _, err := nd.Put(ctx, key, []byte("1"), 0); err == nil || acked != 0 {
			t.Fatalf("%d acknowledgements, %v", acked, err)
		}
		if _, _, err := g.nodes[5].Get(ctx, key); err == nil || errors.Is(err, ErrNotFound) {
			t.Fatalf("a failed lookup was told as: %v", err)
		}
		if s := nd.Status(); s.Lookups == 0 || s.Lost != s.Lookups {
			t.Errorf("%+v", s)
		}
		time.Sleep(2 * time.Minute)
		if have := g.holders(key, 1); !slices.Equal(have, []int{3}) {
			t.Fatalf("held by %v", have)
		}
		r.broken.Store(false)
		g.fullDegree(key, 1, time.Minute)
		g.nodes[5].mustGet(key, "1")
	})
}

// What came to a node that is not among the closest goes where it belongs, and is dropped when it is there.
func TestStraysOfCappedViewsGoHome(t *testing.T) {
	for _, neighbours := range []bool{true, false} {
		inCapped(t, 40, neighbours, func(t *testing.T, g *grove, r *routes) {
			key := "/kb/own/app/x-0"
			far := g.closest(key, 40)
			b, err := seal(&Record{Key: key, Value: []byte("1"), Revision: 1, Writer: simID(far[0])}, simKeys()[far[0]])
			if err != nil {
				t.Fatal(err)
			}
			in, _, _ := g.nodes[far[30]].accept([]*wirev1.RecordItem{{Envelope: b}})
			if _, err := g.nodes[far[30]].keep(ctx, in); err != nil {
				t.Fatal(err)
			}
			eventually(t, 5*time.Minute, "home", func() bool {
				have := g.holders(key, 1)
				want := slices.Sorted(slices.Values(far[:5]))
				return slices.Equal(have, want)
			})
		})
	}
}
