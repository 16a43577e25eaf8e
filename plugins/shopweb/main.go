// Command shopweb is the web tier of the bookshop: pages for people and JSON for programs, over a binding to the store tier. It has no state of its own,
// so any number of instances may run; a request that is retried at another instance acts once, because what it does at the store carries a key derived
// from the request's.
package main

import (
	"context"
	"fmt"

	"github.com/coppice-project/coppice/plugins/sdk"
	shopv1 "github.com/coppice-project/coppice/plugins/shop/v1"
)

// Set at build time with -ldflags "-X main.version=1.1.0 -X main.broken=never-ready".
var (
	version = "1.0.0"
	// broken makes a binary that misbehaves on purpose, for the demo and for tests of the platform: never-ready = its Start does not come to an end.
	broken = ""
)

func main() {
	store := sdk.Require("store", shopv1.Store_ServiceDesc.ServiceName)
	sdk.Serve(component(store))
}

func component(store *sdk.Binding) *sdk.Component {
	return &sdk.Component{
		Type:     "shopweb",
		Version:  version,
		HTTP:     newSite(shopv1.NewStoreClient(store)),
		Requires: []*sdk.Binding{store},
		OnStart:  onStart,
	}
}

func onStart(ctx context.Context, _ *sdk.Instance) error {
	if broken != "never-ready" {
		return nil
	}
	<-ctx.Done()
	return fmt.Errorf("built with -X main.broken=%s: %w", broken, context.Cause(ctx))
}
