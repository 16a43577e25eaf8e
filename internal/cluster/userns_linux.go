package cluster

import (
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// insideVar marks a process that EnterUserNamespace has started again.
const insideVar = "COPPICE_INSIDE_USERNS"

// EnterUserNamespace starts this process's binary again with the same arguments, in a user and network namespace of its own, where it may
// make further ones: for users who are not root, on machines that permit it. It returns nil when there is nothing to do: for root, the
// second time, and where it is not permitted.
func EnterUserNamespace(binary string) error {
	if os.Geteuid() == 0 || os.Getenv(insideVar) != "" {
		return nil
	}
	unshare, err := exec.LookPath("unshare")
	if err != nil || exec.Command(unshare, "-Urn", "ip", "link", "set", "lo", "up").Run() != nil {
		return nil
	}
	args := append([]string{"unshare", "-Urn", "--", binary}, os.Args[1:]...)
	if err := unix.Exec(unshare, args, append(os.Environ(), insideVar+"=1")); err != nil {
		return fmt.Errorf("start again in a user namespace: %w", err)
	}
	return nil
}
