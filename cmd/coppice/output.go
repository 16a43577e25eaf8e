package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"

	"google.golang.org/protobuf/proto"

	"github.com/coppice-project/coppice/node/api"
)

// json says whether the user asked for JSON.
func (c *cli) json() bool { return c.output == "json" }

// show prints a result: the message as one JSON document, or what text writes.
func (c *cli) show(m proto.Message, text func(w io.Writer)) error {
	if !c.json() {
		return c.text(text)
	}
	raw, err := api.JSON(m)
	if err != nil {
		return err
	}
	return c.document(raw)
}

// showList prints messages as one JSON list, or what text writes.
func showList[M proto.Message](c *cli, items []M, text func(w io.Writer)) error {
	if !c.json() {
		return c.text(text)
	}
	raw := []byte{'['}
	for i, m := range items {
		if i > 0 {
			raw = append(raw, ',')
		}
		var err error
		if raw, err = api.AppendJSON(raw, m); err != nil {
			return err
		}
	}
	return c.document(append(raw, ']'))
}

// showLine prints one item of a stream: a JSON object on a line, or what text writes.
func (c *cli) showLine(m proto.Message, text func(w io.Writer)) error {
	if !c.json() {
		return c.text(text)
	}
	raw, err := api.JSON(m)
	if err != nil {
		return err
	}
	return c.write(append(raw, '\n'))
}

// document prints a JSON document for people who look at it: indented.
func (c *cli) document(raw []byte) error {
	var b bytes.Buffer
	if err := json.Indent(&b, raw, "", "  "); err != nil {
		return fmt.Errorf("print the answer: %w", err)
	}
	b.WriteByte('\n')
	return c.write(b.Bytes())
}

func (c *cli) text(f func(w io.Writer)) error {
	var b bytes.Buffer
	f(&b)
	return c.write(b.Bytes())
}

func (c *cli) write(b []byte) error {
	if _, err := c.out.Write(b); err != nil {
		return fmt.Errorf("print the answer: %w", err)
	}
	return nil
}

func readAtMost(r io.Reader, most int64) ([]byte, error) {
	raw, err := io.ReadAll(io.LimitReader(r, most+1))
	if err == nil && int64(len(raw)) > most {
		err = fmt.Errorf("it has more than %s", bytesText(uint64(most)))
	}
	return raw, err
}

// progress tells on stderr how long work goes: one line that changes on a terminal, a line per step otherwise.
type progress struct {
	c    *cli
	last string
	open bool // the terminal's line is not finished
}

func (c *cli) progress() *progress { return &progress{c: c} }

// step tells a step. On a terminal it stays.
func (p *progress) step(format string, args ...any) {
	p.clear()
	line := fmt.Sprintf(format, args...)
	if line != p.last && !p.c.json() {
		fmt.Fprintln(p.c.err, line)
	}
	p.last = line
}

// state shows where the work is; it is replaced by the next. Without a terminal each different one is a line.
func (p *progress) state(format string, args ...any) {
	if p.c.json() {
		return
	}
	if !p.c.errTTY {
		p.step(format, args...)
		return
	}
	line := fmt.Sprintf(format, args...)
	if line == p.last {
		return
	}
	fmt.Fprintf(p.c.err, "\r\x1b[K%s", line)
	p.last, p.open = line, true
}

// bar shows a share of bytes on a terminal and nothing elsewhere.
func (p *progress) bar(what string, done, all uint64) {
	if !p.c.errTTY || p.c.json() || all == 0 {
		return
	}
	const width = 24
	n := int(done * width / all)
	bar := bytes.Repeat([]byte("="), width)
	for i := n; i < width; i++ {
		bar[i] = ' '
	}
	p.state("%s [%s] %s of %s", what, bar, bytesText(done), bytesText(all))
}

// clear takes the changing line away.
func (p *progress) clear() {
	if p.open {
		fmt.Fprint(p.c.err, "\r\x1b[K")
		p.open = false
	}
}
