// Package component is exec, the component that runs an ordinary program: one that knows nothing of this platform. Its state is a folder. The node's binary
// runs it as `coppice __component exec` for a manifest's run; plugins/exec is the same as a process of its own.
//
// The program is started in the process group of the component, so that whatever ends the component ends it, too; the kernel ends it with the component in any
// case, and what it starts stays below the component, whatever session it makes for itself. The end of the program is the end of the component. When the
// component's lease lapses, everything below it is killed before it ends itself.
//
// # A snapshot
//
// The hook quiesce is run, every process of the program is stopped (SIGSTOP) and found to stand still, what was written since the first pass is copied
// (package dirstate), the processes go on, the hook resume is run. What is kept is what a kill -9 of the program in that moment would have left in the folder:
// everything that it has handed to the kernel, nothing of what it holds in its own memory.
//
// Before a swap and before a move the program is ended with its signal instead, so that its port is free and its last words are on the disk. When that
// is called off it is started again.
//
// # Goroutines
//
// One waits for the end of the program, on a thread of its own; one looks at its health, and reaps; one waits for its end to be the component's. Two pass
// bytes for each connection of a forward.
//
// # Limits
//
// Linux. A hook has 5 s, a check of the health 2 s, standing still 3 s. The state takes twice its room on the disk (package dirstate).
package component
