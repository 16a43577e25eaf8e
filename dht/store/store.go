package store

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/cockroachdb/pebble/v2"
	"github.com/cockroachdb/pebble/v2/bloom"
	"github.com/cockroachdb/pebble/v2/vfs"
)

// ErrClosed is returned by a Datastore whose Store was closed.
var ErrClosed = errors.New("store is closed")

// Options tune a Store. The zero value is what a node uses.
type Options struct {
	Log *slog.Logger // nil: slog.Default()
	// CacheBytes is the block cache (default 8 MiB), MemTableBytes one memtable (default 8 MiB, which it grows to as it is written; at most three at a time).
	CacheBytes, MemTableBytes int64
	// OnFatal is called once when Pebble cannot go on; it should bring the node down. nil: the process exits with status 1.
	OnFatal func(error)
	// Disk is the watermark's configuration.
	Disk Disk
}

// Store is an open database. Its methods are safe for concurrent use.
type Store struct {
	db    *pebble.DB
	log   *slog.Logger
	disk  *disk
	fatal func(error)
	fs    vfs.FS        // what Pebble writes through
	dead  chan struct{} // closed when Pebble cannot go on

	mu       sync.Mutex // guards closed and inFlight
	idle     *sync.Cond // inFlight is 0
	closed   bool
	inFlight int // Datastore operations and open queries, for which Close waits

	backgroundErrors, corruptions, stalls, slow atomic.Uint64
	lastErr                                     atomic.Pointer[error]
	fatalOnce                                   sync.Once
}

// Open opens the database in dir on fs, creating both when absent. It fails when another process has it open.
func Open(fs vfs.FS, dir string, opts Options) (*Store, error) {
	if opts.Log == nil {
		opts.Log = slog.Default()
	}
	if opts.CacheBytes <= 0 {
		opts.CacheBytes = 8 << 20
	}
	if opts.MemTableBytes <= 0 {
		opts.MemTableBytes = 8 << 20
	}
	if err := MkdirAll(fs, dir); err != nil {
		return nil, fmt.Errorf("create data directory %s: %w", dir, err)
	}
	s := &Store{log: opts.Log, fatal: opts.OnFatal, dead: make(chan struct{})}
	s.idle = sync.NewCond(&s.mu)
	s.disk = newDisk(fs, dir, opts.Disk, opts.Log)
	// Pebble writes through a file system that drops the ballast at the first ENOSPC and tries again once.
	s.fs = vfs.OnDiskFull(fs, s.disk.full)
	if err := s.open(dir, fs, opts); err != nil {
		return nil, err
	}
	s.disk.start(s.reportSlow)
	return s, nil
}

// open opens Pebble on a goroutine of its own: when it cannot go on in the middle of that, its goroutine ends, and the caller's must not.
func (s *Store) open(dir string, fs vfs.FS, opts Options) error {
	type opened struct {
		db  *pebble.DB
		err error
	}
	done := make(chan opened, 1)
	go func() {
		db, err := pebble.Open(dir, s.pebbleOptions(s.fs, fs, opts))
		done <- opened{db, err}
	}()
	select {
	case o := <-done:
		if o.err != nil {
			return fmt.Errorf("open database %s: %w (is another node running with this data directory?)", dir, o.err)
		}
		s.db = o.db
		return nil
	case <-s.dead:
		return fmt.Errorf("open database %s: %w; free disk space or check the disk, then start the node again", dir, s.Status().LastError)
	}
}

// FS is the file system as this store uses it: at the first ENOSPC the ballast is given up, and the write tried again. What else the node writes
// to the same disk should go through it.
func (s *Store) FS() vfs.FS { return s.fs }

// ErrFailed is wrapped by Close after Pebble could not go on.
var ErrFailed = errors.New("the database failed")

// MkdirAll creates dir (0700) and makes its entry, and those of the parents made on the way, durable: without that a power loss may
// take a new directory away together with the synced files in it.
func MkdirAll(fs vfs.FS, dir string) error {
	var missing []string // deepest first
	for d := dir; d != fs.PathDir(d); d = fs.PathDir(d) {
		if _, err := fs.Stat(d); err == nil {
			break
		}
		missing = append(missing, d)
	}
	if err := fs.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	for _, d := range missing {
		if err := SyncDir(fs, fs.PathDir(d)); err != nil {
			return err
		}
	}
	return nil
}

// SyncDir makes the entries of a directory durable: files created, renamed or removed in it.
func SyncDir(fs vfs.FS, dir string) error {
	f, err := fs.OpenDir(dir)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func (s *Store) pebbleOptions(fs, root vfs.FS, opts Options) *pebble.Options {
	o := &pebble.Options{
		FS:                          fs,
		CacheSize:                   opts.CacheBytes,
		MemTableSize:                uint64(opts.MemTableBytes),
		MemTableStopWritesThreshold: 3,
		MaxOpenFiles:                256,
		FormatMajorVersion:          pebble.FormatNewest,
		WALBytesPerSync:             1 << 20, // so that the fsync at the end of much has little left to do
		CompactionConcurrencyRange:  func() (int, int) { return 1, 2 },
		Logger:                      pebbleLog{s},
		EventListener:               s.listener(),
	}
	// One file a flush instead of eight, each of which costs its fsyncs.
	o.TargetFileSizes = [...]int64{16 << 20, 16 << 20, 16 << 20, 16 << 20, 32 << 20, 64 << 20, 128 << 20}
	for i := range o.Levels {
		o.Levels[i].FilterPolicy = bloom.FilterPolicy(10)
	}
	if vfs.Root(root) == vfs.Default {
		o.WithFSDefaults() // reports writes that take seconds; needs real time, so not in simulations
	}
	return o
}

// emptyFlush is how Pebble ends a flush that found nothing to write; it does not export the error.
const emptyFlush = "pebble: empty table"

func (s *Store) listener() *pebble.EventListener {
	failed := func(what string, err error) {
		if err != nil && !errors.Is(err, pebble.ErrCancelledCompaction) {
			s.background(fmt.Errorf("%s: %w", what, err))
		}
	}
	return &pebble.EventListener{
		BackgroundError: func(err error) { failed("background", err) },
		DataCorruption: func(i pebble.DataCorruptionInfo) {
			s.corruptions.Add(1)
			failed("corrupt data in "+i.Path, i.Details)
		},
		FlushEnd: func(i pebble.FlushInfo) {
			if i.Err != nil && i.Err.Error() == emptyFlush {
				return
			}
			failed("flush", i.Err)
		},
		CompactionEnd: func(i pebble.CompactionInfo) { failed("compaction", i.Err) },
		WALCreated: func(i pebble.WALCreateInfo) {
			if i.Err == nil {
				return
			}
			// Pebble panics next, with locks in its hands that not even a recovered panic gives back. Nobody may write any more, so this
			// goroutine stays here until the process ends.
			s.Fail(fmt.Errorf("create WAL: %w", i.Err))
			select {}
		},
		ManifestCreated: func(i pebble.ManifestCreateInfo) { failed("create manifest", i.Err) },
		WriteStallBegin: func(i pebble.WriteStallBeginInfo) {
			s.stalls.Add(1)
			s.log.Warn("database delays writes", "reason", i.Reason)
		},
		// Called from the goroutine that watches for slowness, which must not do I/O: the disk watch logs it.
		DiskSlow: func(pebble.DiskSlowInfo) { s.slow.Add(1) },
	}
}

// DB returns the database itself, for packages that own a key prefix. It must not be used after Close.
func (s *Store) DB() *pebble.DB { return s.db }

// Status is the store's health as of now.
type Status struct {
	// FreeBytes and TotalBytes are of the file system; DiskKnown says whether they could be read.
	FreeBytes, TotalBytes uint64
	DiskKnown             bool
	// Low: the node must not hold or vote. Ballast: the reserve is in place.
	Low, Ballast bool
	// BackgroundErrors counts what failed in the background since Open, Corruptions the corrupt blocks met, Stalls the times writes
	// were delayed, Slow the disk operations that took longer than 5 s. LastError is the newest of them.
	BackgroundErrors, Corruptions, Stalls, Slow uint64
	LastError                                   error
}

// Status returns the store's health.
func (s *Store) Status() Status {
	st := s.disk.status()
	st.BackgroundErrors, st.Corruptions = s.backgroundErrors.Load(), s.corruptions.Load()
	st.Stalls, st.Slow = s.stalls.Load(), s.slow.Load()
	if p := s.lastErr.Load(); p != nil {
		st.LastError = *p
	}
	return st
}

// Low reports whether the disk is so full that this node must be neither holder nor voter.
func (s *Store) Low() bool { return s.disk.status().Low }

// Free returns the free bytes of the file system as last read; ok is false when they are not known.
func (s *Store) Free() (bytes uint64, ok bool) {
	st := s.disk.status()
	return st.FreeBytes, st.DiskKnown
}

// Close flushes and closes the database and leaves all data in place. Datastore operations and unclosed queries end first; later
// ones return ErrClosed.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	select {
	case <-s.dead: // who held its locks has ended: it would wait for that for ever
		s.mu.Unlock()
		s.disk.stop()
		return fmt.Errorf("close database: %w before: %w", ErrFailed, s.Status().LastError)
	default:
	}
	for s.inFlight > 0 {
		s.idle.Wait()
	}
	s.mu.Unlock()
	s.disk.stop()
	if err := s.db.Close(); err != nil {
		return fmt.Errorf("close database: %w", err)
	}
	return nil
}

// use holds the database open until the returned function is called. Uses may nest: once Close has begun, new ones fail.
func (s *Store) use() (func(), error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, ErrClosed
	}
	s.inFlight++
	return s.unuse, nil
}

func (s *Store) unuse() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.inFlight--; s.inFlight == 0 {
		s.idle.Broadcast()
	}
}

func (s *Store) background(err error) {
	s.backgroundErrors.Add(1)
	s.lastErr.Store(&err)
	s.log.Error("database", "err", err)
}

func (s *Store) reportSlow(last uint64) uint64 {
	n := s.slow.Load()
	if n != last {
		s.log.Warn("disk is slow: an operation took more than 5 s", "times", n)
	}
	return n
}

// die never returns: the write that led here must not be acknowledged.
func (s *Store) die(err error) {
	s.Fail(err)
	runtime.Goexit()
}

// Fail has the database end as it does when Pebble itself cannot go on. It is for who writes through DB() and learns of a failed fsync: Pebble
// returns that of an asynchronous write to its caller and goes on.
func (s *Store) Fail(err error) {
	s.lastErr.Store(&err)
	s.fatalOnce.Do(func() {
		close(s.dead)
		s.log.Error("database cannot go on", "err", err, "try", "free disk space or check the disk, then start the node again")
		if s.fatal == nil {
			os.Exit(1)
		}
		s.fatal(err)
	})
}

// pebbleLog carries Pebble's log to slog.
type pebbleLog struct{ s *Store }

func (l pebbleLog) Infof(format string, args ...any) {
	l.s.log.Debug("pebble", "msg", fmt.Sprintf(format, args...))
}

func (l pebbleLog) Errorf(format string, args ...any) {
	l.s.log.Error("pebble", "err", fmt.Sprintf(format, args...))
}

func (l pebbleLog) Fatalf(format string, args ...any) { l.s.die(fmt.Errorf(format, args...)) }
