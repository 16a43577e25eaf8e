package peers

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
)

const echo = "/test/echo/1"

// world runs a test on a Net with two or more nodes that echo what they are sent.
func world(t *testing.T, ids []peer.ID, f func(t *testing.T, n *Net, at map[peer.ID]*Endpoint)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		n := NewNet(1)
		defer n.Close()
		at := map[peer.ID]*Endpoint{}
		for _, id := range ids {
			at[id] = n.Join(id)
			at[id].Handle(echo, serveEcho)
		}
		f(t, n, at)
	})
}

func serveEcho(_ peer.ID, s Stream) {
	if _, err := io.Copy(s, s); err != nil {
		_ = s.Reset()
		return
	}
	_ = s.Close()
}

func open(t *testing.T, e *Endpoint, to peer.ID) Stream {
	t.Helper()
	s, err := e.Open(t.Context(), to, echo)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func say(t *testing.T, s Stream, text string) {
	t.Helper()
	if _, err := s.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
}

func hear(t *testing.T, s Stream, want string) {
	t.Helper()
	b := make([]byte, len(want))
	if _, err := io.ReadFull(s, b); err != nil || string(b) != want {
		t.Fatalf("read %q, %v; want %q", b, err, want)
	}
}

var two = []peer.ID{"a", "b"}

func TestStreamsCarryBytesInOrderAfterTheDelay(t *testing.T) {
	world(t, two, func(t *testing.T, n *Net, at map[peer.ID]*Endpoint) {
		n.SetDelay(func(_, _ peer.ID) time.Duration { return 10 * time.Millisecond })
		start := time.Now()
		s := open(t, at["a"], "b")
		if d := time.Since(start); d != 40*time.Millisecond {
			t.Errorf("dialling took %v, want two round trips", d)
		}
		start = time.Now()
		big := bytes.Repeat([]byte("0123456789abcdef"), 3*Window/16)
		go func() {
			if _, err := s.Write(big); err != nil {
				t.Error(err)
			}
			if err := s.CloseWrite(); err != nil {
				t.Error(err)
			}
		}()
		got, err := io.ReadAll(s)
		if err != nil || !bytes.Equal(got, big) {
			t.Fatalf("%d bytes came back, %v; want %d", len(got), err, len(big))
		}
		if d := time.Since(start); d < 20*time.Millisecond {
			t.Errorf("echo took %v, less than a round trip", d)
		}
		_ = s.Close()
		synctest.Wait()
		n.mu.Lock()
		defer n.mu.Unlock()
		if left := len(n.conns[0].streams); left != 0 {
			t.Errorf("%d streams are kept after both sides closed", left)
		}
	})
}

func TestKillResetsAndRefusesAtOnceAndJoinRestarts(t *testing.T) {
	world(t, two, func(t *testing.T, n *Net, at map[peer.ID]*Endpoint) {
		var mu sync.Mutex
		var events []bool
		at["a"].Notify(func(id peer.ID, up bool) {
			mu.Lock()
			defer mu.Unlock()
			events = append(events, up)
		})
		s := open(t, at["a"], "b")
		say(t, s, "x")
		hear(t, s, "x")
		start := time.Now()
		n.Kill("b")
		if _, err := s.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Fatalf("reading from a killed node: %v, want a reset", err)
		}
		if o := at["a"].Probe(t.Context(), "b"); o != Refused {
			t.Errorf("probe: %v, want refused", o)
		}
		if _, err := at["a"].Open(t.Context(), "b", echo); !errors.Is(err, ErrUnreachable) {
			t.Errorf("open: %v, want unreachable", err)
		}
		if d := time.Since(start); d > 5*time.Millisecond {
			t.Errorf("learning of it took %v", d)
		}
		if _, err := at["b"].Open(t.Context(), "a", echo); !errors.Is(err, ErrUnreachable) {
			t.Errorf("the dead opened a stream: %v", err)
		}
		n.Join("b").Handle(echo, serveEcho)
		s = open(t, at["a"], "b")
		say(t, s, "again")
		hear(t, s, "again")
		synctest.Wait()
		mu.Lock()
		defer mu.Unlock()
		if !slices.Equal(events, []bool{true, false, true}) {
			t.Errorf("a was told %v, want up, down, up", events)
		}
	})
}

func TestFreezeIsSilenceAndThawDelivers(t *testing.T) {
	world(t, two, func(t *testing.T, n *Net, at map[peer.ID]*Endpoint) {
		n.SetTimeout(time.Hour)
		s := open(t, at["a"], "b")
		say(t, s, "x")
		hear(t, s, "x")
		n.Freeze("b")
		say(t, s, "while frozen")
		if err := s.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("reading from a frozen node: %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if o := at["a"].Probe(ctx, "b"); o != Silent {
			t.Errorf("probe: %v, want silent: a bare accept is no sign of life", o)
		}
		if err := s.SetWriteDeadline(time.Now().Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		if m, err := s.Write(make([]byte, 2*Window)); !errors.Is(err, os.ErrDeadlineExceeded) || m >= 2*Window {
			t.Errorf("wrote %d bytes to a frozen node, %v; want to block at the window", m, err)
		}
		n.Thaw("b")
		if err := s.SetDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		hear(t, s, "while frozen")
	})
}

func TestFrozenNodeDoesNothing(t *testing.T) {
	world(t, two, func(t *testing.T, n *Net, at map[peer.ID]*Endpoint) {
		n.SetTimeout(time.Hour)
		s := open(t, at["a"], "b")
		n.Freeze("a")
		start := time.Now()
		time.AfterFunc(time.Minute, func() { n.Thaw("a") })
		say(t, s, "x")
		if d := time.Since(start); d != time.Minute {
			t.Errorf("a frozen node wrote after %v", d)
		}
		hear(t, s, "x")
	})
}

func TestCutAndHealWithinAndAfterTheTimeout(t *testing.T) {
	world(t, two, func(t *testing.T, n *Net, at map[peer.ID]*Endpoint) {
		n.SetTimeout(10 * time.Second)
		s := open(t, at["a"], "b")
		say(t, s, "x")
		hear(t, s, "x")
		n.Cut("a", "b", true)
		say(t, s, "lost and sent again")
		if err := s.SetReadDeadline(time.Now().Add(9 * time.Second)); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Read(make([]byte, 1)); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("reading over a cut: %v", err)
		}
		if _, err := at["b"].Open(t.Context(), "c", echo); !errors.Is(err, ErrUnreachable) {
			t.Errorf("open to a stranger: %v", err)
		}
		n.Heal()
		if err := s.SetReadDeadline(time.Time{}); err != nil {
			t.Fatal(err)
		}
		hear(t, s, "lost and sent again")

		n.Cut("a", "b", true)
		start := time.Now()
		if _, err := s.Read(make([]byte, 1)); err == nil || time.Since(start) != 10*time.Second {
			t.Fatalf("the connection ended after %v: %v; want the timeout", time.Since(start), err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		time.AfterFunc(3*time.Second, n.Heal)
		if _, err := at["a"].Open(ctx, "b", echo); err != nil {
			t.Errorf("a dial that waits for the cut to heal: %v", err)
		}
	})
}

func TestOneWayCutAndIsolation(t *testing.T) {
	world(t, []peer.ID{"a", "b", "c"}, func(t *testing.T, n *Net, at map[peer.ID]*Endpoint) {
		s := open(t, at["a"], "b")
		say(t, s, "x")
		hear(t, s, "x")
		n.Cut("b", "a", false)
		say(t, s, "there")
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if o := at["a"].Probe(ctx, "b"); o != Silent {
			t.Errorf("probe over a one-way cut: %v", o)
		}
		if o := at["c"].Probe(t.Context(), "b"); o != Reached {
			t.Errorf("probe beside the cut: %v", o)
		}
		n.Heal()
		hear(t, s, "there")
		n.Isolate("b")
		if o := at["c"].Probe(t.Context(), "b"); o != Silent {
			t.Errorf("probe of an isolated node: %v", o)
		}
	})
}

func TestKilledBehindACutIsFoundOutAtHealing(t *testing.T) {
	world(t, two, func(t *testing.T, n *Net, at map[peer.ID]*Endpoint) {
		s := open(t, at["a"], "b")
		n.Cut("a", "b", true)
		n.Kill("b")
		time.Sleep(time.Second)
		if o := at["a"].Probe(t.Context(), "b"); o != Silent {
			t.Errorf("probe: %v, want silent", o)
		}
		n.Heal()
		if _, err := s.Read(make([]byte, 1)); err == nil {
			t.Error("the stream to a dead node lives")
		}
		if o := at["a"].Probe(t.Context(), "b"); o != Refused {
			t.Errorf("probe: %v, want refused", o)
		}
	})
}

func TestResetReachesTheOtherSide(t *testing.T) {
	world(t, two, func(t *testing.T, n *Net, at map[peer.ID]*Endpoint) {
		got := make(chan error, 1)
		at["b"].Handle("/test/wait/1", func(_ peer.ID, s Stream) {
			_, err := s.Read(make([]byte, 1))
			got <- err
			_ = s.Reset()
		})
		s, err := at["a"].Open(t.Context(), "b", "/test/wait/1")
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second)
		if err := s.Reset(); err != nil {
			t.Fatal(err)
		}
		if err := <-got; err == nil || errors.Is(err, io.EOF) {
			t.Errorf("the other side read %v, want a reset", err)
		}
		if s, err = at["a"].Open(t.Context(), "b", "/test/unknown/1"); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("a stream of an unknown protocol read %v, want a reset", err)
		}
	})
}

func TestLossEndsTheConnectionAfterTheTimeout(t *testing.T) {
	world(t, two, func(t *testing.T, n *Net, at map[peer.ID]*Endpoint) {
		s := open(t, at["a"], "b")
		say(t, s, "x")
		hear(t, s, "x")
		n.SetLoss(1)
		start := time.Now()
		say(t, s, "lost")
		if _, err := s.Read(make([]byte, 1)); err == nil || time.Since(start) != DefaultTimeout {
			t.Errorf("read %v after %v, want a reset at the timeout", err, time.Since(start))
		}
		n.SetLoss(0)
		s = open(t, at["a"], "b")
		say(t, s, "y")
		hear(t, s, "y")
	})
}
