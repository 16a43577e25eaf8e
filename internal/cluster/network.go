package cluster

import (
	"errors"
	"fmt"
	"net"
	"os/exec"
)

// ErrNoCut says that links cannot be cut in this network.
var ErrNoCut = errors.New("there are no links to cut on loopback")

// Network is what joins the nodes. Nodes are numbered from 1.
type Network interface {
	// Kind in words: Loopback or "network namespaces".
	Kind() string
	// Args are the flags that tell node i where to listen and who times what.
	Args(i int) []string
	// HTTP is the address of node i's gateway, host:port.
	HTTP(i int) string
	// Start starts a process where node i is; 0 is outside of all nodes.
	Start(i int, cmd *exec.Cmd) error
	// Dial connects from outside of all nodes.
	Dial(addr string) (net.Conn, error)
	// Listen opens a door outside of all nodes that each of them reaches whose own link is not cut.
	Listen() (net.Listener, error)
	// Cut takes node i's link away, Heal gives it back. ErrNoCut.
	Cut(i int) error
	Heal(i int) error
	// Block has what node i is sent by node from vanish, one way; with reset it is answered by a reset of the connection. Unblock ends all
	// that blocks node i. ErrNoCut.
	Block(i, from int, reset bool) error
	Unblock(i int) error
	// Sent is how many bytes node i has sent over its link, as its interface counts. ok is false where nothing counts them.
	Sent(i, pid int) (bytes uint64, ok bool, err error)
	Close() error
}

// Loopback is the Kind of a network without links.
const Loopback = "loopback"

// loopback gives every node ports of 127.0.0.1 that it keeps over restarts.
type loopback struct {
	ports [][2]int // by node: members, gateway
}

// NewLoopback reserves ports for n nodes. They are free now; nothing keeps others from taking them before the node does.
func NewLoopback(n int) (Network, error) {
	l := &loopback{}
	var held []net.Listener
	defer func() {
		for _, h := range held {
			_ = h.Close() // nobody has connected to it
		}
	}()
	for range n {
		var pair [2]int
		for k := range pair {
			h, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return nil, fmt.Errorf("find a free port: %w", err)
			}
			held = append(held, h)
			addr, ok := h.Addr().(*net.TCPAddr)
			if !ok {
				return nil, fmt.Errorf("find a free port: %s is no TCP address", h.Addr())
			}
			pair[k] = addr.Port
		}
		l.ports = append(l.ports, pair)
	}
	return l, nil
}

func (l *loopback) Kind() string { return Loopback }

func (l *loopback) Args(i int) []string {
	return []string{"--profile", "local", "--listen", fmt.Sprintf("/ip4/127.0.0.1/tcp/%d", l.ports[i-1][0]), "--http", l.HTTP(i)}
}

func (l *loopback) HTTP(i int) string                   { return fmt.Sprintf("127.0.0.1:%d", l.ports[i-1][1]) }
func (l *loopback) Start(_ int, cmd *exec.Cmd) error    { return cmd.Start() }
func (l *loopback) Dial(addr string) (net.Conn, error)  { return net.Dial("tcp", addr) }
func (l *loopback) Listen() (net.Listener, error)       { return net.Listen("tcp", "127.0.0.1:0") }
func (l *loopback) Cut(int) error                       { return ErrNoCut }
func (l *loopback) Heal(int) error                      { return ErrNoCut }
func (l *loopback) Block(int, int, bool) error          { return ErrNoCut }
func (l *loopback) Unblock(int) error                   { return ErrNoCut }
func (l *loopback) Sent(int, int) (uint64, bool, error) { return 0, false, nil }
func (l *loopback) Close() error                        { return nil }
