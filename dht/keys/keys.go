// Package keys is the metric of the overlay: where a name and a node lie in the 256-bit key space, and which of two nodes is
// closer to a name. It is kad-dht's own metric (SHA-256 of the key's bytes, SHA-256 of the peer id's bytes, XOR), so that local
// arithmetic over the member view and a lookup by kad-dht name the same nodes.
package keys

import (
	"bytes"
	"crypto/sha256"
	"slices"

	"github.com/libp2p/go-libp2p/core/peer"
)

// Point is a place in the key space.
type Point [sha256.Size]byte

// Of returns where a key lies.
func Of(key string) Point { return sha256.Sum256([]byte(key)) }

// OfPeer returns where a node lies.
func OfPeer(id peer.ID) Point { return sha256.Sum256([]byte(id)) }

// Distance returns the XOR distance between two points, compared as a big-endian number.
func Distance(a, b Point) Point {
	var d Point
	for i := range d {
		d[i] = a[i] ^ b[i]
	}
	return d
}

// Closer reports whether a is strictly closer to target than b.
func Closer(target, a, b Point) bool {
	da, db := Distance(target, a), Distance(target, b)
	return bytes.Compare(da[:], db[:]) < 0
}

// Sort orders ids by their distance to target, closest first. It sorts in place and returns ids.
func Sort(target Point, ids []peer.ID) []peer.ID {
	type far struct {
		id peer.ID
		d  Point
	}
	list := make([]far, len(ids)) // a point costs more than comparing two
	for i, id := range ids {
		list[i] = far{id, Distance(target, OfPeer(id))}
	}
	slices.SortFunc(list, func(a, b far) int { return bytes.Compare(a.d[:], b.d[:]) })
	for i := range list {
		ids[i] = list[i].id
	}
	return ids
}
