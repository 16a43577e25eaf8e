package blobs

import (
	"bytes"
	"crypto/rand"
	"io"
	"testing"

	"github.com/cockroachdb/pebble/v2/vfs"
	"github.com/libp2p/go-libp2p/core/peer"

	"github.com/coppice-project/coppice/dht/peers"
	"github.com/coppice-project/coppice/dht/store"
)

// speedStores are stores on the disk, with the node's options, over a network in memory.
func speedStores(b *testing.B, n int) ([]*Store, []peer.ID) {
	b.Helper()
	net := peers.NewNet(1)
	var out []*Store
	var ids []peer.ID
	for i := range n {
		id := peer.ID([]byte{'p', byte('0' + i)})
		db, err := store.Open(vfs.Default, b.TempDir(), store.Options{})
		if err != nil {
			b.Fatal(err)
		}
		s, err := Open(Config{Self: id, DB: db.DB(), Peers: net.Join(id)})
		if err != nil {
			b.Fatal(err)
		}
		b.Cleanup(func() {
			if err := s.Close(); err != nil {
				b.Error(err)
			}
			if err := db.Close(); err != nil {
				b.Error(err)
			}
		})
		out, ids = append(out, s), append(ids, id)
	}
	return out, ids
}

const speedBytes = 64 << 20

func speedData(b *testing.B) []byte {
	data := make([]byte, speedBytes)
	if _, err := rand.Read(data); err != nil {
		b.Fatal(err)
	}
	return data
}

// What a state of 64 MiB costs this node alone.
func BenchmarkWriteStream(b *testing.B) {
	ss, _ := speedStores(b, 1)
	b.SetBytes(speedBytes)
	for b.Loop() {
		b.StopTimer()
		data := speedData(b)
		b.StartTimer()
		if _, err := ss[0].WriteStream(b.Context(), bytes.NewReader(data)); err != nil {
			b.Fatal(err)
		}
	}
}

// What it costs until three others have it, too.
func BenchmarkWriteAndPush(b *testing.B) {
	ss, ids := speedStores(b, 4)
	b.SetBytes(speedBytes)
	for b.Loop() {
		b.StopTimer()
		data := speedData(b)
		b.StartTimer()
		l, err := ss[0].WriteStreamTo(b.Context(), bytes.NewReader(data), ids, len(ids))
		if err != nil {
			b.Fatal(err)
		}
		if _, err := ss[0].Push(b.Context(), l.Hash, ids, len(ids)); err != nil {
			b.Fatal(err)
		}
	}
}

// What reading it back costs.
func BenchmarkReadStream(b *testing.B) {
	ss, _ := speedStores(b, 1)
	l, err := ss[0].WriteStream(b.Context(), bytes.NewReader(speedData(b)))
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(speedBytes)
	for b.Loop() {
		r, err := ss[0].OpenStream(l.Hash)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := io.Copy(io.Discard, r); err != nil {
			b.Fatal(err)
		}
	}
}
