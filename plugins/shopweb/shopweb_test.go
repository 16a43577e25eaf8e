package main

import (
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"google.golang.org/grpc"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	"github.com/coppice-project/coppice/plugins/sdk"
	"github.com/coppice-project/coppice/plugins/sdk/sdktest"
	shopv1 "github.com/coppice-project/coppice/plugins/shop/v1"
)

// shelf is a store tier of one book that counts additions under their keys. The real one has tests of its own.
type shelf struct {
	shopv1.UnimplementedStoreServer
}

var book = &shopv1.Book{Isbn: "9799100731365", Title: "Darya & the <Lighthouse>", Author: "Noor Arslan", PriceCents: 1299, InStock: 7}

func (*shelf) ListBooks(_ context.Context, req *shopv1.ListBooksRequest) (*shopv1.BookList, error) {
	return &shopv1.BookList{Books: []*shopv1.Book{book}, Total: 41 + uint32(len(req.GetQuery()))}, nil
}

func (*shelf) AddLine(ctx context.Context, req *shopv1.SetLineRequest) (*shopv1.Cart, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	n := tx.Uint64(req.GetCart()) + uint64(req.GetQuantity())
	tx.PutUint64(req.GetCart(), n)
	return &shopv1.Cart{Cart: req.GetCart(), Lines: []*shopv1.Line{{Isbn: req.GetIsbn(), Quantity: uint32(n), PriceCents: 100, Title: "t"}}, TotalCents: 100 * n}, nil
}

// start runs two web instances over one store.
func start(t *testing.T) (a, b http.Handler) {
	t.Helper()
	back := sdktest.Start(t, &sdk.Component{
		Type: "shelf", Version: "1", State: &sdk.State{Schema: 1},
		Register: func(r grpc.ServiceRegistrar) { shopv1.RegisterStoreServer(r, &shelf{}) },
	})
	web := func(name string) http.Handler {
		store := sdk.Require("store", shopv1.Store_ServiceDesc.ServiceName)
		store.Use(back.Conn)
		return sdktest.Start(t, component(store), sdktest.Request(&componentv1.StartRequest{Instance: name, Version: "3.2.1"})).HTTP
	}
	return web("shop/web-0"), web("shop/web-1")
}

func request(h http.Handler, method, path, body string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	for i := 0; i < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func TestJSON(t *testing.T) {
	web, _ := start(t)
	for _, tc := range []struct {
		method, path, body string
		code               int
		want               string
	}{
		{"GET", "/?q=tide&offset=20", "", 200, `"total":45`},
		{"POST", "/carts/ann/lines", `{"isbn":"9799100731365","quantity":2}`, 200, `"quantity":2`},
		{"POST", "/carts/ann/lines", `{"isbn":"9799100731365"}`, 200, `"quantity":3`},
		{"POST", "/carts/ann/lines", `{"isbn":"9799100731365","colour":"red"}`, 400, "colour"},
		{"POST", "/carts/ann/lines", `{}`, 400, "isbn is missing"},
		{"POST", "/carts/ann/lines", `nonsense`, 400, "body is not"},
		{"GET", "/?offset=-1", "", 400, "not a number"},
		{"GET", "/orders/x", "", 400, "not a number"},
		{"GET", "/nowhere", "", 404, "not found"},
		{"DELETE", "/carts/ann", "", 405, ""},
		{"GET", "/ledger", "", 502, "Ledger"}, // the shelf has none
	} {
		w := request(web, tc.method, tc.path, tc.body)
		body := strings.ReplaceAll(w.Body.String(), ": ", ":")
		if w.Code != tc.code || !strings.Contains(strings.ReplaceAll(body, " ", ""), strings.ReplaceAll(tc.want, " ", "")) {
			t.Errorf("%v: %d %s", tc, w.Code, w.Body)
		}
		if strings.HasPrefix(w.Body.String(), "{") && !json.Valid(w.Body.Bytes()) {
			t.Errorf("%v: not JSON: %s", tc, w.Body)
		}
	}
}

func TestPages(t *testing.T) {
	web, _ := start(t)
	w := request(web, "GET", "/", "", "Accept", "text/html,*/*")
	for _, want := range []string{"Darya &amp; the &lt;Lighthouse&gt;", "12.99", `offset=20`, `action="./carts/`} {
		if !strings.Contains(w.Body.String(), want) {
			t.Errorf("no %q in\n%s", want, w.Body)
		}
	}
	if w.Header().Get("X-Version") != "3.2.1" || !strings.Contains(w.Header().Get("Set-Cookie"), "cart=") {
		t.Error(w.Header())
	}
	form := "isbn=9799100731365&quantity=1&key=once"
	for range 2 { // pressed twice
		w = request(web, "POST", "/carts/bob/lines", form, "Accept", "text/html", "Content-Type", "application/x-www-form-urlencoded")
		if w.Code != 200 || !strings.Contains(w.Body.String(), "Total 1.00") || !strings.Contains(w.Body.String(), `href="./../../"`) {
			t.Fatal(w.Code, w.Body)
		}
	}
}

// TestRetryAtTheOtherInstance: the same Idempotency-Key at two instances adds once.
func TestRetryAtTheOtherInstance(t *testing.T) {
	a, b := start(t)
	for _, web := range []http.Handler{a, b, a} {
		w := request(web, "POST", "/carts/eve/lines", `{"isbn":"9799100731365"}`, "Idempotency-Key", "eve-1")
		if w.Code != 200 || !strings.Contains(strings.ReplaceAll(w.Body.String(), " ", ""), `"quantity":1,`) {
			t.Fatal(w.Code, w.Body)
		}
	}
}
