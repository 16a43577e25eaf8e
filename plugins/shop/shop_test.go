package main

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/plugins/sdk/sdktest"
	shopv1 "github.com/coppice-project/coppice/plugins/shop/v1"
)

func TestCatalogue(t *testing.T) {
	c, err := readCatalogue()
	if err != nil {
		t.Fatal(err)
	}
	if len(c.books) < 1000 {
		t.Fatalf("%d books", len(c.books))
	}
	for _, b := range c.books {
		if b.GetTitle() == "" || b.GetAuthor() == "" || b.GetPriceCents() == 0 || b.GetYear() < 1900 {
			t.Errorf("a poor row: %v", b)
		}
	}
	for _, bad := range []string{"", "9799100731366", "97991007313a5"} {
		if checkISBN(bad) == nil {
			t.Errorf("ISBN %q passes", bad)
		}
	}
}

func balanced(t *testing.T, r *sdktest.Running) *shopv1.LedgerReply {
	t.Helper()
	l, err := shopv1.NewStoreClient(r.Conn).Ledger(t.Context(), &shopv1.LedgerRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if l.GetSold()+l.GetInStock() != l.GetDelivered() {
		t.Fatalf("the ledger does not balance: %v", l)
	}
	return l
}

func TestBrowseAndOrder(t *testing.T) {
	r := sdktest.Start(t, component())
	s, ctx := shopv1.NewStoreClient(r.Conn), t.Context()
	first := balanced(t, r)
	list, err := s.ListBooks(ctx, &shopv1.ListBooksRequest{Query: "BELLFOUNDER fiction", Limit: 2})
	if err != nil || len(list.GetBooks()) != 2 || list.GetTotal() < 2 {
		t.Fatal(list, err)
	}
	book := list.GetBooks()[0]
	line := &shopv1.SetLineRequest{Cart: "ann", Isbn: book.GetIsbn(), Quantity: 2}
	if cart, err := s.AddLine(ctx, line); err != nil || cart.GetTotalCents() != 2*book.GetPriceCents() {
		t.Fatal(cart, err)
	}
	if cart, err := s.AddLine(ctx, line); err != nil || cart.GetLines()[0].GetQuantity() != 4 {
		t.Fatal(cart, err)
	}
	if cart, err := s.SetLine(ctx, line); err != nil || cart.GetLines()[0].GetQuantity() != 2 {
		t.Fatal(cart, err)
	}
	order, err := s.PlaceOrder(ctx, &shopv1.CartRequest{Cart: "ann"})
	if err != nil || order.GetNumber() != 1 || order.GetTotalCents() != 2*book.GetPriceCents() {
		t.Fatal(order, err)
	}
	if got, err := s.GetOrder(ctx, &shopv1.GetOrderRequest{Number: 1}); err != nil || !proto.Equal(got, order) {
		t.Fatal(got, err)
	}
	if _, err := s.PlaceOrder(ctx, &shopv1.CartRequest{Cart: "ann"}); status.Code(err) != codes.FailedPrecondition {
		t.Fatal("an empty cart:", err)
	}
	after, err := s.GetBook(ctx, &shopv1.GetBookRequest{Isbn: book.GetIsbn()})
	if err != nil || after.GetInStock() != book.GetInStock()-2 {
		t.Fatal(after, err)
	}
	if _, err := s.Restock(ctx, &shopv1.RestockRequest{Isbn: book.GetIsbn(), Quantity: 7}); err != nil {
		t.Fatal(err)
	}
	if l := balanced(t, r); l.GetDelivered() != first.GetDelivered()+7 || l.GetSold() != 2 || l.GetOrders() != 1 {
		t.Fatal(l)
	}
	for i, err := range []error{
		second(s.GetBook(ctx, &shopv1.GetBookRequest{Isbn: "1"})), second(s.GetOrder(ctx, &shopv1.GetOrderRequest{Number: 9})),
		second(s.GetCart(ctx, &shopv1.CartRequest{Cart: "a/b"})), second(s.AddLine(ctx, &shopv1.SetLineRequest{Cart: "x", Isbn: book.GetIsbn(), Quantity: 100})),
	} {
		if want := []codes.Code{codes.NotFound, codes.NotFound, codes.InvalidArgument, codes.InvalidArgument}[i]; status.Code(err) != want {
			t.Error(i, err)
		}
	}
}

func second[T any](_ T, err error) error { return err }

// TestOutOfStockTakesNothing: the second line of an order cannot be had, so the first is not taken either.
func TestOutOfStockTakesNothing(t *testing.T) {
	r := sdktest.Start(t, component())
	s, ctx := shopv1.NewStoreClient(r.Conn), t.Context()
	list, err := s.ListBooks(ctx, &shopv1.ListBooksRequest{Limit: 200})
	if err != nil {
		t.Fatal(err)
	}
	plenty, scarce := list.GetBooks()[0], list.GetBooks()[0]
	for _, b := range list.GetBooks() {
		if b.GetInStock() < maxCopies {
			scarce = b
		} else {
			plenty = b
		}
	}
	for _, b := range []*shopv1.Book{plenty, scarce} {
		if _, err := s.AddLine(ctx, &shopv1.SetLineRequest{Cart: "c", Isbn: b.GetIsbn(), Quantity: maxCopies}); err != nil {
			t.Fatal(err)
		}
	}
	before := balanced(t, r)
	if _, err := s.PlaceOrder(ctx, &shopv1.CartRequest{Cart: "c"}); status.Code(err) != codes.FailedPrecondition {
		t.Fatal(err)
	}
	if after := balanced(t, r); !proto.Equal(before, after) {
		t.Fatalf("%v\n%v", before, after)
	}
	if cart, err := s.GetCart(ctx, &shopv1.CartRequest{Cart: "c"}); err != nil || len(cart.GetLines()) != 2 {
		t.Fatal("the cart is kept:", cart, err)
	}
}

// TestRushAcrossRestarts: many customers order at once, each call is made twice, the store is restored again and again; nothing is sold twice.
func TestRushAcrossRestarts(t *testing.T) {
	const customers, rounds = 6, 5
	r := sdktest.Start(t, component())
	list, err := shopv1.NewStoreClient(r.Conn).ListBooks(t.Context(), &shopv1.ListBooksRequest{Limit: 10})
	if err != nil {
		t.Fatal(err)
	}
	for round := range rounds {
		var wg sync.WaitGroup
		for c := range customers {
			wg.Go(func() { shopRound(t, r, list.GetBooks(), c, round) })
		}
		wg.Wait()
		r = sdktest.Start(t, component(), sdktest.From(r.Checkpoint(0)))
	}
	l := balanced(t, r)
	if l.GetOrders() != customers*rounds || l.GetSold() != customers*rounds*3 || l.GetCarts() != 0 {
		t.Fatalf("%v", l)
	}
	orders, err := shopv1.NewStoreClient(r.Conn).ListOrders(t.Context(), &shopv1.CartRequest{Cart: "c0"})
	if err != nil || len(orders.GetOrders()) != rounds || orders.GetOrders()[0].GetNumber() < orders.GetOrders()[1].GetNumber() {
		t.Fatal(orders, err)
	}
}

func shopRound(t *testing.T, r *sdktest.Running, books []*shopv1.Book, customer, round int) {
	s, rng := shopv1.NewStoreClient(r.Conn), rand.New(rand.NewPCG(uint64(customer), uint64(round)))
	cart := fmt.Sprintf("c%d", customer)
	book := books[rng.IntN(len(books))]
	for range 2 { // the second is a retry
		ctx := sdktest.Key(t.Context(), fmt.Sprintf("%s/%d", cart, 2*round+1), "")
		if _, err := s.AddLine(ctx, &shopv1.SetLineRequest{Cart: cart, Isbn: book.GetIsbn(), Quantity: 3}); err != nil {
			t.Error(err)
		}
	}
	var orders [2]*shopv1.Order
	for i := range orders {
		var err error
		ctx := sdktest.Key(t.Context(), fmt.Sprintf("%s/%d", cart, 2*round+2), fmt.Sprint(2*round+1))
		if orders[i], err = s.PlaceOrder(ctx, &shopv1.CartRequest{Cart: cart}); err != nil {
			t.Error(err)
		}
	}
	if !proto.Equal(orders[0], orders[1]) {
		t.Errorf("a retry got another order: %v and %v", orders[0], orders[1])
	}
}
