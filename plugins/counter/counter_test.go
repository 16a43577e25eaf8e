package main

import (
	"net/http"
	"net/http/httptest"
	"testing"

	counterv1 "github.com/coppice-project/coppice/plugins/counter/v1"
	"github.com/coppice-project/coppice/plugins/sdk/sdktest"
)

func TestCounter(t *testing.T) {
	r := sdktest.Start(t, component())
	c := counterv1.NewCounterClient(r.Conn)
	for _, step := range []struct{ n, want int64 }{{5, 5}, {-7, -2}, {1 << 62, 1<<62 - 2}} {
		if v, err := c.Add(t.Context(), &counterv1.AddRequest{N: step.n}); err != nil || v.GetValue() != step.want {
			t.Fatal(v, err)
		}
	}
	second := sdktest.Start(t, component(), sdktest.From(r.Checkpoint(0)))
	if v, err := counterv1.NewCounterClient(second.Conn).Get(t.Context(), &counterv1.GetRequest{}); err != nil || v.GetValue() != 1<<62-2 {
		t.Fatal(v, err)
	}
}

func TestHTTP(t *testing.T) {
	r := sdktest.Start(t, component())
	for _, step := range []struct {
		method, path, key string
		code              int
		want              string
	}{
		{http.MethodGet, "/", "", 200, "0\n"},
		{http.MethodPost, "/?n=4", "a", 200, "4\n"},
		{http.MethodPost, "/?n=4", "a", 200, "4\n"},
		{http.MethodPost, "/", "b", 200, "5\n"},
		{http.MethodPost, "/?n=many", "", 400, "n=\"many\" is not a number\n"},
		{http.MethodDelete, "/", "", 400, "DELETE is not GET or POST\n"},
		{http.MethodGet, "/", "", 200, "5\n"},
	} {
		req := httptest.NewRequest(step.method, step.path, nil)
		if step.key != "" {
			req.Header.Set("Idempotency-Key", step.key)
		}
		w := httptest.NewRecorder()
		r.HTTP.ServeHTTP(w, req)
		if w.Code != step.code || w.Body.String() != step.want {
			t.Fatalf("%v: %d %q", step, w.Code, w.Body)
		}
		if w.Code == 200 && (w.Header().Get("X-Version") != version || w.Header().Get("X-Epoch") != "1") {
			t.Fatalf("%v: %v", step, w.Header())
		}
	}
}
