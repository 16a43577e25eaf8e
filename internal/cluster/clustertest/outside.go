package clustertest

import (
	"bufio"
	"fmt"
	"maps"
	"net"
	"slices"
	"sync"
	"testing"
	"time"
)

// Outside is a store outside of the cluster. It takes acts with a fencing token (the component lamp of internal/e2e makes them) and notes when they
// were made, those under a token smaller than one that it has seen, too.
type Outside struct {
	ln net.Listener

	mu      sync.Mutex           // guards the fields below
	first   map[uint64]time.Time // by token: when the first act with it was made, by the machine's own clock
	last    map[uint64]time.Time
	highest uint64
	refused int
}

// OpenOutside opens one behind a listener, or on loopback. It ends with the test.
func OpenOutside(t testing.TB, ln net.Listener) *Outside {
	t.Helper()
	if ln == nil {
		var err error
		if ln, err = net.Listen("tcp", "127.0.0.1:0"); err != nil {
			t.Fatal(err)
		}
	}
	o := &Outside{ln: ln, first: map[uint64]time.Time{}, last: map[uint64]time.Time{}}
	t.Cleanup(func() {
		if err := ln.Close(); err != nil {
			t.Error(err)
		}
	})
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return // closed
			}
			go o.serve(c)
		}
	}()
	return o
}

// Addr is where it is reached.
func (o *Outside) Addr() net.Addr { return o.ln.Addr() }

func (o *Outside) serve(c net.Conn) {
	defer c.Close()
	for in := bufio.NewScanner(c); in.Scan(); {
		var token uint64
		var nanos int64
		if _, err := fmt.Sscan(in.Text(), &token, &nanos); err == nil {
			o.act(token, time.Unix(0, nanos))
		}
	}
}

func (o *Outside) act(token uint64, at time.Time) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if token < o.highest {
		o.refused++
	}
	o.highest = max(o.highest, token)
	if first, ok := o.first[token]; !ok || at.Before(first) {
		o.first[token] = at
	}
	if at.After(o.last[token]) {
		o.last[token] = at
	}
}

// Token is the greatest that it has seen.
func (o *Outside) Token() uint64 {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.highest
}

// Handover is how one token followed another.
type Handover struct {
	From, To uint64
	Gap      time.Duration // from the last act under From to the first one under To; not above zero: both acted at once
}

func (h Handover) String() string {
	return fmt.Sprintf("token %d.%d acted until %s before token %d.%d began", h.From>>32, h.From&(1<<32-1), h.Gap.Round(time.Millisecond), h.To>>32, h.To&(1<<32-1))
}

// Handovers lists them in the order of the tokens.
func (o *Outside) Handovers() []Handover {
	o.mu.Lock()
	defer o.mu.Unlock()
	var out []Handover
	tokens := slices.Sorted(maps.Keys(o.first))
	for i := 1; i < len(tokens); i++ {
		a, b := tokens[i-1], tokens[i]
		out = append(out, Handover{a, b, o.first[b].Sub(o.last[a])})
	}
	return out
}

// Check fails the test if acts under a greater token were made before the last one under a smaller token.
func (o *Outside) Check(t testing.TB) {
	t.Helper()
	for _, h := range o.Handovers() {
		t.Log(h)
		if h.Gap <= 0 {
			t.Errorf("acts under token %d began %s before the last one under token %d", h.To, -h.Gap, h.From)
		}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	t.Logf("%d acts reached the store late and were refused by their token", o.refused)
}
