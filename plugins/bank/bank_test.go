package main

import (
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	bankv1 "github.com/coppice-project/coppice/plugins/bank/v1"
	"github.com/coppice-project/coppice/plugins/sdk/sdktest"
)

func TestBank(t *testing.T) {
	r := sdktest.Start(t, component())
	c := bankv1.NewBankClient(r.Conn)
	for _, name := range []string{"ann", "bob", "ann"} { // one that is open stays as it is
		if a, err := c.Open(t.Context(), &bankv1.OpenRequest{Name: name, Balance: 100}); err != nil || a.GetBalance() != 100 {
			t.Fatal(a, err)
		}
	}
	if tr, err := c.Transfer(t.Context(), &bankv1.TransferRequest{From: "ann", To: "bob", Amount: 30}); err != nil || tr.GetNumber() != 1 || tr.GetFrom().GetBalance() != 70 || tr.GetTo().GetBalance() != 130 {
		t.Fatal(tr, err)
	}
	for _, bad := range []struct {
		from, to string
		amount   uint64
		code     codes.Code
	}{
		{"ann", "bob", 71, codes.FailedPrecondition},
		{"ann", "eve", 1, codes.NotFound},
		{"eve", "bob", 1, codes.NotFound},
		{"ann", "ann", 1, codes.InvalidArgument},
	} {
		if _, err := c.Transfer(t.Context(), &bankv1.TransferRequest{From: bad.from, To: bad.to, Amount: bad.amount}); status.Code(err) != bad.code {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	for _, name := range []string{"", strings.Repeat("x", maxName+1)} {
		if _, err := c.Open(t.Context(), &bankv1.OpenRequest{Name: name}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("open %q: %v", name, err)
		}
	}
	second := sdktest.Start(t, component(), sdktest.From(r.Checkpoint(0)))
	b, err := bankv1.NewBankClient(second.Conn).Balances(t.Context(), &bankv1.BalancesRequest{})
	if err != nil || b.GetSum() != 200 || b.GetTransfers() != 1 || len(b.GetAccounts()) != 2 || b.GetAccounts()[0].GetBalance() != 70 {
		t.Fatal(b, err)
	}
}
