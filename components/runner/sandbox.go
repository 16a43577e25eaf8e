package runner

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// policy is what a sandbox comes down to on this machine: the same for the starting thread and for the shim, which gets it as JSON.
type policy struct {
	Off     bool     `json:"off,omitempty"`
	Write   []string `json:"write,omitempty"`
	Read    []string `json:"read,omitempty"`    // declared by the user: a missing one is reported
	Exec    []string `json:"exec,omitempty"`    // the same, to be executed
	System  bool     `json:"system,omitempty"`  // the program needs the system's libraries
	NoTCP   bool     `json:"no_tcp,omitempty"`  //
	Limits  []rlimit `json:"rlimits,omitempty"` //
	ExecFD  int      `json:"exec_fd,omitempty"` // shim only
	Program string   `json:"program,omitempty"`
	Args    []string `json:"args,omitempty"`
}

type rlimit struct {
	Name     string `json:"name"`
	Resource int    `json:"resource"`
	Value    uint64 `json:"value"`
}

// What any program may read: name resolution, certificates, time zones, its own and the machine's figures. Nothing of it is secret;
// /etc as a whole is not in it.
var (
	readCommon = []string{
		"/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/gai.conf", "/etc/services", "/etc/protocols", "/etc/localtime",
		"/etc/ssl/certs", "/etc/ssl/openssl.cnf", "/etc/pki", "/etc/ca-certificates", "/etc/mime.types", "/etc/passwd", "/etc/group",
		"/usr/share/zoneinfo", "/usr/share/ca-certificates", "/usr/local/share/ca-certificates", "/run/systemd/resolve",
		"/proc", "/sys/devices/system/cpu", "/sys/fs/cgroup", "/sys/kernel/mm/transparent_hugepage", "/dev/urandom", "/dev/random",
	}
	writeCommon = []string{"/dev/null", "/dev/zero", "/dev/full"}
	// libraries and interpreters, only for programs that need them
	execSystem = []string{"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/opt"}
	readSystem = []string{"/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d", "/etc/ld.so.preload", "/etc/alternatives", "/etc/python3", "/etc/fonts"}
)

// restrict gives up, on the calling thread and for what it starts, everything that the policy does not name. execFD is the program's
// open file.
func (p *policy) restrict(execFD int) (SandboxReport, error) {
	var rep SandboxReport
	if p.Off {
		rep.Missing = append(rep.Missing, Gap{"files, network, privileges", "the sandbox is switched off for this component"})
		return rep, nil
	}
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return rep, fmt.Errorf("give up new privileges: %w", err)
	}
	rep.Enforced = append(rep.Enforced, "no new privileges")
	abi := landlockABI()
	if abi == 0 {
		rep.Missing = append(rep.Missing, Gap{"files", "this kernel has no Landlock, or it is not enabled (lsm=landlock)"})
		if p.NoTCP {
			rep.Missing = append(rep.Missing, Gap{"tcp", "this kernel has no Landlock"})
		}
		return rep, nil
	}
	rs, err := newRuleset(abi, p.NoTCP)
	if err != nil {
		return rep, err
	}
	defer rs.close() //nolint:errcheck // the rules are copied by restrict
	if err := p.rules(rs, execFD, &rep); err != nil {
		return rep, err
	}
	if err := rs.restrict(); err != nil {
		return rep, err
	}
	p.reportLandlock(abi, &rep)
	return rep, nil
}

func (p *policy) rules(rs *ruleset, execFD int, rep *SandboxReport) error {
	for _, dir := range p.Write {
		if err := rs.allow(dir, fsWrite); err != nil {
			return err
		}
	}
	for _, path := range p.Read {
		if err := rs.allow(path, fsRead); err != nil {
			rep.Missing = append(rep.Missing, Gap{"declared read of " + path, err.Error()})
		}
	}
	for _, path := range p.Exec {
		if err := rs.allow(path, fsExec); err != nil {
			rep.Missing = append(rep.Missing, Gap{"execution of " + path, err.Error()})
		}
	}
	common := []struct {
		paths  []string
		rights uint64
		use    bool
	}{
		{readCommon, fsRead, true},
		{writeCommon, fsRead | unix.LANDLOCK_ACCESS_FS_WRITE_FILE | unix.LANDLOCK_ACCESS_FS_TRUNCATE, true},
		{execSystem, fsExec, p.System},
		{readSystem, fsRead, p.System},
	}
	for _, c := range common {
		if !c.use {
			continue
		}
		for _, path := range c.paths {
			if err := rs.allow(path, c.rights); err != nil && !absent(err) {
				return err
			}
		}
	}
	return rs.allowFD(execFD, "the program", fsExec)
}

// absent: a path of the common lists that this machine does not have, or does not show us.
func absent(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EACCES) || errors.Is(err, unix.ENOTDIR)
}

func (p *policy) reportLandlock(abi int, rep *SandboxReport) {
	held := []string{"files"}
	missing := func(what string, need int) {
		rep.Missing = append(rep.Missing, Gap{what, fmt.Sprintf("Landlock version %d is needed, this kernel has %d", need, abi)})
	}
	if abi < 3 {
		missing("truncating files outside", 3)
	}
	if p.NoTCP {
		if abi >= 4 {
			held = append(held, "tcp")
		} else {
			missing("tcp", 4)
		}
	}
	if abi >= 6 {
		held = append(held, "signals", "abstract sockets")
	} else {
		missing("signals to other processes of the same user", 6)
	}
	rep.Enforced = append(rep.Enforced, fmt.Sprintf("landlock %d: %s", abi, strings.Join(held, ", ")))
}

// setLimits applies the resource limits to a process that is already there; pid 0 is the caller.
func (p *policy) setLimits(pid int) SandboxReport {
	var rep SandboxReport
	for _, l := range p.Limits {
		var have unix.Rlimit
		if err := unix.Prlimit(pid, l.Resource, nil, &have); err == nil {
			l.Value = min(l.Value, have.Max) // the machine's own limit may be lower already
		}
		lim := unix.Rlimit{Cur: l.Value, Max: l.Value}
		if err := unix.Prlimit(pid, l.Resource, &lim, nil); err != nil {
			rep.Missing = append(rep.Missing, Gap{"limit of " + l.Name, err.Error()})
			continue
		}
		rep.Enforced = append(rep.Enforced, fmt.Sprintf("%s at most %d", l.Name, l.Value))
	}
	return rep
}

func (r *SandboxReport) add(o SandboxReport) {
	r.Enforced = append(r.Enforced, o.Enforced...)
	r.Missing = append(r.Missing, o.Missing...)
}

// policyFor turns a spec into a policy. socketDir is the process's own folder for sockets and temporary files.
func policyFor(spec *Spec, prog *program, socketDir string) policy {
	files := spec.Limits.OpenFiles
	if files == 0 {
		files = defaultFiles
	}
	p := policy{
		Off: spec.Sandbox.Off, Write: []string{socketDir}, Read: spec.Sandbox.Read, System: prog.system || spec.Sandbox.System, Exec: spec.Sandbox.Exec,
		NoTCP: spec.Sandbox.Network == NetworkNone, Program: prog.name,
		Args:   append([]string{filepath.Base(prog.name)}, spec.Args...),
		Limits: []rlimit{{"open files", unix.RLIMIT_NOFILE, files}, {"core dumps", unix.RLIMIT_CORE, 0}},
	}
	if spec.DataDir != "" {
		if spec.Sandbox.ReadOnly {
			p.Read = append(p.Read[:len(p.Read):len(p.Read)], spec.DataDir)
		} else {
			p.Write = append(p.Write, spec.DataDir)
		}
	}
	return p
}
