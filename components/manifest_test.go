package components

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/coppice-project/coppice/components/golden"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
)

// TestManifest runs testdata/manifest: "parse" (and "parse-later") reads the manifest in its input and prints what became of it, or every problem.
// Rewrite with: go test ./components -run TestManifest -rewrite
func TestManifest(t *testing.T) {
	golden.Run(t, "testdata/manifest", func(t *testing.T) func(*testing.T, golden.Case) string {
		return func(t *testing.T, c golden.Case) string {
			switch c.Cmd {
			case "parse":
			case "parse-later": // with the keys of the schema that this version does not heed yet
				held := notYet
				notYet = nil
				defer func() { notYet = held }()
			default:
				t.Fatalf("%s: unknown command %s", c.Pos, c.Cmd)
			}
			return parsed(t, strings.ReplaceAll(c.Input, "→", "\t"))
		}
	})
}

func parsed(t *testing.T, input string) string {
	all, err := ParseManifests("app.yaml", []byte(input))
	var wrong *ManifestError
	if errors.As(err, &wrong) {
		return err.Error() + "\n"
	}
	if err != nil {
		t.Fatalf("%v: not a ManifestError", err)
	}
	var out bytes.Buffer
	for _, m := range all {
		raw, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Indent(&out, raw, "", " "); err != nil {
			t.Fatal(err)
		}
		out.WriteByte('\n')
	}
	return out.String()
}

// The decoder reads exactly the kinds of fields that the schema has. A new kind needs its case in shapeScalar and in scalar.
func TestManifestKindsAreDecoded(t *testing.T) {
	var visit func(m protoreflect.MessageDescriptor)
	visit = func(m protoreflect.MessageDescriptor) {
		for i := range m.Fields().Len() {
			f := m.Fields().Get(i)
			switch {
			case f.ContainingOneof() != nil && !f.HasOptionalKeyword():
				t.Errorf("%s: part of a oneof", f.FullName())
			case f.IsMap() && (f.MapKey().Kind() != protoreflect.StringKind || f.MapValue().Kind() != protoreflect.StringKind):
				t.Errorf("%s: a map that is not from text to text", f.FullName())
			case f.IsMap():
			case f.Kind() == protoreflect.MessageKind:
				visit(f.Message())
			case f.Kind() != protoreflect.StringKind && f.Kind() != protoreflect.DoubleKind && f.Kind() != protoreflect.Uint32Kind:
				t.Errorf("%s: kind %s", f.FullName(), f.Kind())
			}
		}
	}
	visit((&componentsv1.Manifest{}).ProtoReflect().Descriptor())
}

// What is hostile must neither panic nor pass.
func FuzzParseManifests(f *testing.F) {
	files, err := os.ReadDir("testdata/manifest")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile("testdata/manifest/" + file.Name())
		if err != nil {
			f.Fatal(err)
		}
		for part := range strings.SplitSeq(string(data), "parse\n") {
			body, _, _ := strings.Cut(part, "\n----")
			f.Add([]byte(body))
		}
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		all, err := ParseManifests("f", data)
		if err == nil {
			if len(all) == 0 {
				t.Fatal("nothing parsed and nothing wrong")
			}
			for _, m := range all {
				if m.GetApplication() == "" || len(m.GetComponents()) == 0 {
					t.Fatalf("accepted %v", m)
				}
			}
			return
		}
		var wrong *ManifestError
		if !errors.As(err, &wrong) || len(wrong.Problems) == 0 {
			t.Fatalf("%v: expected a ManifestError with problems", err)
		}
		lines := strings.Count(lineBreaks.Replace(string(data)), "\n") + 1
		for _, p := range wrong.Problems {
			if p.Line < 1 || p.Line > lines || p.Col < 1 || p.Message == "" {
				t.Fatalf("problem out of the file: %+v", p)
			}
		}
	})
}
