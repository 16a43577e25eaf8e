// Package components is the model: what an application, a component, an instance, a version, an ownership and a manifest are.
//
// It parses manifests (ParseManifests), names things (ComponentKey, InstanceName, ParseTarget), resolves artifact references
// (ResolveArtifact), lays what commands said over what the manifest says (Effective, Overlays), says which instances should exist
// (Expected), what the next ownership of an instance looks like (Takeover), and holds the one table of states (States).
//
// It is pure: no goroutine, no clock, no disk, no network. The same input gives the same output. It knows nothing of nodes beyond
// their id, name, zone and role; it neither places, starts nor stores anything.
//
// Goroutines: none. The CEL environment is built once, on first use, and is safe for concurrent use.
//
// Limits: a manifest file has at most MaxManifestBytes, MaxDocuments documents, MaxNodes YAML nodes after aliases are expanded,
// MaxComponents components an application and MaxCount instances a component; at most MaxProblems errors are reported. An expression
// has at most MaxExpression bytes, and its evaluation a cost limit.
package components
