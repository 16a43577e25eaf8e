// Command exec is the component that runs an ordinary program as a binary of its own. The node's binary holds the same component and starts it for every
// component with a manifest's run; this one is a pattern for an adapter of one's own.
package main

import "github.com/coppice-project/coppice/plugins/exec/component"

// version is set at build time: -ldflags "-X main.version=1.2.0".
var version = "1.0.0"

func main() { component.Run(version) }
