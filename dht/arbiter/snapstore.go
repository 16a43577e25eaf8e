package arbiter

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"

	"github.com/cockroachdb/pebble/v2"
	"github.com/hashicorp/raft"
)

const (
	chunkSize     = 256 << 10
	keptSnapshots = 2
	metaVersion   = 1
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// A snapshot's id is (index, term, serial), 24 bytes, in hex for raft. Its chunks are written first; the one synced write of its meta
// record publishes it, with everything before it in Pebble's own log. Chunks
// without a meta record are what a crash or a cancelled transfer left: they go once a newer snapshot is published.

// Create implements raft.SnapshotStore. Nothing can be seen of it before Close.
func (d *disk) Create(version raft.SnapshotVersion, index, term uint64, conf raft.Configuration, confIndex uint64, _ raft.Transport) (raft.SnapshotSink, error) {
	if version != 1 {
		return nil, fmt.Errorf("snapshot version %d is not supported", version)
	}
	d.mu.Lock()
	d.serial++
	id := numbered("", index, term, d.serial)
	d.mu.Unlock()
	return &sink{d: d, id: id, meta: raft.SnapshotMeta{
		Version: version, ID: hex.EncodeToString(id), Index: index, Term: term, Configuration: conf, ConfigurationIndex: confIndex,
	}}, nil
}

type sink struct {
	d      *disk
	id     []byte
	meta   raft.SnapshotMeta
	buf    []byte
	chunks uint64
	crc    uint32
	ended  bool
}

func (s *sink) ID() string { return s.meta.ID }

func (s *sink) Write(p []byte) (int, error) {
	if s.ended {
		return 0, errors.New("write to a snapshot that has ended")
	}
	s.crc = crc32.Update(s.crc, castagnoli, p)
	s.meta.Size += int64(len(p))
	s.buf = append(s.buf, p...)
	for len(s.buf) >= chunkSize {
		if err := s.flush(s.buf[:chunkSize]); err != nil {
			return 0, err
		}
		s.buf = append(s.buf[:0], s.buf[chunkSize:]...)
	}
	return len(p), nil
}

func (s *sink) flush(p []byte) error {
	if err := s.d.write(func() error { return s.d.db.Set(chunkKey(s.id, s.chunks), p, pebble.NoSync) }); err != nil {
		return fmt.Errorf("write snapshot %s: %w", s.meta.ID, err)
	}
	s.chunks++
	return nil
}

// Close publishes the snapshot.
func (s *sink) Close() error {
	if s.ended {
		return nil
	}
	if len(s.buf) > 0 {
		if err := s.flush(s.buf); err != nil {
			return errors.Join(err, s.Cancel())
		}
	}
	s.ended = true
	if err := s.d.write(func() error {
		return s.d.db.Set(append([]byte(preMeta), s.id...), encodeMeta(&s.meta, s.chunks, s.crc), pebble.Sync)
	}); err != nil {
		return fmt.Errorf("publish snapshot %s: %w", s.meta.ID, err)
	}
	return s.d.cleanSnapshots()
}

// Cancel drops it.
func (s *sink) Cancel() error {
	if s.ended {
		return nil
	}
	s.ended = true
	return s.d.dropChunks(s.id)
}

func chunkKey(id []byte, n uint64) []byte {
	return binary.BigEndian.AppendUint64(append([]byte(preChunk), id...), n)
}

func (d *disk) dropChunks(id []byte) error {
	from := append([]byte(preChunk), id...)
	return d.write(func() error {
		return d.db.DeleteRange(from, append(slices.Clone(from), bytes.Repeat([]byte{0xff}, 9)...), pebble.NoSync)
	})
}

// List implements raft.SnapshotStore: highest index first.
func (d *disk) List() ([]*raft.SnapshotMeta, error) {
	var out []*raft.SnapshotMeta
	err := d.use(func() error {
		it, err := d.db.NewIter(&pebble.IterOptions{LowerBound: []byte(preMeta), UpperBound: after(preMeta)})
		if err != nil {
			return err
		}
		for ok := it.Last(); ok; ok = it.Prev() {
			m, _, _, err := decodeMeta(it.Key()[len(preMeta):], it.Value())
			if err != nil {
				return errors.Join(err, it.Close())
			}
			out = append(out, m)
		}
		return it.Close()
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// Open implements raft.SnapshotStore. The contents are checked before the first byte is handed out.
func (d *disk) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	raw, err := hex.DecodeString(id)
	if err != nil || len(raw) != 24 {
		return nil, nil, fmt.Errorf("no snapshot %q", id)
	}
	b, err := d.get(append([]byte(preMeta), raw...))
	if err != nil {
		return nil, nil, fmt.Errorf("snapshot %s: %w", id, err)
	}
	if b == nil {
		return nil, nil, fmt.Errorf("no snapshot %q", id)
	}
	m, chunks, crc, err := decodeMeta(raw, b)
	if err != nil {
		return nil, nil, err
	}
	var all bytes.Buffer
	for n := range chunks {
		c, err := d.get(chunkKey(raw, n))
		if err != nil {
			return nil, nil, fmt.Errorf("snapshot %s: %w", id, err)
		}
		all.Write(c)
	}
	if int64(all.Len()) != m.Size || crc32.Checksum(all.Bytes(), castagnoli) != crc {
		return nil, nil, fmt.Errorf("snapshot %s is damaged on disk", id)
	}
	return m, io.NopCloser(&all), nil
}

// cleanSnapshots drops all but the newest snapshots, and chunks that belong to none.
func (d *disk) cleanSnapshots() error {
	all, err := d.List()
	if err != nil {
		return err
	}
	if len(all) > 0 && d.serial == 0 {
		for _, m := range all {
			raw, _ := hex.DecodeString(m.ID) // List made it
			d.serial = max(d.serial, binary.BigEndian.Uint64(raw[16:]))
		}
	}
	b := d.db.NewBatch()
	lowest := []byte(nil)
	for i, m := range all {
		raw, _ := hex.DecodeString(m.ID)
		if i < keptSnapshots {
			lowest = raw
			continue
		}
		if err := b.Delete(append([]byte(preMeta), raw...), nil); err != nil {
			return err
		}
	}
	// Chunks of what is older than the oldest kept one are of no use; those of newer ones may still be written.
	if lowest != nil {
		if err := b.DeleteRange([]byte(preChunk), append([]byte(preChunk), lowest...), nil); err != nil {
			return err
		}
	}
	return d.write(func() error { return b.Commit(pebble.NoSync) })
}

func encodeMeta(m *raft.SnapshotMeta, chunks uint64, crc uint32) []byte {
	b := []byte{metaVersion}
	b = binary.AppendUvarint(b, uint64(m.Size))
	b = binary.AppendUvarint(b, m.ConfigurationIndex)
	b = binary.AppendUvarint(b, chunks)
	b = binary.BigEndian.AppendUint32(b, crc)
	return append(b, raft.EncodeConfiguration(m.Configuration)...)
}

func decodeMeta(id, b []byte) (*raft.SnapshotMeta, uint64, uint32, error) {
	bad := fmt.Errorf("snapshot %x: its record on disk is damaged", id)
	if len(id) != 24 || len(b) < 1 {
		return nil, 0, 0, bad
	}
	if b[0] != metaVersion {
		return nil, 0, 0, fmt.Errorf("snapshot %x: record format %d, this build knows %d", id, b[0], metaVersion)
	}
	r := bytes.NewReader(b[1:])
	size, err1 := binary.ReadUvarint(r)
	confIndex, err2 := binary.ReadUvarint(r)
	chunks, err3 := binary.ReadUvarint(r)
	var crc [4]byte
	_, err4 := io.ReadFull(r, crc[:])
	if errors.Join(err1, err2, err3, err4) != nil {
		return nil, 0, 0, bad
	}
	conf, err := decodeConfiguration(b[len(b)-r.Len():])
	if err != nil {
		return nil, 0, 0, bad
	}
	return &raft.SnapshotMeta{
		Version: 1, ID: hex.EncodeToString(id), Index: binary.BigEndian.Uint64(id), Term: binary.BigEndian.Uint64(id[8:]),
		Configuration: conf, ConfigurationIndex: confIndex, Size: int64(size),
	}, chunks, binary.BigEndian.Uint32(crc[:]), nil
}

// decodeConfiguration is raft's decoder, which panics on what it cannot read, with an error instead.
func decodeConfiguration(b []byte) (conf raft.Configuration, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("raft configuration: %v", p)
		}
	}()
	return raft.DecodeConfiguration(b), nil
}
