package members

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"google.golang.org/protobuf/proto"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// Book keeps the known members over a restart.
type Book interface {
	// Load returns what was saved last; nil when nothing was.
	Load() ([]byte, error)
	// Save replaces it: after a crash Load returns the old or the new, never a mixture.
	Save([]byte) error
}

// FileBook returns a Book in one file, replaced by renaming.
func FileBook(fs vfs.FS, path string) Book { return fileBook{fs, path} }

type fileBook struct {
	fs   vfs.FS
	path string
}

func (b fileBook) Load() ([]byte, error) {
	f, err := b.fs.Open(b.path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	data, err := io.ReadAll(f)
	return data, errors.Join(err, f.Close())
}

func (b fileBook) Save(data []byte) error {
	temp := b.path + ".new"
	f, err := b.fs.Create(temp, vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	if err := b.fs.Rename(temp, b.path); err != nil {
		return err
	}
	dir, err := b.fs.OpenDir(b.fs.PathDir(b.path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

const bookFormat = 1

// load takes the book's members into a new view: dead until met. A book that cannot be read costs only the addresses in it.
func (m *Members) load() {
	if m.cfg.Book == nil {
		return
	}
	data, err := m.cfg.Book.Load()
	if err == nil {
		err = m.loadFrom(data)
	}
	if err != nil {
		m.saveErrors.Add(1)
		m.log.Warn("the list of known members cannot be used; the others have to find this node, or be named with --join", "err", err)
	}
}

func (m *Members) loadFrom(data []byte) error {
	if data == nil {
		return nil
	}
	var book wirev1.MemberBook
	if err := proto.Unmarshal(data, &book); err != nil {
		return fmt.Errorf("damaged: %w", err)
	}
	if book.GetFormat() != bookFormat {
		return fmt.Errorf("format %d: this version reads %d", book.GetFormat(), bookFormat)
	}
	if at := book.GetStartedUnixMs(); at >= m.self.info.StartedUnixMs {
		info := *m.self.info
		info.StartedUnixMs = at + 1 // the clock went back: this life still comes after the last
		m.self.info = &info
	}
	if was := versionFromWire(book.GetReadmitted()); was.compare(m.self.info.version()) < 0 {
		info := *m.self.info
		info.readmitted = was
		m.self.info = &info
	}
	if m.ends = book.GetEndsUnixMs(); !book.GetLeft() {
		m.ended()
	}
	for _, w := range book.GetEntries() {
		info, err := infoFromWire(w.GetInfo())
		if err != nil {
			m.badMessages.Add(1)
			continue
		}
		if info.ID == m.id {
			continue
		}
		e := m.add(info.ID)
		if e == nil {
			continue
		}
		m.unknown--
		e.info, e.admitted, e.expelled, e.unheard = m.shared(&info), w.GetAdmitted(), w.GetExpelled(), true
		e.seen = time.UnixMilli(w.GetSeenUnixMs())
		if m.cfg.Learned != nil && len(info.Addrs) > 0 && !e.expelled {
			m.cfg.Learned(e.id, info.Addrs)
		}
		if e.member() {
			m.admitted.Store(e.id, true)
		}
		m.touch(e, "heard")
	}
	return nil
}

// save writes the book if it differs from the last.
func (m *Members) save() {
	if m.cfg.Book == nil {
		return
	}
	m.mu.Lock()
	m.unsaved = false
	book := &wirev1.MemberBook{Format: bookFormat, StartedUnixMs: m.self.info.StartedUnixMs, Readmitted: versionToWire(m.self.info.readmitted), EndsUnixMs: m.ends, Left: m.leaving}
	for _, e := range m.entries {
		if e != m.self && (e.admitted || e.expelled) {
			book.Entries = append(book.Entries, &wirev1.MemberBook_Entry{
				Info: infoToWire(*e.info), Admitted: e.admitted, Expelled: e.expelled, SeenUnixMs: e.seen.UnixMilli(),
			})
		}
	}
	m.mu.Unlock()
	slices.SortFunc(book.Entries, func(a, b *wirev1.MemberBook_Entry) int {
		return bytes.Compare(a.GetInfo().GetId(), b.GetInfo().GetId())
	})
	data, err := proto.MarshalOptions{Deterministic: true}.Marshal(book)
	if err == nil && !bytes.Equal(data, m.lastSaved) {
		err = m.cfg.Book.Save(data)
	}
	if err != nil {
		m.saveErrors.Add(1)
		m.log.Warn("the list of known members could not be saved; a restart may not find them", "err", err)
	} else {
		m.lastSaved = data
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.saving = false
	m.unsaved = m.unsaved || err != nil // tried again with the next round
}
