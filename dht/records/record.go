package records

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/libp2p/go-libp2p/core/crypto"
	"github.com/libp2p/go-libp2p/core/peer"
	"github.com/libp2p/go-libp2p/core/record"
	"google.golang.org/protobuf/proto"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

const (
	// Namespace is the namespace of all keys in kad-dht.
	Namespace = "kb"
	// MaxSize is the most bytes of a record with its envelope.
	MaxSize = 16 << 10
	// MaxKey is the most bytes of a key.
	MaxKey = 512
	// TombstoneFor is how long a deletion is remembered: as long as lost members are looked for.
	TombstoneFor = 7 * 24 * time.Hour

	envelopeDomain = "coppice-record"
	keyPrefix      = "/" + Namespace + "/"
	maxTTL         = 100 * 365 * 24 * time.Hour
)

var envelopeType = []byte("/coppice/record/1")

var (
	// ErrNotFound: no holder has the record, or it was deleted.
	ErrNotFound = errors.New("record not found")
	// ErrInvalid is wrapped by errors about records that break a rule: size, signature, writer, key.
	ErrInvalid = errors.New("invalid record")
	// ErrFull is wrapped where this node cannot take more records.
	ErrFull = errors.New("no room for more records")
)

// Record is a record as a holder or reader has it.
type Record struct {
	Key   string
	Value []byte
	// Incarnation, Epoch, Revision and Writer order the records of a key.
	Incarnation, Epoch, Revision uint64
	Writer                       peer.ID
	// Age is how old the record is at least, as measured by those who held it.
	Age time.Duration
	// TTL is how long the record holds; 0 for ever.
	TTL     time.Duration
	Deleted bool
}

// Version is the place of a record in the order of its key.
type Version struct {
	Incarnation, Epoch, Revision uint64
	Writer                       peer.ID
}

// Compare returns -1, 0 or 1 as v is lower than, equal to or higher than o.
func (v Version) Compare(o Version) int {
	return cmp.Or(
		cmp.Compare(v.Incarnation, o.Incarnation), cmp.Compare(v.Epoch, o.Epoch),
		cmp.Compare(v.Revision, o.Revision), cmp.Compare(v.Writer, o.Writer),
	)
}

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Incarnation, v.Epoch, v.Revision) }

// Version returns the record's place in the order of its key.
func (r *Record) Version() Version {
	return Version{Incarnation: r.Incarnation, Epoch: r.Epoch, Revision: r.Revision, Writer: r.Writer}
}

func (v Version) wire() *wirev1.RecordVersion {
	return &wirev1.RecordVersion{Incarnation: v.Incarnation, Epoch: v.Epoch, Revision: v.Revision, Writer: []byte(v.Writer)}
}

func versionOf(w *wirev1.RecordVersion) Version {
	return Version{Incarnation: w.GetIncarnation(), Epoch: w.GetEpoch(), Revision: w.GetRevision(), Writer: peer.ID(w.GetWriter())}
}

// sum is what a record adds to the digest of its range.
func sumOf(key string, v Version) uint64 {
	b := make([]byte, 0, len(key)+len(v.Writer)+32)
	b = binary.BigEndian.AppendUint64(b, v.Incarnation)
	b = binary.BigEndian.AppendUint64(b, v.Epoch)
	b = binary.BigEndian.AppendUint64(b, v.Revision)
	b = binary.AppendUvarint(b, uint64(len(v.Writer)))
	b = append(b, v.Writer...)
	b = append(b, key...)
	h := sha256.Sum256(b)
	return binary.BigEndian.Uint64(h[:])
}

// sealed is a payload as libp2p's envelopes want it.
type sealed struct{ *wirev1.RecordPayload }

func (sealed) Domain() string { return envelopeDomain }
func (sealed) Codec() []byte  { return envelopeType }
func (s sealed) MarshalRecord() ([]byte, error) {
	return proto.MarshalOptions{Deterministic: true}.Marshal(s.RecordPayload)
}

func (s sealed) UnmarshalRecord(b []byte) error { return proto.Unmarshal(b, s.RecordPayload) }

// seal signs a record.
func seal(r *Record, key crypto.PrivKey) ([]byte, error) {
	e, err := record.Seal(sealed{&wirev1.RecordPayload{
		Key: r.Key, Incarnation: r.Incarnation, Epoch: r.Epoch, Revision: r.Revision, Writer: []byte(r.Writer),
		TtlMs: uint64(r.TTL.Milliseconds()), Deleted: r.Deleted, Value: r.Value,
	}}, key)
	if err != nil {
		return nil, fmt.Errorf("sign record %s: %w", r.Key, err)
	}
	b, err := e.Marshal()
	if err != nil {
		return nil, fmt.Errorf("sign record %s: %w", r.Key, err)
	}
	if len(b) > MaxSize {
		return nil, fmt.Errorf("%w: %s has %d bytes with its envelope, at most %d; put large values into blobs", ErrInvalid, r.Key, len(b), MaxSize)
	}
	return b, nil
}

// open reads an envelope and checks everything that needs no view: size, signature, writer, key and who may write it.
func open(envelope []byte) (*Record, error) {
	r, err := openUnchecked(envelope, true)
	if err != nil {
		return nil, err
	}
	if err := checkKey(r.Key); err != nil {
		return nil, err
	}
	if owner, ok := ownerOf(r.Key); ok && owner != r.Writer.String() {
		return nil, fmt.Errorf("%w: %s may be written by that node only, not by %s", ErrInvalid, r.Key, r.Writer)
	}
	return r, nil
}

// openUnchecked reads an envelope; with verify it checks the signature.
func openUnchecked(envelope []byte, verify bool) (*Record, error) {
	if len(envelope) > MaxSize {
		return nil, fmt.Errorf("%w: %d bytes, at most %d", ErrInvalid, len(envelope), MaxSize)
	}
	p := &wirev1.RecordPayload{}
	var e *record.Envelope
	var err error
	if verify {
		e, err = record.ConsumeTypedEnvelope(envelope, sealed{p})
	} else if e, err = record.UnmarshalEnvelope(envelope); err == nil {
		err = e.TypedRecord(sealed{p})
	}
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrInvalid, err)
	}
	if !bytes.Equal(e.PayloadType, envelopeType) {
		return nil, fmt.Errorf("%w: payload of type %q", ErrInvalid, e.PayloadType)
	}
	signer, err := peer.IDFromPublicKey(e.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("%w: signer: %w", ErrInvalid, err)
	}
	if signer != peer.ID(p.GetWriter()) {
		return nil, fmt.Errorf("%w: signed by %s, not by its writer", ErrInvalid, signer)
	}
	ttl := time.Duration(0)
	if ms := p.GetTtlMs(); ms > uint64(maxTTL/time.Millisecond) {
		return nil, fmt.Errorf("%w: a time to live of %d ms", ErrInvalid, ms)
	} else if ms > 0 {
		ttl = time.Duration(ms) * time.Millisecond
	}
	return &Record{
		Key: p.GetKey(), Value: p.GetValue(), Incarnation: p.GetIncarnation(), Epoch: p.GetEpoch(), Revision: p.GetRevision(),
		Writer: signer, TTL: ttl, Deleted: p.GetDeleted(),
	}, nil
}

func checkKey(key string) error {
	if len(key) > MaxKey {
		return fmt.Errorf("%w: a key of %d bytes, at most %d", ErrInvalid, len(key), MaxKey)
	}
	rest, ok := strings.CutPrefix(key, keyPrefix)
	if !ok || rest == "" || strings.ContainsRune(rest, 0) {
		return fmt.Errorf("%w: key %q, want %sKIND/…", ErrInvalid, key, keyPrefix)
	}
	return nil
}

// ownerOf returns the peer id that alone may write the key; ok is false where any member may.
func ownerOf(key string) (id string, ok bool) {
	rest, ok := strings.CutPrefix(key, keyPrefix)
	if !ok {
		return "", false
	}
	kind, rest, _ := strings.Cut(rest, "/")
	if kind != "nodes" && kind != "facts" {
		return "", false
	}
	id, _, _ = strings.Cut(rest, "/")
	return id, true
}

// ageIn returns an age that came over the wire, bounded to what can be.
func ageIn(ms uint64) time.Duration {
	return time.Duration(min(ms, math.MaxInt64/uint64(time.Millisecond)/4)) * time.Millisecond
}

func ageOut(age time.Duration) uint64 { return uint64(max(age, 0).Milliseconds()) }
