package solver

import (
	"fmt"
	"strconv"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/coppice-project/coppice/components"
)

func setByName(m proto.Message, name, value string) error {
	r := m.ProtoReflect()
	f := r.Descriptor().Fields().ByTextName(name)
	if f == nil {
		return fmt.Errorf("no field %s in %s", name, r.Descriptor().Name())
	}
	size, errSize := components.ParseSize(value)
	switch f.Kind() {
	case protoreflect.StringKind:
		r.Set(f, protoreflect.ValueOfString(value))
		return nil
	case protoreflect.BoolKind:
		r.Set(f, protoreflect.ValueOfBool(value == "" || value == "true"))
		return nil
	case protoreflect.Uint64Kind:
		r.Set(f, protoreflect.ValueOfUint64(size))
		return errSize
	case protoreflect.Uint32Kind:
		r.Set(f, protoreflect.ValueOfUint32(uint32(size)))
		return errSize
	case protoreflect.DoubleKind:
		v, err := strconv.ParseFloat(value, 64)
		r.Set(f, protoreflect.ValueOfFloat64(v))
		return err
	}
	return fmt.Errorf("field %s is %s", name, f.Kind())
}
