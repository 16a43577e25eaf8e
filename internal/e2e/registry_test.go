package e2e

import (
	"bytes"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/coppice-project/coppice/internal/cluster"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// listed waits until a node's `registry list` has an entry for which ok holds.
func (g *grove) listed(n *cluster.Node, what string, ok func(a *apiv1.Artifact) bool) *apiv1.Artifact {
	g.t.Helper()
	var found *apiv1.Artifact
	g.wait(n.Name+" to list "+what, func(ctx context.Context) error {
		c, err := n.Client()
		if err != nil {
			return err
		}
		res, err := c.RegistryList(ctx, &apiv1.RegistryListRequest{})
		if err != nil {
			return err
		}
		var all []string
		for _, a := range res.GetArtifacts() {
			if ok(a) {
				found = a
				return nil
			}
			all = append(all, fmt.Sprintf("%s%s@%s %s %s", a.GetFile(), a.GetName(), a.GetVersion(), a.GetState(), a.GetReason()))
		}
		return fmt.Errorf("it lists %q", all)
	})
	return found
}

// drop copies a file into a node's drop folder, under a name.
func (g *grove) drop(n *cluster.Node, name string, content []byte) {
	g.t.Helper()
	must(g.t, os.WriteFile(filepath.Join(n.Data, "plugins", name), content, 0o700))
}

// header is an ELF executable for another machine that has no more than its header and one segment.
func header(t testing.TB, machine elf.Machine) []byte {
	t.Helper()
	var b bytes.Buffer
	h := elf.Header64{
		Ident: [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)},
		Type:  uint16(elf.ET_EXEC), Machine: uint16(machine), Version: uint32(elf.EV_CURRENT), Entry: 0x10078,
		Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1, Shentsize: 64,
	}
	p := elf.Prog64{Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_X), Vaddr: 0x10000, Filesz: 128, Memsz: 128, Align: 0x1000}
	must(t, binary.Write(&b, binary.LittleEndian, h))
	must(t, binary.Write(&b, binary.LittleEndian, p))
	b.Write(make([]byte, 128-b.Len()))
	return b.Bytes()
}

// What is dropped and good is known to all and lies on three nodes. What is dropped and bad gives a state that says why, to every node, and an
// event; and the node goes on.
func TestDropFolder(t *testing.T) {
	t.Parallel() // it waits most of the time
	if runtime.GOARCH != "amd64" {
		t.Skip("its wrong architecture is arm64")
	}
	g := plant(t, 3)
	n1, n2 := g.Nodes[0], g.Nodes[1]
	kv, err := os.ReadFile(component(t, "kv", "1.0.0"))
	must(t, err)

	// A file that is still being written is waited for, however slowly it comes.
	slow, err := os.OpenFile(filepath.Join(n1.Data, "plugins", "kv"), os.O_CREATE|os.O_WRONLY, 0o700)
	must(t, err)
	for _, part := range [][]byte{kv[:1000], kv[1000 : len(kv)/2]} {
		_, err = slow.Write(part)
		must(t, err)
		time.Sleep(700 * time.Millisecond) // longer than the folder takes a file for quiet
		for _, ev := range must1(g.events(t.Context(), n1, "/registry"))(t) {
			t.Fatalf("half a file gave the event %s: %s", ev.GetType(), ev.GetMessage())
		}
	}
	_, err = io.Copy(slow, bytes.NewReader(kv[len(kv)/2:]))
	must(t, errors.Join(err, slow.Close()))
	a := g.listed(n2, "kv, ready", func(a *apiv1.Artifact) bool { return a.GetName() == "kv" && a.GetState() == "ready" })
	if a.GetVersion() != "1.0.0" || len(a.GetHolders()) != 3 || a.GetKind() != "component" || len(a.GetPlatforms()) != 1 || a.GetPushedBy() != "n1" {
		t.Errorf("kv: %v", a)
	}
	g.event(n2, "/registry", "kv was pushed", func(ev *apiv1.Event) bool {
		return ev.GetType() == "pushed" && strings.HasPrefix(ev.GetMessage(), "kv@1.0.0")
	})

	bad := []struct {
		name, says string
		content    []byte
		state      string
	}{
		{"arm", "arm64", header(t, elf.EM_AARCH64), "refused"},
		{"notes.txt", "executable", []byte("Buy milk.\nFeed the cat.\n"), "refused"},
		{"hangs", "not return", read(t, testProgram(t, "describe", "hang")), "refused"},
		{"fails", "the stars are not right", read(t, testProgram(t, "describe", "fail")), "refused"},
		{"exits", "out of cheese", read(t, testProgram(t, "describe", "exit")), "refused"},
		{"nameless", "no type", read(t, testProgram(t, "describe", "nameless")), "refused"},
		{"cut", "ends before", kv[:len(kv)/3], "incomplete"},
	}
	for _, b := range bad {
		g.drop(n1, b.name, b.content)
	}
	for _, b := range bad {
		a := g.listed(n2, b.name+" with its state", func(a *apiv1.Artifact) bool { return a.GetFile() == b.name && a.GetState() == b.state })
		if !strings.Contains(a.GetReason(), b.says) || a.GetNode() != "n1" {
			t.Errorf("%s on %s: the reason is %q, it does not say %q", b.name, a.GetNode(), a.GetReason(), b.says)
		}
		ev := g.event(n2, "/registry", b.name+" is "+b.state, func(ev *apiv1.Event) bool {
			return ev.GetType() == b.state && ev.GetFields()["artifact"] == b.name
		})
		if !strings.Contains(ev.GetCause(), b.says) || ev.GetNode() != "n1" {
			t.Errorf("the event of %s on %s: %q", b.name, ev.GetNode(), ev.GetCause())
		}
	}
	// Executables that are no components are kept as programs, by the names that their files have.
	g.drop(n1, "greet-2.1.0.sh", []byte("#!/bin/sh\necho hello\n"))
	g.drop(n1, "hello", read(t, testProgram(t, "program", "")))
	script := g.listed(n2, "the script", func(a *apiv1.Artifact) bool { return a.GetName() == "greet" && a.GetState() == "ready" })
	if script.GetKind() != "program" || script.GetVersion() != "2.1.0" {
		t.Errorf("the script: %v", script)
	}
	program := g.listed(n2, "the program", func(a *apiv1.Artifact) bool { return a.GetName() == "hello" && a.GetState() == "ready" })
	if program.GetKind() != "program" {
		t.Errorf("the program: %v", program)
	}
	g.refused(n2, []string{"hello is a program"}, "deploy", g.file("p.yaml", "application: p\ncomponents:\n  - name: p\n    artifact: hello\n"))
	// What is taken out of the folder is not complained about any more, and what was good stays.
	must(t, os.Remove(filepath.Join(n1.Data, "plugins", "notes.txt")))
	must(t, os.Remove(filepath.Join(n1.Data, "plugins", "kv")))
	g.wait("the notes to be forgotten", func(ctx context.Context) error {
		res, err := g.api(n2).RegistryList(ctx, &apiv1.RegistryListRequest{})
		if err != nil {
			return err
		}
		kv := false
		for _, a := range res.GetArtifacts() {
			if a.GetFile() == "notes.txt" {
				return fmt.Errorf("still %s", a.GetState())
			}
			kv = kv || a.GetName() == "kv" && a.GetState() == "ready"
		}
		if !kv {
			t.Fatal("kv went with its file")
		}
		return nil
	})
	g.deploy(n2, kvApp)
	g.do(n1, "call", "data/kv", "Put", `{"key":"k","value":"v"}`)
}

// The same files by `registry push`: refused with the reason on standard error and status 1.
func TestPushOfBadFiles(t *testing.T) {
	t.Parallel() // it waits most of the time
	g := plant(t, 1)
	n1 := g.Nodes[0]
	push := func(name string, content []byte, says ...string) {
		t.Helper()
		path := g.file(name, string(content))
		must(t, os.Chmod(path, 0o700))
		g.refused(n1, says, "registry", "push", path)
	}
	push("arm", header(t, elf.EM_AARCH64), "arm64")
	push("notes.txt", []byte("Buy milk.\n"), "executable")
	push("cut", read(t, component(t, "kv", "1.0.0"))[:100_000], "ends before")
	push("hangs", read(t, testProgram(t, "describe", "hang")), "not return")
	g.refused(n1, []string{"no such file"}, "registry", "push", g.Dir+"/nothing")
	// The same version with other bytes.
	g.push(n1, component(t, "kv", "1.0.0"))
	g.refused(n1, []string{"1.0.0", "never changes"}, "registry", "push", "--version", "1.0.0", component(t, "kv", "1.1.0"))
	if out := g.do(n1, "registry", "list"); strings.Contains(out, "cut") || !strings.Contains(out, "kv") {
		t.Errorf("the registry after refused pushes:\n%s", out)
	}
}

// A file of the cache in which a bit has flipped is not executed: it is noticed, told, fetched again and works.
func TestFlippedBitInTheCache(t *testing.T) {
	g := plant(t, 2)
	n1 := g.Nodes[0]
	g.push(n1, component(t, "counter", "1.0.0"))
	g.deploy(n1, counterApp)
	in := g.running(n1, "tally/counter-0", protected(2))
	g.counted(n1, 3)
	next := g.Node(in.GetWouldRestartOn())
	// Two copies: the one on the node that will need it next, which was fetched ahead, and the one of a process that runs.
	var digest string
	g.wait("the artifact to be on "+next.Name, func(context.Context) error {
		files, err := filepath.Glob(filepath.Join(next.Data, "cache", "[0-9a-f]*"))
		if err != nil || len(files) != 1 {
			return fmt.Errorf("%v, %w", files, err)
		}
		digest = filepath.Base(files[0])
		return nil
	})
	flip(t, filepath.Join(next.Data, "cache", digest))
	g.do(n1, "move", "tally/counter", next.Name)
	g.shows(n1, 3)
	ev := g.event(n1, "/registry", "the copy was corrupt", func(ev *apiv1.Event) bool { return ev.GetType() == "corrupt" && ev.GetNode() == next.Name })
	if !strings.Contains(ev.GetCause(), digest) {
		t.Errorf("the event does not name the file: %s", ev.GetCause())
	}
	if now := g.running(n1, "tally/counter-0", nil); now.GetNode() != next.Name {
		t.Errorf("it runs on %s, not on %s", now.GetNode(), next.Name)
	}
}

// flip changes one bit in the middle of a file, behind a new inode as the file may be executing.
func flip(t testing.TB, path string) {
	t.Helper()
	raw := read(t, path)
	raw[len(raw)/2] ^= 1
	must(t, os.WriteFile(path+".new", raw, 0o500))
	must(t, os.Rename(path+".new", path))
}

func read(t testing.TB, path string) []byte {
	t.Helper()
	raw, err := os.ReadFile(path)
	must(t, err)
	return raw
}

// must1 is for a value and an error at once.
func must1[T any](v T, err error) func(t testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		must(t, err)
		return v
	}
}
