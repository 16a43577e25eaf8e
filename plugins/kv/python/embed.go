// Package python holds the sources of the key-value component in Python (docs/writing-a-component.md, "Another language"), of which `coppice new` makes new ones.
package python

import "embed"

// Files are the sources.
//
//go:embed *.py
var Files embed.FS
