package records

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

var ctx = context.Background()

func (nd *simNode) mustPut(key, value string, ttl time.Duration) {
	nd.t.Helper()
	if acked, of, err := nd.Put(ctx, key, []byte(value), ttl); err != nil {
		nd.t.Fatalf("put %s: %d of %d, %v", key, acked, of, err)
	}
}

func (nd *simNode) mustGet(key, value string) (Record, int) {
	nd.t.Helper()
	rec, agree, err := nd.Get(ctx, key)
	if err != nil || string(rec.Value) != value {
		nd.t.Fatalf("node %d: get %s: %q (%d agree), %v; want %q", nd.i, key, rec.Value, agree, err, value)
	}
	return rec, agree
}

func TestPutReachesTheClosestInOneRoundTrip(t *testing.T) {
	inGrove(t, 12, func(t *testing.T, g *grove) {
		key := "/kb/facts/" + g.nodes[0].id.String() + "/host"
		g.nodes[0].mustPut(key, "warm the connections", time.Minute)
		began := time.Now()
		acked, of, err := g.nodes[0].Put(ctx, key, []byte("load 0.5"), time.Minute)
		if err != nil || acked < 3 || of != 5 {
			t.Fatalf("%d of %d, %v", acked, of, err)
		}
		if took := time.Since(began); took > time.Millisecond {
			t.Errorf("took %v over a network with a round trip of 0.5 ms", took)
		}
		time.Sleep(10 * time.Millisecond)
		have := g.holders(key, 2)
		for _, i := range g.closest(key, 5) {
			if !slices.Contains(have, i) {
				t.Errorf("node %d is close and lacks it", i)
			}
		}
		if len(have) > 6 {
			t.Errorf("held by %v", have)
		}
		for _, nd := range g.nodes {
			rec, agree := nd.mustGet(key, "load 0.5")
			if agree < 3 || rec.Writer != g.nodes[0].id || rec.TTL != time.Minute || rec.Revision != 2 {
				t.Errorf("node %d: %+v, %d agree", nd.i, rec, agree)
			}
		}
	})
}

func TestAcknowledgementsAreCountedHonestly(t *testing.T) {
	inGrove(t, 5, func(t *testing.T, g *grove) {
		a := g.nodes[0]
		// Two of five are dead, unknown to the view: three acknowledge, which is what W wants.
		g.kill(1, false)
		g.net.Freeze(simID(2))
		acked, of, err := a.Put(ctx, "/kb/own/app/x-0", []byte("1"), 0)
		if err != nil || acked != 3 || of != 5 {
			t.Errorf("two dead: %d of %d, %v", acked, of, err)
		}
		// A third: two do, and that is said.
		g.net.Freeze(simID(3))
		began := time.Now()
		acked, of, err = a.Put(ctx, "/kb/own/app/x-0", []byte("2"), 0)
		var few *TooFewError
		if !errors.As(err, &few) || acked != 2 || of != 5 || few.Want != 3 || len(few.Why) != 3 {
			t.Errorf("three dead: %d of %d, %v", acked, of, err)
		}
		if took := time.Since(began); took > 400*time.Millisecond {
			t.Errorf("failing took %v", took)
		}
	})
}

func TestASuccessorStandsInForADeadReplica(t *testing.T) {
	inGrove(t, 10, func(t *testing.T, g *grove) {
		key := "/kb/own/app/y-0"
		near := g.closest(key, 8)
		writer := g.nodes[near[7]]
		for _, i := range near[:3] { // three of the five closest, unnoticed
			g.kill(i, false)
		}
		acked, _, err := writer.Put(ctx, key, []byte("v"), 0)
		if err != nil || acked < 3 {
			t.Fatalf("%d, %v", acked, err)
		}
		g.nodes[near[5]].mustGet(key, "v")
		// When the deaths are noticed, five hold it again.
		for _, i := range near[:3] {
			g.view.set(g.nodes[i].id, false)
		}
		eventually(t, 3*time.Second, "the five closest hold it", func() bool {
			have := g.holders(key, 1)
			return !slices.ContainsFunc(g.closest(key, 5), func(i int) bool { return !slices.Contains(have, i) })
		})
	})
}

func TestDeathAndJoinMoveTheReplicas(t *testing.T) {
	inGrove(t, 14, func(t *testing.T, g *grove) {
		g.view.set(simID(13), false) // comes later
		var names []string
		for n := range 40 {
			key := fmt.Sprintf("/kb/own/app/c-%d", n)
			names = append(names, key)
			g.nodes[n%5].mustPut(key, key, 0)
		}
		placed := func() bool {
			for _, key := range names {
				have := g.holders(key, 1)
				for _, i := range g.closest(key, 5) {
					if !slices.Contains(have, i) {
						return false
					}
				}
			}
			return true
		}
		eventually(t, time.Second, "first placement", placed)
		for _, i := range []int{0, 3, 7} {
			g.kill(i, true)
			eventually(t, 3*time.Second, fmt.Sprint("after the death of ", i), placed)
		}
		sent := func() (n uint64) {
			for _, nd := range g.nodes {
				n += nd.Status().Repaired
			}
			return n
		}
		before := sent()
		g.view.set(simID(13), true)
		eventually(t, 3*time.Second, "after the join", placed)
		if n := sent() - before; n > 60 {
			t.Errorf("%d records sent for one join of a node close to about 20 keys", n)
		}
		// Those that are no longer close hand over what is not theirs.
		eventually(t, 5*time.Minute, "hand over", func() bool {
			for _, key := range names {
				if len(g.holders(key, 1)) > 6 { // five, and the writer
					return false
				}
			}
			return true
		})
		if !placed() {
			t.Error("the hand over lost a copy")
		}
	})
}

func TestAntiEntropyHealsWhatNoChangeOfTheViewShows(t *testing.T) {
	inGrove(t, 5, func(t *testing.T, g *grove) {
		// Node 4 is unreachable for a while, unnoticed, and misses changes of both kinds.
		g.nodes[0].mustPut("/kb/own/app/a-0", "1", 0)
		g.nodes[0].mustPut("/kb/own/app/b-0", "1", 0)
		g.net.Isolate(simID(4))
		g.nodes[0].mustPut("/kb/own/app/a-0", "2", 0)
		if err := g.nodes[0].Delete(ctx, "/kb/own/app/b-0"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		g.net.Heal()
		eventually(t, 3*time.Minute, "node 4 has both changes", func() bool {
			return slices.Contains(g.holders("/kb/own/app/a-0", 2), 4) && slices.Contains(g.holders("/kb/own/app/b-0", 2), 4)
		})
		if recs := g.nodes[4].Local("/kb/"); len(recs) != 1 || string(recs[0].Value) != "2" {
			t.Errorf("%+v", recs)
		}
	})
}

func TestReadRepair(t *testing.T) {
	inGrove(t, 5, func(t *testing.T, g *grove) {
		g.net.Isolate(simID(4))
		g.nodes[0].mustPut("/kb/own/app/a-0", "1", 0)
		time.Sleep(time.Second)
		g.net.Heal()
		eventually(t, 2*time.Second, "reads put it right", func() bool {
			g.nodes[1].mustGet("/kb/own/app/a-0", "1")
			return slices.Contains(g.holders("/kb/own/app/a-0", 1), 4)
		})
	})
}

func TestALowerVersionNeverWins(t *testing.T) {
	inGrove(t, 5, func(t *testing.T, g *grove) {
		key := "/kb/own/app/m-0"
		put := func(i int, value string, inc, index uint64) error {
			return g.nodes[i].PutMany(ctx, []Entry{{Key: key, Value: []byte(value), Incarnation: inc, Revision: index}})[0].Err
		}
		var old *OlderError
		if err := put(0, "100", 1, 100); err != nil {
			t.Fatal(err)
		}
		if err := put(1, "90", 1, 90); !errors.As(err, &old) || old.Newest.Revision != 100 {
			t.Errorf("an older index: %v", err)
		}
		if err := put(2, "5", 2, 5); err != nil {
			t.Errorf("a later incarnation: %v", err)
		}
		if err := put(3, "200", 1, 200); !errors.As(err, &old) {
			t.Errorf("an older incarnation: %v", err)
		}
		if err := put(4, "5", 2, 5); err != nil {
			t.Errorf("two mirrors of one entry: %v", err)
		}
		if err := put(1, "another value", 2, 5); (simID(1) < max(simID(2), simID(4))) != errors.As(err, &old) {
			t.Errorf("two values under one number: %v", err)
		}
		if err := put(2, "6", 2, 6); err != nil {
			t.Errorf("the next: %v", err)
		}
		for _, nd := range g.nodes {
			nd.mustGet(key, "6")
		}
	})
}

// Any order of arrival, any way: all end with the highest.
func TestReplicasConvergeUnderConcurrentWriters(t *testing.T) {
	inGrove(t, 7, func(t *testing.T, g *grove) {
		key := "/kb/app/shop"
		var wg sync.WaitGroup
		for i, nd := range g.nodes {
			wg.Go(func() {
				for n := range 20 {
					// Some lose to others; that is the point.
					nd.PutMany(ctx, []Entry{{Key: key, Value: fmt.Appendf(nil, "%d", n*7+i), Incarnation: 1, Revision: uint64(n*7+i) + 1}})
				}
			})
		}
		wg.Wait()
		for _, nd := range g.nodes {
			nd.mustGet(key, "139")
		}
	})
}

func TestForgedAndForeignRecordsAreRefused(t *testing.T) {
	inGrove(t, 5, func(t *testing.T, g *grove) {
		victim, liar := g.nodes[0], g.nodes[1]
		own := "/kb/facts/" + victim.id.String() + "/host"
		victim.mustPut(own, "true", time.Hour)
		if _, _, err := liar.Put(ctx, own, []byte("false"), time.Hour); !errors.Is(err, ErrInvalid) {
			t.Errorf("a foreign key, at home: %v", err)
		}
		signed := func(r Record, key int) []byte {
			b, err := seal(&r, simKeys()[key])
			if err != nil {
				t.Fatal(err)
			}
			return b
		}
		good := signed(Record{Key: "/kb/own/app/a-0", Revision: 9, Writer: liar.id}, 1)
		flipped := slices.Clone(good)
		flipped[len(flipped)-1] ^= 1
		huge := signed(Record{Key: "/kb/own/app/a-0", Revision: 9, Writer: liar.id, Value: make([]byte, MaxSize/2)}, 1)
		for what, b := range map[string][]byte{
			"foreign key":     signed(Record{Key: own, Revision: 9, Writer: liar.id, Value: []byte("false")}, 1),
			"forged writer":   signed(Record{Key: own, Revision: 9, Writer: victim.id, Value: []byte("false")}, 1),
			"no member":       signed(Record{Key: "/kb/own/app/a-0", Revision: 9, Writer: simID(30)}, 30),
			"flipped bit":     flipped,
			"other namespace": signed(Record{Key: "/pk/x", Revision: 9, Writer: liar.id}, 1),
			"garbage":         []byte("garbage"),
			"nothing":         nil,
			"too large":       append(huge, make([]byte, MaxSize)...),
		} {
			a, err := liar.ask(ctx, g.nodes[2].id, &wirev1.RecordAsk{Put: []*wirev1.RecordItem{{Envelope: b}}})
			if err != nil || len(a.GetPut()) != 1 || a.GetPut()[0].GetResult() != wirev1.RecordPutAnswer_INVALID {
				t.Errorf("%s: %v, %v", what, a.GetPut(), err)
			}
		}
		victim.mustGet(own, "true")
		if _, _, err := victim.Put(ctx, own, make([]byte, MaxSize), time.Hour); !errors.Is(err, ErrInvalid) {
			t.Errorf("a value that is too large: %v", err)
		}
	})
}

func TestAgeGrowsAndSurvivesRepairAndRestart(t *testing.T) {
	inGrove(t, 8, func(t *testing.T, g *grove) {
		key := "/kb/facts/" + g.nodes[0].id.String() + "/host"
		g.nodes[0].mustPut(key, "v", time.Hour)
		check := func(want time.Duration) {
			t.Helper()
			for _, nd := range g.nodes {
				if !nd.up {
					continue
				}
				if rec, _ := nd.mustGet(key, "v"); rec.Age < want || rec.Age > want+5*time.Second {
					t.Errorf("node %d: age %v, want %v", nd.i, rec.Age, want)
				}
			}
		}
		began := time.Now()
		check(0)
		time.Sleep(time.Minute)
		check(time.Since(began))
		// The source dies, then others: what is left was copied by repair, and still has the age of the original.
		g.kill(0, true)
		time.Sleep(2 * time.Second)
		for _, i := range g.closest(key, 3) {
			g.kill(i, true)
			time.Sleep(2 * time.Second)
		}
		check(time.Since(began))
		for _, nd := range g.nodes {
			if nd.up {
				nd.stop()
				g.net.Kill(nd.id)
				nd.start(g)
			}
		}
		check(time.Since(began))
		time.Sleep(time.Hour - time.Since(began) + 10*time.Second)
		for _, nd := range g.nodes {
			if !nd.up {
				continue
			}
			if rec, _, err := nd.Get(ctx, key); !errors.Is(err, ErrNotFound) {
				t.Errorf("node %d: after its time: %+v, %v", nd.i, rec, err)
			}
		}
		time.Sleep(2 * expireEvery)
		for _, nd := range g.nodes {
			if nd.up && nd.Status().Keys != 0 {
				t.Errorf("node %d still holds %d keys", nd.i, nd.Status().Keys)
			}
		}
	})
}

func TestDeletionIsRememberedThenForgotten(t *testing.T) {
	inGrove(t, 5, func(t *testing.T, g *grove) {
		key := "/kb/own/app/d-0"
		g.nodes[0].mustPut(key, "v", 0)
		if err := g.nodes[0].Delete(ctx, key); err != nil {
			t.Fatal(err)
		}
		for _, nd := range g.nodes {
			if rec, _, err := nd.Get(ctx, key); !errors.Is(err, ErrNotFound) || !rec.Deleted {
				t.Errorf("%+v, %v", rec, err)
			}
		}
		if recs, asked, answered := g.nodes[1].Scan(ctx, "/kb/"); len(recs) != 0 || asked != 5 || answered != 5 {
			t.Errorf("%v %d %d", recs, asked, answered)
		}
		time.Sleep(31 * time.Minute)
		if s := g.nodes[0].Status(); s.Keys != 1 || s.Tombstones != 1 {
			t.Errorf("forgotten early: %+v", s)
		}
		time.Sleep(30 * time.Minute)
		for _, nd := range g.nodes {
			if s := nd.Status(); s.Keys != 0 || s.Tombstones != 0 {
				t.Errorf("node %d: %+v", nd.i, s)
			}
		}
	}, func(c *Config) { c.TombstoneFor = time.Hour })
}

func TestAWriterThatLostCountGoesOn(t *testing.T) {
	inGrove(t, 5, func(t *testing.T, g *grove) {
		key := "/kb/nodes/" + g.nodes[0].id.String()
		for range 3 {
			g.nodes[0].mustPut(key, "before", 0)
		}
		time.Sleep(10 * time.Millisecond)
		// The node comes back with an empty disk.
		g.kill(0, false)
		g.nodes[0].fs = vfs.NewCrashableMem()
		g.nodes[0].start(g)
		g.nodes[0].mustPut(key, "after", 0)
		if rec, _ := g.nodes[1].mustGet(key, "after"); rec.Revision != 4 {
			t.Errorf("revision %d", rec.Revision)
		}
	})
}

func TestAcknowledgedRecordsSurviveACrash(t *testing.T) {
	inGrove(t, 3, func(t *testing.T, g *grove) {
		acked, _, err := g.nodes[0].Put(ctx, "/kb/own/app/s-0", []byte("v"), 0)
		if err != nil {
			t.Fatal(err)
		}
		have := 0
		for i, nd := range g.nodes {
			after := nd.fs.CrashClone(vfs.CrashCloneCfg{})
			g.kill(i, false)
			nd.fs = after
			nd.tune = func(c *Config) { c.View = &simView{} } // no repair
			nd.start(g)
			if e, ok := nd.local.get("/kb/own/app/s-0"); ok && e.version.Revision == 1 {
				have++
			}
		}
		if have < acked {
			t.Errorf("%d acknowledged, %d have it after the crash", acked, have)
		}
	})
}

func TestManyKeysInOneMessagePerMember(t *testing.T) {
	inGrove(t, 5, func(t *testing.T, g *grove) {
		var entries []Entry
		for i := range 10 {
			entries = append(entries, Entry{
				Key: fmt.Sprintf("/kb/facts/%s/f%d", g.nodes[0].id, i), Value: []byte("x"), TTL: time.Minute,
			})
		}
		g.nodes[0].PutMany(ctx, entries)
		before, _ := g.nodes[0].end.Sent()
		for i, res := range g.nodes[0].PutMany(ctx, entries) {
			if res.Err != nil || res.Acked < 3 || res.Of != 5 {
				t.Errorf("%d: %+v", i, res)
			}
		}
		if after, _ := g.nodes[0].end.Sent(); after-before > 8 {
			t.Errorf("%d writes for ten keys to four members", after-before)
		}
		recs, _, _ := g.nodes[3].Scan(ctx, "/kb/facts/"+g.nodes[0].id.String()+"/")
		if len(recs) != 10 {
			t.Errorf("scan found %d", len(recs))
		}
		// Bad ones do not spoil the rest.
		bad := []Entry{{Key: "nothing"}, entries[0], {Key: "/kb/x/y", TTL: -1}}
		for i, res := range g.nodes[0].PutMany(ctx, bad) {
			if (res.Err == nil) != (i == 1) {
				t.Errorf("%d: %+v", i, res)
			}
		}
	})
}

func TestSubscribersHearOfNewRecordsInOrder(t *testing.T) {
	inGrove(t, 3, func(t *testing.T, g *grove) {
		var mu sync.Mutex
		var heard []string
		cancel := g.nodes[2].Subscribe("/kb/own/", func(r Record) {
			mu.Lock()
			defer mu.Unlock()
			heard = append(heard, fmt.Sprintf("%s %s %v", r.Key, r.Value, r.Deleted))
		})
		g.nodes[0].mustPut("/kb/app/z", "not for you", 0)
		for i := range 3 {
			g.nodes[0].mustPut("/kb/own/a", fmt.Sprint(i), 0)
			time.Sleep(10 * time.Millisecond)
		}
		if err := g.nodes[0].Delete(ctx, "/kb/own/a"); err != nil {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
		cancel()
		g.nodes[0].mustPut("/kb/own/b", "too late", 0)
		time.Sleep(10 * time.Millisecond)
		mu.Lock()
		defer mu.Unlock()
		if want := []string{"/kb/own/a 0 false", "/kb/own/a 1 false", "/kb/own/a 2 false", "/kb/own/a  true"}; !slices.Equal(heard, want) {
			t.Errorf("heard %q", heard)
		}
	})
}

func TestAFullNodeRefusesNewKeysOnly(t *testing.T) {
	low := false
	inGrove(t, 3, func(t *testing.T, g *grove) {
		g.nodes[0].mustPut("/kb/own/a", "1", 0)
		time.Sleep(10 * time.Millisecond)
		low = true
		defer func() { low = false }()
		g.nodes[0].mustPut("/kb/own/a", "2", 0)
		_, _, err := g.nodes[0].Put(ctx, "/kb/own/b", []byte("1"), 0)
		if !errors.Is(err, ErrFull) {
			t.Errorf("%v", err)
		}
	}, func(c *Config) { c.Low = func() bool { return low } })
}

// While nothing changes, a scan moves two copies of each record and finds all the same; where the holders that should tell are silent, it asks
// for all copies.
func TestAQuietScanMovesFewCopies(t *testing.T) {
	inGrove(t, 12, func(t *testing.T, g *grove) {
		const keys = 60
		for i := range keys {
			g.nodes[0].mustPut(fmt.Sprintf("/kb/own/app/a-%d", i), "x", 0)
		}
		moved := func(want int) (bytes uint64, asked, answered int) {
			t.Helper()
			before := uint64(0)
			for _, nd := range g.nodes {
				_, b := nd.end.Sent()
				before += b
			}
			recs, asked, answered := g.nodes[3].Scan(ctx, "/kb/own/")
			if len(recs) != want {
				t.Errorf("%d records, want %d", len(recs), want)
			}
			for _, nd := range g.nodes {
				_, b := nd.end.Sent()
				bytes += b
			}
			return bytes - before, asked, answered
		}
		all, _, _ := moved(keys)
		time.Sleep(scanQuiet + time.Second)
		few, _, _ := moved(keys)
		t.Logf("%d B with all copies, %d B with two", all, few)
		if few > all*6/10 {
			t.Errorf("%d B, with all copies %d", few, all)
		}
		first := g.closest("/kb/own/app/a-0", 2)
		for _, i := range first {
			if i != 3 && i != 0 {
				g.kill(i, false)
			}
		}
		if _, asked, answered := moved(keys); asked == answered {
			t.Errorf("%d of %d answered", answered, asked)
		}
	})
}
