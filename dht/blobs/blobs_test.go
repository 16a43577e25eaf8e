package blobs

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

var ctx = context.Background()

func TestStreamsOfAllSizes(t *testing.T) {
	inGrove(t, 1, func(t *testing.T, g *grove) {
		n := g.nodes[0]
		for _, size := range []int{0, 1, pageSize - 1, pageSize, pageSize + 1, fanOut * pageSize, fanOut*pageSize + 1, 3*fanOut*pageSize + 5} {
			b := content(uint64(size), size)
			l := n.write(b)
			n.mustRead(l.Hash, b)
			if again := n.write(b); again != l {
				t.Errorf("%d bytes: two roots for the same bytes", size)
			}
			if !n.Complete(l.Hash) {
				t.Errorf("%d bytes: not complete", size)
			}
		}
	})
}

func TestAChangeInPlaceCostsFewPages(t *testing.T) {
	inGrove(t, 2, func(t *testing.T, g *grove) {
		a, b := g.nodes[0], g.nodes[1]
		state := content(1, 6<<20)
		l := a.write(state)
		if _, err := a.Push(ctx, l.Hash, g.ids(1), 1); err != nil {
			t.Fatal(err)
		}
		before := a.Usage().NodesSent
		copy(state[3<<20:], content(2, len(state)/100))
		l = a.write(state)
		if _, err := a.Push(ctx, l.Hash, g.ids(1), 1); err != nil {
			t.Fatal(err)
		}
		b.mustRead(l.Hash, state)
		if sent := a.Usage().NodesSent - before; sent > 12 {
			t.Errorf("1 %% changed in place: %d nodes sent, want about 6 pages and 3 trees", sent)
		}
	})
}

func TestPushIsAckedByHoldersThatSurviveACrash(t *testing.T) {
	inGrove(t, 3, func(t *testing.T, g *grove) {
		a := g.nodes[0]
		for i, size := range []int{100, 40 << 10, 3 << 20} {
			b := content(uint64(i), size)
			l := a.write(b)
			acked, err := a.Push(ctx, l.Hash, g.ids(0, 1, 2), 3)
			if err != nil || len(acked) != 3 {
				t.Fatalf("%d bytes: %v acked, %v", size, acked, err)
			}
			// Power loss right after the acknowledgement.
			for _, nd := range g.nodes[1:] {
				nd.crash(g)
				if !nd.Complete(l.Hash) {
					t.Errorf("%d bytes: %s acknowledged and lost it", size, nd.id)
				}
				nd.mustRead(l.Hash, b)
			}
		}
	})
}

func TestPutIsDurable(t *testing.T) {
	inGrove(t, 1, func(t *testing.T, g *grove) {
		n := g.nodes[0]
		l := n.put(Node{Kind: "x", Data: []byte("here to stay")})
		n.crash(g)
		if got, err := n.Get(l.Hash); err != nil || string(got.Data) != "here to stay" {
			t.Fatalf("after the crash: %q, %v", got.Data, err)
		}
	})
}

// A chain of deltas, as a journal makes it: each push is one message to a peer, whatever the chain's length.
func TestChainOfDeltasCostsOneMessageEach(t *testing.T) {
	inGrove(t, 3, func(t *testing.T, g *grove) {
		a := g.nodes[0]
		tip := a.write(content(1, 300<<10))
		if _, err := a.Push(ctx, tip.Hash, g.ids(1, 2), 2); err != nil {
			t.Fatal(err)
		}
		const deltas = 1000
		sent := a.Usage().NodesSent
		writes, _ := a.end.Sent()
		began := time.Now()
		for i := range deltas {
			l, acked, err := a.PutPush(ctx, Node{Kind: "delta", Links: []Link{tip}, Data: fmt.Appendf(nil, "%d", i)}, g.ids(0, 1, 2), 3)
			if err != nil || len(acked) != 3 {
				t.Fatalf("delta %d: %v, %v", i, acked, err)
			}
			tip = l
		}
		if n := a.Usage().NodesSent - sent; n != 2*deltas {
			t.Errorf("%d nodes sent for %d deltas to two peers", n, deltas)
		}
		now, _ := a.end.Sent()
		if n := now - writes; n > 2*deltas+10 {
			t.Errorf("%d writes for %d deltas to two peers", n, deltas)
		}
		if took := time.Since(began); took > deltas*600*time.Microsecond {
			t.Errorf("%v for %d deltas over a network with a round trip of 500 us", took, deltas)
		}
		if n := g.nodes[1].Usage().Pins; n > 20 {
			t.Errorf("%d pins at a holder: a chain should hold one", n)
		}
		// A third holder that has nothing gets the whole chain in few round trips.
		late := g.nodes[1]
		late.crash(g)
		if !late.Complete(tip.Hash) {
			t.Error("the chain did not survive")
		}
	})
}

func TestAChainReachesANewHolderInFewRoundTrips(t *testing.T) {
	inGrove(t, 2, func(t *testing.T, g *grove) {
		a := g.nodes[0]
		tip := a.put(Node{Kind: "base", Data: []byte("base")})
		for i := range 1000 {
			tip = a.put(Node{Kind: "delta", Links: []Link{tip}, Data: fmt.Appendf(nil, "%d", i)})
		}
		g.net.SetDelay(func(_, _ peer.ID) time.Duration { return 20 * time.Millisecond })
		began := time.Now()
		if _, err := a.Push(ctx, tip.Hash, g.ids(1), 1); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(began); took > 15*40*time.Millisecond {
			t.Errorf("took %v, more than 15 round trips", took)
		}
	})
}

func TestPipelinedPushesInFlight(t *testing.T) {
	inGrove(t, 3, func(t *testing.T, g *grove) {
		a := g.nodes[0]
		g.net.SetDelay(func(_, _ peer.ID) time.Duration { return 10 * time.Millisecond })
		tip := a.put(Node{Kind: "base"})
		if _, err := a.Push(ctx, tip.Hash, g.ids(1, 2), 2); err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		var wg sync.WaitGroup
		for i := range 200 {
			tip = a.put(Node{Kind: "delta", Links: []Link{tip}, Data: fmt.Appendf(nil, "%d", i)})
			root := tip.Hash
			wg.Go(func() {
				if acked, err := a.Push(ctx, root, g.ids(1, 2), 2); err != nil || len(acked) != 2 {
					t.Errorf("delta %d: %v, %v", i, acked, err)
				}
			})
		}
		wg.Wait()
		if took := time.Since(began); took > 200*time.Millisecond {
			t.Errorf("200 pushes took %v: they wait for each other", took)
		}
	})
}

func TestPushReturnsAtWAndTheRestFollows(t *testing.T) {
	inGrove(t, 3, func(t *testing.T, g *grove) {
		a := g.nodes[0]
		l := a.write(content(3, 100<<10))
		g.net.Freeze(simID(2))
		began := time.Now()
		acked, err := a.Push(ctx, l.Hash, g.ids(0, 1, 2), 2)
		if err != nil || !slices.Equal(slices.Sorted(slices.Values(acked)), g.ids(0, 1)) {
			t.Fatalf("acked %v, %v", acked, err)
		}
		if took := time.Since(began); took > 20*time.Millisecond {
			t.Errorf("a frozen third holder cost %v", took)
		}
		if a.Usage().Background != 1 {
			t.Errorf("%d in the background", a.Usage().Background)
		}
		time.Sleep(time.Second)
		g.net.Thaw(simID(2))
		eventually(t, 5*time.Second, "the late acknowledgement", func() bool { return slices.Equal(a.lateAcks(), g.ids(2)) })
		if a.Usage().Background != 0 {
			t.Errorf("%d still in the background", a.Usage().Background)
		}
	})
}

func TestPushFailsFastAndHonestly(t *testing.T) {
	inGrove(t, 4, func(t *testing.T, g *grove) {
		a := g.nodes[0]
		l := a.write(content(3, 100<<10))
		// Killed: refused at once.
		g.net.Kill(simID(1))
		began := time.Now()
		acked, err := a.Push(ctx, l.Hash, g.ids(0, 1, 2), 3)
		var pe *PushError
		if !errors.As(err, &pe) || len(pe.Failed) != 1 || pe.Failed[simID(1)] == nil || len(acked) != 2 {
			t.Fatalf("acked %v, %v", acked, err)
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("a killed holder cost %v", took)
		}
		// A disk that is low: refused by name, whatever the way.
		g.nodes[3].low.Store(true)
		for _, root := range []Hash{l.Hash, a.put(Node{Kind: "small"}).Hash} {
			if _, err = a.Push(ctx, root, g.ids(3), 1); !errors.As(err, &pe) || !errors.Is(pe.Failed[simID(3)], ErrFull) {
				t.Errorf("low disk: %v", err)
			}
			if ok, err := g.nodes[3].Has(root); ok || err != nil {
				t.Errorf("a full holder kept a node (%v)", err)
			}
		}
		// Silent, then confirmed dead by the watchers.
		g.net.Freeze(simID(2))
		go func() {
			time.Sleep(100 * time.Millisecond)
			a.PeerDown(simID(2))
		}()
		tctx, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
		defer cancel()
		if _, err = a.Push(tctx, a.put(Node{Kind: "other"}).Hash, g.ids(2), 1); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("silent holder: %v", err)
		}
		// What is not here cannot be pushed.
		if _, err := a.Push(ctx, Hash{1}, g.ids(3), 1); err == nil {
			t.Error("pushed what is not here")
		}
	})
}

func TestFetchFromSeveralWithAHolderKilledMidWay(t *testing.T) {
	inGrove(t, 4, func(t *testing.T, g *grove) {
		a := g.nodes[0]
		b := content(9, 2<<20)
		l := a.write(b)
		if _, err := a.Push(ctx, l.Hash, g.ids(1, 2), 2); err != nil {
			t.Fatal(err)
		}
		n := g.nodes[3]
		go func() {
			for n.Usage().NodesReceived < 30 {
				time.Sleep(100 * time.Microsecond)
			}
			g.net.Kill(simID(1))
		}()
		if err := n.Fetch(ctx, l.Hash, g.ids(0, 1, 2)); err != nil {
			t.Fatal(err)
		}
		n.crash(g)
		n.mustRead(l.Hash, b)
		if got := n.Usage().NodesReceived; got != 0 {
			t.Errorf("%d nodes came again", got)
		}
	})
}

func TestFetchResumesAndAsksOthersForWhatOneLacks(t *testing.T) {
	inGrove(t, 3, func(t *testing.T, g *grove) {
		a, holder, n := g.nodes[0], g.nodes[1], g.nodes[2]
		b := content(9, 2<<20)
		l := a.write(b)
		// The second holder has only every other page.
		root, err := a.Get(l.Hash)
		if err != nil {
			t.Fatal(err)
		}
		var half []Hash
		for i, link := range root.Links {
			if i%2 == 0 {
				half = append(half, link.Hash)
			}
		}
		if err := holder.FetchPages(ctx, append(half, l.Hash), g.ids(0)); err != nil {
			t.Fatal(err)
		}
		if holder.Complete(l.Hash) {
			t.Fatal("half a state is complete")
		}
		// It alone cannot serve: the error names a node; what it had is kept.
		var missing *MissingError
		if err := n.Fetch(ctx, l.Hash, g.ids(1)); !errors.As(err, &missing) {
			t.Fatalf("fetched from half a holder: %v", err)
		}
		had := n.Usage().NodesReceived
		if err := n.Fetch(ctx, l.Hash, g.ids(1, 0)); err != nil {
			t.Fatal(err)
		}
		n.mustRead(l.Hash, b)
		if total := n.Usage().NodesReceived; had < 10 || total > uint64(len(root.Links))+had/2+80 {
			t.Errorf("%d nodes in the first go, %d in all", had, total)
		}
		if err := n.Fetch(ctx, Hash{1}, g.ids(0, 1)); !errors.As(err, &missing) || len(missing.Asked) != 2 {
			t.Errorf("a hash that nobody has: %v", err)
		}
	})
}

func TestCorruptPageIsFoundRefusedAndRepaired(t *testing.T) {
	inGrove(t, 3, func(t *testing.T, g *grove) {
		a, bad := g.nodes[0], g.nodes[1]
		b := content(4, 1<<20)
		base := a.write(b)
		tip := a.put(Node{Kind: "delta", Links: []Link{base}})
		if _, err := a.Push(ctx, tip.Hash, g.ids(1), 1); err != nil {
			t.Fatal(err)
		}
		root, err := bad.Get(base.Hash)
		if err != nil {
			t.Fatal(err)
		}
		page := root.Links[7].Hash
		if err := bad.db.Set(bad.key(dataKey, page), []byte("rot"), pebble.Sync); err != nil {
			t.Fatal(err)
		}
		// Another may still fetch from both: the rotten page is not passed on.
		if err := g.nodes[2].Fetch(ctx, base.Hash, g.ids(1, 0)); err != nil {
			t.Fatal(err)
		}
		g.nodes[2].mustRead(base.Hash, b)
		if err := bad.db.Set(bad.key(dataKey, page), []byte("rot"), pebble.Sync); err != nil {
			t.Fatal(err)
		}
		if _, err := bad.Get(page); err != nil {
			var corrupt *CorruptError
			if !errors.As(err, &corrupt) {
				t.Fatal(err)
			}
			if bad.Complete(tip.Hash) || bad.Complete(base.Hash) {
				t.Error("still complete with a corrupt page")
			}
		}
		eventually(t, 2*time.Second, "the repair", func() bool { return bad.Usage().Repaired > 0 && bad.Complete(tip.Hash) })
		bad.mustRead(base.Hash, b)
		if found, err := bad.Verify(ctx, tip.Hash); len(found) > 0 || err != nil {
			t.Errorf("verify: %v, %v", found, err)
		}
	})
}

func TestGarbageOnTheStreamEndsIt(t *testing.T) {
	inGrove(t, 2, func(t *testing.T, g *grove) {
		for _, b := range [][]byte{{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, {5, 1, 2, 3, 4, 5}, bytes.Repeat([]byte{9}, 4096)} {
			s, err := g.nodes[0].end.Open(ctx, simID(1), Protocol)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Write(b); err != nil {
				t.Fatal(err)
			}
			if err := s.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Read(make([]byte, 1)); err == nil {
				t.Error("garbage was answered")
			}
			if err := s.Close(); err != nil {
				t.Log(err)
			}
		}
		l := g.nodes[0].put(Node{Kind: "x"})
		if _, err := g.nodes[0].Push(ctx, l.Hash, g.ids(1), 1); err != nil {
			t.Errorf("after the garbage: %v", err)
		}
	})
}

func TestALyingHolderIsNotBelieved(t *testing.T) {
	inGrove(t, 3, func(t *testing.T, g *grove) {
		a, n := g.nodes[0], g.nodes[2]
		b := content(5, 300<<10)
		l := a.write(b)
		lie := Node{Kind: KindPage, Data: []byte("not what you asked for")}
		g.nodes[1].end.Handle(Protocol, func(_ peer.ID, s peers.Stream) {
			r := bufio.NewReader(s)
			for {
				ask := &wirev1.BlobAsk{}
				if readFrame(r, ask) != nil {
					break
				}
				frame, err := appendFrame(nil, &wirev1.BlobAnswer{Id: ask.GetId(), Body: &wirev1.BlobAnswer_Get{
					Get: &wirev1.BlobGetAnswer{Nodes: [][]byte{lie.encode()}},
				}})
				if err != nil {
					t.Error(err)
				}
				if _, err := s.Write(frame); err != nil {
					break
				}
			}
			if err := s.Reset(); err != nil {
				t.Log(err)
			}
		})
		var missing *MissingError
		if err := n.Fetch(ctx, l.Hash, g.ids(1)); !errors.As(err, &missing) {
			t.Errorf("from the liar alone: %v", err)
		}
		if err := n.Fetch(ctx, l.Hash, g.ids(1, 0)); err != nil {
			t.Fatal(err)
		}
		n.mustRead(l.Hash, b)
		if n.Usage().Garbage == 0 {
			t.Error("the lie went unseen")
		}
		if ok, err := n.Has(hashOf(lie.encode())); ok || err != nil {
			t.Errorf("the lie was kept (%v)", err)
		}
	})
}
