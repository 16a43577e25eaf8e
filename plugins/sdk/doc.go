// Package sdk is what the author of a component imports. A component is a process that serves its own gRPC services, an HTTP interface, or both; the
// node round it starts and stops it, moves it, swaps its version, and restarts it elsewhere when its machine dies. What the component remembers survives
// all of that, and a call that was answered is neither lost nor done twice.
//
// This is a whole component (see plugins/counter for one with HTTP, docs/writing-a-component.md for the way there step by step):
//
//	func main() {
//		sdk.Serve(&sdk.Component{
//			Type:     "greeter",
//			Version:  version,
//			State:    &sdk.State{Schema: 1},
//			Register: func(r grpc.ServiceRegistrar) { greeterv1.RegisterGreeterServer(r, &greeter{}) },
//		})
//	}
//
//	func (g *greeter) Greet(ctx context.Context, req *greeterv1.GreetRequest) (*greeterv1.Greeting, error) {
//		tx, err := sdk.Tx(ctx)
//		if err != nil {
//			return nil, err
//		}
//		n := tx.Uint64("seen/"+req.GetName()) + 1
//		tx.PutUint64("seen/"+req.GetName(), n)
//		return &greeterv1.Greeting{Text: fmt.Sprintf("Hello %s, for the %d. time", req.GetName(), n)}, nil
//	}
//
// # State
//
// State is one ordered map from strings of any bytes to bytes. Each unary call and each HTTP request is one transaction over it: sdk.Tx(ctx) is that
// transaction, and everything it wrote becomes lasting together with the reply when the handler returns without an error. When it returns an error,
// panics, or answers an HTTP status of 400 or above, nothing of it has happened. An error is not remembered: if a refusal must be the same for a retry,
// put it into the reply message.
//
// Transactions are serializable. Those that may write run one at a time, from their first Tx to their end; those that cannot (a method with
// idempotency_level = NO_SIDE_EFFECTS, GET, HEAD, OPTIONS, TRACE) work on a version of their own and wait for nobody. So: mark your reads in the .proto,
// do slow things before Tx, and keep in Go variables only what can be computed again from the map.
//
// Streams are not transactions. In a stream, in Run and in OnStart use Instance.Update and Instance.View, one step each.
//
// # Retries
//
// A call with an idempotency key (metadata x-coppice-key, header Idempotency-Key; gates add one by themselves) leaves its reply behind, in the state. When
// the same key comes again, here or after a restore elsewhere, the reply is sent again and the handler does not run; two at once: the second waits. The
// same key with another request is refused (ABORTED, HTTP 422). Package state has the rules for how long a reply is kept.
//
// # Calling others
//
// Require declares a binding; make the generated client with it. Use the context of the call: then a call made through a binding carries a key derived
// from the key of the call that caused it, and a retry of that call, at this instance or another one of the component, makes the same calls with the same
// keys in whatever order retries come. Three rules follow. Calls to the same method are told apart by their order, so do not make them side by side
// (or name them: WithKey). A retried call should make the same requests as before; another request under the same key is refused. Time and randomness
// that go into a request belong into the caller's request, or into the state.
//
// In an Update there is no causing call; there the key is "<instance>/<n>", n counted in the state, so work that is lost in a crash and done again uses
// the same numbers. If what is done again is other work, the callee refuses the number once and the SDK goes on with the next: then the abandoned
// call's effect stays. Work that must not be doubled should be found in the state in a fixed order (a queue), or name its calls by WithKey.
//
// # Schemas and versions
//
// State.Schema is the author's number for what the keys and values mean. A version that writes something older ones cannot read raises it, lists the
// older schemas in State.Reads and turns them in State.Migrate. Going back from there needs an older version that lists the newer schema, or the
// checkpoint from before; the node knows both.
//
// # The process
//
// Serve speaks go-plugin's handshake (Handshake) on unix sockets in $PLUGIN_UNIX_SOCKET_DIR: gRPC on the socket that the handshake names, HTTP on the
// one in Status.info["http_socket"]. Stdout and stderr are the process's own: log to them freely. With $COPPICE_CREDENTIAL set every call must carry
// it. With $COPPICE_NODE_SOCKET set the process asks its node for a lease and ends itself (status 75) when no grant came in time: no orphan goes on acting.
// SIGINT is ignored, SIGTERM is a Stop. A panic in a handler is an error of its call.
//
// # What this package is not
//
// Not a framework for nodes: it imports plugins/contract and nothing else of the project, in particular neither libp2p nor a database. Not a way round the
// gate: without a node there is no lease, no binding and no event, and state is as lasting as the process.
//
// # Goroutines
//
// gRPC's and net/http's, one for each call. Per process: one keeps the lease and one asks for it, one serves HTTP, one runs Component.Run. Per Deltas
// stream: one watches for the stop.
//
// # Limits
//
// Messages, request bodies and remembered responses of 16 MiB; see package state for keys, values and tables. A transaction that holds the state for more
// than 60 s makes heartbeats say so. After Stop, streams have 3 s before they are cut.
package sdk
