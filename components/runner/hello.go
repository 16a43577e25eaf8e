package runner

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	helloPoll    = 500 * time.Microsecond // a start takes milliseconds: look often at first
	helloPollMax = 10 * time.Millisecond
	helloMax     = 1 << 20 // how much output is searched for the handshake
)

// helloReader gives go-plugin the handshake line of one process and then the end of its standard output. It reads it from the output
// file, which several processes of an instance may share: the line counts only when it names a socket in this process's own folder.
type helloReader struct {
	path   string
	offset int64
	dir    string
	ended  <-chan struct{} // the process has ended
	given  <-chan struct{} // the start was given up

	closing sync.Once
	closed  chan struct{}

	line []byte // what Read has still to deliver
	done bool
	said atomic.Bool // a handshake line was found
}

func newHelloReader(path string, offset int64, dir string, given <-chan struct{}) *helloReader {
	return &helloReader{path: path, offset: offset, dir: dir, given: given, closed: make(chan struct{})}
}

// Read implements io.Reader for go-plugin's one scanner.
func (h *helloReader) Read(p []byte) (int, error) {
	if !h.done {
		h.line, h.done = h.find(), true
		h.said.Store(h.line != nil)
	}
	if len(h.line) == 0 {
		return 0, io.EOF
	}
	n := copy(p, h.line)
	h.line = h.line[n:]
	return n, nil
}

// Close ends a Read that waits.
func (h *helloReader) Close() error {
	h.closing.Do(func() { close(h.closed) })
	return nil
}

// find waits for the line; nil when the process ended, or the start was given up, without it.
func (h *helloReader) find() []byte {
	wait := helloPoll
	for {
		last := false
		select {
		case <-h.ended:
			last = true // one more look: it may have said it and died
		case <-h.closed:
			return nil
		case <-h.given:
			return nil
		default:
		}
		if line := h.look(); line != nil || last {
			return line
		}
		select {
		case <-h.ended:
		case <-h.closed:
			return nil
		case <-h.given:
			return nil
		case <-time.After(wait):
			wait = min(wait+wait/8, helloPollMax)
		}
	}
}

func (h *helloReader) look() []byte {
	text, err := readFrom(h.path, h.offset, helloMax)
	if err != nil {
		return nil // a rotation in this very moment; the next look or the time limit settles it
	}
	for {
		line, rest, whole := bytes.Cut(text, []byte{'\n'})
		if !whole {
			return nil
		}
		if h.ours(string(line)) {
			return append(bytes.TrimSpace(line), '\n')
		}
		text = rest
	}
}

// ours: CORE|VERSION|NETWORK|ADDRESS|PROTOCOL, with a socket in our folder. A line of that shape on TCP is let through, so that the
// component is refused for what it said.
func (h *helloReader) ours(line string) bool {
	parts := strings.Split(strings.TrimSpace(line), "|")
	if len(parts) < 4 || len(parts[0]) > 3 || parts[0] == "" {
		return false
	}
	if parts[2] == "tcp" {
		return true
	}
	return parts[2] == "unix" && filepath.Dir(filepath.Clean(parts[3])) == filepath.Clean(h.dir)
}

// readFrom reads at most limit bytes from an offset.
func readFrom(path string, offset int64, limit int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // reading
	buf := make([]byte, 0, 4096)
	for len(buf) < limit {
		if len(buf) == cap(buf) {
			buf = append(buf, 0)[:len(buf)]
		}
		n, err := f.ReadAt(buf[len(buf):cap(buf)], offset+int64(len(buf)))
		buf = buf[:len(buf)+n]
		if errors.Is(err, io.EOF) {
			return buf, nil
		}
		if err != nil {
			return nil, err
		}
	}
	return buf[:limit], nil
}
