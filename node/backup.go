package node

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/supervisor"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/backup"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/events"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

const (
	// snapshotTime bounds the reading of the registers, backupFetchTime the fetching of one checkpoint or artifact.
	snapshotTime    = 10 * time.Second
	backupFetchTime = 10 * time.Minute
	// backupTries: under load a checkpoint may be superseded and collected while a backup fetches it. Then the registers are read anew.
	backupTries = 5
	// backupPin keeps what a backup has gathered; it is renewed until the last byte is sent.
	backupPin = 10 * time.Minute
)

// Backup writes what cannot be derived: the arbiter's registers as of one entry of its log, and the pages of the checkpoints and artifacts
// that they name. A voter does it, for its registers are all of one moment.
func (v *verbs) Backup(ctx context.Context, r *apiv1.BackupRequest, s *connect.ServerStream[apiv1.BackupChunk]) error {
	n, begin := v.n, time.Now()
	sctx, cancel := context.WithTimeout(ctx, snapshotTime)
	snap, err := n.arbiter.Snapshot(sctx)
	cancel()
	if errors.Is(err, arbiter.ErrNotVoting) {
		leader := n.arbiter.Status().Leader
		if leader == n.id || leader == "" {
			return api.Fail(connect.CodeUnavailable, "backup", "the arbiter's leadership changes just now", "the same command again")
		}
		c, err := api.Forward(ctx, n, leader.String())
		if err != nil {
			return err
		}
		from, err := c.Backup(ctx, r)
		if err != nil {
			return err
		}
		return api.Relay(from, s)
	}
	if err != nil {
		return fail("backup", err)
	}
	b := &backingUp{n: n, stream: s, sum: sha256.New(), pin: "backup/" + rand.Text(), some: r.GetPartial()}
	defer n.blobs.Unpin(b.pin)
	if err := b.gather(ctx, snap); err != nil {
		return api.Fail(codeOf(err), "backup", err.Error(), "coppice doctor; coppice backup --partial FILE leaves out what is lost")
	}
	if err := b.write(ctx); err != nil {
		return fail("backup", err)
	}
	b.out.TookMs = ms(time.Since(begin))
	n.log.Info("backup", "index", b.out.GetIndex(), "bytes", b.out.GetBytes(), "omitted", len(b.out.GetOmitted()), "took", time.Since(begin))
	n.events.Publish(events.Event{
		Channel: "/nodes/" + n.cfg.Name, Type: "backup", Trigger: "operator",
		Message: fmt.Sprintf("a backup of %d bytes was made, as of entry %d of incarnation %d", b.out.GetBytes(), b.out.GetIndex(), b.out.GetIncarnation()),
	})
	return s.Send(&apiv1.BackupChunk{Kind: &apiv1.BackupChunk_Done{Done: b.out}})
}

// backingUp is one backup being made.
type backingUp struct {
	n      *Node
	stream *connect.ServerStream[apiv1.BackupChunk]
	sum    hash.Hash
	pin    string
	some   bool // leave out what nobody has any more

	snap  arbiter.Snapshot
	at    time.Time
	roots []blobs.Hash
	lost  [][]byte // roots that nobody has any more
	out   *apiv1.BackupSummary
}

// wantedRoot is a root that a register names.
type wantedRoot struct {
	root blobs.Hash
	what string // in words
	must bool   // without it the backup is of no use for what it belongs to
}

// gather brings all pages here. When one is gone that must be there, the registers are read again: a newer checkpoint has taken its place.
func (b *backingUp) gather(ctx context.Context, snap arbiter.Snapshot) error {
	for try := 1; ; try++ {
		b.at = time.Now()
		err := b.fetch(ctx, snap)
		if err == nil || try == backupTries || ctx.Err() != nil {
			return err
		}
		b.n.log.Info("backup: the registers are read again", "error", err)
		sctx, cancel := context.WithTimeout(ctx, snapshotTime)
		snap, err = b.n.arbiter.Snapshot(sctx)
		cancel()
		if err != nil {
			return err
		}
	}
}

func (b *backingUp) fetch(ctx context.Context, snap arbiter.Snapshot) error {
	b.snap, b.roots, b.lost = snap, nil, nil
	b.out = &apiv1.BackupSummary{
		Cluster: snap.Cluster, Node: b.n.cfg.Name, Incarnation: snap.Incarnation, Index: snap.Index, Taken: timestamppb.New(b.at), Registers: uint64(len(snap.Registers)),
	}
	wanted, err := rootsOf(snap.Registers, b.out)
	if err != nil {
		return err
	}
	seen := map[blobs.Hash]bool{}
	for _, w := range wanted {
		if seen[w.root] {
			continue
		}
		seen[w.root] = true
		if !b.n.blobs.Complete(w.root) {
			if err := b.say("fetching " + w.what); err != nil {
				return err
			}
		}
		fctx, cancel := context.WithTimeout(ctx, backupFetchTime)
		err := b.n.blobs.Fetch(fctx, w.root, b.n.aliveIDs())
		cancel()
		switch {
		case err == nil:
			b.roots = append(b.roots, w.root)
			b.n.blobs.Pin(b.pin, backupPin, b.roots...)
		case w.must && !b.some || ctx.Err() != nil:
			return fmt.Errorf("%s: %w", w.what, err)
		default:
			b.lost = append(b.lost, w.root[:])
			b.out.Omitted = append(b.out.Omitted, fmt.Sprintf("%s: %v", w.what, err))
		}
	}
	return nil
}

func (b *backingUp) say(what string) error {
	return b.stream.Send(&apiv1.BackupChunk{Kind: &apiv1.BackupChunk_State{State: what}})
}

// rootsOf lists the roots that the registers name, and counts what they are of.
func rootsOf(regs []arbiter.Register, count *apiv1.BackupSummary) ([]wantedRoot, error) {
	var out []wantedRoot
	add := func(root []byte, must bool, format string, args ...any) {
		if h, err := blobs.ParseHash(root); err == nil && !h.IsZero() {
			out = append(out, wantedRoot{root: h, what: fmt.Sprintf(format, args...), must: must})
		}
	}
	for _, reg := range regs {
		switch {
		case strings.HasPrefix(reg.Key, components.InstancePrefix):
			name := components.InstanceOfKey(reg.Key)
			if reg.Seq > 0 {
				add(reg.Root, true, "checkpoint %d of %s", reg.Seq, name)
				count.Checkpoints++
			}
			body, err := bodyOf(reg)
			if err != nil {
				return nil, err
			}
			add(body.GetFallback().GetRoot(), false, "the state of %s before its last change of version", name)
			add(body.GetPrevious().GetRoot(), false, "the state that undo gives %s", name)
		case strings.HasPrefix(reg.Key, components.BranchPrefix):
			add(reg.Root, false, "branch %s", strings.TrimPrefix(reg.Key, components.BranchPrefix))
		case strings.HasPrefix(reg.Key, components.HistoryPrefix):
			h, err := supervisor.ReadHistory(reg)
			if err != nil {
				return nil, err
			}
			for _, e := range h.GetEntries() {
				add(e.GetRoot(), false, "earlier checkpoint %s of %s", components.CheckpointID(e.GetNumber()), h.GetInstance())
			}
		case strings.HasPrefix(reg.Key, components.ArtifactPrefix):
			var art componentsv1.Artifact
			if err := proto.Unmarshal(reg.Body, &art); err != nil {
				return nil, fmt.Errorf("%s: %w", reg.Key, err)
			}
			add(art.GetRoot(), true, "artifact %s@%s", art.GetName(), art.GetVersion())
			count.Artifacts++
		case strings.HasPrefix(reg.Key, components.ApplicationPrefix) && reg.Key != components.ApplicationRegister(components.SystemApplication):
			count.Applications++
		}
	}
	return out, nil
}

// write streams the file.
func (b *backingUp) write(ctx context.Context) error {
	stop := b.keepPinned(ctx)
	defer stop()
	if err := b.say(fmt.Sprintf("writing registers (%d), checkpoints (%d) and artifacts (%d)", b.out.GetRegisters(), b.out.GetCheckpoints(), b.out.GetArtifacts())); err != nil {
		return err
	}
	h := &wirev1.BackupHeader{
		Cluster: b.snap.Cluster, Incarnation: b.snap.Incarnation, Lineage: b.snap.Lineage, Index: b.snap.Index, TakenUnixMs: uint64(b.at.UnixMilli()),
		TakenBy: b.n.cfg.Name, Version: b.n.cfg.Version, Omitted: b.lost,
	}
	for _, r := range b.roots {
		h.Roots = append(h.Roots, r[:])
	}
	w, err := backup.NewWriter(b, h)
	if err != nil {
		return err
	}
	for _, reg := range b.snap.Registers {
		if err := w.Register(reg); err != nil {
			return err
		}
	}
	if err := b.n.blobs.Export(ctx, b.roots, w.Node); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	b.out.Sha256 = hex.EncodeToString(b.sum.Sum(nil))
	return nil
}

// Write sends the next bytes of the file.
func (b *backingUp) Write(p []byte) (int, error) {
	if err := b.stream.Send(&apiv1.BackupChunk{Kind: &apiv1.BackupChunk_Data{Data: p}}); err != nil {
		return 0, err
	}
	b.sum.Write(p)
	b.out.Bytes += uint64(len(p))
	return len(p), nil
}

// keepPinned renews the pin until it is stopped: the client may be slow.
func (b *backingUp) keepPinned(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(backupPin / 10)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
				b.n.blobs.Pin(b.pin, backupPin, b.roots...)
			}
		}
	}()
	return func() {
		cancel()
		<-ended
	}
}

// newClusterID draws one.
func newClusterID() (string, error) {
	var b [8]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", fmt.Errorf("draw a cluster id: %w", err)
	}
	return hex.EncodeToString(b[:]), nil
}
