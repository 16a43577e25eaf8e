//go:build planted

package supervisor

import (
	"testing"

	"github.com/coppice-project/coppice/internal/planted/plantedtest"
)

func TestPlanted(t *testing.T) {
	plantedtest.Caught(t,
		plantedtest.Fails("TestARestartWaitsForTheCommitThatIsUnderWay", "unsettled-restart", "a process is started again only when it is certain how its predecessor's last commit ended"),
		plantedtest.Fails("TestALeaseThatHasRunOutServesNothing", "lease-not-asked", "an owner serves only while it holds its lease"),
		plantedtest.Fails("TestTheLeaseIsLostBySleepDoubtAndSilence", "serves-out-of-touch", "an owner that is cut off from the arbiter stops serving"),
		plantedtest.Fails("TestABranchRunsOnItsOwnNodeOnly", "branch-elsewhere", "what goes on without the arbiter goes on at its owner only"),
		plantedtest.Fails("TestABranchNeverComesOnTopOfWhatItDidNotKnow", "branch-over-newer", "a branch is committed only on top of what it began from"),
		plantedtest.Fails("TestABranchIsDecidedOnce", "branch-decided-twice", "what becomes of a branch is decided once"),
	)
}
