package dirstate

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	execv1 "github.com/coppice-project/coppice/plugins/exec/v1"
)

const (
	// Block is the unit of comparison and of what is sent, in bytes. It is part of the encoding.
	Block = 64 << 10
	// maxPath bounds a path below the directory, in bytes.
	maxPath = 4 << 10
	// maxRemoved bounds what is remembered of removals.
	maxRemoved = 1 << 16
)

// Tree is a directory as a state. It is safe for concurrent use; whoever sends holds up the next snapshot, not the program.
type Tree struct {
	live, mirror *os.Root
	path         string // of live, for messages
	probe        string // a file that tells the time of the file system

	mu      sync.RWMutex // guards everything below; to read: nothing changes the mirror
	nodes   map[string]*node
	mark    uint64 // of the content of the mirror, once a snapshot has succeeded
	dirty   bool   // something was changed under mark+1 and not announced yet
	removed map[string]uint64
	floor   uint64 // of what was removed up to here not all is remembered
	buf     [2][]byte
	ready   bool // what was restored has its modes and times
}

// node is what is known of one path.
type node struct {
	kind    execv1.Kind // DIRECTORY, FILE or LINK
	mode    uint32
	size    int64
	mtimeNs int64
	target  string
	mark    uint64  // of the last change of the fields above
	blocks  []block // of a file
	stamp   stamp   // when it was compared last
	trusted bool    // a change after that shows in the stamp
}

// block is the mark of a block's last change, and whether it is zeros.
type block uint64

func newBlock(mark uint64, zero bool) block {
	b := block(mark << 1)
	if zero {
		b |= 1
	}
	return b
}

func (b block) mark() uint64 { return uint64(b >> 1) }
func (b block) zero() bool   { return b&1 != 0 }

// stamp recognises a file that was not changed.
type stamp struct {
	dev, ino         uint64
	size             int64
	mtimeNs, ctimeNs int64
}

// Open makes the directory dir a tree, with its mirror in aside, a folder of the same file system that is the tree's own. Both are made; what is in them is
// removed: a tree begins empty, or is restored.
func Open(dir, aside string) (*Tree, error) {
	t := &Tree{path: dir, probe: filepath.Join(aside, "probe"), nodes: map[string]*node{}, removed: map[string]uint64{}, mark: 1, ready: true}
	for i := range t.buf {
		t.buf[i] = make([]byte, Block)
	}
	mirror := filepath.Join(aside, "mirror")
	for _, d := range []string{dir, aside, mirror} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, fmt.Errorf("make the folder of the state: %w", err)
		}
	}
	var err error
	if t.live, err = os.OpenRoot(dir); err != nil {
		return nil, fmt.Errorf("open the state: %w", err)
	}
	if t.mirror, err = os.OpenRoot(mirror); err != nil {
		return nil, errors.Join(fmt.Errorf("open the mirror of the state: %w", err), t.live.Close())
	}
	if err := errors.Join(empty(t.live), empty(t.mirror)); err != nil {
		return nil, errors.Join(fmt.Errorf("clear the state: %w", err), t.Close())
	}
	return t, nil
}

// Close lets go of the directories. They stay as they are.
func (t *Tree) Close() error { return errors.Join(t.live.Close(), t.mirror.Close()) }

// Mark is that of the last snapshot, or of what was restored.
func (t *Tree) Mark() uint64 {
	t.mu.RLock()
	defer t.mu.RUnlock()
	return t.mark
}

// Size is how many bytes the files have, as of the last snapshot, and how many files there are.
func (t *Tree) Size() (bytes int64, files int) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	for _, n := range t.nodes {
		if n.kind == execv1.Kind_FILE {
			bytes += n.size
			files++
		}
	}
	return bytes, files
}

// empty removes everything below a root.
func empty(r *os.Root) error {
	names, err := list(r, ".")
	if err != nil {
		return err
	}
	for _, e := range names {
		if err := r.RemoveAll(e.Name()); err != nil {
			return err
		}
	}
	return nil
}

// list reads a directory, sorted by name.
func list(r *os.Root, dir string) ([]fs.DirEntry, error) {
	f, err := r.Open(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // a directory
	all, err := f.ReadDir(-1)
	slices.SortFunc(all, func(a, b fs.DirEntry) int { return cmp.Compare(a.Name(), b.Name()) })
	return all, err
}

func stampOf(info fs.FileInfo) (stamp, error) {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return stamp{}, fmt.Errorf("%s: this system does not tell inodes", info.Name())
	}
	return stamp{dev: uint64(st.Dev), ino: st.Ino, size: st.Size, mtimeNs: st.Mtim.Nano(), ctimeNs: st.Ctim.Nano()}, nil //nolint:unconvert // Dev differs by machine
}

// tick is the time by the clock of the file system, by which the change times of files go.
func (t *Tree) tick() (int64, error) {
	if err := os.Remove(t.probe); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, err
	}
	f, err := os.OpenFile(t.probe, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return 0, err
	}
	info, err := f.Stat()
	if err = errors.Join(err, f.Close()); err != nil {
		return 0, err
	}
	st, err := stampOf(info)
	return st.ctimeNs, err
}

// checkPath refuses what does not stay below the directory.
func checkPath(p string) error {
	if p == "" || p == "." || len(p) > maxPath || !filepath.IsLocal(p) || path.Clean(p) != p || strings.ContainsRune(p, 0) {
		return fmt.Errorf("the path %q is none below the state's folder", shorten(p))
	}
	return nil
}

// checkLink refuses a link that leads out of the directory, or may.
func checkLink(p, target string) error {
	if target == "" || path.IsAbs(target) || !filepath.IsLocal(path.Join(path.Dir(p), target)) {
		return fmt.Errorf("the symbolic link %q leads to %q, out of the state's folder: what is there is not on the next node; "+
			"replace it by a relative link to within, or by what it leads to", shorten(p), shorten(target))
	}
	return nil
}

func shorten(s string) string {
	const most = 200
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

// readBlock reads block i of a file of this size. What is missing at the end, because the file is shorter by now, counts as zeros.
func readBlock(f *os.File, i int, size int64, buf []byte) ([]byte, error) {
	at := int64(i) * Block
	buf = buf[:min(Block, size-at)]
	n, err := f.ReadAt(buf, at)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	clear(buf[n:])
	return buf, nil
}

func isZero(b []byte) bool {
	for len(b) >= len(zeros) {
		if string(b[:len(zeros)]) != zeros {
			return false
		}
		b = b[len(zeros):]
	}
	return string(b) == zeros[:len(b)]
}

var zeros = string(make([]byte, 4096))

// blocksOf is how many blocks a file of this size has.
func blocksOf(size int64) int { return int((size + Block - 1) / Block) }
