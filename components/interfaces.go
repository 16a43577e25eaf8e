package components

import (
	"fmt"
	"slices"
	"strings"

	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/descriptorpb"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// Types of interfaces (the Fractal specification 2.0-3, §4: a client interface may be bound to a server interface whose type is a subtype of its own). An
// interface's type is its kind and, of gRPC, its service with the methods and messages of the description.

// Provides says why a description does not provide what an interface requires; nil: it does. Kinds that are not gRPC have no further type.
func Provides(d *componentv1.Description, r *componentv1.Interface) error {
	var has []string
	for _, p := range d.GetProvides() {
		if p.GetKind() == r.GetKind() && (r.GetService() == "" || p.GetService() == r.GetService()) {
			return nil
		}
		has = append(has, typeText(p))
	}
	if len(has) == 0 {
		return fmt.Errorf("%s is required, and it provides nothing", typeText(r))
	}
	return fmt.Errorf("%s is required, and it provides %s", typeText(r), strings.Join(has, ", "))
}

func typeText(i *componentv1.Interface) string {
	switch i.GetKind() {
	case componentv1.Kind_KIND_HTTP:
		return "http"
	case componentv1.Kind_KIND_EVENT:
		return "events"
	}
	return i.GetService()
}

// Substitutes lists, in words, what those who call old would miss or misread at next; empty: next may take its place. Added interfaces, methods and fields are
// no difference; a field that is gone is none either, for protobuf leaves it out.
func Substitutes(old, next *componentv1.Description) []string {
	var out []string
	before, now := filesOf(old), filesOf(next)
	for _, p := range old.GetProvides() {
		i := slices.IndexFunc(next.GetProvides(), func(q *componentv1.Interface) bool { return q.GetName() == p.GetName() })
		switch {
		case i < 0:
			out = append(out, fmt.Sprintf("interface %s (%s) is gone", p.GetName(), typeText(p)))
		case next.GetProvides()[i].GetKind() != p.GetKind() || next.GetProvides()[i].GetService() != p.GetService():
			out = append(out, fmt.Sprintf("interface %s was %s and is %s", p.GetName(), typeText(p), typeText(next.GetProvides()[i])))
		case p.GetKind() == componentv1.Kind_KIND_GRPC:
			a, b := serviceIn(before, p.GetService()), serviceIn(now, p.GetService())
			if a != nil && b != nil { // else nobody could call it by its description
				out = append(out, serviceDiffers(a, b)...)
			}
		}
	}
	return out
}

// filesOf are a description's files, with what they import; nil when they do not go together.
func filesOf(d *componentv1.Description) *protoregistry.Files {
	set := &descriptorpb.FileDescriptorSet{File: slices.Clone(d.GetServices().GetFile())}
	have := map[string]bool{}
	for _, f := range set.GetFile() {
		have[f.GetName()] = true
	}
	for i := 0; i < len(set.GetFile()); i++ {
		for _, dep := range set.GetFile()[i].GetDependency() {
			if fd, err := protoregistry.GlobalFiles.FindFileByPath(dep); err == nil && !have[dep] {
				have[dep] = true
				set.File = append(set.File, protodesc.ToFileDescriptorProto(fd))
			}
		}
	}
	files, err := protodesc.NewFiles(set)
	if err != nil {
		return nil
	}
	return files
}

func serviceIn(files *protoregistry.Files, name string) protoreflect.ServiceDescriptor {
	if files == nil {
		return nil
	}
	d, err := files.FindDescriptorByName(protoreflect.FullName(name))
	if err != nil {
		return nil
	}
	s, ok := d.(protoreflect.ServiceDescriptor)
	if !ok {
		return nil
	}
	return s
}

func serviceDiffers(a, b protoreflect.ServiceDescriptor) []string {
	var out []string
	seen := map[[2]protoreflect.FullName]bool{}
	for i := range a.Methods().Len() {
		m := a.Methods().Get(i)
		name := fmt.Sprintf("%s/%s", a.FullName(), m.Name())
		n := b.Methods().ByName(m.Name())
		switch {
		case n == nil:
			out = append(out, "method "+name+" is gone")
			continue
		case n.IsStreamingClient() != m.IsStreamingClient() || n.IsStreamingServer() != m.IsStreamingServer():
			out = append(out, fmt.Sprintf("method %s was %s and is %s", name, streaming(m), streaming(n)))
		case readOnly(m) && !readOnly(n):
			out = append(out, "method "+name+" had no side effects and has some: callers may have asked it again at will")
		}
		out = append(out, messageDiffers(m.Input(), n.Input(), seen)...)
		out = append(out, messageDiffers(m.Output(), n.Output(), seen)...)
	}
	return out
}

func streaming(m protoreflect.MethodDescriptor) string {
	switch {
	case m.IsStreamingClient() && m.IsStreamingServer():
		return "a stream both ways"
	case m.IsStreamingClient():
		return "a stream of requests"
	case m.IsStreamingServer():
		return "a stream of answers"
	}
	return "one request, one answer"
}

func readOnly(m protoreflect.MethodDescriptor) bool {
	o, ok := m.Options().(*descriptorpb.MethodOptions)
	return ok && o.GetIdempotencyLevel() == descriptorpb.MethodOptions_NO_SIDE_EFFECTS
}

// messageDiffers compares what is on the wire: fields go by their numbers, names do not matter.
func messageDiffers(a, b protoreflect.MessageDescriptor, seen map[[2]protoreflect.FullName]bool) []string {
	pair := [2]protoreflect.FullName{a.FullName(), b.FullName()}
	if seen[pair] {
		return nil
	}
	seen[pair] = true
	var out []string
	for i := range a.Fields().Len() {
		f := a.Fields().Get(i)
		g := b.Fields().ByNumber(f.Number())
		if g == nil {
			continue
		}
		if was, is := wire(f), wire(g); was != is {
			out = append(out, fmt.Sprintf("field %d of %s (%s) was %s and is %s", f.Number(), a.FullName(), f.Name(), was, is))
			continue
		}
		if f.Message() != nil {
			out = append(out, messageDiffers(f.Message(), g.Message(), seen)...)
		}
	}
	return out
}

// wire is how a field's values are written. Text and bytes are one, and so are the plain integers, truth values and enums (protobuf's language guide, "updating
// a message type").
func wire(f protoreflect.FieldDescriptor) string {
	kind := f.Kind().String()
	switch f.Kind() {
	case protoreflect.StringKind, protoreflect.BytesKind:
		kind = "text or bytes"
	case protoreflect.Int32Kind, protoreflect.Int64Kind, protoreflect.Uint32Kind, protoreflect.Uint64Kind, protoreflect.BoolKind, protoreflect.EnumKind:
		kind = "an integer"
	case protoreflect.Sint32Kind, protoreflect.Sint64Kind:
		kind = "a zigzag integer"
	case protoreflect.MessageKind, protoreflect.GroupKind:
		kind = "a message"
	}
	switch {
	case f.IsMap():
		return "a map"
	case f.IsList():
		return "a list of " + kind
	}
	return kind
}
