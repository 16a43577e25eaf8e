package main

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	kvv1 "github.com/coppice-project/coppice/plugins/kv/v1"
	"github.com/coppice-project/coppice/plugins/sdk/sdktest"
)

func put(key, value string, ifVersion ...uint64) *kvv1.PutRequest {
	req := &kvv1.PutRequest{Key: key, Value: value}
	if len(ifVersion) > 0 {
		req.IfVersion = &ifVersion[0]
	}
	return req
}

func TestVersions(t *testing.T) {
	r := sdktest.Start(t, component())
	kv, ctx := kvv1.NewKVClient(r.Conn), t.Context()
	steps := []struct {
		req  *kvv1.PutRequest
		code codes.Code
		want uint64
	}{
		{put("a", "1"), codes.OK, 1},
		{put("a", "2"), codes.OK, 2},
		{put("a", "3", 1), codes.Aborted, 0},
		{put("a", "3", 2), codes.OK, 3},
		{put("a", "4", 0), codes.Aborted, 0},
		{put("b", "1", 0), codes.OK, 1},
		{put("", "1"), codes.InvalidArgument, 0},
		{put("c", strings.Repeat("x", maxValue+1)), codes.InvalidArgument, 0},
	}
	for i, s := range steps {
		reply, err := kv.Put(ctx, s.req)
		if status.Code(err) != s.code || reply.GetVersion() != s.want {
			t.Fatalf("step %d: %v %v", i, reply, err)
		}
	}
	second := sdktest.Start(t, component(), sdktest.From(r.Checkpoint(0)))
	kv = kvv1.NewKVClient(second.Conn)
	if p, err := kv.Get(ctx, &kvv1.GetRequest{Key: "a"}); err != nil || p.GetValue() != "3" || p.GetVersion() != 3 {
		t.Fatal(p, err)
	}
	if d, err := kv.Delete(ctx, &kvv1.DeleteRequest{Key: "a"}); err != nil || !d.GetDeleted() {
		t.Fatal(d, err)
	}
	if _, err := kv.Get(ctx, &kvv1.GetRequest{Key: "a"}); status.Code(err) != codes.NotFound {
		t.Fatal(err)
	}
}

func TestTxnIsAllOrNothing(t *testing.T) {
	r := sdktest.Start(t, component())
	kv, ctx := kvv1.NewKVClient(r.Conn), t.Context()
	move := func(version uint64, second *kvv1.PutRequest) (*kvv1.TxnReply, error) {
		return kv.Txn(ctx, &kvv1.TxnRequest{
			Compares:  []*kvv1.Compare{{Key: "from", Version: version}},
			Then:      []*kvv1.Op{{Op: &kvv1.Op_Put{Put: put("from", "moved")}}, {Op: &kvv1.Op_Put{Put: second}}},
			Otherwise: []*kvv1.Op{{Op: &kvv1.Op_Get{Get: &kvv1.GetRequest{Key: "from"}}}},
		})
	}
	if reply, err := move(0, put("to", "x", 7)); status.Code(err) != codes.Aborted || !strings.Contains(err.Error(), "operation 1") {
		t.Fatal(reply, err)
	}
	if _, err := kv.Get(ctx, &kvv1.GetRequest{Key: "from"}); status.Code(err) != codes.NotFound {
		t.Fatal("the first operation stayed:", err)
	}
	if reply, err := move(0, put("to", "x")); err != nil || !reply.GetSucceeded() || len(reply.GetResults()) != 2 {
		t.Fatal(reply, err)
	}
	if reply, err := move(0, put("to", "x")); err != nil || reply.GetSucceeded() || reply.GetResults()[0].GetGet().GetValue() != "moved" {
		t.Fatal(reply, err)
	}
	if _, err := kv.Txn(ctx, &kvv1.TxnRequest{Then: make([]*kvv1.Op, maxOps+1)}); status.Code(err) != codes.InvalidArgument {
		t.Fatal(err)
	}
}

func TestScanPages(t *testing.T) {
	r := sdktest.Start(t, component())
	kv, ctx := kvv1.NewKVClient(r.Conn), t.Context()
	for i := range 25 {
		for _, group := range []string{"a/", "b/", "c/"} {
			if _, err := kv.Put(ctx, put(fmt.Sprintf("%s%02d", group, i), "v")); err != nil {
				t.Fatal(err)
			}
		}
	}
	var seen []string
	req := &kvv1.ScanRequest{Prefix: "b/", Limit: 10}
	for {
		page, err := kv.Scan(ctx, req)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range page.GetPairs() {
			seen = append(seen, p.GetKey())
		}
		if !page.GetMore() {
			break
		}
		req.After = seen[len(seen)-1]
	}
	if len(seen) != 25 || seen[0] != "b/00" || seen[24] != "b/24" {
		t.Fatal(seen)
	}
}

func TestCapacity(t *testing.T) {
	r := sdktest.Start(t, component(), sdktest.Request(&componentv1.StartRequest{
		Attributes: &componentv1.Attributes{Json: map[string][]byte{"capacity": []byte("2")}},
	}))
	kv, ctx := kvv1.NewKVClient(r.Conn), t.Context()
	for i, want := range []codes.Code{codes.OK, codes.OK, codes.ResourceExhausted} {
		if _, err := kv.Put(ctx, put(fmt.Sprint(i), "v")); status.Code(err) != want {
			t.Fatal(i, err)
		}
	}
	if _, err := kv.Put(ctx, put("0", "again")); err != nil {
		t.Fatal("a key that is there:", err)
	}
}

func TestBrokenBuildNeverStarts(t *testing.T) {
	broken = "never-ready"
	defer func() { broken = "" }()
	r := sdktest.Start(t, component(), sdktest.Request(nil))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := r.Control.Start(ctx, &componentv1.StartRequest{}); status.Code(err) != codes.DeadlineExceeded {
		t.Fatal(err)
	}
}

// TestMixedLoadSurvivesRestarts replays every call against a restored instance and finds the same replies.
func TestMixedLoadSurvivesRestarts(t *testing.T) {
	r := sdktest.Start(t, component())
	ctx := t.Context()
	replies := map[string]*kvv1.PutReply{}
	for i := range 200 {
		key := fmt.Sprintf("load/%d", i+1)
		reply, err := kvv1.NewKVClient(r.Conn).Put(sdktest.Key(ctx, key, ""), put(fmt.Sprint("k", i%7), key))
		if err != nil {
			t.Fatal(err)
		}
		replies[key] = reply
		if i%50 == 49 {
			r = sdktest.Start(t, component(), sdktest.From(r.Checkpoint(0)))
		}
	}
	for i := range 200 {
		key := fmt.Sprintf("load/%d", i+1)
		again, err := kvv1.NewKVClient(r.Conn).Put(sdktest.Key(ctx, key, ""), put(fmt.Sprint("k", i%7), key))
		if err != nil || !proto.Equal(again, replies[key]) {
			t.Fatalf("%s: %v %v, before %v", key, again, err, replies[key])
		}
	}
}
