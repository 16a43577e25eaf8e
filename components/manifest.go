package components

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
)

// Problem is one thing that is wrong with a manifest, at its place. Line and Col count from 1.
type Problem struct {
	File      string
	Line, Col int
	Path      string // within the document: components[0].count; "" = the document
	Message   string // what was found and what was expected
}

func (p Problem) String() string {
	if p.Path == "" {
		return fmt.Sprintf("%s:%d:%d: %s", p.File, p.Line, p.Col, p.Message)
	}
	return fmt.Sprintf("%s:%d:%d: %s: %s", p.File, p.Line, p.Col, p.Path, p.Message)
}

// ManifestError is everything that is wrong with a manifest file, in the order of the file (at most MaxProblems).
type ManifestError struct {
	Problems []Problem
	More     int // problems beyond those
}

// Error is one line a problem.
func (e *ManifestError) Error() string {
	lines := make([]string, 0, len(e.Problems)+1)
	for _, p := range e.Problems {
		lines = append(lines, p.String())
	}
	if e.More > 0 {
		lines = append(lines, fmt.Sprintf("and %d more", e.More))
	}
	return strings.Join(lines, "\n")
}

// ParseManifests reads a manifest file: YAML, one document an application. filename is only used in messages. Either everything is right
// and the applications come in the order of the file, or the error is a *ManifestError with every problem of every document, and
// nothing comes. Keys are those of components.proto; what the user left out stays empty. Attribute values become JSON text.
func ParseManifests(filename string, data []byte) ([]*componentsv1.Manifest, error) {
	r := &report{file: filename}
	docs := load(r, data)
	known := map[string]*document{}
	for _, d := range docs {
		app := d.manifest.GetApplication()
		if app == "" {
			continue
		}
		if first, ok := known[app]; ok {
			d.problem("application", "found application %q a second time, expected one document an application (the first is at line %d)",
				app, first.at("application").Line)
			continue
		}
		known[app] = d
	}
	for _, d := range docs {
		check(d, known)
	}
	if len(docs) == 0 && len(r.problems) == 0 {
		r.add(1, 1, "", "found no document, expected a manifest: application: NAME and components: …")
	}
	if err := r.err(); err != nil {
		return nil, err
	}
	out := make([]*componentsv1.Manifest, len(docs))
	for i, d := range docs {
		out[i] = d.manifest
	}
	return out, nil
}

// report collects problems.
type report struct {
	file     string
	problems []Problem
}

func (r *report) add(line, col int, path, format string, args ...any) {
	r.problems = append(r.problems, Problem{
		File: r.file, Line: max(line, 1), Col: max(col, 1), Path: path, Message: fmt.Sprintf(format, args...),
	})
}

func (r *report) err() error {
	if len(r.problems) == 0 {
		return nil
	}
	slices.SortStableFunc(r.problems, func(a, b Problem) int { return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Col, b.Col)) })
	e := &ManifestError{Problems: slices.Compact(r.problems)}
	if n := len(e.Problems); n > MaxProblems {
		e.Problems, e.More = e.Problems[:MaxProblems], n-MaxProblems
	}
	return e
}
