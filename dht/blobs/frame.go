package blobs

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"google.golang.org/protobuf/proto"
)

const (
	maxFrame = 8 << 20
	// framePages is how many bytes of nodes a frame of a bulk transfer carries, so that other streams of the connection get their turn.
	framePages = 64 << 10
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

// readFrame reads one message. The buffer grows with what really comes, not with what is announced.
func readFrame(r *bufio.Reader, m proto.Message) error {
	size, err := binary.ReadUvarint(r)
	if err != nil {
		return err
	}
	if size > maxFrame {
		return fmt.Errorf("%w: %d bytes announced, at most %d", errFrame, size, maxFrame)
	}
	var buf []byte
	if size <= 64<<10 {
		buf = make([]byte, size)
		_, err = io.ReadFull(r, buf)
	} else {
		buf, err = io.ReadAll(io.LimitReader(r, int64(size)))
		if err == nil && uint64(len(buf)) < size {
			err = io.ErrUnexpectedEOF
		}
	}
	if err != nil {
		return err
	}
	if err := proto.Unmarshal(buf, m); err != nil {
		return fmt.Errorf("%w: %w", errGarbage, err)
	}
	return nil
}
