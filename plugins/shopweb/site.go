package main

import (
	"bytes"
	"crypto/rand"
	_ "embed"
	"encoding/json"
	"fmt"
	"html/template"
	"mime"
	"net/http"
	"strconv"
	"strings"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/plugins/sdk"
	shopv1 "github.com/coppice-project/coppice/plugins/shop/v1"
)

//go:embed pages.html
var pagesHTML string

const (
	cartCookie = "cart"
	pageSize   = 20
	maxBody    = 64 << 10
)

// site is the HTTP interface. Every address answers JSON (protobuf's mapping of shop.v1), or a page to who accepts text/html.
//
//	GET  /                     the catalogue: ?q=words&offset=n
//	GET  /books/{isbn}         a book
//	GET  /carts/{cart}         a cart
//	POST /carts/{cart}/lines   add a book: {"isbn": "…", "quantity": 1}, or the same as a form
//	PUT  /carts/{cart}/lines   set how many: the same
//	POST /carts/{cart}/order   order what is in the cart
//	GET  /carts/{cart}/orders  its orders
//	GET  /orders/{number}      an order
//	GET  /ledger               the shop's sums
type site struct {
	mux   *http.ServeMux
	store shopv1.StoreClient
	pages *template.Template
}

func newSite(store shopv1.StoreClient) *site {
	s := &site{mux: http.NewServeMux(), store: store}
	s.pages = template.Must(template.New("").Funcs(template.FuncMap{
		"price": func(cents uint64) string { return fmt.Sprintf("%d.%02d", cents/100, cents%100) },
	}).Parse(pagesHTML))
	routes := map[string]func(r *http.Request) (page, error){
		"GET /{$}":                 s.list,
		"GET /books/{isbn}":        s.book,
		"GET /carts/{cart}":        s.cart,
		"POST /carts/{cart}/lines": s.addLine,
		"PUT /carts/{cart}/lines":  s.setLine,
		"POST /carts/{cart}/order": s.order,
		"GET /carts/{cart}/orders": s.orders,
		"GET /orders/{number}":     s.getOrder,
		"GET /ledger":              s.ledger,
	}
	for pattern, handle := range routes {
		s.mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) { s.answer(w, r, handle) })
	}
	return s
}

// ServeHTTP implements http.Handler.
func (s *site) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.mux.ServeHTTP(w, r) }

// page is what a handler found: a message for programs, and the template that shows it to people.
type page struct {
	template string
	message  proto.Message
	query    string
	offset   int
}

// answer runs a handler and writes what it found, or why not.
func (s *site) answer(w http.ResponseWriter, r *http.Request, handle func(*http.Request) (page, error)) {
	r.Body = http.MaxBytesReader(w, r.Body, maxBody)
	w.Header().Set("X-Version", sdk.From(r.Context()).Version())
	w.Header().Set("Vary", "Accept")
	p, err := handle(r)
	switch {
	case err != nil:
		fail(w, err)
	case strings.Contains(r.Header.Get("Accept"), "text/html"):
		s.show(w, r, p)
	default:
		writeJSON(w, p.message)
	}
}

func writeJSON(w http.ResponseWriter, m proto.Message) {
	b, err := protojson.MarshalOptions{UseProtoNames: true, EmitUnpopulated: true}.Marshal(m)
	if err != nil {
		fail(w, err)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	// A client that has gone away does not read the answer; there is nobody to tell.
	_, _ = w.Write(append(b, '\n'))
}

// fail answers with the HTTP status that fits the store's error.
func fail(w http.ResponseWriter, err error) {
	st := status.Convert(err)
	code := http.StatusBadGateway
	switch st.Code() {
	case codes.NotFound:
		code = http.StatusNotFound
	case codes.InvalidArgument:
		code = http.StatusBadRequest
	case codes.FailedPrecondition, codes.Aborted:
		code = http.StatusConflict
	case codes.Unavailable, codes.ResourceExhausted:
		code = http.StatusServiceUnavailable
	case codes.DeadlineExceeded, codes.Canceled:
		code = http.StatusGatewayTimeout
	}
	body, jsonErr := json.Marshal(map[string]string{"error": st.Message()})
	if jsonErr != nil {
		body = []byte(`{"error":"unknown"}`)
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	_, _ = w.Write(append(body, '\n')) // as in writeJSON
}

// view is what the templates see.
type view struct {
	page
	Root    string // from this page back to /, relative: the gateway may have put the shop anywhere
	Cart    string // the visitor's
	Key     string // a new idempotency key for the page's form: sending it twice orders once
	Message proto.Message
	Query   string
	Offset  int
	Next    int // offset of the next page, 0 = none
	Back    int // offset of the page before
}

func (s *site) show(w http.ResponseWriter, r *http.Request, p page) {
	v := view{page: p, Message: p.message, Query: p.query, Offset: p.offset, Key: rand.Text(), Back: max(0, p.offset-pageSize)}
	v.Root = "./" + strings.Repeat("../", strings.Count(r.URL.Path, "/")-1)
	if list, ok := p.message.(*shopv1.BookList); ok && p.offset+pageSize < int(list.GetTotal()) {
		v.Next = p.offset + pageSize
	}
	if c, err := r.Cookie(cartCookie); err == nil && c.Value != "" {
		v.Cart = c.Value
	} else {
		v.Cart = rand.Text()
		http.SetCookie(w, &http.Cookie{Name: cartCookie, Value: v.Cart, Path: "/", HttpOnly: true, SameSite: http.SameSiteLaxMode})
	}
	var out bytes.Buffer
	if err := s.pages.ExecuteTemplate(&out, p.template, v); err != nil {
		fail(w, fmt.Errorf("page %s: %w", p.template, err))
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'")
	_, _ = w.Write(out.Bytes()) // as in writeJSON
}

func (s *site) list(r *http.Request) (page, error) {
	offset, err := number(r.URL.Query().Get("offset"), 0)
	if err != nil {
		return page{}, err
	}
	query := r.URL.Query().Get("q")
	books, err := s.store.ListBooks(r.Context(), &shopv1.ListBooksRequest{Query: query, Offset: uint32(offset), Limit: pageSize})
	return page{"list", books, query, int(offset)}, err
}

// number reads a decimal that fits 32 bits; "" is the fallback.
func number(text string, fallback uint64) (uint64, error) {
	if text == "" {
		return fallback, nil
	}
	n, err := strconv.ParseUint(text, 10, 31)
	if err != nil {
		return 0, status.Errorf(codes.InvalidArgument, "%.20q is not a number", text)
	}
	return n, nil
}

func (s *site) book(r *http.Request) (page, error) {
	b, err := s.store.GetBook(r.Context(), &shopv1.GetBookRequest{Isbn: r.PathValue("isbn")})
	return page{template: "book", message: b}, err
}

func (s *site) cart(r *http.Request) (page, error) {
	c, err := s.store.GetCart(r.Context(), &shopv1.CartRequest{Cart: r.PathValue("cart")})
	return page{template: "cart", message: c}, err
}

func (s *site) addLine(r *http.Request) (page, error) {
	req, err := line(r)
	if err != nil {
		return page{}, err
	}
	c, err := s.store.AddLine(formKey(r).Context(), req)
	return page{template: "cart", message: c}, err
}

func (s *site) setLine(r *http.Request) (page, error) {
	req, err := line(r)
	if err != nil {
		return page{}, err
	}
	c, err := s.store.SetLine(r.Context(), req)
	return page{template: "cart", message: c}, err
}

func (s *site) order(r *http.Request) (page, error) {
	o, err := s.store.PlaceOrder(formKey(r).Context(), &shopv1.CartRequest{Cart: r.PathValue("cart")})
	return page{template: "order", message: o}, err
}

func (s *site) orders(r *http.Request) (page, error) {
	o, err := s.store.ListOrders(r.Context(), &shopv1.CartRequest{Cart: r.PathValue("cart")})
	return page{template: "orders", message: o}, err
}

func (s *site) getOrder(r *http.Request) (page, error) {
	n, err := strconv.ParseUint(r.PathValue("number"), 10, 64)
	if err != nil {
		return page{}, status.Errorf(codes.InvalidArgument, "order %.20q is not a number", r.PathValue("number"))
	}
	o, err := s.store.GetOrder(r.Context(), &shopv1.GetOrderRequest{Number: n})
	return page{template: "order", message: o}, err
}

func (s *site) ledger(r *http.Request) (page, error) {
	l, err := s.store.Ledger(r.Context(), &shopv1.LedgerRequest{})
	return page{template: "ledger", message: l}, err
}

// line reads {"isbn","quantity"} from JSON or a form; a quantity that is not there is 1.
func line(r *http.Request) (*shopv1.SetLineRequest, error) {
	kind, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil && r.Header.Get("Content-Type") != "" {
		return nil, status.Errorf(codes.InvalidArgument, "Content-Type: %v", err)
	}
	body := struct {
		ISBN     string  `json:"isbn"`
		Quantity *uint32 `json:"quantity"`
	}{}
	if kind == "application/x-www-form-urlencoded" {
		if err := r.ParseForm(); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "form: %v", err)
		}
		n, err := number(r.PostForm.Get("quantity"), 1)
		if err != nil {
			return nil, err
		}
		quantity := uint32(n)
		body.ISBN, body.Quantity = r.PostForm.Get("isbn"), &quantity
	} else {
		dec := json.NewDecoder(r.Body)
		dec.DisallowUnknownFields()
		if err := dec.Decode(&body); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, `the body is not {"isbn": "…", "quantity": 1}: %v`, err)
		}
		if dec.More() {
			return nil, status.Error(codes.InvalidArgument, "the body holds more than one value")
		}
	}
	if body.ISBN == "" {
		return nil, status.Error(codes.InvalidArgument, "isbn is missing")
	}
	req := &shopv1.SetLineRequest{Cart: r.PathValue("cart"), Isbn: body.ISBN, Quantity: 1}
	if body.Quantity != nil {
		req.Quantity = *body.Quantity
	}
	return req, nil
}

// formKey gives the store call the key that the page put into its form, for a request without a key of its own: browsers send none.
func formKey(r *http.Request) *http.Request {
	key := r.PostFormValue("key")
	if key == "" || sdk.Key(r.Context()) != "" {
		return r
	}
	return r.WithContext(sdk.WithKey(r.Context(), "form:"+key))
}
