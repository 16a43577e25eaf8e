package arbiter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/hashicorp/raft"
	"github.com/libp2p/go-libp2p/core/peer"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// ErrNotVoting is wrapped by Snapshot on a node whose own machine is not current: another one, a voter, has to be asked.
var ErrNotVoting = errors.New("this node has no current log of the arbiter")

// Snapshot is the state of the group as of one entry of its log.
type Snapshot struct {
	Cluster              string
	Incarnation, Lineage uint64
	Index                uint64
	Complete             uint64     // no change up to here is missing; below Index only of Shown, at a node that follows a feed
	Registers            []Register // ordered by key
}

// Snapshot returns all registers as of one entry of the log, which is behind everything that had been answered when it was called. The
// error wraps ErrNotVoting, or is that of Sync.
func (a *Arbiter) Snapshot(ctx context.Context) (Snapshot, error) {
	if err := a.Sync(ctx); err != nil {
		return Snapshot{}, fmt.Errorf("snapshot: %w", err)
	}
	st := a.view.now()
	if !st.fromRaft {
		return Snapshot{}, fmt.Errorf("snapshot: %w", ErrNotVoting)
	}
	return st.snapshot(), nil
}

// Shown returns what this node shows now, current or not, without asking anybody.
func (a *Arbiter) Shown() Snapshot { return a.view.now().snapshot() }

func (st *viewState) snapshot() Snapshot {
	out := Snapshot{Cluster: st.meta.Cluster, Incarnation: st.meta.Incarnation, Lineage: st.meta.Lineage, Index: st.at.index, Complete: st.complete}
	it := st.tree.Root().Iterator()
	for _, v, ok := it.Next(); ok; _, v, ok = it.Next() {
		out.Registers = append(out.Registers, *v.(*Register))
	}
	return out
}

// Seed is what a group begins with when it is not founded but restored from elsewhere.
type Seed struct {
	Self                 peer.ID // the only voter
	Cluster              string
	Incarnation, Lineage uint64
	Registers            []Register
}

// Plant makes the raft database in dir, which must be empty or not there, hold a group of one voter with these registers. Each is of the
// seed's incarnation from now on: (incarnation, epoch) of each owner outranks all that were given out in lower ones. Whoever opens the
// database then goes on from it.
func Plant(fs vfs.FS, dir string, s Seed, log *slog.Logger) error {
	d, err := openDisk(fs, dir, log)
	if err != nil {
		return err
	}
	return errors.Join(d.plantNew(s), d.Close())
}

func (d *disk) plantNew(s Seed) error {
	switch exists, err := raft.HasExistingState(d, d, d); {
	case err != nil:
		return err
	case exists || d.label != nil:
		return errors.New("the raft database is in use already")
	case s.Incarnation == 0:
		return errors.New("a group needs an incarnation")
	}
	if err := d.writeLabel(&wirev1.ArbiterDisk{Format: diskFormat, Self: []byte(s.Self)}); err != nil {
		return err
	}
	return d.plant(s.machine(), raft.ServerAddress(s.Self.String()))
}

// machine is the state that a seed grows into.
func (s *Seed) machine() *machine {
	m := newMachine()
	m.meta.Cluster, m.meta.Coordinator = s.Cluster, s.Self
	t := m.tree.Txn()
	for i := range s.Registers {
		r := s.Registers[i]
		t.Insert([]byte(r.Key), &r)
	}
	m.tree = t.CommitOnly()
	m.grown(0)
	m.raise(incarnation{s.Incarnation, s.Lineage}, m.index, s.Self, nil)
	return m
}

// plant writes a machine as the snapshot that raft begins with, its node the only voter. The snapshot is the point of no return; a crash
// before the label follows is made good by settle.
func (d *disk) plant(m *machine, me raft.ServerAddress) error {
	term, err := d.GetUint64(keyTerm)
	if err != nil && !errors.Is(err, errNoKey) {
		return err
	}
	term = max(term, 1)
	if err := d.SetUint64(keyTerm, term); err != nil {
		return err
	}
	conf := raft.Configuration{Servers: []raft.Server{{Suffrage: raft.Voter, ID: raft.ServerID(me), Address: me}}}
	out, err := d.Create(1, m.index, term, conf, 1, nil)
	if err != nil {
		return err
	}
	if err := m.freeze().write(out); err != nil {
		return errors.Join(err, out.Cancel())
	}
	if err := out.Close(); err != nil {
		return err
	}
	return d.settle(m)
}

// EncodeRegister is a register as it lies on disk and in the DHT.
func EncodeRegister(r Register) *wirev1.ArbiterRegister { return toWire(&r) }

// DecodeRegister reads it; nil is the zero register.
func DecodeRegister(w *wirev1.ArbiterRegister) Register {
	if w == nil {
		return Register{}
	}
	return *fromWire(w)
}
