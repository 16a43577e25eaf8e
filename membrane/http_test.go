package membrane

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/coppice-project/coppice/components/runner/runnertest"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

func TestHTTP(t *testing.T) {
	p, m := newPair(t, Config{})
	for name, h := range map[string]http.Handler{"local": p.r.HTTP("test/counter"), "remote": p.r2.HTTP("test/counter")} {
		t.Run(name, func(t *testing.T) {
			srv := httptest.NewServer(h)
			defer srv.Close()
			before := m.Stats()
			// The same key twice is one effect.
			post := func() string {
				req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, srv.URL+"/?n=5", strings.NewReader("body"))
				if err != nil {
					t.Fatal(err)
				}
				req.Header.Set("Idempotency-Key", "once-"+name)
				resp, err := http.DefaultClient.Do(req)
				if err != nil {
					t.Fatal(err)
				}
				defer resp.Body.Close()
				b, err := io.ReadAll(resp.Body)
				if err != nil || resp.StatusCode != 200 || resp.Header.Get("X-Version") != "1.0" {
					t.Fatal(resp.Status, string(b), err)
				}
				for k := range resp.Header {
					if strings.HasPrefix(k, "X-Coppice") {
						t.Errorf("%s leaked", k)
					}
				}
				return string(b)
			}
			if a, b := post(), post(); a != b {
				t.Fatalf("one key, two effects: %s and %s", a, b)
			}
			// Server-sent events come one by one.
			resp, err := http.Get(srv.URL + "/events")
			if err != nil {
				t.Fatal(err)
			}
			b, err := io.ReadAll(resp.Body)
			resp.Body.Close()
			if err != nil || strings.Count(string(b), "data:") != 3 {
				t.Fatal(string(b), err)
			}
			upgradeThrough(t, srv.Listener.Addr().String())
			eventually(t, "nothing is left inside", func() bool { s := m.Stats(); return s.InFlight == 0 && s.Streams == 0 })
			if after := m.Stats(); after.Calls != before.Calls+4 {
				t.Errorf("calls: %d, want %d", after.Calls, before.Calls+4)
			}
		})
	}
}

func upgradeThrough(t *testing.T, addr string) {
	t.Helper()
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	fmt.Fprint(conn, "GET /upgrade HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
	br := bufio.NewReader(conn)
	resp, err := http.ReadResponse(br, nil)
	if err != nil || resp.StatusCode != http.StatusSwitchingProtocols {
		t.Fatal(resp, err)
	}
	fmt.Fprint(conn, "hello")
	buf := make([]byte, 5)
	if _, err := io.ReadFull(br, buf); err != nil || string(buf) != "hello" {
		t.Fatal(string(buf), err)
	}
}

// Garbage on any socket is dropped, and the next caller is served.
func TestGarbageOnSockets(t *testing.T) {
	p, _ := newPair(t, Config{})
	s, err := p.r.ServeNode(p.r.Local(instance), NodeSocketConfig{Path: filepath.Join(p.dir, "n")})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, path := range []string{filepath.Join(p.dir, "n"), p.r.Local(instance).Backend().Process().Ident().Socket} {
		for _, junk := range []string{"\x00\xff\xfe", "GET / HTTP/1.1\r\n\r\n", strings.Repeat("A", 1<<16), "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff"} {
			conn, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			conn.Write([]byte(junk)) //nolint:errcheck // it may hang up at once
			conn.Close()
		}
	}
	if _, err := addVia(within(t, 5*time.Second), p.r2, 1); err != nil {
		t.Fatal(err)
	}
	for _, tok := range []string{"x", "1", "1.x", "-1.2"} {
		ctx := with(within(t, time.Second), componentv1.MetaTarget, instance, componentv1.MetaToken, tok)
		conn, err := p.net.Conn(ctx, "n1")
		if err != nil {
			t.Fatal(err)
		}
		if err := conn.Invoke(ctx, runnertest.Get, &emptypb.Empty{}, &wrapperspb.Int64Value{}); status.Code(err) != codes.InvalidArgument {
			t.Errorf("token %q: %v", tok, err)
		}
	}
}
