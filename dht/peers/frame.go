package peers

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// The wire format of a call. Request: uvarint milliseconds that the caller waits, then the message with its uvarint length
// (protodelim). Answer: one byte, statusReply or statusFailure, then the message likewise: the reply, or a wirev1.Failure.
const (
	statusReply   = 0
	statusFailure = 1
)

// readAhead is the buffer of a stream of calls. There are many streams, and few of them move anything: what is larger is read past it.
const readAhead = 256

var (
	errGarbage     = errors.New("not a call of this protocol")
	errMessageSize = fmt.Errorf("message exceeds %d bytes", MaxMessage)
)

func appendRequest(b []byte, timeout time.Duration, req proto.Message) ([]byte, error) {
	ms := max(1, (timeout+time.Millisecond-1)/time.Millisecond)
	return appendMessage(binary.AppendUvarint(b, uint64(ms)), req)
}

func appendMessage(b []byte, m proto.Message) ([]byte, error) {
	size := proto.Size(m)
	if size > MaxMessage {
		return b, fmt.Errorf("%d bytes: %w", size, errMessageSize)
	}
	return proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(binary.AppendUvarint(b, uint64(size)), m)
}

func appendAnswer(b []byte, resp proto.Message, err error) []byte {
	if err == nil {
		var out []byte
		if out, err = appendMessage(append(b, statusReply), resp); err == nil {
			return out
		}
	}
	f := &wirev1.Failure{Code: wirev1.Failure_INTERNAL, Message: err.Error()}
	if remote, ok := errors.AsType[*RemoteError](err); ok && remote.Code != wirev1.Failure_OK {
		f.Code = remote.Code
	}
	const longest = 4 << 10
	if len(f.Message) > longest {
		f.Message = f.Message[:longest] + "…"
	}
	f.Message = validUTF8(f.Message)
	out, err := appendMessage(append(b, statusFailure), f)
	if err != nil { // cannot be: bounded and valid above
		return append(b, statusFailure, 0)
	}
	return out
}

func decodeAnswer(status byte, body []byte, resp proto.Message) error {
	switch status {
	case statusReply:
		if err := proto.Unmarshal(body, resp); err != nil {
			return fmt.Errorf("answer: %w: %w", errGarbage, err)
		}
		return nil
	case statusFailure:
		var f wirev1.Failure
		if err := proto.Unmarshal(body, &f); err != nil {
			return fmt.Errorf("answered failure: %w: %w", errGarbage, err)
		}
		code := f.GetCode()
		if _, known := wirev1.Failure_Code_name[int32(code)]; !known || code == wirev1.Failure_OK {
			code = wirev1.Failure_INTERNAL
		}
		return &RemoteError{Code: code, Message: f.GetMessage()}
	}
	return fmt.Errorf("answer with status %d: %w", status, errGarbage)
}

// maxTimeout bounds what a caller may ask a server to wait.
const maxTimeout = 24 * time.Hour

func readRequest(r *bufio.Reader, buf []byte) (timeout time.Duration, body []byte, err error) {
	ms, err := readUvarint(r)
	if err != nil {
		return 0, buf, err
	}
	if ms == 0 || ms > uint64(maxTimeout/time.Millisecond) {
		return 0, buf, fmt.Errorf("%w: waits %d ms", errGarbage, ms)
	}
	body, err = readFrame(r, buf)
	return time.Duration(ms) * time.Millisecond, body, err
}

// readFrame reads a length and as many bytes into buf's room, growing it only as bytes arrive: a length alone costs nothing.
func readFrame(r *bufio.Reader, buf []byte) ([]byte, error) {
	size, err := readUvarint(r)
	if err != nil {
		return buf, err
	}
	if size > MaxMessage {
		return buf, fmt.Errorf("%w: a message of %d bytes", errGarbage, size)
	}
	const step = 64 << 10
	for have := 0; have < int(size); {
		n := min(int(size)-have, max(step, have))
		if cap(buf) < have+n {
			grown := make([]byte, have, have+n)
			copy(grown, buf[:have])
			buf = grown
		}
		buf = buf[:have+n]
		if _, err := io.ReadFull(r, buf[have:]); err != nil {
			return buf, err
		}
		have += n
	}
	return buf[:size], nil
}

// readUvarint is binary.ReadUvarint with an overflow that can be told from a broken stream.
func readUvarint(r io.ByteReader) (uint64, error) {
	var x uint64
	for shift := 0; shift < 64; shift += 7 {
		b, err := r.ReadByte()
		if err != nil {
			return 0, err
		}
		x |= uint64(b&0x7f) << shift
		if b < 0x80 {
			return x, nil
		}
	}
	return 0, fmt.Errorf("%w: a length without an end", errGarbage)
}

// buffers holds frames being built or read. Large ones are left to the collector.
var buffers = sync.Pool{New: func() any { b := make([]byte, 0, 1<<10); return &b }}

func getBuffer() *[]byte { return buffers.Get().(*[]byte) }

func putBuffer(b *[]byte) {
	if cap(*b) <= 64<<10 {
		buffers.Put(b)
	}
}
