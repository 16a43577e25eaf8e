package backup

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/coppice-project/coppice/dht/arbiter"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// small is a backup of a few registers and nodes.
func small(t testing.TB) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := NewWriter(&b, &wirev1.BackupHeader{Cluster: "c", Incarnation: 3, Index: 40, Roots: [][]byte{{1}}})
	if err != nil {
		t.Fatal(err)
	}
	for i := range 3 {
		if err := w.Register(arbiter.Register{Key: fmt.Sprint("inst/a/", i), Epoch: 7, Body: []byte("body"), Owner: "owner"}); err != nil {
			t.Fatal(err)
		}
	}
	for i := range 5 {
		if err := w.Node(bytes.Repeat([]byte{byte(i)}, 100*i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestReadsWhatWasWritten(t *testing.T) {
	var keys []string
	var nodes int
	var head *wirev1.BackupHeader
	got, err := Read(bytes.NewReader(small(t)), Handler{
		Header: func(h *wirev1.BackupHeader) error { head = h; return nil },
		Register: func(r arbiter.Register) error {
			if r.Epoch != 7 || string(r.Body) != "body" || r.Owner != "owner" {
				t.Errorf("register %+v", r)
			}
			keys = append(keys, r.Key)
			return nil
		},
		Node: func(enc []byte) error { nodes += len(enc); return nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := (Totals{3, 5, 1000}); got != want || len(keys) != 3 || nodes != 1000 || head.GetIncarnation() != 3 || head.GetIndex() != 40 {
		t.Errorf("%+v, keys %v, %d bytes, header %v", got, keys, nodes, head)
	}
}

// Whatever is cut off, wherever, is said to be cut off; nothing is taken for whole.
func TestCutOffAnywhere(t *testing.T) {
	whole := small(t)
	for n := range whole {
		if _, err := Read(bytes.NewReader(whole[:n]), Handler{}); !errors.Is(err, ErrCut) {
			t.Fatalf("%d bytes of %d: %v", n, len(whole), err)
		}
	}
}

// Any byte that is another one makes an error, and so does one that is too many.
func TestDamagedAnywhere(t *testing.T) {
	whole := small(t)
	for i := range whole {
		bad := bytes.Clone(whole)
		bad[i] ^= 0x15
		if _, err := Read(bytes.NewReader(bad), Handler{}); err == nil {
			t.Fatalf("byte %d of %d was changed, and it was not noticed", i, len(whole))
		}
	}
	if _, err := Read(bytes.NewReader(append(bytes.Clone(whole), 0)), Handler{}); !errors.Is(err, ErrDamaged) {
		t.Errorf("with a byte more: %v", err)
	}
}

func TestForeignAndNewerFiles(t *testing.T) {
	for content, want := range map[string]error{
		"":                                    ErrCut,
		"coppice":                             ErrCut,
		"\x7fELF\x02\x01\x01":                 ErrForeign,
		"application: shop\ncomponents:\n":    ErrForeign,
		"coppice backup one\n":                ErrForeign,
		"coppice backup 2\nwhatever it means": ErrNewer,
	} {
		if _, err := Read(bytes.NewReader([]byte(content)), Handler{}); !errors.Is(err, want) {
			t.Errorf("%q: %v, want %v", content, err, want)
		}
	}
}

// A file that holds a component and one that holds a cluster are not taken for each other.
func TestTheTwoKindsOfFiles(t *testing.T) {
	var b bytes.Buffer
	w, err := NewComponentWriter(&b, &wirev1.BackupHeader{Cluster: "c"})
	if err == nil {
		err = errors.Join(w.Register(arbiter.Register{Key: "app/a"}), w.Node([]byte{1}), w.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ReadComponent(bytes.NewReader(b.Bytes()), Handler{}); err != nil || got.Registers != 1 || got.Nodes != 1 {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := Read(bytes.NewReader(b.Bytes()), Handler{}); !errors.Is(err, ErrForeign) {
		t.Errorf("a component as a cluster: %v", err)
	}
	if _, err := ReadComponent(bytes.NewReader(small(t)), Handler{}); !errors.Is(err, ErrNoComponent) {
		t.Errorf("a cluster as a component: %v", err)
	}
	for i := range b.Bytes() {
		bad := bytes.Clone(b.Bytes())
		bad[i] ^= 0x11
		if _, err := ReadComponent(bytes.NewReader(bad), Handler{}); err == nil {
			t.Fatalf("byte %d was changed, and it was not noticed", i)
		}
		if _, err := ReadComponent(bytes.NewReader(b.Bytes()[:i]), Handler{}); !errors.Is(err, ErrCut) {
			t.Fatalf("%d bytes: %v", i, err)
		}
	}
	if _, err := ReadComponent(strings.NewReader("coppice component 2\n"), Handler{}); !errors.Is(err, ErrNewer) {
		t.Errorf("of a newer format: %v", err)
	}
}

// A handler's error ends the reading and comes back as it is.
func TestHandlerErrorIsReturned(t *testing.T) {
	stop := errors.New("stop")
	if _, err := Read(bytes.NewReader(small(t)), Handler{Node: func([]byte) error { return stop }}); !errors.Is(err, stop) {
		t.Error(err)
	}
}

func TestWriterRefusesDisorder(t *testing.T) {
	w, err := NewWriter(new(bytes.Buffer), &wirev1.BackupHeader{})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Register(arbiter.Register{Key: "b"}); err != nil {
		t.Fatal(err)
	}
	if err := w.Register(arbiter.Register{Key: "a"}); err == nil {
		t.Error("a register out of order was written")
	}
}

// FuzzRead gives arbitrary bytes: no panic, and what is accepted ends as it says.
func FuzzRead(f *testing.F) {
	f.Add(small(f))
	f.Add([]byte("coppice backup 1\n\x02\x0a\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		nodes := uint64(0)
		got, err := Read(bytes.NewReader(b), Handler{Node: func([]byte) error { nodes++; return nil }})
		if err == nil && got.Nodes != nodes {
			t.Errorf("%d nodes, %d were told", got.Nodes, nodes)
		}
	})
}
