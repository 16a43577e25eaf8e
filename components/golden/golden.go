// Package golden runs scenario files: tests that read as text and keep their expected output beside the input.
//
// A file is a row of cases. A case is a line with a command and its arguments, lines of input, a line "----", lines of output, and a
// blank line. Lines that begin with # between cases are comments. Output that has a blank line within is written between doubled
// markers: "----" twice before, twice after. With -rewrite the files take the output that the code gives now; the diff is the review.
//
// It is for tests only. Goroutines: none.
package golden

import (
	"flag"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

var rewrite = flag.Bool("rewrite", false, "write the output that the code gives now into the scenario files")

// Case is one command of a scenario file.
type Case struct {
	Pos   string // file:line
	Cmd   string
	Args  []string
	Input string
	want  string
}

const marker = "----"

// Run runs every *.txt file of a folder as a subtest; handle gives a case's output. Cases of one file share what handle's closure holds:
// start is called once a file.
func Run(t *testing.T, folder string, start func(t *testing.T) (handle func(t *testing.T, c Case) string)) {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(folder, "*.txt"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenario in %s (%v)", folder, err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			runFile(t, file, string(data), start(t))
		})
	}
}

func runFile(t *testing.T, file, text string, handle func(t *testing.T, c Case) string) {
	t.Helper()
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	var out strings.Builder
	for i := 0; i < len(lines); {
		if s := strings.TrimSpace(lines[i]); s == "" || s[0] == '#' {
			out.WriteString(lines[i] + "\n")
			i++
			continue
		}
		c, head, next := parseCase(t, file, lines, i)
		got := handle(t, c)
		if got != "" && !strings.HasSuffix(got, "\n") {
			got += "\n"
		}
		if got != c.want && !*rewrite {
			t.Errorf("%s: %s\ngot:\n%s\nwant:\n%s\n(go test -rewrite takes what the code gives)", c.Pos, c.Cmd, got, c.want)
		}
		out.WriteString(head)
		writeOutput(&out, got)
		i = next
	}
	if *rewrite {
		if err := os.WriteFile(file, []byte(out.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

func parseCase(t *testing.T, file string, lines []string, i int) (c Case, head string, next int) {
	t.Helper()
	words := strings.Fields(lines[i])
	c = Case{Pos: file + ":" + strconv.Itoa(i+1), Cmd: words[0], Args: words[1:]}
	end := i + 1
	for end < len(lines) && lines[end] != marker {
		end++
	}
	if end == len(lines) {
		t.Fatalf("%s: no %s after the input", c.Pos, marker)
	}
	c.Input = join(lines[i+1 : end])
	head = join(lines[i:end])
	from := end + 1
	if from < len(lines) && lines[from] == marker { // output with blank lines
		to := from + 1
		for to+1 < len(lines) && (lines[to] != marker || lines[to+1] != marker) {
			to++
		}
		c.want = join(lines[from+1 : to])
		return c, head, to + 2
	}
	to := from
	for to < len(lines) && lines[to] != "" {
		to++
	}
	c.want = join(lines[from:to])
	return c, head, to
}

func writeOutput(out *strings.Builder, got string) {
	if strings.Contains("\n"+got, "\n\n") {
		out.WriteString(marker + "\n" + marker + "\n" + got + marker + "\n" + marker + "\n")
		return
	}
	out.WriteString(marker + "\n" + got)
}

func join(lines []string) string {
	if len(lines) == 0 {
		return ""
	}
	return strings.Join(lines, "\n") + "\n"
}
