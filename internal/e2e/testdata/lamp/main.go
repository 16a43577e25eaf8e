// Lamp is a component that acts on the outside world all the time: it tells a store at $LAMP_STORE, by TCP, that it acts, with its fencing token and
// the moment of the act. It asks for its lease right before each act.
package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/coppice-project/coppice/plugins/sdk"
)

func main() {
	sdk.Serve(&sdk.Component{Type: "lamp", Version: "1.0.0", Run: run})
}

func run(ctx context.Context, in *sdk.Instance) error {
	var conn net.Conn
	for ctx.Err() == nil {
		if conn == nil {
			c, err := net.DialTimeout("tcp", os.Getenv("LAMP_STORE"), time.Second)
			if err == nil {
				conn = c
			}
		}
		if conn != nil && in.LeaseLeft() > 0 {
			var ts unix.Timespec
			if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
				return err
			}
			if _, err := fmt.Fprintf(conn, "%d %d\n", in.FencingToken(), ts.Nano()); err != nil {
				_ = conn.Close() // the next one is dialled
				conn = nil
			}
		}
		select {
		case <-ctx.Done():
		case <-time.After(3 * time.Millisecond):
		}
	}
	return nil
}
