package gateway

import (
	"context"
	"encoding/base64"
	"log/slog"
	"os/exec"
	"strings"
	"testing"

	"connectrpc.com/connect"

	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

type control struct {
	apiv1connect.UnimplementedControlHandler
}

func (control) Status(context.Context, *apiv1.StatusRequest) (*apiv1.StatusResponse, error) {
	return &apiv1.StatusResponse{Cluster: "c1", Nodes: &apiv1.NodeCounts{Alive: 3}}, nil
}

func (control) Events(_ context.Context, r *apiv1.EventsRequest, s *connect.ServerStream[apiv1.Event]) error {
	for _, m := range []string{"one", strings.Repeat("ü", 40_000)} { // the second comes in several reads
		if err := s.Send(&apiv1.Event{Channel: r.Channel, Message: m}); err != nil {
			return err
		}
	}
	return api.Fail(connect.CodeUnavailable, "events", "the end", "")
}

// The script a browser would run, in Node.js where it is installed: the dashboard's client against a real gateway and control API.
const script = `
globalThis.sessionStorage = { v: null, getItem() { return this.v }, setItem(_, t) { this.v = t }, removeItem() { this.v = null } };
const real = fetch;
globalThis.fetch = (path, init) => { delete init.referrerPolicy; return real(process.env.BASE + path, init) };
const { call, stream, token, Refused } = await import(process.env.MODULE);
token.set("x".repeat(40));
try { await call("Status"); console.log("served a stranger") } catch (e) { console.log("refused", e instanceof Refused) }
token.set(process.env.TOKEN);
console.log((await call("Status")).nodes.alive);
try {
  for await (const e of stream("Events", { channel: "/x", follow: true })) console.log(e.channel, e.message.length);
} catch (e) { console.log(e.message) }
`

func TestDashboardsClient(t *testing.T) {
	node, err := exec.LookPath("node")
	if err != nil {
		t.Skip("Node.js is not installed")
	}
	const token = "0123456789abcdef0123456789abcdef"
	server, err := api.NewServer(api.Config{Control: control{}, Token: token, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	srv := gate(t, func(c *Config) { c.API = server.Handler() })
	cmd := exec.CommandContext(t.Context(), node, "--input-type=module", "-e", script)
	data := ask(t, srv, "GET", "/ui/api.js").body
	cmd.Env = append(cmd.Environ(), "BASE="+srv.URL, "TOKEN="+token, "MODULE=data:text/javascript;base64,"+base64.StdEncoding.EncodeToString([]byte(data)))
	out, err := cmd.CombinedOutput()
	if want := "refused true\n3\n/x 3\n/x 40000\nevents: the end\n"; err != nil || string(out) != want {
		t.Errorf("%v\n got %q\nwant %q", err, out, want)
	}
}
