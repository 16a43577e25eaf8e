package node

import (
	"net"
	"slices"

	ma "github.com/multiformats/go-multiaddr"
	manet "github.com/multiformats/go-multiaddr/net"
)

// localListen is where a node of profile local listens when nobody said where: on a port that is free.
var localListen = []string{"/ip4/127.0.0.1/tcp/0"}

// listenAddrs is where to listen. A port that was once taken because it was free is taken again: after all nodes were down, the others
// look for this one where they knew it. When somebody else has that port now, another free one has to do.
func (n *Node) listenAddrs() []string {
	if !slices.Equal(n.cfg.Listen, localListen) {
		return n.cfg.Listen
	}
	for _, a := range n.state.Listen {
		if err := free(a); err != nil {
			n.log.Warn("the address of the last time is taken", "address", a, "error", err)
			return n.cfg.Listen
		}
	}
	if len(n.state.Listen) > 0 {
		return n.state.Listen
	}
	return n.cfg.Listen
}

func free(addr string) error {
	a, err := ma.NewMultiaddr(addr)
	if err != nil {
		return err
	}
	network, host, err := manet.DialArgs(a)
	if err != nil {
		return err
	}
	l, err := net.Listen(network, host)
	if err != nil {
		return err
	}
	return l.Close()
}

// rememberListen keeps the addresses that localListen became.
func (n *Node) rememberListen() error {
	if !slices.Equal(n.cfg.Listen, localListen) {
		return nil
	}
	var now []string
	for _, a := range n.overlay.Host().Network().ListenAddresses() {
		now = append(now, a.String())
	}
	if slices.Equal(now, n.state.Listen) {
		return nil
	}
	n.state.Listen = now
	if n.state.Certificate == nil { // not a member yet: it is saved when it is one
		return nil
	}
	return n.state.save(n.cfg.FS, n.cfg.Data, n.statePath())
}
