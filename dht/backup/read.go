package backup

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	"google.golang.org/protobuf/encoding/protodelim"

	"github.com/coppice-project/coppice/dht/arbiter"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

var (
	// ErrForeign is wrapped where a file is no backup at all.
	ErrForeign = errors.New("it is no backup of a cluster")
	// ErrNoComponent is wrapped where a file holds no exported component.
	ErrNoComponent = errors.New("it is no exported component")
	// ErrCut is wrapped where a file ends too early.
	ErrCut = errors.New("it is cut off")
	// ErrDamaged is wrapped where the bytes of a file are not those that were written.
	ErrDamaged = errors.New("it is damaged")
	// ErrNewer is wrapped where a file is of a format that this program does not know.
	ErrNewer = errors.New("it was made by a newer version")
)

// Handler is told what a file holds, in its order. A nil function is not called; an error ends the reading.
type Handler struct {
	Header   func(*wirev1.BackupHeader) error
	Register func(arbiter.Register) error
	Node     func(enc []byte) error
}

// Read reads a whole backup and returns what it holds. Only when it returns without an error was the file whole: whoever must not act on
// half a file reads it twice. The error wraps ErrForeign, ErrCut, ErrDamaged or ErrNewer, or is the reader's or the handler's own.
func Read(in io.Reader, h Handler) (Totals, error) { return read(in, h, clusterTitle, ErrForeign) }

// ReadComponent is Read for a file that holds one component; ErrNoComponent takes the place of ErrForeign.
func ReadComponent(in io.Reader, h Handler) (Totals, error) {
	return read(in, h, componentTitle, ErrNoComponent)
}

func read(in io.Reader, h Handler, title string, foreign error) (Totals, error) {
	r := &reader{in: bufio.NewReaderSize(in, 256<<10), named: title, foreign: foreign}
	if err := r.title(); err != nil {
		return Totals{}, err
	}
	sum := sha256.New()
	sum.Write(r.pending)
	var t Totals
	last := ""
	for n := 0; ; n++ {
		r.pending = r.pending[:0]
		item := new(wirev1.BackupItem)
		if err := (protodelim.UnmarshalOptions{MaxSize: maxItem}).UnmarshalFrom(r, item); err != nil {
			return t, r.why(err)
		}
		if (n == 0) != (item.GetHeader() != nil) {
			return t, fmt.Errorf("%w: item %d, and the header comes first and once", ErrDamaged, n)
		}
		var err error
		switch k := item.GetKind().(type) {
		case *wirev1.BackupItem_Header:
			if f := k.Header.GetFormat(); f != format {
				return t, fmt.Errorf("%w: format %d, this one knows %d", ErrNewer, f, format)
			}
			if h.Header != nil {
				err = h.Header(k.Header)
			}
		case *wirev1.BackupItem_Register:
			reg := arbiter.DecodeRegister(k.Register)
			if reg.Key <= last || t.Nodes > 0 {
				return t, fmt.Errorf("%w: register %q after %q", ErrDamaged, reg.Key, last)
			}
			last = reg.Key
			t.Registers++
			if h.Register != nil {
				err = h.Register(reg)
			}
		case *wirev1.BackupItem_Node:
			t.Nodes++
			t.NodeBytes += uint64(len(k.Node))
			if h.Node != nil {
				err = h.Node(k.Node)
			}
		case *wirev1.BackupItem_End:
			return t, r.end(k.End, t, sum.Sum(nil))
		default:
			return t, fmt.Errorf("%w: item %d is unknown", ErrNewer, n)
		}
		if err != nil {
			return t, err
		}
		sum.Write(r.pending)
	}
}

// reader remembers the bytes of the present item: those of the end are not part of the sum that it tells.
type reader struct {
	in      *bufio.Reader
	named   string // the title that it should have
	foreign error  // what it is where it has another one
	pending []byte
	at      int64
}

func (r *reader) Read(p []byte) (int, error) {
	n, err := r.in.Read(p)
	r.pending = append(r.pending, p[:n]...)
	r.at += int64(n)
	return n, err
}

func (r *reader) ReadByte() (byte, error) {
	b, err := r.in.ReadByte()
	if err == nil {
		r.pending = append(r.pending, b)
		r.at++
	}
	return b, err
}

// title reads the first line.
func (r *reader) title() error {
	title := r.named
	most := len(title) + 8
	var line []byte
	for len(line) < most && !bytes.HasSuffix(line, []byte("\n")) {
		b, err := r.ReadByte()
		if errors.Is(err, io.EOF) {
			if strings.HasPrefix(title, string(line)) || strings.HasPrefix(string(line), title) {
				return fmt.Errorf("%w after %d bytes", ErrCut, len(line))
			}
			break
		}
		if err != nil {
			return err
		}
		line = append(line, b)
	}
	number, ours := strings.CutPrefix(string(line), title)
	if !ours || !strings.HasSuffix(number, "\n") {
		return fmt.Errorf("%w: it begins with %q", r.foreign, line[:min(len(line), len(title))])
	}
	f, err := strconv.Atoi(strings.TrimSuffix(number, "\n"))
	switch {
	case err != nil:
		return fmt.Errorf("%w: it begins with %q", r.foreign, line)
	case f != format:
		return fmt.Errorf("%w: format %d, this one knows %d", ErrNewer, f, format)
	}
	return nil
}

// why explains an item that could not be read.
func (r *reader) why(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w after %d bytes", ErrCut, r.at)
	}
	var large *protodelim.SizeTooLargeError
	if errors.As(err, &large) {
		return fmt.Errorf("%w near byte %d: an item of %d bytes", ErrDamaged, r.at, large.Size)
	}
	return fmt.Errorf("%w near byte %d: %w", ErrDamaged, r.at, err)
}

// end compares what was read with what was written.
func (r *reader) end(e *wirev1.BackupEnd, t Totals, sum []byte) error {
	if !bytes.Equal(e.GetSha256(), sum) {
		return fmt.Errorf("%w: its checksum is another one", ErrDamaged)
	}
	if e.GetRegisters() != t.Registers || e.GetNodes() != t.Nodes || e.GetNodeBytes() != t.NodeBytes {
		return fmt.Errorf("%w: %d registers and %d nodes of %d and %d", ErrDamaged, t.Registers, t.Nodes, e.GetRegisters(), e.GetNodes())
	}
	if _, err := r.ReadByte(); err == nil {
		return fmt.Errorf("%w: more follows its end, at byte %d", ErrDamaged, r.at-1)
	} else if !errors.Is(err, io.EOF) {
		return err
	}
	return nil
}
