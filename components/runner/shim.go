package runner

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

const shimReplyFD = 4 // a pipe to the daemon; descriptor 3 is the program

// ExecShim is the body of the re-executed sandbox helper, `coppice __exec POLICY`: args are those after __exec. It applies the policy
// to itself and becomes the program, so it returns only when that failed, with the exit status to use. It is not for people: a
// call by hand says so.
func ExecShim(args []string) int {
	runtime.LockOSThread() // the policy is applied to this thread, which is the one that executes the program
	out := os.NewFile(shimReplyFD, "reply")
	if len(args) != 1 || out == nil || !json.Valid([]byte(args[0])) {
		fmt.Fprintln(os.Stderr, "coppice __exec: started by a node for each component, not by hand")
		return 2
	}
	if _, err := out.Stat(); err != nil {
		fmt.Fprintln(os.Stderr, "coppice __exec: started by a node for each component, not by hand")
		return 2
	}
	unix.CloseOnExec(shimReplyFD)
	enc := json.NewEncoder(out)
	err := becomeProgram(args[0], enc)
	reply := shimReply{Error: err.Error()}
	var errno syscall.Errno
	if errors.As(err, &errno) {
		reply.Errno = int(errno)
	}
	if werr := enc.Encode(&reply); werr != nil {
		fmt.Fprintln(os.Stderr, "coppice __exec:", err, werr)
	}
	return 126
}

// becomeProgram returns only with an error.
func becomeProgram(arg string, reply *json.Encoder) error {
	var pol policy
	if err := json.Unmarshal([]byte(arg), &pol); err != nil {
		return fmt.Errorf("sandbox policy: %w", err)
	}
	f := os.NewFile(uintptr(pol.ExecFD), "program")
	if f == nil {
		return errors.New("sandbox policy: no program")
	}
	var head [2]byte
	if _, err := f.ReadAt(head[:], 0); err != nil {
		return fmt.Errorf("read the program: %w", err)
	}
	rep := pol.setLimits(0)
	restricted, err := pol.restrict(pol.ExecFD)
	if err != nil {
		return err
	}
	rep.add(restricted)
	if err := reply.Encode(&shimReply{Report: rep}); err != nil {
		return fmt.Errorf("tell the node: %w", err)
	}
	if string(head[:]) != "#!" {
		unix.CloseOnExec(pol.ExecFD)
	}
	if err := syscall.Exec("/proc/self/fd/"+strconv.Itoa(pol.ExecFD), pol.Args, os.Environ()); err != nil {
		return fmt.Errorf("execute: %w", err)
	}
	return nil
}
