package blobs

import (
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"math"

	"github.com/libp2p/go-libp2p/core/peer"
)

// Limits of a node.
const (
	// MaxData is the most bytes of data in one node.
	MaxData = 1 << 20
	// MaxLinks is the most links of one node.
	MaxLinks = 16384
	// MaxKind is the most bytes of a node's kind.
	MaxKind = 64
)

// domain separates the hashes of nodes from all other hashes.
const domain = "coppice/blob/1\x00"

// Hash names a node: SHA-256 over the domain and the node's encoding.
type Hash [sha256.Size]byte

// String returns the hash in hexadecimal.
func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// Short returns the first 12 digits, for messages to people.
func (h Hash) Short() string { return hex.EncodeToString(h[:6]) }

// IsZero reports whether h names nothing.
func (h Hash) IsZero() bool { return h == Hash{} }

// ParseHash reads a hash from its 32 bytes.
func ParseHash(b []byte) (Hash, error) {
	var h Hash
	if len(b) != len(h) {
		return h, fmt.Errorf("a hash has %d bytes, this one %d", len(h), len(b))
	}
	copy(h[:], b)
	return h, nil
}

// Link leads from a node to another.
type Link struct {
	Hash Hash
	// Bytes is the size of the encoding of the linked node and of all nodes below it, counted once for each path. It is what the
	// writer of the linking node said: good for progress and for choosing a way to send, not for trust.
	Bytes uint64
}

// Node is the unit of storage and transfer.
type Node struct {
	// Kind says what Data is, to whoever made it ("page", "tree", …). The store does not look at it, except OpenStream.
	Kind  string
	Links []Link
	Data  []byte
}

// ErrInvalid is wrapped by errors about nodes that break a limit or an encoding that cannot be read.
var ErrInvalid = errors.New("invalid node")

// ErrFull is wrapped where a store refuses to hold more for others because its disk is low.
var ErrFull = errors.New("disk is low, no longer a holder")

// ErrClosed is returned by operations on a closed store.
var ErrClosed = errors.New("blob store is closed")

// CorruptError says that what is stored under a hash is not what the hash names.
type CorruptError struct {
	Hash Hash
	// Why is what was found.
	Why string
}

func (e *CorruptError) Error() string {
	return fmt.Sprintf("node %s is corrupt (%s); it is fetched again from another holder", e.Hash.Short(), e.Why)
}

// MissingError says that a node is not here, and which holders did not have it either.
type MissingError struct {
	Hash  Hash
	Asked []peer.ID
}

func (e *MissingError) Error() string {
	if len(e.Asked) == 0 {
		return fmt.Sprintf("node %s is not here", e.Hash.Short())
	}
	return fmt.Sprintf("node %s is at none of the %d holders asked", e.Hash.Short(), len(e.Asked))
}

// check returns an error where n breaks a limit.
func (n *Node) check() error {
	switch {
	case len(n.Kind) > MaxKind:
		return fmt.Errorf("%w: kind of %d bytes, at most %d", ErrInvalid, len(n.Kind), MaxKind)
	case len(n.Links) > MaxLinks:
		return fmt.Errorf("%w: %d links, at most %d", ErrInvalid, len(n.Links), MaxLinks)
	case len(n.Data) > MaxData:
		return fmt.Errorf("%w: %d bytes of data, at most %d", ErrInvalid, len(n.Data), MaxData)
	}
	return nil
}

// encode returns the one encoding of n: kind, links, data, each led by its length.
func (n *Node) encode() []byte {
	b := make([]byte, 0, 24+len(n.Kind)+len(n.Links)*40+len(n.Data))
	b = n.appendHead(b)
	b = binary.AppendUvarint(b, uint64(len(n.Data)))
	return append(b, n.Data...)
}

// appendHead appends the encoding of all but the data.
func (n *Node) appendHead(b []byte) []byte {
	b = binary.AppendUvarint(b, uint64(len(n.Kind)))
	b = append(b, n.Kind...)
	b = binary.AppendUvarint(b, uint64(len(n.Links)))
	for _, l := range n.Links {
		b = append(b, l.Hash[:]...)
		b = binary.AppendUvarint(b, l.Bytes)
	}
	return b
}

// decodeNode reads an encoding. Data aliases b. An encoding that encode would not produce is refused, so that a node has one name.
func decodeNode(b []byte) (Node, error) {
	n, rest, err := decodeHead(b)
	if err != nil {
		return Node{}, err
	}
	size, rest, err := uvarint(rest)
	if err != nil {
		return Node{}, fmt.Errorf("%w: length of data: %w", ErrInvalid, err)
	}
	if size != uint64(len(rest)) {
		return Node{}, fmt.Errorf("%w: %d bytes of data where %d are announced", ErrInvalid, len(rest), size)
	}
	n.Data = rest
	return n, n.check()
}

// decodeHead reads kind and links and returns what follows.
func decodeHead(b []byte) (Node, []byte, error) {
	var n Node
	size, b, err := uvarint(b)
	if err != nil || size > MaxKind || size > uint64(len(b)) {
		return n, nil, fmt.Errorf("%w: kind of %d bytes in %d", ErrInvalid, size, len(b))
	}
	n.Kind, b = string(b[:size]), b[size:]
	count, b, err := uvarint(b)
	if err != nil || count > MaxLinks || count*(sha256.Size+1) > uint64(len(b)) {
		return n, nil, fmt.Errorf("%w: %d links in %d bytes", ErrInvalid, count, len(b))
	}
	if count > 0 {
		n.Links = make([]Link, count)
	}
	for i := range n.Links {
		if len(b) < sha256.Size {
			return n, nil, fmt.Errorf("%w: cut off in link %d", ErrInvalid, i)
		}
		b = b[copy(n.Links[i].Hash[:], b):]
		if n.Links[i].Bytes, b, err = uvarint(b); err != nil {
			return n, nil, fmt.Errorf("%w: size of link %d: %w", ErrInvalid, i, err)
		}
	}
	return n, b, nil
}

var errVarint = errors.New("not a minimal varint")

// uvarint reads a varint and refuses one with needless bytes.
func uvarint(b []byte) (uint64, []byte, error) {
	v, n := binary.Uvarint(b)
	if n <= 0 || (n > 1 && b[n-1] == 0) {
		return 0, b, errVarint
	}
	return v, b[n:], nil
}

// hashOf names an encoding.
func hashOf(enc []byte) Hash {
	d := sha256.New()
	d.Write([]byte(domain))
	d.Write(enc)
	var h Hash
	d.Sum(h[:0])
	return h
}

// link returns the link to a node, given its name and the size of its encoding.
func (n *Node) link(h Hash, size int) Link {
	total := uint64(size)
	for _, l := range n.Links {
		if total > math.MaxUint64-l.Bytes {
			total = math.MaxUint64
			break
		}
		total += l.Bytes
	}
	return Link{Hash: h, Bytes: total}
}

// LinkOf is the link to a node that may not have been kept anywhere yet. The error wraps ErrInvalid where the node breaks a limit.
func LinkOf(n Node) (Link, error) {
	if err := n.check(); err != nil {
		return Link{}, err
	}
	enc := n.encode()
	return n.link(hashOf(enc), len(enc)), nil
}

// packHashes and unpackHashes are the wire form of a list of hashes.
func packHashes(hs []Hash) []byte {
	b := make([]byte, 0, len(hs)*sha256.Size)
	for _, h := range hs {
		b = append(b, h[:]...)
	}
	return b
}

func unpackHashes(b []byte, most int) ([]Hash, error) {
	if len(b)%sha256.Size != 0 || len(b)/sha256.Size > most {
		return nil, fmt.Errorf("a list of %d bytes is no list of at most %d hashes", len(b), most)
	}
	hs := make([]Hash, len(b)/sha256.Size)
	for i := range hs {
		copy(hs[i][:], b[i*sha256.Size:])
	}
	return hs, nil
}
