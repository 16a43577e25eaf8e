// Package membrane is the control surface round one instance of a component, and the way of calls between instances.
//
// A Membrane stands round each instance on this node. Its gate is what every call passes, as undecoded frames: it holds calls back while the
// process behind it is replaced, counts those inside, gives an answer only when the journal mark it depends on is committed, and gives
// none when the instance is not this node's any more. Round the gate lie the controllers: lifecycle (Start, Freeze, Thaw, Detach), attributes,
// bindings, state (Checkpoint, Restore, CopyState) and introspection.
//
// A Router is the caller's side, one per node: it finds where a target is served, in this process or through one connection to another
// node's gate, and keeps a call alive over the death, replacement or move of its instance when that is safe: when it never left,
// when its method is idempotent, or when the component keeps answers by key, for which the router makes keys up.
//
// It is not a supervisor: it starts no process, claims nothing and saves nothing. The supervisor replaces a process by
//
//	next := m.Prepare(proc, desc)      // beside the old one, without calls
//	CopyState(ctx, old, next, 0) …     // while the old one serves, as long as deltas shrink
//	m.StartBackend(ctx, next, request)
//	m.Hold("swap"); m.Drain(ctx)       // calls wait; those inside end
//	CopyState(ctx, old, next, mark)    // the last delta
//	m.Switch(next, token); m.Release() // or, before the claim, Release to go on with the old one
//	m.Retire(ctx, old, grace, streams)
//
// # What a failed call means
//
// Untouched: the component has not seen it; it is asked again until the deadline. In doubt: it may have run and its answer is lost (the
// process died, the answer was discarded); it is asked again only when that is safe. Everything else is the component's own answer.
// Between nodes this travels in the trailer x-coppice-retry, redirects in x-coppice-moved.
//
// # Invariants
//
// A call is counted before the gate is looked at again, so that a drain that saw zero cannot be overtaken. An answer is given only after:
// its mark is committed, the lease holds, no newer epoch is known. Marks belong to one process and are never compared with another's.
// A key is never used twice, and no key in use lies below the low-water mark that is sent.
//
// # Goroutines
//
// Per watched process: one waits for its end, one asks for heartbeats. Per streaming call: one passes the caller's messages on. Per
// repeatable call to another node: one watches the route. Per node socket: gRPC's own.
//
// # Limits
//
// 10,000 calls held per gate; messages of 64 MiB; request bodies of 1 MiB kept to be asked again over HTTP; 10 s for calls without a
// deadline; 256 methods counted one by one. Messages within a stream are not held back for their marks, only its status is.
package membrane
