package events

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/dht/store"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

type grove struct {
	t     *testing.T
	net   *peers.Net
	nodes []*simNode

	mu    sync.Mutex // guards alive
	alive []peer.ID
}

type simNode struct {
	*Events
	t      *testing.T
	i      int
	boot   uint64
	id     peer.ID
	fs     *vfs.MemFS
	disk   *store.Store
	end    *peers.Endpoint
	caller *peers.Caller
	cancel context.CancelFunc
	done   sync.WaitGroup
	up     bool
	tune   func(*Config)

	mu    sync.Mutex // guards heard
	heard []Event
}

func simID(i int) peer.ID { return peer.ID(fmt.Sprintf("node-%02d", i)) }

func inGrove(t *testing.T, n int, f func(t *testing.T, g *grove), tune ...func(*Config)) {
	synctest.Test(t, func(t *testing.T) {
		g := &grove{t: t, net: peers.NewNet(5)}
		for i := range n {
			nd := &simNode{t: t, i: i, id: simID(i), fs: vfs.NewCrashableMem(), tune: func(c *Config) {
				for _, f := range tune {
					f(c)
				}
			}}
			g.nodes = append(g.nodes, nd)
			nd.start(g)
			g.alive = append(g.alive, nd.id)
		}
		defer func() {
			for _, nd := range g.nodes {
				nd.stop()
			}
			g.net.Close()
		}()
		f(t, g)
	})
}

func (nd *simNode) start(g *grove) {
	disk, err := store.Open(nd.fs, "db", store.Options{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		nd.t.Fatal(err)
	}
	nd.boot++
	nd.disk, nd.end = disk, g.net.Join(nd.id)
	nd.caller = peers.NewCaller(nd.end)
	cfg := Config{
		Self: nd.id, Name: fmt.Sprint("n", nd.i), Boot: nd.boot, DB: disk.DB(), Peers: nd.end, Caller: nd.caller,
		Rand: rand.New(rand.NewPCG(uint64(nd.i), nd.boot)),
		Alive: func() []peer.ID {
			g.mu.Lock()
			defer g.mu.Unlock()
			return slices.Clone(g.alive)
		},
	}
	nd.tune(&cfg)
	e, err := Open(cfg)
	if err != nil {
		nd.t.Fatal(err)
	}
	nd.Events, nd.up, nd.heard = e, true, nil
	e.Subscribe("/", func(ev Event) {
		nd.mu.Lock()
		defer nd.mu.Unlock()
		nd.heard = append(nd.heard, ev)
	})
	ctx, cancel := context.WithCancel(context.Background())
	nd.cancel = cancel
	nd.done.Go(func() {
		if err := e.Run(ctx); !errors.Is(err, context.Canceled) {
			nd.t.Errorf("Run: %v", err)
		}
	})
}

func (nd *simNode) stop() {
	if !nd.up {
		return
	}
	nd.up = false
	nd.cancel()
	nd.done.Wait()
	if err := nd.Events.Close(); err != nil {
		nd.t.Error(err)
	}
	nd.caller.Close()
	if err := nd.disk.Close(); err != nil {
		nd.t.Error(err)
	}
}

func (nd *simNode) said() []Event {
	nd.mu.Lock()
	defer nd.mu.Unlock()
	return slices.Clone(nd.heard)
}

func (nd *simNode) say(channel, message string) {
	nd.Publish(Event{Channel: channel, Type: "test", Message: message})
}

func messages(list []Event) []string {
	var ms []string
	for _, ev := range list {
		ms = append(ms, ev.Message)
	}
	return ms
}

func eventually(t *testing.T, within time.Duration, what string, ok func() bool) {
	t.Helper()
	for began := time.Now(); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Since(began) > within {
			t.Fatalf("not within %v: %s", within, what)
		}
	}
}

// inOrder fails where the events of one origin were told out of order, or one twice.
func inOrder(t *testing.T, list []Event) {
	t.Helper()
	last := map[string]string{}
	seen := map[string]bool{}
	for _, ev := range list {
		if seen[ev.ID] {
			t.Errorf("told twice: %s", ev.ID)
		}
		seen[ev.ID] = true
		origin, n, _ := cutLast(ev.ID)
		if last[origin] != "" && len(last[origin]) == len(n) && last[origin] >= n || len(last[origin]) > len(n) {
			t.Errorf("%s: %s came after %s", origin, n, last[origin])
		}
		last[origin] = n
	}
}

func cutLast(id string) (origin, n string, ok bool) {
	i := strings.LastIndex(id, "/")
	return id[:i], id[i+1:], i > 0
}

func TestEventsReachEveryMember(t *testing.T) {
	inGrove(t, 5, func(t *testing.T, g *grove) {
		began := time.Now()
		g.nodes[0].Publish(Event{
			Channel: "apps/shop//store-0/", Type: "failover", Trigger: "neighbour", Cause: "n2 dead", Message: "claimed",
			Fields: map[string]string{"epoch": "4"},
		})
		time.Sleep(5 * time.Millisecond)
		for _, nd := range g.nodes {
			list := nd.List("/apps/shop", time.Time{}, 0)
			if len(list) != 1 || len(nd.said()) != 1 {
				t.Fatalf("node %d: %v", nd.i, list)
			}
			ev := list[0]
			if ev.Channel != "/apps/shop/store-0" || ev.Node != "n0" || ev.Fields["epoch"] != "4" || !ev.Time.Equal(began) {
				t.Errorf("node %d: %+v", nd.i, ev)
			}
		}
	})
}

func TestListByChannelTimeAndNumber(t *testing.T) {
	inGrove(t, 2, func(t *testing.T, g *grove) {
		a := g.nodes[0]
		for i, channel := range []string{"/apps/shop", "/apps/shop/store-0", "/apps/shopping", "/nodes/n1", "/apps/shop/web-0"} {
			a.say(channel, fmt.Sprint(i))
			time.Sleep(time.Second)
		}
		for _, c := range []struct {
			prefix string
			since  time.Duration
			limit  int
			want   []string
		}{
			{"/", time.Hour, 0, []string{"0", "1", "2", "3", "4"}},
			{"/apps/shop", time.Hour, 0, []string{"0", "1", "4"}},
			{"/apps/shop/", time.Hour, 2, []string{"1", "4"}},
			{"", 2500 * time.Millisecond, 0, []string{"3", "4"}},
			{"/nothing", time.Hour, 0, nil},
		} {
			for _, nd := range g.nodes {
				if got := messages(nd.List(c.prefix, time.Now().Add(-c.since), c.limit)); !slices.Equal(got, c.want) {
					t.Errorf("node %d: %+v: %v", nd.i, c, got)
				}
			}
		}
	})
}

func TestLostPushesAreRepairedInOrder(t *testing.T) {
	inGrove(t, 5, func(t *testing.T, g *grove) {
		rng := rand.New(rand.NewPCG(5, 5))
		n := 0
		for range 30 {
			for _, nd := range g.nodes {
				nd.say("/x", fmt.Sprint(n))
				n++
			}
			time.Sleep(time.Duration(rng.IntN(300)) * time.Millisecond)
			switch rng.IntN(4) {
			case 0:
				g.net.Isolate(simID(rng.IntN(5)))
			case 1:
				g.net.Cut(simID(rng.IntN(5)), simID(rng.IntN(5)), rng.IntN(2) == 0)
			case 2:
				g.net.Heal()
			}
		}
		g.net.Heal()
		eventually(t, 2*time.Minute, "all events everywhere", func() bool {
			return !slices.ContainsFunc(g.nodes, func(nd *simNode) bool { return len(nd.said()) != n })
		})
		for _, nd := range g.nodes {
			inOrder(t, nd.said())
			if len(nd.List("/x", time.Time{}, 0)) != n {
				t.Errorf("node %d lists %d", nd.i, len(nd.List("/x", time.Time{}, 0)))
			}
			if nd.Status().GivenUp > 0 {
				t.Errorf("node %d gave up", nd.i)
			}
		}
		// Then silence: a comparison is a digest.
		before, bytes := g.nodes[0].end.Sent()
		time.Sleep(100 * time.Second)
		after, now := g.nodes[0].end.Sent()
		if after-before > 100 || now-bytes > 5000 {
			t.Errorf("%d writes, %d bytes in 100 idle seconds", after-before, now-bytes)
		}
	})
}

func TestANewNodeAndOneThatWasAwayCatchUp(t *testing.T) {
	inGrove(t, 4, func(t *testing.T, g *grove) {
		g.net.Kill(simID(3))
		g.nodes[3].stop()
		for i := range 600 {
			g.nodes[i%3].say("/x", fmt.Sprint(i))
			if i%100 == 0 {
				time.Sleep(10 * time.Millisecond)
			}
		}
		g.nodes[3].start(g)
		eventually(t, 30*time.Second, "the node caught up", func() bool { return len(g.nodes[3].said()) == 600 })
		inOrder(t, g.nodes[3].said())
		// The whole history survives a restart, and is not told again.
		time.Sleep(time.Minute)
		g.nodes[3].stop()
		g.nodes[3].start(g)
		time.Sleep(time.Minute)
		if n := len(g.nodes[3].List("/", time.Time{}, 0)); n != 600 || len(g.nodes[3].said()) != 0 {
			t.Errorf("%d listed, %d told again", n, len(g.nodes[3].said()))
		}
		// A new boot counts from one again, and is another origin.
		g.nodes[3].say("/x", "back")
		time.Sleep(time.Second)
		if got := messages(g.nodes[0].List("/x", time.Time{}, 1)); !slices.Equal(got, []string{"back"}) {
			t.Errorf("%v", got)
		}
	})
}

func TestACrashLosesNothingThatOthersHave(t *testing.T) {
	inGrove(t, 3, func(t *testing.T, g *grove) {
		for i := range 50 {
			g.nodes[0].say("/x", fmt.Sprint(i))
		}
		time.Sleep(10 * time.Millisecond)
		a := g.nodes[0]
		after := a.fs.CrashClone(vfs.CrashCloneCfg{})
		g.net.Kill(a.id)
		a.stop()
		a.fs = after
		a.start(g)
		eventually(t, 20*time.Second, "its own events are back", func() bool { return len(a.List("/x", time.Time{}, 0)) == 50 })
	})
}

func TestTheHistoryIsBoundedAndTheLastValueStays(t *testing.T) {
	inGrove(t, 4, func(t *testing.T, g *grove) {
		g.nodes[3].say("/quiet", "said once") // and node 3 says nothing else: its only event leaves the history
		for i := range 1000 {
			g.nodes[i%2].say("/loud", fmt.Sprint(i))
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Minute)
		for _, nd := range g.nodes {
			if st := nd.Status(); st.Kept != 100 || st.Channels != 2 {
				t.Errorf("node %d: %+v", nd.i, st)
			}
			if got := messages(nd.Last("/quiet")); !slices.Equal(got, []string{"said once"}) {
				t.Errorf("node %d: last %v", nd.i, got)
			}
			if got := messages(nd.List("/", time.Time{}, 1)); !slices.Equal(got, []string{"999"}) {
				t.Errorf("node %d: newest %v", nd.i, got)
			}
			nd.stop()
			nd.start(g)
			if got := messages(nd.Last("/")); !slices.Equal(got, []string{"999", "said once"}) {
				t.Errorf("node %d: last after a restart %v", nd.i, got)
			}
		}
		// A node without history learns what there still is, and what is gone, and then is quiet.
		nd := g.nodes[2]
		nd.stop()
		nd.fs = vfs.NewCrashableMem()
		nd.start(g)
		eventually(t, time.Minute, "the rest of the history", func() bool { return nd.Status().Kept == 100 })
		inOrder(t, nd.said())
		if len(nd.said()) != 100 || nd.Status().GivenUp != 0 {
			t.Errorf("told %d, %+v", len(nd.said()), nd.Status())
		}
		time.Sleep(time.Minute)
		_, bytes := nd.end.Sent()
		time.Sleep(time.Minute)
		if _, now := nd.end.Sent(); now-bytes > 3000 {
			t.Errorf("%d bytes in an idle minute: the nodes never agree", now-bytes)
		}
	}, func(c *Config) { c.Keep = 100 })
}

func TestGossipInALargeCluster(t *testing.T) {
	inGrove(t, 50, func(t *testing.T, g *grove) {
		for i := range 20 {
			g.nodes[i].say("/x", fmt.Sprint(i))
			time.Sleep(50 * time.Millisecond)
		}
		all := func() bool {
			return !slices.ContainsFunc(g.nodes, func(nd *simNode) bool { return len(nd.said()) != 20 })
		}
		eventually(t, time.Minute, "everyone knows everything", all)
	})
}

func TestPublishNeverBlocksAndOverflowIsCounted(t *testing.T) {
	inGrove(t, 1, func(t *testing.T, g *grove) {
		a := g.nodes[0]
		release := make(chan struct{})
		a.Subscribe("/", func(Event) { <-release })
		began := time.Now()
		for i := range 100 * queueDefault {
			a.say("/x", fmt.Sprint(i))
		}
		if took := time.Since(began); took > 0 {
			t.Errorf("publishing took %v", took)
		}
		time.Sleep(time.Second)
		st := a.Status()
		if st.Published+st.Overflow != 100*queueDefault || st.Overflow == 0 {
			t.Errorf("%+v", st)
		}
		close(release)
	})
}

func TestGarbageAndLiesAreDropped(t *testing.T) {
	inGrove(t, 2, func(t *testing.T, g *grove) {
		b := g.nodes[1]
		for _, w := range []*wirev1.Event{
			{},
			{Origin: []byte("x"), Counter: 0, Channel: "/x"},
			{Origin: []byte("x"), Counter: 1, Channel: "no slash"},
			{Origin: []byte("x"), Counter: 1, Channel: "/x", Message: strings.Repeat("x", maxWire)},
			{Origin: []byte(b.id), Boot: b.boot, Counter: 77, Channel: "/x", Message: "you never said that"},
		} {
			if _, err := b.accept([]*wirev1.Event{w}, simID(0)); err != nil {
				t.Fatal(err)
			}
		}
		if st := b.Status(); st.Invalid != 5 || st.Kept != 0 {
			t.Errorf("%+v", st)
		}
		// One event far ahead of the rest waits, then is told.
		if _, err := b.accept([]*wirev1.Event{{Origin: []byte("y"), Counter: 9, Channel: "/x", Message: "far"}}, simID(0)); err != nil {
			t.Fatal(err)
		}
		if len(b.List("/x", time.Time{}, 0)) != 1 || len(b.said()) != 0 {
			t.Error("listed at once, told later")
		}
		eventually(t, 30*time.Second, "the gap is given up", func() bool { return len(b.said()) == 1 })
	})
}

func FuzzWireEvent(f *testing.F) {
	ev := Event{Channel: "/a/b", Time: time.Unix(1, 0), Message: "m", Fields: map[string]string{"k": "v"}}
	w := ev.wire()
	w.Origin, w.Counter = []byte("x"), 1
	b, err := proto.Marshal(w)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		w := &wirev1.Event{}
		if proto.Unmarshal(b, w) != nil || check(w) != nil {
			return
		}
		if ev := fromWire(w); ev.Channel != CleanChannel(ev.Channel) {
			t.Errorf("channel %q", ev.Channel)
		}
	})
}

func FuzzClean(f *testing.F) {
	f.Add("/a//b/")
	f.Add("\xff/" + strings.Repeat("é", 200))
	f.Fuzz(func(t *testing.T, s string) {
		ev := Event{Channel: s, Message: s, Fields: map[string]string{s: s}}
		w := ev.wire()
		w.Origin, w.Counter = []byte("x"), 1
		if err := check(w); err != nil {
			t.Error(err)
		}
		if _, err := proto.Marshal(w); err != nil {
			t.Error(err)
		}
	})
}
