package dirstate

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"

	"google.golang.org/protobuf/encoding/protodelim"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/plugins/contract/component/frames"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	execv1 "github.com/coppice-project/coppice/plugins/exec/v1"
)

const (
	// Section is where the entries are in a checkpoint.
	Section = "files"
	// Schema is that of the encoding.
	Schema = 1
	// frameBytes is how much of them is in a frame.
	frameBytes = 256 << 10
)

// Send sends the content of the mirror, which is that of the last snapshot: all of it (since 0), or what changed after a mark. Who asks for what is not known
// any more, or not yet, gets all of it. It may take as long as it takes: the program runs meanwhile, and only the next snapshot waits.
func (t *Tree) Send(ctx context.Context, since uint64, send func(*componentv1.StateFrame) error) error {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if since < t.floor || since > t.mark {
		since = 0
	}
	total := uint64(0)
	if err := t.entries(ctx, since, nil, func(e *execv1.Entry) error {
		n := proto.Size(e)
		total += uint64(protowire.SizeVarint(uint64(n)) + n)
		return nil
	}); err != nil {
		return err
	}
	if err := send(frames.Seal(&componentv1.StateFrame{Mark: t.mark, Schema: Schema, TotalBytes: total, SinceMark: since})); err != nil {
		return err
	}
	w := &frameWriter{send: send, buf: make([]byte, 0, frameBytes)}
	if err := t.entries(ctx, since, make([]byte, Block), func(e *execv1.Entry) error {
		_, err := protodelim.MarshalTo(w, e)
		return err
	}); err != nil {
		return err
	}
	if err := w.flush(); err != nil {
		return err
	}
	return send(frames.Seal(&componentv1.StateFrame{Section: componentv1.SectionEnd, Mark: t.mark, Last: true}))
}

// frameWriter cuts a stream of bytes into frames.
type frameWriter struct {
	send   func(*componentv1.StateFrame) error
	buf    []byte
	offset uint64
}

func (w *frameWriter) Write(b []byte) (int, error) {
	n := len(b)
	for len(b) > 0 {
		part := b[:min(len(b), frameBytes-len(w.buf))]
		w.buf, b = append(w.buf, part...), b[len(part):]
		if len(w.buf) == frameBytes {
			if err := w.flush(); err != nil {
				return 0, err
			}
		}
	}
	return n, nil
}

func (w *frameWriter) flush() error {
	if len(w.buf) == 0 {
		return nil
	}
	f := frames.Seal(&componentv1.StateFrame{Section: Section, Offset: w.offset, Data: w.buf})
	w.offset += uint64(len(w.buf))
	w.buf = make([]byte, 0, frameBytes) // the frame may still be on its way
	return w.send(f)
}

// entries tells what leads from since to now: removals first, then by path, so that a folder comes before what is in it. buf nil: the blocks are as long as
// they are, their bytes do not matter.
func (t *Tree) entries(ctx context.Context, since uint64, buf []byte, tell func(*execv1.Entry) error) error {
	if since > 0 {
		for _, name := range slices.Sorted(maps.Keys(t.removed)) {
			if t.removed[name] > since {
				if err := tell(&execv1.Entry{Kind: execv1.Kind_REMOVED, Path: []byte(name)}); err != nil {
					return err
				}
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(t.nodes)) {
		n := t.nodes[name]
		var err error
		switch {
		case n.kind == execv1.Kind_FILE:
			err = t.fileEntries(ctx, name, n, since, buf, tell)
		case n.mark > since:
			err = tell(&execv1.Entry{Kind: n.kind, Path: []byte(name), Mode: n.mode, Target: []byte(n.target)})
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (t *Tree) fileEntries(ctx context.Context, name string, n *node, since uint64, buf []byte, tell func(*execv1.Entry) error) error {
	changed := n.mark > since || slices.ContainsFunc(n.blocks, func(b block) bool { return b.mark() > since })
	if !changed {
		return nil
	}
	if err := tell(&execv1.Entry{Kind: execv1.Kind_FILE, Path: []byte(name), Mode: n.mode, Size: uint64(n.size), MtimeNs: n.mtimeNs}); err != nil {
		return err
	}
	var f *os.File
	if buf != nil {
		var err error
		if f, err = t.mirror.Open(name); err != nil {
			return fmt.Errorf("mirror of the state: %w", err)
		}
		defer f.Close() //nolint:errcheck // opened for reading
	}
	for i, b := range n.blocks {
		if b.mark() <= since || b.zero() && since == 0 { // a new file is zeros to begin with
			continue
		}
		if i%64 == 0 && ctx.Err() != nil {
			return ctx.Err()
		}
		e := &execv1.Entry{Kind: execv1.Kind_ZERO, Block: uint64(i)}
		if !b.zero() {
			data := t.buf[0][:min(Block, n.size-int64(i)*Block)] // its length counts
			if buf != nil {
				var err error
				if data, err = readBlock(f, i, n.size, buf); err != nil {
					return fmt.Errorf("mirror of the state: %w", err)
				}
			}
			e.Kind, e.Data = execv1.Kind_BLOCK, data
		}
		if err := tell(e); err != nil {
			return err
		}
	}
	return nil
}
