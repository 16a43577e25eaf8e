package main

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// Colours, as SGR parameters.
const (
	red    = "31"
	green  = "32"
	yellow = "33"
	blue   = "34"
	bold   = "1"
	dim    = "2"
)

type painter func(string) string

// paint colours results: only on a terminal, and not when NO_COLOR is set.
func (c *cli) paint(color string) painter { return c.painter(c.outTTY, color) }

// errPaint colours what goes to stderr.
func (c *cli) errPaint(color string) painter { return c.painter(c.errTTY, color) }

func (c *cli) painter(tty bool, color string) painter {
	if !tty || color == "" || c.getenv("NO_COLOR") != "" || c.getenv("TERM") == "dumb" {
		return func(s string) string { return s }
	}
	return func(s string) string {
		if s == "" {
			return s
		}
		return "\x1b[" + color + "m" + s + "\x1b[0m"
	}
}

// stateColor is the colour of a state of a node, an instance, an application, an artifact or a finding.
func stateColor(state string) string {
	switch state {
	case "alive", "running", "ready", "ok", "moved", "done", "healthy":
		return green
	case "suspect", "quarantined", "degraded", "starting", "pending", "fetching", "frozen", "deploying", "warning", "moving", "describing", "incomplete", "removing":
		return yellow
	case "dead", "failed", "error", "refused":
		return red
	}
	return ""
}

// table is aligned text: widths are counted in characters before colour.
type table struct {
	c    *cli
	head []string
	rows [][]cell
}

type cell struct{ text, color string }

func (c *cli) table(head ...string) *table { return &table{c: c, head: head} }

// row adds a line. A cell is a string, a cell, or what Sprint makes of it; empty ones show a dash.
func (t *table) row(cells ...any) {
	row := make([]cell, 0, len(cells))
	for _, v := range cells {
		x, ok := v.(cell)
		if !ok {
			x = cell{text: fmt.Sprint(v)}
		}
		x.text = printable(oneLine(x.text))
		if x.text == "" {
			x = cell{"-", dim}
		}
		row = append(row, x)
	}
	t.rows = append(t.rows, row)
}

func stateCell(state string) cell { return cell{state, stateColor(state)} }

// fields is a table without a head: names and values.
func (c *cli) fields() *table { return &table{c: c} }

// field adds a named value; empty ones are left out.
func (t *table) field(name string, v any) {
	x, ok := v.(cell)
	if !ok {
		x = cell{text: fmt.Sprint(v)}
	}
	if x.text != "" {
		t.rows = append(t.rows, []cell{{name, dim}, {printable(oneLine(x.text)), x.color}})
	}
}

func (t *table) write(w io.Writer) {
	rows := t.rows
	if len(t.head) > 0 {
		head := make([]cell, len(t.head))
		for i, h := range t.head {
			head[i] = cell{h, bold}
		}
		rows = append([][]cell{head}, rows...)
	}
	var widths []int
	for _, r := range rows {
		for i, x := range r {
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(x.text))
		}
	}
	for _, r := range rows {
		var b strings.Builder
		for i, x := range r {
			b.WriteString(t.c.paint(x.color)(x.text))
			if i < len(r)-1 {
				b.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(x.text)+2))
			}
		}
		fmt.Fprintln(w, strings.TrimRight(b.String(), " "))
	}
}
