// Command counter is the smallest component with state: one number, by gRPC and by HTTP. It is meant to be read first; docs/writing-a-component.md
// goes through it line by line.
package main

import (
	"cmp"
	"context"
	"fmt"
	"net/http"
	"strconv"

	"google.golang.org/grpc"

	counterv1 "github.com/coppice-project/coppice/plugins/counter/v1"
	"github.com/coppice-project/coppice/plugins/sdk"
)

// version is set at build time: -ldflags "-X main.version=1.2.0".
var version = "1.0.0"

func main() { sdk.Serve(component()) }

func component() *sdk.Component {
	c := &counter{}
	return &sdk.Component{
		Type:     "counter",
		Version:  version,
		State:    &sdk.State{Schema: 1, Merge: merge},
		Register: func(r grpc.ServiceRegistrar) { counterv1.RegisterCounterServer(r, c) },
		HTTP:     c,
	}
}

// merge brings two counts together that went on from the same one, on both sides of a cut: what was added on either side counts.
func merge(base, ours, theirs, into *sdk.Txn) error {
	into.PutUint64("value", ours.Uint64("value")+theirs.Uint64("value")-base.Uint64("value"))
	return nil
}

type counter struct {
	counterv1.UnimplementedCounterServer
}

// Add and Get are the gRPC interface. Each call is one transaction with its reply.
func (c *counter) Add(ctx context.Context, req *counterv1.AddRequest) (*counterv1.Value, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	value := int64(tx.Uint64("value")) + req.GetN()
	tx.PutUint64("value", uint64(value))
	return &counterv1.Value{Value: value}, nil
}

func (c *counter) Get(ctx context.Context, _ *counterv1.GetRequest) (*counterv1.Value, error) {
	tx, err := sdk.Tx(ctx)
	if err != nil {
		return nil, err
	}
	return &counterv1.Value{Value: int64(tx.Uint64("value"))}, nil
}

// ServeHTTP is the HTTP interface: GET / answers the value, POST /?n=1 adds to it. A request is a transaction too.
func (c *counter) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	value, err := c.handle(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	_, epoch := sdk.Token(r.Context())
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Version", sdk.From(r.Context()).Version())
	w.Header().Set("X-Epoch", strconv.FormatUint(epoch, 10))
	fmt.Fprintln(w, value.GetValue())
}

func (c *counter) handle(r *http.Request) (*counterv1.Value, error) {
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		return c.Get(r.Context(), nil)
	case http.MethodPost:
		n, err := strconv.ParseInt(cmp.Or(r.URL.Query().Get("n"), "1"), 10, 64)
		if err != nil {
			return nil, fmt.Errorf("n=%q is not a number", r.URL.Query().Get("n"))
		}
		return c.Add(r.Context(), &counterv1.AddRequest{N: n})
	}
	return nil, fmt.Errorf("%s is not GET or POST", r.Method)
}
