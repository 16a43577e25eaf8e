// Package runner starts, adopts and ends the process of a component on this machine.
//
// It uses go-plugin for launch, handshake and version negotiation and for nothing else: a component must outlive the daemon that
// started it, so there is no AutoMTLS, no broker, no stdio streaming and no bare Kill. Standard output and error go to a file; the
// process has a session of its own, sees none of the daemon's environment but PATH, and its death is told by a pidfd.
//
// It is not a supervisor: it restarts nothing and knows no ownership. It is not a verifier: the caller hands over an open file whose
// content it has checked, and that open file is what is executed.
//
// # Sandbox
//
// Each start happens on an operating system thread of its own, which first gives up what the component must not have (new
// privileges; by Landlock: files, TCP, signals to others) and ends after the fork. The daemon keeps its rights; the component inherits
// the restricted ones from its first instruction. Resource limits are set right after the fork. With Config.Shim the same policy
// is applied by re-executing a binary (ExecShim), which costs the start of that binary and holds the resource limits from the first
// instruction as well. What cannot be enforced on this machine is listed in Process.Sandbox, never dropped in silence.
//
// # Goroutines
//
// Per process: one waits for the pidfd, one bounds the log file, and go-plugin's own two wait with the first. All end with the process.
//
// # Limits
//
// RunDir at most 60 bytes (a unix socket's path has 107); the log file 8 MiB and one predecessor; a handshake within Limits.Start
// (10 s); Stop never takes longer than grace + 2 s + 5 s.
package runner
