package api

import (
	"bytes"
	"cmp"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// maxDepth bounds nesting; the API's own messages nest five deep.
const maxDepth = 64

// JSON encodes a message as scripts read it: fields in the order of the schema under their own names (snake_case), numbers as numbers,
// defaults written out, lists and maps never null, keys of maps sorted. An unset optional number, time or message is null; of a oneof
// only what is set appears. Times are RFC 3339 in UTC, bytes are base64, a number that JSON does not have (NaN, infinite) is null.
// protojson reads it back.
func JSON(m proto.Message) ([]byte, error) { return AppendJSON(nil, m) }

// AppendJSON appends the encoding of a message.
func AppendJSON(b []byte, m proto.Message) ([]byte, error) {
	if m == nil || !m.ProtoReflect().IsValid() {
		return append(b, "null"...), nil
	}
	return appendMessage(b, m.ProtoReflect(), 0)
}

func appendMessage(b []byte, m protoreflect.Message, depth int) ([]byte, error) {
	if depth > maxDepth {
		return nil, fmt.Errorf("encode %s: nested more than %d deep", m.Descriptor().FullName(), maxDepth)
	}
	if m.Descriptor().FullName() == "google.protobuf.Timestamp" {
		return appendTime(b, m), nil
	}
	b = append(b, '{')
	first := true
	for i := range m.Descriptor().Fields().Len() {
		fd := m.Descriptor().Fields().Get(i)
		if o := fd.ContainingOneof(); o != nil && !o.IsSynthetic() && !m.Has(fd) {
			continue
		}
		if !first {
			b = append(b, ',')
		}
		first = false
		b = append(AppendString(b, string(fd.Name())), ':')
		var err error
		if b, err = appendField(b, m, fd, depth); err != nil {
			return nil, err
		}
	}
	return append(b, '}'), nil
}

func appendField(b []byte, m protoreflect.Message, fd protoreflect.FieldDescriptor, depth int) ([]byte, error) {
	switch {
	case fd.IsList():
		return appendList(b, fd, m.Get(fd).List(), depth)
	case fd.IsMap():
		return appendMap(b, fd, m.Get(fd).Map(), depth)
	case fd.HasPresence() && !m.Has(fd):
		return append(b, "null"...), nil
	}
	return appendValue(b, fd, m.Get(fd), depth)
}

func appendList(b []byte, fd protoreflect.FieldDescriptor, l protoreflect.List, depth int) ([]byte, error) {
	b = append(b, '[')
	for i := range l.Len() {
		if i > 0 {
			b = append(b, ',')
		}
		var err error
		if b, err = appendValue(b, fd, l.Get(i), depth); err != nil {
			return nil, err
		}
	}
	return append(b, ']'), nil
}

func appendMap(b []byte, fd protoreflect.FieldDescriptor, m protoreflect.Map, depth int) ([]byte, error) {
	keys := make([]protoreflect.MapKey, 0, m.Len())
	m.Range(func(k protoreflect.MapKey, _ protoreflect.Value) bool {
		keys = append(keys, k)
		return true
	})
	slices.SortFunc(keys, func(x, y protoreflect.MapKey) int { return cmp.Compare(x.String(), y.String()) })
	b = append(b, '{')
	for i, k := range keys {
		if i > 0 {
			b = append(b, ',')
		}
		b = append(AppendString(b, k.String()), ':')
		var err error
		if b, err = appendValue(b, fd.MapValue(), m.Get(k), depth); err != nil {
			return nil, err
		}
	}
	return append(b, '}'), nil
}

func appendValue(b []byte, fd protoreflect.FieldDescriptor, v protoreflect.Value, depth int) ([]byte, error) {
	switch fd.Kind() {
	case protoreflect.BoolKind:
		return strconv.AppendBool(b, v.Bool()), nil
	case protoreflect.EnumKind:
		if ev := fd.Enum().Values().ByNumber(v.Enum()); ev != nil {
			return AppendString(b, string(ev.Name())), nil
		}
		return strconv.AppendInt(b, int64(v.Enum()), 10), nil
	case protoreflect.Int32Kind, protoreflect.Sint32Kind, protoreflect.Sfixed32Kind,
		protoreflect.Int64Kind, protoreflect.Sint64Kind, protoreflect.Sfixed64Kind:
		return strconv.AppendInt(b, v.Int(), 10), nil
	case protoreflect.Uint32Kind, protoreflect.Fixed32Kind, protoreflect.Uint64Kind, protoreflect.Fixed64Kind:
		return strconv.AppendUint(b, v.Uint(), 10), nil
	case protoreflect.FloatKind:
		return AppendFloat(b, v.Float(), 32), nil
	case protoreflect.DoubleKind:
		return AppendFloat(b, v.Float(), 64), nil
	case protoreflect.StringKind:
		return AppendString(b, v.String()), nil
	case protoreflect.BytesKind:
		return AppendString(b, base64.StdEncoding.EncodeToString(v.Bytes())), nil
	case protoreflect.MessageKind, protoreflect.GroupKind:
		return appendMessage(b, v.Message(), depth+1)
	}
	return nil, fmt.Errorf("encode %s: unknown kind %s", fd.FullName(), fd.Kind())
}

// AppendFloat appends a number of the given bit size, or null for one that JSON does not have.
func AppendFloat(b []byte, f float64, bits int) []byte {
	if math.IsNaN(f) || math.IsInf(f, 0) {
		return append(b, "null"...)
	}
	format := byte('f')
	if abs := math.Abs(f); abs != 0 && (abs < 1e-6 || abs >= 1e21) {
		format = 'e'
	}
	return strconv.AppendFloat(b, f, format, -1, bits)
}

// AppendString appends a JSON string; what is not UTF-8 in it becomes U+FFFD.
func AppendString(b []byte, s string) []byte {
	var buf bytes.Buffer
	enc := json.NewEncoder(&buf)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(s); err != nil { // a string is always encoded
		return append(b, `""`...)
	}
	return append(b, bytes.TrimSuffix(buf.Bytes(), []byte("\n"))...)
}

func appendTime(b []byte, m protoreflect.Message) []byte {
	f := m.Descriptor().Fields()
	t := time.Unix(m.Get(f.ByName("seconds")).Int(), m.Get(f.ByName("nanos")).Int()).UTC()
	if t.Year() < 1 || t.Year() > 9999 { // RFC 3339 has no other years
		return append(b, "null"...)
	}
	return AppendString(b, t.Format(time.RFC3339Nano))
}

// jsonCodec gives clients that speak JSON (curl, the dashboard) the same shapes as the command line.
type jsonCodec struct{}

func (jsonCodec) Name() string { return "json" }

func (jsonCodec) Marshal(v any) ([]byte, error) {
	m, ok := v.(proto.Message)
	if !ok {
		return nil, fmt.Errorf("encode %T: not a protobuf message", v)
	}
	return JSON(m)
}

func (jsonCodec) Unmarshal(b []byte, v any) error {
	m, ok := v.(proto.Message)
	if !ok {
		return fmt.Errorf("decode into %T: not a protobuf message", v)
	}
	if len(b) == 0 {
		return nil // an empty body is an empty request
	}
	return protojson.UnmarshalOptions{DiscardUnknown: false}.Unmarshal(b, m)
}
