//go:build planted

package arbiter

import (
	"testing"

	"github.com/coppice-project/coppice/internal/planted/plantedtest"
)

func TestPlanted(t *testing.T) {
	plantedtest.Caught(t,
		plantedtest.Fails("TestTwoNodesFreshlyBooted", "two-unmet", "of two nodes one goes on alone only when it has met the other since it was started"),
		plantedtest.Fails("TestTwoNodesSilence", "two-unproven", "the secondary of two nodes goes on alone only on a proof that the primary is dead"),
		plantedtest.Fails("TestTwoNodesLateProof", "two-late-proof", "the secondary goes on alone only while the primary cannot have done so"),
		plantedtest.Fails("TestTwoNodesSilence", "two-impatient", "the primary goes on alone only when the secondary was silent for long enough"),
		plantedtest.Fails("TestTwoToThreeAndBack", "two-among-three", "the rule of two nodes ends before a third votes"),
		plantedtest.Fails("TestNothingCountsAsContactWhileANodeGoesAlone", "two-contact-leaving", "nothing counts as contact while a node is finding out whether it may go on alone"),
		plantedtest.Fails("TestStaleGroupCannotTalk", "incarnation-unfenced", "no stream of a lower incarnation is admitted"),
		plantedtest.Fails("TestAnIncarnationThatWasMetIsNotForgotten", "incarnation-forgotten", "a higher incarnation that was met is written down before anything else"),
	)
}
