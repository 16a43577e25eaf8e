package runner

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
)

// OutputLog is the name, in a Spec's LogDir, of the file with standard output and error; its predecessor has ".1" appended.
const OutputLog = "output.log"

const logCheck = time.Second // how often the size is looked at

// logFiles bounds the output files. The components write to them directly (a pipe to the daemon would kill them by SIGPIPE when it
// dies), so the files are copied and cut, not renamed: O_APPEND continues at the new end. Lines written between the last copy and the
// cut are lost.
type logFiles struct {
	mu sync.Mutex // guards the rotation: several processes of an instance share a file
}

// openLog opens dir's output file for appending and says where new output will begin.
func openLog(dir string) (*os.File, int64, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, 0, fmt.Errorf("output folder: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(dir, OutputLog), os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return nil, 0, fmt.Errorf("output file: %w", err)
	}
	st, err := f.Stat()
	if err != nil {
		return nil, 0, errors.Join(fmt.Errorf("output file: %w", err), f.Close())
	}
	return f, st.Size(), nil
}

// rotate moves the content of path to path.1 when it is longer than limit.
func (l *logFiles) rotate(path string, limit int64) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	st, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil // its folder was removed with the instance
	}
	if err != nil {
		return fmt.Errorf("bound output: %w", err)
	}
	if st.Size() <= limit {
		return nil
	}
	src, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("bound output: %w", err)
	}
	defer src.Close() //nolint:errcheck // truncated explicitly
	// A writer faster than the limit in one check: the newest part is what counts.
	if st.Size() > 2*limit {
		if _, err := src.Seek(st.Size()-limit, io.SeekStart); err != nil {
			return fmt.Errorf("bound output: %w", err)
		}
	}
	dst, err := os.OpenFile(path+".1", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("bound output: %w", err)
	}
	_, err = io.CopyN(dst, src, 2*limit)
	if errors.Is(err, io.EOF) {
		err = nil
	}
	if err == nil {
		err = src.Truncate(0)
	}
	if err = errors.Join(err, dst.Close()); err != nil {
		return fmt.Errorf("bound output: %w", err)
	}
	return nil
}

// lastLines returns the end of what was written after offset, for error messages: at most n lines and 2 KiB.
func lastLines(path string, offset int64, n int) string {
	const limit = 2 << 10
	st, err := os.Stat(path)
	if err != nil {
		return ""
	}
	from := max(offset, st.Size()-limit)
	if st.Size() < offset {
		from = max(0, st.Size()-limit) // it was cut meanwhile
	}
	b, err := readFrom(path, from, limit)
	if err != nil {
		return ""
	}
	lines := strings.Split(strings.TrimSpace(string(bytes.ToValidUTF8(b, []byte("?")))), "\n")
	if len(lines) > n {
		lines = lines[len(lines)-n:]
	}
	return strings.Join(lines, " | ")
}
