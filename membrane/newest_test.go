package membrane

import (
	"bufio"
	"context"
	"net/http"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/coppice-project/coppice/components/runner/runnertest"
)

// With each-call a message of a stream is not given before everything is committed that it may depend on, and the same goes for server-sent events: what a reader
// sees is not taken back by the death of the machine.
func TestMessagesOfAStreamWaitForTheirMarks(t *testing.T) {
	w := newWorld(t)
	m := w.serve(Config{})
	m.SetDurable(true)
	ctx := within(t, 20*time.Second)
	echo, err := w.r.Conn("test/counter", "").NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, runnertest.Echo)
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan int64, 10)
	go func() {
		for {
			var out wrapperspb.Int64Value
			if echo.RecvMsg(&out) != nil {
				return
			}
			got <- out.GetValue()
		}
	}()
	say := func(v int64) {
		t.Helper()
		if err := echo.SendMsg(wrapperspb.Int64(v)); err != nil {
			t.Fatal(err)
		}
	}
	hears := func(v int64) {
		t.Helper()
		select {
		case x := <-got:
			if x != v {
				t.Fatalf("heard %d, want %d", x, v)
			}
		case <-ctx.Done():
			t.Fatalf("%d did not come", v)
		}
	}
	say(1) // nothing has been written: nothing to wait for
	hears(1)
	answered := make(chan error, 1)
	go func() { _, err := addVia(ctx, w.r, 1); answered <- err }()
	eventually(t, "the write waits for its commit", func() bool { return m.Stats().Waiting == 1 })
	say(2)
	eventually(t, "so does the message that may have seen it", func() bool { return m.Stats().Waiting == 2 })

	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://component/events", nil)
	if err != nil {
		t.Fatal(err)
	}
	line := make(chan string, 1)
	go func() {
		resp, err := (&gateTransport{m}).RoundTrip(req)
		if err != nil {
			line <- err.Error()
			return
		}
		defer resp.Body.Close()
		text, _ := bufio.NewReader(resp.Body).ReadString('\n')
		line <- text
	}()
	eventually(t, "and the event", func() bool { return m.Stats().Waiting == 3 })
	select {
	case x := <-got:
		t.Fatalf("message %d was given before its commit", x)
	case x := <-line:
		t.Fatalf("event %q was given before its commit", x)
	case err := <-answered:
		t.Fatalf("the call was answered before its commit: %v", err)
	default:
	}
	m.Backend().SetCommitted(1)
	hears(2)
	if x := <-line; x != "data: 0\n" {
		t.Errorf("the event says %q", x)
	}
	if err := <-answered; err != nil {
		t.Error(err)
	}
	m.SetDurable(false)
	if _, err := addVia(ctx, w.r, 1); err != nil {
		t.Fatal(err)
	}
	say(3) // answers do not wait, and neither do messages
	hears(3)
	if n := m.Backend().Unsaved(); n != 1 {
		t.Errorf("%d changes are not in a checkpoint, want 1", n)
	}
	m.Backend().SetCommitted(2)
	if n := m.Backend().Unsaved(); n != 0 {
		t.Errorf("%d changes are not in a checkpoint, want none", n)
	}
}

// Those who want to know the newest mark share questions, but none is given the answer to one that was asked before.
func TestTheNewestMarkIsNotOlderThanItsQuestion(t *testing.T) {
	w := newWorld(t)
	m := w.serve(Config{})
	load := startLoad(t, 4, func(ctx context.Context) error { _, err := addVia(ctx, w.r, 1); return err })
	defer load.end(t)
	for range 200 {
		if _, err := addVia(t.Context(), w.r, 1); err != nil {
			t.Fatal(err)
		}
		before := m.Backend().unsaved.mark.Load()
		mark, err := m.Backend().newestMark(t.Context())
		if err != nil || mark < before {
			t.Fatalf("the newest mark is %d (%v), an answer had %d before", mark, err, before)
		}
	}
}
