package arbiter

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cockroachdb/pebble/v2"
	iradix "github.com/hashicorp/go-immutable-radix"
	"google.golang.org/protobuf/proto"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

const (
	recallFormat = 1
	// recallEvery is how old what a node outside of the group has on its disk may be.
	recallEvery = time.Second
)

// recall keeps on disk what a node outside of the group shows. Voters and learners have the log; another node that is started again without a way to any of
// them would else know neither what it owns nor what that is to do. It is committed, as all that is shown, and may be old; the next feed goes on from it.
type recall struct {
	a    *Arbiter
	last *viewState // that the disk holds; nil: none
}

// run writes what has changed until the context ends.
func (r *recall) run(ctx context.Context) {
	for {
		next := r.a.view.changedSignal()
		r.a.failures.note("keep what this node shows", r.keep())
		r.a.follow.pause(ctx, recallEvery) // what comes meanwhile is written then, what comes later at once
		select {
		case <-next:
		case <-ctx.Done():
			return
		}
	}
}

// keep brings the disk up to date, in one step.
func (r *recall) keep() error {
	st := r.a.view.now()
	if _, member := r.a.inGroup(); member || st.fromRaft {
		return r.drop()
	}
	_, seen := r.a.disk.incarnations()
	if st == r.last || r.a.follow.staleness() < 0 || st.at.inc != st.meta.Incarnation || st.meta.incarnation().before(seen) {
		return nil
	}
	last := r.last
	if last == nil || last.meta.incarnation() != st.meta.incarnation() {
		last = &viewState{tree: iradix.New(), meta: st.meta}
	}
	if err := r.a.disk.remember(st, difference(last, st), last != r.last); err != nil {
		return err
	}
	r.last = st
	return nil
}

// drop forgets what is written: the log of this node says more.
func (r *recall) drop() error {
	if r.last == nil {
		return nil
	}
	if err := r.a.disk.forget(); err != nil {
		return err
	}
	r.last = nil
	return nil
}

// load shows what the disk has, where that is more than the log beside it, and of the newest incarnation that was met.
func (r *recall) load() error {
	st, err := r.a.disk.recalled()
	if err != nil || st == nil {
		return err
	}
	if _, seen := r.a.disk.incarnations(); st.meta.incarnation().before(seen) {
		return r.a.disk.forget()
	}
	r.last = st
	r.a.view.recall(st)
	return nil
}

// recall shows a state of the disk, unless what is shown is newer.
func (v *view) recall(st *viewState) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.now().at.before(st.at) {
		v.publish(st, difference(v.now(), st))
	}
}

// remember writes changes and the state that they lead to; whole: they are all of it.
func (d *disk) remember(st *viewState, changes []change, whole bool) error {
	head, err := proto.Marshal(&wirev1.ArbiterRecall{Format: recallFormat, Meta: metaToWire(st.meta), Index: st.at.index, Complete: st.complete})
	if err != nil {
		return err
	}
	return d.write(func() error {
		b := d.db.NewBatch()
		if whole {
			if err := b.DeleteRange([]byte(preRecall), after(preRecall), nil); err != nil {
				return err
			}
		}
		for _, c := range changes {
			if c.new == nil {
				err = b.Delete([]byte(preRecall+c.key), nil)
			} else {
				var reg []byte
				if reg, err = proto.Marshal(toWire(c.new)); err == nil {
					err = b.Set([]byte(preRecall+c.key), reg, nil)
				}
			}
			if err != nil {
				return err
			}
		}
		if err := b.Set([]byte(keyRecall), head, nil); err != nil {
			return err
		}
		return b.Commit(pebble.Sync)
	})
}

// forget takes away what remember wrote.
func (d *disk) forget() error {
	return d.write(func() error {
		b := d.db.NewBatch()
		if err := dropRecall(b); err != nil {
			return err
		}
		return b.Commit(pebble.Sync)
	})
}

func dropRecall(b *pebble.Batch) error {
	if err := b.Delete([]byte(keyRecall), nil); err != nil {
		return err
	}
	return b.DeleteRange([]byte(preRecall), after(preRecall), nil)
}

// recalled reads what remember wrote; nil: nothing, or of a newer version, which a feed makes up for.
func (d *disk) recalled() (*viewState, error) {
	b, err := d.get([]byte(keyRecall))
	if err != nil || b == nil {
		return nil, err
	}
	var head wirev1.ArbiterRecall
	if err := proto.Unmarshal(b, &head); err != nil {
		return nil, fmt.Errorf("what this node showed: %w", err)
	}
	if head.GetFormat() != recallFormat {
		return nil, nil
	}
	st := &viewState{meta: metaFromWire(head.GetMeta()), complete: head.GetComplete()}
	st.at = point{st.meta.Incarnation, head.GetIndex()}
	tree := iradix.New().Txn()
	err = d.use(func() error {
		it, err := d.db.NewIter(&pebble.IterOptions{LowerBound: []byte(preRecall), UpperBound: after(preRecall)})
		if err != nil {
			return err
		}
		for ok := it.First(); ok; ok = it.Next() {
			w := new(wirev1.ArbiterRegister)
			if err := proto.Unmarshal(it.Value(), w); err != nil {
				return errors.Join(fmt.Errorf("what this node showed, %q: %w", it.Key(), err), it.Close())
			}
			reg := fromWire(w)
			tree.Insert([]byte(reg.Key), reg)
		}
		return it.Close()
	})
	st.tree = tree.CommitOnly()
	return st, err
}
