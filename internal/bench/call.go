package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"time"

	"github.com/coppice-project/coppice/components/runner"
	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

const (
	callWarm = 500
	callEach = 2000 // calls of a sample, one after the other
)

const callManifest = `application: bench
components:
  - name: counter
    artifact: %s
    durable: on-demand
    expose: {http: /}
`

// call reads a counter by HTTP: through a node's gateway and gate, and straight from the socket of a process that the benchmark started.
func call(ctx context.Context, cfg Config) (_ []Result, err error) {
	s, err := newStand(ctx, cfg, 1)
	defer func() { err = s.end(err) }()
	if err != nil {
		return nil, err
	}
	path := filepath.Join(s.dir, "bench.yaml")
	if err := os.WriteFile(path, fmt.Appendf(nil, callManifest, cfg.file("components/counter")), 0o600); err != nil {
		return nil, err
	}
	n1 := s.cluster.Nodes[0]
	if err := s.cluster.Coppice(ctx, n1, nil, "deploy", path, "--wait"); err != nil {
		return nil, err
	}
	bare, err := startBare(ctx, cfg, "counter")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, bare.end()) }()
	direct, err := bare.http()
	if err != nil {
		return nil, err
	}
	gate := &http.Client{Transport: &http.Transport{DialContext: func(_ context.Context, _, addr string) (net.Conn, error) {
		return s.cluster.Network.Dial(addr)
	}}}
	var through, straight []float64
	for i := range cfg.Runs + 1 { // in turns; the first warms up
		a, err := each(ctx, gate, n1.HTTP+"/app/bench/", "", callCount(i))
		if err != nil {
			return nil, err
		}
		b, err := each(ctx, direct, "http://component/", bare.credential(), callCount(i))
		if err != nil {
			return nil, err
		}
		if i > 0 {
			through, straight = append(through, a), append(straight, b)
			cfg.say("run %d of %d: %.1f µs through the gateway, %.1f µs straight", i, cfg.Runs, a, b)
		}
	}
	return []Result{
		summary("GET through gateway and gate, one caller", "µs", through).against("the same component's socket", straight),
	}, nil
}

func callCount(sample int) int {
	if sample == 0 {
		return callWarm
	}
	return callEach
}

// each returns the mean time of a call in µs.
func each(ctx context.Context, c *http.Client, url, credential string, n int) (float64, error) {
	begin := time.Now()
	for range n {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return 0, err
		}
		if credential != "" {
			req.Header.Set(componentv1.HeaderCredential, credential)
		}
		resp, err := c.Do(req)
		if err != nil {
			return 0, err
		}
		body, err := io.ReadAll(resp.Body)
		if err = errors.Join(err, resp.Body.Close()); err != nil {
			return 0, err
		}
		if resp.StatusCode != http.StatusOK {
			return 0, fmt.Errorf("GET %s: %s: %s", url, resp.Status, body)
		}
	}
	return float64(time.Since(begin).Nanoseconds()) / 1000 / float64(n), nil
}

// bare is a component's process without a node.
type bare struct {
	dir    string
	proc   runner.Process
	took   time.Duration // until it said that it serves
	socket string        // of its http interface; empty: none
}

// startBare starts a component as a node does, and nothing else.
func startBare(ctx context.Context, cfg Config, name string) (_ *bare, err error) {
	b := &bare{}
	if b.dir, err = os.MkdirTemp("", "cop"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("start a bare %s: %w", name, err), b.end())
		}
	}()
	r, err := runner.New(runner.Config{})
	if err != nil {
		return nil, err
	}
	begin := time.Now()
	b.proc, err = r.Start(ctx, runner.Spec{
		Instance: "bench/bare-0", Exec: runner.ExecFile{Path: cfg.file("components/" + name)}, RunDir: filepath.Join(b.dir, "r"), LogDir: filepath.Join(b.dir, "l"),
		Sandbox: runner.Sandbox{Off: true},
	})
	if err != nil {
		return nil, err
	}
	st, err := componentv1.NewComponentClient(b.proc.Conn()).Start(ctx, &componentv1.StartRequest{
		Instance: "bench/bare-0", Version: "1.0.0", Token: &componentv1.Token{Incarnation: 1, Epoch: 1}, Attributes: &componentv1.Attributes{},
	})
	b.took, b.socket = time.Since(begin), st.GetInfo()[componentv1.InfoHTTPSocket]
	return b, err
}

func (b *bare) credential() string { return b.proc.Ident().Credential }

// http is a client of its http socket.
func (b *bare) http() (*http.Client, error) {
	if b.socket == "" {
		return nil, errors.New("the component has no http socket")
	}
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", b.socket)
	}}}, nil
}

func (b *bare) end() error {
	var err error
	if b.proc != nil {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		err = b.proc.Stop(ctx, 0)
	}
	return errors.Join(err, os.RemoveAll(b.dir))
}

// bareStarts measures the start of a component's process alone, in ms.
func bareStarts(ctx context.Context, cfg Config, name string) ([]float64, error) {
	var out []float64
	for range cfg.Runs {
		b, err := startBare(ctx, cfg, name)
		if err != nil {
			return nil, err
		}
		out = append(out, ms(b.took))
		if err := b.end(); err != nil {
			return nil, err
		}
	}
	return out, nil
}
