package backup

import (
	"bufio"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"

	"google.golang.org/protobuf/encoding/protodelim"

	"github.com/coppice-project/coppice/dht/arbiter"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

const (
	// The title of its kind and the format's number make the first line of a file.
	clusterTitle   = "coppice backup "
	componentTitle = "coppice component "
	format         = 1
	// maxItem bounds one item: a node has at most 1 MiB of data, a header as many roots as a cluster has checkpoints.
	maxItem = 64 << 20
)

// Totals are what a file holds.
type Totals struct {
	Registers, Nodes, NodeBytes uint64
}

// Writer writes a backup. It is used by one goroutine.
type Writer struct {
	out *bufio.Writer
	sum hash.Hash
	all io.Writer // both
	Totals
	last string // key
}

// NewWriter writes the header of a cluster's backup. The format in it is set here.
func NewWriter(out io.Writer, h *wirev1.BackupHeader) (*Writer, error) {
	return newWriter(out, h, clusterTitle)
}

// NewComponentWriter writes the header of a file that holds one component: the registers of its application, its instance and its artifact, and their nodes.
func NewComponentWriter(out io.Writer, h *wirev1.BackupHeader) (*Writer, error) {
	return newWriter(out, h, componentTitle)
}

func newWriter(out io.Writer, h *wirev1.BackupHeader, title string) (*Writer, error) {
	w := &Writer{out: bufio.NewWriterSize(out, 256<<10), sum: sha256.New()}
	w.all = io.MultiWriter(w.out, w.sum)
	if _, err := fmt.Fprintf(w.all, "%s%d\n", title, format); err != nil {
		return nil, fmt.Errorf("write the backup: %w", err)
	}
	h.Format = format
	return w, w.put(&wirev1.BackupItem{Kind: &wirev1.BackupItem_Header{Header: h}})
}

func (w *Writer) put(item *wirev1.BackupItem) error {
	if _, err := protodelim.MarshalTo(w.all, item); err != nil {
		return fmt.Errorf("write the backup: %w", err)
	}
	return nil
}

// Register writes a register. They come in order of their keys, before the first node.
func (w *Writer) Register(r arbiter.Register) error {
	if r.Key <= w.last || w.Nodes > 0 {
		return fmt.Errorf("write the backup: register %q after %q and %d nodes", r.Key, w.last, w.Nodes)
	}
	w.last = r.Key
	w.Registers++
	return w.put(&wirev1.BackupItem{Kind: &wirev1.BackupItem_Register{Register: arbiter.EncodeRegister(r)}})
}

// Node writes the encoding of a node.
func (w *Writer) Node(enc []byte) error {
	w.Nodes++
	w.NodeBytes += uint64(len(enc))
	return w.put(&wirev1.BackupItem{Kind: &wirev1.BackupItem_Node{Node: enc}})
}

// Close writes the end. Without it the file is cut off.
func (w *Writer) Close() error {
	end := &wirev1.BackupEnd{Registers: w.Registers, Nodes: w.Nodes, NodeBytes: w.NodeBytes, Sha256: w.sum.Sum(nil)}
	if _, err := protodelim.MarshalTo(w.out, &wirev1.BackupItem{Kind: &wirev1.BackupItem_End{End: end}}); err != nil {
		return fmt.Errorf("write the backup: %w", err)
	}
	if err := w.out.Flush(); err != nil {
		return fmt.Errorf("write the backup: %w", err)
	}
	return nil
}
