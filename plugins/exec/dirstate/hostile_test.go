package dirstate

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protodelim"

	"github.com/coppice-project/coppice/plugins/contract/component/frames"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	execv1 "github.com/coppice-project/coppice/plugins/exec/v1"
)

func TestLinksThatLeadOutAreRefused(t *testing.T) {
	for _, target := range []string{"/etc/passwd", "../x", "a/../../x", "sub/../../../x"} {
		tree, dir := open(t)
		must(t, os.Symlink(target, filepath.Join(dir, "l")))
		_, err := tree.Snapshot(t.Context(), quiet{})
		if err == nil || !strings.Contains(err.Error(), "out of the state's folder") {
			t.Errorf("a link to %s: %v", target, err)
		}
	}
}

// stream makes a full checkpoint of these entries.
func stream(t *testing.T, list ...*execv1.Entry) []*componentv1.StateFrame {
	t.Helper()
	var b bytes.Buffer
	for _, e := range list {
		_, err := protodelim.MarshalTo(&b, e)
		must(t, err)
	}
	return []*componentv1.StateFrame{
		frames.Seal(&componentv1.StateFrame{Mark: 5, Schema: Schema, TotalBytes: uint64(b.Len())}),
		frames.Seal(&componentv1.StateFrame{Section: Section, Data: b.Bytes()}),
		frames.Seal(&componentv1.StateFrame{Section: componentv1.SectionEnd, Mark: 5, Last: true}),
	}
}

// A state from elsewhere never writes outside of its folder.
func TestRestoreStaysInside(t *testing.T) {
	file := func(p string) *execv1.Entry {
		return &execv1.Entry{Kind: execv1.Kind_FILE, Path: []byte(p), Size: 3, Mode: 0o644}
	}
	link := func(p, to string) *execv1.Entry {
		return &execv1.Entry{Kind: execv1.Kind_LINK, Path: []byte(p), Target: []byte(to)}
	}
	abc := &execv1.Entry{Kind: execv1.Kind_BLOCK, Data: []byte("abc")}
	for name, list := range map[string][]*execv1.Entry{
		"up":                     {file("../x"), abc},
		"up from within":         {file("a/../../x"), abc},
		"absolute":               {file("/tmp/coppice-x"), abc},
		"the folder itself":      {file("."), abc},
		"no path":                {file(""), abc},
		"not clean":              {file("a//b"), abc},
		"a zero byte":            {file("a\x00b"), abc},
		"a link out":             {link("l", "/etc"), file("l/x"), abc},
		"a link up":              {link("l", "../.."), file("l/x"), abc},
		"a block of no file":     {abc},
		"a block past the end":   {file("a"), {Kind: execv1.Kind_BLOCK, Block: 1, Data: []byte("abc")}},
		"a block of another end": {file("a"), {Kind: execv1.Kind_BLOCK, Data: []byte("abcd")}},
		"a negative size":        {{Kind: execv1.Kind_FILE, Path: []byte("a"), Size: 1 << 63}},
		"an unknown kind":        {{Kind: 99, Path: []byte("a")}},
		"removed outside":        {{Kind: execv1.Kind_REMOVED, Path: []byte("../data")}},
	} {
		tree, dir := open(t)
		outside := filepath.Join(filepath.Dir(dir), "x")
		if _, err := restore(tree, stream(t, list...)...); err == nil {
			t.Errorf("%s: taken", name)
		}
		if _, err := os.Lstat(outside); err == nil {
			t.Errorf("%s: it wrote outside", name)
		}
	}
	tree, dir := open(t)
	if _, err := restore(tree, stream(t, link("l", "a"), file("a"), abc)...); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "l")); err != nil || string(b) != "abc" {
		t.Errorf("a link within: %q, %v", b, err)
	}
}

func TestCutOffOrForeignStatesAreRefused(t *testing.T) {
	src, dir := open(t)
	write(t, filepath.Join(dir, "a"), strings.Repeat("x", 3*frameBytes))
	first := snap(t, src, quiet{})
	full := sent(t, src, 0)
	write(t, filepath.Join(dir, "a"), "y")
	snap(t, src, quiet{})
	delta := sent(t, src, first)
	other := stream(t)
	other[1] = frames.Seal(&componentv1.StateFrame{Section: "map", Data: []byte("x")})
	other[0] = frames.Seal(&componentv1.StateFrame{Mark: 5, Schema: 1, TotalBytes: 1})
	newer := []*componentv1.StateFrame{frames.Seal(&componentv1.StateFrame{Mark: 5, Schema: Schema + 1})}
	for name, c := range map[string]struct {
		list []*componentv1.StateFrame
		want string
	}{
		"cut off":               {full[:len(full)-1], "cut off"},
		"a frame is missing":    {slices.Delete(slices.Clone(full), 2, 3), "missing"},
		"a delta on nothing":    {delta, "after mark"},
		"no header":             {full[1:], "header"},
		"an SDK's state":        {other, `section "map"`},
		"of a newer version":    {newer, "upgrade"},
		"a delta of other mark": {append(slices.Clone(full), frames.Seal(&componentv1.StateFrame{Mark: 99, SinceMark: 98, Schema: 1})), "after mark 98"},
	} {
		tree, _ := open(t)
		if _, err := restore(tree, c.list...); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	tree, to := open(t)
	if _, err := restore(tree, append(full, delta...)...); err != nil {
		t.Fatal(err)
	}
	same(t, "base and delta in one stream", modes(t, tree, to), content(t, dir))
}
