// Package componentv1 is the contract between a node and a component process: the generated messages and services of component.proto, and in this file
// the names that both ends must agree on besides (environment, metadata, headers). An SDK of another language copies them. All of it is wire-stable: only
// add, never give a name or number a second meaning. The package starts no goroutines and holds no state.
package componentv1

// The go-plugin handshake: a component checks that CookieKey=CookieValue is in its environment and answers with ProtocolVersion.
const (
	ProtocolVersion = 1
	CookieKey       = "COPPICE_COMPONENT"
	CookieValue     = "component.v1"
	PluginName      = "component" // the name under which a stock go-plugin client dispenses it
)

// Environment of a component process, besides go-plugin's own (PLUGIN_UNIX_SOCKET_DIR, PLUGIN_UNIX_SOCKET_GROUP, PLUGIN_PROTOCOL_VERSIONS).
const (
	EnvCredential = "COPPICE_CREDENTIAL"  // random per start; every call in either direction carries it. Empty: not started by a node, nothing is asked
	EnvNodeSocket = "COPPICE_NODE_SOCKET" // path of the unix socket that serves Node and the bindings. Empty: no node, no lease, no bindings
)

// Metadata of a gRPC call (request headers, unless it says trailer).
const (
	MetaCredential = "x-coppice-credential" // the process's credential
	MetaBinding    = "x-binding"            // component -> node: the required interface that is called
	MetaTarget     = "x-coppice-target"     // app/name or app/name-0
	MetaCaller     = "x-coppice-caller"     // the calling instance, or a client's name
	MetaKey        = "x-coppice-key"        // idempotency key: "<caller>/<n>" with n decimal and increasing, or any other text of a client
	MetaLow        = "x-coppice-low"        // decimal: every key of this caller with a smaller n is answered and will not be asked again
	MetaToken      = "x-coppice-token"      // "incarnation.epoch"
	MetaShard      = "x-shard-key"          // which instance of several
	MetaMark       = "x-coppice-mark"       // trailer, decimal: the journal mark this answer depends on
	MetaMoved      = "x-coppice-moved"      // trailer, "incarnation.epoch.node", with UNAVAILABLE: ask there
	MetaKeyReused  = "x-coppice-key-reused" // trailer, "1", with ABORTED: the key was answered before, for a different request
)

// The same for an interface of KIND_HTTP: request headers, and one response header that the gate takes off.
const (
	HeaderCredential = "X-Coppice-Credential"
	HeaderCaller     = "X-Coppice-Caller"
	HeaderToken      = "X-Coppice-Token"
	HeaderKey        = "Idempotency-Key"
	HeaderLow        = "Idempotency-Low-Water"
	HeaderMark       = "X-Coppice-Mark" // response
)

// Features a component may announce in Description.features.
const (
	FeatureTxnCalls    = "txn-calls"   // each call is one transaction with its reply; trailer x-coppice-mark
	FeatureDeltas      = "deltas"      // Deltas streams journal entries as they are written
	FeatureIncremental = "incremental" // Checkpoint honours since_mark
	FeatureMerge       = "merge"       // Merge brings two states with a common base together
)

// Sections of a StateFrame that the SDKs write. An opaque component may use others of its own.
const (
	SectionHeader  = ""
	SectionMap     = "map"
	SectionDedupe  = "dedupe"
	SectionJournal = "journal"
	SectionEnd     = "end"
)

// Keys of Status.info.
const (
	InfoHTTPSocket = "http_socket"
	InfoListen     = "listen" // host:port where what the component runs listens by itself, beside the gate
	InfoMark       = "mark"   // decimal: the newest mark of the journal; with txn-calls messages of streams wait until it is committed
)

// ExitLeaseLapsed is the exit status of a component that ended itself because no node granted it its lease.
const ExitLeaseLapsed = 75

// ExitProgramEnded is the exit status of a component that ran a program which has ended of itself; the last line of its output says how.
const ExitProgramEnded = 76
