package blobs

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

const (
	maxFrame = 8 << 20
	// framePages is how many bytes of nodes a frame of a bulk transfer carries, so that other streams of the connection get their turn.
	framePages = 64 << 10
	// keptFrame is how large a buffer for frames is kept for the next one at most.
	keptFrame = 256 << 10
	// maxHave and maxGet bound the hashes of one question.
	maxHave = 8192
	maxGet  = 1024
	// getAnswer is how many bytes of nodes an answer to a get carries.
	getAnswer = 256 << 10
)

var (
	errFrame   = errors.New("frame too large")
	errGarbage = errors.New("not a message of this protocol")
)

// appendFrame appends a message led by its length.
func appendFrame(b []byte, m proto.Message) ([]byte, error) {
	size := proto.Size(m)
	if size > maxFrame {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", errFrame, size, maxFrame)
	}
	b = binary.AppendUvarint(b, uint64(size))
	return proto.MarshalOptions{UseCachedSize: true}.MarshalAppend(b, m)
}

// readFrame reads one message.
func readFrame(r *bufio.Reader, m proto.Message) error {
	raw, err := readRaw(r, nil)
	if err != nil {
		return err
	}
	return decodeFrame(raw, m)
}

// readRaw reads the encoding of one message, into buf where it fits. What has to be made grows with what really comes, not with what is announced.
func readRaw(r *bufio.Reader, buf []byte) ([]byte, error) {
	size, err := binary.ReadUvarint(r)
	if err != nil {
		return nil, err
	}
	if size > maxFrame {
		return nil, fmt.Errorf("%w: %d bytes announced, at most %d", errFrame, size, maxFrame)
	}
	if size <= max(64<<10, uint64(cap(buf))) {
		if size > uint64(cap(buf)) {
			buf = make([]byte, size)
		}
		_, err = io.ReadFull(r, buf[:size])
		return buf[:size], err
	}
	buf, err = io.ReadAll(io.LimitReader(r, int64(size)))
	if err == nil && uint64(len(buf)) < size {
		err = io.ErrUnexpectedEOF
	}
	return buf, err
}

func decodeFrame(raw []byte, m proto.Message) error {
	if err := proto.Unmarshal(raw, m); err != nil {
		return fmt.Errorf("%w: %w", errGarbage, err)
	}
	return nil
}

// The numbers of BlobAsk.pages and BlobPages.nodes.
const (
	askPages   = 3
	pagesNodes = 1
)

// pagesIn returns the nodes of a message that is nothing but pages, as parts of raw: most of what comes is such, and is not copied once more. ok is false
// for every other message.
func pagesIn(raw []byte) (nodes [][]byte, ok bool) {
	num, typ, n := protowire.ConsumeTag(raw)
	if n < 0 || num != askPages || typ != protowire.BytesType {
		return nil, false
	}
	body, m := protowire.ConsumeBytes(raw[n:])
	if m < 0 || n+m != len(raw) {
		return nil, false
	}
	for len(body) > 0 {
		num, typ, n := protowire.ConsumeTag(body)
		if n < 0 || num != pagesNodes || typ != protowire.BytesType {
			return nil, false
		}
		enc, m := protowire.ConsumeBytes(body[n:])
		if m < 0 {
			return nil, false
		}
		nodes, body = append(nodes, enc), body[n+m:]
	}
	return nodes, true
}
