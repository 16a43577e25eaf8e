package components

// Limits of what a manifest may hold (style: put a limit on everything). Each is far above what people write and far below what would
// hurt a node that reads hostile input.
const (
	MaxManifestBytes = 1 << 20 // one register holds an application; the arbiter's entries stay small
	MaxDocuments     = 64      // applications deployed by one transaction
	MaxNodes         = 100_000 // YAML nodes, aliases expanded: no billion laughs
	MaxComponents    = 500     // an application
	MaxCount         = 1000    // instances of one component
	MaxProblems      = 100     // errors reported for one file
	MaxExpression    = 4096    // bytes of one CEL expression
	maxDepth         = 64      // nesting of YAML
)
