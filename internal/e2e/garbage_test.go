package e2e

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	"github.com/coppice-project/coppice/internal/cluster"
	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// garbage is what strangers send.
func garbage() map[string][]byte {
	random := make([]byte, 64<<10)
	rand.Read(random) // never fails
	return map[string][]byte{
		"nothing": nil, "zeros": make([]byte, 4096), "random": random, "text": []byte("GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
		"half a line": []byte("POST /coppice.api.v1.Control/Status HTTP/1.1\r\nContent-Le"), "multistream": []byte("\x13/multistream/1.0.0\n\x05/foo\n"),
		"a huge length": []byte("\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01"), "tls": []byte("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
		"http2": []byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\xff\xff\x04\x00\x00\x00\x00\x00"),
	}
}

// spit sends bytes to an address, twice from new connections, and reads what comes until the other side closes or says nothing more.
func spit(network, addr string, content []byte) error {
	for range 2 {
		c, err := net.DialTimeout(network, addr, 5*time.Second)
		if err != nil {
			return err
		}
		if err := c.SetDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
			return err
		}
		if _, err := c.Write(content); err == nil {
			_, _ = io.Copy(io.Discard, c) // what it says is its own affair
		}
		_ = c.Close() // the other side may have closed it
	}
	return nil
}

// member is where a node listens for other members, host:port.
func (g *grove) member(n *cluster.Node) string {
	g.t.Helper()
	res, err := g.api(n).Nodes(g.t.Context(), &apiv1.NodesRequest{Node: n.Name})
	must(g.t, err)
	for _, a := range res.GetNodes()[0].GetAddrs() {
		if parts := strings.Split(a, "/"); len(parts) > 4 && parts[1] == "ip4" && parts[3] == "tcp" {
			return net.JoinHostPort(parts[2], parts[4])
		}
	}
	g.t.Fatalf("%s listens nowhere: %v", n.Name, res)
	return ""
}

// Garbage on any port of a node: the node goes on, serves its component, does not crash, and says it once.
func TestGarbageOnEveryPort(t *testing.T) {
	g := plant(t, 2)
	n1, n2 := g.Nodes[0], g.Nodes[1]
	g.push(n1, component(t, "counter", "1.0.0"))
	g.deploy(n1, counterApp)
	g.counted(n1, 2)
	lines := g.logged(n1, "level=")
	doors := []struct{ network, addr string }{
		{"tcp", g.member(n1)}, {"tcp", strings.TrimPrefix(n1.HTTP, "http://")}, {"unix", strings.TrimPrefix(n1.API, "unix://")},
	}
	var all sync.WaitGroup
	for _, d := range doors {
		for what, content := range garbage() {
			all.Go(func() {
				if err := spit(d.network, d.addr, content); err != nil {
					t.Errorf("%s to %s: %v", what, d.addr, err)
				}
			})
		}
	}
	all.Wait()
	if more := g.logged(n1, "level=") - lines; more > 30 {
		t.Errorf("%d lines in the log for %d connections", more, 2*len(doors)*len(garbage()))
	}
	for _, w := range []string{"panic", "goroutine ", "level=ERROR"} {
		if c := g.logged(n1, w); c > 0 {
			t.Errorf("%d lines with %q in the log", c, w)
		}
	}
	if len(g.Alive()) != 2 {
		t.Fatal("a node ended")
	}
	for _, n := range []*cluster.Node{n1, n2} {
		g.shows(n, 2)
	}
	if a := g.nodesInState(n2, "alive"); len(a) != 2 {
		t.Errorf("alive: %v", a)
	}
}

// Without the token nobody commands a node: neither at its socket nor at its gateway.
func TestTokenOfTheControlAPI(t *testing.T) {
	g := plant(t, 1)
	n1 := g.Nodes[0]
	for _, addr := range []string{n1.API, n1.HTTP} {
		c, err := api.Dial(api.Target{Addr: addr, Token: "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"})
		must(t, err)
		_, err = c.Status(t.Context(), &apiv1.StatusRequest{})
		if connect.CodeOf(err) != connect.CodeUnauthenticated {
			t.Errorf("a wrong token at %s: %v", addr, err)
		}
		stream, err := c.Events(t.Context(), &apiv1.EventsRequest{})
		if err == nil {
			stream.Receive()
			err = errors.Join(stream.Err(), stream.Close())
		}
		if connect.CodeOf(err) != connect.CodeUnauthenticated {
			t.Errorf("a wrong token at %s, a stream: %v", addr, err)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, n1.HTTP+"/api/coppice.api.v1.Control/Down", strings.NewReader(`{"all":true}`))
	must(t, err)
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	must(t, err)
	must(t, resp.Body.Close())
	if resp.StatusCode != http.StatusUnauthorized {
		t.Errorf("down without a token: %s", resp.Status)
	}
	g.wait("the node to go on", func(ctx context.Context) error {
		st, err := g.status(ctx, n1)
		if err == nil && st.GetArbiter().GetLeader() == "" {
			err = fmt.Errorf("%v", st)
		}
		return err
	})
	r := g.exec(g.Command("--api", n1.HTTP, "--token", "wrong", "status"))
	if r.code != 1 || !strings.HasPrefix(r.err, "coppice: ") {
		t.Errorf("the command line with a wrong token: %d %s", r.code, r.err)
	}
}
