package supervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/proto"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/blobs"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// A checkpoint is a chain of content-addressed nodes: a base (the whole state at a mark) and the deltas after it, each linking
// to the root before it. The root of the newest node is what the arbiter commits; whoever holds it completely can restore.
// A delta costs one small node however long the chain is; compaction starts a new base before the chain gets long.
const (
	kindBase  = "checkpoint/base"
	kindDelta = "checkpoint/delta"

	chainFormat = 1
	// inlineFrames is how many bytes of frames ride inside a delta's own node. Above it they become a stream of pages.
	inlineFrames = 512 << 10
	// maxChain deltas may follow a base before the next base is begun, beside the calls, and one more for each chainPer bytes of the base, up to longChain:
	// it bounds what a restore reads one by one, to a small part of what it reads in all. A large state that changes a little, often, is not rewritten all
	// the time.
	maxChain  = 256
	chainPer  = 256 << 10
	longChain = fullChain / 4
	// fullChain is where commits wait for the next base: compaction does not keep up.
	fullChain = 4096
	// longestChain is what a reader takes: more than any writer makes.
	longestChain = 16 * fullChain
	// minCompactBytes keeps small states from being rewritten all the time: a chain is compacted when its deltas outweigh the base
	// and this many bytes.
	minCompactBytes = 1 << 20
)

// frameBuffer collects the frames of a checkpoint in their stored form: delimited messages, one after another.
type frameBuffer struct {
	buf  bytes.Buffer
	mark uint64
	n    int
}

func (b *frameBuffer) add(f *componentv1.StateFrame) error {
	if _, err := protodelim.MarshalTo(&b.buf, f); err != nil {
		return fmt.Errorf("encode a state frame: %w", err)
	}
	if f.GetMark() > b.mark {
		b.mark = f.GetMark()
	}
	b.n++
	return nil
}

// chainHead is the newest node of a chain as its writer knows it.
type chainHead struct {
	link blobs.Link
	meta *componentsv1.CheckpointMeta
	// node is the head itself where it is not in the store yet: it is put there while it travels to the holders. nil: it is.
	node *blobs.Node
}

// keep puts the head into the store, where it is not there yet.
func (h *chainHead) keep(store *blobs.Store) error {
	if h.node == nil {
		return nil
	}
	if _, err := store.Put(*h.node); err != nil {
		return fmt.Errorf("store the checkpoint of %s: %w", h.meta.GetInstance(), err)
	}
	h.node = nil
	return nil
}

// push brings the head, and what is below it, to holders and returns those who have it on their disk, at least w.
func (h *chainHead) push(ctx context.Context, store *blobs.Store, to []peer.ID, w int) ([]peer.ID, error) {
	if h.node == nil {
		return store.Push(ctx, h.link.Hash, to, w)
	}
	kept, acked, err := store.PutPush(ctx, *h.node, to, w)
	if kept.Hash == h.link.Hash {
		h.node = nil
	}
	return acked, err
}

// route is who is brought the pages of a checkpoint while it is written, and how many of them set the pace. The zero value: nobody.
type route struct {
	to []peer.ID
	w  int
}

func (h *chainHead) needsBase() bool {
	if h == nil || h.meta == nil {
		return true
	}
	m := h.meta
	return m.GetChain() >= min(maxChain+m.GetBaseBytes()/chainPer, longChain) || (m.GetChainBytes() > minCompactBytes && m.GetChainBytes() > m.GetBaseBytes())
}

// writeBase stores a whole state read from frames and returns its head. Everything is durable here when it returns.
func writeBase(ctx context.Context, store *blobs.Store, meta *componentsv1.CheckpointMeta, frames io.Reader, r route) (*chainHead, error) {
	tree, err := store.WriteStreamTo(ctx, frames, r.to, r.w)
	if err != nil {
		return nil, fmt.Errorf("store the state of %s: %w", meta.GetInstance(), err)
	}
	meta.Format, meta.Chain, meta.ChainBytes, meta.BaseBytes, meta.Frames = chainFormat, 0, 0, tree.Bytes, nil
	head, err := newHead(kindBase, []blobs.Link{tree}, meta)
	if err != nil {
		return nil, err
	}
	return head, head.keep(store)
}

// writeDelta stores what changed after prev and returns the new head, which itself is not stored yet. Nothing is stored under a name when frames end with
// an error.
func writeDelta(ctx context.Context, store *blobs.Store, prev *chainHead, meta *componentsv1.CheckpointMeta, frames io.Reader, r route) (*chainHead, error) {
	links := []blobs.Link{prev.link}
	begin, err := io.ReadAll(io.LimitReader(frames, inlineFrames+1))
	if err != nil {
		return nil, fmt.Errorf("store a delta of %s: %w", meta.GetInstance(), err)
	}
	size := uint64(len(begin))
	if size <= inlineFrames {
		meta.Frames = begin
	} else {
		rest := &counted{r: frames}
		tree, err := store.WriteStreamTo(ctx, io.MultiReader(bytes.NewReader(begin), rest), r.to, r.w)
		if err != nil {
			return nil, fmt.Errorf("store a delta of %s: %w", meta.GetInstance(), err)
		}
		size += rest.n
		links = append(links, tree)
	}
	meta.Format, meta.Chain = chainFormat, prev.meta.GetChain()+1
	meta.ChainBytes, meta.BaseBytes = prev.meta.GetChainBytes()+size, prev.meta.GetBaseBytes()
	return newHead(kindDelta, links, meta)
}

// counted counts what is read of it.
type counted struct {
	r io.Reader
	n uint64
}

func (c *counted) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.n += uint64(n)
	return n, err
}

// newHead makes the head of a chain, which is not stored yet.
func newHead(kind string, links []blobs.Link, meta *componentsv1.CheckpointMeta) (*chainHead, error) {
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(meta)
	if err != nil {
		return nil, fmt.Errorf("encode the checkpoint of %s: %w", meta.GetInstance(), err)
	}
	node := blobs.Node{Kind: kind, Links: links, Data: data}
	link, err := blobs.LinkOf(node)
	if err != nil {
		return nil, fmt.Errorf("store the checkpoint of %s: %w", meta.GetInstance(), err)
	}
	head := proto.Clone(meta).(*componentsv1.CheckpointMeta)
	head.Frames = nil
	return &chainHead{link: link, meta: head, node: &node}, nil
}

// readHead returns the head of a root that is here, and its node.
func readHead(store *blobs.Store, root blobs.Hash) (*chainHead, blobs.Node, error) {
	node, err := store.Get(root)
	if err != nil {
		return nil, blobs.Node{}, fmt.Errorf("read checkpoint %s: %w", root, err)
	}
	if node.Kind != kindBase && node.Kind != kindDelta {
		return nil, blobs.Node{}, fmt.Errorf("read checkpoint %s: it is a %q, no checkpoint", root, node.Kind)
	}
	if node.Kind == kindDelta && len(node.Links) == 0 {
		return nil, blobs.Node{}, fmt.Errorf("read checkpoint %s: a delta without the root before it", root)
	}
	meta := &componentsv1.CheckpointMeta{}
	if err := proto.Unmarshal(node.Data, meta); err != nil {
		return nil, blobs.Node{}, fmt.Errorf("read checkpoint %s: %w", root, err)
	}
	if meta.GetFormat() != chainFormat {
		return nil, blobs.Node{}, fmt.Errorf("read checkpoint %s: its format %d is not known to this version; upgrade this node", root, meta.GetFormat())
	}
	bytes := uint64(len(node.Data))
	for _, l := range node.Links {
		bytes += l.Bytes
	}
	meta.Frames = nil
	return &chainHead{link: blobs.Link{Hash: root, Bytes: bytes}, meta: meta}, node, nil
}

// chainSteps lists the nodes from the base up to root, without those up to and including after (zero: from the base). It names them only: together they may
// be as large as the state.
func chainSteps(store *blobs.Store, root, after blobs.Hash) ([]blobs.Hash, *chainHead, error) {
	var steps []blobs.Hash
	var newest *chainHead
	for at := root; at != after; {
		head, node, err := readHead(store, at)
		if err != nil {
			return nil, nil, err
		}
		if newest == nil {
			newest = head
		}
		steps = append(steps, at)
		if node.Kind == kindBase {
			break
		}
		if len(steps) > longestChain {
			return nil, nil, fmt.Errorf("read checkpoint %s: its chain does not end", root)
		}
		at = node.Links[0].Hash
	}
	slices.Reverse(steps)
	return steps, newest, nil
}

// metaOf is what a node of a chain says about itself.
func metaOf(node blobs.Node) (*componentsv1.CheckpointMeta, error) {
	meta := &componentsv1.CheckpointMeta{}
	if err := proto.Unmarshal(node.Data, meta); err != nil {
		return nil, fmt.Errorf("read a checkpoint: %w", err)
	}
	return meta, nil
}

// stepFrames calls send with every frame of one node of a chain, in order.
func stepFrames(store *blobs.Store, step blobs.Hash, send func(*componentv1.StateFrame) error) error {
	node, err := store.Get(step)
	if err != nil {
		return fmt.Errorf("read checkpoint %s: %w", step, err)
	}
	return nodeFrames(store, node, send)
}

// nodeFrames is stepFrames for a node that was read.
func nodeFrames(store *blobs.Store, node blobs.Node, send func(*componentv1.StateFrame) error) error {
	meta, err := metaOf(node)
	if err != nil {
		return err
	}
	var r io.Reader = bytes.NewReader(meta.GetFrames())
	tree := -1
	switch {
	case node.Kind == kindBase && len(node.Links) == 1:
		tree = 0
	case node.Kind == kindDelta && len(node.Links) == 2:
		tree = 1
	}
	if tree >= 0 {
		s, err := store.OpenStream(node.Links[tree].Hash)
		if err != nil {
			return fmt.Errorf("read the pages of %s: %w", meta.GetInstance(), err)
		}
		defer s.Close()
		r = s
	}
	return eachFrame(r, send)
}

func eachFrame(r io.Reader, send func(*componentv1.StateFrame) error) error {
	br := newByteReader(r)
	for {
		var f componentv1.StateFrame
		err := protodelim.UnmarshalOptions{MaxSize: 8 << 20}.UnmarshalFrom(br, &f)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read a state frame: %w", err)
		}
		if err := send(&f); err != nil {
			return err
		}
	}
}
