package components

import (
	"regexp"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v3"

	componentsv1 "github.com/coppice-project/coppice/components/v1"
)

// document is one manifest of a file, with the place of each of its paths.
type document struct {
	*report
	lines    []string // of the whole file
	root     *yaml.Node
	manifest *componentsv1.Manifest
	values   map[string]*yaml.Node // path -> value
	keys     map[string]*yaml.Node // path -> key, where it is a key of a mapping
	bad      map[string]bool       // paths a problem was already reported for
}

// load splits the file, parses each document and reports what has the wrong shape. Documents come even when parts of them are wrong:
// the wrong parts are left out, so that the rest can be checked too.
func load(r *report, data []byte) []*document {
	if len(data) > MaxManifestBytes {
		r.add(1, 1, "", "found %d bytes, expected at most %d", len(data), MaxManifestBytes)
		return nil
	}
	if !utf8.Valid(data) {
		line := 1 + strings.Count(string(data[:validPrefix(data)]), "\n")
		r.add(line, 1, "", "found bytes that are no UTF-8, expected a text file")
		return nil
	}
	text := lineBreaks.Replace(string(data))
	parts := splitDocuments(text)
	if len(parts) > MaxDocuments {
		r.add(parts[MaxDocuments].line+1, 1, "", "found %d documents, expected at most %d", len(parts), MaxDocuments)
		return nil
	}
	lines := strings.Split(text, "\n")
	var out []*document
	for _, part := range parts {
		if d := loadDocument(r, lines, part); d != nil {
			out = append(out, d)
		}
	}
	return out
}

// lineBreaks makes every line break of YAML the same, so that the parser's lines and ours are the same.
var lineBreaks = strings.NewReplacer("\r\n", "\n", "\r", "\n", "\u0085", "\n", "\u2028", "\n", "\u2029", "\n")

func validPrefix(data []byte) int {
	n := 0
	for n < len(data) {
		c, size := utf8.DecodeRune(data[n:])
		if c == utf8.RuneError && size <= 1 {
			break
		}
		n += size
	}
	return n
}

// part is the text of one document; line counts the lines before it.
type part struct {
	line int
	text string
}

// splitDocuments cuts at the markers "---" and "...", which YAML allows at the start of a line only, also within block scalars. What
// follows a marker on its line stays, moved by no column. Directives ("%YAML 1.2") are left out.
func splitDocuments(s string) []part {
	var parts []part
	var text strings.Builder
	start, began := 0, false
	flush := func(next int) {
		if began {
			parts = append(parts, part{start, text.String()})
		}
		text.Reset()
		start, began = next, false
	}
	for i, line := range strings.SplitAfter(s, "\n") {
		switch marker := strings.TrimRight(firstWord(line), "\r\n"); {
		case marker == "---":
			flush(i)
			line = "   " + line[3:]
		case marker == "...":
			flush(i + 1)
			continue
		case !began && strings.HasPrefix(line, "%"):
			line = "\n"
		}
		if t := strings.TrimSpace(line); t != "" && t[0] != '#' {
			began = true
		}
		text.WriteString(line)
	}
	flush(0)
	return parts
}

func firstWord(line string) string {
	if i := strings.IndexAny(line, " \t"); i >= 0 {
		return line[:i]
	}
	return line
}

func loadDocument(r *report, lines []string, p part) *document {
	// the lines before keep every position of the parser right
	text := []byte(strings.Repeat("\n", p.line) + p.text)
	d := &document{
		report: r, lines: lines, manifest: &componentsv1.Manifest{},
		values: map[string]*yaml.Node{}, keys: map[string]*yaml.Node{}, bad: map[string]bool{},
	}
	var tree yaml.Node
	if err := yaml.Unmarshal(text, &tree); err != nil {
		d.syntax(err, p)
		return nil
	}
	if len(tree.Content) == 0 {
		return nil
	}
	root, ok := (&expansion{d: d}).expand(tree.Content[0])
	if !ok {
		return nil
	}
	d.root = root
	d.shape(root, d.manifest.ProtoReflect().Descriptor(), "")
	if root.Kind != yaml.MappingNode {
		return nil
	}
	d.fill(root, d.manifest.ProtoReflect(), "")
	return d
}

var yamlLine = regexp.MustCompile(`^yaml: (?:line (\d+): )?((?s).*)$`)

// syntax reports what the YAML parser stumbled on. It tells a line only; the column is where that line's text begins.
func (d *document) syntax(err error, p part) {
	line, message := p.line+1, err.Error()
	if m := yamlLine.FindStringSubmatch(message); m != nil {
		if n, err := strconv.Atoi(m[1]); err == nil {
			line = min(max(n, p.line+1), len(d.lines))
		}
		message = m[2]
	}
	text := d.line(line)
	col := 1 + len(text) - len(strings.TrimLeft(text, " \t"))
	hint := ""
	if strings.Contains(text[:col-1], "\t") || strings.Contains(message, "cannot start any token") && strings.Contains(text, "\t") {
		hint = " (there is a tab: YAML indents with spaces)"
	}
	d.add(line, col, "", "found what is no YAML: %s%s; expected key: value, indented with spaces", message, hint)
}

func (d *document) line(n int) string {
	if n < 1 || n > len(d.lines) {
		return ""
	}
	return d.lines[n-1]
}

// problem reports something at a path's value, or at the nearest thing above it that is there. One problem a path.
func (d *document) problem(path, format string, args ...any) {
	if d.bad[path] {
		return
	}
	d.bad[path] = true
	n := d.at(path)
	d.add(n.Line, n.Column, path, format, args...)
}

// problemAtKey is problem at the key itself.
func (d *document) problemAtKey(path, format string, args ...any) {
	if d.bad[path] {
		return
	}
	d.bad[path] = true
	n := d.keys[path]
	if n == nil {
		n = d.at(path)
	}
	d.add(n.Line, n.Column, path, format, args...)
}

// at is the value at a path, or the nearest above it.
func (d *document) at(path string) *yaml.Node {
	for path != "" {
		if n := d.values[path]; n != nil {
			return n
		}
		i := strings.LastIndexAny(path, ".[")
		if i < 0 {
			break
		}
		path = path[:i]
	}
	return d.root
}

// said tells whether the path is in the file (and not null).
func (d *document) said(path string) bool { return d.values[path] != nil }
