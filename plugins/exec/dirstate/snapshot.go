package dirstate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"slices"
	"strings"
	"syscall"

	execv1 "github.com/coppice-project/coppice/plugins/exec/v1"
)

// Still makes the program stand still during a snapshot.
type Still interface {
	// Mapped are the inodes of the files that the program has mapped into memory for writing (others among them do no harm); known false: that cannot be told,
	// and every file is compared.
	Mapped() (inodes map[uint64]bool, known bool)
	// Hold returns when nothing changes the directory any more.
	Hold(ctx context.Context) error
	// Release ends that. It is called when Hold has succeeded, whatever became of the snapshot.
	Release() error
	// Needed says that Hold has to be called even where nothing has changed so far: it makes the program write.
	Needed() bool
}

// Snapshot brings the mirror to one moment of the directory, in which the program stands still, and returns the mark of that. Nothing has changed since the
// last one: the mark is the same, and the program is left alone. After an error the mark before stands, and the next snapshot goes on from what this one has
// copied.
func (t *Tree) Snapshot(ctx context.Context, still Still) (mark uint64, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.settle(); err != nil {
		return 0, err
	}
	mapped, known := still.Mapped()
	// While it runs, anything may come and go under our hands: what goes wrong here is looked at again.
	err = t.pass(ctx, passing{mapped: mapped, all: !known})
	switch {
	case ctx.Err() != nil:
		return 0, ctx.Err()
	case err == nil && !t.dirty && !still.Needed():
		// No file has changed up to when it was looked at, so none had when the first was: that is a moment, too.
		return t.mark, nil
	}
	if err := still.Hold(ctx); err != nil {
		return 0, err
	}
	mapped, known = still.Mapped()
	err = t.pass(ctx, passing{still: true, mapped: mapped, all: !known})
	if err = errors.Join(err, still.Release()); err != nil {
		return 0, err
	}
	if t.dirty {
		t.mark++
		t.dirty = false
	}
	return t.mark, nil
}

// passing is one comparison of the directory with the mirror.
type passing struct {
	ctx    context.Context //nolint:containedctx // of this pass
	still  bool            // nothing changes meanwhile
	mapped map[uint64]bool
	all    bool // trust no stamp
	tick   int64
	seen   map[string]bool
}

func (t *Tree) pass(ctx context.Context, p passing) error {
	tick, err := t.tick()
	if err != nil {
		return fmt.Errorf("ask the time of the file system of the state: %w", err)
	}
	p.ctx, p.tick, p.seen = ctx, tick, make(map[string]bool, len(t.nodes))
	if err := t.walk(&p, "."); err != nil {
		return err
	}
	var gone []string
	for name := range t.nodes {
		if !p.seen[name] {
			gone = append(gone, name)
		}
	}
	slices.Sort(gone)
	for _, name := range gone {
		if err := t.remove(name); err != nil {
			return err
		}
	}
	return nil
}

func (t *Tree) walk(p *passing, dir string) error {
	all, err := list(t.live, dir)
	if p.vanished(err) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read the state: %w", err)
	}
	for _, e := range all {
		if err := p.ctx.Err(); err != nil {
			return err
		}
		name := path.Join(dir, e.Name())
		if err := t.visit(p, name); err != nil && !p.vanished(err) {
			return fmt.Errorf("read the state: %w", err)
		}
	}
	return nil
}

// vanished: what is removed, or replaced, while the program runs is looked at when it stands still.
func (p *passing) vanished(err error) bool {
	return !p.still && (errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR))
}

func (t *Tree) visit(p *passing, name string) error {
	info, err := t.live.Lstat(name)
	if err != nil {
		return err
	}
	if len(name) > maxPath {
		return fmt.Errorf("the path %q has %d bytes, at most %d", shorten(name), len(name), maxPath)
	}
	switch info.Mode().Type() {
	case 0:
		p.seen[name] = true
		return t.file(p, name, info)
	case fs.ModeDir:
		p.seen[name] = true
		if err := t.plain(name, &node{kind: execv1.Kind_DIRECTORY, mode: uint32(info.Mode().Perm())}); err != nil {
			return err
		}
		return t.walk(p, name)
	case fs.ModeSymlink:
		target, err := t.live.Readlink(name)
		if err != nil {
			return err
		}
		if err := checkLink(name, target); err != nil {
			return err
		}
		p.seen[name] = true
		return t.plain(name, &node{kind: execv1.Kind_LINK, target: target})
	}
	return nil // sockets, pipes, devices
}

// next is the mark of what changes now.
func (t *Tree) next() uint64 {
	t.dirty = true
	return t.mark + 1
}

// plain takes over a directory or a link.
func (t *Tree) plain(name string, now *node) error {
	had := t.nodes[name]
	if had != nil && had.kind == now.kind && had.mode == now.mode && had.target == now.target {
		return nil
	}
	if had != nil && (had.kind != now.kind || now.kind == execv1.Kind_LINK) {
		if err := t.remove(name); err != nil {
			return err
		}
		had = nil
	}
	now.mark = t.next()
	if had == nil && now.kind == execv1.Kind_DIRECTORY {
		if err := t.mirror.Mkdir(name, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("mirror: %w", err)
		}
	}
	t.nodes[name] = now
	return nil
}

// remove forgets a path and all below it.
func (t *Tree) remove(name string) error {
	if t.nodes[name] == nil {
		return nil
	}
	if err := t.mirror.RemoveAll(name); err != nil {
		return fmt.Errorf("mirror: %w", err)
	}
	mark := t.next()
	isDir := t.nodes[name].kind == execv1.Kind_DIRECTORY
	delete(t.nodes, name)
	if isDir {
		maps.DeleteFunc(t.nodes, func(below string, _ *node) bool { return strings.HasPrefix(below, name+"/") })
	}
	t.removed[name] = mark
	if len(t.removed) > maxRemoved {
		// Half of them, the oldest: who asks for what changed since before that gets everything.
		marks := slices.Sorted(maps.Values(t.removed))
		t.floor = marks[len(marks)/2]
		maps.DeleteFunc(t.removed, func(_ string, m uint64) bool { return m <= t.floor })
	}
	return nil
}

// file compares a file with its mirror.
func (t *Tree) file(p *passing, name string, info fs.FileInfo) error {
	st, err := stampOf(info)
	if err != nil {
		return err
	}
	n := t.nodes[name]
	if n != nil && n.kind != execv1.Kind_FILE {
		if err := t.remove(name); err != nil {
			return err
		}
		n = nil
	}
	if n == nil {
		n = &node{kind: execv1.Kind_FILE, mark: t.next()}
		t.nodes[name] = n
	} else if n.trusted && n.stamp == st && !p.all && !p.mapped[st.ino] {
		return nil
	}
	n.trusted = false
	if err := t.compare(p, name, n, st); err != nil {
		return err
	}
	if mode := uint32(info.Mode().Perm()); n.mode != mode || n.mtimeNs != st.mtimeNs {
		n.mode, n.mtimeNs, n.mark = mode, st.mtimeNs, t.next()
	}
	n.stamp, n.trusted = st, st.ctimeNs < p.tick
	return nil
}

// compare copies the blocks that differ into the mirror.
func (t *Tree) compare(p *passing, name string, n *node, st stamp) (err error) {
	in, err := t.live.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer in.Close() //nolint:errcheck // opened for reading
	out, err := t.mirror.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("mirror: %w", err)
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	if n.size != st.size {
		if err := t.resize(out, n, st.size); err != nil {
			return err
		}
	}
	for i := range blocksOf(st.size) {
		if i%64 == 0 && p.ctx.Err() != nil {
			return p.ctx.Err()
		}
		if err := t.compareBlock(in, out, n, i); err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

// resize takes over another size. The last block that both have is another one where its length changes.
func (t *Tree) resize(mirror *os.File, n *node, size int64) error {
	if err := mirror.Truncate(size); err != nil {
		return fmt.Errorf("mirror: %w", err)
	}
	mark := t.next()
	keep := int(min(n.size, size) / Block)
	blocks := make([]block, blocksOf(size))
	copy(blocks, n.blocks)
	for i := keep; i < len(blocks); i++ {
		blocks[i] = newBlock(mark, i >= len(n.blocks) || n.blocks[i].zero()) // the mirror has zeros there
	}
	n.blocks, n.size, n.mark = blocks, size, mark
	return nil
}

func (t *Tree) compareBlock(in, mirror *os.File, n *node, i int) error {
	now, err := readBlock(in, i, n.size, t.buf[0])
	if err != nil {
		return err
	}
	zero := isZero(now)
	if n.blocks[i].zero() {
		if zero {
			return nil
		}
	} else {
		had, err := readBlock(mirror, i, n.size, t.buf[1])
		if err != nil {
			return fmt.Errorf("mirror: %w", err)
		}
		if bytes.Equal(now, had) {
			return nil
		}
	}
	if _, err := mirror.WriteAt(now, int64(i)*Block); err != nil {
		return fmt.Errorf("mirror: %w", err)
	}
	n.blocks[i] = newBlock(t.next(), zero)
	return nil
}
