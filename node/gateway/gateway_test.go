package gateway

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"strings"
	"testing"
	"time"
)

// apps: shop echoes what it was asked, busy fails over, broken cannot be reached.
type apps struct{ shop http.Handler }

func (a apps) Names() []string { return []string{"shop", "busy", "broken"} }

func (a apps) Handler(app, path string) (http.Handler, error) {
	switch {
	case app == "shop" && !strings.HasPrefix(path, "/hidden"):
		return a.shop, nil
	case app == "busy":
		return nil, &UnavailableError{Why: "it fails over to n2", After: 1500 * time.Millisecond}
	case app == "broken":
		return nil, errors.New("connection reset")
	}
	return nil, ErrNotFound
}

func echo(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Security-Policy", "default-src *")
	w.Header().Set("X-Path", r.URL.Path)
	for _, h := range []string{"X-Forwarded-Prefix", "X-Forwarded-Host", "X-Forwarded-For", "X-Coppice-Caller", "Idempotency-Key"} {
		w.Header().Set("Got-"+h, r.Header.Get(h))
	}
	if _, err := io.Copy(w, r.Body); err != nil {
		panic(err)
	}
}

func gate(t *testing.T, change func(*Config)) *httptest.Server {
	t.Helper()
	cfg := Config{Apps: apps{http.HandlerFunc(echo)}, Log: slog.New(slog.DiscardHandler), API: http.HandlerFunc(echo)}
	if change != nil {
		change(&cfg)
	}
	h, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return srv
}

type answer struct {
	*http.Response
	body string
}

// ask sends a request without following redirects. header is "Name: value".
func ask(t *testing.T, srv *httptest.Server, method, path string, header ...string) answer {
	t.Helper()
	req, err := http.NewRequest(method, srv.URL+path, strings.NewReader("body"))
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range header {
		k, v, _ := strings.Cut(h, ": ")
		if k == "Host" {
			req.Host = v
		} else {
			req.Header.Set(k, v)
		}
	}
	c := http.Client{CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	res, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	raw, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer{res, string(raw)}
}

func TestRoutes(t *testing.T) {
	srv := gate(t, nil)
	for _, x := range []struct {
		method, path, host string
		status             int
		app                string // the path an application saw
	}{
		{"GET", "/", "", 200, ""},
		{"GET", "/ui/app.js", "", 200, ""},
		{"GET", "/healthz", "", 200, ""},
		{"GET", "/metrics", "", 404, ""},
		{"POST", "/healthz", "", 405, ""},
		{"POST", "/api/coppice.api.v1.Control/Nodes", "", 200, "/api/coppice.api.v1.Control/Nodes"},
		{"POST", "/app/shop/carts/a%2Fb?x=1", "", 200, "/carts/a/b"},
		{"GET", "/app/shop", "", 307, ""},
		{"GET", "/app/shop/", "", 200, "/"},
		{"GET", "/app/shop/hidden", "", 404, ""},
		{"GET", "/app/nothing/", "", 404, ""},
		{"GET", "/app/", "", 404, ""},
		{"GET", "/frob", "", 404, ""},
		{"GET", "/app/busy/", "", 503, ""},
		{"GET", "/app/broken/", "", 502, ""},
		{"GET", "/carts", "shop.localhost:8080", 200, "/carts"},
		{"GET", "/hidden", "shop.example.com", 404, ""},
		{"GET", "/healthz", "n1.example.com", 200, ""},
		{"GET", "/healthz", "127.0.0.1:8080", 200, ""},
		{"GET", "/healthz", "[::1]:8080", 200, ""},
		{"GET", "/x", "busy.localhost", 503, ""},
	} {
		var headers []string
		if x.host != "" {
			headers = append(headers, "Host: "+x.host)
		}
		res := ask(t, srv, x.method, x.path, headers...)
		if res.StatusCode != x.status || res.Header.Get("X-Path") != x.app {
			t.Errorf("%s %s %s: %s, the application saw %q\n%s", x.method, x.host, x.path, res.Status, res.Header.Get("X-Path"), res.body)
		}
	}
}

func TestErrorsHelp(t *testing.T) {
	srv := gate(t, nil)
	res := ask(t, srv, "GET", "/app/shopp/")
	if !strings.Contains(res.body, `there is no application "shopp"`) || !strings.Contains(res.body, "  /app/shop/\n") {
		t.Errorf("404: %s", res.body)
	}
	res = ask(t, srv, "GET", "/app/busy/", "Accept: application/json")
	var got struct{ Error string }
	if err := json.Unmarshal([]byte(res.body), &got); err != nil || !strings.Contains(got.Error, "fails over to n2") || res.Header.Get("Retry-After") != "2" {
		t.Errorf("503: %s Retry-After %q %v", res.body, res.Header.Get("Retry-After"), err)
	}
	srv = gate(t, func(c *Config) { c.Health = func(context.Context) error { return errors.New("no leader") } })
	if res = ask(t, srv, "GET", "/healthz"); res.StatusCode != 503 || !strings.Contains(res.body, "no leader") {
		t.Errorf("healthz: %s %s", res.Status, res.body)
	}
}

// An application on the dashboard's origin must not get at the dashboard's token, whatever it answers.
func TestApplicationsCannotReachTheDashboard(t *testing.T) {
	srv := gate(t, nil)
	if csp := ask(t, srv, "GET", "/app/shop/page").Header.Values("Content-Security-Policy"); len(csp) != 2 || !strings.HasPrefix(csp[1], "sandbox ") || strings.Contains(csp[1], "allow-same-origin") {
		t.Errorf("below /app/: %q", csp)
	}
	if csp := ask(t, srv, "GET", "/page", "Host: shop.localhost").Header.Values("Content-Security-Policy"); len(csp) != 1 {
		t.Errorf("on its own host: %q", csp)
	}
	for _, path := range []string{"/", "/ui/app.js"} {
		h := ask(t, srv, "GET", path).Header
		if !strings.Contains(h.Get("Content-Security-Policy"), "script-src 'self'") || !strings.Contains(h.Get("Content-Security-Policy"), "frame-ancestors 'none'") || h.Get("X-Content-Type-Options") != "nosniff" {
			t.Errorf("%s: %v", path, h)
		}
	}
}

func TestNobodyOutsideSpeaksForTheSystem(t *testing.T) {
	srv := gate(t, nil)
	res := ask(t, srv, "GET", "/app/shop/x", "X-Coppice-Caller: system/placement-0", "X-Forwarded-For: 1.2.3.4", "Idempotency-Key: k")
	for h, want := range map[string]string{"X-Coppice-Caller": "", "X-Forwarded-For": "127.0.0.1", "X-Forwarded-Prefix": "/app/shop", "Idempotency-Key": "k", "X-Forwarded-Host": strings.TrimPrefix(srv.URL, "http://")} {
		if got := res.Header.Get("Got-" + h); got != want {
			t.Errorf("%s reached the application as %q, want %q", h, got, want)
		}
	}
}

// What an application streams arrives as it is written, through the sandbox and a reverse proxy.
func TestStreamsAreNotHeldBack(t *testing.T) {
	release := make(chan struct{})
	back := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		io.WriteString(w, "first")
		http.NewResponseController(w).Flush()
		<-release
	}))
	defer back.Close()
	u, err := url.Parse(back.URL)
	if err != nil {
		t.Fatal(err)
	}
	srv := gate(t, func(c *Config) {
		c.Apps = apps{&httputil.ReverseProxy{FlushInterval: -1, Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(u) }}}
	})
	res, err := http.Get(srv.URL + "/app/shop/feed")
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	buf := make([]byte, 5)
	if _, err := io.ReadFull(res.Body, buf); err != nil || string(buf) != "first" {
		t.Errorf("%q %v", buf, err)
	}
	close(release)
}

func TestTooManyRequests(t *testing.T) {
	in, out := make(chan struct{}), make(chan struct{})
	h, err := New(Config{Log: slog.New(slog.DiscardHandler), Apps: apps{http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		in <- struct{}{}
		<-out
	})}})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	for range MaxRequests {
		go func() {
			h.ServeHTTP(httptest.NewRecorder(), httptest.NewRequest("GET", "/app/shop/", nil))
			done <- struct{}{}
		}()
		<-in
	}
	rec := httptest.NewRecorder()
	h.ServeHTTP(rec, httptest.NewRequest("GET", "/healthz", nil))
	if rec.Code != 503 || rec.Header().Get("Retry-After") == "" {
		t.Errorf("one too many: %d", rec.Code)
	}
	close(out)
	for range MaxRequests {
		<-done
	}
}

// The dashboard loads nothing from elsewhere and sets no markup from data.
func TestDashboardIsSelfContained(t *testing.T) {
	srv := gate(t, nil)
	for _, path := range []string{"/", "/ui/app.js", "/ui/api.js", "/ui/view.js", "/ui/style.css"} {
		res := ask(t, srv, "GET", path)
		if res.StatusCode != 200 || len(res.body) == 0 {
			t.Fatalf("%s: %s", path, res.Status)
		}
		body := strings.NewReplacer("http://www.w3.org/2000/svg", "").Replace(res.body)
		for _, bad := range []string{"http://", "https://", "innerHTML", "eval(", "localStorage"} {
			if strings.Contains(body, bad) {
				t.Errorf("%s contains %s", path, bad)
			}
		}
	}
}
