package node

import (
	"context"
	"errors"

	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/records"
)

func isDeadline(err error) bool { return errors.Is(err, context.DeadlineExceeded) }

func isUnavailable(err error) bool {
	return errors.Is(err, arbiter.ErrNoLeader) || errors.Is(err, arbiter.ErrInDoubt) || errors.Is(err, errCutOff)
}

// isOlder says that a record was not taken because a newer one is there: somebody else mirrored more.
func isOlder(err error) bool {
	var older *records.OlderError
	return errors.As(err, &older)
}
