// Command shop is the store tier of the bookshop: catalogue, stock, carts and orders. It shows a component with real invariants: stock never goes below
// zero, an order is all or nothing, and what was sold plus what is left is what was delivered, whatever crashes in between.
package main

import (
	"context"
	"fmt"

	"google.golang.org/grpc"

	"github.com/coppice-project/coppice/plugins/sdk"
	shopv1 "github.com/coppice-project/coppice/plugins/shop/v1"
)

//go:generate go run ./gen

// Set at build time with -ldflags "-X main.version=1.1.0 -X main.broken=never-ready".
var (
	version = "1.0.0"
	// broken makes a binary that misbehaves on purpose, for the demo and for tests of the platform: never-ready = its Start does not come to an end.
	broken = ""
)

func main() { sdk.Serve(component()) }

func component() *sdk.Component {
	s := &store{}
	return &sdk.Component{
		Type:     "shop",
		Version:  version,
		State:    &sdk.State{Schema: 1},
		Register: func(r grpc.ServiceRegistrar) { shopv1.RegisterStoreServer(r, s) },
		OnStart:  s.onStart,
	}
}

func (s *store) onStart(ctx context.Context, in *sdk.Instance) error {
	if broken == "never-ready" {
		<-ctx.Done()
		return fmt.Errorf("built with -X main.broken=%s: %w", broken, context.Cause(ctx))
	}
	var err error
	if s.catalogue, err = readCatalogue(); err != nil {
		return err
	}
	return in.Update(ctx, func(_ context.Context, tx *sdk.Txn) error {
		s.catalogue.deliver(tx)
		return nil
	})
}
