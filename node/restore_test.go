package node

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/components"
	"github.com/coppice-project/coppice/components/supervisor"
	componentsv1 "github.com/coppice-project/coppice/components/v1"
	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/records"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func marshal(t *testing.T, m proto.Message) []byte {
	t.Helper()
	b, err := proto.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// Of the old cluster's nodes nothing is left in a restored one but who was revoked; what they ran keeps its epochs and states.
func TestRestoredRegistersNameNoOldNode(t *testing.T) {
	const self, old = peer.ID("self"), peer.ID("old")
	root := bytes.Repeat([]byte{7}, 32)
	regs := []arbiter.Register{
		{Key: "app/shop", Revision: 3, Body: marshal(t, &componentsv1.Application{Name: "shop", Version: 3, Overlays: map[string]*componentsv1.Overlay{
			"web": {Stopped: true, Nodes: map[string]string{"shop/web-0": "old"}},
		}})},
		{Key: "inst/shop/web-0", Epoch: 9, Owner: old, Boot: 5, Nonce: 4, Seq: 12, Root: root, Holders: []peer.ID{old, "other"}, W: 2, Body: marshal(t, &componentsv1.InstanceBody{
			Component: "shop/web", Digest: "sha256:1", Successors: []string{"other"}, Deaths: []*componentsv1.Death{{Node: "other"}}, Settled: true,
		})},
		{Key: "inst/shop/agent@n2", Epoch: 2, Owner: old, Body: marshal(t, &componentsv1.InstanceBody{Component: "shop/agent", Digest: "sha256:2", EachNode: "old"})},
		{Key: "member/bad", Body: marshal(t, &wirev1.MemberRecord{Revoked: true})},
		{Key: "member/old", Body: marshal(t, &wirev1.MemberRecord{})},
		{Key: "token/x", Body: []byte("x")},
	}
	got, err := restored(regs, self)
	if err != nil {
		t.Fatal(err)
	}
	by := map[string]arbiter.Register{}
	for _, r := range got {
		by[r.Key] = r
		if r.Owner != "" || r.Boot != 0 || slices.ContainsFunc(r.Holders, func(id peer.ID) bool { return id != self }) || strings.Contains(string(r.Body), "other") {
			t.Errorf("%s names one of the old nodes: %+v", r.Key, r)
		}
	}
	if len(by) != 4 || by["member/bad"].Key == "" {
		t.Errorf("registers %v", by)
	}
	in := by["inst/shop/web-0"]
	body, err := bodyOf(in)
	if err != nil || in.Epoch != 9 || in.Seq != 12 || in.W != 1 || len(in.Holders) != 1 || body.GetDigest() != "sha256:1" || !body.GetSettled() {
		t.Errorf("the instance: %+v, %v, %v", in, body, err)
	}
	var app componentsv1.Application
	if err := proto.Unmarshal(by["app/shop"].Body, &app); err != nil || !app.GetOverlays()["web"].GetStopped() || len(app.GetOverlays()["web"].GetNodes()) != 0 {
		t.Errorf("the application: %v, %v", &app, err)
	}
	if body, err := bodyOf(by["inst/shop/agent@n2"]); err != nil || body.GetDigest() != "" {
		t.Errorf("an instance of a node: %v, %v", body, err)
	}
	count := &apiv1.BackupSummary{}
	wanted, err := rootsOf(regs, count)
	if err != nil || len(wanted) != 1 || !wanted[0].must || count.Applications != 1 || count.Checkpoints != 1 {
		t.Errorf("roots %v, %v, %v", wanted, count, err)
	}
}

// A copy in the DHT is the register as it is, in as many records as it takes, and never put together of two versions.
func TestCopiesOfRegisters(t *testing.T) {
	body := bytes.Repeat([]byte("0123456789abcdef"), 3000)
	reg := arbiter.Register{Key: "app/large", Revision: 3, Epoch: 2, Nonce: 9, Body: body, Index: 40, Incarnation: 2}
	entries, err := copyOf(reg)
	if err != nil || len(entries) != 4 {
		t.Fatalf("%d records, %v", len(entries), err)
	}
	parts := map[string]records.Record{}
	var first records.Record
	for i, e := range entries {
		if len(e.Value) > records.MaxSize-1<<10 || e.Incarnation != 2 || e.Epoch != 40 {
			t.Errorf("record %d has %d bytes, version %d.%d", i, len(e.Value), e.Incarnation, e.Epoch)
		}
		r := records.Record{Key: e.Key, Value: e.Value, Incarnation: e.Incarnation, Epoch: e.Epoch}
		if i == 0 {
			first = r
		} else {
			parts[e.Key] = r
		}
	}
	got, err := registerIn(first, parts)
	if err != nil || !bytes.Equal(got.Body, body) || got.Nonce != 9 || got.Index != 40 || got.Key != reg.Key {
		t.Errorf("put together: %v", err)
	}
	key := partPrefix + "2/app/large"
	late := parts[key]
	late.Epoch++
	parts[key] = late
	if _, err := registerIn(first, parts); err == nil {
		t.Error("put together of two versions")
	}
	delete(parts, key)
	if _, err := registerIn(first, parts); err == nil {
		t.Error("put together without a part")
	}
	for _, bad := range [][]byte{nil, {0}, {1}, {1, 0xff, 0xff}, bytes.Repeat([]byte{0xff}, 12)} {
		if got, err := registerIn(records.Record{Key: registerPrefix + "app/x", Value: bad}, nil); err == nil {
			t.Errorf("of %x came %+v", bad, got)
		}
	}
	gone := reg
	gone.Deleted = true
	if entries, err = copyOf(gone); err != nil || len(entries) != 1 || !entries[0].Deleted {
		t.Errorf("the end of a register: %v, %v", entries, err)
	}
	if got, err := registerIn(records.Record{Key: entries[0].Key, Deleted: true, Incarnation: 2, Epoch: 41}, nil); err != nil || !got.Deleted || got.Key != reg.Key || got.Index != 41 {
		t.Errorf("read back: %+v, %v", got, err)
	}
}

// What is kept of earlier checkpoints goes into a backup, and lies on the new node only after a restore.
func TestABackupHasTheHistory(t *testing.T) {
	self := peer.ID("self")
	root := bytes.Repeat([]byte{7}, 32)
	body, err := proto.Marshal(&componentsv1.History{Format: 1, Instance: "shop/web-0", Last: 3, Entries: []*componentsv1.HistoryEntry{{Number: 3, Root: root, Holders: []string{"old"}}}})
	if err != nil {
		t.Fatal(err)
	}
	regs := []arbiter.Register{{Key: components.HistoryRegister("shop/web-0"), Body: body}}
	wanted, err := rootsOf(regs, &apiv1.BackupSummary{})
	if err != nil || len(wanted) != 1 || !bytes.Equal(wanted[0].root[:], root) || wanted[0].must || !strings.Contains(wanted[0].what, "c3 of shop/web-0") {
		t.Errorf("%v, %v", wanted, err)
	}
	out, err := restored(regs, self)
	if err != nil || len(out) != 1 {
		t.Fatal(out, err)
	}
	h, err := supervisor.ReadHistory(out[0])
	if err != nil || h.GetLast() != 3 || len(h.GetEntries()) != 1 || !slices.Equal(h.GetEntries()[0].GetHolders(), []string{self.String()}) {
		t.Errorf("%v, %v", h, err)
	}
}

// Of an instance the mirror that anybody can read holds the register too; of one that does not, what it says has to do.
func TestInstanceOfAMirror(t *testing.T) {
	old := []byte(`{"instance":"shop/web-0","incarnation":2,"epoch":7,"index":30,"owner":"x","seq":4,"root":"0102","holders":[]}`)
	got, err := instanceIn(records.Record{Key: ownPrefix + "shop/web-0", Value: old})
	if err != nil || got.Key != components.InstanceRegister("shop/web-0") || got.Epoch != 7 || got.Seq != 4 || got.Owner != "" || !bytes.Equal(got.Root, []byte{1, 2}) {
		t.Errorf("%+v, %v", got, err)
	}
	if _, err := instanceIn(records.Record{Key: ownPrefix + "shop/web-0", Value: []byte("{")}); err == nil {
		t.Error("half a mirror was read")
	}
}
