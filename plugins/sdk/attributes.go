package sdk

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// maxAttributeBytes bounds one attribute's JSON.
const maxAttributeBytes = 256 << 10

// Attr is an attribute of any type; only *Attribute implements it.
type Attr interface {
	spec() *componentv1.AttributeSpec
	parse(raw []byte) (any, error)
	store(v any)
	encode() ([]byte, error)
}

// Attribute is a value that operators read and set while the component runs. T is a bool, number, string, a struct of such with json tags, or a
// protobuf message. Make one with NewAttribute, list it in Component.Attributes, read it with Get.
type Attribute[T any] struct {
	name     string
	check    func(T) error
	changed  func(T)
	readOnly bool
	restart  bool
	secret   bool
	fallback T
	value    atomic.Pointer[T]
}

// AttributeOption changes an attribute at its making.
type AttributeOption[T any] func(*Attribute[T])

// Check refuses values: its error is the reason the operator reads.
func Check[T any](check func(T) error) AttributeOption[T] {
	return func(a *Attribute[T]) { a.check = check }
}

// Changed is told each new value, one at a time, after Get already returns it.
func Changed[T any](changed func(T)) AttributeOption[T] {
	return func(a *Attribute[T]) { a.changed = changed }
}

// ReadOnly makes an attribute that only the component itself sets, with Set.
func ReadOnly[T any]() AttributeOption[T] { return func(a *Attribute[T]) { a.readOnly = true } }

// RestartToApply says that a new value counts from the next start on; until then Get returns the old one.
func RestartToApply[T any]() AttributeOption[T] { return func(a *Attribute[T]) { a.restart = true } }

// Secret keeps the value out of what is shown to people.
func Secret[T any]() AttributeOption[T] { return func(a *Attribute[T]) { a.secret = true } }

// NewAttribute makes an attribute with its default value.
func NewAttribute[T any](name string, fallback T, options ...AttributeOption[T]) *Attribute[T] {
	a := &Attribute[T]{name: name, fallback: fallback}
	for _, o := range options {
		o(a)
	}
	a.value.Store(&fallback)
	return a
}

// Get returns the value.
func (a *Attribute[T]) Get() T { return *a.value.Load() }

// Set is for the component itself, for values that only it knows (ReadOnly). It is not remembered over a restart.
func (a *Attribute[T]) Set(v T) { a.value.Store(&v) }

func (a *Attribute[T]) spec() *componentv1.AttributeSpec {
	fallback, err := encodeValue(any(a.fallback))
	if err != nil {
		fallback = nil // the default has no JSON; the type's own check at Serve says so
	}
	return &componentv1.AttributeSpec{
		Name: a.name, MessageType: messageType(any(a.fallback)),
		ReadOnly: a.readOnly, RestartToApply: a.restart, Secret: a.secret, DefaultJson: fallback,
	}
}

// messageType names the protobuf message whose JSON mapping the attribute's JSON is.
func messageType(v any) string {
	if m, ok := v.(proto.Message); ok {
		return string(m.ProtoReflect().Descriptor().FullName())
	}
	switch reflect.TypeOf(v).Kind() {
	case reflect.Bool:
		return "google.protobuf.BoolValue"
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return "google.protobuf.Int64Value"
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return "google.protobuf.UInt64Value"
	case reflect.Float32, reflect.Float64:
		return "google.protobuf.DoubleValue"
	case reflect.String:
		return "google.protobuf.StringValue"
	}
	return "google.protobuf.Value"
}

func encodeValue(v any) ([]byte, error) {
	if m, ok := v.(proto.Message); ok {
		return protojson.Marshal(m)
	}
	return json.Marshal(v)
}

func (a *Attribute[T]) encode() ([]byte, error) {
	b, err := encodeValue(any(a.Get()))
	if err != nil {
		return nil, fmt.Errorf("attribute %q: encode: %w", a.name, err)
	}
	return b, nil
}

func (a *Attribute[T]) parse(raw []byte) (any, error) {
	v, err := decodeValue[T](raw)
	if err != nil {
		return nil, fmt.Errorf("attribute %q: %.100s is not a %s: %w", a.name, raw, messageType(any(a.fallback)), err)
	}
	if a.check != nil {
		if err := a.check(v); err != nil {
			return nil, fmt.Errorf("attribute %q: %.100s: %w", a.name, raw, err)
		}
	}
	return v, nil
}

func decodeValue[T any](raw []byte) (T, error) {
	var v T
	if _, ok := any(v).(proto.Message); ok {
		m, ok := reflect.New(reflect.TypeOf(v).Elem()).Interface().(proto.Message)
		if !ok {
			return v, fmt.Errorf("%T cannot be made", v)
		}
		if err := protojson.Unmarshal(raw, m); err != nil {
			return v, err
		}
		out, ok := any(m).(T)
		if !ok {
			return v, fmt.Errorf("%T cannot be made", v)
		}
		return out, nil
	}
	// Numbers and booleans may come quoted: 64-bit numbers do in protobuf's JSON, anything may from a shell.
	if kind := reflect.TypeOf(v).Kind(); kind != reflect.String {
		var quoted string
		if kind <= reflect.Float64 && json.Unmarshal(raw, &quoted) == nil {
			raw = []byte(quoted)
		}
	} else if !bytes.HasPrefix(bytes.TrimSpace(raw), []byte(`"`)) {
		quoted, err := json.Marshal(string(raw)) // a bare word from a shell is the text itself
		if err != nil {
			return v, err
		}
		raw = quoted
	}
	dec := json.NewDecoder(bytes.NewReader(raw))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&v); err != nil {
		return v, err
	}
	if dec.More() {
		return v, fmt.Errorf("more than one value")
	}
	return v, nil
}

func (a *Attribute[T]) store(v any) {
	value, ok := v.(T)
	if !ok {
		return // parse made it: it is a T
	}
	a.value.Store(&value)
	if a.changed != nil {
		a.changed(value)
	}
}

// attributes are all of a component's, with their revision.
type attributes struct {
	list []Attr

	mu       sync.Mutex // guards everything below
	revision uint64
	pending  map[string][]byte // set, to be applied at the next start
}

func (s *attributes) find(name string) (Attr, error) {
	known := make([]string, 0, len(s.list))
	for _, a := range s.list {
		known = append(known, a.spec().GetName())
		if a.spec().GetName() == name {
			return a, nil
		}
	}
	return nil, status.Errorf(codes.InvalidArgument, "no attribute %q; there are: %s", name, strings.Join(known, ", "))
}

func (s *attributes) get(names []string) (*componentv1.Attributes, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.getLocked(names)
}

func (s *attributes) getLocked(names []string) (*componentv1.Attributes, error) {
	chosen := s.list
	if len(names) > 0 {
		chosen = nil
		for _, n := range names {
			a, err := s.find(n)
			if err != nil {
				return nil, err
			}
			chosen = append(chosen, a)
		}
	}
	out := &componentv1.Attributes{Json: map[string][]byte{}, Revision: s.revision}
	for _, a := range chosen {
		raw, ok := s.pending[a.spec().GetName()]
		if !ok {
			var err error
			if raw, err = a.encode(); err != nil {
				return nil, status.Error(codes.Internal, err.Error())
			}
		}
		out.Json[a.spec().GetName()] = raw
	}
	return out, nil
}

// set checks all values, then applies all or none. starting: nothing runs yet, so no restart has to be
// waited for.
func (s *attributes) set(values map[string][]byte, ifRevision uint64, dryRun, starting bool) (*componentv1.Attributes, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ifRevision != 0 && ifRevision != s.revision {
		return nil, status.Errorf(codes.Aborted, "attributes are at revision %d, not %d: read them again", s.revision, ifRevision)
	}
	type change struct {
		attr  Attr
		value any
	}
	var now []change
	later := maps.Clone(s.pending)
	for _, name := range slices.Sorted(maps.Keys(values)) {
		raw := values[name]
		a, err := s.find(name)
		if err != nil {
			return nil, err
		}
		if len(raw) > maxAttributeBytes {
			return nil, status.Errorf(codes.InvalidArgument, "attribute %q: %d bytes, at most %d", name, len(raw), maxAttributeBytes)
		}
		v, err := a.parse(raw)
		if err != nil {
			return nil, status.Error(codes.InvalidArgument, err.Error())
		}
		switch sp := a.spec(); {
		case sp.GetReadOnly():
			return nil, status.Errorf(codes.FailedPrecondition, "attribute %q is read-only: only the component itself sets it", name)
		case sp.GetRestartToApply() && !starting:
			if later == nil {
				later = map[string][]byte{}
			}
			later[name] = slices.Clone(raw)
		default:
			now = append(now, change{a, v})
		}
	}
	if dryRun {
		return &componentv1.Attributes{Json: values, Revision: s.revision}, nil
	}
	for _, c := range now {
		c.attr.store(c.value)
	}
	s.pending = later
	if len(values) > 0 {
		s.revision++
	}
	return s.getLocked(nil)
}

// adopt sets the revision the node knows, at start.
func (s *attributes) adopt(revision uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revision = max(s.revision, revision)
}
