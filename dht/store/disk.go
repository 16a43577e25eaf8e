package store

import (
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"sync"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
)

// Disk configures the watermark. All sizes are bytes of free space on the file system of the data directory.
type Disk struct {
	// Usage reads the file system's free and total bytes. nil: the vfs's own GetDiskUsage (MemFS has none: no watch).
	Usage func() (free, total uint64, err error)
	// Low: below it the node must stop being holder and voter. Default: 3 % of the disk, at least 256 MiB, at most 4 GiB.
	Low uint64
	// Critical: below it the ballast is given up. Default: Low/4.
	Critical uint64
	// Resume: above it the node may take duties again. Default: Low + Low/2. It must exceed Low.
	Resume uint64
	// Ballast is the size of the reserve file. 0: 64 MiB; negative: none.
	Ballast int64
	// Every is how often the space is read (default 5 s; each second while low).
	Every time.Duration
	// OnLow is told each change of Low, in order, from the watch's goroutine; it must not block.
	OnLow func(low bool)
}

const ballastName = "BALLAST"

// disk watches the free space and keeps the ballast.
type disk struct {
	cfg  Disk
	fs   vfs.FS
	path string // of the ballast
	log  *slog.Logger
	done chan struct{}
	wake chan struct{} // an ENOSPC was met: look now
	wg   sync.WaitGroup

	mu         sync.Mutex // guards what follows
	st         Status
	announced  bool // what OnLow heard last
	fullNow    bool // an ENOSPC was met since the last reading
	readFailed bool
	noReserve  bool // the ballast could not be made: said once
}

func newDisk(fs vfs.FS, dir string, cfg Disk, log *slog.Logger) *disk {
	if cfg.Usage == nil {
		cfg.Usage = func() (uint64, uint64, error) {
			u, err := fs.GetDiskUsage(dir)
			return u.AvailBytes, u.TotalBytes, err
		}
	}
	if cfg.Every <= 0 {
		cfg.Every = 5 * time.Second
	}
	if cfg.Ballast == 0 {
		cfg.Ballast = 64 << 20
	}
	d := &disk{
		cfg: cfg, fs: fs, path: fs.PathJoin(dir, ballastName), log: log, done: make(chan struct{}),
		wake: make(chan struct{}, 1),
	}
	if _, err := fs.Stat(d.path); err == nil {
		d.st.Ballast = true
	}
	return d
}

// start reads the disk once, so that Low is right when Open returns, and goes on in the background. A file system without a notion
// of space is looked at only when it says that it is full.
func (d *disk) start(slow func(uint64) uint64) {
	measured := d.check()
	d.wg.Add(1)
	go func() {
		defer d.wg.Done()
		var seen uint64
		for {
			every := d.cfg.Every
			if d.status().Low {
				every = min(every, time.Second)
			}
			var tick <-chan time.Time
			if measured {
				tick = time.After(every)
			}
			select {
			case <-d.done:
				return
			case <-d.wake:
			case <-tick:
			}
			d.check()
			seen = slow(seen)
		}
	}()
}

func (d *disk) stop() {
	close(d.done)
	d.wg.Wait()
}

func (d *disk) status() Status {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.st
}

// check reads the space and acts on it. It reports false when this file system has no notion of space.
func (d *disk) check() bool {
	free, total, err := d.cfg.Usage()
	measured := !errors.Is(err, vfs.ErrUnsupported)
	low, critical, resume := d.cfg.marks(total)
	d.mu.Lock()
	d.st.DiskKnown = err == nil
	unreadable := err != nil && measured && !d.readFailed
	d.readFailed = err != nil
	if err == nil {
		d.st.FreeBytes, d.st.TotalBytes = free, total
		if !d.fullNow {
			d.st.Low = free < low || d.st.Low && free < resume
		}
	}
	giveUp := d.fullNow || err == nil && free < critical
	reserve := err == nil && !d.st.Low && d.cfg.Ballast > 0 && free >= resume+uint64(d.cfg.Ballast)
	is, changed := d.st.Low, d.st.Low != d.announced
	d.announced, d.fullNow = is, false
	d.mu.Unlock()

	if unreadable {
		d.log.Error("cannot read the free disk space: the watch for a full disk is blind", "err", err)
	}
	switch {
	case giveUp:
		d.dropBallast()
	case reserve:
		d.makeBallast()
	}
	if changed {
		d.announce(is, free, low, resume)
	}
	return measured
}

func (d *disk) announce(low bool, free, lowMark, resume uint64) {
	if low {
		d.log.Warn("disk is nearly full: this node stops being holder and voter", "free_bytes", free, "low_bytes", lowMark,
			"try", "free space in the data directory's file system")
	} else {
		d.log.Info("disk has space again: this node may hold and vote", "free_bytes", free, "resume_bytes", resume)
	}
	if d.cfg.OnLow != nil {
		d.cfg.OnLow(low)
	}
}

// marks fills in the defaults, which depend on the size of the disk.
func (c Disk) marks(total uint64) (low, critical, resume uint64) {
	low, critical, resume = c.Low, c.Critical, c.Resume
	if low == 0 {
		low = min(max(total/100*3, 256<<20), 4<<30)
	}
	if critical == 0 {
		critical = low / 4
	}
	if resume <= low {
		resume = low + low/2
	}
	return low, critical, resume
}

// full is called by the file system at the first ENOSPC, while all writes wait: it makes room and lets them go on.
func (d *disk) full() {
	d.mu.Lock()
	d.fullNow, d.st.Low = true, true
	d.mu.Unlock()
	d.dropBallast()
	select {
	case d.wake <- struct{}{}:
	default: // already woken
	}
}

func (d *disk) dropBallast() {
	d.mu.Lock()
	had := d.st.Ballast
	d.st.Ballast = false
	d.mu.Unlock()
	if !had {
		return
	}
	if err := d.fs.Remove(d.path); err != nil {
		d.log.Error("cannot remove the ballast file", "path", d.path, "err", err)
		return
	}
	d.log.Warn("disk is full: the ballast file was given up", "freed_bytes", d.cfg.Ballast)
}

func (d *disk) makeBallast() {
	d.mu.Lock()
	skip := d.st.Ballast || d.noReserve
	d.mu.Unlock()
	if skip {
		return
	}
	err := writeBallast(d.fs, d.path, d.cfg.Ballast)
	d.mu.Lock()
	d.st.Ballast, d.noReserve = err == nil, err != nil
	d.mu.Unlock()
	if err != nil {
		d.log.Error("cannot reserve the ballast file: a full disk will stop this node without warning", "path", d.path, "err", err)
		if err := d.fs.Remove(d.path); err != nil {
			d.log.Debug("remove half-made ballast", "err", err)
		}
	}
}

// writeBallast reserves real blocks. Linux reserves by fallocate; elsewhere, and where the file system cannot, by writing zeros.
func writeBallast(fs vfs.FS, path string, size int64) (err error) {
	f, err := fs.Create(path, vfs.WriteCategoryUnspecified)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Preallocate(0, size); err == nil && (runtime.GOOS == "linux" || f.Fd() == vfs.InvalidFd) {
		return f.Sync()
	}
	for left := size; left > 0; {
		n := min(left, 1<<20)
		if _, err := f.Write(make([]byte, n)); err != nil {
			return fmt.Errorf("write ballast: %w", err)
		}
		left -= n
	}
	return f.Sync()
}
