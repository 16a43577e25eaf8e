// Command crash is a component that never starts: it says why and ends.
package main

import (
	"context"
	"errors"

	"github.com/coppice-project/coppice/plugins/sdk"
)

func main() {
	sdk.Serve(&sdk.Component{
		Type: "crash", Version: "1.0.0",
		OnStart: func(context.Context, *sdk.Instance) error {
			return errors.New("the licence server is closed on Sundays")
		},
	})
}
