package arbiter

import (
	"bufio"
	"errors"
	"fmt"
	"io"

	iradix "github.com/hashicorp/go-immutable-radix"
	"google.golang.org/protobuf/encoding/protodelim"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// snapshotFormat is the version of what writeSnapshot writes. A higher one is refused, not guessed at.
const snapshotFormat = 1

// errSnapshotFormat is wrapped when a snapshot is of a newer version than this build.
var errSnapshotFormat = errors.New("the snapshot is of a newer version")

// frozen is the state of a machine at one index. It shares what is immutable.
type frozen struct {
	tree   *iradix.Tree
	header *wirev1.ArbiterSnapshotHeader
	txns   []*txnResult
}

func (m *machine) freeze() *frozen {
	return &frozen{
		tree: m.tree,
		header: &wirev1.ArbiterSnapshotHeader{
			Format: snapshotFormat, Shard: thisShard, Meta: metaToWire(m.meta), Index: m.index, EpochFloor: m.epochFloor, RevisionFloor: m.revisionFloor,
			Deleted: m.deleted, Forgotten: m.txns.forgotten, Former: idsToWire(m.former), Voted: idsToWire(m.voted),
		},
		txns: append([]*txnResult(nil), m.txns.order...),
	}
}

// write writes the snapshot as length-delimited items.
func (f *frozen) write(out io.Writer) error {
	w := bufio.NewWriterSize(out, 64<<10)
	put := func(item *wirev1.ArbiterSnapshotItem) error {
		_, err := protodelim.MarshalTo(w, item)
		return err
	}
	if err := put(&wirev1.ArbiterSnapshotItem{Kind: &wirev1.ArbiterSnapshotItem_Header{Header: f.header}}); err != nil {
		return err
	}
	end := &wirev1.ArbiterSnapshotEnd{Registers: uint64(f.tree.Len()), Txns: uint64(len(f.txns))}
	it := f.tree.Root().Iterator()
	for _, v, ok := it.Next(); ok; _, v, ok = it.Next() {
		if err := put(&wirev1.ArbiterSnapshotItem{Kind: &wirev1.ArbiterSnapshotItem_Register{Register: toWire(v.(*Register))}}); err != nil {
			return err
		}
	}
	for _, t := range f.txns {
		item := &wirev1.ArbiterSnapshotTxn{Nonce: t.nonce, Index: t.index, Result: t.result}
		if err := put(&wirev1.ArbiterSnapshotItem{Kind: &wirev1.ArbiterSnapshotItem_Txn{Txn: item}}); err != nil {
			return err
		}
	}
	if err := put(&wirev1.ArbiterSnapshotItem{Kind: &wirev1.ArbiterSnapshotItem_End{End: end}}); err != nil {
		return err
	}
	return w.Flush()
}

// readSnapshot builds a machine from what write wrote. It takes nothing on trust: a cut, reordered, doubled or unknown item is an error.
func readSnapshot(in io.Reader) (*machine, error) {
	r := bufio.NewReaderSize(in, 64<<10)
	opts := protodelim.UnmarshalOptions{MaxSize: maxTxnBytes + 2*maxEntry}
	m := newMachine()
	t := m.tree.Txn()
	var registers, txns uint64
	last := ""
	for n := 0; ; n++ {
		item := new(wirev1.ArbiterSnapshotItem)
		if err := opts.UnmarshalFrom(r, item); err != nil {
			return nil, fmt.Errorf("snapshot, item %d: %w", n, err)
		}
		if (n == 0) != (item.GetHeader() != nil) {
			return nil, fmt.Errorf("snapshot, item %d: the header must come first and once", n)
		}
		switch k := item.GetKind().(type) {
		case *wirev1.ArbiterSnapshotItem_Header:
			if f := k.Header.GetFormat(); f != snapshotFormat {
				return nil, fmt.Errorf("%w: format %d, this build knows %d", errSnapshotFormat, f, snapshotFormat)
			}
			if err := ours(k.Header.GetShard()); err != nil {
				return nil, fmt.Errorf("snapshot: %w", err)
			}
			m.header(k.Header)
		case *wirev1.ArbiterSnapshotItem_Register:
			reg := fromWire(k.Register)
			if reg.Key <= last {
				return nil, fmt.Errorf("snapshot, item %d: key %q after %q", n, reg.Key, last)
			}
			last = reg.Key
			registers++
			t.Insert([]byte(reg.Key), reg)
		case *wirev1.ArbiterSnapshotItem_Txn:
			if k.Txn.GetResult() == nil {
				return nil, fmt.Errorf("snapshot, item %d: transaction without a result", n)
			}
			txns++
			m.txns.add(&txnResult{nonce: k.Txn.GetNonce(), index: k.Txn.GetIndex(), result: k.Txn.GetResult()})
		case *wirev1.ArbiterSnapshotItem_End:
			if k.End.GetRegisters() != registers || k.End.GetTxns() != txns {
				return nil, fmt.Errorf("snapshot: %d registers and %d transactions of %d and %d", registers, txns, k.End.GetRegisters(), k.End.GetTxns())
			}
			m.tree = t.CommitOnly()
			return m, nil
		default:
			return nil, fmt.Errorf("%w: item %d is unknown", errSnapshotFormat, n)
		}
	}
}

func (m *machine) header(h *wirev1.ArbiterSnapshotHeader) {
	m.meta, m.index = metaFromWire(h.GetMeta()), h.GetIndex()
	m.epochFloor, m.revisionFloor, m.deleted = h.GetEpochFloor(), h.GetRevisionFloor(), h.GetDeleted()
	m.txns.forgotten = h.GetForgotten()
	m.former, m.voted = idsFromWire(h.GetFormer()), idsFromWire(h.GetVoted())
}
