package bench

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

const (
	syncBytes   = 4 << 10
	syncSamples = 200
)

// fsyncs measures n times what a write of 4 KiB and its fsync take in a folder, in ms, one after the other: what everything that is durable pays here.
func fsyncs(dir string, n int) (out []float64, err error) {
	f, err := os.OpenFile(filepath.Join(dir, "fsync"), os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("measure the disk's fsync: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	buf := make([]byte, syncBytes)
	for i := range n {
		buf[0] = byte(i)
		begin := time.Now()
		if _, err := f.Write(buf); err != nil {
			return nil, fmt.Errorf("measure the disk's fsync: %w", err)
		}
		if err := f.Sync(); err != nil {
			return nil, fmt.Errorf("measure the disk's fsync: %w", err)
		}
		out = append(out, ms(time.Since(begin)))
	}
	return out, nil
}

// fsync is the figure that stands above all that is durable.
func (s *stand) fsync() (Result, error) {
	got, err := fsyncs(s.dir, syncSamples)
	return summary("this disk: write of 4 KiB and fsync in the data folder", "ms", got), err
}
