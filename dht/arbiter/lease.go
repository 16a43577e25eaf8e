package arbiter

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	iradix "github.com/hashicorp/go-immutable-radix"
	"github.com/hashicorp/raft"
	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/dht/peers"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	"github.com/coppice-project/coppice/internal/planted"
)

// Leases (notes: consistency §5, §3.8 I3 to I5). The owner of a leased register may act only while it holds a lease that the leader
// acknowledged, and nobody else becomes owner before that lease has ended for certain. No clock value travels: the owner counts
// Timings.Lease from when it sent the request, the leader a little more from when it answered.
//
//	owner   validUntil = sendTime + T             by its own clock
//	leader  end        = answerTime + T·(1+ε)/(1−ε)  by its own clock; in real time never before validUntil
//
// The leader answers only after it made sure, with messages sent after the request had arrived, that it leads (confirm). So whoever
// leads after it was elected after the request was sent, and counts no lease as ended before electedAt + T·(1+ε)/(1−ε): it need not know what
// its predecessors acknowledged. A claim marks the epoch that it would end as revoked before it is proposed; from then on no renewal of that
// epoch is acknowledged. All of this is in the leader's memory only.
//
// That raft steps down by itself is no substitute for confirm. It does so by a timer in its main loop, and the same loop writes the log: while an fsync
// hangs, the leader of a minority stays leader as far as it knows, its heartbeats go on, and it would renew for as long as the disk hangs (shown with
// real processes by internal/nemesis.TestPlantedLeaseUnverified).
//
// What is left: between the admission of a claim and its entry into the log the leader must not lose the lead, have another leader acknowledge
// a renewal, and win the lead back. Raft refuses proposals made while it does not lead, so that takes a goroutine that stands still between
// two statements for longer than two elections while raft's own goroutines run.

const (
	// epsilon is how far the rates of two clocks may be from real time (notes §1: 1 %).
	epsilonPercent = 1
	// processLease is how long a component's process runs on without its node: the longest grant of a node socket. Grants of leased instances end
	// before the node's own lease does, so this matters only where the node is proven dead before that.
	processLease = 2 * time.Second
	// revocationHolds is how long an epoch stays revoked after the last claim that was told to wait: claimers ask more often than that. After it
	// they have given up, because the owner lives after all.
	revocationHolds = 500 * time.Millisecond
	// maxWaitTold bounds what a claim is told to wait before it asks again: the lease may be given up meanwhile, or the owner proven dead.
	maxWaitTold = 200 * time.Millisecond
	// maxLeaseKeys bounds one request.
	maxLeaseKeys = 1 << 14
)

// withDrift is how long one clock has to run until another one, asked to run for d, certainly has.
func withDrift(d time.Duration) time.Duration {
	if planted.Bug("lease-no-drift") {
		return d
	}
	return d * (100 + epsilonPercent) / (100 - epsilonPercent)
}

// LeaseKey names an ownership by the register and its epoch.
type LeaseKey struct {
	Key   string
	Epoch uint64
}

// LeaseRequest renews all leases that a process of this node holds, and gives some up.
type LeaseRequest struct {
	Boot uint64 // of the process, as in the registers
	Seq  uint64 // rises with each request of the process: what was given up is not renewed by a request sent before
	Keys []LeaseKey
	// GiveUp are ownerships of which the caller certainly runs nothing any more: they may be claimed at once.
	GiveUp []LeaseKey
}

// Leases is what the leader acknowledged.
type Leases struct {
	Asked   time.Duration // Config.BootTime at the sending of the request that was answered
	For     time.Duration // from Asked on, by the clock of Config.BootTime
	Held    []LeaseKey
	Refused map[LeaseKey]string // why not
}

// WaitError says that a claim or a deletion must wait: the lease of the epoch that it would end may still be held. Nothing was done. The
// epoch is revoked: it ends if the claim is made again, at the latest every half second, until it goes through.
type WaitError struct {
	For    time.Duration // until it may be asked again
	Reason string
}

func (e *WaitError) Error() string { return "wait: " + e.Reason }

// Lease renews or gives up leases. It asks the leader, whoever that is, until the context ends. Errors: ErrNoLeader: nothing was
// acknowledged, and what was to be given up may not have been.
func (a *Arbiter) Lease(ctx context.Context, r LeaseRequest) (Leases, error) {
	if len(r.Keys)+len(r.GiveUp) > maxLeaseKeys {
		return Leases{}, fmt.Errorf("renew leases: %d at once, at most %d are possible", len(r.Keys)+len(r.GiveUp), maxLeaseKeys)
	}
	req := &wirev1.ArbiterRequest{Shard: thisShard, Kind: &wirev1.ArbiterRequest_Lease{Lease: &wirev1.ArbiterLeaseRequest{
		Boot: r.Boot, Seq: r.Seq, Keys: leasesToWire(r.Keys), GiveUp: leasesToWire(r.GiveUp),
	}}}
	for pause := newPause(); ; pause.wait(ctx) {
		leader, changed := a.where.current()
		if leader == "" {
			a.findLeader(ctx, changed)
		} else {
			asked := a.cfg.BootTime() // of this try: an earlier one may have been answered long ago
			resp, err := a.attempt(ctx, leader, changed, req)
			switch a.judge(leader, resp, err) {
			case carried:
				if planted.Bug("lease-from-answer") {
					asked = a.cfg.BootTime()
				}
				return leasesFrom(asked, resp.GetLeases()), nil
			case rejected:
				return Leases{}, fmt.Errorf("renew leases: %s", resp.GetReason())
			case notDone, doubtful:
			}
		}
		if ctx.Err() != nil {
			return Leases{}, fmt.Errorf("renew leases: %w (%w)", ErrNoLeader, context.Cause(ctx))
		}
		select {
		case <-a.closing:
			return Leases{}, fmt.Errorf("renew leases: %w", ErrClosed)
		default:
		}
	}
}

func leasesToWire(keys []LeaseKey) []*wirev1.ArbiterLease {
	out := make([]*wirev1.ArbiterLease, len(keys))
	for i, k := range keys {
		out[i] = &wirev1.ArbiterLease{Key: k.Key, Epoch: k.Epoch}
	}
	return out
}

func leasesFrom(asked time.Duration, w *wirev1.ArbiterLeases) Leases {
	out := Leases{Asked: asked, For: time.Duration(w.GetTtlMs()) * time.Millisecond, Refused: map[LeaseKey]string{}}
	for _, l := range w.GetKeys() {
		k := LeaseKey{l.GetKey(), l.GetEpoch()}
		if l.GetRefused() != "" {
			out.Refused[k] = l.GetRefused()
			continue
		}
		out.Held = append(out.Held, k)
	}
	return out
}

// ===== at the leader =====

// leases is what the leader knows about leases, of one term.
type leases struct {
	a *Arbiter

	mu    sync.Mutex // guards the rest
	raft  *raft.Raft // terms of another start of raft are other terms, whatever their number
	term  uint64
	since time.Duration // when this node was first seen to lead in that term
	keys  map[string]*leased
	// current says that the machine has seen everything from before the term.
	current bool
	// flight counts the entries under way, by leased register, that may end or begin an epoch.
	flight map[string]int
}

// leased is the lease of one register.
type leased struct {
	owner peer.ID
	boot  uint64
	epoch uint64
	end   time.Duration // whatever was acknowledged to this owner has ended then, in any epoch
	free  bool          // the owner gave this epoch up
	// dropped is the request that gave it up: no earlier one counts any more.
	dropped uint64
	revoked bool          // no renewal of the epoch is acknowledged
	asked   time.Duration // by the last claim that was told to wait
	claims  int           // proposed and not decided
	doubt   bool          // the fate of a proposed claim is not known: the epoch stays revoked while this term lasts
	probed  time.Duration // when the owner's host was asked last; 0 never
}

func newLeases(a *Arbiter) *leases {
	return &leases{a: a, keys: map[string]*leased{}, flight: map[string]int{}}
}

// lead makes sure that the state is of this node's present term as leader; false: it does not lead. Locked.
func (l *leases) lead(r *raft.Raft) bool {
	term := r.CurrentTerm()
	if r.State() != raft.Leader || r.CurrentTerm() != term {
		return false
	}
	if r != l.raft || term != l.term {
		// Seen later than it was: that only makes it wait longer.
		first := l.raft == nil
		l.raft, l.term, l.since, l.keys, l.current, l.flight = r, term, l.a.cfg.BootTime(), map[string]*leased{}, false, map[string]int{}
		if first && planted.Bug("lease-lost-on-boot") {
			l.since -= withDrift(l.a.t.Lease)
		}
	}
	return true
}

// notice starts the clock of a new term soon, so that claims after a leader's death wait no longer than they must.
func (l *leases) notice(r *raft.Raft) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lead(r)
}

// of returns the lease of a register as it stands. Locked.
func (l *leases) of(reg *Register) *leased {
	c := l.keys[reg.Key]
	if c == nil || c.owner != reg.Owner {
		// Its owner has not been acknowledged anything by this leader, but perhaps by one before.
		c = &leased{owner: reg.Owner, boot: reg.Boot, epoch: reg.Epoch, end: l.since + withDrift(l.a.t.Lease)}
		if planted.Bug("lease-new-leader") {
			c.end = l.since
		}
		l.keys[reg.Key] = c
	}
	if c.boot != reg.Boot {
		c.boot, c.dropped = reg.Boot, 0
	}
	if c.epoch != reg.Epoch {
		c.epoch, c.free, c.revoked, c.claims, c.doubt, c.probed = reg.Epoch, false, false, 0, false, 0
	}
	return c
}

// serveLease answers a node that renews.
func (a *Arbiter) serveLease(ctx context.Context, from peer.ID, req *wirev1.ArbiterLeaseRequest) *wirev1.ArbiterResponse {
	if len(req.GetKeys())+len(req.GetGiveUp()) > maxLeaseKeys {
		return invalid("%d leases at once; at most %d", len(req.GetKeys())+len(req.GetGiveUp()), maxLeaseKeys)
	}
	// The machine is at least as new as everything committed when the request arrived, and nobody else led then.
	if !planted.Bug("lease-unverified") {
		if _, err := a.reads.index(ctx); errors.Is(err, raft.ErrNotLeader) {
			return notLeader()
		} else if err != nil {
			return &wirev1.ArbiterResponse{Code: wirev1.ArbiterResponse_BUSY, Reason: err.Error()}
		}
	}
	a.leases.mu.Lock()
	defer a.leases.mu.Unlock()
	// Under the lock: what was shown before it may be of an epoch that has ended since.
	r, st := a.raft.Load(), a.fsm.shown.Load()
	if r == nil || st == nil || a.superseded() || !a.leases.lead(r) { // another incarnation may begin just now
		return notLeader()
	}
	return &wirev1.ArbiterResponse{Leases: a.leases.renew(st.tree, from, req)}
}

// renew acknowledges what may be. Locked.
func (l *leases) renew(tree *iradix.Tree, from peer.ID, req *wirev1.ArbiterLeaseRequest) *wirev1.ArbiterLeases {
	out := &wirev1.ArbiterLeases{TtlMs: uint64(l.a.t.Lease.Milliseconds())}
	now := l.a.cfg.BootTime()
	mine := func(k *wirev1.ArbiterLease) *leased {
		reg := treeGet(tree, k.GetKey())
		if reg == nil || reg.Owner != from || reg.Boot != req.GetBoot() || reg.Epoch != k.GetEpoch() {
			return nil
		}
		return l.of(reg)
	}
	for _, k := range req.GetGiveUp() {
		if c := mine(k); c != nil {
			c.free, c.dropped = true, max(c.dropped, req.GetSeq())
		}
	}
	for _, k := range req.GetKeys() {
		c, refused := mine(k), ""
		switch {
		case c == nil:
			refused = "the caller is not its owner in that epoch"
		case req.GetSeq() <= c.dropped:
			refused = "it was given up by a later request"
		case c.revoked && (c.claims > 0 || c.doubt || now-c.asked < revocationHolds):
			refused = "the epoch is revoked: another node claims it"
		default:
			c.free, c.revoked, c.end = false, false, now+withDrift(l.a.t.Lease)
			l.tell(LeaseRenewed, k.GetKey(), k.GetEpoch())
		}
		out.Keys = append(out.Keys, &wirev1.ArbiterLease{Key: k.GetKey(), Epoch: k.GetEpoch(), Refused: refused})
	}
	return out
}

// catchUp waits until the machine has applied what was committed before this node's term, if the entry may end an epoch: a register that the
// machine does not show yet, or shows in an older epoch, tells nothing of the lease that its owner holds. Errors: raft.ErrNotLeader.
func (l *leases) catchUp(ctx context.Context, r *raft.Raft, e *wirev1.ArbiterEntry) error {
	if l.a.cfg.Leased == nil || planted.Bug("lease-of-old-state") || !slices.ContainsFunc(e.GetCommands(), func(c *wirev1.ArbiterCommand) bool { return len(endings(c)) > 0 }) {
		return nil
	}
	l.mu.Lock()
	leads, current, term := l.lead(r), l.current, l.term
	l.mu.Unlock()
	switch {
	case !leads:
		return raft.ErrNotLeader
	case current:
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, l.a.t.RPC)
	defer cancel()
	if _, err := l.a.reads.index(ctx); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.lead(r) || l.term != term {
		return raft.ErrNotLeader
	}
	l.current = true
	return nil
}

// ending is a part of a command that may end an epoch: a claim, or a deletion, after which a register could be made anew and have an owner
// beside the one before.
type ending struct {
	key   string
	claim *wirev1.ArbiterClaim // nil: a deletion
}

func endings(cmd *wirev1.ArbiterCommand) []ending {
	switch k := cmd.GetKind().(type) {
	case *wirev1.ArbiterCommand_Claim:
		return []ending{{k.Claim.GetKey(), k.Claim}}
	case *wirev1.ArbiterCommand_Txn:
		var out []ending
		for _, ops := range [][]*wirev1.ArbiterOp{k.Txn.GetThen(), k.Txn.GetOtherwise()} {
			for _, op := range ops {
				if c := op.GetClaim(); c != nil {
					out = append(out, ending{c.GetKey(), c})
				} else if d := op.GetDelete(); d != "" {
					out = append(out, ending{d, nil})
				}
			}
		}
		return out
	}
	return nil
}

// admission is what becomes of an entry's commands before they are proposed.
type admission struct {
	l      *leases
	raft   *raft.Raft
	term   uint64
	waits  map[int]*wirev1.ArbiterResult // by command: not proposed
	claims []taken                       // of the others
	keys   map[string]bool               // of the leased registers of which the others may end or begin an epoch
	behind bool                          // what becomes of a register is being decided
}

// taken is an epoch that an admitted command ends.
type taken struct {
	key   string
	lease *leased
	epoch uint64
}

// LeaseStep is one thing that a leader has decided about the lease of an epoch, for an audit of I5: while a claim that ends the epoch is being decided,
// for the rest of the term when nobody knows how that came out, and for half a second after a claim was told to wait, no renewal of it is acknowledged.
type LeaseStep struct {
	Kind  LeaseStepKind
	Key   string
	Epoch uint64
	Term  uint64        // in which this node leads
	At    time.Duration // Config.BootTime
}

// LeaseStepKind says what was decided.
type LeaseStepKind int

const (
	// LeaseRenewed: a renewal is acknowledged.
	LeaseRenewed LeaseStepKind = iota
	// LeaseAsked: a claim that ends the epoch is told to wait.
	LeaseAsked
	// LeaseEnding: a claim that ends the epoch is proposed.
	LeaseEnding
	// LeaseDecided: that claim is decided; the epoch goes on when it was refused.
	LeaseDecided
	// LeaseDoubted: what became of that claim is not known.
	LeaseDoubted
)

// tell has a step audited. Locked, so that the audit sees the order in which things were decided.
func (l *leases) tell(kind LeaseStepKind, key string, epoch uint64) {
	if l.a.cfg.AuditLeases != nil {
		l.a.cfg.AuditLeases(LeaseStep{kind, key, epoch, l.term, l.a.cfg.BootTime()})
	}
}

// admit decides which commands of an entry may be proposed now. The epochs that they end are revoked when it returns. settle is called
// when their fate is known. Of one leased register one entry is decided about at a time: what is not applied yet tells nothing of whose lease
// the next one would have to wait for.
func (l *leases) admit(r *raft.Raft, e *wirev1.ArbiterEntry) (*admission, bool) {
	ad := &admission{l: l, waits: map[int]*wirev1.ArbiterResult{}, keys: map[string]bool{}}
	if l.a.cfg.Leased == nil {
		return ad, true
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.lead(r) {
		return nil, false
	}
	ad.raft, ad.term = l.raft, l.term
	st := l.a.fsm.shown.Load()
	if st == nil {
		st = &viewState{tree: iradix.New()} // nothing was committed yet
	}
	for i, cmd := range e.GetCommands() {
		l.admitCommand(ad, st, i, cmd, peer.ID(e.GetProposer()))
	}
	if ad.behind {
		for _, t := range ad.claims {
			t.lease.claims--
		}
		ad.claims, ad.keys = nil, nil
	}
	for key := range ad.keys {
		l.flight[key]++
	}
	for _, t := range ad.claims {
		l.tell(LeaseEnding, t.key, t.epoch)
	}
	return ad, true
}

func (l *leases) admitCommand(ad *admission, st *viewState, i int, cmd *wirev1.ArbiterCommand, proposer peer.ID) {
	parts := endings(cmd)
	var ends []taken
	var longest time.Duration
	key := ""
	var leasable []string
	for _, p := range parts {
		if l.mayBeLeased(st, p) {
			leasable = append(leasable, p.key)
		}
		if l.flight[p.key] > 0 {
			ad.behind = true
			return
		}
		if ad.keys[p.key] { // by a command before this one
			ad.wait(i, time.Millisecond, p.key, st, "another claim of it is being decided")
			return
		}
		by := proposer
		if c := p.claim; c != nil {
			by = peer.ID(c.GetOwner())
			if reg := treeGet(st.tree, p.key); reg != nil && (reg.Nonce == c.GetNonce() || reg.Epoch != c.GetExpect()) {
				continue // done before, or to be refused
			}
		}
		reg := l.leasedTo(st, p.key, by)
		if reg == nil {
			continue
		}
		c, wait := l.take(reg)
		ends = append(ends, taken{reg.Key, c, reg.Epoch})
		if wait > longest {
			longest, key = wait, reg.Key
		}
	}
	if longest > 0 {
		ad.wait(i, min(longest, maxWaitTold), key, st, fmt.Sprintf("its lease may be held for another %s", longest.Round(time.Millisecond)))
		return
	}
	for _, t := range ends {
		t.lease.claims++
	}
	for _, key := range leasable {
		ad.keys[key] = true
	}
	ad.claims = append(ad.claims, ends...)
}

// mayBeLeased says whether a register is leased before or after a command.
func (l *leases) mayBeLeased(st *viewState, p ending) bool {
	if reg := treeGet(st.tree, p.key); reg != nil && l.a.cfg.Leased(p.key, reg.Body) {
		return true
	}
	return p.claim != nil && l.a.cfg.Leased(p.key, p.claim.GetBody())
}

// wait has a command not proposed now.
func (ad *admission) wait(i int, told time.Duration, key string, st *viewState, why string) {
	ad.waits[i] = &wirev1.ArbiterResult{
		Code: wirev1.ArbiterResult_WAIT, WaitMs: uint64(told.Milliseconds()) + 1, Register: toWire(treeGet(st.tree, key)), Reason: key + ": " + why,
	}
}

// leasedTo returns the register if it is leased to another node than by; nil: there is no lease to mind.
func (l *leases) leasedTo(st *viewState, key string, by peer.ID) *Register {
	reg := treeGet(st.tree, key)
	if reg == nil || reg.Owner == "" || reg.Owner == by || !l.a.cfg.Leased(key, reg.Body) {
		return nil
	}
	return reg
}

// take revokes an epoch and says how long its lease may still be held. Locked.
func (l *leases) take(reg *Register) (*leased, time.Duration) {
	c, now := l.of(reg), l.a.cfg.BootTime()
	c.revoked, c.asked = !planted.Bug("lease-no-revoke"), now
	if c.free || now >= c.end || planted.Bug("no-lease-wait") {
		return c, 0
	}
	l.tell(LeaseAsked, reg.Key, reg.Epoch)
	if l.a.cfg.Links != nil && (c.probed == 0 || now-c.probed > time.Second) {
		c.probed = max(now, 1)
		go l.probe(*reg, l.raft, l.term)
	}
	return c, c.end - now
}

// probe asks the host of an owner. A host that refuses the connection runs no process of that node, and what the process left behind runs for
// no longer than its last grant.
func (l *leases) probe(reg Register, r *raft.Raft, term uint64) {
	ctx, cancel := context.WithTimeout(context.Background(), l.a.t.RPC)
	defer cancel()
	if l.a.cfg.Links.Probe(ctx, reg.Owner) != peers.Refused {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.keys[reg.Key]
	if r != l.raft || term != l.term || c == nil || c.owner != reg.Owner || c.boot != reg.Boot || c.epoch != reg.Epoch || !c.revoked {
		return
	}
	c.end = min(c.end, l.a.cfg.BootTime()+withDrift(processLease))
}

// rest returns the entry without the commands that wait; nil: all wait.
func (ad *admission) rest(entry []byte, e *wirev1.ArbiterEntry) ([]byte, error) {
	if len(ad.waits) == 0 {
		return entry, nil
	}
	if len(ad.waits) == len(e.GetCommands()) {
		return nil, nil
	}
	out := &wirev1.ArbiterEntry{Format: e.GetFormat(), Shard: e.GetShard(), Since: e.GetSince(), Proposer: e.GetProposer()}
	for i, c := range e.GetCommands() {
		if ad.waits[i] == nil {
			out.Commands = append(out.Commands, c)
		}
	}
	return proto.Marshal(out)
}

// merge puts the results of those that were proposed and of those that wait in the order of the commands.
func (ad *admission) merge(n int, done []*wirev1.ArbiterResult) []*wirev1.ArbiterResult {
	if len(ad.waits) == 0 {
		return done
	}
	out := make([]*wirev1.ArbiterResult, n)
	for i := range out {
		if w := ad.waits[i]; w != nil {
			out[i] = w
		} else if len(done) > 0 {
			out[i], done = done[0], done[1:]
		}
	}
	return out
}

// settle is told that the proposal is decided, or that nobody knows.
func (ad *admission) settle(doubt bool) {
	if len(ad.keys) == 0 {
		return
	}
	ad.l.mu.Lock()
	defer ad.l.mu.Unlock()
	if ad.raft != ad.l.raft || ad.term != ad.l.term {
		return
	}
	for key := range ad.keys {
		if ad.l.flight[key]--; ad.l.flight[key] <= 0 {
			delete(ad.l.flight, key)
		}
	}
	for _, t := range ad.claims {
		if c := t.lease; c.epoch == t.epoch {
			c.claims = max(c.claims-1, 0)
			c.doubt = c.doubt || doubt
			if doubt {
				ad.l.tell(LeaseDoubted, t.key, t.epoch)
			} else {
				ad.l.tell(LeaseDecided, t.key, t.epoch)
			}
		}
	}
}
