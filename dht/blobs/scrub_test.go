package blobs

import (
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/cockroachdb/pebble/v2"
)

// What rots on the disk is found although nobody asks for it, told once, and repaired from another node: within two passes at most, wherever it lies in the order.
func TestScrubbingFindsWhatNobodyReads(t *testing.T) {
	for _, seed := range []uint64{0, 2} {
		var mu sync.Mutex // guards told
		var told []Hash
		inGrove(t, 2, func(t *testing.T, g *grove) {
			a, bad := g.nodes[0], g.nodes[1]
			state := content(4, 2<<20)
			base := a.write(state)
			tip := a.put(Node{Kind: "delta", Links: []Link{base}})
			if _, err := a.Push(ctx, tip.Hash, g.ids(1), 1); err != nil {
				t.Fatal(err)
			}
			live := func() []Hash { return []Hash{tip.Hash} }
			a.SetLive(live)
			bad.SetLive(live)
			pages := leaves(t, bad, base.Hash)
			rotten, lost := pages[7], pages[100]
			if err := bad.db.Set(bad.key(dataKey, rotten), []byte("rot"), pebble.Sync); err != nil {
				t.Fatal(err)
			}
			for _, kind := range []byte{headKey, dataKey} {
				if err := bad.db.Delete(bad.key(kind, lost), pebble.Sync); err != nil {
					t.Fatal(err)
				}
			}
			if !bad.Complete(tip.Hash) {
				t.Fatal("it knows already")
			}
			slowly(t, 5*time.Hour, "both are found", func() bool { return bad.Usage().Corrupt == 2 })
			slowly(t, time.Hour, "and repaired", func() bool { return bad.Usage().Repaired == 2 && bad.Complete(tip.Hash) })
			mu.Lock()
			if !slices.Contains(told, rotten) || !slices.Contains(told, lost) || len(told) != 2 {
				t.Errorf("told of %v, want %s and %s", told, rotten, lost)
			}
			mu.Unlock()
			slowly(t, 5*time.Hour, "a pass is complete", func() bool { return bad.Usage().Scrub.Passes > 0 && !bad.Usage().Scrub.Last.IsZero() })
			bad.mustRead(base.Hash, state)
		}, func(c *Config) {
			c.ScrubEvery = 2 * time.Hour
			if c.Self == simID(1) {
				c.Rand = func() uint64 { return seed << 62 }
				c.Corrupt = func(e *CorruptError) {
					mu.Lock()
					defer mu.Unlock()
					told = append(told, e.Hash)
				}
			}
		})
	}
}

// slowly is eventually for what takes hours.
func slowly(t *testing.T, d time.Duration, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(d); !cond(); time.Sleep(5 * time.Minute) {
		if time.Now().After(end) {
			t.Fatalf("not within %s: %s", d, what)
		}
	}
}

// leaves lists the pages below a root, in order.
func leaves(t *testing.T, n *simNode, root Hash) (out []Hash) {
	t.Helper()
	node, err := n.Get(root)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range node.Links {
		out = append(out, leaves(t, n, l.Hash)...)
	}
	if len(node.Links) == 0 {
		out = append(out, root)
	}
	return out
}

// A pass is spread over its time, and reads everything once.
func TestAScrubPassTakesItsTime(t *testing.T) {
	inGrove(t, 1, func(t *testing.T, g *grove) {
		n := g.nodes[0]
		n.put(Node{Kind: "delta", Links: []Link{n.write(content(4, 16<<20))}})
		nodes := uint64(n.Usage().Nodes)
		time.Sleep(2 * time.Hour)
		if u := n.Usage().Scrub; u.Nodes < nodes/4 || u.Nodes > 3*nodes/4 {
			t.Errorf("after half of its time %d of %d nodes were read", u.Nodes, nodes)
		}
		time.Sleep(2*time.Hour + 10*time.Minute)
		if u := n.Usage().Scrub; u.Passes != 1 || u.Nodes < nodes {
			t.Errorf("after its time: %d passes, %d of %d nodes", u.Passes, u.Nodes, nodes)
		}
	}, func(c *Config) { c.ScrubEvery = 4 * time.Hour })
}

func TestFollowing(t *testing.T) {
	var last Hash
	for i := range last {
		last[i] = 0xff
	}
	if following(Hash{31: 0xff}) != (Hash{30: 1}) || following(Hash{1}) != (Hash{0: 1, 31: 1}) || following(last) != (Hash{}) {
		t.Error(following(Hash{31: 0xff}), following(Hash{1}), following(last))
	}
}
