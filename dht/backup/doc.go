// Package backup is the file of a backup: the arbiter's registers as of one entry of its log, and every content-addressed node that they name.
//
// The file is a line that says what it is ("coppice backup 1"), then length-delimited items (wire/v1/backup.proto): the header, the
// registers in order of their keys, the nodes, each behind those that it links to, and the end, with counts and the SHA-256 of everything
// before it. It is written and read in one pass, so its size is bounded by nothing but the disk. A reader takes nothing on trust: what is
// cut off, damaged, reordered, followed by more or of a newer format is an error that says which.
//
// A file that holds one component (coppice fork --export) is the same under another title, "coppice component 1": its registers are those of an application,
// an instance and an artifact.
//
// What it is not: it does not know what a register or a node means, nor which belong into a backup.
//
// Goroutines: none. Limits: maxItem for one item.
package backup
