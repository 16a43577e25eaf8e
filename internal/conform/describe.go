package conform

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/Masterminds/semver/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

func descriptions() []check {
	return []check{
		{"description", "names a type, a semantic version and this contract", named},
		{"description", "names each interface once, and describes its service", interfaces},
		{"description", "says which methods have no side effects", idempotency},
		{"description", "gives each attribute a type and a default", attributeSpecs},
		{"description", "says which schemas it writes and reads", schemas},
		{"description", "is the same each time", sameAgain},
	}
}

func named(_ context.Context, r *rig) error {
	d := r.desc
	if d.GetContract() != componentv1.ProtocolVersion {
		return fmt.Errorf("contract is %d, want %d", d.GetContract(), componentv1.ProtocolVersion)
	}
	if _, err := semver.StrictNewVersion(d.GetVersion()); err != nil {
		return fmt.Errorf("version %q: %w", d.GetVersion(), err)
	}
	if d.GetType() == "" || strings.ToLower(d.GetType()) != d.GetType() || strings.ContainsAny(d.GetType(), " /@:") {
		return fmt.Errorf("type %q: want lower case, without spaces, slashes, colons and at signs", d.GetType())
	}
	return nil
}

func interfaces(_ context.Context, r *rig) error {
	files, err := r.files()
	if err != nil {
		return err
	}
	seen := map[string]bool{}
	for _, i := range r.desc.GetProvides() {
		if i.GetName() == "" || seen[i.GetName()] {
			return fmt.Errorf("interface %q: a name that is empty, or there twice", i.GetName())
		}
		seen[i.GetName()] = true
		if i.GetKind() != componentv1.Kind_KIND_GRPC {
			continue
		}
		d, err := files.FindDescriptorByName(protoreflect.FullName(i.GetService()))
		if err != nil {
			return fmt.Errorf("interface %q: services does not describe %q: %w", i.GetName(), i.GetService(), err)
		}
		if _, ok := d.(protoreflect.ServiceDescriptor); !ok {
			return fmt.Errorf("interface %q: %q is no service", i.GetName(), i.GetService())
		}
	}
	for _, i := range r.desc.GetRequires() {
		if i.GetName() == "" || seen["requires "+i.GetName()] {
			return fmt.Errorf("required interface %q: a name that is empty, or there twice", i.GetName())
		}
		seen["requires "+i.GetName()] = true
	}
	if len(r.desc.GetProvides()) == 0 && r.desc.GetState().GetStateful() {
		return errors.New("it has state, and no interface to reach it by")
	}
	return nil
}

func idempotency(_ context.Context, r *rig) error {
	all, err := r.methods()
	if err != nil {
		return err
	}
	if len(all) == 0 {
		return skip("no gRPC methods")
	}
	for _, m := range all {
		if m.readOnly {
			return nil
		}
	}
	return skip("no method is marked idempotency_level = NO_SIDE_EFFECTS: every call then waits for its turn, and for its copies")
}

func attributeSpecs(_ context.Context, r *rig) error {
	if len(r.desc.GetAttributes()) == 0 {
		return skip("no attributes")
	}
	seen := map[string]bool{}
	for _, a := range r.desc.GetAttributes() {
		if a.GetName() == "" || seen[a.GetName()] {
			return fmt.Errorf("attribute %q: a name that is empty, or there twice", a.GetName())
		}
		seen[a.GetName()] = true
		if a.GetMessageType() == "" {
			return fmt.Errorf("attribute %q: no message_type", a.GetName())
		}
		if len(a.GetDefaultJson()) == 0 && !a.GetReadOnly() && !a.GetSecret() {
			return fmt.Errorf("attribute %q: no default_json", a.GetName())
		}
	}
	return nil
}

func schemas(_ context.Context, r *rig) error {
	s := r.desc.GetState()
	if !s.GetStateful() {
		return skip("no state")
	}
	if s.GetWritesSchema() == 0 {
		return errors.New("writes_schema is 0: schemas begin with 1")
	}
	for _, n := range s.GetReadsSchemas() {
		if n == s.GetWritesSchema() {
			return nil
		}
	}
	return fmt.Errorf("it writes schema %d and reads %v: it cannot read what it writes", s.GetWritesSchema(), s.GetReadsSchemas())
}

func sameAgain(ctx context.Context, r *rig) error {
	again, err := r.describe(ctx)
	if err != nil {
		return err
	}
	if !proto.Equal(r.desc, again) {
		return errors.New("a second process describes itself otherwise than the first")
	}
	p, err := r.start(ctx)
	if err != nil {
		return err
	}
	if again, err = p.control.Describe(ctx, &componentv1.DescribeRequest{}); err != nil {
		return err
	}
	if !proto.Equal(r.desc, again) {
		return errors.New("it describes itself otherwise once it is started")
	}
	return nil
}

// files are the descriptors that the component gives, and what every program knows besides.
func (r *rig) files() (*protoregistry.Files, error) {
	set := &descriptorpb.FileDescriptorSet{File: slices.Clone(r.desc.GetServices().GetFile())}
	have := map[string]bool{}
	for _, f := range set.GetFile() {
		have[f.GetName()] = true
	}
	for i := 0; i < len(set.GetFile()); i++ { // what is imported and not given, the standard's own
		for _, dep := range set.GetFile()[i].GetDependency() {
			if fd, err := protoregistry.GlobalFiles.FindFileByPath(dep); err == nil && !have[dep] {
				have[dep] = true
				set.File = append(set.File, protodesc.ToFileDescriptorProto(fd))
			}
		}
	}
	files, err := protodesc.NewFiles(set)
	if err != nil {
		return nil, fmt.Errorf("services is no set of files that go together: %w", err)
	}
	return files, nil
}

// method is one unary or streaming method of the component's own services.
type method struct {
	full     string
	name     string // Method
	service  string // the service's own name, without its package
	readOnly bool
	stream   bool
	in, out  protoreflect.MessageDescriptor
}

func (m *method) empty() *dynamicpb.Message { return dynamicpb.NewMessage(m.in) }
func (m *method) reply() *dynamicpb.Message { return dynamicpb.NewMessage(m.out) }

func (r *rig) methods() ([]*method, error) {
	files, err := r.files()
	if err != nil {
		return nil, err
	}
	var out []*method
	for _, i := range r.desc.GetProvides() {
		d, err := files.FindDescriptorByName(protoreflect.FullName(i.GetService()))
		if err != nil {
			continue // an interface of another kind; one of gRPC is the check before's
		}
		s, ok := d.(protoreflect.ServiceDescriptor)
		if !ok {
			continue
		}
		for n := range s.Methods().Len() {
			m := s.Methods().Get(n)
			options, ok := m.Options().(*descriptorpb.MethodOptions)
			out = append(out, &method{
				full: fmt.Sprintf("/%s/%s", s.FullName(), m.Name()), name: string(m.Name()), service: string(s.Name()),
				readOnly: ok && options.GetIdempotencyLevel() == descriptorpb.MethodOptions_NO_SIDE_EFFECTS,
				stream:   m.IsStreamingClient() || m.IsStreamingServer(), in: m.Input(), out: m.Output(),
			})
		}
	}
	return out, nil
}

// anyMethod is a unary method, whichever.
func (r *rig) anyMethod() (*method, bool) {
	all, err := r.methods()
	if err != nil {
		return nil, false
	}
	for _, m := range all {
		if !m.stream {
			return m, true
		}
	}
	return nil, false
}
