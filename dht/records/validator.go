package records

import (
	"errors"
	"fmt"

	record "github.com/libp2p/go-libp2p-record"
	"github.com/libp2p/go-libp2p/core/peer"
)

// Validator checks and orders records for kad-dht: register it for Namespace in a record.NamespacedValidator. The node and outside
// clients use the same one.
//
// A record is valid for a key when it has at most MaxSize bytes, is signed by its writer, names that key and was written by a member.
// /kb/nodes/ID and /kb/facts/ID/… may be written by the node ID only. Everything else (mirrors under /kb/own/, /kb/app/ and /kb/reg/, checkpoint
// indexes, …) may be written by any member: its version comes from the arbiter's incarnation and index, so that members that mirror the
// same register write the same version.
type Validator struct {
	member func(peer.ID) bool
	cache  *verified
}

var _ record.Validator = (*Validator)(nil)

// NewValidator returns a validator. member reports whether a peer is one; nil: every writer is taken for one, for clients without a view.
func NewValidator(member func(peer.ID) bool) *Validator {
	if member == nil {
		member = func(peer.ID) bool { return true }
	}
	return &Validator{member: member, cache: newVerified()}
}

// Validate implements record.Validator.
func (v *Validator) Validate(key string, value []byte) error {
	r, err := v.open(value)
	if err != nil {
		return err
	}
	if r.Key != key {
		return fmt.Errorf("%w: a record for %q under %q", ErrInvalid, r.Key, key)
	}
	return nil
}

// open returns a valid record. Signatures that were found good are remembered.
func (v *Validator) open(value []byte) (*Record, error) {
	r := v.cache.get(value)
	if r == nil {
		var err error
		if r, err = open(value); err != nil {
			return nil, err
		}
		v.cache.put(value, r)
	}
	if !v.member(r.Writer) {
		return nil, fmt.Errorf("%w: %s was written by %s, who is no member", ErrInvalid, r.Key, r.Writer)
	}
	out := *r
	return &out, nil
}

// Select implements record.Validator: the highest version wins, the first of equals. Values that cannot be read lose.
func (v *Validator) Select(key string, values [][]byte) (int, error) {
	best := -1
	var highest Version
	for i, value := range values {
		r, err := openUnchecked(value, false)
		if err != nil || r.Key != key {
			continue
		}
		if best < 0 || r.Version().Compare(highest) > 0 {
			best, highest = i, r.Version()
		}
	}
	if best < 0 {
		return 0, errors.Join(ErrInvalid, fmt.Errorf("none of %d values is a record for %q", len(values), key))
	}
	return best, nil
}
