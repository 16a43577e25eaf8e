package membrane

import (
	"fmt"
	"slices"
	"sort"
	"strings"
	"sync"

	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// Kind is how a method exchanges messages.
type Kind uint8

const (
	KindUnknown Kind = iota // no descriptor tells
	KindUnary
	KindServerStream
	KindStream // client or bidirectional
)

// Method is what the gate knows of one method.
type Method struct {
	Name string // "/package.Service/Method"
	Kind Kind
	// NoSideEffects and Idempotent are the descriptor's idempotency_level; the first includes the second.
	NoSideEffects, Idempotent bool
}

// Methods is what a component's Description tells about its calls. It is immutable.
type Methods struct {
	byName map[string]Method
	// TxnCalls: each call is one transaction with its answer, found again by its key (feature txn-calls).
	TxnCalls bool
	set      *descriptorpb.FileDescriptorSet
	files    func() (descriptorSource, error)
}

type descriptorSource interface {
	FindDescriptorByName(protoreflect.FullName) (protoreflect.Descriptor, error)
}

// NewMethods reads a Description. It never fails: what its descriptors do not tell is unknown, and calls of it are passed on all the
// same.
func NewMethods(d *componentv1.Description) *Methods {
	m := &Methods{byName: map[string]Method{}, set: d.GetServices(), TxnCalls: slices.Contains(d.GetFeatures(), componentv1.FeatureTxnCalls)}
	for _, f := range d.GetServices().GetFile() {
		for _, s := range f.GetService() {
			service := s.GetName()
			if p := f.GetPackage(); p != "" {
				service = p + "." + service
			}
			for _, md := range s.GetMethod() {
				name := "/" + service + "/" + md.GetName()
				m.byName[name] = methodOf(name, md)
			}
		}
	}
	m.files = sync.OnceValues(func() (descriptorSource, error) {
		files, err := protodesc.NewFiles(m.set)
		if err != nil {
			return nil, fmt.Errorf("descriptors of the component: %w", err)
		}
		return files, nil
	})
	return m
}

func methodOf(name string, md *descriptorpb.MethodDescriptorProto) Method {
	m := Method{Name: name, Kind: KindUnary}
	switch {
	case md.GetClientStreaming():
		m.Kind = KindStream
	case md.GetServerStreaming():
		m.Kind = KindServerStream
	}
	switch md.GetOptions().GetIdempotencyLevel() {
	case descriptorpb.MethodOptions_NO_SIDE_EFFECTS:
		m.NoSideEffects, m.Idempotent = true, true
	case descriptorpb.MethodOptions_IDEMPOTENT:
		m.Idempotent = true
	}
	return m
}

// Get returns what is known of "/package.Service/Method"; of a method that no descriptor names only the name.
func (m *Methods) Get(name string) Method {
	if m != nil {
		if md, ok := m.byName[name]; ok {
			return md
		}
	}
	return Method{Name: name}
}

// List returns every described method by name.
func (m *Methods) List() []Method {
	if m == nil {
		return nil
	}
	out := make([]Method, 0, len(m.byName))
	for _, md := range m.byName {
		out = append(out, md)
	}
	sort.Slice(out, func(i, j int) bool { return out[i].Name < out[j].Name })
	return out
}

// Find returns the one method that is meant by "package.Service/Method", with or without a leading slash, by "Service/Method", or by
// the method's name alone where it is unique.
func (m *Methods) Find(name string) (Method, error) {
	name = strings.TrimPrefix(name, "/")
	var found []Method
	for _, md := range m.List() {
		full := strings.TrimPrefix(md.Name, "/")
		if full == name {
			return md, nil
		}
		if strings.HasSuffix(full, "/"+name) || (strings.Contains(name, "/") && strings.HasSuffix(full, "."+name)) {
			found = append(found, md)
		}
	}
	switch len(found) {
	case 1:
		return found[0], nil
	case 0:
		return Method{}, fmt.Errorf("no method %q; it has %s", name, m.names())
	}
	return Method{}, fmt.Errorf("method %q is not unique; it has %s", name, m.names())
}

func (m *Methods) names() string {
	var names []string
	for _, md := range m.List() {
		names = append(names, strings.TrimPrefix(md.Name, "/"))
	}
	if len(names) == 0 {
		return "no described methods"
	}
	return strings.Join(names, ", ")
}

// Descriptor returns the full descriptor of a method, to build and read its messages (JSON calls).
func (m *Methods) Descriptor(method string) (protoreflect.MethodDescriptor, error) {
	if m == nil || m.set == nil {
		return nil, fmt.Errorf("method %s: the component describes no services", method)
	}
	files, err := m.files()
	if err != nil {
		return nil, err
	}
	service, name, ok := strings.Cut(strings.TrimPrefix(method, "/"), "/")
	if !ok {
		return nil, fmt.Errorf("method %q: want /package.Service/Method", method)
	}
	d, err := files.FindDescriptorByName(protoreflect.FullName(service))
	if err != nil {
		return nil, fmt.Errorf("method %s: %w", method, err)
	}
	sd, ok := d.(protoreflect.ServiceDescriptor)
	if !ok {
		return nil, fmt.Errorf("method %s: %s is no service", method, service)
	}
	md := sd.Methods().ByName(protoreflect.Name(name))
	if md == nil {
		return nil, fmt.Errorf("method %s: %s has no %s", method, service, name)
	}
	return md, nil
}

// Message returns the descriptor of a message type that the component describes; nil when it describes none of that name.
func (m *Methods) Message(name string) protoreflect.MessageDescriptor {
	if m == nil || m.set == nil {
		return nil
	}
	files, err := m.files()
	if err != nil {
		return nil
	}
	d, err := files.FindDescriptorByName(protoreflect.FullName(name))
	if err != nil {
		return nil
	}
	md, ok := d.(protoreflect.MessageDescriptor)
	if !ok {
		return nil
	}
	return md
}
