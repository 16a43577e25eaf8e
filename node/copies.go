package node

import (
	"cmp"
	"context"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/records"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/coppice-project/coppice/internal/unison"
)

// The DHT keeps a copy of each register that outlives the voters, as it is: of instances within the mirror under /kb/own/, of all others
// under /kb/reg/. When every voter's disk is lost, recover reads them back.

const (
	// sweepBatch registers are mirrored at once by a new leader, with a pause of sweepPause between: what the one before did not come to
	// is a small part of them.
	sweepBatch = 64
	sweepPause = 50 * time.Millisecond
	// mirrorEvery is how often a node looks whether it leads, and tries again what was not mirrored.
	mirrorEvery = time.Second
)

// copyOf are the records that hold a register as it is: one, or more where it does not fit. Each begins with how many there are.
func copyOf(reg arbiter.Register) ([]records.Entry, error) {
	e := records.Entry{Incarnation: reg.Incarnation, Epoch: reg.Index, Revision: 1, Deleted: reg.Deleted, Key: registerPrefix + reg.Key}
	if reg.Deleted {
		return []records.Entry{e}, nil
	}
	raw, err := proto.Marshal(arbiter.EncodeRegister(reg))
	if err != nil {
		return nil, err
	}
	parts := slices.Collect(slices.Chunk(raw, maxMirror))
	out := make([]records.Entry, len(parts))
	for i, part := range parts {
		out[i] = e
		if i > 0 {
			out[i].Key = partPrefix + strconv.Itoa(i) + "/" + reg.Key
		}
		out[i].Value = append(binary.AppendUvarint(nil, uint64(len(parts))), part...)
	}
	return out, nil
}

// copies is what the DHT holds of the registers.
type copies struct {
	known           []arbiter.Register // deleted ones too
	damaged         []string           // keys of what could not be put together
	asked, answered int
}

// gatherCopies asks every node for the copies that it holds.
func (n *Node) gatherCopies(ctx context.Context) copies {
	own, asked, answered := n.records.ScanAll(ctx, ownPrefix)
	whole, _, second := n.records.ScanAll(ctx, registerPrefix)
	parts, _, third := n.records.ScanAll(ctx, partPrefix)
	c := copies{asked: asked, answered: min(answered, second, third)}
	byKey := map[string]records.Record{}
	for _, p := range parts {
		byKey[p.Key] = p
	}
	found := map[string]arbiter.Register{}
	add := func(rec records.Record, reg arbiter.Register, err error) {
		if err != nil {
			c.damaged = append(c.damaged, rec.Key)
			n.log.Warn("a copy of a register cannot be used", "key", rec.Key, "error", err)
			return
		}
		old, ok := found[reg.Key]
		if !ok || cmp.Or(cmp.Compare(reg.Incarnation, old.Incarnation), cmp.Compare(reg.Index, old.Index)) > 0 || len(old.Body) == 0 && !old.Deleted {
			found[reg.Key] = reg
		}
	}
	for _, rec := range whole {
		reg, err := registerIn(rec, byKey)
		add(rec, reg, err)
	}
	for _, rec := range own {
		reg, err := instanceIn(rec)
		add(rec, reg, err)
	}
	for _, reg := range found {
		c.known = append(c.known, reg)
	}
	slices.SortFunc(c.known, func(a, b arbiter.Register) int { return strings.Compare(a.Key, b.Key) })
	return c
}

// registerIn puts a copy together.
func registerIn(rec records.Record, parts map[string]records.Record) (arbiter.Register, error) {
	key := strings.TrimPrefix(rec.Key, registerPrefix)
	if rec.Deleted {
		return arbiter.Register{Key: key, Incarnation: rec.Incarnation, Index: rec.Epoch, Deleted: true}, nil
	}
	count, size := binary.Uvarint(rec.Value)
	if size <= 0 || count == 0 || count > 1<<10 {
		return arbiter.Register{}, errors.New("it does not say how many parts it has")
	}
	raw := slices.Clone(rec.Value[size:])
	for i := 1; i < int(count); i++ {
		p, ok := parts[partPrefix+strconv.Itoa(i)+"/"+key]
		if !ok || p.Deleted || p.Incarnation != rec.Incarnation || p.Epoch != rec.Epoch {
			return arbiter.Register{}, fmt.Errorf("part %d of %d is missing", i+1, count)
		}
		_, size := binary.Uvarint(p.Value)
		if size <= 0 {
			return arbiter.Register{}, fmt.Errorf("part %d of %d is damaged", i+1, count)
		}
		raw = append(raw, p.Value[size:]...)
	}
	return decodeCopy(key, raw)
}

func decodeCopy(key string, raw []byte) (arbiter.Register, error) {
	var w wirev1.ArbiterRegister
	if err := proto.Unmarshal(raw, &w); err != nil {
		return arbiter.Register{}, err
	}
	reg := arbiter.DecodeRegister(&w)
	if reg.Key != key || reg.Deleted {
		return arbiter.Register{}, fmt.Errorf("it is the copy of %q", reg.Key)
	}
	return reg, nil
}

// instanceIn reads the register out of a mirror under /kb/own/. Of one without it (an older version's, or too big a one) what the mirror
// says has to do: nobody owns it then, and it starts from its checkpoint in the version that is desired.
func instanceIn(rec records.Record) (arbiter.Register, error) {
	key := components.InstanceRegister(strings.TrimPrefix(rec.Key, ownPrefix))
	if rec.Deleted {
		return arbiter.Register{Key: key, Incarnation: rec.Incarnation, Index: rec.Epoch, Deleted: true}, nil
	}
	var m ownMirror
	if err := json.Unmarshal(rec.Value, &m); err != nil {
		return arbiter.Register{}, err
	}
	if len(m.Register) > 0 {
		return decodeCopy(key, m.Register)
	}
	root, err := hex.DecodeString(m.Root)
	if err != nil {
		return arbiter.Register{}, err
	}
	reg := arbiter.Register{Key: key, Revision: 1, Epoch: m.Epoch, Seq: m.Seq, Root: root, Index: m.Index, Incarnation: m.Incarnation}
	for _, h := range m.Holders {
		if id, err := peer.Decode(h); err == nil {
			reg.Holders = append(reg.Holders, id)
		}
	}
	return reg, nil
}

// unmirrored are registers whose mirrors did not get their acknowledgements. The zero value is ready.
type unmirrored struct {
	mu   sync.Mutex // guards regs
	regs map[string]arbiter.Register
}

func (u *unmirrored) add(reg arbiter.Register) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.regs == nil {
		u.regs = map[string]arbiter.Register{}
	}
	u.regs[reg.Key] = reg
}

func (u *unmirrored) take() []arbiter.Register {
	u.mu.Lock()
	defer u.mu.Unlock()
	out := make([]arbiter.Register, 0, len(u.regs))
	for _, reg := range u.regs {
		out = append(out, reg)
	}
	u.regs = nil
	return out
}

// keepMirrors makes the DHT's copies whole, at the leader: all of them once, for the one before may not have come to it, and what did not
// get its acknowledgements again.
func (n *Node) keepMirrors(ctx context.Context) error {
	tick := unison.New(mirrorEvery, string(n.id))
	defer tick.Stop()
	swept := false
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
			tick.Next()
		}
		if n.arbiter.Status().Role != "leader" {
			swept = false
			n.unmirrored.take() // who leads now sweeps
			continue
		}
		var again []arbiter.Register
		for _, reg := range n.unmirrored.take() {
			if now, ok := n.arbiter.Get(reg.Key); ok {
				reg = now
			} else if !reg.Deleted {
				continue // its end is mirrored of its own
			}
			again = append(again, reg)
		}
		if !swept {
			swept = true
			again = append(again, n.arbiter.List("")...)
		}
		for batch := range slices.Chunk(again, sweepBatch) {
			n.mirror(batch)
			select {
			case <-ctx.Done():
				return ctx.Err()
			case <-time.After(sweepPause):
			}
		}
	}
}

// withoutRegister leaves out of a mirror what is for machines only.
func withoutRegister(key string, value []byte) []byte {
	var m ownMirror
	if !strings.HasPrefix(key, ownPrefix) || json.Unmarshal(value, &m) != nil {
		return value
	}
	m.Register = nil
	b, err := json.Marshal(m)
	if err != nil {
		return value
	}
	return b
}
