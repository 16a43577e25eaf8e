package node

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// logPoll is how often a followed file is looked at.
const logPoll = 200 * time.Millisecond

// logDir is where the output of this node's components lies, a folder per instance.
func (n *Node) logDir() string { return filepath.Join(n.cfg.Data, "logs") }

func (n *Node) logFile(instance string) string {
	return filepath.Join(n.logDir(), strings.ReplaceAll(instance, "/", "_"), "output.log")
}

// tailLog sends the last lines of an instance's output on this node, and with follow those that come.
func (n *Node) tailLog(ctx context.Context, instance string, tail int, follow bool, send func(*apiv1.LogLine) error) error {
	if tail <= 0 {
		tail = defaultTail
	}
	path := n.logFile(instance)
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return api.Fail(connect.CodeNotFound, "logs "+instance, "it has written nothing on "+n.cfg.Name+" yet", "coppice events /apps/"+instance)
	}
	if err != nil {
		return fail("logs "+instance, err)
	}
	defer func() { f.Close() }() // only read
	lines, err := lastLines(f, tail)
	if err != nil {
		return fail("logs "+instance, err)
	}
	out := func(line string) error {
		return send(&apiv1.LogLine{Time: timestamppb.Now(), Instance: instance, Node: n.cfg.Name, Stream: "stdout", Text: line})
	}
	for _, l := range lines {
		if err := out(l); err != nil {
			return err
		}
	}
	if !follow {
		return nil
	}
	r := bufio.NewReader(f)
	var part bytes.Buffer
	for {
		chunk, err := r.ReadString('\n')
		part.WriteString(chunk)
		if err == nil {
			line := strings.TrimRight(part.String(), "\n")
			part.Reset()
			if err := out(line); err != nil {
				return err
			}
			continue
		}
		if !errors.Is(err, io.EOF) {
			return fail("logs "+instance, err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-n.stopped:
			return nil
		case <-time.After(logPoll):
		}
		if g, ok := rotated(f, path); ok {
			f.Close() // only read
			f, r = g, bufio.NewReader(g)
		}
	}
}

// lastLines reads the last lines of a file, whose size the runner bounds, and leaves it at its end.
func lastLines(f *os.File, tail int) ([]string, error) {
	var ring []string
	sc := bufio.NewScanner(f)
	sc.Buffer(make([]byte, 64<<10), 1<<20)
	for sc.Scan() {
		ring = append(ring, sc.Text())
		if len(ring) > 2*tail {
			ring = append(ring[:0], ring[len(ring)-tail:]...)
		}
	}
	if err := sc.Err(); err != nil && !errors.Is(err, bufio.ErrTooLong) {
		return nil, fmt.Errorf("read %s: %w", f.Name(), err)
	}
	if len(ring) > tail {
		ring = ring[len(ring)-tail:]
	}
	_, err := f.Seek(0, io.SeekEnd)
	return ring, err
}

// rotated opens the file anew when another lies under its name now, or when it was cut.
func rotated(f *os.File, path string) (*os.File, bool) {
	now, err := os.Stat(path)
	if err != nil {
		return nil, false
	}
	was, err := f.Stat()
	if err != nil {
		return nil, false
	}
	at, err := f.Seek(0, io.SeekCurrent)
	if err == nil && os.SameFile(now, was) && now.Size() >= at {
		return nil, false
	}
	g, err := os.Open(path)
	return g, err == nil
}
