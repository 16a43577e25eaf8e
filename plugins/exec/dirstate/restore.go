package dirstate

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"time"

	"google.golang.org/protobuf/encoding/protodelim"

	"github.com/coppice-project/coppice/plugins/contract/component/frames"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	execv1 "github.com/coppice-project/coppice/plugins/exec/v1"
)

// maxEntry bounds one entry, in bytes: a block and what is around it.
const maxEntry = 256 << 10

// Restore makes the directory what the frames say, which are one checkpoint or several, each on top of the one before, until io.EOF. A full one removes what
// is not in it. It returns how many bytes of entries it took and the mark that it reached. After an error the directory is worth nothing: restore it again.
// Nothing may use the directory meanwhile.
func (t *Tree) Restore(ctx context.Context, recv func() (*componentv1.StateFrame, error)) (bytes, mark uint64, err error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for {
		f, err := recv()
		if errors.Is(err, io.EOF) {
			return bytes, t.mark, nil
		}
		if err != nil {
			return bytes, 0, err
		}
		if err := ctx.Err(); err != nil {
			return bytes, 0, err
		}
		n, err := t.take(f, recv)
		bytes += n
		if err != nil {
			return bytes, 0, fmt.Errorf("restore the state: %w", err)
		}
	}
}

// take carries out one checkpoint.
func (t *Tree) take(header *componentv1.StateFrame, recv func() (*componentv1.StateFrame, error)) (uint64, error) {
	in := &frameReader{recv: recv, check: frames.Stored()}
	if err := in.check.Frame(header); err != nil {
		return 0, err
	}
	since := header.GetSinceMark()
	switch {
	case header.GetSection() != componentv1.SectionHeader:
		return 0, fmt.Errorf("a frame of section %q without a header before it", header.GetSection())
	case header.GetSchema() > Schema:
		return 0, fmt.Errorf("its encoding %d is not known to this version, which knows %d; upgrade this node", header.GetSchema(), Schema)
	case since != 0 && since != t.mark:
		return 0, fmt.Errorf("it holds what changed after mark %d, and the state is at mark %d", since, t.mark)
	}
	if since == 0 {
		if err := errors.Join(empty(t.live), empty(t.mirror)); err != nil {
			return 0, err
		}
		clear(t.nodes)
		clear(t.removed)
		t.floor = header.GetMark() // of what was before nothing is known
	}
	t.ready = false
	// What it changes has its own mark, whatever the one before was.
	t.mark = header.GetMark()
	a := &applier{t: t, mark: header.GetMark()}
	br := bufio.NewReaderSize(in, frameBytes)
	for {
		var e execv1.Entry
		err := protodelim.UnmarshalOptions{MaxSize: maxEntry}.UnmarshalFrom(br, &e)
		if errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			break
		}
		if err == nil {
			err = a.apply(&e)
		}
		if err != nil {
			return in.got, errors.Join(err, a.close())
		}
	}
	return in.got, errors.Join(a.close(), in.check.End())
}

// frameReader is the bytes of the section of one checkpoint.
type frameReader struct {
	recv  func() (*componentv1.StateFrame, error)
	check *frames.Verifier
	rest  []byte
	got   uint64
	ended bool
}

func (r *frameReader) Read(b []byte) (int, error) {
	for len(r.rest) == 0 {
		if r.ended {
			return 0, io.EOF
		}
		f, err := r.recv()
		if errors.Is(err, io.EOF) {
			return 0, errors.New("it ends before its end frame: it was cut off")
		}
		if err != nil {
			return 0, err
		}
		if err := r.check.Frame(f); err != nil {
			return 0, err
		}
		switch f.GetSection() {
		case componentv1.SectionEnd:
			r.ended = true
		case Section:
			r.rest = f.GetData()
			r.got += uint64(len(r.rest))
		default:
			return 0, fmt.Errorf("it has the section %q: it is not the state of a program; deploy the component that wrote it", f.GetSection())
		}
	}
	n := copy(b, r.rest)
	r.rest = r.rest[n:]
	return n, nil
}

// applier carries entries out, in the directory and in its mirror alike.
type applier struct {
	t    *Tree
	mark uint64
	file *node // the one that blocks belong to
	open [2]*os.File
}

func (a *applier) roots() [2]*os.Root { return [2]*os.Root{a.t.live, a.t.mirror} }

func (a *applier) close() error {
	var errs []error
	for i, f := range a.open {
		if f != nil {
			errs = append(errs, f.Close())
		}
		a.open[i] = nil
	}
	a.file = nil
	return errors.Join(errs...)
}

func (a *applier) apply(e *execv1.Entry) error {
	if e.GetKind() == execv1.Kind_BLOCK || e.GetKind() == execv1.Kind_ZERO {
		return a.block(e)
	}
	if err := a.close(); err != nil {
		return err
	}
	name := string(e.GetPath())
	if err := checkPath(name); err != nil {
		return err
	}
	had := a.t.nodes[name]
	if had != nil && (had.kind != e.GetKind() || had.kind == execv1.Kind_LINK) {
		if err := a.remove(name, had); err != nil {
			return err
		}
		had = nil
	}
	switch e.GetKind() {
	case execv1.Kind_REMOVED:
		return nil
	case execv1.Kind_DIRECTORY:
		if had == nil {
			for _, r := range a.roots() {
				if err := r.Mkdir(name, 0o700); err != nil {
					return err
				}
			}
		}
		a.t.nodes[name] = &node{kind: e.GetKind(), mode: e.GetMode() & 0o777, mark: a.mark}
		return nil
	case execv1.Kind_LINK:
		target := string(e.GetTarget())
		if err := checkLink(name, target); err != nil {
			return err
		}
		a.t.nodes[name] = &node{kind: e.GetKind(), target: target, mark: a.mark}
		return a.t.live.Symlink(target, name)
	case execv1.Kind_FILE:
		return a.begin(name, had, e)
	}
	return fmt.Errorf("it has an entry of kind %d, which this version does not know; upgrade this node", e.GetKind())
}

func (a *applier) remove(name string, had *node) error {
	for _, r := range a.roots() {
		if err := r.RemoveAll(name); err != nil {
			return err
		}
	}
	delete(a.t.nodes, name)
	if had.kind == execv1.Kind_DIRECTORY {
		maps.DeleteFunc(a.t.nodes, func(below string, _ *node) bool { return len(below) > len(name) && below[:len(name)+1] == name+"/" })
	}
	a.t.removed[name] = a.mark
	return nil
}

// begin opens a file for the blocks that follow.
func (a *applier) begin(name string, n *node, e *execv1.Entry) error {
	size := int64(e.GetSize())
	if size < 0 {
		return fmt.Errorf("%s has a size of %d bytes", shorten(name), e.GetSize())
	}
	if n == nil {
		n = &node{kind: execv1.Kind_FILE}
		a.t.nodes[name] = n
	}
	blocks := make([]block, blocksOf(size))
	copy(blocks, n.blocks)
	for i := len(n.blocks); i < len(blocks); i++ {
		blocks[i] = newBlock(a.mark, true)
	}
	n.blocks, n.size, n.mode, n.mtimeNs, n.mark, n.trusted = blocks, size, e.GetMode()&0o777, e.GetMtimeNs(), a.mark, false
	a.file = n
	for i, r := range a.roots() {
		f, err := r.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
		if err != nil {
			return err
		}
		a.open[i] = f
		if err := f.Truncate(size); err != nil {
			return err
		}
	}
	return nil
}

func (a *applier) block(e *execv1.Entry) error {
	if a.file == nil {
		return errors.New("it has a block that belongs to no file")
	}
	if e.GetBlock() >= uint64(len(a.file.blocks)) {
		return fmt.Errorf("it has block %d of a file of %d bytes", e.GetBlock(), a.file.size)
	}
	i := int(e.GetBlock())
	at := int64(i) * Block
	want := min(Block, a.file.size-at)
	data := e.GetData()
	zero := e.GetKind() == execv1.Kind_ZERO
	if zero {
		data = make([]byte, want)
	}
	if int64(len(data)) != want {
		return fmt.Errorf("block %d of a file of %d bytes has %d bytes, want %d", i, a.file.size, len(data), want)
	}
	for _, f := range a.open {
		if _, err := f.WriteAt(data, at); err != nil {
			return err
		}
	}
	a.file.blocks[i] = newBlock(a.mark, zero)
	return nil
}

// Ready gives what was restored its permissions and times and has it on the disk. It is called after the last Restore, before the program is started.
func (t *Tree) Ready() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.settle()
}

// settle is Ready; the caller holds mu.
func (t *Tree) settle() error {
	if t.ready {
		return nil
	}
	names := slices.Sorted(maps.Keys(t.nodes))
	slices.Reverse(names) // what is in a folder before the folder: that may forbid it
	last := int64(0)
	for _, name := range names {
		n := t.nodes[name]
		if n.kind == execv1.Kind_LINK {
			continue
		}
		st, err := t.finish(name, n)
		if err != nil {
			return fmt.Errorf("restore the state: %w", err)
		}
		n.stamp, n.trusted = st, true
		last = max(last, st.ctimeNs)
	}
	if err := syncDir(t.live, "."); err != nil {
		return fmt.Errorf("restore the state: %w", err)
	}
	if err := t.pastTick(last); err != nil {
		return err
	}
	t.ready = true
	return nil
}

// finish gives one file or folder what it is to have, on the disk, and returns its stamp.
func (t *Tree) finish(name string, n *node) (st stamp, err error) {
	f, err := t.live.Open(name)
	if err != nil {
		return st, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if n.kind == execv1.Kind_FILE {
		when := time.Unix(0, n.mtimeNs)
		if err := t.live.Chtimes(name, when, when); err != nil {
			return st, err
		}
	}
	if err := f.Chmod(fs.FileMode(n.mode)); err != nil {
		return st, err
	}
	if err := f.Sync(); err != nil {
		return st, err
	}
	info, err := f.Stat()
	if err != nil {
		return st, err
	}
	return stampOf(info)
}

func syncDir(r *os.Root, name string) error {
	d, err := r.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// pastTick waits until the clock of the file system has moved on, so that no change from now on has the time of what was restored. Where the clock is too
// coarse to wait for, what was restored is compared again.
func (t *Tree) pastTick(last int64) error {
	for end := time.Now().Add(100 * time.Millisecond); ; time.Sleep(time.Millisecond) {
		now, err := t.tick()
		if err != nil {
			return fmt.Errorf("ask the time of the file system of the state: %w", err)
		}
		if now > last {
			return nil
		}
		if time.Now().After(end) {
			for _, n := range t.nodes {
				n.trusted = n.trusted && n.stamp.ctimeNs < now
			}
			return nil
		}
	}
}
