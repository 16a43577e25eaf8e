// Command kv is a key-value component: text by key, in order, with versions and transactions. It shows state of many keys, an attribute, and errors that
// roll a call back.
package main

import (
	"context"
	"errors"
	"fmt"

	"google.golang.org/grpc"

	kvv1 "github.com/coppice-project/coppice/plugins/kv/v1"
	"github.com/coppice-project/coppice/plugins/sdk"
)

// Set at build time with -ldflags "-X main.version=1.1.0 -X main.broken=never-ready".
var (
	version = "1.0.0"
	// broken makes a binary that misbehaves on purpose, for the demo and for tests of the platform: never-ready = its Start does not come to an end.
	broken = ""
)

func main() { sdk.Serve(component()) }

func component() *sdk.Component {
	s := &store{capacity: sdk.NewAttribute("capacity", 1_000_000, sdk.Check(func(n int) error {
		if n < 1 {
			return errors.New("a store holds at least 1 key")
		}
		return nil
	}))}
	return &sdk.Component{
		Type:       "kv",
		Version:    version,
		State:      &sdk.State{Schema: 1},
		Register:   func(r grpc.ServiceRegistrar) { kvv1.RegisterKVServer(r, s) },
		Attributes: []sdk.Attr{s.capacity},
		OnStart:    onStart(broken),
	}
}

func onStart(broken string) func(context.Context, *sdk.Instance) error {
	return func(ctx context.Context, _ *sdk.Instance) error {
		if broken != "never-ready" {
			return nil
		}
		<-ctx.Done()
		return fmt.Errorf("built with -X main.broken=%s: %w", broken, context.Cause(ctx))
	}
}
