package components

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// expansion copies a YAML tree with its aliases written out.
type expansion struct {
	d     *document
	nodes int
	depth int
}

func (x *expansion) expand(n *yaml.Node) (*yaml.Node, bool) {
	x.nodes++
	x.depth++
	defer func() { x.depth-- }()
	if x.nodes > MaxNodes || x.depth > maxDepth {
		x.d.add(n.Line, n.Column, "", "found more than %d values or %d levels once aliases are written out, expected fewer", MaxNodes, maxDepth)
		return nil, false
	}
	if n.Kind == yaml.AliasNode {
		return x.expand(n.Alias)
	}
	out := *n
	out.Anchor, out.Content = "", make([]*yaml.Node, 0, len(n.Content))
	for _, c := range n.Content {
		child, ok := x.expand(c)
		if !ok {
			return nil, false
		}
		out.Content = append(out.Content, child)
	}
	return &out, true
}

// shape checks the tree against the schema and normalises it in place: nulls and what is wrong are left out, attribute values become
// JSON text. It records the place of each path.
func (d *document) shape(n *yaml.Node, m protoreflect.MessageDescriptor, path string) bool {
	d.values[path] = n
	if n.Kind != yaml.MappingNode {
		d.problem(path, "found %s, expected a mapping with %s", found(n), keyList(m))
		return false
	}
	seen := map[string]*yaml.Node{}
	var kept []*yaml.Node
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		at := join(path, key.Value)
		if first := seen[key.Value]; first != nil {
			d.add(key.Line, key.Column, at, "found the key %q a second time, expected it once (the first is at line %d)", key.Value, first.Line)
			continue
		}
		seen[key.Value] = key
		field := d.field(key, m, at)
		if field == nil || isNull(value) {
			continue
		}
		d.keys[at] = key
		if d.shapeField(value, field, at) {
			kept = append(kept, key, value)
		}
	}
	n.Content = kept
	return true
}

// field finds the schema's field for a key, or reports why there is none.
func (d *document) field(key *yaml.Node, m protoreflect.MessageDescriptor, at string) protoreflect.FieldDescriptor {
	if key.Kind != yaml.ScalarNode {
		d.add(key.Line, key.Column, strings.TrimSuffix(at, "."), "found %s as a key, expected one of %s", found(key), keyList(m))
		return nil
	}
	if key.Value == "<<" {
		d.add(key.Line, key.Column, at, "found a merge key, expected the keys themselves: merging is not supported")
		return nil
	}
	if f := m.Fields().ByTextName(key.Value); f != nil {
		if why, ok := notYet[string(m.Name())][key.Value]; ok {
			d.add(key.Line, key.Column, at, "%s is not supported by this version: %s", key.Value, why)
			return nil
		}
		return f
	}
	if why, ok := unsupported[string(m.Name())][key.Value]; ok {
		d.add(key.Line, key.Column, at, "%s is not supported by this version: %s", key.Value, why)
		return nil
	}
	d.add(key.Line, key.Column, at, "found the unknown key %q%s, expected one of %s", shorten(key.Value), didYouMean(key.Value, m), keyList(m))
	return nil
}

func (d *document) shapeField(n *yaml.Node, f protoreflect.FieldDescriptor, path string) bool {
	switch {
	case f.IsMap():
		return d.shapeMap(n, f, path)
	case f.IsList():
		return d.shapeList(n, f, path)
	case f.Kind() == protoreflect.MessageKind:
		return d.shape(n, f.Message(), path)
	}
	d.values[path] = n
	return d.shapeScalar(n, f, path)
}

func (d *document) shapeList(n *yaml.Node, f protoreflect.FieldDescriptor, path string) bool {
	d.values[path] = n
	if n.Kind != yaml.SequenceNode {
		d.problem(path, "found %s, expected a list", found(n))
		return false
	}
	var kept []*yaml.Node
	for i, item := range n.Content {
		at := fmt.Sprintf("%s[%d]", path, i)
		d.values[at] = item
		ok := true
		if f.Kind() == protoreflect.MessageKind {
			// an item that is wrong stays as an empty one: positions in the list are part of the paths
			if ok = d.shape(item, f.Message(), at); !ok {
				item = &yaml.Node{Kind: yaml.MappingNode, Tag: "!!map", Line: item.Line, Column: item.Column}
			}
		} else if !d.shapeScalar(item, f, at) {
			item = &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Line: item.Line, Column: item.Column}
		}
		kept = append(kept, item)
	}
	n.Content = kept
	return true
}

func (d *document) shapeMap(n *yaml.Node, f protoreflect.FieldDescriptor, path string) bool {
	d.values[path] = n
	if n.Kind != yaml.MappingNode {
		d.problem(path, "found %s, expected a mapping of names to values", found(n))
		return false
	}
	seen := map[string]*yaml.Node{}
	var kept []*yaml.Node
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		at := join(path, key.Value)
		switch first := seen[key.Value]; {
		case key.Kind != yaml.ScalarNode || key.Value == "":
			d.add(key.Line, key.Column, path, "found %s as a key, expected a name", found(key))
			continue
		case first != nil:
			d.add(key.Line, key.Column, at, "found the key %q a second time, expected it once (the first is at line %d)", key.Value, first.Line)
			continue
		}
		seen[key.Value] = key
		d.keys[at], d.values[at] = key, value
		if f.TextName() == "attributes" {
			text, err := jsonOf(value)
			if err != nil {
				d.problem(at, "%s", err)
				continue
			}
			value = &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: text, Line: value.Line, Column: value.Column}
		} else if !d.shapeScalar(value, f.MapValue(), at) {
			continue
		}
		kept = append(kept, &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: key.Value, Line: key.Line, Column: key.Column}, value)
	}
	n.Content = kept
	return true
}

func (d *document) shapeScalar(n *yaml.Node, f protoreflect.FieldDescriptor, path string) bool {
	want := "text"
	switch f.Kind() {
	case protoreflect.DoubleKind:
		want = "a number"
	case protoreflect.Uint32Kind:
		want = "a whole number, not negative"
	}
	if n.Kind != yaml.ScalarNode || isNull(n) {
		d.problem(path, "found %s, expected %s", found(n), want)
		return false
	}
	ok := true
	switch f.Kind() {
	case protoreflect.DoubleKind:
		v, err := strconv.ParseFloat(n.Value, 64)
		ok = err == nil && !math.IsNaN(v) && !math.IsInf(v, 0)
	case protoreflect.Uint32Kind:
		_, err := strconv.ParseUint(n.Value, 10, 32)
		ok = err == nil
	}
	if !ok {
		d.problem(path, "found %q, expected %s", shorten(n.Value), want)
	}
	return ok
}

func isNull(n *yaml.Node) bool { return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" }

// found says what a node is, in a person's words.
func found(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	case yaml.ScalarNode:
		if isNull(n) {
			return "nothing"
		}
		return strconv.Quote(shorten(n.Value))
	}
	return "something else"
}

func join(path, key string) string {
	if path == "" {
		return shorten(key)
	}
	return path + "." + shorten(key)
}

func keyList(m protoreflect.MessageDescriptor) string {
	var names []string
	for i := range m.Fields().Len() {
		name := m.Fields().Get(i).TextName()
		if _, later := notYet[string(m.Name())][name]; !later {
			names = append(names, name)
		}
	}
	return strings.Join(names, ", ")
}

// didYouMean finds a key that the user may have meant.
func didYouMean(key string, m protoreflect.MessageDescriptor) string {
	best, distance := "", 3
	plain := strings.ToLower(strings.ReplaceAll(key, "-", "_"))
	for i := range m.Fields().Len() {
		f := m.Fields().Get(i)
		d := min(editDistance(plain, f.TextName()), editDistance(plain, strings.ToLower(f.JSONName())))
		if d < distance && d < len(f.TextName()) {
			best, distance = f.TextName(), d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(" (did you mean %s?)", best)
}

// editDistance counts the single-letter changes from a to b; long words are far from everything.
func editDistance(a, b string) int {
	if len(a) > 32 || len(b) > 32 {
		return max(len(a), len(b))
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			diagonal, row[j] = row[j], min(row[j]+1, row[j-1]+1, diagonal+cost)
		}
	}
	return row[len(b)]
}
