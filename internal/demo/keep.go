package demo

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
)

// keep leaves the cluster running until ctx ends. The gateways are in their own network: n1's is brought to a port of this machine's
// loopback.
func (d *demo) keep(ctx context.Context) error {
	n1 := d.cluster.Nodes[0]
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return fmt.Errorf("a port for the dashboard: %w", err)
	}
	go d.forward(l, strings.TrimPrefix(n1.HTTP, "http://"))
	d.print(fmt.Sprintf("it goes on until you interrupt it · dashboard http://%s/ · the shop http://%s/app/shop/ · try: coppice nodes --api n1", l.Addr(), l.Addr()))
	<-ctx.Done()
	return l.Close()
}

// forward brings connections to an address in the demo's network, until the listener is closed.
func (d *demo) forward(l net.Listener, to string) {
	for {
		in, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			out, err := d.cluster.Network.Dial(to)
			if err != nil {
				_ = in.Close() // the browser sees that nobody answers
				return
			}
			done := make(chan error, 2)
			go func() {
				_, err := io.Copy(out, in)
				done <- err
			}()
			go func() {
				_, err := io.Copy(in, out)
				done <- err
			}()
			<-done
			_ = errors.Join(in.Close(), out.Close()) // one side has ended: so does the other
		}()
	}
}
