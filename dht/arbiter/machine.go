package arbiter

import (
	"bytes"
	"fmt"
	"slices"
	"sort"

	iradix "github.com/hashicorp/go-immutable-radix"
	"github.com/libp2p/go-libp2p/core/peer"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/coppice-project/coppice/internal/planted"
)

const (
	maxTxns     = 4096    // remembered results of transactions
	maxTxnBytes = 2 << 20 // of them, roughly
	maxFormer   = 1024    // remembered former voters
)

// machine is the deterministic state machine of the group: registers, and what it takes to recognise repetitions. It knows no clock,
// no randomness and no I/O, and is used by one goroutine; what it hands out (the tree, registers) is immutable.
type machine struct {
	tree *iradix.Tree // key -> *Register
	meta meta
	// index is that of the last entry applied.
	index uint64
	// epochFloor and revisionFloor are the highest of any deleted register: a register made anew goes on above them, so that no
	// (key, epoch) is ever used twice.
	epochFloor, revisionFloor uint64
	deleted                   uint64 // index of the last delete
	txns                      txnTable
	former                    []peer.ID // that ever voted, oldest first
	voted                     []peer.ID // that voted in this incarnation, oldest first
}

// meta is what the group keeps about itself.
type meta struct {
	Cluster     string
	Incarnation uint64
	Format      uint32
	Coordinator peer.ID
	TwoNode     peer.ID // primary of two voters while either may go on alone; "": none may
	Lineage     uint64  // tells two incarnations of a number apart
	Begun       uint64  // last index of the incarnation before
}

func metaToWire(m meta) *wirev1.ArbiterMeta {
	return &wirev1.ArbiterMeta{
		Cluster: m.Cluster, Incarnation: m.Incarnation, Format: m.Format, Coordinator: []byte(m.Coordinator), TwoNode: []byte(m.TwoNode), Lineage: m.Lineage,
		Begun: m.Begun,
	}
}

func metaFromWire(m *wirev1.ArbiterMeta) meta {
	return meta{
		Cluster: m.GetCluster(), Incarnation: m.GetIncarnation(), Format: m.GetFormat(), Coordinator: peer.ID(m.GetCoordinator()),
		TwoNode: peer.ID(m.GetTwoNode()), Lineage: m.GetLineage(), Begun: m.GetBegun(),
	}
}

// change is what one entry did to one key.
type change struct {
	key      string
	old, new *Register // nil: not there
	soft     bool      // nothing but a checkpoint: seq, root, holders, w
	index    uint64
}

func newMachine() *machine {
	return &machine{tree: iradix.New(), meta: meta{Incarnation: 1, Format: 1}}
}

func treeGet(t *iradix.Tree, key string) *Register {
	v, ok := t.Get([]byte(key))
	if !ok {
		return nil
	}
	return v.(*Register)
}

// apply carries out an entry and says what its commands came to and what changed, ordered by key.
func (m *machine) apply(index uint64, e *wirev1.ArbiterEntry) ([]*wirev1.ArbiterResult, []change) {
	s := &scratch{m: m, index: index, since: e.GetSince(), cells: map[string]*cell{}, epochFloor: m.epochFloor, revisionFloor: m.revisionFloor, deleted: m.deleted}
	results := make([]*wirev1.ArbiterResult, len(e.GetCommands()))
	for i, c := range e.GetCommands() {
		results[i] = s.command(c)
		if results[i].Index == 0 { // else: the first result of a transaction that came again
			results[i].Index = index
		}
	}
	m.epochFloor, m.revisionFloor, m.deleted, m.index = s.epochFloor, s.revisionFloor, s.deleted, index
	return results, m.settle(s)
}

// settle moves what the scratch holds into the tree.
func (m *machine) settle(s *scratch) []change {
	if len(s.cells) == 0 {
		return nil
	}
	names := make([]string, 0, len(s.cells))
	for k := range s.cells {
		names = append(names, k)
	}
	sort.Strings(names)
	changes := make([]change, 0, len(names))
	t := m.tree.Txn()
	for _, k := range names {
		c := s.cells[k]
		old := treeGet(m.tree, k)
		if old == nil && c.reg == nil {
			continue // made and deleted within the entry
		}
		if c.reg == nil {
			t.Delete([]byte(k))
		} else {
			t.Insert([]byte(k), c.reg)
		}
		changes = append(changes, change{key: k, old: old, new: c.reg, soft: c.soft && old != nil && c.reg != nil, index: s.index})
	}
	m.tree = t.CommitOnly()
	return changes
}

// voters records who votes, so that an empty disk of a former voter is recognised.
func (m *machine) voters(index uint64, ids []peer.ID) {
	m.index = index
	m.former, m.voted = joined(m.former, ids), joined(m.voted, ids)
}

// joined adds the ids that are not there yet, and forgets the oldest beyond maxFormer. It returns a new slice: views share the old one.
func joined(known, ids []peer.ID) []peer.ID {
	out := slices.Clone(known)
	for _, id := range ids {
		if !slices.Contains(out, id) {
			out = append(out, id)
		}
	}
	return out[max(0, len(out)-maxFormer):]
}

// raise begins the next incarnation: self is its only voter, begun the last index of the one before. Every register is of it from now on,
// so that (incarnation, epoch) of each owner outranks whatever the lower incarnation may still have given out elsewhere.
func (m *machine) raise(in incarnation, begun uint64, self peer.ID, former []peer.ID) {
	m.meta.Incarnation, m.meta.Lineage, m.meta.Begun, m.meta.TwoNode = in.number, in.lineage, begun, ""
	m.former, m.voted = joined(m.former, former), []peer.ID{self}
	t := m.tree.Txn()
	it := m.tree.Root().Iterator()
	for k, v, ok := it.Next(); ok; k, v, ok = it.Next() {
		r := *v.(*Register)
		r.Incarnation, r.Index = in.number, min(r.Index, begun)
		t.Insert(k, &r)
	}
	m.tree = t.CommitOnly()
}

// learn takes registers from elsewhere that changed after at, up to which the machine holds everything. What is older than that was
// overtaken, or deleted since. The indices of the next log go on from at: none may be ahead of them.
func (m *machine) learn(known []Register, at point) {
	t := m.tree.Txn()
	for i := range known {
		r := known[i]
		p := point{r.Incarnation, r.Index}
		if !at.before(p) {
			continue
		}
		if v, ok := t.Get([]byte(r.Key)); ok {
			if old := v.(*Register); !(point{old.Incarnation, old.Index}).before(p) {
				continue
			}
		}
		if r.Deleted {
			m.epochFloor, m.revisionFloor = max(m.epochFloor, r.Epoch), max(m.revisionFloor, r.Revision)
			t.Delete([]byte(r.Key))
			continue
		}
		t.Insert([]byte(r.Key), &r)
	}
	m.tree = t.CommitOnly()
}

// grown makes a machine whose registers came from elsewhere than a log stand behind all of them: its index and its floors are above all that
// is known, and what it cannot know (deletes, transactions) counts as forgotten.
func (m *machine) grown(index uint64) {
	it := m.tree.Root().Iterator()
	for _, v, ok := it.Next(); ok; _, v, ok = it.Next() {
		r := v.(*Register)
		index = max(index, r.Index)
		m.epochFloor, m.revisionFloor = max(m.epochFloor, r.Epoch), max(m.revisionFloor, r.Revision)
	}
	m.index = index + 1
	m.deleted, m.txns.forgotten = m.index, m.index
}

// adopt puts checkpoints into registers that know only older ones.
func (m *machine) adopt(list []Adoption) {
	t := m.tree.Txn()
	for _, x := range list {
		old := treeGet(m.tree, x.Key)
		if old == nil || x.Seq <= old.Seq || len(x.Holders) == 0 {
			continue
		}
		r := *old
		r.Seq, r.Root, r.Holders = x.Seq, x.Root, slices.Clone(x.Holders)
		t.Insert([]byte(x.Key), &r)
	}
	m.tree = t.CommitOnly()
}

// scratch is the effect of an entry, or of a branch of a transaction, before it counts.
type scratch struct {
	m                         *machine
	index, since              uint64
	cells                     map[string]*cell
	epochFloor, revisionFloor uint64
	deleted                   uint64
	base                      *scratch // of a branch: what it looks through to
}

type cell struct {
	reg  *Register // nil: deleted
	soft bool      // all changes so far were soft
}

func (s *scratch) branch() *scratch {
	return &scratch{m: s.m, index: s.index, since: s.since, cells: map[string]*cell{}, base: s, epochFloor: s.epochFloor, revisionFloor: s.revisionFloor, deleted: s.deleted}
}

// merge makes a branch's effect that of s.
func (s *scratch) merge(b *scratch) {
	for k, c := range b.cells {
		s.cells[k] = c
	}
	s.epochFloor, s.revisionFloor, s.deleted = b.epochFloor, b.revisionFloor, b.deleted
}

func (s *scratch) get(key string) *Register {
	for l := s; l != nil; l = l.base {
		if c, ok := l.cells[key]; ok {
			return c.reg
		}
	}
	return treeGet(s.m.tree, key)
}

// edit returns a copy of the register to change, or a new one, already in its place.
func (s *scratch) edit(key string, soft bool) *Register {
	r := new(Register)
	if old := s.get(key); old != nil {
		*r = *old
	} else {
		r.Key, r.Revision = key, s.revisionFloor
	}
	r.Index, r.Incarnation = s.index, s.m.meta.Incarnation
	if c, ok := s.cells[key]; ok {
		soft = soft && c.soft
	} else if s.base != nil {
		soft = soft && s.base.softSoFar(key)
	}
	if !soft {
		r.Revision++
	}
	s.cells[key] = &cell{reg: r, soft: soft}
	return r
}

func (s *scratch) softSoFar(key string) bool {
	c, ok := s.cells[key]
	return !ok || c.soft
}

func (s *scratch) remove(key string) {
	old := s.get(key)
	if !planted.Bug("epoch-reused") {
		s.epochFloor = max(s.epochFloor, old.Epoch)
	}
	s.revisionFloor = max(s.revisionFloor, old.Revision)
	s.deleted = s.index
	s.cells[key] = &cell{}
}

func (s *scratch) command(c *wirev1.ArbiterCommand) *wirev1.ArbiterResult {
	switch k := c.GetKind().(type) {
	case *wirev1.ArbiterCommand_Claim:
		return s.claim(k.Claim)
	case *wirev1.ArbiterCommand_Commit:
		return s.commit(k.Commit)
	case *wirev1.ArbiterCommand_SetHolders:
		return s.setHolders(k.SetHolders)
	case *wirev1.ArbiterCommand_Release:
		return s.release(k.Release)
	case *wirev1.ArbiterCommand_Txn:
		return s.txn(k.Txn)
	case *wirev1.ArbiterCommand_SetMeta:
		return s.setMeta(k.SetMeta)
	}
	// decodeEntry let nothing else through.
	return refused(nil, "unknown command")
}

func ok(r *Register) *wirev1.ArbiterResult {
	return &wirev1.ArbiterResult{Code: wirev1.ArbiterResult_OK, Register: toWire(r)}
}

func refused(r *Register, format string, args ...any) *wirev1.ArbiterResult {
	return &wirev1.ArbiterResult{Code: wirev1.ArbiterResult_REFUSED, Register: toWire(r), Reason: fmt.Sprintf(format, args...)}
}

func fenced(r *Register, format string, args ...any) *wirev1.ArbiterResult {
	return &wirev1.ArbiterResult{Code: wirev1.ArbiterResult_FENCED, Register: toWire(r), Reason: fmt.Sprintf(format, args...)}
}

func tooOld(r *Register, format string, args ...any) *wirev1.ArbiterResult {
	return &wirev1.ArbiterResult{Code: wirev1.ArbiterResult_TOO_OLD, Register: toWire(r), Reason: fmt.Sprintf(format, args...)}
}

func (s *scratch) claim(c *wirev1.ArbiterClaim) *wirev1.ArbiterResult {
	r := s.get(c.GetKey())
	switch {
	case r != nil && r.Nonce == c.GetNonce() && !planted.Bug("claim-retry-unknown"):
		return ok(r) // the claim that made this epoch, again
	case r != nil && r.Epoch != c.GetExpect():
		return refused(r, "%s is in epoch %d, the claim expects %d", c.GetKey(), r.Epoch, c.GetExpect())
	case r == nil && c.GetExpect() != 0:
		return refused(nil, "%s is not there, the claim expects epoch %d", c.GetKey(), c.GetExpect())
	case r == nil && s.since < s.deleted && !planted.Bug("deleted-revived"):
		// A late repetition would bring a deleted register back to life.
		return tooOld(nil, "something was deleted at %d and the proposer knew the log up to %d", s.deleted, s.since)
	}
	n := s.edit(c.GetKey(), false)
	if n.Epoch == 0 { // never claimed since it was made, perhaps anew
		n.Epoch = s.epochFloor
	}
	n.Epoch++
	n.Owner, n.Boot, n.Nonce = peer.ID(c.GetOwner()), c.GetBoot(), c.GetNonce()
	if c.Body != nil {
		n.Body = c.GetBody()
	}
	if c.GetSetRoot() {
		n.Seq++
		n.Root = c.GetRoot()
		if len(c.GetHolders()) > 0 { // in the same step: who is named is taken for one who has it
			n.Holders = idsFromWire(c.GetHolders())
		}
	}
	return ok(n)
}

func (s *scratch) commit(c *wirev1.ArbiterCommit) *wirev1.ArbiterResult {
	r := s.get(c.GetKey())
	if r == nil {
		return fenced(nil, "%s is not there", c.GetKey())
	}
	if (r.Epoch != c.GetEpoch() || r.Nonce != c.GetNonce() || r.Owner == "") && !planted.Bug("commit-unfenced") {
		return fenced(r, "%s is in epoch %d, not %d of this owner", c.GetKey(), r.Epoch, c.GetEpoch())
	}
	if c.GetSeq() == r.Seq && bytes.Equal(c.GetRoot(), r.Root) {
		return ok(r) // again
	}
	if c.GetSeq() != r.Seq+1 && !(c.GetSeq() > r.Seq && planted.Bug("seq-gap")) && !(c.GetSeq() <= r.Seq && planted.Bug("seq-back")) {
		return refused(r, "%s has seq %d, the checkpoint has %d", c.GetKey(), r.Seq, c.GetSeq())
	}
	if n := distinct(c.GetHolders()); c.GetW() == 0 || n < int(c.GetW()) && !planted.Bug("too-few-holders") {
		return refused(r, "%d holders acknowledged, %d are needed and at least 1", n, c.GetW())
	}
	n := s.edit(c.GetKey(), c.Body == nil)
	n.Seq, n.Root, n.Holders, n.W = c.GetSeq(), c.GetRoot(), idsFromWire(c.GetHolders()), c.GetW()
	if c.Body != nil {
		n.Body = c.GetBody()
	}
	return ok(n)
}

func (s *scratch) setHolders(c *wirev1.ArbiterSetHolders) *wirev1.ArbiterResult {
	r := s.get(c.GetKey())
	holders := idsFromWire(c.GetHolders())
	switch {
	case r == nil:
		return refused(nil, "%s is not there", c.GetKey())
	case r.Seq != c.GetSeq():
		return refused(r, "%s has seq %d, the holders are of %d", c.GetKey(), r.Seq, c.GetSeq())
	case slices.Equal(r.Holders, holders):
		return ok(r)
	case len(holders) == 0:
		return refused(r, "%s would have no holder", c.GetKey())
	case r.Index > s.since && !planted.Bug("holders-late"):
		// A late repetition would undo what came after it.
		return tooOld(r, "%s changed at %d and the proposer knew the log up to %d", c.GetKey(), r.Index, s.since)
	}
	n := s.edit(c.GetKey(), true)
	n.Holders = holders
	return ok(n)
}

func (s *scratch) release(c *wirev1.ArbiterRelease) *wirev1.ArbiterResult {
	r := s.get(c.GetKey())
	if r == nil {
		return fenced(nil, "%s is not there", c.GetKey())
	}
	if r.Epoch != c.GetEpoch() || r.Nonce != c.GetNonce() {
		return fenced(r, "%s is in epoch %d, not %d of this owner", c.GetKey(), r.Epoch, c.GetEpoch())
	}
	if r.Owner == "" {
		return ok(r) // again
	}
	n := s.edit(c.GetKey(), false)
	n.Owner, n.Boot = "", 0
	return ok(n)
}

func (s *scratch) setMeta(c *wirev1.ArbiterSetMeta) *wirev1.ArbiterResult {
	m := &s.m.meta
	if c.GetCluster() != "" {
		if m.Cluster != "" && m.Cluster != c.GetCluster() {
			return refused(nil, "the cluster has an id already: %s", m.Cluster)
		}
		m.Cluster = c.GetCluster()
	}
	m.Format = max(m.Format, c.GetFormat())
	if c.Coordinator != nil {
		m.Coordinator = peer.ID(c.GetCoordinator())
	}
	if c.TwoNode != nil {
		m.TwoNode = peer.ID(c.GetTwoNode())
	}
	return ok(nil)
}
