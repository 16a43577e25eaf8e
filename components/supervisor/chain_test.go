package supervisor

import (
	"bytes"
	"context"
	"math/rand/v2"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/blobs"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// stored is the stored form of frames.
func stored(t *testing.T, fs ...*componentv1.StateFrame) []byte {
	t.Helper()
	var b frameBuffer
	for _, f := range fs {
		if err := b.add(f); err != nil {
			t.Fatal(err)
		}
	}
	return b.buf.Bytes()
}

func TestAChainGivesBackWhatWasWrittenInOrder(t *testing.T) {
	onBench(t, func(b *bench) {
		rng := rand.New(rand.NewPCG(5, 5))
		var want []*componentv1.StateFrame
		frame := func(mark uint64, n int) *componentv1.StateFrame {
			data := make([]byte, n)
			for i := range data {
				data[i] = byte(rng.Uint32())
			}
			f := &componentv1.StateFrame{Section: componentv1.SectionJournal, Mark: mark, Data: data, Last: true}
			want = append(want, f)
			return f
		}
		meta := func(mark uint64) *componentsv1.CheckpointMeta {
			return &componentsv1.CheckpointMeta{Instance: testInstance, Schema: 1, Mark: mark}
		}
		ctx := context.Background()
		head, err := writeBase(ctx, b.blobs[0], meta(1), bytes.NewReader(stored(t, frame(1, 300<<10), frame(1, 0), frame(1, 2<<20))), route{})
		b.must(err)
		middle := blobs.Hash{}
		upTo := 0
		for mark := uint64(2); mark < 12; mark++ {
			size := 100
			if mark == 5 {
				size = inlineFrames + 1 // too much to lie in the node
			}
			head, err = writeDelta(ctx, b.blobs[0], head, meta(mark), bytes.NewReader(stored(t, frame(mark, size))), route{})
			b.must(err)
			if mark != 11 { // the last one is put while it travels
				b.must(head.keep(b.blobs[0]))
			}
			if mark == 6 {
				middle, upTo = head.link.Hash, len(want)
			}
		}
		if m := head.meta; m.GetChain() != 10 || m.GetMark() != 11 || m.GetChainBytes() < inlineFrames || m.GetBaseBytes() < 2<<20 || len(m.GetFrames()) != 0 {
			t.Errorf("the head says %v", m)
		}
		_, err = head.push(ctx, b.blobs[0], b.ids[1:2], 1)
		b.must(err)
		read := func(after blobs.Hash) []*componentv1.StateFrame {
			steps, newest, err := chainSteps(b.blobs[1], head.link.Hash, after)
			b.must(err)
			if newest.link.Hash != head.link.Hash || !proto.Equal(newest.meta, head.meta) {
				t.Errorf("read %v, wrote %v", newest, head)
			}
			var got []*componentv1.StateFrame
			for _, n := range steps {
				b.must(stepFrames(b.blobs[1], n, func(f *componentv1.StateFrame) error { got = append(got, f); return nil }))
			}
			return got
		}
		same := func(got, want []*componentv1.StateFrame) {
			t.Helper()
			if len(got) != len(want) {
				t.Fatalf("%d frames, want %d", len(got), len(want))
			}
			for i := range got {
				if !proto.Equal(got[i], want[i]) {
					t.Fatalf("frame %d differs", i)
				}
			}
		}
		same(read(blobs.Hash{}), want)
		same(read(middle), want[upTo:])
		same(read(blobs.Hash{1}), want) // a root that is not of this chain: all of it
		if steps, _, err := chainSteps(b.blobs[1], middle, middle); err != nil || len(steps) != 0 {
			t.Errorf("nothing after itself: %d, %v", len(steps), err)
		}
	})
}

// A chain is rewritten as a base when its deltas outweigh the base, or when they are many for its size.
func TestWhenAChainNeedsABase(t *testing.T) {
	for _, c := range []struct {
		chain, bytes, base uint64
		needs              bool
	}{
		{chain: 1, bytes: 1 << 20, base: 1 << 10},
		{chain: 1, bytes: 1<<20 + 1, base: 1 << 10, needs: true},
		{chain: 1, bytes: 64 << 20, base: 64 << 20},
		{chain: 1, bytes: 64<<20 + 1, base: 64 << 20, needs: true},
		{chain: maxChain - 1, base: 1 << 10},
		{chain: maxChain, base: 1 << 10, needs: true},
		{chain: maxChain, base: 64 << 20},
		{chain: maxChain + 256, base: 64 << 20, needs: true},
		{chain: longChain, base: 1 << 40, needs: true},
	} {
		h := &chainHead{meta: &componentsv1.CheckpointMeta{Chain: c.chain, ChainBytes: c.bytes, BaseBytes: c.base}}
		if h.needsBase() != c.needs {
			t.Errorf("%+v: a base is needed: %v", c, !c.needs)
		}
	}
	if !(*chainHead)(nil).needsBase() {
		t.Error("no checkpoint needs no base")
	}
}

func TestWhatIsNoChainIsRefused(t *testing.T) {
	onBench(t, func(b *bench) {
		put := func(n blobs.Node) blobs.Hash {
			l, err := b.blobs[0].Put(n)
			b.must(err)
			return l.Hash
		}
		newer, err := proto.Marshal(&componentsv1.CheckpointMeta{Format: chainFormat + 1})
		b.must(err)
		fine, err := proto.Marshal(&componentsv1.CheckpointMeta{Format: chainFormat})
		b.must(err)
		for want, root := range map[string]blobs.Hash{
			"no checkpoint":                put(blobs.Node{Kind: "artifact", Data: fine}),
			"not known to this version":    put(blobs.Node{Kind: kindBase, Data: newer}),
			"a delta without":              put(blobs.Node{Kind: kindDelta, Data: fine}),
			"read checkpoint":              put(blobs.Node{Kind: kindBase, Data: []byte("\xff\xff\xff garbage")}),
			blobs.Hash{9}.String():         {9},
			"read a state frame: unexpect": put(blobs.Node{Kind: kindDelta, Links: []blobs.Link{{Hash: put(blobs.Node{Kind: kindBase, Data: fine})}}, Data: torn(t)}),
		} {
			steps, _, err := chainSteps(b.blobs[0], root, blobs.Hash{})
			for _, n := range steps {
				if err == nil {
					err = stepFrames(b.blobs[0], n, func(*componentv1.StateFrame) error { return nil })
				}
			}
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("want an error with %q, got %v", want, err)
			}
		}
	})
}

// torn is the head of a delta whose frames end in the middle.
func torn(t *testing.T) []byte {
	frames := stored(t, &componentv1.StateFrame{Section: componentv1.SectionJournal, Mark: 1, Data: make([]byte, 100)})
	b, err := proto.Marshal(&componentsv1.CheckpointMeta{Format: chainFormat, Frames: frames[:50]})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func FuzzFrames(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{0})
	f.Add([]byte{2, 8, 1})
	f.Add(bytes.Repeat([]byte{0xff}, 32))
	f.Fuzz(func(_ *testing.T, b []byte) {
		_ = eachFrame(bytes.NewReader(b), func(*componentv1.StateFrame) error { return nil }) // any error will do; no panic, no hang
	})
}
