package api

import (
	"encoding/json"
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"
	"google.golang.org/protobuf/types/known/timestamppb"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func TestJSONShape(t *testing.T) {
	for _, x := range []struct {
		m    proto.Message
		want string
	}{
		{&apiv1.TokenResponse{Token: "a<b", Expires: timestamppb.New(time.Unix(1, 500e6))}, `{"token":"a<b","expires":"1970-01-01T00:00:01.5Z","uses":0}`},
		{&apiv1.StatusResponse{Nodes: &apiv1.NodeCounts{Alive: 3}}, `{"cluster":"","nodes":{"alive":3,"suspect":0,"dead":0,"left":0,"quarantined":0},"arbiter":null,"components":null,"unsafe":[],"node":"","version":"","paused":false,"warnings":[],"pages":null,"unsaved":null}`},
		{&apiv1.CheckpointInfo{Seq: math.MaxUint64, AgeMs: proto.Uint64(0)}, `{"seq":18446744073709551615,"bytes":0,"age_ms":0,"replicas":[],"w":0,"root":"","replicas_alive":0,"calls_since":null}`},
		{&apiv1.CallStats{P50Ms: proto.Float64(1.25), PerSecond: math.Inf(1)}, `{"total":0,"failed":0,"retried":0,"held":0,"in_flight":0,"p50_ms":1.25,"p99_ms":null,"per_second":null}`},
		{&apiv1.Row{Values: []*apiv1.Value{{}, {Kind: &apiv1.Value_Integer{Integer: -1 << 62}}, {Kind: &apiv1.Value_Blob{Blob: []byte{255}}}}}, `{"values":[{},{"integer":-4611686018427387904},{"blob":"/w=="}]}`},
		{&apiv1.Overlay{Nodes: map[string]string{"b": "2", "a": "1"}}, `{"version":"","digest":"","nodes":{"a":"1","b":"2"},"stopped":false,"frozen":false,"attributes":{},"bindings":{}}`},
		{(*apiv1.Node)(nil), `null`},
	} {
		got, err := JSON(x.m)
		if err != nil || string(got) != x.want {
			t.Errorf("%T:\n got %s %v\nwant %s", x.m, got, err, x.want)
		}
	}
}

// Every message of the API, filled at random: the encoding is valid JSON, has every field under its own name, integers as numbers, and
// protojson reads the same message back.
func TestJSONReadsBack(t *testing.T) {
	const seed = 7
	rnd := rand.New(rand.NewPCG(seed, 0))
	msgs := apiv1.File_node_api_v1_api_proto.Messages()
	for i := range msgs.Len() {
		mt := messageType(t, msgs.Get(i))
		for round := range 30 {
			m := mt.New()
			fill(rnd, m, 0)
			raw, err := JSON(m.Interface())
			if err != nil {
				t.Fatal(err)
			}
			checkFields(t, m, raw)
			back := mt.New().Interface()
			if err := protojson.Unmarshal(raw, back); err != nil {
				t.Fatalf("seed %d round %d: %s: %v\n%s", seed, round, msgs.Get(i).Name(), err, raw)
			}
			if !proto.Equal(back, m.Interface()) {
				t.Fatalf("seed %d round %d: %s came back changed\n%s\n%s", seed, round, msgs.Get(i).Name(), raw, protojson.Format(m.Interface()))
			}
		}
	}
}

func messageType(t *testing.T, md protoreflect.MessageDescriptor) protoreflect.MessageType {
	t.Helper()
	mt, err := protoregistry.GlobalTypes.FindMessageByName(md.FullName())
	if err != nil {
		t.Fatal(err)
	}
	return mt
}

func checkFields(t *testing.T, m protoreflect.Message, raw []byte) {
	t.Helper()
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(raw, &fields); err != nil {
		t.Fatalf("%s: %v\n%s", m.Descriptor().Name(), err, raw)
	}
	fds := m.Descriptor().Fields()
	for i := range fds.Len() {
		fd := fds.Get(i)
		v, ok := fields[string(fd.Name())]
		if o := fd.ContainingOneof(); o != nil && !o.IsSynthetic() {
			continue
		}
		if !ok {
			t.Fatalf("%s: field %s is missing in %s", m.Descriptor().Name(), fd.Name(), raw)
		}
		switch fd.Kind() {
		case protoreflect.Int64Kind, protoreflect.Uint64Kind, protoreflect.Int32Kind, protoreflect.Uint32Kind:
			if !fd.IsList() && !fd.IsMap() && strings.HasPrefix(string(v), `"`) {
				t.Fatalf("%s: integer %s is the string %s", m.Descriptor().Name(), fd.Name(), v)
			}
		}
	}
}

func fill(rnd *rand.Rand, m protoreflect.Message, depth int) {
	if ts, ok := m.Interface().(*timestamppb.Timestamp); ok {
		ts.Seconds, ts.Nanos = rnd.Int64N(4e9), int32(rnd.IntN(1e9))
		return
	}
	fds := m.Descriptor().Fields()
	for i := range fds.Len() {
		fd := fds.Get(i)
		if rnd.IntN(3) == 0 || depth > 4 {
			continue
		}
		switch {
		case fd.IsList():
			l := m.Mutable(fd).List()
			for range rnd.IntN(3) {
				if fd.Message() != nil {
					fill(rnd, l.AppendMutable().Message(), depth+1)
				} else {
					l.Append(scalar(rnd, fd))
				}
			}
		case fd.IsMap():
			for range rnd.IntN(3) {
				m.Mutable(fd).Map().Set(scalar(rnd, fd.MapKey()).MapKey(), scalar(rnd, fd.MapValue()))
			}
		case fd.Message() != nil:
			fill(rnd, m.Mutable(fd).Message(), depth+1)
		default:
			m.Set(fd, scalar(rnd, fd))
		}
	}
}

func scalar(rnd *rand.Rand, fd protoreflect.FieldDescriptor) protoreflect.Value {
	switch fd.Kind() {
	case protoreflect.BoolKind:
		return protoreflect.ValueOfBool(rnd.IntN(2) == 0)
	case protoreflect.Int64Kind:
		return protoreflect.ValueOfInt64(int64(rnd.Uint64()))
	case protoreflect.Uint64Kind:
		return protoreflect.ValueOfUint64(rnd.Uint64())
	case protoreflect.Uint32Kind:
		return protoreflect.ValueOfUint32(rnd.Uint32())
	case protoreflect.DoubleKind:
		for {
			f := math.Float64frombits(rnd.Uint64())
			if !math.IsNaN(f) && !math.IsInf(f, 0) {
				return protoreflect.ValueOfFloat64(f)
			}
		}
	case protoreflect.BytesKind:
		return protoreflect.ValueOfBytes([]byte{byte(rnd.Uint32()), 255, 0})
	}
	words := []string{"", "shop/store-0", "a\"b\\c\n\t", "<&>", "\u2028 ü 漢", strings.Repeat("x", 70)}
	return protoreflect.ValueOfString(words[rnd.IntN(len(words))])
}
