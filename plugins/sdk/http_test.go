package sdk_test

import (
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
	"github.com/coppice-project/coppice/plugins/sdk"
	"github.com/coppice-project/coppice/plugins/sdk/sdktest"
)

// adder is an HTTP interface that adds the length of a request's body, and fails in several ways when asked to.
func adder(ran *atomic.Int64) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		tx, err := sdk.Tx(r.Context())
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		if r.Method != http.MethodGet {
			ran.Add(1)
			body, err := io.ReadAll(r.Body)
			if err != nil {
				panic(err)
			}
			tx.PutUint64("value", tx.Uint64("value")+uint64(len(body)))
			if string(body) == "panic" {
				panic("ouch")
			}
			if string(body) == "bad" {
				w.WriteHeader(http.StatusTeapot)
			} else {
				w.Header().Set("Location", "/there")
				w.WriteHeader(http.StatusCreated)
			}
		}
		fmt.Fprint(w, tx.Uint64("value"))
	}
}

func TestHTTPRequestIsOneTransaction(t *testing.T) {
	c := (&probe{}).component()
	var ran atomic.Int64
	c.HTTP = adder(&ran)
	r := sdktest.Start(t, c)
	do := func(method, body, key string) *httptest.ResponseRecorder {
		req := httptest.NewRequest(method, "/x", strings.NewReader(body))
		if key != "" {
			req.Header.Set(componentv1.HeaderKey, key)
		}
		w := httptest.NewRecorder()
		r.HTTP.ServeHTTP(w, req)
		return w
	}
	for range 3 {
		w := do(http.MethodPost, "four", "k1")
		if w.Code != http.StatusCreated || w.Body.String() != "4" || w.Header().Get("Location") != "/there" || w.Header().Get(componentv1.HeaderMark) != "1" {
			t.Fatal(w.Code, w.Body, w.Header())
		}
	}
	if ran.Load() != 1 {
		t.Fatal(ran.Load())
	}
	for _, tc := range []struct {
		method, body, key string
		code              int
		want              string
	}{
		{http.MethodPost, "other", "k1", http.StatusUnprocessableEntity, "different request"},
		{http.MethodPut, "bad", "k2", http.StatusTeapot, "7"},
		{http.MethodPost, "panic", "k2", http.StatusInternalServerError, "ouch"},
		{http.MethodGet, "", "", http.StatusOK, "4"},
		{http.MethodPost, "ok", "k2", http.StatusCreated, "6"},
		{http.MethodGet, "", "", http.StatusOK, "6"},
	} {
		if w := do(tc.method, tc.body, tc.key); w.Code != tc.code || !strings.Contains(w.Body.String(), tc.want) {
			t.Fatalf("%v: %d %s", tc, w.Code, w.Body)
		}
	}
	second := sdktest.Start(t, (&probe{}).component(), sdktest.From(r.Checkpoint(0)))
	if v := mustGet(t, second); v != 6 {
		t.Fatal(v)
	}
	if _, _, err := addOnce(sdktest.Key(t.Context(), "k1", ""), second, 1); status.Code(err) != codes.Aborted {
		t.Fatalf("an HTTP key used by gRPC: %v", err)
	}
}

func TestCredential(t *testing.T) {
	c := (&probe{}).component()
	c.HTTP = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprint(w, r.Header.Get(componentv1.HeaderCredential))
	})
	in, err := sdk.New(c, sdk.Env{Credential: "right"})
	if err != nil {
		t.Fatal(err)
	}
	request := httptest.NewRequest(http.MethodGet, "/", nil)
	w := httptest.NewRecorder()
	in.Handler().ServeHTTP(w, request)
	if w.Code != http.StatusUnauthorized {
		t.Fatal(w.Code)
	}
	r := sdktest.Start(t, (&probe{}).component(), sdktest.Env(sdk.Env{Credential: "right"}))
	mustGet(t, r)
	wrong := metadata.AppendToOutgoingContext(t.Context(), componentv1.MetaCredential, "wrong") // two are as bad as none
	_, err = r.Control.Heartbeat(wrong, &componentv1.Beat{})
	wantCode(t, err, codes.Unauthenticated, componentv1.MetaCredential)
}
