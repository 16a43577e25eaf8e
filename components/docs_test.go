package components

import (
	"maps"
	"os"
	"regexp"
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"
)

func page(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile("../docs/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

var fence = regexp.MustCompile("(?s)```([a-z ]+)\n(.*?)```")

// The user's page is right: its examples parse, its error example gives those errors, its tables name every key.
func TestManifestPage(t *testing.T) {
	text := page(t, "manifest.md")
	var errors string
	examples := 0
	for _, m := range fence.FindAllStringSubmatch(text, -1) {
		_, err := ParseManifests("shop.yaml", []byte(m[2]))
		switch m[1] {
		case "yaml":
			examples++
			if err != nil {
				t.Errorf("an example is wrong:\n%v", err)
			}
		case "yaml error":
			if err == nil {
				t.Fatal("the example of errors has none")
			}
			errors = err.Error() + "\n"
		case "text":
			if m[2] != errors {
				t.Errorf("the page shows\n%s\nand the errors are\n%s", m[2], errors)
			}
		}
	}
	if examples != 4 || errors == "" {
		t.Errorf("%d examples", examples)
	}
	all, err := ParseManifests("x.yaml", []byte("application: a\ncomponents: [{name: x, artifact: x}]\n"))
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range []protoreflect.MessageDescriptor{all[0].ProtoReflect().Descriptor(), all[0].GetComponents()[0].ProtoReflect().Descriptor()} {
		for i := range m.Fields().Len() {
			name := m.Fields().Get(i).TextName()
			row := strings.Contains(text, "| `"+name+"` |")
			if _, later := notYet[string(m.Name())][name]; row == later {
				t.Errorf("the page has a row for %s: %v, and the version does not heed it: %v", name, row, later)
			}
		}
	}
	refused := maps.Clone(unsupported["ComponentSpec"])
	maps.Copy(refused, notYet["ComponentSpec"])
	for name := range refused {
		if name != "cost" && name != "content" && !strings.Contains(text, "`"+name+"`") {
			t.Errorf("the page does not say that %s is not in this version", name)
		}
	}
}

func TestStatesPage(t *testing.T) {
	text := page(t, "states.md")
	for _, r := range States {
		var lifecycles, contract []string
		for _, l := range r.Lifecycle {
			if l == LifecycleNone {
				l = "none"
			}
			lifecycles = append(lifecycles, string(l))
		}
		for _, c := range r.Contract {
			contract = append(contract, c.String())
		}
		row := "| `" + string(r.State) + "` | " + strings.Join(lifecycles, ", ") + " | " + strings.Join(contract, ", ") + " | " + r.When + " |"
		if !strings.Contains(text, row) {
			t.Errorf("the page lacks\n%s", row)
		}
	}
}
