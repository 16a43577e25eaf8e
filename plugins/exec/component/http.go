package component

import (
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"

	"github.com/coppice-project/coppice/plugins/contract/program"
)

// serveHTTP is the interface http of a program with a port: what comes through the membrane is passed on to that.
func (a *adapter) serveHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	target := &url.URL{Scheme: "http", Host: a.address()}
	a.mu.Unlock()
	if r.URL.Path == program.TunnelPath {
		a.tunnel(w, r, target.Host)
		return
	}
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

// tunnel makes the connection one to the program's port.
func (a *adapter) tunnel(w http.ResponseWriter, r *http.Request, target string) {
	if r.Header.Get("Upgrade") != program.TunnelProtocol {
		http.Error(w, "ask for an upgrade to "+program.TunnelProtocol, http.StatusUpgradeRequired)
		return
	}
	var d net.Dialer
	to, err := d.DialContext(r.Context(), "tcp", target)
	if err != nil {
		http.Error(w, "the program does not answer: "+err.Error(), http.StatusBadGateway)
		return
	}
	defer to.Close() //nolint:errcheck // both ends are over
	from, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	defer from.Close() //nolint:errcheck // both ends are over
	if _, err := buf.WriteString("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: " + program.TunnelProtocol + "\r\n\r\n"); err != nil || buf.Flush() != nil {
		return
	}
	join(to, from, buf)
}
