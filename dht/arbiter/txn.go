package arbiter

import (
	"google.golang.org/protobuf/proto"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/coppice-project/coppice/internal/planted"
)

// txnTable remembers the first results of recent transactions, oldest first. What falls out of it raises forgotten: a transaction
// that its proposer may have sent before that index, and that is not in the table, can no longer be told from a repetition.
type txnTable struct {
	results   map[uint64]*txnResult
	order     []*txnResult
	bytes     int
	forgotten uint64
}

type txnResult struct {
	nonce, index uint64
	result       *wirev1.ArbiterResult
	size         int
}

func (t *txnTable) add(r *txnResult) {
	if t.results == nil {
		t.results = map[uint64]*txnResult{}
	}
	r.size = 64 + proto.Size(r.result)
	t.results[r.nonce] = r
	t.order = append(t.order, r)
	t.bytes += r.size
	drop := 0
	for ; len(t.order)-drop > maxTxns || (t.bytes > maxTxnBytes && len(t.order)-drop > 1); drop++ {
		old := t.order[drop]
		t.order[drop] = nil
		delete(t.results, old.nonce)
		t.bytes -= old.size
		t.forgotten = old.index
	}
	if drop > 0 {
		t.order = t.order[drop:]
	}
}

func (s *scratch) txn(c *wirev1.ArbiterTxn) *wirev1.ArbiterResult {
	if first, known := s.m.txns.results[c.GetNonce()]; known && !planted.Bug("txn-retry-unknown") {
		return proto.CloneOf(first.result)
	}
	if s.since < s.m.txns.forgotten {
		return tooOld(nil, "results up to %d are forgotten and the proposer knew the log up to %d", s.m.txns.forgotten, s.since)
	}
	res := s.decide(c)
	res.Index = s.index
	s.m.txns.add(&txnResult{nonce: c.GetNonce(), index: s.index, result: proto.CloneOf(res)})
	return res
}

// decide does one of the branches, as a whole, or nothing.
func (s *scratch) decide(c *wirev1.ArbiterTxn) *wirev1.ArbiterResult {
	if s.compare(c.GetCompares()) {
		b := s.branch()
		if done, _ := b.operations(c.GetThen()); done != nil {
			s.merge(b)
			return &wirev1.ArbiterResult{Code: wirev1.ArbiterResult_OK, Succeeded: true, Registers: done}
		}
	}
	if len(c.GetOtherwise()) == 0 {
		return &wirev1.ArbiterResult{Code: wirev1.ArbiterResult_OK, Registers: s.compared(c.GetCompares())}
	}
	b := s.branch()
	done, why := b.operations(c.GetOtherwise())
	if done == nil {
		return why
	}
	s.merge(b)
	return &wirev1.ArbiterResult{Code: wirev1.ArbiterResult_OK, Registers: done}
}

func (s *scratch) compare(cs []*wirev1.ArbiterCompare) bool {
	for _, c := range cs {
		var have uint64
		if r := s.get(c.GetKey()); r != nil {
			switch c.GetField() {
			case wirev1.ArbiterCompare_REVISION:
				have = r.Revision
			case wirev1.ArbiterCompare_EPOCH:
				have = r.Epoch
			case wirev1.ArbiterCompare_SEQ:
				have = r.Seq
			case wirev1.ArbiterCompare_EXISTS:
				have = 1
			case wirev1.ArbiterCompare_UNSPECIFIED: // decodeEntry let none through
				return false
			}
		}
		if have != c.GetEqual() {
			return false
		}
	}
	return true
}

func (s *scratch) compared(cs []*wirev1.ArbiterCompare) []*wirev1.ArbiterRegister {
	var out []*wirev1.ArbiterRegister
	seen := map[string]bool{}
	for _, c := range cs {
		if r := s.get(c.GetKey()); r != nil && !seen[c.GetKey()] {
			seen[c.GetKey()] = true
			out = append(out, toWire(r))
		}
	}
	return out
}

// operations does them all and returns their registers; nil and the result that stopped it when one cannot be done.
func (s *scratch) operations(ops []*wirev1.ArbiterOp) ([]*wirev1.ArbiterRegister, *wirev1.ArbiterResult) {
	out := make([]*wirev1.ArbiterRegister, 0, len(ops))
	for _, op := range ops {
		switch k := op.GetKind().(type) {
		case *wirev1.ArbiterOp_Put:
			n := s.edit(k.Put.GetKey(), false)
			n.Body = k.Put.GetBody()
			out = append(out, toWire(n))
		case *wirev1.ArbiterOp_Delete:
			gone := &wirev1.ArbiterRegister{Key: k.Delete, Deleted: true, Index: s.index, Incarnation: s.m.meta.Incarnation}
			if r := s.get(k.Delete); r != nil {
				gone = toWire(r)
				gone.Deleted = true
				s.remove(k.Delete)
			}
			out = append(out, gone)
		case *wirev1.ArbiterOp_Claim:
			res := s.claimIn(k.Claim)
			if res.GetCode() != wirev1.ArbiterResult_OK {
				return nil, res
			}
			out = append(out, res.GetRegister())
		}
	}
	return out, nil
}

// claimIn is a claim within a transaction, whose nonce tells repetitions already: neither an equal nonce nor a deletion matters.
func (s *scratch) claimIn(c *wirev1.ArbiterClaim) *wirev1.ArbiterResult {
	since := s.since
	s.since = s.index
	defer func() { s.since = since }()
	return s.claim(c)
}
