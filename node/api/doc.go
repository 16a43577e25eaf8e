// Package api is everything round the control API of a node except its verbs: the server on a unix socket with its token file, the
// client, the errors, the JSON that scripts read, and how a command finds the only node that runs here (DESIGN.md §9).
//
// It is not the verbs: those implement apiv1connect.ControlHandler in package node. It knows nothing of members, instances or the
// arbiter.
//
// # Doors
//
// A request comes in by one of two doors. The token door (Server.Handler: the unix socket and /api/ of the gateway) wants the bearer
// token of <data>/api.token; a unix socket alone is not enough, because a component of the same user can connect to it. The peer door
// (Server.PeerHandler) is served on streams that the overlay has authenticated as a member's; it wants no token and marks the call as
// forwarded, so that a stale view cannot send a call round in circles.
//
// # Goroutines
//
// Serve runs one goroutine that waits for the end of its context, besides those of net/http. Everything else runs on the caller's.
//
// # Limits
//
// A message has at most MaxMessage bytes, a header MaxHeader; a unary call has at most MaxUnary, a pushed file MaxPush of time. A call
// is forwarded at most maxHops times.
package api
