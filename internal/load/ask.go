package load

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
	kvv1 "github.com/coppice-project/coppice/plugins/kv/v1"
	shopv1 "github.com/coppice-project/coppice/plugins/shop/v1"
)

// maxAnswer bounds what is read of an answer.
const maxAnswer = 8 << 20

// op is one operation of a client.
type op struct {
	kind     string
	cart     string
	isbn     string
	quantity uint32
	name     string // kv
	value    string
}

func (o op) write() bool { return o.kind == opAdd || o.kind == opOrder || o.kind == opPut }

// request is one attempt of an operation.
type request struct {
	op
	key     string // empty for reads
	low     uint64
	timeout time.Duration
}

// reply is what an attempt brought.
type reply struct {
	number uint64
	value  string
	node   string
}

// finalError is an answer that says no: repeating does not help.
type finalError struct{ why string }

func (e *finalError) Error() string { return e.why }

// asker sends one attempt to one gateway. Any error but a *finalError is worth another attempt elsewhere.
type asker interface {
	ask(ctx context.Context, gw int, r request) (reply, error)
}

// webAsker asks the bookshop's web tier.
type webAsker struct {
	client   *http.Client
	gateways []Gateway
	app      string
}

func newHTTPClient(conns int) *http.Client {
	d := &net.Dialer{Timeout: time.Second, KeepAlive: -1}
	return &http.Client{Transport: &http.Transport{
		DialContext: d.DialContext, MaxIdleConnsPerHost: conns, IdleConnTimeout: time.Minute, DisableCompression: true,
	}}
}

func (a *webAsker) ask(ctx context.Context, gw int, r request) (reply, error) {
	method, path, body := http.MethodPost, "", any(nil)
	switch r.kind {
	case opAdd:
		path, body = "/carts/"+r.cart+"/lines", map[string]any{"isbn": r.isbn, "quantity": r.quantity}
	case opOrder:
		path = "/carts/" + r.cart + "/order"
	case opBook:
		method, path = http.MethodGet, "/books/"+r.isbn
	}
	out, err := a.send(ctx, method, gw, path, body, r)
	if err != nil || r.kind != opOrder {
		return reply{}, err
	}
	order := &shopv1.Order{}
	if err := decode(out, order); err != nil {
		return reply{}, err
	}
	return reply{number: order.GetNumber()}, nil
}

func (a *webAsker) send(ctx context.Context, method string, gw int, path string, body any, r request) ([]byte, error) {
	raw := []byte(nil)
	if body != nil {
		var err error
		if raw, err = json.Marshal(body); err != nil {
			return nil, &finalError{err.Error()}
		}
	}
	req, err := http.NewRequestWithContext(ctx, method, a.gateways[gw].HTTP+"/app/"+a.app+path, bytes.NewReader(raw))
	if err != nil {
		return nil, &finalError{err.Error()}
	}
	req.Header.Set("Accept", "application/json")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if r.key != "" {
		req.Header.Set("Idempotency-Key", r.key)
		req.Header.Set("Idempotency-Low-Water", fmt.Sprint(r.low))
	}
	resp, err := a.client.Do(req)
	if err != nil {
		return nil, err
	}
	out, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	err = errors.Join(err, resp.Body.Close())
	if err != nil {
		return nil, err
	}
	if resp.StatusCode < 300 {
		return out, nil
	}
	why := fmt.Sprintf("%s: %s", resp.Status, strings.TrimSpace(string(out)))
	switch {
	case resp.StatusCode == http.StatusBadRequest, resp.StatusCode == http.StatusUnprocessableEntity, resp.StatusCode == http.StatusConflict && saysNo(why):
		return nil, &finalError{why}
	}
	return nil, errors.New(why)
}

// saysNo tells the store's own refusals from the platform's, which have the same code.
func saysNo(why string) bool {
	return strings.Contains(why, "copies of") || strings.Contains(why, "is empty") || strings.Contains(why, "at version")
}

// apiAsker calls components through the control API. It is used by one client at a time.
type apiAsker struct {
	gateways  []Gateway
	component string
	clients   []apiv1connect.ControlClient // by gateway, dialled when needed
}

func newAPIAsker(gateways []Gateway, component string) *apiAsker {
	return &apiAsker{gateways, component, make([]apiv1connect.ControlClient, len(gateways))}
}

func (a *apiAsker) ask(ctx context.Context, gw int, r request) (reply, error) {
	method, in, out := "", proto.Message(nil), proto.Message(nil)
	switch r.kind {
	case opAdd:
		method, in, out = "shop.v1.Store/AddLine", &shopv1.SetLineRequest{Cart: r.cart, Isbn: r.isbn, Quantity: r.quantity}, &shopv1.Cart{}
	case opOrder:
		method, in, out = "shop.v1.Store/PlaceOrder", &shopv1.CartRequest{Cart: r.cart}, &shopv1.Order{}
	case opBook:
		method, in, out = "shop.v1.Store/GetBook", &shopv1.GetBookRequest{Isbn: r.isbn}, &shopv1.Book{}
	case opPut:
		method, in, out = "kv.v1.KV/Put", &kvv1.PutRequest{Key: r.name, Value: r.value}, &kvv1.PutReply{}
	case opGet:
		method, in, out = "kv.v1.KV/Get", &kvv1.GetRequest{Key: r.name}, &kvv1.Pair{}
	}
	node, err := a.call(ctx, gw, method, in, out, r.key, r.timeout)
	if err != nil {
		return reply{}, err
	}
	rep := reply{node: node}
	switch m := out.(type) {
	case *shopv1.Order:
		rep.number = m.GetNumber()
	case *kvv1.PutReply:
		rep.number = m.GetVersion()
	case *kvv1.Pair:
		rep.number, rep.value = m.GetVersion(), m.GetValue()
	}
	return rep, nil
}

// call calls a method of the component and returns the name of the node that answered.
func (a *apiAsker) call(ctx context.Context, gw int, method string, in, out proto.Message, key string, timeout time.Duration) (string, error) {
	if a.clients[gw] == nil {
		c, err := api.Dial(api.Target{Addr: a.gateways[gw].API})
		if err != nil {
			return "", err
		}
		a.clients[gw] = c
	}
	raw, err := protojson.Marshal(in)
	if err != nil {
		return "", &finalError{err.Error()}
	}
	res, err := a.clients[gw].Call(ctx, &apiv1.CallRequest{
		Component: a.component, Method: method, Json: string(raw), IdempotencyKey: key, TimeoutMs: uint64(timeout.Milliseconds()),
	})
	if err != nil {
		if connect.CodeOf(err) == connect.CodeUnauthenticated {
			a.clients[gw] = nil // the node was started again with another token
		}
		return "", classify(err)
	}
	return res.GetNode(), decode([]byte(res.GetJson()), out)
}

// classify says which errors of a call are an answer.
func classify(err error) error {
	why := err.Error()
	if p, ok := api.ProblemOf(err); ok {
		why = p.GetWhy()
	}
	switch connect.CodeOf(err) {
	case connect.CodeInvalidArgument, connect.CodeUnimplemented, connect.CodePermissionDenied, connect.CodeDataLoss:
		return &finalError{why}
	case connect.CodeFailedPrecondition, connect.CodeAborted:
		if saysNo(why) {
			return &finalError{why}
		}
	case connect.CodeNotFound:
		if strings.Contains(why, "no key") {
			return &finalError{why}
		}
	}
	return fmt.Errorf("%s: %s", connect.CodeOf(err), why)
}

func decode(raw []byte, m proto.Message) error {
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(raw, m); err != nil {
		return fmt.Errorf("an answer that cannot be read: %w: %.200s", err, raw)
	}
	return nil
}
