package arbiter

import (
	"errors"
	"fmt"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/libp2p/go-libp2p/core/peer"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

const (
	// MaxFormat is the highest entry format that this build applies. The group's Meta.format rises to it by a committed entry only
	// when all members announce it.
	MaxFormat = 1

	maxEntry    = 4 << 20 // bytes of an entry that a leader takes
	maxCommands = 4096    // commands in one
)

// errUnknown is wrapped when an entry holds what this build does not know: applying must stop there.
var errUnknown = errors.New("the entry is of a newer version")

// errInvalid is wrapped when an entry breaks a limit or a rule of form.
var errInvalid = errors.New("invalid")

// decodeEntry decodes an entry of a format up to most strictly: a higher format, shard, command, field or enum value that this build does not know is an error that
// wraps errUnknown, whatever protobuf would have made of it.
func decodeEntry(data []byte, most uint32) (*wirev1.ArbiterEntry, error) {
	e := new(wirev1.ArbiterEntry)
	if err := proto.Unmarshal(data, e); err != nil {
		return nil, fmt.Errorf("%w: %w", errUnknown, err)
	}
	if f := e.GetFormat(); f == 0 || f > most {
		return nil, fmt.Errorf("%w: format %d, this build knows up to %d", errUnknown, f, most)
	}
	if err := ours(e.GetShard()); err != nil {
		return nil, fmt.Errorf("%w: %w", errUnknown, err)
	}
	if err := strict(e.ProtoReflect()); err != nil {
		return nil, err
	}
	for i, c := range e.GetCommands() {
		if c.GetKind() == nil {
			return nil, fmt.Errorf("%w: command %d of the entry", errUnknown, i)
		}
		if err := knownTxn(c.GetTxn()); err != nil {
			return nil, fmt.Errorf("command %d of the entry: %w", i, err)
		}
	}
	return e, nil
}

// strict finds unknown fields at any depth.
func strict(m protoreflect.Message) error {
	if len(m.GetUnknown()) > 0 {
		return fmt.Errorf("%w: unknown field in %s", errUnknown, m.Descriptor().Name())
	}
	var err error
	m.Range(func(fd protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		if fd.Kind() != protoreflect.MessageKind {
			return true
		}
		if fd.IsList() {
			for i := 0; i < v.List().Len() && err == nil; i++ {
				err = strict(v.List().Get(i).Message())
			}
		} else {
			err = strict(v.Message())
		}
		return err == nil
	})
	return err
}

func knownTxn(t *wirev1.ArbiterTxn) error {
	for _, c := range t.GetCompares() {
		if _, ok := wirev1.ArbiterCompare_Field_name[int32(c.GetField())]; !ok || c.GetField() == wirev1.ArbiterCompare_UNSPECIFIED {
			return fmt.Errorf("%w: comparison %d", errUnknown, c.GetField())
		}
	}
	for _, ops := range [][]*wirev1.ArbiterOp{t.GetThen(), t.GetOtherwise()} {
		for _, op := range ops {
			if op.GetKind() == nil {
				return fmt.Errorf("%w: operation of a transaction", errUnknown)
			}
		}
	}
	return nil
}

// checkEntry holds an entry against the limits. The proposer checks its commands and the leader the whole entry, so that nothing
// beyond a limit enters the log.
func checkEntry(e *wirev1.ArbiterEntry, size int) error {
	if size > maxEntry || len(e.GetCommands()) > maxCommands || len(e.GetCommands()) == 0 {
		return fmt.Errorf("%w: an entry of %d bytes and %d commands; at most %d and %d", errInvalid, size, len(e.GetCommands()), maxEntry, maxCommands)
	}
	for _, c := range e.GetCommands() {
		if err := checkCommand(c); err != nil {
			return err
		}
	}
	return nil
}

func checkCommand(c *wirev1.ArbiterCommand) error {
	switch k := c.GetKind().(type) {
	case *wirev1.ArbiterCommand_Claim:
		return checkClaim(k.Claim)
	case *wirev1.ArbiterCommand_Commit:
		return errors.Join(checkKey(k.Commit.GetKey()), checkBody(k.Commit.GetBody()), checkHolders(k.Commit.GetHolders()), checkRoot(k.Commit.GetRoot()))
	case *wirev1.ArbiterCommand_SetHolders:
		return errors.Join(checkKey(k.SetHolders.GetKey()), checkHolders(k.SetHolders.GetHolders()))
	case *wirev1.ArbiterCommand_Release:
		return checkKey(k.Release.GetKey())
	case *wirev1.ArbiterCommand_Txn:
		return checkTxn(k.Txn)
	case *wirev1.ArbiterCommand_SetMeta:
		return nil
	}
	return fmt.Errorf("%w: no command", errInvalid)
}

func checkClaim(c *wirev1.ArbiterClaim) error {
	err := errors.Join(checkKey(c.GetKey()), checkBody(c.GetBody()), checkRoot(c.GetRoot()), checkHolders(c.GetHolders()))
	if c.GetNonce() == 0 {
		err = errors.Join(err, fmt.Errorf("%w: claim of %q without a nonce", errInvalid, c.GetKey()))
	}
	if len(c.GetOwner()) == 0 {
		err = errors.Join(err, fmt.Errorf("%w: claim of %q without an owner", errInvalid, c.GetKey()))
	}
	if len(c.GetHolders()) > 0 && !c.GetSetRoot() {
		err = errors.Join(err, fmt.Errorf("%w: claim of %q that names holders of no root", errInvalid, c.GetKey()))
	}
	return err
}

func checkTxn(t *wirev1.ArbiterTxn) error {
	if len(t.GetCompares()) > MaxOps || len(t.GetThen()) > MaxOps || len(t.GetOtherwise()) > MaxOps {
		return fmt.Errorf("%w: a transaction of more than %d compares or operations", errInvalid, MaxOps)
	}
	if t.GetNonce() == 0 {
		return fmt.Errorf("%w: transaction without a nonce", errInvalid)
	}
	var err error
	for _, c := range t.GetCompares() {
		err = errors.Join(err, checkKey(c.GetKey()))
	}
	for _, ops := range [][]*wirev1.ArbiterOp{t.GetThen(), t.GetOtherwise()} {
		for _, op := range ops {
			switch k := op.GetKind().(type) {
			case *wirev1.ArbiterOp_Put:
				err = errors.Join(err, checkKey(k.Put.GetKey()), checkBody(k.Put.GetBody()))
			case *wirev1.ArbiterOp_Delete:
				err = errors.Join(err, checkKey(k.Delete))
			case *wirev1.ArbiterOp_Claim:
				err = errors.Join(err, checkClaim(k.Claim))
			default:
				err = errors.Join(err, fmt.Errorf("%w: empty operation", errInvalid))
			}
		}
	}
	return err
}

func checkKey(key string) error {
	if key == "" || len(key) > MaxKey {
		return fmt.Errorf("%w: key %.40q of %d bytes; 1 to %d are allowed", errInvalid, key, len(key), MaxKey)
	}
	if !utf8.ValidString(key) {
		return fmt.Errorf("%w: key %.40q is not UTF-8", errInvalid, key)
	}
	return nil
}

func checkBody(b []byte) error {
	if len(b) > MaxBody {
		return fmt.Errorf("%w: body of %d bytes; at most %d", errInvalid, len(b), MaxBody)
	}
	return nil
}

func checkRoot(b []byte) error {
	if len(b) > 256 {
		return fmt.Errorf("%w: root of %d bytes; at most 256", errInvalid, len(b))
	}
	return nil
}

func checkHolders(ids [][]byte) error {
	if len(ids) > MaxHolders {
		return fmt.Errorf("%w: %d holders; at most %d", errInvalid, len(ids), MaxHolders)
	}
	return nil
}

// ===== from requests to commands =====

func claimCommand(r *ClaimRequest) *wirev1.ArbiterClaim {
	return &wirev1.ArbiterClaim{
		Key: r.Key, Expect: r.Expect, Nonce: r.Nonce, Owner: []byte(r.Owner), Boot: r.Boot, Body: optional(r.Body), SetRoot: r.SetRoot, Root: r.Root,
		Holders: idsToWire(r.Holders),
	}
}

func commitCommand(r *CommitRequest) *wirev1.ArbiterCommit {
	return &wirev1.ArbiterCommit{
		Key: r.Key, Epoch: r.Epoch, Nonce: r.Nonce, Seq: r.Seq, Root: r.Root, Holders: idsToWire(r.Holders), W: r.W, Body: optional(r.Body),
	}
}

// optional keeps nil apart from empty on the wire.
func optional(b []byte) []byte {
	if b == nil {
		return nil
	}
	return append([]byte{}, b...)
}

var compareFields = map[string]wirev1.ArbiterCompare_Field{
	"revision": wirev1.ArbiterCompare_REVISION, "epoch": wirev1.ArbiterCompare_EPOCH,
	"exists": wirev1.ArbiterCompare_EXISTS, "seq": wirev1.ArbiterCompare_SEQ,
}

func txnCommand(r *TxnRequest) (*wirev1.ArbiterTxn, error) {
	out := &wirev1.ArbiterTxn{Nonce: r.Nonce}
	for _, c := range r.Compares {
		f, ok := compareFields[c.Field]
		if !ok {
			return nil, fmt.Errorf("%w: comparison of %q; revision, epoch, exists and seq can be compared", errInvalid, c.Field)
		}
		out.Compares = append(out.Compares, &wirev1.ArbiterCompare{Key: c.Key, Field: f, Equal: c.Equal})
	}
	var err error
	if out.Then, err = opsCommand(r.Then); err != nil {
		return nil, err
	}
	out.Otherwise, err = opsCommand(r.Else)
	return out, err
}

func opsCommand(ops []Op) ([]*wirev1.ArbiterOp, error) {
	var out []*wirev1.ArbiterOp
	for i, op := range ops {
		set := 0
		w := new(wirev1.ArbiterOp)
		if op.Put != nil {
			set++
			w.Kind = &wirev1.ArbiterOp_Put{Put: &wirev1.ArbiterPut{Key: op.Put.Key, Body: op.Put.Body}}
		}
		if op.Delete != "" {
			set++
			w.Kind = &wirev1.ArbiterOp_Delete{Delete: op.Delete}
		}
		if op.Claim != nil {
			set++
			w.Kind = &wirev1.ArbiterOp_Claim{Claim: claimCommand(op.Claim)}
		}
		if set != 1 {
			return nil, fmt.Errorf("%w: operation %d sets %d of put, delete and claim; exactly one is wanted", errInvalid, i, set)
		}
		out = append(out, w)
	}
	return out, nil
}

// distinct counts different holders.
func distinct(ids [][]byte) int {
	seen := make(map[peer.ID]struct{}, len(ids))
	for _, id := range ids {
		seen[peer.ID(id)] = struct{}{}
	}
	return len(seen)
}
