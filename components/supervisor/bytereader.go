package supervisor

import (
	"bufio"
	"io"
)

// newByteReader gives protodelim the byte-wise reads it needs without a system call for each.
func newByteReader(r io.Reader) *bufio.Reader {
	if b, ok := r.(*bufio.Reader); ok {
		return b
	}
	return bufio.NewReaderSize(r, 64<<10)
}
