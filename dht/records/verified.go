package records

import (
	"crypto/sha256"
	"sync"
)

// verifiedKept is how many records with a good signature are remembered, twice over.
const verifiedKept = 1024

// verified remembers records whose signature was checked, since a record passes the same check on several ways.
type verified struct {
	mu    sync.Mutex // guards young, old
	young map[[sha256.Size]byte]*Record
	old   map[[sha256.Size]byte]*Record
}

func newVerified() *verified { return &verified{young: map[[sha256.Size]byte]*Record{}} }

func (v *verified) get(envelope []byte) *Record {
	h := sha256.Sum256(envelope)
	v.mu.Lock()
	defer v.mu.Unlock()
	if r := v.young[h]; r != nil {
		return r
	}
	return v.old[h]
}

func (v *verified) put(envelope []byte, r *Record) {
	h := sha256.Sum256(envelope)
	v.mu.Lock()
	defer v.mu.Unlock()
	if len(v.young) >= verifiedKept {
		v.young, v.old = map[[sha256.Size]byte]*Record{}, v.young
	}
	v.young[h] = r
}
