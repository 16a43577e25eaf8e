//go:build planted

package membrane

import (
	"testing"

	"github.com/coppice-project/coppice/internal/planted/plantedtest"
)

func TestPlanted(t *testing.T) {
	plantedtest.Caught(t,
		plantedtest.Fails("TestLeaseLostWithholdsAnswers", "stale-reply", "an owner that is none any more withholds the answers under way"),
		plantedtest.Fails("TestStaleOwnerRefuses", "token-not-checked", "an owner refuses callers that know of a newer epoch"),
	)
}
