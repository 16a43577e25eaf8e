package load

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"time"
)

// command is one line of what the process is told.
type command struct {
	Do     string      `json:"do"` // start | rate | pause | figures | first | verify
	Config *Config     `json:"config,omitempty"`
	Rate   float64     `json:"rate,omitempty"`
	Window *Window     `json:"window,omitempty"`
	First  *FirstQuery `json:"first,omitempty"`
}

// answer is one line of what it says; one for each command.
type answer struct {
	Error   string   `json:"error,omitempty"`
	Figures *Figures `json:"figures,omitempty"`
	First   *First   `json:"first,omitempty"`
	Report  *Report  `json:"report,omitempty"`
}

// pauseWithin bounds the wait for calls under way, beyond their deadline.
const pauseWithin = 5 * time.Second

// Serve is the generator's process: it reads commands from in, one JSON object a line, and answers each on out, until in ends or ctx does.
func Serve(ctx context.Context, in io.Reader, out io.Writer) error {
	s := &server{}
	enc := json.NewEncoder(out)
	lines := bufio.NewScanner(in)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		var c command
		var a answer
		err := json.Unmarshal(lines.Bytes(), &c)
		if err == nil {
			err = s.do(ctx, c, &a)
		}
		if err != nil {
			a.Error = err.Error()
		}
		if err := enc.Encode(a); err != nil {
			return errors.Join(err, s.close())
		}
	}
	return errors.Join(lines.Err(), s.close())
}

type server struct{ run *Runner }

func (s *server) close() error {
	if s.run == nil {
		return nil
	}
	return s.run.Close()
}

func (s *server) do(ctx context.Context, c command, a *answer) (err error) {
	if c.Do == "start" && s.run == nil && c.Config != nil {
		s.run, err = Start(ctx, *c.Config)
		return err
	}
	if s.run == nil {
		return errors.New("load: it must be started first")
	}
	switch {
	case c.Do == "rate":
		s.run.Rate(c.Rate)
	case c.Do == "pause":
		ctx, cancel := context.WithTimeout(ctx, s.run.cfg.Deadline+pauseWithin)
		defer cancel()
		return s.run.Pause(ctx)
	case c.Do == "figures" && c.Window != nil:
		f := s.run.Figures(*c.Window)
		a.Figures = &f
	case c.Do == "first" && c.First != nil:
		f := s.run.First(*c.First)
		a.First = &f
	case c.Do == "verify":
		a.Report, err = s.run.Verify(ctx)
		return err
	default:
		return fmt.Errorf("load: command %q is not known, or incomplete", c.Do)
	}
	return nil
}
