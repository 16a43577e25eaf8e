package registry

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"io"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

func (n *node) push(name, version string, files ...*os.File) (*componentsv1.Artifact, bool, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	return n.Push(ctx, PushRequest{Name: name, Version: version, Files: files})
}

func TestPush(t *testing.T) {
	inWorld(t, 4, func(w *world) {
		n := w.nodes[3] // holds nothing itself
		body := component(machineHere(), "kv", "1.0.0", 300<<10)
		art, existed, err := n.push("", "", w.file("kv", body))
		w.must(err)
		if existed || art.GetName() != "kv" || art.GetVersion() != "1.0.0" || art.GetKind() != KindComponent || art.GetBytes() != uint64(len(body)) {
			w.t.Errorf("%v %v", art, existed)
		}
		again, existed, err := n.push("", "", w.file("another-name", body))
		if err != nil || !existed || again.GetDigest() != art.GetDigest() {
			w.t.Errorf("the same bytes again: %v, %v, %v", again, existed, err)
		}
		for i, other := range w.nodes {
			f, got, err := other.Open(context.Background(), art.GetDigest())
			w.must(err)
			have, err := io.ReadAll(f)
			w.must(errors.Join(err, f.Close()))
			if !bytes.Equal(have, body) || got.GetName() != "kv" {
				w.t.Errorf("node %d has something else", i)
			}
			desc, err := other.Description(context.Background(), art.GetDigest())
			if err != nil || desc.GetType() != "kv" {
				w.t.Errorf("node %d: %v, %v", i, desc, err)
			}
			if !other.Cached(art.GetDigest()) {
				w.t.Errorf("node %d says that it has to fetch it", i)
			}
		}
		if len(n.noticed("pushed")) != 1 || len(n.List()) != 1 || len(n.Roots()) != 1 {
			w.t.Errorf("%d notices, %d artifacts, %d roots", len(n.noticed("pushed")), len(n.List()), len(n.Roots()))
		}
	})
}

func TestAVersionNeverChanges(t *testing.T) {
	inWorld(t, 2, func(w *world) {
		n := w.nodes[0]
		first, _, err := n.push("", "", w.file("kv", component(machineHere(), "kv", "1.0.0", 10)))
		w.must(err)
		for _, hidden := range []bool{false, true} { // whether the local view knows of it or not
			w.log.hidden = hidden
			_, _, err = n.push("", "", w.file("kv", component(machineHere(), "kv", "1.0.0", 11)))
			if !isPushError(err) || !strings.Contains(err.Error(), "other bytes") {
				w.t.Errorf("the same version with other bytes: %v", err)
			}
			_, _, err = n.push("kv", "2.0.0", w.file("kv", component(machineHere(), "kv", "1.0.0", 10)))
			if !isPushError(err) || !strings.Contains(err.Error(), "kv@1.0.0") {
				w.t.Errorf("the same bytes under another version: %v", err)
			}
		}
		w.log.hidden = false
		if got, ok := n.Artifact(first.GetDigest()); !ok || got.GetVersion() != "1.0.0" || len(n.List()) != 1 {
			w.t.Errorf("the record is %v", got)
		}
	})
}

func TestSeveralPlatforms(t *testing.T) {
	inWorld(t, 1, func(w *world) {
		n := w.nodes[0]
		here, there := component(machineHere(), "kv", "1.0.0", 10), component(elf.EM_S390, "kv", "1.0.0", 10)
		a, _, err := n.push("", "", w.file("a", here), w.file("b", there))
		w.must(err)
		if len(a.GetPlatforms()) != 2 || a.GetDigest() == a.GetPlatforms()[0].GetDigest() {
			w.t.Errorf("%v", a)
		}
		b, existed, err := n.push("", "", w.file("b", there), w.file("a", here))
		if err != nil || !existed || b.GetDigest() != a.GetDigest() {
			w.t.Errorf("in another order it is %s, %v, %v; want %s", b.GetDigest(), existed, err, a.GetDigest())
		}
		if _, _, err = n.push("", "", w.file("b", there)); !isPushError(err) || !strings.Contains(err.Error(), "linux/s390x") {
			w.t.Errorf("a file that cannot be asked here: %v", err)
		}
		if _, _, err = n.push("", "", w.file("a", here), w.file("a2", component(machineHere(), "kv", "1.0.0", 11))); !isPushError(err) || !strings.Contains(err.Error(), "two files") {
			w.t.Errorf("two files for one platform: %v", err)
		}
		f, _, err := n.Open(context.Background(), a.GetDigest())
		w.must(err)
		defer f.Close()
		if sum, err := hashFile(f); err != nil || sum != a.GetPlatforms()[0].GetDigest() {
			w.t.Errorf("opened %s, %v", sum, err)
		}
	})
}

func TestProgramsAreKept(t *testing.T) {
	inWorld(t, 1, func(w *world) {
		n := w.nodes[0]
		art, _, err := n.push("", "", w.file("backup-1.2.sh", []byte("#!/bin/sh\nexit 0\n")))
		w.must(err)
		if art.GetKind() != KindProgram || art.GetName() != "backup" || art.GetVersion() != "1.2.0" || art.GetPlatforms()[0].GetOsArch() != anyPlatform {
			w.t.Errorf("%v", art)
		}
		if desc, err := n.Description(context.Background(), art.GetDigest()); desc != nil || err != nil {
			w.t.Errorf("%v, %v", desc, err)
		}
	})
}

func TestWhatIsPushedIsLookedAt(t *testing.T) {
	inWorld(t, 1, func(w *world) {
		n := w.nodes[0]
		dir, err := os.Open(w.t.TempDir())
		w.must(err)
		defer dir.Close()
		fine := component(machineHere(), "kv", "1.0.0", 0)
		for want, try := range map[string]func() error{
			"not an executable": func() error {
				_, _, err := n.push("", "", w.file("x", []byte("hello, world, this is text")))
				return err
			},
			"the file ends":    func() error { _, _, err := n.push("", "", w.file("x", fine[:200])); return err },
			"regular file":     func() error { _, _, err := n.push("", "", dir); return err },
			"0 files":          func() error { _, _, err := n.push("", ""); return err },
			"semantic version": func() error { _, _, err := n.push("", "one", w.file("x", fine)); return err },
			"name":             func() error { _, _, err := n.push("../../etc", "", w.file("x", fine)); return err },
			"describe says no": func() error {
				n.describe = func(context.Context, *os.File) (*componentv1.Description, error) {
					return nil, errors.New("describe says no")
				}
				defer func() { n.describe = nil }()
				_, _, err := n.push("", "", w.file("x", fine))
				return err
			},
			"changed while it was pushed": func() error {
				f := w.file("x", fine)
				n.describe = func(ctx context.Context, f *os.File) (*componentv1.Description, error) {
					d, err := describeByName(ctx, f)
					w.must(os.WriteFile(f.Name(), append(fine[:len(fine)-1:len(fine)-1], 'x'), 0o700))
					return d, err
				}
				defer func() { n.describe = nil }()
				_, _, err := n.push("", "", f)
				return err
			},
		} {
			if err := try(); !isPushError(err) || !strings.Contains(err.Error(), want) {
				w.t.Errorf("want a refusal with %q, got %v", want, err)
			}
		}
		if len(n.List()) != 0 {
			w.t.Errorf("%v is in the registry", n.List())
		}
	})
}

func TestTheSameFromTwoNodesAtOnce(t *testing.T) {
	inWorld(t, 3, func(w *world) {
		body := component(machineHere(), "kv", "1.0.0", 100<<10)
		var goes sync.WaitGroup
		w.log.hidden = true
		for _, n := range w.nodes {
			f := w.file("kv", body)
			goes.Go(func() {
				if _, _, err := n.push("", "", f); err != nil {
					w.t.Error(err)
				}
			})
		}
		goes.Wait()
		w.log.hidden = false
		if l := w.nodes[0].List(); len(l) != 1 {
			w.t.Errorf("%v", l)
		}
	})
}

func TestNamesOfFiles(t *testing.T) {
	for file, want := range map[string][2]string{
		"kv-1.0.2": {"kv", "1.0.2"}, "kv": {"kv", ""}, "my-tool": {"my-tool", ""}, "my-tool_2.0": {"my-tool", "2.0.0"}, "kv-1.0.0-rc.1": {"kv", "1.0.0-rc.1"},
		"run.sh": {"run", ""}, "-1": {"-1", ""}, "": {"", ""},
	} {
		if name, version := splitName(file); name != want[0] || version != want[1] {
			t.Errorf("%q is %q %q, want %q", file, name, version, want)
		}
	}
}
