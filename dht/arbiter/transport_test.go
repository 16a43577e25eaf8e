package arbiter

import (
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/raft"
)

// A leader whose answer to a snapshot was lost sends the snapshot again. It must hear that the follower has it, or it sends it for ever.
func TestASnapshotThatIsAppliedAlreadyIsAcknowledged(t *testing.T) {
	conf := raft.EncodeConfiguration(raft.Configuration{})
	for _, c := range []struct {
		name    string
		upTo    uint64
		conf    []byte
		answers bool
		ok      bool
	}{
		{name: "older", upTo: 99, conf: conf, answers: true, ok: true},
		{name: "the same", upTo: 100, conf: conf, answers: true, ok: true},
		{name: "newer", upTo: 101, conf: conf},
		{name: "unreadable configuration", upTo: 101, conf: []byte("x"), answers: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			tr := guarded(t, 100, nil)
			r := strings.NewReader("the snapshot")
			resp, err := tr.guard(raft.RPC{Command: &raft.InstallSnapshotRequest{Term: 7, LastLogIndex: c.upTo, Configuration: c.conf}, Reader: r})
			if c.answers != (resp != nil) || c.answers && c.ok != (err == nil) {
				t.Fatalf("answer %v, error %v", resp, err)
			}
			if !c.answers {
				return
			}
			if got := resp.(*raft.InstallSnapshotResponse); got.Success != c.ok {
				t.Errorf("success %t, want %t", got.Success, c.ok)
			}
			if r.Len() > 0 {
				t.Errorf("%d bytes of the snapshot are left on the stream", r.Len())
			}
		})
	}
}

// Entries after one that the follower applied and no longer has in its log are taken; nothing that the request does not reach counts as
// committed.
func TestEntriesAfterACompactedOne(t *testing.T) {
	for _, c := range []struct {
		name                string
		prev, commit        uint64
		entries             int
		wantPrev, wantFirst uint64 // of the entries; 0: none
		wantCommit          uint64
	}{
		{name: "compared as ever", prev: 100, commit: 103, entries: 4, wantPrev: 100, wantFirst: 101, wantCommit: 103},
		{name: "before what is applied", prev: 40, commit: 103, entries: 64, wantFirst: 101, wantCommit: 103},
		{name: "all applied", prev: 40, commit: 103, entries: 10, wantCommit: 50},
		{name: "just before", prev: 99, commit: 103, entries: 2, wantFirst: 101, wantCommit: 101},
		{name: "not applied", prev: 101, commit: 103, entries: 2, wantPrev: 101, wantFirst: 102, wantCommit: 103},
		{name: "commits no more than it brings", prev: 102, commit: 500, entries: 8, wantPrev: 102, wantFirst: 103, wantCommit: 110},
		{name: "a heartbeat", wantPrev: 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			tr := guarded(t, 100, []uint64{100})
			req := &raft.AppendEntriesRequest{PrevLogEntry: c.prev, PrevLogTerm: 3, LeaderCommitIndex: c.commit}
			for i := range c.entries {
				req.Entries = append(req.Entries, &raft.Log{Index: c.prev + 1 + uint64(i), Term: 3})
			}
			if resp, err := tr.guard(raft.RPC{Command: req}); resp != nil || err != nil {
				t.Fatalf("answered %v, %v: raft decides", resp, err)
			}
			var first uint64
			if len(req.Entries) > 0 {
				first = req.Entries[0].Index
			}
			if req.PrevLogEntry != c.wantPrev || first != c.wantFirst || req.LeaderCommitIndex != c.wantCommit {
				t.Errorf("after %d, first %d, committed %d; want %d, %d, %d", req.PrevLogEntry, first, req.LeaderCommitIndex, c.wantPrev, c.wantFirst, c.wantCommit)
			}
		})
	}
}

// guarded is a transport in front of a raft that applied an index; of what is applied, the log holds some entries still.
func guarded(t *testing.T, applied uint64, inLog []uint64) *transport {
	t.Helper()
	tcp, err := raft.NewTCPTransport("127.0.0.1:0", nil, 1, 0, nil)
	if err != nil {
		t.Fatal(err)
	}
	tr := &transport{
		NetworkTransport: tcp,
		applied:          func() uint64 { return applied },
		inLog:            func(index uint64) bool { return index > applied || slices.Contains(inLog, index) },
	}
	t.Cleanup(func() {
		if err := tcp.Close(); err != nil {
			t.Error(err)
		}
	})
	return tr
}
