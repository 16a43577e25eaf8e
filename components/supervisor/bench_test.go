package supervisor

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/dht/store"
	"github.com/coppice-project/coppice/plugins/contract/component/frames"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// log is the register of one instance: the arbiter's rules for Commit and SetHolders, without a group behind them.
type register struct {
	mu       sync.Mutex
	reg      arbiter.Register
	exists   bool
	delay    time.Duration
	commits  int
	holders  int           // SetHolders that went through
	doubt    func() string // for each commit: "" carried out; "before", "after", "late": its answer is lost, and it is not, is, will be carried out
	roots    []blobs.Hash  // every root that was committed
	onCommit func()
}

func (r *register) Commit(ctx context.Context, q arbiter.CommitRequest) (arbiter.Register, error) {
	if err := pause(ctx, r.delay); err != nil {
		return arbiter.Register{}, &arbiter.InDoubtError{Cause: err}
	}
	how := ""
	r.mu.Lock()
	if r.doubt != nil {
		how = r.doubt()
	}
	r.mu.Unlock()
	switch how {
	case "before":
		return arbiter.Register{}, &arbiter.InDoubtError{Cause: io.ErrUnexpectedEOF}
	case "after":
		r.commit(q) //nolint:errcheck // nobody hears it
		return arbiter.Register{}, &arbiter.InDoubtError{Cause: io.ErrUnexpectedEOF}
	case "late":
		go func() {
			time.Sleep(30 * time.Millisecond)
			r.commit(q) //nolint:errcheck // nobody hears it
		}()
		return arbiter.Register{}, &arbiter.InDoubtError{Cause: io.ErrUnexpectedEOF}
	}
	return r.commit(q)
}

func (r *register) commit(q arbiter.CommitRequest) (arbiter.Register, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch {
	case !r.exists || q.Epoch != r.reg.Epoch || q.Nonce != r.reg.Nonce:
		return arbiter.Register{}, &arbiter.FencedError{Current: r.reg, Exists: r.exists, Reason: "another epoch"}
	case q.Seq == r.reg.Seq && bytes.Equal(q.Root, r.reg.Root):
		return r.reg, nil
	case q.Seq != r.reg.Seq+1 || len(q.Holders) < int(q.W):
		return arbiter.Register{}, &arbiter.RefusedError{Current: r.reg, Exists: true, Reason: fmt.Sprintf("seq %d after %d", q.Seq, r.reg.Seq)}
	}
	r.reg.Seq, r.reg.Root, r.reg.Holders, r.reg.W = q.Seq, q.Root, q.Holders, q.W
	r.commits++
	r.roots = append(r.roots, blobs.Hash(q.Root))
	if r.onCommit != nil {
		r.onCommit()
	}
	return r.reg, nil
}

func (r *register) SetHolders(_ context.Context, _ string, seq uint64, holders []peer.ID) (arbiter.Register, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if seq != r.reg.Seq {
		return arbiter.Register{}, &arbiter.RefusedError{Current: r.reg, Exists: true}
	}
	r.reg.Holders = holders
	r.holders++
	return r.reg, nil
}

func (r *register) Read(context.Context, string) (arbiter.Register, bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.reg, r.exists, nil
}

func (r *register) claim() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.reg.Epoch++
	r.reg.Nonce = r.reg.Epoch
}

func (r *register) now() arbiter.Register {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.reg
}

// tape is a component whose state is what was written, entry by entry: entry n has mark n and says so.
type tape struct {
	componentv1.ComponentClient
	mu      sync.Mutex
	mark    uint64
	first   uint64 // the oldest mark of the journal
	size    int    // of an entry
	opaque  bool   // checkpoints are always full
	changed chan struct{}
	fulls   int
	broken  error
	slow    time.Duration // of a full checkpoint
	lag     time.Duration // of the journal
	// spoil and spoilEntry change what is sent of a state and of the journal; a frame that is nil never comes.
	spoil      func([]*componentv1.StateFrame) []*componentv1.StateFrame
	spoilEntry func(*componentv1.StateFrame) *componentv1.StateFrame
	asked      int // for checkpoints
}

func newTape() *tape { return &tape{changed: make(chan struct{}), first: 1, size: 16} }

func (c *tape) write(n int) uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.mark += uint64(n)
	close(c.changed)
	c.changed = make(chan struct{})
	return c.mark
}

func (c *tape) entry(mark uint64) *componentv1.StateFrame {
	return frames.Seal(&componentv1.StateFrame{Section: componentv1.SectionJournal, Mark: mark, Last: true, Data: bytes.Repeat([]byte{byte(mark)}, c.size)})
}

// tapeStream is a stream of state frames without a network.
type tapeStream struct {
	grpc.ServerStreamingClient[componentv1.StateFrame]
	recv func() (*componentv1.StateFrame, error)
}

func (f *tapeStream) Recv() (*componentv1.StateFrame, error) { return f.recv() }

func (*tapeStream) Header() (metadata.MD, error) { return nil, nil }

// Checkpoint: a header, all entries after since, an end; since 0 is a full one.
func (c *tape) Checkpoint(ctx context.Context, q *componentv1.CheckpointFrom, _ ...grpc.CallOption) (grpc.ServerStreamingClient[componentv1.StateFrame], error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken != nil {
		return nil, c.broken
	}
	c.asked++
	since := q.GetSinceMark()
	if c.opaque || since+1 < c.first {
		since = 0
	}
	wait := time.Duration(0)
	if since == 0 {
		c.fulls++
		wait = c.slow
	}
	header := &componentv1.StateFrame{Mark: c.mark, SinceMark: since}
	list := []*componentv1.StateFrame{header}
	for m := since + 1; m <= c.mark; m++ {
		f := c.entry(m)
		if since == 0 {
			f.Section, f.Last, f.Offset = componentv1.SectionMap, false, header.GetTotalBytes()
		}
		header.TotalBytes += uint64(len(f.GetData()))
		list = append(list, f)
	}
	list = append(list, &componentv1.StateFrame{Section: componentv1.SectionEnd, Mark: c.mark, Last: true})
	for _, f := range list {
		frames.Seal(f)
	}
	if c.spoil != nil {
		list = c.spoil(list)
	}
	return &tapeStream{recv: func() (*componentv1.StateFrame, error) {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if len(list) == 0 {
			return nil, io.EOF
		}
		if list[0] == nil { // it stands still
			<-ctx.Done()
			return nil, ctx.Err()
		}
		if len(list) == 1 && wait > 0 {
			if err := pause(ctx, wait); err != nil {
				return nil, err
			}
		}
		f := list[0]
		list = list[1:]
		return f, nil
	}}, nil
}

// Deltas streams entries as they are written.
func (c *tape) Deltas(ctx context.Context, q *componentv1.CheckpointFrom, _ ...grpc.CallOption) (grpc.ServerStreamingClient[componentv1.StateFrame], error) {
	next := q.GetSinceMark() + 1
	return &tapeStream{recv: func() (*componentv1.StateFrame, error) {
		for {
			c.mu.Lock()
			if next < c.first {
				c.mu.Unlock()
				return nil, status.Error(codes.OutOfRange, "the journal does not reach back")
			}
			if next <= c.mark {
				f, lag := c.entry(next), c.lag
				if c.spoilEntry != nil {
					f = c.spoilEntry(f)
				}
				next++
				c.mu.Unlock()
				if f == nil { // it stands still
					<-ctx.Done()
					return nil, ctx.Err()
				}
				return f, pause(ctx, lag)
			}
			wait := c.changed
			c.mu.Unlock()
			select {
			case <-wait:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}
	}}, nil
}

// bench is one saver with its component, its register and three stores over a network.
type bench struct {
	t     *testing.T
	net   *peers.Net
	ids   []peer.ID
	fs    []*vfs.MemFS
	disks []*store.Store
	blobs []*blobs.Store
	stop  []func()
	dead  map[peer.ID]bool
	reg   *register
	tape  *tape

	mu        sync.Mutex
	committed uint64
	s         *saver
	end       context.CancelFunc
}

func onBench(t *testing.T, f func(b *bench)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		b := &bench{t: t, net: peers.NewNet(7), dead: map[peer.ID]bool{}, tape: newTape(), reg: &register{exists: true, delay: time.Millisecond, reg: arbiter.Register{Epoch: 1, Nonce: 1}}}
		for i := range 4 {
			b.ids, b.fs = append(b.ids, testID(i+1)), append(b.fs, vfs.NewCrashableMem())
			b.disks, b.blobs, b.stop = append(b.disks, nil), append(b.blobs, nil), append(b.stop, nil)
			b.open(i)
		}
		defer func() {
			if b.end != nil {
				b.end()
				<-b.s.done
			}
			for _, stop := range b.stop {
				stop()
			}
			b.net.Close()
		}()
		f(b)
	})
}

func (b *bench) must(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) open(i int) {
	disk, err := store.Open(b.fs[i], "db", store.Options{Log: slog.New(slog.DiscardHandler)})
	b.must(err)
	bs, err := blobs.Open(blobs.Config{Self: b.ids[i], DB: disk.DB(), Peers: b.net.Join(b.ids[i]), Log: slog.New(slog.DiscardHandler)})
	b.must(err)
	bs.SetOnAcked(func(root blobs.Hash, id peer.ID) {
		if b.s != nil {
			b.s.Acked(root, id)
		}
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); bs.Run(ctx) }() //nolint:errcheck // ends with ctx
	b.disks[i], b.blobs[i] = disk, bs
	b.stop[i] = sync.OnceFunc(func() { cancel(); <-done; bs.Close(); disk.Close() }) //nolint:errcheck // of a test
}

// holders are the first three that live.
func (b *bench) holders() ([]peer.ID, int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var to []peer.ID
	for _, id := range b.ids {
		if !b.dead[id] && len(to) < replicas {
			to = append(to, id)
		}
	}
	return to, len(to)/2 + 1
}

func (b *bench) alive(id peer.ID) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return !b.dead[id]
}

func (b *bench) kill(i int) {
	b.mu.Lock()
	b.dead[b.ids[i]] = true
	b.mu.Unlock()
	b.net.Kill(b.ids[i])
}

func (b *bench) marks() uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.committed
}

// save starts the saver from what the register says.
func (b *bench) save(mode componentsv1.Durability, edit ...func(*saverConfig)) {
	cfg := saverConfig{
		self: b.ids[0], key: testKey, instance: testInstance, schema: 1, epoch: b.reg.reg.Epoch, nonce: b.reg.reg.Nonce, mode: mode, interval: time.Second,
		incremental: true, component: b.tape, store: b.blobs[0], ledger: b.reg, holders: b.holders, alive: b.alive, log: slog.New(slog.DiscardHandler),
		committed: func(mark uint64) { b.mu.Lock(); defer b.mu.Unlock(); b.committed = max(b.committed, mark) },
	}
	for _, f := range edit {
		f(&cfg)
	}
	var head *chainHead
	saved := Saved{Seq: b.reg.reg.Seq, Root: hashFrom(b.reg.reg.Root)}
	if !saved.Root.IsZero() {
		var err error
		head, _, err = readHead(b.blobs[0], saved.Root)
		b.must(err)
		saved.Mark = head.meta.GetMark()
	}
	b.s = newSaver(cfg, head, saved, b.reg.reg.Holders)
	ctx, cancel := context.WithCancel(context.Background())
	b.end = cancel
	go b.s.run(ctx)
}

// restored reads a root as a restore does and returns its mark. Every entry up to it has to be there once, in order.
func (b *bench) restored(i int, root blobs.Hash) uint64 {
	b.t.Helper()
	if !b.blobs[i].Complete(root) {
		b.t.Fatalf("holder %d has not all of %s", i, root.Short())
	}
	steps, head, err := chainSteps(b.blobs[i], root, blobs.Hash{})
	b.must(err)
	at := uint64(0)
	for _, node := range steps {
		b.must(stepFrames(b.blobs[i], node, func(f *componentv1.StateFrame) error {
			switch f.GetSection() {
			case componentv1.SectionHeader:
				if f.GetSinceMark() > at {
					return fmt.Errorf("a delta on top of %d at %d", f.GetSinceMark(), at)
				}
				if f.GetSinceMark() == 0 {
					at = 0
				}
			case componentv1.SectionMap, componentv1.SectionJournal:
				if f.GetMark() > at+1 {
					return fmt.Errorf("entry %d after %d", f.GetMark(), at)
				}
				at = max(at, f.GetMark())
			}
			return nil
		}))
	}
	if at != head.meta.GetMark() {
		b.t.Fatalf("root %s holds mark %d and says %d", root.Short(), at, head.meta.GetMark())
	}
	return at
}

func (b *bench) eventually(what string, cond func() bool) {
	b.t.Helper()
	for end := time.Now().Add(30 * time.Second); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			_, err := b.s.Saved()
			b.t.Fatalf("waited in vain: %s (committed %d of %d; %v)", what, b.marks(), b.tape.mark, err)
		}
	}
}
