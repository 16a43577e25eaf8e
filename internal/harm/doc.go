// Package harm breaks the world round a node's process on purpose, for the nemesis: the disk's fsync fails or is slow, the machine's clock
// jumps, the program is of another format than it is.
//
// Without the build tag "harm" it does nothing, and nothing in the binary listens: what is shipped cannot be harmed this way. With the tag, and
// with COPPICE_HARM naming a file, the process obeys the Orders in that file from its start, and within milliseconds when they change.
//
// The clock is the whole process's: every library reads it, not only what asks a clock of ours. It is done where the Go runtime asks the
// kernel for the time (linux/amd64). The monotonic clock and CLOCK_BOOTTIME stay right, as they do when an operator or NTP sets the time.
//
// # Goroutines
//
// One, with the tag and the variable: it looks at the file every few milliseconds.
package harm
