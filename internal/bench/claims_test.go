package bench

import "testing"

// A mass failure of a hundredth of the benchmark's size, the leader's death included: every instance finds a new owner.
func TestClaims(t *testing.T) {
	out, err := claims(t.Context(), Config{Runs: 2}, claimCount/100)
	if err != nil || out.Median <= 0 {
		t.Fatalf("%v %v", out, err)
	}
}
