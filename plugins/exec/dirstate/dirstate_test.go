package dirstate

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"
	"time"

	"github.com/coppice-project/coppice/plugins/contract/component/frames"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// quiet is a program that writes nothing of itself. during runs right before it stands still, while the snapshot's first pass is over already.
type quiet struct {
	during func()
	mapped map[uint64]bool
	blind  bool
	err    error
}

func (q quiet) Mapped() (map[uint64]bool, bool) { return q.mapped, !q.blind }
func (q quiet) Needed() bool                    { return q.during != nil }
func (quiet) Release() error                    { return nil }
func (q quiet) Hold(context.Context) error {
	if q.during != nil {
		q.during()
	}
	return q.err
}

func open(t testing.TB) (tree *Tree, dir string) {
	t.Helper()
	base := t.TempDir()
	dir = filepath.Join(base, "data")
	tree, err := Open(dir, filepath.Join(base, "aside"))
	must(t, err)
	t.Cleanup(func() { must(t, tree.Close()) })
	return tree, dir
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func snap(t testing.TB, tree *Tree, q quiet) uint64 {
	t.Helper()
	mark, err := tree.Snapshot(t.Context(), q)
	must(t, err)
	return mark
}

// sent is what Send gives, checked as a node does.
func sent(t testing.TB, tree *Tree, since uint64) []*componentv1.StateFrame {
	t.Helper()
	var list []*componentv1.StateFrame
	check := frames.Checkpoint(since)
	must(t, tree.Send(t.Context(), since, func(f *componentv1.StateFrame) error {
		list = append(list, f)
		return check.Frame(f)
	}))
	must(t, check.End())
	return list
}

func payload(list []*componentv1.StateFrame) (n int) {
	for _, f := range list {
		n += len(f.GetData())
	}
	return n
}

func restore(tree *Tree, list ...*componentv1.StateFrame) (uint64, error) {
	_, mark, err := tree.Restore(context.Background(), func() (*componentv1.StateFrame, error) {
		if len(list) == 0 {
			return nil, io.EOF
		}
		f := list[0]
		list = list[1:]
		return f, nil
	})
	return mark, err
}

// content is everything that is kept of a directory.
func content(t testing.TB, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	must(t, filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || p == dir {
			return err
		}
		name, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		switch d.Type() {
		case fs.ModeDir:
			out[name] = fmt.Sprintf("folder %o", info.Mode().Perm())
		case fs.ModeSymlink:
			target, err := os.Readlink(p)
			out[name] = "link " + target
			return err
		case 0:
			b, err := os.ReadFile(p)
			out[name] = fmt.Sprintf("file %o %d %x", info.Mode().Perm(), info.ModTime().UnixNano(), b)
			return err
		}
		return nil
	}))
	return out
}

func same(t testing.TB, what string, got, want map[string]string) {
	t.Helper()
	if maps.Equal(got, want) {
		return
	}
	for _, k := range slices.Sorted(maps.Keys(want)) {
		if got[k] != want[k] {
			t.Errorf("%s: %s is %.80q, want %.80q", what, k, got[k], want[k])
		}
	}
	for k := range got {
		if _, ok := want[k]; !ok {
			t.Errorf("%s: %s is there and should not be", what, k)
		}
	}
	t.FailNow()
}

func write(t testing.TB, name, text string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(name), 0o755))
	must(t, os.WriteFile(name, []byte(text), 0o644))
}

// editor makes random changes below a directory.
type editor struct {
	t   *testing.T
	r   *rand.Rand
	dir string
}

func (e *editor) name() string {
	parts := []string{"a", "b", "c", "d"}
	n := parts[e.r.IntN(len(parts))]
	for e.r.IntN(3) == 0 {
		n += "/" + parts[e.r.IntN(len(parts))]
	}
	return filepath.Join(e.dir, n)
}

func (e *editor) bytes(most int) []byte {
	b := make([]byte, e.r.IntN(most))
	if e.r.IntN(4) > 0 { // else zeros
		for i := range b {
			b[i] = byte(e.r.Uint32())
		}
	}
	return b
}

// edit makes one change; what cannot be done in this directory (a file where a folder would have to be) is not done.
func (e *editor) edit() {
	p := e.name()
	info, err := os.Lstat(p)
	isFile := err == nil && info.Mode().IsRegular()
	switch k := e.r.IntN(12); {
	case k == 0 && err == nil:
		must(e.t, os.RemoveAll(p))
	case k == 1:
		_ = os.MkdirAll(p, 0o755) // a file may be in the way
	case k == 2 && err == nil:
		_ = os.Rename(p, e.name()) // into itself, or over a folder
	case k == 3:
		_ = os.Symlink("x/../"+filepath.Base(p), p) // within, wherever it is
	case k == 4 && isFile:
		must(e.t, os.Chmod(p, []fs.FileMode{0o600, 0o640, 0o755}[e.r.IntN(3)]))
	case k <= 6 && isFile:
		must(e.t, os.Truncate(p, int64(e.r.IntN(4*Block))))
	case k <= 9 && isFile:
		f, err := os.OpenFile(p, os.O_WRONLY, 0)
		must(e.t, err)
		_, err = f.WriteAt(e.bytes(2*Block), int64(e.r.IntN(3*Block)))
		must(e.t, errors.Join(err, f.Close()))
	default:
		if _, err := os.Lstat(p); errors.Is(err, fs.ErrNotExist) {
			_ = os.WriteFile(p, e.bytes(3*Block), 0o644) // its folder may be missing, or be a file
		}
	}
}

// Whatever is done to a directory, and whenever a snapshot falls into it: a tree that was restored from a full checkpoint or from any chain of checkpoints has
// what the directory had at the moment in which the program stood still.
func TestRandomEditsAreRestoredExactly(t *testing.T) {
	runs := 8
	if os.Getenv("COPPICE_LONG") != "" {
		runs = 400
	}
	for run := range runs {
		seed := uint64(run) + 1
		if run >= runs/2 {
			seed = rand.Uint64()
		}
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) { randomEdits(t, seed) })
	}
}

func randomEdits(t *testing.T, seed uint64) {
	src, dir := open(t)
	follower, followed := open(t) // is given every delta, or some
	e := &editor{t: t, r: rand.New(rand.NewPCG(seed, 1)), dir: dir}
	marks := map[uint64]uint64{} // the follower's mark is one of the source's
	at := uint64(0)
	for range 12 {
		for range e.r.IntN(12) {
			e.edit()
		}
		var then map[string]string
		mark := snap(t, src, quiet{during: func() {
			for range e.r.IntN(6) { // between the passes, within a tick of the clock
				e.edit()
			}
			then = content(t, dir)
		}})
		if mark < at {
			t.Fatalf("mark %d after %d", mark, at)
		}
		if e.r.IntN(3) > 0 {
			if _, err := restore(follower, sent(t, src, at)...); err != nil {
				t.Fatalf("from mark %d to %d: %v", at, mark, err)
			}
			at = mark
			marks[mark] = mark
			same(t, "the follower", modes(t, follower, followed), then)
		}
		whole, wholeDir := open(t)
		if _, err := restore(whole, sent(t, src, 0)...); err != nil {
			t.Fatal(err)
		}
		same(t, "a full restore", modes(t, whole, wholeDir), then)
		if again := snap(t, src, quiet{blind: true}); again != mark {
			t.Fatalf("nothing was changed, and mark %d follows %d", again, mark)
		}
		if e.r.IntN(4) == 0 { // it goes on from what was restored
			src, dir = whole, wholeDir
			e.dir = dir
		}
	}
}

// modes is the content once it is ready.
func modes(t *testing.T, tree *Tree, dir string) map[string]string {
	t.Helper()
	must(t, tree.Ready())
	return content(t, dir)
}

func TestOnlyWhatChangedIsSent(t *testing.T) {
	tree, dir := open(t)
	big := filepath.Join(dir, "big")
	body := make([]byte, 100*Block)
	for i := range body {
		body[i] = byte(i / 3)
	}
	must(t, os.WriteFile(big, body, 0o644))
	first := snap(t, tree, quiet{})
	if n := payload(sent(t, tree, 0)); n < len(body) || n > len(body)+10000 {
		t.Errorf("a full checkpoint of %d bytes has %d", len(body), n)
	}
	f, err := os.OpenFile(big, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("changed"), 50*Block+100)
	must(t, errors.Join(err, f.Close()))
	second := snap(t, tree, quiet{})
	if second <= first {
		t.Errorf("mark %d after %d", second, first)
	}
	if n := payload(sent(t, tree, first)); n < Block || n > Block+200 {
		t.Errorf("one block has changed, %d bytes were sent", n)
	}
	if n := payload(sent(t, tree, second)); n != 0 {
		t.Errorf("nothing has changed, %d bytes were sent", n)
	}
	if third := snap(t, tree, quiet{}); third != second {
		t.Errorf("nothing has changed, and mark %d follows %d", third, second)
	}
	if n := payload(sent(t, tree, first+1000)); n < len(body) {
		t.Errorf("of a mark that it does not know it sent %d bytes, want everything", n)
	}
}

// A change that leaves size and times as they were is found if it was made in the tick in which the file was compared, or in a file that is mapped.
func TestChangesThatTimesDoNotShow(t *testing.T) {
	tree, dir := open(t)
	name := filepath.Join(dir, "f")
	for i := range 200 { // as fast as can be: many fall into one tick
		want := fmt.Sprintf("value %04d", i)
		write(t, name, want)
		snap(t, tree, quiet{})
		other, otherDir := open(t)
		if _, err := restore(other, sent(t, tree, 0)...); err != nil {
			t.Fatal(err)
		}
		got, err := os.ReadFile(filepath.Join(otherDir, "f"))
		if err != nil || string(got) != want {
			t.Fatalf("%q was written and %q is restored: %v", want, got, err)
		}
	}
}

func TestMappedFilesAreCompared(t *testing.T) {
	tree, dir := open(t)
	name := filepath.Join(dir, "f")
	write(t, name, "one")
	snap(t, tree, quiet{})
	n := tree.nodes["f"]
	write(t, name, "two")
	info, err := os.Stat(name)
	must(t, err)
	st, err := stampOf(info)
	must(t, err)
	n.stamp, n.trusted = st, true // as if no time had told of it
	before := tree.Mark()
	if snap(t, tree, quiet{}) != before {
		t.Fatal("the test does not hide the change")
	}
	if snap(t, tree, quiet{mapped: map[uint64]bool{st.ino: true}}) == before {
		t.Error("a change in a mapped file was not found")
	}
	write(t, name, "six")
	info, err = os.Stat(name)
	must(t, err)
	n.stamp, err = stampOf(info)
	must(t, err)
	n.trusted, n.mtimeNs = true, n.stamp.mtimeNs
	before = tree.Mark()
	if snap(t, tree, quiet{blind: true}) == before {
		t.Error("a change was not found where every file is to be compared")
	}
}

func TestRestoreRemovesWhatIsNotInIt(t *testing.T) {
	src, dir := open(t)
	write(t, filepath.Join(dir, "kept", "a"), "1")
	snap(t, src, quiet{})
	dst, to := open(t)
	write(t, filepath.Join(to, "old", "b"), "2")
	write(t, filepath.Join(to, "kept"), "a file where a folder will be")
	must(t, os.Symlink("kept", filepath.Join(to, "l")))
	if _, err := restore(dst, sent(t, src, 0)...); err != nil {
		t.Fatal(err)
	}
	same(t, "restored", modes(t, dst, to), content(t, dir))
}

func TestFailuresLeaveTheMarkAndAreMadeUpFor(t *testing.T) {
	tree, dir := open(t)
	write(t, filepath.Join(dir, "a"), "1")
	before := snap(t, tree, quiet{})
	write(t, filepath.Join(dir, "a"), "2")
	if _, err := tree.Snapshot(t.Context(), quiet{err: errors.New("it does not stand still")}); err == nil {
		t.Fatal("a snapshot of a program that does not stand still")
	}
	if tree.Mark() != before {
		t.Errorf("mark %d after a failure, want %d", tree.Mark(), before)
	}
	after := snap(t, tree, quiet{})
	if after <= before || payload(sent(t, tree, before)) == 0 {
		t.Errorf("what a snapshot that failed had copied already is not sent by the next: mark %d after %d", after, before)
	}
}

// A file of a gibibyte, most of it holes, goes through in little memory.
func TestHugeFilesTakeLittleMemory(t *testing.T) {
	tree, dir := open(t)
	f, err := os.Create(filepath.Join(dir, "huge"))
	must(t, err)
	must(t, f.Truncate(1<<30))
	chunk := bytes.Repeat([]byte("0123456789abcdef"), Block/16)
	for i := range 256 { // 16 MiB of it are data
		_, err := f.WriteAt(chunk, int64(i)*(4<<20))
		must(t, err)
	}
	must(t, f.Close())
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	begin := time.Now()
	snap(t, tree, quiet{})
	t.Logf("the first snapshot of 1 GiB with 16 MiB of data took %s", time.Since(begin).Round(time.Millisecond))
	n := 0
	must(t, tree.Send(t.Context(), 0, func(f *componentv1.StateFrame) error {
		n += len(f.GetData())
		return nil
	}))
	runtime.GC()
	runtime.ReadMemStats(&after)
	if n < 16<<20 || n > 17<<20 {
		t.Errorf("%d bytes were sent, want the 16 MiB that are data", n)
	}
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 4<<20 {
		t.Errorf("the heap has grown by %d bytes", grown)
	}
	begin = time.Now()
	mark := tree.Mark()
	if snap(t, tree, quiet{}) != mark {
		t.Error("nothing has changed, and the mark did")
	}
	t.Logf("the next, of nothing, took %s", time.Since(begin).Round(time.Microsecond))
}

func TestSocketsAndPipesAreLeftOut(t *testing.T) {
	tree, dir := open(t)
	write(t, filepath.Join(dir, "a"), "1")
	must(t, mkfifo(filepath.Join(dir, "pipe")))
	snap(t, tree, quiet{})
	if _, files := tree.Size(); files != 1 {
		t.Errorf("%d files are kept, want 1", files)
	}
	other, to := open(t)
	if _, err := restore(other, sent(t, tree, 0)...); err != nil {
		t.Fatal(err)
	}
	if len(content(t, to)) != 1 {
		t.Errorf("restored: %v", content(t, to))
	}
}

// What was removed long ago is forgotten; who asks since before that gets everything.
func TestRemovalsAreForgottenSafely(t *testing.T) {
	tree, dir := open(t)
	write(t, filepath.Join(dir, "a"), "1")
	write(t, filepath.Join(dir, "b"), "1")
	first := snap(t, tree, quiet{})
	must(t, os.Remove(filepath.Join(dir, "b")))
	second := snap(t, tree, quiet{})
	tree.mu.Lock()
	for i := range maxRemoved {
		tree.removed[fmt.Sprintf("old/%d", i)] = second
	}
	tree.mu.Unlock()
	must(t, os.Remove(filepath.Join(dir, "a")))
	snap(t, tree, quiet{})
	if len(tree.removed) > maxRemoved {
		t.Errorf("%d removals are remembered", len(tree.removed))
	}
	if h := sent(t, tree, first)[0]; h.GetSinceMark() != 0 {
		t.Errorf("since mark %d it sent a delta and has forgotten what was removed", first)
	}
}

// Where nothing has changed the program is left alone, unless a hook of its may make it write.
func TestOfNothingNewNobodyIsHeld(t *testing.T) {
	tree, dir := open(t)
	write(t, filepath.Join(dir, "a"), "1")
	mark := snap(t, tree, quiet{})
	if got := snap(t, tree, quiet{err: errors.New("it was to stand still for nothing")}); got != mark {
		t.Errorf("mark %d after %d", got, mark)
	}
	if got := snap(t, tree, quiet{during: func() { write(t, filepath.Join(dir, "b"), "2") }}); got <= mark {
		t.Errorf("what was written while it was held is not in the snapshot: mark %d after %d", got, mark)
	}
}
