package arbiter

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync/atomic"

	"github.com/hashicorp/raft"
	"github.com/libp2p/go-libp2p/core/peer"
)

// errHalted is what entries come to after apply has stopped.
var errHalted = errors.New("this node has stopped applying")

// fsm is the machine as raft wants it. An entry that this build does not know stops it for good: nothing after it is applied, no
// snapshot is made, and the node leaves the group's votes to others until a build that knows the entry is started.
type fsm struct {
	m         *machine // used by raft's own goroutine only
	format    uint32   // highest that is known
	view      *view
	halt      func(error)         // told once, must not block
	onApply   func(log *raft.Log) // told after each batch with its last entry, must not block
	halted    atomic.Bool
	applied   atomic.Uint64 // last command or configuration applied
	entries   atomic.Uint64 // applied since start
	progress  pulse
	shown     atomic.Pointer[viewState] // last state applied
	regrouped pulse                     // a configuration was applied
}

var _ raft.BatchingFSM = (*fsm)(nil)

// Apply implements raft.FSM.
func (f *fsm) Apply(l *raft.Log) any { return f.ApplyBatch([]*raft.Log{l})[0] }

// ApplyBatch implements raft.BatchingFSM. A response is []*wirev1.ArbiterResult or an error.
func (f *fsm) ApplyBatch(logs []*raft.Log) []any {
	out := make([]any, len(logs))
	var changes []change
	done := 0
	for i, l := range logs {
		if f.halted.Load() {
			out[i] = errHalted
			continue
		}
		res, cs, err := f.one(l)
		if err != nil {
			f.halted.Store(true)
			f.halt(fmt.Errorf("entry %d: %w; start a newer version of this program", l.Index, err))
			out[i] = errHalted
			continue
		}
		out[i] = res
		changes = append(changes, cs...)
		done = i + 1
	}
	if done > 0 {
		f.entries.Add(uint64(done))
		f.show(changes)
		f.applied.Store(f.m.index) // after show: who has waited for it reads what is shown
		f.progress.beat()
		f.onApply(logs[done-1])
	}
	return out
}

func (f *fsm) show(changes []change) {
	st := machineState(f.m)
	f.shown.Store(st)
	f.view.fromMachine(st, changes)
}

// former returns who ever voted.
func (f *fsm) former() []peer.ID {
	if st := f.shown.Load(); st != nil {
		return st.former
	}
	return nil
}

// voted returns who voted in this incarnation.
func (f *fsm) voted() []peer.ID {
	if st := f.shown.Load(); st != nil {
		return st.voted
	}
	return nil
}

// reset begins with nothing. Raft must not be running.
func (f *fsm) reset() {
	f.m = newMachine()
	f.applied.Store(0)
	f.shown.Store(nil)
}

func (f *fsm) one(l *raft.Log) (any, []change, error) {
	switch l.Type {
	case raft.LogCommand:
		e, err := decodeEntry(l.Data, f.format)
		if err != nil {
			return nil, nil, err
		}
		res, changes := f.m.apply(l.Index, e)
		return res, changes, f.m.known(f.format)
	case raft.LogConfiguration:
		conf, err := decodeConfiguration(l.Data)
		if err != nil {
			return nil, nil, err
		}
		f.m.voters(l.Index, votersOf(conf))
		f.regrouped.beat()
	}
	return nil, nil, nil
}

func votersOf(conf raft.Configuration) []peer.ID {
	var out []peer.ID
	for _, s := range conf.Servers {
		if id, err := peer.Decode(string(s.ID)); err == nil && s.Suffrage == raft.Voter {
			out = append(out, id)
		}
	}
	return out
}

// waitApplied returns when the machine has applied index.
func (f *fsm) waitApplied(ctx context.Context, index uint64) error {
	for {
		next := f.progress.next()
		if f.applied.Load() >= index {
			return nil
		}
		if f.halted.Load() {
			return errHalted
		}
		select {
		case <-next:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// Snapshot implements raft.FSM.
func (f *fsm) Snapshot() (raft.FSMSnapshot, error) {
	if f.halted.Load() {
		return nil, errHalted
	}
	return fsmSnapshot{f.m.freeze()}, nil
}

type fsmSnapshot struct{ *frozen }

// Persist implements raft.FSMSnapshot.
func (s fsmSnapshot) Persist(sink raft.SnapshotSink) error {
	if err := s.write(sink); err != nil {
		return errors.Join(err, sink.Cancel())
	}
	return sink.Close()
}

// Release implements raft.FSMSnapshot.
func (fsmSnapshot) Release() {}

// Restore implements raft.FSM.
func (f *fsm) Restore(r io.ReadCloser) error {
	m, err := readSnapshot(r)
	if err != nil {
		if errors.Is(err, errSnapshotFormat) {
			f.halted.Store(true)
			f.halt(fmt.Errorf("%w; start a newer version of this program", err))
		}
		return err
	}
	f.m = m
	st := machineState(m)
	f.shown.Store(st)
	f.view.takeMachine(st)
	f.applied.Store(m.index)
	f.progress.beat()
	return nil
}

// machine builds the state that is known to be committed: the newest snapshot and the entries after it, as far as they are marked.
// It is what the node shows until raft has met a leader; raft itself starts from the snapshot.
func (d *disk) machine(format uint32) (*machine, error) {
	m := newMachine()
	snaps, err := d.List()
	if err != nil {
		return nil, err
	}
	var from uint64
	if len(snaps) > 0 {
		_, r, err := d.Open(snaps[0].ID)
		if err != nil {
			return nil, err
		}
		if m, err = readSnapshot(r); err != nil {
			return nil, err
		}
		from = snaps[0].Index
	}
	to, err := d.knownCommitted()
	if err != nil {
		return nil, err
	}
	f := &fsm{m: m, format: format}
	for i := max(from+1, d.first); i <= to; i++ {
		var l raft.Log
		if err := d.GetLog(i, &l); err != nil {
			return nil, fmt.Errorf("entry %d: %w", i, err)
		}
		if _, _, err := f.one(&l); err != nil {
			return m, nil // raft will meet it too, and stop there visibly
		}
	}
	return m, nil
}
