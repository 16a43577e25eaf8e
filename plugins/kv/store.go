package main

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	kvv1 "github.com/coppice-project/coppice/plugins/kv/v1"
	"github.com/coppice-project/coppice/plugins/sdk"
)

const (
	defaultPage = 100
	maxPage     = 1000
	maxOps      = 128     // of one Txn, each list
	maxKey      = 4 << 10 // bytes
	maxValue    = 1 << 20 // bytes
	pageBytes   = 2 << 20 // of values in one page: it ends early rather than growing beyond a message
)

type store struct {
	kvv1.UnimplementedKVServer
	capacity *sdk.Attribute[int] // keys
}

// Put implements kv.v1.KV.
func (s *store) Put(ctx context.Context, req *kvv1.PutRequest) (*kvv1.PutReply, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	return s.put(tx, req)
}

func (s *store) put(tx *sdk.Txn, req *kvv1.PutRequest) (*kvv1.PutReply, error) {
	if err := checkKey(req.GetKey()); err != nil {
		return nil, err
	}
	if len(req.GetValue()) > maxValue {
		return nil, status.Errorf(codes.InvalidArgument, "key %.60q: a value of %d bytes, at most %d", req.GetKey(), len(req.GetValue()), maxValue)
	}
	old, err := load(tx, req.GetKey())
	if err != nil {
		return nil, err
	}
	if err := checkVersion(req.GetKey(), old, req.IfVersion); err != nil {
		return nil, err
	}
	if limit := s.capacity.Get(); old.GetVersion() == 0 && tx.Len() >= limit {
		return nil, status.Errorf(codes.ResourceExhausted, "the store is full: %d keys of at most %d (attribute capacity)", tx.Len(), limit)
	}
	stored := &kvv1.Stored{Value: req.GetValue(), Version: old.GetVersion() + 1}
	tx.PutMessage(req.GetKey(), stored)
	return &kvv1.PutReply{Version: stored.GetVersion()}, nil
}

// Get implements kv.v1.KV.
func (s *store) Get(ctx context.Context, req *kvv1.GetRequest) (*kvv1.Pair, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	v, err := load(tx, req.GetKey())
	if err != nil {
		return nil, err
	}
	if v.GetVersion() == 0 {
		return nil, status.Errorf(codes.NotFound, "no key %.60q", req.GetKey())
	}
	return pair(req.GetKey(), v), nil
}

// Delete implements kv.v1.KV.
func (s *store) Delete(ctx context.Context, req *kvv1.DeleteRequest) (*kvv1.DeleteReply, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	return remove(tx, req)
}

func remove(tx *sdk.Txn, req *kvv1.DeleteRequest) (*kvv1.DeleteReply, error) {
	old, err := load(tx, req.GetKey())
	if err != nil {
		return nil, err
	}
	if err := checkVersion(req.GetKey(), old, req.IfVersion); err != nil {
		return nil, err
	}
	return &kvv1.DeleteReply{Deleted: tx.Delete(req.GetKey())}, nil
}

// Scan implements kv.v1.KV.
func (s *store) Scan(ctx context.Context, req *kvv1.ScanRequest) (*kvv1.ScanReply, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	limit := int(req.GetLimit())
	if limit == 0 {
		limit = defaultPage
	}
	limit = min(limit, maxPage)
	reply, bytes := &kvv1.ScanReply{}, 0
	from := ""
	if req.GetAfter() != "" {
		from = req.GetAfter() + "\x00" // the next possible key
	}
	for key, raw := range tx.From(req.GetPrefix(), from) {
		if len(reply.GetPairs()) == limit || bytes > pageBytes {
			reply.More = true
			break
		}
		v := &kvv1.Stored{}
		if err := proto.Unmarshal(raw, v); err != nil {
			return nil, status.Errorf(codes.DataLoss, "key %.60q: %v", key, err)
		}
		reply.Pairs = append(reply.Pairs, pair(key, v))
		bytes += len(key) + len(raw)
	}
	return reply, nil
}

// Txn implements kv.v1.KV.
func (s *store) Txn(ctx context.Context, req *kvv1.TxnRequest) (*kvv1.TxnReply, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	if n := max(len(req.GetCompares()), len(req.GetThen()), len(req.GetOtherwise())); n > maxOps {
		return nil, status.Errorf(codes.InvalidArgument, "%d compares or operations, at most %d of each", n, maxOps)
	}
	reply := &kvv1.TxnReply{Succeeded: true}
	for _, c := range req.GetCompares() {
		v, err := load(tx, c.GetKey())
		if err != nil {
			return nil, err
		}
		reply.Succeeded = reply.GetSucceeded() && v.GetVersion() == c.GetVersion()
	}
	ops := req.GetThen()
	if !reply.GetSucceeded() {
		ops = req.GetOtherwise()
	}
	for i, op := range ops {
		result, err := s.apply(tx, op)
		if err != nil {
			return nil, status.Errorf(status.Code(err), "operation %d: %s", i, status.Convert(err).Message())
		}
		reply.Results = append(reply.Results, result)
	}
	return reply, nil
}

func (s *store) apply(tx *sdk.Txn, op *kvv1.Op) (*kvv1.Result, error) {
	switch o := op.GetOp().(type) {
	case *kvv1.Op_Put:
		r, err := s.put(tx, o.Put)
		return &kvv1.Result{Result: &kvv1.Result_Put{Put: r}}, err
	case *kvv1.Op_Get:
		v, err := load(tx, o.Get.GetKey())
		return &kvv1.Result{Result: &kvv1.Result_Get{Get: pair(o.Get.GetKey(), v)}}, err
	case *kvv1.Op_Delete:
		r, err := remove(tx, o.Delete)
		return &kvv1.Result{Result: &kvv1.Result_Delete{Delete: r}}, err
	}
	return nil, status.Error(codes.InvalidArgument, "put, get or delete is missing")
}

// load returns the stored value; version 0 is an absent key.
func load(tx *sdk.Txn, key string) (*kvv1.Stored, error) {
	v := &kvv1.Stored{}
	_, err := tx.Message(key, v)
	return v, err
}

func pair(key string, v *kvv1.Stored) *kvv1.Pair {
	return &kvv1.Pair{Key: key, Value: v.GetValue(), Version: v.GetVersion()}
}

func checkKey(key string) error {
	if key == "" || len(key) > maxKey {
		return status.Errorf(codes.InvalidArgument, "a key of %d bytes: 1 to %d", len(key), maxKey)
	}
	return nil
}

func checkVersion(key string, v *kvv1.Stored, want *uint64) error {
	if want != nil && *want != v.GetVersion() {
		return status.Errorf(codes.Aborted, "key %.60q is at version %d, not %d", key, v.GetVersion(), *want)
	}
	return nil
}
