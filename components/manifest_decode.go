package components

import (
	"fmt"
	"strconv"

	"go.yaml.in/yaml/v3"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// fill writes a tree into a message. The tree is what shape left of it: mappings with the schema's keys only, each value of the kind its
// field wants, no nulls and no aliases.
func (d *document) fill(n *yaml.Node, m protoreflect.Message, path string) {
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i], n.Content[i+1]
		if f := m.Descriptor().Fields().ByTextName(key.Value); f != nil {
			d.fillField(value, f, m, join(path, key.Value))
		}
	}
}

func (d *document) fillField(n *yaml.Node, f protoreflect.FieldDescriptor, m protoreflect.Message, path string) {
	switch {
	case f.IsMap():
		all := m.Mutable(f).Map()
		for i := 0; i+1 < len(n.Content); i += 2 {
			key := n.Content[i].Value
			if v, ok := d.scalar(n.Content[i+1], f.MapValue(), join(path, key)); ok {
				all.Set(protoreflect.ValueOfString(key).MapKey(), v)
			}
		}
	case f.IsList():
		all := m.Mutable(f).List()
		for i, item := range n.Content {
			at := fmt.Sprintf("%s[%d]", path, i)
			if f.Kind() == protoreflect.MessageKind {
				d.fill(item, all.AppendMutable().Message(), at)
			} else if v, ok := d.scalar(item, f, at); ok {
				all.Append(v)
			}
		}
	case f.Kind() == protoreflect.MessageKind:
		d.fill(n, m.Mutable(f).Message(), path)
	default:
		if v, ok := d.scalar(n, f, path); ok {
			m.Set(f, v)
		}
	}
}

// scalar reads one value. The kinds are those that the schema of a manifest has; shape has refused what they cannot hold.
func (d *document) scalar(n *yaml.Node, f protoreflect.FieldDescriptor, path string) (protoreflect.Value, bool) {
	switch f.Kind() {
	case protoreflect.StringKind:
		return protoreflect.ValueOfString(n.Value), true
	case protoreflect.DoubleKind:
		if v, err := strconv.ParseFloat(n.Value, 64); err == nil {
			return protoreflect.ValueOfFloat64(v), true
		}
	case protoreflect.Uint32Kind:
		if v, err := strconv.ParseUint(n.Value, 10, 32); err == nil {
			return protoreflect.ValueOfUint32(uint32(v)), true
		}
	}
	d.problem(path, "found %s, expected a value of kind %s", found(n), f.Kind())
	return protoreflect.Value{}, false
}
