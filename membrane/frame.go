package membrane

import (
	"google.golang.org/grpc"
	"google.golang.org/grpc/encoding"
	_ "google.golang.org/grpc/encoding/proto" // registers the codec that Codec falls back on
	"google.golang.org/grpc/mem"

	"github.com/coppice-project/coppice/components/runner"
)

// Frame is one gRPC message that is passed on without being decoded. Its bytes are counted by reference: who holds a Frame calls Free
// once, who keeps it longer than a call takes Ref first. The zero value is the empty message.
type Frame struct {
	data mem.BufferSlice
}

// NewFrame holds b, which must not change afterwards.
func NewFrame(b []byte) *Frame { return &Frame{data: mem.BufferSlice{mem.SliceBuffer(b)}} }

// Len returns the number of bytes.
func (f *Frame) Len() int { return f.data.Len() }

// Bytes returns a copy of the message.
func (f *Frame) Bytes() []byte { return f.data.Materialize() }

// Free gives the bytes back. The Frame is empty afterwards and may be received into again.
func (f *Frame) Free() {
	f.data.Free()
	f.data = nil
}

// Codec passes *Frame through untouched and everything else to protobuf. Its name is protobuf's: peers see an ordinary call.
type Codec struct{}

func (Codec) proto() encoding.CodecV2 { return encoding.GetCodecV2("proto") }

// Name implements encoding.CodecV2.
func (Codec) Name() string { return "proto" }

// Marshal implements encoding.CodecV2.
func (c Codec) Marshal(v any) (mem.BufferSlice, error) {
	if f, ok := v.(*Frame); ok {
		f.data.Ref() // gRPC frees what it was given; the Frame keeps its own reference for a retry
		return f.data, nil
	}
	return c.proto().Marshal(v)
}

// Unmarshal implements encoding.CodecV2.
func (c Codec) Unmarshal(data mem.BufferSlice, v any) error {
	if f, ok := v.(*Frame); ok {
		f.data.Free()
		data.Ref()
		f.data = append(mem.BufferSlice(nil), data...)
		return nil
	}
	return c.proto().Unmarshal(data, v)
}

// MaxMessage is the largest message that passes a gate, in bytes.
const MaxMessage = runner.MaxMessage

// maxStreams bounds the concurrent calls of one connection; what is held stays in HTTP/2 flow control, not in our memory.
const maxStreams = 20_000

// NewServer returns a gRPC server that hands every call of an unknown service to h as raw frames.
func NewServer(h grpc.StreamHandler, opts ...grpc.ServerOption) *grpc.Server {
	return grpc.NewServer(append([]grpc.ServerOption{
		grpc.ForceServerCodecV2(Codec{}), grpc.UnknownServiceHandler(h), grpc.MaxRecvMsgSize(MaxMessage),
		grpc.MaxConcurrentStreams(maxStreams),
	}, opts...)...)
}

// callOptions make a client connection send and receive frames.
var callOptions = []grpc.CallOption{grpc.ForceCodecV2(Codec{}), grpc.MaxCallRecvMsgSize(MaxMessage)}
