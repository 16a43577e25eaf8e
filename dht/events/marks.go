package events

import (
	"crypto/sha256"
	"encoding/binary"
	"math"
	"slices"
	"strings"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// extrasSent is how many counters beyond a gap a mark names; what is not named comes again and is dropped.
const extrasSent = 256

func (r *ring) sorted() []*origin {
	list := make([]*origin, 0, len(r.origins))
	for _, o := range r.origins {
		list = append(list, o)
	}
	slices.SortFunc(list, func(a, b *origin) int {
		if c := strings.Compare(a.key.node, b.key.node); c != 0 {
			return c
		}
		return sign(a.key.boot < b.key.boot)
	})
	return list
}

// digest is equal on two nodes that know of the same events.
func (r *ring) digest() uint64 {
	h := sha256.New()
	var buf []byte
	for _, o := range r.sorted() {
		if o.upto == 0 && len(o.extra) == 0 {
			continue
		}
		buf = append(buf[:0], o.key.node...)
		for _, n := range []uint64{o.key.boot, o.upto, uint64(len(o.extra))} {
			buf = binary.BigEndian.AppendUint64(buf, n)
		}
		h.Write(buf)
	}
	return binary.BigEndian.Uint64(h.Sum(nil))
}

func (r *ring) marks() []*wirev1.EventMark {
	var list []*wirev1.EventMark
	for _, o := range r.sorted() {
		m := &wirev1.EventMark{Origin: []byte(o.key.node), Boot: o.key.boot, First: o.first(), Upto: o.upto}
		for c := range o.extra {
			m.Extra = append(m.Extra, c)
		}
		slices.Sort(m.Extra)
		m.Extra = m.Extra[:min(extrasSent, len(m.Extra))]
		list = append(list, m)
	}
	return list
}

// lacking returns what one who sent these marks lacks and is here, in the order in which it came, at most so many events and bytes.
func (r *ring) lacking(marks []*wirev1.EventMark, most, bytes int) (list []*wirev1.Event, more bool, err error) {
	known := map[originKey]*wirev1.EventMark{}
	for _, m := range marks {
		known[originKey{string(m.GetOrigin()), m.GetBoot()}] = m
	}
	size := 0
	for _, p := range r.order {
		if m := known[p.origin.key]; m != nil && (p.counter <= m.GetUpto() || slices.Contains(m.GetExtra(), p.counter)) {
			continue
		}
		if len(list) >= most || size >= bytes {
			return list, true, nil
		}
		w, err := r.read(p.seq)
		if err != nil {
			return list, false, err
		}
		if w != nil {
			list = append(list, w)
			size += len(w.GetMessage()) + 200
		}
	}
	return list, false, nil
}

// adopt learns from another's marks what is gone: it cannot come any more. It returns what subscribers may be told of because of that.
func (r *ring) adopt(marks []*wirev1.EventMark) ([]*wirev1.Event, error) {
	var told []place
	for _, m := range marks {
		if len(m.GetOrigin()) == 0 || len(m.GetOrigin()) > 128 || m.GetUpto() == math.MaxUint64 || m.GetFirst() > m.GetUpto()+1 {
			continue
		}
		o := r.originOf(originKey{string(m.GetOrigin()), m.GetBoot()})
		for _, c := range o.skip(m.GetFirst()) {
			told = append(told, place{origin: o, counter: c})
		}
	}
	return r.load(told)
}
