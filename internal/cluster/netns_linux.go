package cluster

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	subnet    = "10.77.0." // inside the namespaces only
	hubHost   = 254
	nodePort  = 7400
	httpPort  = 8080
	nodeIface = "eth0"
)

// namespaces is a hub with a bridge, and one namespace per node, each an open file and nothing else.
type namespaces struct {
	hub   *os.File
	nodes []*os.File
}

// NewNamespaces makes the network of n nodes. It needs CAP_NET_ADMIN and CAP_SYS_ADMIN (root, or a user namespace of one's own) and `ip`.
func NewNamespaces(n int) (_ Network, err error) {
	if _, err := exec.LookPath("ip"); err != nil {
		return nil, fmt.Errorf("network namespaces: %w", err)
	}
	s := &namespaces{}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.Close())
		}
	}()
	if s.hub, err = newNamespace(); err != nil {
		return nil, err
	}
	if err := s.ip(s.hub,
		"link set lo up", "link add br0 type bridge", fmt.Sprintf("addr add %s%d/24 dev br0", subnet, hubHost), "link set br0 up"); err != nil {
		return nil, err
	}
	for i := 1; i <= n; i++ {
		ns, err := newNamespace()
		if err != nil {
			return nil, err
		}
		s.nodes = append(s.nodes, ns)
		path := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.Fd())
		if err := s.ip(s.hub,
			fmt.Sprintf("link add v%d type veth peer name %s netns %s", i, nodeIface, path), fmt.Sprintf("link set v%d master br0 up", i)); err != nil {
			return nil, err
		}
		if err := s.ip(ns, "link set lo up", fmt.Sprintf("addr add %s%d/24 dev %s", subnet, i, nodeIface), "link set "+nodeIface+" up"); err != nil {
			return nil, err
		}
	}
	return s, nil
}

func newNamespace() (*os.File, error) {
	var ns *os.File
	err := onOwnThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("make a network namespace: %w", err)
		}
		fd, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("open the network namespace: %w", err)
		}
		ns = os.NewFile(uintptr(fd), "netns")
		return nil
	})
	return ns, err
}

// onOwnThread runs f on a thread that ends with it: what f does to the thread's namespaces stays there. A process that f starts is in them.
func onOwnThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- f()
	}()
	return <-done
}

func within(ns *os.File, f func() error) error {
	return onOwnThread(func() error {
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("enter the network namespace: %w", err)
		}
		return f()
	})
}

func (s *namespaces) ip(ns *os.File, commands ...string) error { return tool(ns, "ip", commands...) }

// tool runs a program with each of the commands, in a namespace.
func tool(ns *os.File, name string, commands ...string) error {
	for _, c := range commands {
		cmd := exec.Command(name, strings.Fields(c)...)
		var out bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &out
		if err := within(ns, cmd.Start); err != nil {
			return fmt.Errorf("%s %s: %w", name, c, err)
		}
		if err := cmd.Wait(); err != nil {
			return fmt.Errorf("%s %s: %w: %s", name, c, err, strings.TrimSpace(out.String()))
		}
	}
	return nil
}

func (s *namespaces) Kind() string { return "network namespaces" }

func (s *namespaces) Args(i int) []string {
	return []string{"--profile", "lan", "--listen", fmt.Sprintf("/ip4/%s%d/tcp/%d", subnet, i, nodePort), "--http", s.HTTP(i)}
}

func (s *namespaces) HTTP(i int) string { return fmt.Sprintf("%s%d:%d", subnet, i, httpPort) }

func (s *namespaces) at(i int) *os.File {
	if i == 0 {
		return s.hub
	}
	return s.nodes[i-1]
}

func (s *namespaces) Start(i int, cmd *exec.Cmd) error { return within(s.at(i), cmd.Start) }

func (s *namespaces) Dial(addr string) (conn net.Conn, err error) {
	err = within(s.hub, func() error {
		conn, err = net.DialTimeout("tcp", addr, 2*time.Second)
		return err
	})
	return conn, err
}

// Listen opens a door at the hub. A node reaches it unless its own link is cut (Cut); what Block does is between nodes.
func (s *namespaces) Listen() (ln net.Listener, err error) {
	err = within(s.hub, func() error {
		ln, err = net.Listen("tcp", fmt.Sprintf("%s%d:0", subnet, hubHost))
		return err
	})
	return ln, err
}

func (s *namespaces) Cut(i int) error  { return s.ip(s.hub, fmt.Sprintf("link set v%d down", i)) }
func (s *namespaces) Heal(i int) error { return s.ip(s.hub, fmt.Sprintf("link set v%d up", i)) }

// Block needs nft.
func (s *namespaces) Block(i, from int, reset bool) error {
	what := "drop"
	if reset {
		what = "meta l4proto tcp reject with tcp reset"
	}
	return tool(s.at(i), "nft", "add table inet faults", "add chain inet faults in { type filter hook input priority 0 ; }",
		fmt.Sprintf("add rule inet faults in ip saddr %s%d %s", subnet, from, what))
}

// Unblock may be called when nothing is blocked.
func (s *namespaces) Unblock(i int) error {
	return tool(s.at(i), "nft", "add table inet faults", "delete table inet faults")
}

// Sent reads the counter of the namespace that the process is in.
func (s *namespaces) Sent(_, pid int) (uint64, bool, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/dev", pid))
	if err != nil {
		return 0, false, fmt.Errorf("count what was sent: %w", err)
	}
	for line := range strings.Lines(string(raw)) {
		name, rest, ok := strings.Cut(strings.TrimSpace(line), ":")
		fields := strings.Fields(rest)
		if ok && name == nodeIface && len(fields) > 8 {
			n, err := strconv.ParseUint(fields[8], 10, 64)
			return n, err == nil, err
		}
	}
	return 0, false, fmt.Errorf("count what was sent: process %d has no %s", pid, nodeIface)
}

func (s *namespaces) Close() error {
	var errs []error
	for _, f := range append(s.nodes, s.hub) {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}
