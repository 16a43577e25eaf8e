package e2e

import (
	"flag"
	"fmt"
	"os"
	"testing"
)

// TestMain has one test more run beside the others than there are processors by default: they wait most of the time.
func TestMain(m *testing.M) {
	flag.Parse()
	if n := flag.Lookup("test.parallel"); n.Value.String() == "2" {
		if err := flag.Set("test.parallel", "3"); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}
