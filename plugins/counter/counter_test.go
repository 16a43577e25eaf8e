package main

import (
	"fmt"
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

// Both sides of a cut went on from the same count: the result has what was added on either, and answers repeats of calls of either.
func TestMerge(t *testing.T) {
	count := func(r *sdktest.Running, key string, n int64) int64 {
		t.Helper()
		v, err := counterv1.NewCounterClient(r.Conn).Add(sdktest.Key(t.Context(), key, ""), &counterv1.AddRequest{N: n})
		if err != nil {
			t.Fatal(err)
		}
		return v.GetValue()
	}
	first := sdktest.Start(t, component())
	count(first, "before", 5)
	base := first.Checkpoint(0)
	ours, theirs := sdktest.Start(t, component(), sdktest.From(base)), sdktest.Start(t, component(), sdktest.From(base))
	count(ours, "ours", 2)
	if v := count(theirs, "theirs", 10); v != 15 {
		t.Fatal(v)
	}
	for i := range 3 { // theirs is at a later mark than ours
		count(theirs, fmt.Sprint("theirs again/", i), 0)
	}
	merged := sdktest.Start(t, component(), sdktest.From(ours.Merge(base, ours.Checkpoint(0), theirs.Checkpoint(0))))
	if v, err := counterv1.NewCounterClient(merged.Conn).Get(t.Context(), &counterv1.GetRequest{}); err != nil || v.GetValue() != 17 {
		t.Errorf("merged: %v, %v; want 17", v.GetValue(), err)
	}
	if a, b, c := count(merged, "before", 5), count(merged, "ours", 2), count(merged, "theirs", 10); a != 5 || b != 7 || c != 15 {
		t.Errorf("repeats are answered %d, %d and %d, want 5, 7 and 15 as before", a, b, c)
	}
	if v := count(merged, "after", 1); v != 18 {
		t.Errorf("the next one is answered %d", v)
	}
	again := sdktest.Start(t, component(), sdktest.From(merged.Checkpoint(0)))
	if v := count(again, "theirs", 10); v != 15 {
		t.Errorf("after a restart a repeat is answered %d", v)
	}
	// Without a base both began from nothing.
	if frames := ours.Merge(nil, ours.Checkpoint(0), theirs.Checkpoint(0)); len(frames) == 0 {
		t.Error("no result")
	}
}
