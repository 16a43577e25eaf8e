package arbiter

import (
	"errors"
	"fmt"
	"time"

	"github.com/libp2p/go-libp2p/core/peer"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// PlacementKey is the key whose closest eligible members are the voters, the first of them the coordinator.
const PlacementKey = "/system/placement"

// Limits of what the group stores. A command beyond one is refused before it is proposed.
const (
	MaxKey     = 512       // bytes of a key
	MaxBody    = 512 << 10 // bytes of a body
	MaxHolders = 64        // holders of one register
	MaxOps     = 128       // compares, and operations of either branch, of one transaction
)

// Register is one register of the group. Fields are as of (Incarnation, Index), the last change of any kind.
type Register struct {
	Key         string
	Revision    uint64    // +1 with each change of body or ownership; a pure checkpoint leaves it
	Epoch       uint64    // +1 with each claim; never used twice for a key, not even after its deletion
	Owner       peer.ID   // "": never claimed, or released
	Boot        uint64    // of the owner's process
	Nonce       uint64    // of the claim that made the epoch
	Seq         uint64    // last acknowledged checkpoint
	Root        []byte    // its root
	Holders     []peer.ID // who acknowledged it
	W           uint32    // how many had to
	Body        []byte
	Index       uint64
	Incarnation uint64
	Deleted     bool // only in what Mirror is told: the register is gone
}

// ClaimRequest asks for the next epoch of a register. Nonce names the claim; 0 lets the arbiter draw one.
type ClaimRequest struct {
	Key     string
	Expect  uint64 // the epoch that the claim replaces; 0 for a register never claimed or not there
	Nonce   uint64
	Owner   peer.ID
	Boot    uint64
	Body    []byte // nil: keep
	SetRoot bool   // also go to Root, as the next seq (undo)
	Root    []byte
	Holders []peer.ID // with SetRoot: who has Root; empty: those that the register names stay
}

// CommitRequest acknowledges a checkpoint in the current epoch. It is admitted with Seq = last + 1 and at least W distinct holders.
type CommitRequest struct {
	Key     string
	Epoch   uint64
	Nonce   uint64 // of the claim that made the epoch
	Seq     uint64
	Root    []byte
	Holders []peer.ID
	W       uint32
	Body    []byte // nil: keep
}

// Compare is one condition of a transaction. Field is "revision", "epoch", "seq", or "exists" (Equal 1 or 0). A register that is not
// there has revision, epoch and seq 0.
type Compare struct {
	Key   string
	Field string
	Equal uint64
}

// PutOp sets the body of a register, which it makes if need be; ownership stays.
type PutOp struct {
	Key  string
	Body []byte
}

// Op is one operation of a transaction: exactly one field is set.
type Op struct {
	Put    *PutOp
	Delete string
	Claim  *ClaimRequest // Nonce must be set
}

// TxnRequest is a transaction. When all compares hold and all claims of Then go through, Then is done, else Otherwise ("Else"), as a
// whole. Nonce names it: the same nonce again answers with the first result. 0 lets the arbiter draw one.
type TxnRequest struct {
	Nonce    uint64
	Compares []Compare
	Then     []Op
	Else     []Op
}

// TxnResult tells which branch was done.
type TxnResult struct {
	Succeeded bool // Then was done
	// Registers are the registers of the operations done, in their order (a deleted one with Deleted set). When nothing was done they
	// are those that the compares name, as they stand; missing ones are left out.
	Registers []Register
	Index     uint64
}

// RefusedError says that a command's precondition does not hold. Nothing was done.
type RefusedError struct {
	Current Register // as it stands; Exists false: there is none
	Exists  bool
	Reason  string
}

func (e *RefusedError) Error() string { return "refused: " + e.Reason }

// FencedError says that another epoch than the command's is current. Nothing was done.
type FencedError struct {
	Current Register
	Exists  bool
	Reason  string
}

func (e *FencedError) Error() string { return "fenced: " + e.Reason }

// ErrInDoubt is wrapped by errors after which a command may or may not have been done, now or a little later. Read the register
// before acting on either.
var ErrInDoubt = errors.New("in doubt: it may have been done")

// ErrNoLeader is wrapped when the context ended while the group had no leader that could be reached. Nothing was done.
var ErrNoLeader = errors.New("the arbiter has no leader that this node can reach")

// ErrClosed is wrapped after Close.
var ErrClosed = errors.New("the arbiter is closed")

// InDoubtError is an ErrInDoubt with what is known.
type InDoubtError struct {
	Current *Register // nil: unknown or not there
	Cause   error
}

func (e *InDoubtError) Error() string { return fmt.Sprintf("%v: %v", ErrInDoubt, e.Cause) }

// Unwrap makes errors.Is(err, ErrInDoubt) and errors.Is(err, cause) hold.
func (e *InDoubtError) Unwrap() []error { return []error{ErrInDoubt, e.Cause} }

// Status is what a node knows about the group now.
type Status struct {
	Cluster     string // cluster id; "" while unknown
	Role        string // leader | voter | learner | follower (of a feed) | halted | unverified
	HasLeader   bool
	Leader      peer.ID
	Coordinator peer.ID   // committed; "" while none
	Voters      []peer.ID // closest to PlacementKey first
	Learners    []peer.ID
	Incarnation uint64
	Format      uint32  // of the group's entries, at most; 0 while unknown
	Primary     peer.ID // of two voters that go by the rule of two nodes, as applied here; "": the rule does not hold
	Paired      bool    // the rule holds and this node has had contact with the other: it could go on alone
	Term        uint64
	Index       uint64        // of the local view
	Commit      uint64        // raft's commit index here; 0 on nodes outside the group
	LastLog     uint64        // raft's last index here
	FeedAge     time.Duration // how old the local view may be; < 0: never heard the group
	Registers   int
	Lag         map[peer.ID]uint64 // at the leader: entries that a server has not acknowledged
	Pending     int                // commands of this node that wait for an answer
	Followers   int                // feeds that this node serves
	Boots       uint64             // starts of this node on this disk
	Halted      string             // why this node stopped applying and voting; "" when it did not
	Keeper      string             // last word of the keeper, at the leader
	LastError   string             // last background failure, with its time
	Commits     uint64             // entries applied since start
	Elections   uint64             // elections that this node started because the leader was proven dead
}

func fromWire(r *wirev1.ArbiterRegister) *Register {
	if r == nil {
		return nil
	}
	return &Register{
		Key: r.GetKey(), Revision: r.GetRevision(), Epoch: r.GetEpoch(), Owner: peer.ID(r.GetOwner()), Boot: r.GetBoot(), Nonce: r.GetNonce(),
		Seq: r.GetSeq(), Root: r.GetRoot(), Holders: idsFromWire(r.GetHolders()), W: r.GetW(), Body: r.GetBody(), Index: r.GetIndex(),
		Incarnation: r.GetIncarnation(), Deleted: r.GetDeleted(),
	}
}

func toWire(r *Register) *wirev1.ArbiterRegister {
	if r == nil {
		return nil
	}
	return &wirev1.ArbiterRegister{
		Key: r.Key, Revision: r.Revision, Epoch: r.Epoch, Owner: []byte(r.Owner), Boot: r.Boot, Nonce: r.Nonce, Seq: r.Seq, Root: r.Root,
		Holders: idsToWire(r.Holders), W: r.W, Body: r.Body, Index: r.Index, Incarnation: r.Incarnation, Deleted: r.Deleted,
	}
}

func idsFromWire(in [][]byte) []peer.ID {
	if len(in) == 0 {
		return nil
	}
	out := make([]peer.ID, len(in))
	for i, b := range in {
		out[i] = peer.ID(b)
	}
	return out
}

func idsToWire(in []peer.ID) [][]byte {
	if len(in) == 0 {
		return nil
	}
	out := make([][]byte, len(in))
	for i, id := range in {
		out[i] = []byte(id)
	}
	return out
}

// value returns a copy that the caller may keep and change, but for the bytes behind Root, Body and Holders, which nobody changes.
func value(r *Register) (Register, bool) {
	if r == nil {
		return Register{}, false
	}
	return *r, true
}
