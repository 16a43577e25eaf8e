// Command bank is a component whose state has an invariant: the sum of its accounts. Tests and drills use it to show that no transfer that
// was answered is lost, doubled or torn, whatever dies.
package main

import (
	"context"
	"math"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	bankv1 "github.com/coppice-project/coppice/plugins/bank/v1"
	"github.com/coppice-project/coppice/plugins/sdk"
)

// version is set at build time: -ldflags "-X main.version=1.2.0".
var version = "1.0.0"

const (
	accounts  = "account/" // + name -> balance
	transfers = "transfers"
	// maxName bounds the name of an account, in bytes.
	maxName = 64
)

func main() { sdk.Serve(component()) }

func component() *sdk.Component {
	return &sdk.Component{
		Type:     "bank",
		Version:  version,
		State:    &sdk.State{Schema: 1},
		Register: func(r grpc.ServiceRegistrar) { bankv1.RegisterBankServer(r, &bank{}) },
	}
}

type bank struct {
	bankv1.UnimplementedBankServer
}

// Open implements the interface.
func (b *bank) Open(ctx context.Context, req *bankv1.OpenRequest) (*bankv1.Account, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	if n := len(req.GetName()); n == 0 || n > maxName {
		return nil, status.Errorf(codes.InvalidArgument, "the name of an account has 1 to %d bytes, this one has %d", maxName, n)
	}
	key := accounts + req.GetName()
	if !tx.Has(key) {
		tx.PutUint64(key, req.GetBalance())
	}
	return &bankv1.Account{Name: req.GetName(), Balance: tx.Uint64(key)}, nil
}

// Transfer implements the interface.
func (b *bank) Transfer(ctx context.Context, req *bankv1.TransferRequest) (*bankv1.TransferReply, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	from, to := accounts+req.GetFrom(), accounts+req.GetTo()
	for _, key := range []string{from, to} {
		if !tx.Has(key) {
			return nil, status.Errorf(codes.NotFound, "there is no account %q; open it first", key[len(accounts):])
		}
	}
	have, other := tx.Uint64(from), tx.Uint64(to)
	switch {
	case from == to:
		return nil, status.Error(codes.InvalidArgument, "a transfer wants two accounts")
	case have < req.GetAmount():
		return nil, status.Errorf(codes.FailedPrecondition, "%s has %d, which is less than %d", req.GetFrom(), have, req.GetAmount())
	case other > math.MaxUint64-req.GetAmount():
		return nil, status.Errorf(codes.OutOfRange, "%s cannot hold so much", req.GetTo())
	}
	tx.PutUint64(from, have-req.GetAmount())
	tx.PutUint64(to, other+req.GetAmount())
	number := tx.Uint64(transfers) + 1
	tx.PutUint64(transfers, number)
	return &bankv1.TransferReply{
		Number: number, From: &bankv1.Account{Name: req.GetFrom(), Balance: have - req.GetAmount()}, To: &bankv1.Account{Name: req.GetTo(), Balance: other + req.GetAmount()},
	}, nil
}

// Balances implements the interface.
func (b *bank) Balances(ctx context.Context, _ *bankv1.BalancesRequest) (*bankv1.BalancesReply, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	out := &bankv1.BalancesReply{Transfers: tx.Uint64(transfers)}
	for key := range tx.All(accounts) {
		a := &bankv1.Account{Name: key[len(accounts):], Balance: tx.Uint64(key)}
		out.Accounts = append(out.Accounts, a)
		out.Sum += a.Balance
	}
	return out, nil
}
