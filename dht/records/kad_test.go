package records

import (
	"errors"
	"testing"
	"time"

	kadrecords "github.com/libp2p/go-libp2p-kad-dht/records"
	record "github.com/libp2p/go-libp2p-record"
	"github.com/libp2p/go-libp2p/core/peer"
)

// What we write, kad-dht's own value store finds, and what it writes, we find.
func TestStoredAsKadDHTStores(t *testing.T) {
	inGrove(t, 3, func(t *testing.T, g *grove) {
		key := "/kb/ckpt/shop/store-0"
		g.nodes[0].mustPut(key, "root 1", 0)
		time.Sleep(10 * time.Millisecond)
		nd := g.nodes[1]
		validators := record.NamespacedValidator{Namespace: nd.Validator()}
		kad := kadrecords.NewValueStore(nd.Datastore(), validators, 0)
		got, err := kad.Get(ctx, key)
		if err != nil || got == nil {
			t.Fatalf("kad-dht's store: %v, %v", got, err)
		}
		outsider := NewValidator(nil)
		if err := outsider.Validate(key, got.GetValue()); err != nil {
			t.Errorf("an outsider's validator: %v", err)
		}
		if r, err := openUnchecked(got.GetValue(), true); err != nil || string(r.Value) != "root 1" {
			t.Errorf("%+v, %v", r, err)
		}
		// kad-dht's PUT_VALUE of a newer one, an older one, the same one.
		next := Record{Key: key, Value: []byte("root 5"), Revision: 5, Writer: simID(2)}
		put := func(r Record) error {
			b, err := seal(&r, simKeys()[2])
			if err != nil {
				t.Fatal(err)
			}
			return kad.Put(ctx, key, record.MakePutRecord(key, b))
		}
		if err := put(next); err != nil {
			t.Fatal(err)
		}
		if recs := nd.Local("/kb/ckpt/"); len(recs) != 1 || string(recs[0].Value) != "root 5" {
			t.Errorf("%+v", recs)
		}
		time.Sleep(time.Minute)
		if err := put(next); err != nil {
			t.Errorf("the same again: %v", err)
		}
		if recs := nd.Local("/kb/ckpt/"); recs[0].Age < time.Minute {
			t.Errorf("putting the same again made it young: %v", recs[0].Age)
		}
		if err := put(Record{Key: key, Value: []byte("root 4"), Revision: 4, Writer: simID(2)}); err == nil {
			t.Error("an older one was taken")
		}
		// Past kad-dht's own check, the datastore itself refuses.
		b, err := seal(&Record{Key: key, Revision: 3, Writer: simID(2)}, simKeys()[2])
		if err != nil {
			t.Fatal(err)
		}
		raw, err := encodeStored(key, b, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		if err := nd.Datastore().Put(ctx, valueKey(key), raw); err == nil {
			t.Error("the datastore took an older one")
		}
		if nd.mustGet(key, "root 5"); nd.Status().Older == 0 {
			t.Error("not counted")
		}
	})
}

func TestSelectIsATotalOrder(t *testing.T) {
	v := NewValidator(nil)
	var values [][]byte
	var versions []Version
	for inc := range uint64(2) {
		for rev := range uint64(2) {
			for w := range 2 {
				r := Record{Key: "/kb/own/x", Incarnation: inc, Epoch: 7 - 5*inc, Revision: rev, Writer: simID(w)}
				b, err := seal(&r, simKeys()[w])
				if err != nil {
					t.Fatal(err)
				}
				values, versions = append(values, b), append(versions, r.Version())
			}
		}
	}
	for i := range values {
		for j := range values {
			got, err := v.Select("/kb/own/x", [][]byte{values[i], []byte("garbage"), values[j]})
			want := 0
			if versions[j].Compare(versions[i]) > 0 {
				want = 2
			}
			if err != nil || got != want {
				t.Errorf("%v against %v: %d, %v", versions[i], versions[j], got, err)
			}
		}
	}
	if _, err := v.Select("/kb/own/x", [][]byte{[]byte("garbage")}); err == nil {
		t.Error("garbage was selected")
	}
	if err := v.Validate("/kb/own/y", values[0]); !errors.Is(err, ErrInvalid) {
		t.Errorf("under another key: %v", err)
	}
}

func FuzzOpen(f *testing.F) {
	b, err := seal(&Record{Key: "/kb/own/x", Revision: 1, Writer: simID(0), Value: []byte("v")}, simKeys()[0])
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		r, err := open(b)
		if err == nil && (r.Writer == peer.ID("") || checkKey(r.Key) != nil) {
			t.Errorf("accepted %+v", r)
		}
	})
}

func FuzzParseStored(f *testing.F) {
	b, err := seal(&Record{Key: "/kb/own/x", Revision: 1, Writer: simID(0), Value: []byte("v")}, simKeys()[0])
	if err != nil {
		f.Fatal(err)
	}
	s, err := encodeStored("/kb/own/x", b, time.Unix(1, 0))
	if err != nil {
		f.Fatal(err)
	}
	f.Add(s)
	f.Fuzz(func(t *testing.T, b []byte) {
		now := time.Now()
		if r, written, ok := parseStored(b, now); ok && (r == nil || written.After(now)) {
			t.Errorf("%+v written %v", r, written)
		}
	})
}
