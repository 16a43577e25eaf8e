package runner

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"time"

	"google.golang.org/grpc"
)

// ExecFile is what is executed.
type ExecFile struct {
	// File is the open, verified file. It is executed by its descriptor, so that what was verified is what runs. The caller keeps it
	// open until Start returns and closes it then.
	File *os.File
	// Path is opened and executed when File is nil. It is also the name that ps and error messages show.
	Path string
	// Digest of the content, recorded in Ident.
	Digest string
}

// Limits of one process. Zero: no limit, or the default that is named.
type Limits struct {
	MemoryBytes uint64        // hard with a cgroup; in any case GOMEMLIMIT at nine tenths of it
	CPUMillis   uint64        // thousandths of a core; needs a cgroup
	Processes   uint64        // needs a cgroup
	OpenFiles   uint64        // default 8192
	Start       time.Duration // until the handshake; default 10 s
}

// Network is what a sandboxed process can reach besides the unix sockets it is given.
type Network string

const (
	NetworkHost Network = "host" // the machine's
	NetworkNone Network = "none" // nothing: an empty network namespace where permitted, no TCP by Landlock elsewhere
)

// Sandbox says what a process may do. The zero value is the ordinary profile of a component: its own directories, the system's
// libraries when it needs any, the host's network.
type Sandbox struct {
	Off      bool     // own session and environment only
	Network  Network  // default NetworkHost
	ReadOnly bool     // DataDir is not writable either (Describe)
	Read     []string // further files and directories it may read
	System   bool     // it executes the machine's programs: their directories are open to it, whatever it needs itself
	Exec     []string // further files it may execute
}

// Spec is one start of one instance.
type Spec struct {
	Instance   string // app/name-0
	Exec       ExecFile
	Args       []string // after the program's name
	Env        []string // KEY=value, added to PATH and the contract's own
	RunDir     string   // for sockets; made 0700; at most 60 bytes. Several processes of an instance share it
	LogDir     string   // for output.log; made 0700
	DataDir    string   // writable, the working directory; made 0700. Empty: RunDir's own socket folder
	NodeSocket string   // told as COPPICE_NODE_SOCKET
	Credential string   // told as COPPICE_CREDENTIAL and sent with each call; empty: a random one
	Sandbox    Sandbox
	Limits     Limits
}

// Ident recognises a process after the daemon that started it has gone. It is serialised as JSON; it holds the credential, so keep it
// in a file that only the daemon's user can read.
type Ident struct {
	Instance        string        `json:"instance"`
	Pid             int           `json:"pid"`
	StartTicks      uint64        `json:"start_ticks"` // of the process, in clock ticks after boot
	BootID          string        `json:"boot_id"`
	Socket          string        `json:"socket"`
	SocketDir       string        `json:"socket_dir"`
	ProtocolVersion int           `json:"protocol_version"`
	ExecDigest      string        `json:"exec_digest"`
	Credential      string        `json:"credential"`
	StartedUnixMs   int64         `json:"started_unix_ms"`
	Sandbox         SandboxReport `json:"sandbox"`
}

// ExitStatus is how a process ended.
type ExitStatus struct {
	Known  bool   // false: it was adopted, so its parent is init and only the fact of its end is known
	Code   int    // of exit(2); -1 when a signal ended it
	Signal string // name, when a signal ended it
	// By says which step of Stop was the last before it ended: "", "stop", "term" or "kill". "" means it ended of itself.
	By     string
	At     time.Time
	CPU    time.Duration // user and system
	MaxRSS uint64        // bytes
}

// SandboxReport says what holds for a process and what does not.
type SandboxReport struct {
	Enforced []string `json:"enforced"`
	Missing  []Gap    `json:"missing,omitempty"`
}

// Gap is a restriction that this machine does not let us enforce.
type Gap struct {
	What string `json:"what"`
	Why  string `json:"why"`
}

// Process is one running process of a component.
type Process interface {
	// Conn is the connection to the component. Each call on it carries the credential. It is closed when the process ends.
	Conn() *grpc.ClientConn
	Ident() Ident
	Sandbox() SandboxReport
	// Done is closed when the process has ended, within milliseconds.
	Done() <-chan struct{}
	// Exit is valid once Done is closed.
	Exit() ExitStatus
	// Stop ends it: the Stop call with grace as its deadline, SIGTERM to its process group, up to 2 s, SIGKILL to the group. When ctx
	// ends it goes straight to SIGKILL. It returns nil when the process has ended; it does not hang on a stopped or stuck one.
	Stop(ctx context.Context, grace time.Duration) error
	// Kill sends SIGKILL to the process group and returns at once. It is no error when the process has ended already.
	Kill() error
	// Output is the path of the file that holds standard output and error.
	Output() string
}

// Runner starts and adopts processes.
type Runner interface {
	// Start returns once the component has said hello and can be called. Errors wrap one of the Err values below.
	Start(ctx context.Context, spec Spec) (Process, error)
	// Adopt takes over a process that an earlier daemon started. spec is used for its directories and its credential when id has none.
	// The error wraps ErrGone when that process is not there any more.
	Adopt(ctx context.Context, id Ident, spec Spec) (Process, error)
}

// What can be wrong with a start.
var (
	ErrNoExecutable = errors.New("no executable")                          // missing, empty, or neither ELF nor #! script
	ErrWrongArch    = errors.New("built for another machine")              // ELF of another architecture or system, or not ELF
	ErrNoHandshake  = errors.New("no component handshake")                 // it ended, or said something else, before saying hello
	ErrHung         = errors.New("did not answer in time")                 // it runs and says nothing
	ErrProtocol     = errors.New("speaks another version of the contract") // handshake with a version that we do not
	ErrDescribe     = errors.New("describe failed")                        // it started, and Describe returned an error
	ErrGone         = errors.New("process is gone")                        // Adopt: ended, or the pid is another process now
)

// Config of a Local runner.
type Config struct {
	Log *slog.Logger // default: none
	// Shim, when not empty, is the command line that ends in ExecShim (for example /proc/self/exe __exec). Processes are then started
	// through it. Empty: restrictions are applied by the starting thread, which saves the start of that binary.
	Shim []string
	// CgroupParent is a cgroup v2 directory that is delegated to us and has the cpu and memory controllers enabled for its children.
	// Empty: no cgroups; memory and CPU limits are reported as missing.
	CgroupParent string
	// MaxLogBytes bounds output.log; default 8 MiB. It is checked each second; what is written in between comes on top.
	MaxLogBytes int64
}

const (
	maxRunDir     = 60 // bytes; go-plugin adds up to 38, and sun_path holds 107
	defaultStart  = 10 * time.Second
	defaultFiles  = 8192
	defaultMaxLog = 8 << 20
	killWait      = 5 * time.Second // for a process to go after SIGKILL
	termWait      = 2 * time.Second // between SIGTERM and SIGKILL at most
)

// Local runs processes on this machine. It is safe for concurrent use.
type Local struct {
	cfg    Config
	path   string // PATH for components
	bootID string
	logs   logFiles
}

// New returns a runner. It fails when this machine's identity of boot cannot be read or the cgroup parent is unusable.
func New(cfg Config) (*Local, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.MaxLogBytes <= 0 {
		cfg.MaxLogBytes = defaultMaxLog
	}
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	if cfg.CgroupParent != "" {
		if err := checkCgroupParent(cfg.CgroupParent); err != nil {
			return nil, err
		}
	}
	path := os.Getenv("PATH")
	if path == "" {
		path = "/usr/local/bin:/usr/bin:/bin"
	}
	return &Local{cfg: cfg, path: path, bootID: boot}, nil
}
