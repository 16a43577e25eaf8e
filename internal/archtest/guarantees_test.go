package archtest

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

var (
	testName  = regexp.MustCompile("`([a-z0-9/]+)\\.(Test[A-Za-z0-9_]+)`")
	guarantee = regexp.MustCompile(`^## (G\d+) `)
)

// Each guarantee names a test, and each test that docs/guarantees.md names exists.
func TestGuaranteesNameTheirTests(t *testing.T) {
	root := repo(t)
	raw, err := os.ReadFile(filepath.Join(root, "docs", "guarantees.md"))
	if err != nil {
		t.Fatal(err)
	}
	named, current := map[string]int{}, ""
	for line := range strings.Lines(string(raw)) {
		if strings.HasPrefix(line, "## ") {
			current = ""
		}
		if m := guarantee.FindStringSubmatch(line); m != nil {
			current = m[1]
		}
		for _, m := range testName.FindAllStringSubmatch(line, -1) {
			named[current]++
			if !declares(t, filepath.Join(root, m[1]), m[2]) {
				t.Errorf("docs/guarantees.md names %s.%s, which does not exist", m[1], m[2])
			}
		}
		if c := strings.Count(line, "`"); c%2 != 0 {
			t.Errorf("docs/guarantees.md: a name is broken over two lines: %s", line)
		}
	}
	for i := 1; i <= 10; i++ {
		if g := fmt.Sprintf("G%d", i); named[g] == 0 {
			t.Errorf("docs/guarantees.md names no test for %s", g)
		}
	}
}

// declares says whether a test of a package in dir has this name.
func declares(t *testing.T, dir, name string) bool {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "*_test.go"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		src, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(src), "func "+name+"(t *testing.T)") {
			return true
		}
	}
	return false
}
