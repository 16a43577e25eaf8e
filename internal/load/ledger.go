package load

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// Outcomes of a write.
const (
	Answered = "answered" // it is there, once
	Refused  = "refused"  // the component said no: it is not there
	Doubt    = "doubt"    // no answer before the deadline: there once, or not at all
)

// Kinds of operations.
const (
	opAdd   = "add"   // copies of a book into a cart
	opOrder = "order" // the cart
	opBook  = "book"  // read a book
	opPut   = "put"
	opGet   = "get"
)

// Entry is one line of the ledger: a write and what came of it.
type Entry struct {
	Time     time.Time `json:"time"` // of the answer, or of giving up
	Client   string    `json:"client"`
	Key      string    `json:"key"` // idempotency key
	Kind     string    `json:"kind"`
	Cart     string    `json:"cart,omitempty"`
	ISBN     string    `json:"isbn,omitempty"`
	Quantity uint32    `json:"quantity,omitempty"`
	Name     string    `json:"name,omitempty"` // key of a put
	Value    string    `json:"value,omitempty"`
	Outcome  string    `json:"outcome"`
	Number   uint64    `json:"number,omitempty"` // answer: the order's number, the key's version
	Node     string    `json:"node,omitempty"`   // that answered, where the answer says so
	Via      string    `json:"via"`              // gateway
	Attempts int       `json:"attempts"`
	MS       float64   `json:"ms"`
	Why      string    `json:"why,omitempty"`
}

// ledger appends entries to a file. Its first error stays.
type ledger struct {
	mu   sync.Mutex // guards the fields below
	file *os.File
	buf  *bufio.Writer
	err  error
}

func createLedger(path string) (*ledger, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fmt.Errorf("ledger: %w", err)
	}
	return &ledger{file: f, buf: bufio.NewWriterSize(f, 64<<10)}, nil
}

func (l *ledger) append(e Entry) {
	raw, err := json.Marshal(e)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		_, err = l.buf.Write(append(raw, '\n'))
	}
	l.err = errors.Join(l.err, err)
}

// flush hands what was appended to the kernel; with it nothing is lost when this process dies.
func (l *ledger) flush() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.err = errors.Join(l.err, l.buf.Flush())
	return l.err
}

func (l *ledger) close() error {
	err := l.flush()
	return errors.Join(err, l.file.Close())
}

// ReadLedger reads a ledger file, in order.
func ReadLedger(path string) ([]Entry, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("ledger: %w", err)
	}
	defer f.Close()
	var out []Entry
	dec := json.NewDecoder(bufio.NewReader(f))
	for {
		var e Entry
		if err := dec.Decode(&e); errors.Is(err, io.EOF) {
			return out, nil
		} else if err != nil {
			return nil, fmt.Errorf("ledger %s, entry %d: %w", path, len(out)+1, err)
		}
		out = append(out, e)
	}
}
