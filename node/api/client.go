package api

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path/filepath"
	"strings"
	"time"

	"connectrpc.com/connect"

	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

// Target is where a node's control API is and what opens it.
type Target struct {
	Addr  string // unix:///path, https://host:port or http://loopback:port
	Token string // empty: for a unix socket, the token file beside it
}

// Dial makes a client. It does not connect: the first call does. Without a token it reads the token file beside a unix socket, or the
// one of the node on this machine that registered the address. Plain http is refused except to this machine: the token would cross the
// network in clear.
func Dial(t Target) (apiv1connect.ControlClient, error) {
	u, err := url.Parse(t.Addr)
	if err != nil || u.Scheme == "" {
		return nil, fmt.Errorf("address %q: want unix:///path, https://host:port or http://127.0.0.1:port", t.Addr)
	}
	tr := &http.Transport{MaxIdleConns: 4, IdleConnTimeout: time.Minute, TLSHandshakeTimeout: headerTimeout}
	base := ""
	switch u.Scheme {
	case "unix":
		base = "http://node"
		tr.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", u.Path)
		}
		if t.Token == "" {
			t.Token, err = ReadToken(filepath.Join(filepath.Dir(u.Path), TokenFile))
		}
	case "http", "https":
		if u.Host == "" {
			return nil, fmt.Errorf("address %q: there is no host in it", t.Addr)
		}
		if u.Scheme == "http" && !loopback(u.Hostname()) {
			return nil, fmt.Errorf("address %q: plain http is for this machine only, the token would cross the network in clear", t.Addr)
		}
		if u.Path == "" || u.Path == "/" {
			u.Path = "/api"
		}
		base = strings.TrimSuffix(u.String(), "/")
	default:
		return nil, fmt.Errorf("address %q: scheme %q is none of unix, https, http", t.Addr, u.Scheme)
	}
	if t.Token == "" && (err == nil || errors.Is(err, fs.ErrNotExist)) {
		if tok, ok := registeredToken(t.Addr); ok {
			t.Token, err = tok, nil
		}
	}
	if err != nil {
		return nil, err
	}
	hc := &http.Client{Transport: bearerTransport{next: tr, token: t.Token}}
	return apiv1connect.NewControlClient(hc, base, connect.WithReadMaxBytes(MaxMessage), connect.WithSendMaxBytes(MaxMessage)), nil
}

func loopback(host string) bool {
	if host == "localhost" || strings.HasSuffix(host, ".localhost") {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}

// registeredToken is the token of the node here whose registered addresses include addr.
func registeredToken(addr string) (string, bool) {
	entries, err := Registered()
	if err != nil {
		return "", false
	}
	for _, e := range entries {
		if e.API == addr || e.HTTP == addr {
			if tok, err := ReadToken(filepath.Join(e.Data, TokenFile)); err == nil {
				return tok, true
			}
		}
	}
	return "", false
}

type bearerTransport struct {
	next  http.RoundTripper
	token string
}

func (t bearerTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	if t.token != "" {
		r = r.Clone(r.Context())
		r.Header.Set("Authorization", "Bearer "+t.token)
	}
	return t.next.RoundTrip(r)
}
