package blobs

import (
	"bufio"
	"bytes"
	"testing"
	"time"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

func FuzzDecodeNode(f *testing.F) {
	n := Node{Kind: KindTree, Links: []Link{{Hash: Hash{1}, Bytes: 300}}, Data: []byte("x")}
	f.Add(n.encode())
	f.Add([]byte{0, 0, 0})
	f.Fuzz(func(t *testing.T, b []byte) {
		n, err := decodeNode(b)
		if err == nil && !bytes.Equal(n.encode(), b) {
			t.Errorf("%x has a second encoding %x", b, n.encode())
		}
	})
}

func FuzzDecodeHead(f *testing.F) {
	n := Node{Kind: KindTree, Links: []Link{{Hash: Hash{1}, Bytes: 300}}}
	f.Add(appendHeadValue(&n, 50, time.Unix(1, 0)))
	f.Fuzz(func(t *testing.T, b []byte) {
		hd, err := decodeHeadValue(b)
		if err == nil && isLeafHead(b) != (len(hd.links) == 0) {
			t.Error("a leaf to one, not to the other")
		}
	})
}

func FuzzReadFrame(f *testing.F) {
	b, err := appendFrame(nil, &wirev1.BlobAsk{Id: 1, Body: &wirev1.BlobAsk_Have{Have: &wirev1.BlobHave{Hashes: make([]byte, 32)}}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(_ *testing.T, b []byte) {
		r := bufio.NewReader(bytes.NewReader(b))
		for {
			ask := &wirev1.BlobAsk{}
			if readFrame(r, ask) != nil {
				return
			}
			// An error is as good as hashes, as long as nothing else happens.
			_, _ = unpackHashes(ask.GetHave().GetHashes(), maxHave)
		}
	})
}
