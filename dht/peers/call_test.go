package peers

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

const shout = "/test/shout/1"

type message = wirev1.Failure // any message with a string will do

func serveShout(e *Endpoint) *CallServer {
	return ServeCalls(e, shout, func() *message { return &message{} },
		func(ctx context.Context, from peer.ID, req *message) (*message, error) {
			switch {
			case req.GetMessage() == "refuse":
				return nil, Fail(wirev1.Failure_FENCED, "%s is not the owner", from)
			case req.GetMessage() == "fail":
				return nil, errors.New("broken \xff")
			case req.GetMessage() == "hang":
				<-ctx.Done()
				return nil, ctx.Err()
			case req.GetMessage() == "huge":
				return &message{Message: strings.Repeat("x", MaxMessage+1)}, nil
			case strings.HasPrefix(req.GetMessage(), "slow"):
				time.Sleep(10 * time.Millisecond)
			}
			return &message{Message: strings.ToUpper(req.GetMessage())}, nil
		})
}

func callWorld(t *testing.T, f func(t *testing.T, n *Net, at map[peer.ID]*Endpoint, c *Caller, v *CallServer)) {
	world(t, two, func(t *testing.T, n *Net, at map[peer.ID]*Endpoint) {
		v := serveShout(at["b"])
		c := NewCaller(at["a"])
		defer c.Close()
		f(t, n, at, c, v)
	})
}

func ask(ctx context.Context, c *Caller, text string) (string, error) {
	var resp message
	err := c.Call(ctx, "b", shout, &message{Message: text}, &resp)
	return resp.GetMessage(), err
}

func TestCallsShareOneStreamAndOneRoundTrip(t *testing.T) {
	callWorld(t, func(t *testing.T, n *Net, _ map[peer.ID]*Endpoint, c *Caller, v *CallServer) {
		if got, err := ask(t.Context(), c, "first"); got != "FIRST" || err != nil {
			t.Fatal(got, err)
		}
		for range 10 {
			start := time.Now()
			if got, err := ask(t.Context(), c, "hello"); got != "HELLO" || err != nil {
				t.Fatal(got, err)
			}
			if d := time.Since(start); d != 2*DefaultDelay {
				t.Errorf("a warm call took %v", d)
			}
		}
		if s := c.Stats(); s.Reused != 10 || s.Retried != 0 || s.Failed != 0 {
			t.Errorf("stats %+v", s)
		}
		time.Sleep(3 * idleTime)
		c.mu.Lock()
		defer c.mu.Unlock()
		if len(c.lanes) != 0 || c.reaper != nil {
			t.Error("idle streams are kept for ever")
		}
	})
}

func TestFailuresKeepTheirCodeAndTheStream(t *testing.T) {
	callWorld(t, func(t *testing.T, _ *Net, _ map[peer.ID]*Endpoint, c *Caller, _ *CallServer) {
		for text, code := range map[string]wirev1.Failure_Code{
			"refuse": wirev1.Failure_FENCED, "fail": wirev1.Failure_INTERNAL, "huge": wirev1.Failure_INTERNAL,
		} {
			if _, err := ask(t.Context(), c, text); CodeOf(err) != code {
				t.Errorf("%s: %v, want a RemoteError with %v", text, err, code)
			}
		}
		if _, err := ask(t.Context(), c, strings.Repeat("x", MaxMessage)); !errors.Is(err, errMessageSize) {
			t.Errorf("a request too large: %v", err)
		}
		big := strings.Repeat("x", MaxMessage-16)
		if got, err := ask(t.Context(), c, big); err != nil || got != strings.ToUpper(big) {
			t.Errorf("a message of the largest size: %v", err)
		}
		if s := c.Stats(); s.Reused != 4 {
			t.Errorf("stats %+v: failures ended the stream", s)
		}
	})
}

func TestDeadlineAndCancellationReachTheHandler(t *testing.T) {
	callWorld(t, func(t *testing.T, n *Net, _ map[peer.ID]*Endpoint, c *Caller, v *CallServer) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		start := time.Now()
		if _, err := ask(ctx, c, "hang"); err == nil || time.Since(start) > time.Second+time.Millisecond {
			t.Errorf("%v after %v", err, time.Since(start))
		}
		ctx, cancel = context.WithCancel(t.Context())
		time.AfterFunc(50*time.Millisecond, cancel)
		if _, err := ask(ctx, c, "hang"); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled call: %v", err)
		}
		time.Sleep(10 * time.Millisecond)
		if got := v.Stats().Served; got != 2 {
			t.Errorf("%d handlers ended, want both", got)
		}
		start = time.Now()
		n.Freeze("b")
		ctx, cancel = context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		if _, err := ask(ctx, c, "x"); !errors.Is(err, context.DeadlineExceeded) || time.Since(start) != 300*time.Millisecond {
			t.Errorf("call of a frozen node: %v after %v", err, time.Since(start))
		}
	})
}

func TestStaleStreamIsRetriedOnce(t *testing.T) {
	callWorld(t, func(t *testing.T, n *Net, at map[peer.ID]*Endpoint, c *Caller, _ *CallServer) {
		if _, err := ask(t.Context(), c, "x"); err != nil {
			t.Fatal(err)
		}
		n.Kill("b")
		serveShout(n.Join("b"))
		if got, err := ask(t.Context(), c, "y"); got != "Y" || err != nil {
			t.Fatalf("after a restart: %q, %v", got, err)
		}
		if s := c.Stats(); s.Retried != 1 {
			t.Errorf("stats %+v", s)
		}
		n.Kill("b")
		if _, err := ask(t.Context(), c, "z"); !errors.Is(err, ErrUnreachable) {
			t.Errorf("call of a dead node: %v", err)
		}
	})
}

// A caller that must know whether an earlier copy may have arrived is told that the pooled stream was stale, and goes on with a fresh one.
func TestOnceIsNeverSentAgain(t *testing.T) {
	callWorld(t, func(t *testing.T, n *Net, _ map[peer.ID]*Endpoint, c *Caller, _ *CallServer) {
		if _, err := ask(t.Context(), c, "x"); err != nil {
			t.Fatal(err)
		}
		n.Kill("b")
		serveShout(n.Join("b"))
		var resp message
		if err := c.Once(t.Context(), "b", shout, &message{Message: "y"}, &resp); err == nil {
			t.Errorf("answered with %q", resp.GetMessage())
		}
		if err := c.Once(t.Context(), "b", shout, &message{Message: "z"}, &resp); err != nil || resp.GetMessage() != "Z" {
			t.Errorf("%q, %v", resp.GetMessage(), err)
		}
		if s := c.Stats(); s.Retried != 0 {
			t.Errorf("%+v", s)
		}
	})
}

func TestManyCallsAreBounded(t *testing.T) {
	callWorld(t, func(t *testing.T, _ *Net, _ map[peer.ID]*Endpoint, c *Caller, v *CallServer) {
		var wg sync.WaitGroup
		var most atomic.Int64
		for range 1000 {
			wg.Go(func() {
				if _, err := ask(t.Context(), c, "slow"); err != nil {
					t.Error(err)
				}
				v.mu.Lock()
				most.Store(max(most.Load(), int64(v.streams["a"])))
				v.mu.Unlock()
			})
		}
		wg.Wait()
		if most.Load() > maxCalls {
			t.Errorf("%d streams at once", most.Load())
		}
		synctest.Wait()
		c.mu.Lock()
		defer c.mu.Unlock()
		if n := len(c.lanes[laneKey{"b", shout}].idle); n != maxIdle {
			t.Errorf("%d streams are pooled, want %d", n, maxIdle)
		}
	})
}

func TestGarbageIsResetAndCounted(t *testing.T) {
	callWorld(t, func(t *testing.T, _ *Net, at map[peer.ID]*Endpoint, c *Caller, v *CallServer) {
		for _, garbage := range [][]byte{
			bytes.Repeat([]byte{0xff}, 20),                // a length without an end
			binary.AppendUvarint([]byte{5}, MaxMessage+1), // too long
			{0, 1, 2}, // waits 0 ms
			append([]byte{5, 4}, 0xff, 0xff, 0xff, 0xff),            // no message
			binary.AppendUvarint(nil, uint64(maxTimeout/1000000)+1), // waits too long
		} {
			s, err := at["a"].Open(t.Context(), "b", shout)
			if err != nil {
				t.Fatal(err)
			}
			say(t, s, string(garbage))
			if _, err := s.Read(make([]byte, 1)); err == nil || errors.Is(err, io.EOF) {
				t.Errorf("%x: read %v, want a reset", garbage, err)
			}
		}
		synctest.Wait()
		if got := v.Stats().Garbage; got != 5 {
			t.Errorf("%d streams counted as garbage", got)
		}
		if got, err := ask(t.Context(), c, "x"); got != "X" || err != nil {
			t.Error(got, err)
		}
		var open []Stream
		for range maxServed + 1 {
			s, err := at["a"].Open(t.Context(), "b", shout)
			if err != nil {
				t.Fatal(err)
			}
			open = append(open, s)
		}
		time.Sleep(time.Second)
		if got := v.Stats().Refused; got == 0 {
			t.Error("a peer may open streams without a bound")
		}
		for _, s := range open {
			_ = s.Reset()
		}
	})
}

func TestACallerThatMeetsGarbageSaysSo(t *testing.T) {
	world(t, two, func(t *testing.T, _ *Net, at map[peer.ID]*Endpoint) {
		at["b"].Handle(shout, func(_ peer.ID, s Stream) {
			_, _ = s.Write([]byte{9, 1, 1})
			_, _ = io.Copy(io.Discard, s)
			_ = s.Reset()
		})
		c := NewCaller(at["a"])
		defer c.Close()
		if _, err := ask(t.Context(), c, "x"); !errors.Is(err, errGarbage) {
			t.Errorf("%v", err)
		}
	})
}

func FuzzRequest(f *testing.F) {
	good, err := appendRequest(nil, time.Second, &message{Message: "x"})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add(bytes.Repeat([]byte{0xff}, 20))
	f.Add([]byte{5, 0xff, 0xff, 0xff, 3})
	f.Fuzz(func(t *testing.T, b []byte) {
		timeout, body, err := readRequest(bufio.NewReader(bytes.NewReader(b)), nil)
		if err == nil && (timeout <= 0 || timeout > maxTimeout || len(body) > len(b)) {
			t.Fatalf("%v, %d bytes of %d", timeout, len(body), len(b))
		}
	})
}

func FuzzAnswer(f *testing.F) {
	f.Add(byte(statusReply), []byte{8, 1})
	f.Add(byte(statusFailure), []byte{8, 77})
	f.Fuzz(func(t *testing.T, status byte, b []byte) {
		err := decodeAnswer(status, b, &message{})
		if status > statusFailure && err == nil {
			t.Fatal("accepted an unknown status")
		}
		if status == statusFailure && err == nil {
			t.Fatal("a failure was taken for a reply")
		}
	})
}

var _ proto.Message = (*message)(nil)
