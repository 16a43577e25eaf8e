// Command coppice is the node, its client and the demo in one static binary. Each command lives in a file of its own; what they share
// is in cli.go (the command tree and its flags), output.go and table.go (what is printed), fail.go (how a command ends) and target.go
// (which node is asked).
//
// What a user or a script may rely on: exit status 0 done, 1 failed, 2 wrong usage; results on stdout, everything else on stderr;
// errors in one line with, where one exists, a second that says what to try.
//
// Goroutines: none but those of the libraries; `up` runs a node.
package main
