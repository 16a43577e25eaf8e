package api

import (
	"context"
	"fmt"
	"net/http"
	"strconv"

	"connectrpc.com/connect"

	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

// maxHops bounds how often a call is forwarded: to the owner, and once more when the owner has just changed.
const maxHops = 2

// hopHeader counts how often a call was forwarded.
const hopHeader = "Coppice-Hops"

// Peers reaches the control APIs of other nodes.
type Peers interface {
	// Transport carries requests to the PeerHandler of a node, named by its id. It must authenticate that node and be safe for
	// concurrent use; failing to reach it is an error of the round trip.
	Transport(node string) http.RoundTripper
}

type doorKey struct{}

// door is how a request came in.
type door struct {
	from string // the member that forwarded it; empty: a client with the token
	hops int
}

func doorOf(ctx context.Context) door {
	d, _ := ctx.Value(doorKey{}).(door)
	return d
}

// ForwardedFrom is the member that forwarded the call being served, or "" for a client's own.
func ForwardedFrom(ctx context.Context) string { return doorOf(ctx).from }

func hopsOf(h http.Header) int {
	n, err := strconv.Atoi(h.Get(hopHeader))
	if err != nil || n < 1 { // it came through the peer door: at least one
		return 1
	}
	return n
}

// Forward returns a client of another node's verbs for the call being served in ctx: a verb about an instance that node owns is its to
// answer. It refuses when the call has already gone from node to node maxHops times: the views of two nodes then disagree about the
// owner, which passes by itself. Deadlines travel with the context; errors come back with their code and Problem.
func Forward(ctx context.Context, peers Peers, node string) (apiv1connect.ControlClient, error) {
	hops := doorOf(ctx).hops
	if hops >= maxHops {
		return nil, Fail(connect.CodeUnavailable, "forward the call", fmt.Sprintf("nodes disagree about who owns it now (%d hops)", hops), "the same command again")
	}
	return NewPeerClient(peers, node, hops+1), nil
}

// NewPeerClient makes a client of a node's verbs through its peer door, outside any call that is being served: hops is 1 then.
func NewPeerClient(peers Peers, node string, hops int) apiv1connect.ControlClient {
	rt := hopTransport{next: peers.Transport(node), hops: strconv.Itoa(hops)}
	return apiv1connect.NewControlClient(&http.Client{Transport: rt}, "http://peer",
		connect.WithReadMaxBytes(MaxMessage), connect.WithSendMaxBytes(MaxMessage))
}

type hopTransport struct {
	next http.RoundTripper
	hops string
}

func (t hopTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.Header.Set(hopHeader, t.hops)
	return t.next.RoundTrip(r)
}

// Relay copies a stream that another node answers to the client of the call being served, until it ends.
func Relay[T any](from *connect.ServerStreamForClient[T], to *connect.ServerStream[T]) error {
	for from.Receive() {
		if err := to.Send(from.Msg()); err != nil {
			return err // the client went; the request's context ends the other side
		}
	}
	if err := from.Err(); err != nil {
		return err
	}
	return from.Close()
}
