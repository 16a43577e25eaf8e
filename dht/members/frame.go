package members

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/dht/peers"
)

// errBeat: what came on a watch stream is no message of it, as opposed to a stream that broke.
var errBeat = errors.New("not a heartbeat")

// writeFrame writes a message with its uvarint length, in one piece.
func writeFrame(s peers.Stream, msg proto.Message, within time.Duration) error {
	if err := s.SetWriteDeadline(time.Now().Add(within)); err != nil {
		return err
	}
	frame, err := proto.MarshalOptions{}.MarshalAppend(binary.AppendUvarint(make([]byte, 0, 64), uint64(proto.Size(msg))), msg)
	if err != nil {
		return err
	}
	_, err = s.Write(frame)
	return err
}

// readFrame reads one such message of at most maxBeat bytes.
func readFrame(r *bufio.Reader, msg proto.Message) error {
	size := 0
	for shift := 0; ; shift += 7 {
		b, err := r.ReadByte()
		if err != nil {
			return err
		}
		size |= int(b&0x7f) << shift
		if size > maxBeat || shift > 14 {
			return fmt.Errorf("%w: more than %d bytes", errBeat, maxBeat)
		}
		if b < 0x80 {
			break
		}
	}
	body := make([]byte, size)
	if _, err := io.ReadFull(r, body); err != nil {
		return err
	}
	if err := proto.Unmarshal(body, msg); err != nil {
		return fmt.Errorf("%w: %w", errBeat, err)
	}
	return nil
}
