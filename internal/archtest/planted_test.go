package archtest

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Every planted bug that the product's code has a switch for is hunted by a gate, and stands in docs/testing.md.
func TestEveryPlantedBugIsHunted(t *testing.T) {
	root := repo(t)
	asked := regexp.MustCompile(`(?:planted\.Bug|promised)\("([a-z-]+)"\)`)
	switches, gates := map[string]string{}, ""
	eachGoFile(t, root, func(path string) {
		raw, err := os.ReadFile(filepath.Join(root, path))
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case filepath.Base(path) == "planted_test.go":
			gates += string(raw)
		case !strings.HasSuffix(path, "_test.go"):
			for _, m := range asked.FindAllStringSubmatch(string(raw), -1) {
				switches[m[1]] = path
			}
		}
	})
	doc, err := os.ReadFile(filepath.Join(root, "docs", "testing.md"))
	if err != nil {
		t.Fatal(err)
	}
	if len(switches) < 40 {
		t.Errorf("%d switches were found: does this test still look at the right thing?", len(switches))
	}
	for name, path := range switches {
		if !strings.Contains(gates, `"`+name+`"`) {
			t.Errorf("%s has the planted bug %q, and no gate hunts it", path, name)
		}
		if !strings.Contains(string(doc), "`"+name+"`") {
			t.Errorf("%s has the planted bug %q, and docs/testing.md does not say what shows it", path, name)
		}
	}
}
