package records_test

import (
	"context"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

// slowRun makes simulations small.
var slowRun bool

// replicas is how many members hold a record.
const replicas = 5

// stand is one run of the DHT under load of its own.
type stand struct {
	nodes, view, records int
	finders              int // who look for each record
	together             int // nodes that die at the same moment
}

// With capped views, small: what TestLongThousandNodes shows of a thousand.
func TestCappedViewsOverKadDHT(t *testing.T) {
	s := stand{nodes: 100, view: 16, records: 40, finders: 2, together: 10}
	if slowRun {
		s = stand{nodes: 40, view: 16, records: 10, finders: 1, together: 4}
	}
	s.run(t)
}

// With views of 64 members of 1,000 every record is found in at most log2 N hops, and after a death its copies are as many again within a minute.
func TestLongThousandNodesWithViewsOf64(t *testing.T) {
	if os.Getenv("COPPICE_LONG") == "" {
		t.Skip("set COPPICE_LONG=1, or make test-long")
	}
	stand{nodes: 1000, view: 64, records: 400, finders: 3, together: 50}.run(t)
}

func (s stand) run(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	defer debug.SetGCPercent(debug.SetGCPercent(50)) // a thousand nodes are 3 GiB, and others run beside
	began := time.Now()
	synctest.Test(t, func(t *testing.T) {
		f := plant(t, s.nodes, s.view, seed)
		defer f.fellAll()
		for _, tr := range f.nodes {
			if known := len(tr.view.Alive()); known != s.view {
				t.Fatalf("a view of %d members, not %d", known, s.view)
			}
		}
		list := s.put(t, f)
		s.find(t, f, list)
		for range 5 {
			s.kill(t, f, list, 1)
		}
		s.kill(t, f, list, s.together)
		s.find(t, f, list)
		f.report(t)
	})
	t.Logf("%.1f s of real time", time.Since(began).Seconds())
}

func value(key string) string { return "the value of " + key }

// put has random nodes write records, which come to lie with the closest of all nodes.
func (s stand) put(t *testing.T, f *forest) (list []string) {
	for i := range s.records {
		key := fmt.Sprintf("/kb/own/app/x-%d", i)
		list = append(list, key)
		if acked, of, err := f.someone().Put(t.Context(), key, []byte(value(key)), 0); err != nil || acked < 3 || of != replicas {
			t.Fatalf("put %s: %d of %d, %v", key, acked, of, err)
		}
	}
	for _, key := range list {
		f.within(t, time.Second, "the closest to hold "+key, func() bool { return f.copies(key, value(key), replicas) == replicas })
	}
	return list
}

// within waits, looking every 50 ms of virtual time, and returns how long it took.
func (f *forest) within(t *testing.T, most time.Duration, what string, ok func() bool) time.Duration {
	t.Helper()
	began := time.Now()
	for !ok() {
		if time.Since(began) > most {
			t.Fatalf("waited %v for %s", most, what)
		}
		time.Sleep(50 * time.Millisecond)
	}
	return time.Since(began)
}

// find has random nodes look for every record, in our own way and in kad-dht's.
func (s stand) find(t *testing.T, f *forest, list []string) {
	bound := bits.Len(uint(s.nodes - 1)) // log2, rounded up
	clear(f.hops)
	kad := map[int]int{}
	for _, key := range list {
		for range s.finders {
			tr := f.someone()
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			rec, agree, err := tr.Get(ctx, key)
			if err != nil || string(rec.Value) != value(key) || agree < 3 {
				t.Errorf("get %s: %q, %d agree, %v", key, rec.Value, agree, err)
			}
			raw, hops, copies, err := tr.dht.Kad().GetValue(ctx, key)
			if err != nil || len(raw) == 0 || copies < 1 || hops > bound {
				t.Errorf("kad-dht get %s: %d copies, %d hops, %v", key, copies, hops, err)
			}
			kad[hops]++
			cancel()
		}
	}
	t.Logf("hops: records %s, kad-dht's GetValue %s; %d allowed", table(f.hops), table(kad), bound)
	for hops := range f.hops {
		if hops > bound {
			t.Errorf("a lookup of records took %d hops, more than log2 %d", hops, s.nodes)
		}
	}
}

// findHit looks for records some of whose holders died a moment ago, which nobody knows yet.
func (s stand) findHit(t *testing.T, f *forest, hit map[string]int) {
	for key, n := range hit {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		if rec, _, err := f.someone().Get(ctx, key); err != nil || string(rec.Value) != value(key) {
			t.Errorf("get %s, %d of whose holders have just died: %q, %v", key, n, rec.Value, err)
		}
		cancel()
	}
}

func table(counts map[int]int) string {
	var order []int
	for n := range counts {
		order = append(order, n)
	}
	slices.Sort(order)
	out := ""
	for _, n := range order {
		out += fmt.Sprintf(" %d×%d", counts[n], n)
	}
	return out
}

// noticed is how long it takes until a death is known to those who know the dead: 1.25 s of silence and a second watcher's word. The end
// of a process is seen at once.
const noticed = 1500 * time.Millisecond

// kill ends nodes that hold records, all at one moment, and waits until the closest of the living hold every record again.
func (s stand) kill(t *testing.T, f *forest, list []string, together int) {
	holders := map[string][]peer.ID{}
	for _, key := range list {
		holders[key], _ = f.crowd.Closest(key, replicas)
	}
	var dead []peer.ID
	hit := map[string]int{}
	began := time.Now()
	for len(dead) < together {
		id := holders[list[f.rng.IntN(len(list))]][f.rng.IntN(replicas)]
		if !f.at[id].up || slices.ContainsFunc(list, func(key string) bool { return hit[key] == replicas-1 && slices.Contains(holders[key], id) }) {
			continue // with all five at once a record is lost, which is no matter of views
		}
		f.at[id].fell()
		dead = append(dead, id)
		for key, ids := range holders {
			if slices.Contains(ids, id) {
				hit[key]++
			}
		}
	}
	s.findHit(t, f, hit)
	f.within(t, time.Minute, "the deaths to be noticed", func() bool { return time.Since(began) >= noticed })
	f.crowd.bury(dead...)
	var worst time.Duration
	lost := 0
	for key, n := range hit {
		lost += n
		f.within(t, time.Minute-time.Since(began), "the copies of "+key, func() bool { return f.copies(key, value(key), replicas) == replicas })
		worst = max(worst, time.Since(began))
	}
	t.Logf("%d nodes died: %d copies of %d records were lost, all were there again after %v", len(dead), lost, len(hit), worst)
}

// report tells what it took.
func (f *forest) report(t *testing.T) {
	var lookups, lost, conns, known uint64
	living := uint64(0)
	for _, tr := range f.nodes {
		if !tr.up {
			continue
		}
		living++
		st := tr.Status()
		lookups, lost = lookups+st.Lookups, lost+st.Lost
		conns += uint64(len(tr.host.Network().Conns()))
		known += uint64(len(tr.dht.Kad().Known()))
	}
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	t.Logf("%d nodes, %d lookups (%d failed), %d connections and %d in the routing table per node, %d MiB from the system, %d goroutines",
		living, lookups, lost, conns/living, known/living, m.Sys>>20, runtime.NumGoroutine())
}
