package main

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/coppice-project/coppice/plugins/sdk"
	shopv1 "github.com/coppice-project/coppice/plugins/shop/v1"
)

const (
	defaultPage = 20
	maxPage     = 200
	maxOrders   = 100 // in one list
	maxLines    = 50  // of a cart
	maxCopies   = 99  // of one book in a cart
	maxRestock  = 1_000_000
	maxCartName = 128
	maxQuery    = 200
)

// Keys of the state, schema 1. Numbers are by Txn.PutUint64, the rest are messages of shop.v1.
const (
	keyDelivered = "total/delivered"
	keySold      = "total/sold"
	keyRevenue   = "total/revenue"
	keyOrders    = "total/orders" // also the last order's number
	prefixStock  = "stock/"       // <isbn>
	prefixCart   = "cart/"        // <cart>
	prefixOrder  = "order/"       // <number>
	prefixOwner  = "owner/"       // <cart>/<number, counted down so that the newest is first>
)

func stockKey(isbn string) string   { return prefixStock + isbn }
func orderKey(number uint64) string { return fmt.Sprintf("%s%020d", prefixOrder, number) }
func ownerKey(cart string, number uint64) string {
	return fmt.Sprintf("%s%s/%020d", prefixOwner, cart, ^number)
}

type store struct {
	shopv1.UnimplementedStoreServer
	catalogue *catalogue // set in OnStart, before the first call
}

// ListBooks implements shop.v1.Store.
func (s *store) ListBooks(ctx context.Context, req *shopv1.ListBooksRequest) (*shopv1.BookList, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	if len(req.GetQuery()) > maxQuery {
		return nil, status.Errorf(codes.InvalidArgument, "a query of %d bytes, at most %d", len(req.GetQuery()), maxQuery)
	}
	found := s.catalogue.find(req.GetQuery())
	limit := int(min(req.GetLimit(), maxPage))
	if limit == 0 {
		limit = defaultPage
	}
	from := min(int(req.GetOffset()), len(found))
	reply := &shopv1.BookList{Total: uint32(len(found))}
	for _, b := range found[from:min(from+limit, len(found))] {
		reply.Books = append(reply.Books, withStock(tx, b))
	}
	return reply, nil
}

// GetBook implements shop.v1.Store.
func (s *store) GetBook(ctx context.Context, req *shopv1.GetBookRequest) (*shopv1.Book, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	b, err := s.book(req.GetIsbn())
	if err != nil {
		return nil, err
	}
	return withStock(tx, b), nil
}

func (s *store) book(isbn string) (*shopv1.Book, error) {
	b := s.catalogue.byISBN[isbn]
	if b == nil {
		return nil, status.Errorf(codes.NotFound, "no book with ISBN %.20q", isbn)
	}
	return b, nil
}

// GetCart implements shop.v1.Store.
func (s *store) GetCart(ctx context.Context, req *shopv1.CartRequest) (*shopv1.Cart, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	return loadCart(tx, req.GetCart())
}

// SetLine implements shop.v1.Store.
func (s *store) SetLine(ctx context.Context, req *shopv1.SetLineRequest) (*shopv1.Cart, error) {
	return s.changeLine(ctx, req, func(uint32) uint32 { return req.GetQuantity() })
}

// AddLine implements shop.v1.Store.
func (s *store) AddLine(ctx context.Context, req *shopv1.SetLineRequest) (*shopv1.Cart, error) {
	if req.GetQuantity() > maxCopies {
		return nil, status.Errorf(codes.InvalidArgument, "%d copies, at most %d", req.GetQuantity(), maxCopies)
	}
	return s.changeLine(ctx, req, func(now uint32) uint32 { return now + req.GetQuantity() })
}

func (s *store) changeLine(ctx context.Context, req *shopv1.SetLineRequest, change func(now uint32) uint32) (*shopv1.Cart, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	book, err := s.book(req.GetIsbn())
	if err != nil {
		return nil, err
	}
	cart, err := loadCart(tx, req.GetCart())
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(cart.GetLines(), func(l *shopv1.Line) bool { return l.GetIsbn() == req.GetIsbn() })
	if i < 0 {
		i = len(cart.GetLines())
		cart.Lines = append(cart.Lines, &shopv1.Line{Isbn: book.GetIsbn(), Title: book.GetTitle()})
	}
	line := cart.GetLines()[i]
	line.Quantity, line.PriceCents = change(line.GetQuantity()), book.GetPriceCents()
	switch {
	case line.GetQuantity() > maxCopies:
		return nil, status.Errorf(codes.InvalidArgument, "%d copies of %q, at most %d", line.GetQuantity(), book.GetTitle(), maxCopies)
	case line.GetQuantity() == 0:
		cart.Lines = slices.Delete(cart.Lines, i, i+1)
	case len(cart.GetLines()) > maxLines:
		return nil, status.Errorf(codes.InvalidArgument, "a cart holds at most %d different books", maxLines)
	}
	cart.TotalCents = total(cart.GetLines())
	if len(cart.GetLines()) == 0 {
		tx.Delete(prefixCart + req.GetCart())
	} else {
		tx.PutMessage(prefixCart+req.GetCart(), cart)
	}
	return cart, nil
}

func total(lines []*shopv1.Line) uint64 {
	var sum uint64
	for _, l := range lines {
		sum += uint64(l.GetQuantity()) * l.GetPriceCents()
	}
	return sum
}

// loadCart returns a cart, empty when there is none of that name.
func loadCart(tx *sdk.Txn, name string) (*shopv1.Cart, error) {
	if name == "" || len(name) > maxCartName || strings.Contains(name, "/") {
		return nil, status.Errorf(codes.InvalidArgument, "cart %.40q: a name has 1 to %d bytes and no slash", name, maxCartName)
	}
	cart := &shopv1.Cart{Cart: name}
	_, err := tx.Message(prefixCart+name, cart)
	return cart, err
}

// PlaceOrder implements shop.v1.Store.
func (s *store) PlaceOrder(ctx context.Context, req *shopv1.CartRequest) (*shopv1.Order, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	cart, err := loadCart(tx, req.GetCart())
	if err != nil {
		return nil, err
	}
	if len(cart.GetLines()) == 0 {
		return nil, status.Errorf(codes.FailedPrecondition, "cart %q is empty", req.GetCart())
	}
	var copies uint64
	for _, l := range cart.GetLines() {
		left := tx.Uint64(stockKey(l.GetIsbn()))
		if left < uint64(l.GetQuantity()) {
			// What was taken for the lines before is put back: an error rolls the whole call back.
			return nil, status.Errorf(codes.FailedPrecondition, "only %d copies of %q are left, not %d", left, l.GetTitle(), l.GetQuantity())
		}
		tx.PutUint64(stockKey(l.GetIsbn()), left-uint64(l.GetQuantity()))
		copies += uint64(l.GetQuantity())
	}
	order := &shopv1.Order{Number: tx.Uint64(keyOrders) + 1, Cart: cart.GetCart(), Lines: cart.GetLines(), TotalCents: cart.GetTotalCents()}
	tx.PutUint64(keyOrders, order.GetNumber())
	tx.PutUint64(keySold, tx.Uint64(keySold)+copies)
	tx.PutUint64(keyRevenue, tx.Uint64(keyRevenue)+order.GetTotalCents())
	tx.PutMessage(orderKey(order.GetNumber()), order)
	tx.PutUint64(ownerKey(order.GetCart(), order.GetNumber()), order.GetNumber())
	tx.Delete(prefixCart + req.GetCart())
	return order, nil
}

// GetOrder implements shop.v1.Store.
func (s *store) GetOrder(ctx context.Context, req *shopv1.GetOrderRequest) (*shopv1.Order, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	return loadOrder(tx, req.GetNumber())
}

func loadOrder(tx *sdk.Txn, number uint64) (*shopv1.Order, error) {
	order := &shopv1.Order{}
	ok, err := tx.Message(orderKey(number), order)
	if err == nil && !ok {
		err = status.Errorf(codes.NotFound, "no order %d", number)
	}
	return order, err
}

// ListOrders implements shop.v1.Store.
func (s *store) ListOrders(ctx context.Context, req *shopv1.CartRequest) (*shopv1.OrderList, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := loadCart(tx, req.GetCart()); err != nil { // checks the name
		return nil, err
	}
	reply := &shopv1.OrderList{}
	for key := range tx.All(prefixOwner + req.GetCart() + "/") {
		if len(reply.GetOrders()) == maxOrders {
			break
		}
		order, err := loadOrder(tx, tx.Uint64(key))
		if err != nil {
			return nil, err
		}
		reply.Orders = append(reply.Orders, order)
	}
	return reply, nil
}

// Restock implements shop.v1.Store.
func (s *store) Restock(ctx context.Context, req *shopv1.RestockRequest) (*shopv1.Book, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	b, err := s.book(req.GetIsbn())
	if err != nil {
		return nil, err
	}
	if req.GetQuantity() > maxRestock {
		return nil, status.Errorf(codes.InvalidArgument, "%d copies, at most %d at once", req.GetQuantity(), maxRestock)
	}
	tx.PutUint64(stockKey(req.GetIsbn()), tx.Uint64(stockKey(req.GetIsbn()))+uint64(req.GetQuantity()))
	tx.PutUint64(keyDelivered, tx.Uint64(keyDelivered)+uint64(req.GetQuantity()))
	return withStock(tx, b), nil
}

// Ledger implements shop.v1.Store.
func (s *store) Ledger(ctx context.Context, _ *shopv1.LedgerRequest) (*shopv1.LedgerReply, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	reply := &shopv1.LedgerReply{
		Books: uint64(len(s.catalogue.books)), Orders: tx.Uint64(keyOrders), Sold: tx.Uint64(keySold),
		Delivered: tx.Uint64(keyDelivered), RevenueCents: tx.Uint64(keyRevenue),
	}
	for key := range tx.All(prefixStock) {
		reply.InStock += tx.Uint64(key)
	}
	for range tx.All(prefixCart) {
		reply.Carts++
	}
	return reply, nil
}
