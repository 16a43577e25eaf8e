// Command placement is the component system/placement as a binary of its own. The node's binary holds the same component; this one is a
// pattern for a solver of one's own.
package main

import "github.com/coppice-project/coppice/plugins/placement/component"

// version is set at build time: -ldflags "-X main.version=1.2.0".
var version = "1.0.0"

func main() { component.Run(version) }
