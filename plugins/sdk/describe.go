package sdk

import (
	"fmt"
	"maps"
	"slices"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// HTTPInterface is the name of the interface that Component.HTTP provides.
const HTTPInterface = "http"

// method is what the SDK has to know about one of the author's methods.
type method struct {
	full     string
	readOnly bool // idempotency_level = NO_SIDE_EFFECTS
	stream   bool
	output   protoreflect.MessageDescriptor
}

// newReply makes an empty reply message to decode a remembered reply into.
func (m *method) newReply() proto.Message {
	if t, err := protoregistry.GlobalTypes.FindMessageByName(m.output.FullName()); err == nil {
		return t.New().Interface()
	}
	return dynamicpb.NewMessage(m.output)
}

// description is everything that can be known about a component before it starts.
type description struct {
	proto   *componentv1.Description
	methods map[string]*method // by "/package.Service/Method"
}

// recorder is the registrar that Component.Register sees first: it only looks.
type recorder struct{ services []*grpc.ServiceDesc }

// RegisterService implements grpc.ServiceRegistrar.
func (r *recorder) RegisterService(desc *grpc.ServiceDesc, _ any) {
	r.services = append(r.services, desc)
}

func describe(c *Component) (*description, error) {
	if err := c.validate(); err != nil {
		return nil, err
	}
	d := &description{
		proto: &componentv1.Description{
			Type: c.Type, Version: c.Version, Contract: componentv1.ProtocolVersion,
			Publishes: c.Publishes,
			Resources: &componentv1.ResourceHint{
				MemoryBytes: c.Resources.MemoryBytes, Cpus: c.Resources.CPUs,
				MaxConcurrentCalls: c.Resources.MaxConcurrentCalls, NeedsNetwork: c.Resources.NeedsNetwork,
			},
			State: &componentv1.StateSpec{},
		},
		methods: map[string]*method{},
	}
	files := map[string]*descriptorpb.FileDescriptorProto{}
	var rec recorder
	if c.Register != nil {
		c.Register(&rec)
	}
	for _, s := range rec.services {
		if err := d.addService(s, files); err != nil {
			return nil, fmt.Errorf("component %q: %w", c.Type, err)
		}
	}
	if c.HTTP != nil {
		d.proto.Provides = append(d.proto.Provides, &componentv1.Interface{Name: HTTPInterface, Kind: componentv1.Kind_KIND_HTTP})
	}
	for _, b := range c.Requires {
		d.proto.Requires = append(d.proto.Requires, &componentv1.Interface{Name: b.name, Service: b.service, Optional: b.optional})
	}
	for _, a := range c.Attributes {
		spec := a.spec()
		if _, err := a.encode(); err != nil {
			return nil, fmt.Errorf("component %q: %w", c.Type, err)
		}
		if desc, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(spec.GetMessageType())); err == nil {
			addFile(desc.ParentFile(), files)
		}
		d.proto.Attributes = append(d.proto.Attributes, spec)
	}
	if c.State != nil {
		d.proto.State = &componentv1.StateSpec{
			Stateful: true, WritesSchema: c.State.Schema, ReadsSchemas: c.State.reads(), Incremental: true, LiveSnapshot: true,
		}
		d.proto.Features = []string{componentv1.FeatureTxnCalls, componentv1.FeatureDeltas, componentv1.FeatureIncremental}
		if c.State.Merge != nil {
			d.proto.Features = append(d.proto.Features, componentv1.FeatureMerge)
		}
	}
	if c.Opaque != nil {
		d.proto.State = &componentv1.StateSpec{
			Stateful: true, WritesSchema: OpaqueSchema, ReadsSchemas: []uint32{OpaqueSchema}, Incremental: true, LiveSnapshot: true,
		}
		d.proto.Features = []string{componentv1.FeatureIncremental}
	}
	d.proto.Services = &descriptorpb.FileDescriptorSet{File: ordered(files)}
	return d, nil
}

// addService adds an interface, its methods and the files that describe them.
func (d *description) addService(s *grpc.ServiceDesc, files map[string]*descriptorpb.FileDescriptorProto) error {
	found, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName(s.ServiceName))
	if err != nil {
		return fmt.Errorf("service %s has no protobuf descriptor in this binary: register it with its generated Register…Server: %w", s.ServiceName, err)
	}
	desc, ok := found.(protoreflect.ServiceDescriptor)
	if !ok {
		return fmt.Errorf("%s is not a service", s.ServiceName)
	}
	name := strings.ToLower(string(desc.Name()))
	for _, other := range d.proto.GetProvides() {
		if other.GetName() == name {
			return fmt.Errorf("services %s and %s would both be interface %q: rename one", other.GetService(), s.ServiceName, name)
		}
	}
	d.proto.Provides = append(d.proto.Provides, &componentv1.Interface{Name: name, Service: s.ServiceName, Kind: componentv1.Kind_KIND_GRPC})
	addFile(desc.ParentFile(), files)
	methods := desc.Methods()
	for i := range methods.Len() {
		m := methods.Get(i)
		options, ok := m.Options().(*descriptorpb.MethodOptions)
		full := fmt.Sprintf("/%s/%s", s.ServiceName, m.Name())
		d.methods[full] = &method{
			full:     full,
			readOnly: ok && options.GetIdempotencyLevel() == descriptorpb.MethodOptions_NO_SIDE_EFFECTS,
			stream:   m.IsStreamingClient() || m.IsStreamingServer(),
			output:   m.Output(),
		}
	}
	return nil
}

// addFile adds a file and all it imports.
func addFile(f protoreflect.FileDescriptor, files map[string]*descriptorpb.FileDescriptorProto) {
	if _, done := files[f.Path()]; done || f.IsPlaceholder() {
		return
	}
	files[f.Path()] = protodesc.ToFileDescriptorProto(f)
	imports := f.Imports()
	for i := range imports.Len() {
		addFile(imports.Get(i).FileDescriptor, files)
	}
}

// ordered lists the files so that each comes after what it imports.
func ordered(files map[string]*descriptorpb.FileDescriptorProto) []*descriptorpb.FileDescriptorProto {
	var out []*descriptorpb.FileDescriptorProto
	done := map[string]bool{}
	var visit func(name string)
	visit = func(name string) {
		f := files[name]
		if f == nil || done[name] {
			return
		}
		done[name] = true
		for _, dep := range f.GetDependency() {
			visit(dep)
		}
		out = append(out, f)
	}
	for _, name := range slices.Sorted(maps.Keys(files)) {
		visit(name)
	}
	return out
}
