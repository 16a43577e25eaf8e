package state

import (
	"errors"
	"fmt"
	"time"
)

// Hard limits of one item. They keep an entry, and with it every message and buffer, bounded.
const (
	MaxKeyBytes    = 64 << 10 // of a map key and of an idempotency key
	MaxValueBytes  = 16 << 20
	MaxTxnBytes    = 64 << 20 // keys and values written by one transaction, and its reply
	DefaultChunk   = 256 << 10
	maxChunk       = 2 << 20  // below gRPC's default limit of 4 MiB for a message
	maxRecordBytes = 80 << 20 // of one record or entry in a restore: more than MaxTxnBytes with its framing
)

// Limits of a Store; zero fields take their default.
type Limits struct {
	DedupeBytes  int64         // the dedupe table, 64 MiB
	JournalBytes int64         // journal entries kept for followers and incremental checkpoints, 32 MiB
	BacklogBytes int64         // entries an attached follower has not read before writes are refused, 32 MiB
	KeyAge       time.Duration // a plain key is kept this long after it was last seen, 10 min
	CallerAge    time.Duration // a silent caller's numbered keys and low-water mark are kept this long, 24 h
}

func (l Limits) withDefaults() Limits {
	if l.DedupeBytes <= 0 {
		l.DedupeBytes = 64 << 20
	}
	if l.JournalBytes <= 0 {
		l.JournalBytes = 32 << 20
	}
	if l.BacklogBytes <= 0 {
		l.BacklogBytes = 32 << 20
	}
	if l.KeyAge <= 0 {
		l.KeyAge = 10 * time.Minute
	}
	if l.CallerAge <= 0 {
		l.CallerAge = 24 * time.Hour
	}
	return l
}

// What callers branch on.
var (
	ErrTableFull  = errors.New("the table of remembered replies is full: let callers advance their low-water mark, or raise the limit")
	ErrAnswered   = errors.New("the key is below its caller's low-water mark: the caller said it has the answer, so the reply was let go and the call is not run again")
	ErrKeyReused  = errors.New("the key was used before for a different request: use a new key for each request")
	ErrBacklog    = errors.New("journal entries wait to be copied elsewhere and the bound is reached: try again")
	ErrGone       = errors.New("the journal no longer holds the entries after that mark: take a full checkpoint first")
	ErrFuture     = errors.New("that mark is newer than this state: it belongs to another history")
	ErrReadOnly   = errors.New("write in a read-only transaction: a method or request declared free of side effects must not change state")
	ErrNotBegun   = errors.New("transaction used before it began")
	ErrEnded      = errors.New("transaction used after its call ended")
	ErrTooLarge   = errors.New("too large")
	ErrFollowerUp = errors.New("the state was replaced by a restore: follow again from a new checkpoint")
)

// CorruptError says which part of a restored stream is not what it should be.
type CorruptError struct {
	Section string
	Offset  uint64
	Why     string
}

// Error implements error.
func (e *CorruptError) Error() string {
	return fmt.Sprintf("state stream refused: section %q at byte %d: %s", e.Section, e.Offset, e.Why)
}
