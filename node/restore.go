package node

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/protocol"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/supervisor"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/backup"
	"github.com/coppice-project/coppice/dht/blobs"
	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/dht/store"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

var (
	// ErrDataInUse is wrapped by Restore where the data folder holds something already.
	ErrDataInUse = errors.New("the data folder is in use")
	// ErrClock is wrapped by Restore where the clock is behind the backup's: the new incarnation is drawn from it.
	ErrClock = errors.New("the clock of this machine is behind the backup")
)

// RestoreConfig is what Restore is told.
type RestoreConfig struct {
	Data string                        // the folder to make; it must be new, empty, or hold a drop folder only
	Name string                        // of the new node
	Open func() (io.ReadCloser, error) // the file of the backup, from its beginning; it is read twice
	Log  *slog.Logger
	Now  func() time.Time
}

// restoreTemp is where the data folder is made before it becomes one.
const restoreTemp = "restore.tmp"

// Restore makes the data folder of the first node of a new cluster from a backup. Nothing is changed unless the whole file was read and
// found good. The new cluster has an id of its own, so that nodes of the old one, should they come back, are strangers to it; its
// incarnation is the time of the restoring in seconds (or follows the backup's, when that is higher), so that no (incarnation, epoch) is
// given out twice, neither by what the old cluster did after the backup nor by an earlier restoring of the same one.
func Restore(ctx context.Context, cfg RestoreConfig) (*apiv1.RestoreSummary, error) {
	begin := time.Now()
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	r := &restoring{cfg: cfg, fs: vfs.Default, temp: filepath.Join(cfg.Data, restoreTemp)}
	if err := r.unused(); err != nil {
		return nil, err
	}
	if err := r.check(ctx); err != nil {
		return nil, err
	}
	_, serr := os.Stat(cfg.Data)
	if err := r.make(ctx); err != nil {
		err = errors.Join(err, os.RemoveAll(r.temp))
		if errors.Is(serr, os.ErrNotExist) {
			err = errors.Join(err, os.Remove(cfg.Data))
		}
		return nil, err
	}
	r.out.TookMs = ms(time.Since(begin))
	return r.out, nil
}

// restoring is one restore under way.
type restoring struct {
	cfg  RestoreConfig
	fs   vfs.FS
	temp string

	head *wirev1.BackupHeader
	regs []arbiter.Register
	out  *apiv1.RestoreSummary
}

// unused refuses a data folder that holds anything but a drop folder, and what a restore left that did not end.
func (r *restoring) unused() error {
	list, err := os.ReadDir(r.cfg.Data)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	for _, e := range list {
		switch e.Name() {
		case "plugins", restoreTemp:
			continue
		}
		if s, ok, err := loadState(r.fs, filepath.Join(r.cfg.Data, stateName)); err == nil && ok {
			return fmt.Errorf("%w: %s is that of node %s of cluster %s", ErrDataInUse, r.cfg.Data, s.Name, s.Cluster)
		}
		return fmt.Errorf("%w: %s holds %s", ErrDataInUse, r.cfg.Data, e.Name())
	}
	return nil
}

func (r *restoring) read(h backup.Handler) (t backup.Totals, err error) {
	f, err := r.cfg.Open()
	if err != nil {
		return t, err
	}
	t, err = backup.Read(f, h)
	return t, errors.Join(err, f.Close())
}

// check reads the whole file once.
func (r *restoring) check(ctx context.Context) error {
	t, err := r.read(backup.Handler{
		Header:   func(h *wirev1.BackupHeader) error { r.head = h; return nil },
		Register: func(reg arbiter.Register) error { r.regs = append(r.regs, reg); return ctx.Err() },
		Node:     func([]byte) error { return ctx.Err() },
	})
	if err != nil {
		return err
	}
	taken := time.UnixMilli(int64(r.head.GetTakenUnixMs()))
	if now := r.cfg.Now(); now.Before(taken) {
		return fmt.Errorf("%w: it is %s here, and the backup was made at %s", ErrClock, now.UTC().Format(time.RFC3339), taken.UTC().Format(time.RFC3339))
	}
	count := &apiv1.BackupSummary{}
	if _, err := rootsOf(r.regs, count); err != nil {
		return fmt.Errorf("%w: %w", backup.ErrDamaged, err)
	}
	r.out = &apiv1.RestoreSummary{
		Data: r.cfg.Data, Node: r.cfg.Name, FromCluster: r.head.GetCluster(), FromIncarnation: r.head.GetIncarnation(), Taken: timestamppb.New(taken),
		Applications: count.Applications, Artifacts: count.Artifacts, Checkpoints: count.Checkpoints, Bytes: t.NodeBytes,
		Incarnation: max(r.head.GetIncarnation()+1, uint64(max(r.cfg.Now().Unix(), 0))),
	}
	if r.out.Incarnation > math.MaxUint32 {
		return fmt.Errorf("incarnation %d does not fit into a fencing token; is the clock of this machine right?", r.out.Incarnation)
	}
	return nil
}

// make builds the folder beside and moves it into place; what says that it is one comes last.
func (r *restoring) make(ctx context.Context) error {
	if err := os.RemoveAll(r.temp); err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	if err := store.MkdirAll(r.fs, r.temp); err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	key, _, err := dht.LoadIdentity(r.fs, r.temp)
	if err != nil {
		return err
	}
	self, err := dht.IDOf(key)
	if err != nil {
		return err
	}
	if err := r.pages(ctx, self); err != nil {
		return err
	}
	cluster, err := newClusterID()
	if err != nil {
		return err
	}
	var lineage [8]byte
	if _, err := rand.Read(lineage[:]); err != nil {
		return fmt.Errorf("draw a lineage: %w", err)
	}
	seed := arbiter.Seed{Self: self, Cluster: cluster, Incarnation: r.out.Incarnation, Lineage: binary.BigEndian.Uint64(lineage[:])}
	if seed.Registers, err = restored(r.regs, self); err != nil {
		return fmt.Errorf("%w: %w", backup.ErrDamaged, err)
	}
	if err := arbiter.Plant(r.fs, filepath.Join(r.temp, raftName), seed, r.cfg.Log); err != nil {
		return fmt.Errorf("the arbiter's registers: %w", err)
	}
	cert, err := dht.SignCertificate(dht.Certificate{Cluster: cluster, Member: self, Incarnation: seed.Incarnation, Index: 1, Issued: r.cfg.Now()}, key)
	if err != nil {
		return err
	}
	s := state{Cluster: cluster, Name: r.cfg.Name, Certificate: cert, Restored: true}
	if err := s.save(r.fs, r.temp, filepath.Join(r.temp, stateName)); err != nil {
		return err
	}
	r.out.Id, r.out.Cluster, r.out.Registers = self.String(), cluster, uint64(len(seed.Registers))
	return r.settle()
}

// settle moves what was made into the data folder.
func (r *restoring) settle() (err error) {
	list, err := os.ReadDir(r.temp)
	if err != nil {
		return fmt.Errorf("data folder: %w", err)
	}
	var moved []string
	move := func(name string) {
		to := filepath.Join(r.cfg.Data, name)
		if err != nil {
			return
		}
		if err = os.Rename(filepath.Join(r.temp, name), to); err == nil {
			moved = append(moved, to)
		}
	}
	for _, e := range list {
		if e.Name() != stateName {
			move(e.Name())
		}
	}
	if err == nil {
		err = store.SyncDir(r.fs, r.cfg.Data)
	}
	move(stateName)
	if err == nil {
		err = store.SyncDir(r.fs, r.cfg.Data)
	}
	if err != nil {
		for _, m := range moved {
			err = errors.Join(err, os.RemoveAll(m))
		}
		return fmt.Errorf("data folder: %w", err)
	}
	return os.Remove(r.temp)
}

// pages brings the content of the backup into the new node's store and makes sure that it is all that was promised.
func (r *restoring) pages(ctx context.Context, self peer.ID) (err error) {
	db, err := store.Open(r.fs, filepath.Join(r.temp, databaseName), store.Options{Log: r.cfg.Log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	bs, err := blobs.Open(blobs.Config{Self: self, DB: db.DB(), Peers: nobody{}, Log: r.cfg.Log})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, bs.Close()) }()
	in := bs.Import()
	if _, err := r.read(backup.Handler{
		Node: func(enc []byte) error {
			if err := in.Add(enc); err != nil {
				return fmt.Errorf("the pages of the backup: %w", err)
			}
			return ctx.Err()
		},
	}); err != nil {
		return err
	}
	if err := in.Close(); err != nil {
		return fmt.Errorf("the pages of the backup: %w", err)
	}
	for _, root := range r.head.GetRoots() {
		h, err := blobs.ParseHash(root)
		if err != nil {
			return fmt.Errorf("%w: %w", backup.ErrDamaged, err)
		}
		if !bs.Complete(h) {
			return fmt.Errorf("%w: it lacks pages below %s", backup.ErrDamaged, h.Short())
		}
	}
	wanted, err := rootsOf(r.regs, &apiv1.BackupSummary{})
	if err != nil {
		return fmt.Errorf("%w: %w", backup.ErrDamaged, err)
	}
	for _, w := range wanted {
		has := func(root []byte) bool { return bytes.Equal(root, w.root[:]) }
		if !slices.ContainsFunc(r.head.GetRoots(), has) {
			r.out.Omitted = append(r.out.Omitted, w.what)
		}
	}
	return nil
}

// restored are the registers of a new cluster whose only node is self: nobody of the old one is a member, owns or holds anything, and
// nothing is pinned to a node that is not there. What was revoked stays so.
func restored(regs []arbiter.Register, self peer.ID) ([]arbiter.Register, error) {
	var out []arbiter.Register
	for _, reg := range regs {
		reg.Owner, reg.Boot = "", 0
		if len(reg.Holders) > 0 {
			reg.Holders, reg.W = []peer.ID{self}, 1
		}
		var m proto.Message
		switch {
		case strings.HasPrefix(reg.Key, tokenPrefix):
			continue
		case strings.HasPrefix(reg.Key, memberPrefix):
			var rec wirev1.MemberRecord
			if err := proto.Unmarshal(reg.Body, &rec); err != nil {
				return nil, fmt.Errorf("%s: %w", reg.Key, err)
			}
			if !rec.GetRevoked() {
				continue
			}
		case strings.HasPrefix(reg.Key, components.ApplicationPrefix):
			var app componentsv1.Application
			if err := proto.Unmarshal(reg.Body, &app); err != nil {
				return nil, fmt.Errorf("%s: %w", reg.Key, err)
			}
			for _, o := range app.GetOverlays() {
				o.Nodes = nil
			}
			m = &app
		case strings.HasPrefix(reg.Key, components.InstancePrefix):
			body, err := bodyOf(reg)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", reg.Key, err)
			}
			body.Successors, body.Deaths = nil, nil
			if body.GetEachNode() != "" {
				body = &componentsv1.InstanceBody{Format: body.GetFormat(), Component: body.GetComponent(), EachNode: body.GetEachNode()} // another node's now
			}
			m = body
		case strings.HasPrefix(reg.Key, components.HistoryPrefix):
			h, err := supervisor.ReadHistory(reg)
			if err != nil {
				return nil, err
			}
			for _, e := range h.GetEntries() {
				e.Holders = []string{self.String()}
			}
			m = h
		}
		if m != nil {
			b, err := proto.Marshal(m)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", reg.Key, err)
			}
			reg.Body = b
		}
		out = append(out, reg)
	}
	return out, nil
}

// nobody are the peers of a node that runs no cluster yet.
type nobody struct{}

func (nobody) Open(_ context.Context, to peer.ID, _ protocol.ID) (peers.Stream, error) {
	return nil, fmt.Errorf("reach %s: there are no peers while a backup is restored", to)
}

func (nobody) Handle(protocol.ID, peers.Handler) {}
