package store

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/cockroachdb/pebble/v2/vfs/errorfs"
	ds "github.com/ipfs/go-datastore"
	"github.com/ipfs/go-datastore/query"
)

var ctx = context.Background()

func open(t testing.TB, fs vfs.FS, opts Options) *Store {
	t.Helper()
	if opts.Log == nil {
		opts.Log = slog.New(slog.DiscardHandler)
	}
	s, err := Open(fs, "data/db", opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// What a synced write acknowledged is there after the power went; what was not synced may be lost but never half there.
func TestAcknowledgedWritesSurviveACrash(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	for round := range 20 {
		fs := vfs.NewCrashableMem()
		s := open(t, fs, Options{})
		d, lazy := s.Datastore("a"), s.Datastore("lazy", NoSync())
		want := map[string]string{}
		for i := range 1 + rng.IntN(60) {
			k, v := fmt.Sprintf("/k%d", rng.IntN(20)), fmt.Sprint(round, i)
			var err error
			switch rng.IntN(4) {
			case 0:
				err = d.Delete(ctx, ds.NewKey(k))
				delete(want, k)
			case 1: // a batch is one unit
				b, berr := d.Batch(ctx)
				err = errors.Join(berr, b.Put(ctx, ds.NewKey(k), []byte(v)), b.Put(ctx, ds.NewKey(k+"/twin"), []byte(v)), b.Commit(ctx))
				want[k], want[k+"/twin"] = v, v
			default:
				err = d.Put(ctx, ds.NewKey(k), []byte(v))
				want[k] = v
			}
			if err = errors.Join(err, lazy.Put(ctx, ds.NewKey(k), []byte(v))); err != nil {
				t.Fatal(err)
			}
		}
		after := fs.CrashClone(vfs.CrashCloneCfg{UnsyncedDataPercent: rng.IntN(101), RNG: rng})
		again := open(t, after, Options{})
		got := contents(t, again.Datastore("a"), query.Query{})
		if fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("after the crash\n got %v\nwant %v", got, want)
		}
		for k, v := range contents(t, again.Datastore("lazy"), query.Query{}) {
			if v == "" {
				t.Fatalf("lazy %s is torn", k)
			}
		}
	}
}

func TestSyncMakesLazyWritesDurable(t *testing.T) {
	fs := vfs.NewCrashableMem()
	d := open(t, fs, Options{}).Datastore("lazy", NoSync())
	if err := errors.Join(d.Put(ctx, ds.NewKey("/x"), []byte("1")), d.Sync(ctx, ds.NewKey("/"))); err != nil {
		t.Fatal(err)
	}
	after := open(t, fs.CrashClone(vfs.CrashCloneCfg{}), Options{}).Datastore("lazy")
	if v, err := after.Get(ctx, ds.NewKey("/x")); err != nil || string(v) != "1" {
		t.Fatalf("got %q, %v", v, err)
	}
}

func contents(t *testing.T, d ds.Datastore, q query.Query) map[string]string {
	t.Helper()
	res, err := d.Query(ctx, q)
	if err != nil {
		t.Fatal(err)
	}
	all, err := res.Rest()
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, e := range all {
		out[e.Key] = string(e.Value)
	}
	return out
}

func TestDatastoreReadsAndWrites(t *testing.T) {
	s := open(t, vfs.NewMem(), Options{})
	d, other := s.Datastore("kad"), s.Datastore("kad/kb") // neither may see the other's keys
	k := ds.NewKey("/kb/X")
	if _, err := d.Get(ctx, k); !errors.Is(err, ds.ErrNotFound) {
		t.Fatalf("get of nothing: %v", err)
	}
	if n, err := d.GetSize(ctx, k); n != -1 || !errors.Is(err, ds.ErrNotFound) {
		t.Fatalf("size of nothing: %d, %v", n, err)
	}
	if err := d.Put(ctx, k, []byte("value")); err != nil {
		t.Fatal(err)
	}
	if err := other.Put(ctx, ds.NewKey("/X"), []byte("other")); err != nil {
		t.Fatal(err)
	}
	if got := contents(t, d, query.Query{}); len(got) != 1 || got["/kb/X"] != "value" {
		t.Fatalf("kad sees %v", got)
	}
	if has, err := d.Has(ctx, k); !has || err != nil {
		t.Fatal(has, err)
	}
	if n, err := d.GetSize(ctx, k); n != 5 || err != nil {
		t.Fatal(n, err)
	}
	if err := errors.Join(d.Delete(ctx, k), d.Delete(ctx, k)); err != nil {
		t.Fatalf("deleting twice: %v", err)
	}
	if has, err := d.Has(ctx, k); has || err != nil {
		t.Fatal(has, err)
	}
	if err := d.Put(ctx, k, nil); err != nil {
		t.Fatal(err)
	}
	if v, err := d.Get(ctx, k); err != nil || v == nil || len(v) != 0 {
		t.Fatalf("an empty value came back as %v, %v", v, err)
	}
}

// Every query gives what the naive evaluation over all entries gives.
func TestQueryAgreesWithTheNaiveOne(t *testing.T) {
	d := open(t, vfs.NewMem(), Options{}).Datastore("q")
	var all []query.Entry
	for _, k := range []string{"/a", "/a/b", "/a/b/c", "/ab", "/ab/c", "/b", "/a\xff/x", "/a/\xff\xff"} {
		v := []byte(strings.Repeat("v", len(k)*7%5))
		if err := d.Put(ctx, ds.RawKey(k), v); err != nil {
			t.Fatal(err)
		}
		all = append(all, query.Entry{Key: k, Value: v, Size: len(v)})
	}
	slices.SortFunc(all, func(a, b query.Entry) int { return strings.Compare(a.Key, b.Key) })
	orders := [][]query.Order{nil, {query.OrderByKey{}}, {query.OrderByKeyDescending{}}, {query.OrderByValue{}, query.OrderByKeyDescending{}}}
	filters := [][]query.Filter{nil, {query.FilterKeyCompare{Op: query.GreaterThan, Key: "/a/b"}}, {query.FilterValueCompare{Op: query.NotEqual, Value: nil}}}
	for _, prefix := range []string{"", "/", "/a", "/a/", "/ab", "/nothing"} {
		for _, o := range orders {
			for _, f := range filters {
				for _, limit := range []int{0, 2} {
					for _, offset := range []int{0, 1} {
						for _, keysOnly := range []bool{false, true} {
							q := query.Query{Prefix: prefix, Orders: o, Filters: f, Limit: limit, Offset: offset, KeysOnly: keysOnly, ReturnsSizes: true}
							want, err := query.NaiveQueryApply(q, query.ResultsWithEntries(q, slices.Clone(all))).Rest()
							if err != nil {
								t.Fatal(err)
							}
							res, err := d.Query(ctx, q)
							if err != nil {
								t.Fatal(err)
							}
							got, err := res.Rest()
							if err != nil {
								t.Fatal(err)
							}
							if !slices.EqualFunc(got, want, func(a, b query.Entry) bool {
								return a.Key == b.Key && a.Size == b.Size && (keysOnly || bytes.Equal(a.Value, b.Value))
							}) {
								t.Fatalf("%s offset %d: got %v, want %v", q, offset, got, want)
							}
						}
					}
				}
			}
		}
	}
}

func TestCloseWaitsForQueriesAndRefusesAfter(t *testing.T) {
	s := open(t, vfs.NewMem(), Options{})
	d := s.Datastore("c")
	for i := range 10 {
		if err := d.Put(ctx, ds.NewKey(fmt.Sprint(i)), []byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	res, err := d.Query(ctx, query.Query{})
	if err != nil {
		t.Fatal(err)
	}
	closed := make(chan error)
	go func() { closed <- s.Close() }()
	for { // the running query goes on; new work is refused once Close has begun
		_, err := d.Get(ctx, ds.NewKey("1"))
		if errors.Is(err, ErrClosed) {
			break
		}
		runtime.Gosched()
	}
	if all, err := res.Rest(); err != nil || len(all) != 10 {
		t.Fatalf("the query in flight: %d results, %v", len(all), err)
	}
	if err := <-closed; err != nil {
		t.Fatal(err)
	}
	_, qerr := d.Query(ctx, query.Query{})
	for what, err := range map[string]error{
		"put": d.Put(ctx, ds.NewKey("1"), nil), "delete": d.Delete(ctx, ds.NewKey("1")),
		"sync": d.Sync(ctx, ds.NewKey("/")), "query": qerr,
	} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("%s after Close: %v", what, err)
		}
	}
}

func TestSecondOpenOfTheSameDirectoryIsRefused(t *testing.T) {
	dir := t.TempDir()
	s, err := Open(vfs.Default, dir, Options{Log: slog.New(slog.DiscardHandler), Disk: Disk{Ballast: -1}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(vfs.Default, dir, Options{Disk: Disk{Ballast: -1}}); err == nil || !strings.Contains(err.Error(), "another node") {
		t.Fatalf("second open: %v", err)
	}
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Fatal(err)
	}
}

// The node hears that it must retreat before the disk is full, once, and hears when it may come back.
func TestWatermark(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var free atomic.Uint64
		var mu sync.Mutex
		var heard []bool
		fs := vfs.NewMem()
		free.Store(1000)
		s := open(t, fs, Options{Disk: Disk{
			Usage: func() (uint64, uint64, error) { return free.Load(), 2000, nil },
			Low:   500, Critical: 100, Resume: 700, Ballast: 50, Every: time.Minute,
			OnLow: func(low bool) { mu.Lock(); heard = append(heard, low); mu.Unlock() },
		}})
		expect := func(f uint64, low, ballast bool) {
			t.Helper()
			free.Store(f)
			time.Sleep(time.Minute + time.Second)
			synctest.Wait()
			if st := s.Status(); st.Low != low || st.Ballast != ballast || st.FreeBytes != f || s.Low() != low {
				t.Fatalf("with %d free: %+v", f, st)
			}
			if _, err := fs.Stat("data/db/BALLAST"); (err == nil) != ballast {
				t.Fatalf("with %d free the ballast file: %v", f, err)
			}
		}
		expect(1000, false, true)
		expect(499, true, true)
		expect(600, true, true) // hysteresis
		expect(99, true, false) // the reserve is given up for the retreat
		expect(650, true, false)
		expect(700, false, false) // room to serve, not yet for the reserve
		expect(800, false, true)
		if fmt.Sprint(heard) != "[true false]" {
			t.Fatalf("OnLow heard %v", heard)
		}
		if n, ok := s.Free(); n != 800 || !ok {
			t.Fatal(n, ok)
		}
	})
}

// ENOSPC in the middle of a write: the ballast makes room, the write succeeds, and the node is told at once.
func TestFullDiskIsSurvivedByTheBallast(t *testing.T) {
	mem := vfs.NewMem()
	var full atomic.Bool
	fs := errorfs.Wrap(mem, errorfs.InjectorFunc(func(op errorfs.Op) error {
		if full.Load() && op.Kind == errorfs.OpFileWrite {
			if _, err := mem.Stat("data/db/BALLAST"); err == nil {
				return syscall.ENOSPC
			}
		}
		return nil
	}))
	low := make(chan bool, 1)
	s := open(t, fs, Options{Disk: Disk{
		Usage:   func() (uint64, uint64, error) { return 1 << 30, 1 << 31, nil },
		Ballast: 10, Every: time.Hour, OnLow: func(l bool) { low <- l },
	}})
	if !s.Status().Ballast {
		t.Fatal("no ballast")
	}
	full.Store(true)
	if err := s.Datastore("x").Put(ctx, ds.NewKey("/a"), []byte("1")); err != nil {
		t.Fatal(err)
	}
	select {
	case l := <-low:
		if !l {
			t.Fatal("told that the disk is fine")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("nobody was told")
	}
	if st := s.Status(); !st.Low || st.Ballast {
		t.Fatalf("%+v", st)
	}
}

// A write that cannot be made durable is never acknowledged, and the failure is reported.
func TestFailedCommitIsNotAcknowledged(t *testing.T) {
	var broken atomic.Bool
	fs := errorfs.Wrap(vfs.NewMem(), errorfs.InjectorFunc(func(op errorfs.Op) error {
		if broken.Load() && (op.Kind == errorfs.OpFileSync || op.Kind == errorfs.OpFileSyncData || op.Kind == errorfs.OpFileWrite) {
			return syscall.EIO
		}
		return nil
	}))
	fatal := make(chan error, 1)
	s, err := Open(fs, "db", Options{Log: slog.New(slog.DiscardHandler), OnFatal: func(err error) { fatal <- err }})
	if err != nil {
		t.Fatal(err)
	}
	broken.Store(true)
	acked := make(chan error, 1)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := s.DB().Set([]byte("t/x"), []byte("1"), pebble.Sync); err == nil {
			acked <- nil
		}
	}()
	select {
	case err := <-fatal:
		if !errors.Is(err, syscall.EIO) && !strings.Contains(err.Error(), "input/output") {
			t.Fatalf("fatal: %v", err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("the failure was not reported")
	}
	<-ended
	select {
	case <-acked:
		t.Fatal("the write was acknowledged")
	default:
	}
	if s.Status().LastError == nil {
		t.Fatal("status says nothing")
	}
	// The database is lost to this process; it is not closed, as in a node that ends here.
}
