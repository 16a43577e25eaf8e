package instance

import (
	"encoding/json"
	"fmt"
	"math"
	"strconv"
	"unicode/utf8"
)

// Error is a mistake in a file and where it is.
type Error struct {
	File         string
	Line, Column int
	What         string
}

func (e *Error) Error() string { return fmt.Sprintf("%s:%d:%d: %s", e.File, e.Line, e.Column, e.What) }

// scanner reads JSON by pulling: the caller says what it expects. Mistakes are thrown as *Error and caught in read, for nearly every
// line of the readers could fail.
type scanner struct {
	file string
	in   []byte
	at   int
}

func (s *scanner) fail(at int, format string, args ...any) {
	line, column := 1, 1
	for _, b := range s.in[:min(at, len(s.in))] {
		if b == '\n' {
			line, column = line+1, 1
		} else if utf8.RuneStart(b) {
			column++
		}
	}
	panic(&Error{s.file, line, column, fmt.Sprintf(format, args...)})
}

// catch turns a thrown *Error into an error.
func catch(err *error) {
	switch e := recover().(type) {
	case nil:
	case *Error:
		*err = e
	default:
		panic(e)
	}
}

func (s *scanner) peek() byte {
	for s.at < len(s.in) {
		switch c := s.in[s.at]; c {
		case ' ', '\t', '\n', '\r':
			s.at++
		default:
			return c
		}
	}
	return 0
}

func (s *scanner) expect(c byte, what string) {
	if s.peek() != c || s.at >= len(s.in) {
		s.fail(s.at, "%s expected", what)
	}
	s.at++
}

// end is the end of the file.
func (s *scanner) end() {
	if s.peek(); s.at < len(s.in) {
		s.fail(s.at, "something follows the document")
	}
}

// object calls field for each member. Members that want does not list are an error, and so are members that are there twice or that are
// listed as true (required) and are missing.
func (s *scanner) object(what string, want map[string]bool, field func(name string)) {
	begin := s.at
	s.peek()
	begin = max(begin, s.at)
	s.expect('{', what+": an object")
	seen := make(map[string]bool, len(want))
	for first := true; ; first = false {
		if s.peek() == '}' {
			s.at++
			break
		}
		if !first {
			s.expect(',', what+": a comma")
			s.peek()
		}
		at := s.at
		name := s.text(what + ": a field name")
		switch _, known := want[name]; {
		case !known:
			s.fail(at, "%s: unknown field %q", what, name)
		case seen[name]:
			s.fail(at, "%s: field %q is there twice", what, name)
		}
		seen[name] = true
		s.expect(':', what+": a colon")
		s.peek()
		field(name)
	}
	for name, required := range want {
		if required && !seen[name] {
			s.fail(begin, "%s: field %q is missing", what, name)
		}
	}
}

// fields passes over an object and says where the value of each member begins, so that they can be read in an order of our own.
func (s *scanner) fields(what string, want map[string]bool) map[string]int {
	at := make(map[string]int, len(want))
	s.object(what, want, func(name string) {
		at[name] = s.at
		s.skip(what+"."+name, 0)
	})
	return at
}

// array calls item for each element.
func (s *scanner) array(what string, item func(i int)) {
	s.expect('[', what+": a list")
	for i := 0; ; i++ {
		if s.peek() == ']' {
			s.at++
			return
		}
		if i > 0 {
			s.expect(',', what+": a comma")
			s.peek()
		}
		item(i)
	}
}

func (s *scanner) text(what string) string {
	begin := s.at
	s.expect('"', what)
	for ; s.at < len(s.in) && s.in[s.at] != '"'; s.at++ {
		if s.in[s.at] == '\\' {
			s.at++
		}
	}
	if s.at >= len(s.in) {
		s.fail(begin, "%s: a string without an end", what)
	}
	s.at++
	raw := s.in[begin:s.at]
	var v string
	if err := json.Unmarshal(raw, &v); err != nil {
		s.fail(begin, "%s: %s is no string: %v", what, raw, err)
	}
	return v
}

// word is the run of characters of a number or a literal.
func (s *scanner) word() (string, int) {
	s.peek()
	begin := s.at
	for s.at < len(s.in) {
		c := s.in[s.at]
		if c >= '0' && c <= '9' || c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c == '-' || c == '+' || c == '.' {
			s.at++
			continue
		}
		break
	}
	return string(s.in[begin:s.at]), begin
}

// number reads a finite number not below least.
func (s *scanner) number(what string, least float64) float64 {
	w, at := s.word()
	if !isNumber(w) {
		s.fail(at, "%s: a number expected, not %q", what, w)
	}
	v, err := strconv.ParseFloat(w, 64)
	if err != nil || math.IsInf(v, 0) || math.IsNaN(v) {
		s.fail(at, "%s: %s is no finite number", what, w)
	}
	if v < least {
		s.fail(at, "%s: %s is below %g", what, w, least)
	}
	return v
}

// whole reads an integer in [least, most].
func (s *scanner) whole(what string, least, most int) int {
	w, at := s.word()
	if !isNumber(w) {
		s.fail(at, "%s: a whole number expected, not %q", what, w)
	}
	v, err := strconv.Atoi(w)
	if err != nil {
		s.fail(at, "%s: a whole number expected, not %s", what, w)
	}
	if v < least || v > most {
		s.fail(at, "%s: %d is not in [%d, %d]", what, v, least, most)
	}
	return v
}

// null tells whether null comes next, and takes it.
func (s *scanner) null() bool {
	if s.peek() != 'n' {
		return false
	}
	w, at := s.word()
	if w != "null" {
		s.fail(at, "%q is no value", w)
	}
	return true
}

// skip passes over any value.
func (s *scanner) skip(what string, depth int) {
	if depth > 100 {
		s.fail(s.at, "%s: nested too deeply", what)
	}
	switch s.peek() {
	case '{':
		s.expect('{', what)
		for first := true; s.peek() != '}'; first = false {
			if !first {
				s.expect(',', what+": a comma")
				s.peek()
			}
			s.text(what)
			s.expect(':', what+": a colon")
			s.skip(what, depth+1)
		}
		s.at++
	case '[':
		s.array(what, func(int) { s.skip(what, depth+1) })
	case '"':
		s.text(what)
	default:
		w, at := s.word()
		if w != "true" && w != "false" && w != "null" && !isNumber(w) {
			s.fail(at, "%s: %q is no value", what, w)
		}
	}
}

// isNumber tells whether w is a number as JSON writes it: ParseFloat takes more, such as 0x1p4, 1_000 and NaN.
func isNumber(w string) bool {
	digits := func(i int) int {
		for i < len(w) && w[i] >= '0' && w[i] <= '9' {
			i++
		}
		return i
	}
	i := 0
	if i < len(w) && w[i] == '-' {
		i++
	}
	end := digits(i)
	if end == i || end > i+1 && w[i] == '0' {
		return false
	}
	i = end
	if i < len(w) && w[i] == '.' {
		if end = digits(i + 1); end == i+1 {
			return false
		}
		i = end
	}
	if i < len(w) && (w[i] == 'e' || w[i] == 'E') {
		i++
		if i < len(w) && (w[i] == '+' || w[i] == '-') {
			i++
		}
		if end = digits(i); end == i {
			return false
		}
		i = end
	}
	return i == len(w)
}
