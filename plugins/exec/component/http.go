package component

import (
	"net/http"
	"net/http/httputil"
	"net/url"
)

// serveHTTP is the interface http of a program with a port: what comes through the membrane is passed on to that.
func (a *adapter) serveHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	target := &url.URL{Scheme: "http", Host: a.address()}
	a.mu.Unlock()
	proxy := &httputil.ReverseProxy{
		Rewrite: func(p *httputil.ProxyRequest) {
			p.SetURL(target)
			p.Out.Host = p.In.Host
			p.Out.Header["X-Forwarded-For"] = p.In.Header["X-Forwarded-For"]
			p.SetXForwarded()
		},
		ErrorHandler: func(w http.ResponseWriter, _ *http.Request, err error) {
			http.Error(w, "the program does not answer: "+err.Error(), http.StatusBadGateway)
		},
	}
	proxy.ServeHTTP(w, r)
}
