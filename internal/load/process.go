package load

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"sync"
	"time"
)

// Command is the hidden command of the binary that is the generator's process: Serve on its standard input and output.
const Command = "__load"

// Process is the generator in a process of its own, as its starter sees it. Safe for concurrent use; commands are done one after the other.
type Process struct {
	cmd *exec.Cmd
	in  io.WriteCloser

	mu  sync.Mutex // guards one exchange
	out *bufio.Scanner
}

// Launch starts the process. cmd runs the binary with Command; start starts it (in another network, perhaps).
func Launch(cmd *exec.Cmd, start func(*exec.Cmd) error) (*Process, error) {
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, fmt.Errorf("start the load: %w", err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, fmt.Errorf("start the load: %w", err)
	}
	if err := start(cmd); err != nil {
		return nil, fmt.Errorf("start the load: %w", err)
	}
	p := &Process{cmd: cmd, in: in, out: bufio.NewScanner(out)}
	p.out.Buffer(nil, 1<<20)
	return p, nil
}

func (p *Process) exchange(c command) (answer, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	raw, err := json.Marshal(c)
	if err != nil {
		return answer{}, fmt.Errorf("load: %s: %w", c.Do, err)
	}
	if _, err := p.in.Write(append(raw, '\n')); err != nil {
		return answer{}, fmt.Errorf("load: %s: its process is gone: %w", c.Do, err)
	}
	if !p.out.Scan() {
		return answer{}, fmt.Errorf("load: %s: its process is gone: %w", c.Do, errors.Join(io.EOF, p.out.Err()))
	}
	var a answer
	if err := json.Unmarshal(p.out.Bytes(), &a); err != nil {
		return answer{}, fmt.Errorf("load: %s: %w", c.Do, err)
	}
	if a.Error != "" {
		return a, fmt.Errorf("load: %s: %s", c.Do, a.Error)
	}
	return a, nil
}

// Start lets the clients begin.
func (p *Process) Start(cfg Config) error {
	_, err := p.exchange(command{Do: "start", Config: &cfg})
	return err
}

// Rate is Runner.Rate.
func (p *Process) Rate(perSecond float64) error {
	_, err := p.exchange(command{Do: "rate", Rate: perSecond})
	return err
}

// Pause is Runner.Pause.
func (p *Process) Pause() error {
	_, err := p.exchange(command{Do: "pause"})
	return err
}

// Figures is Runner.Figures.
func (p *Process) Figures(w Window) (Figures, error) {
	a, err := p.exchange(command{Do: "figures", Window: &w})
	if err != nil || a.Figures == nil {
		return Figures{}, err
	}
	return *a.Figures, nil
}

// Await waits for the first answer that q asks for.
func (p *Process) Await(ctx context.Context, q FirstQuery) (First, error) {
	for {
		a, err := p.exchange(command{Do: "first", First: &q})
		if err != nil {
			return First{}, err
		}
		if a.First != nil && a.First.Found {
			return *a.First, nil
		}
		select {
		case <-ctx.Done():
			by := q.Node
			if by == "" {
				by = "another node than " + q.NotNode
			}
			return First{}, fmt.Errorf("no call of %s was answered by %s within %s of %s", q.Component, by, time.Since(q.After).Round(time.Millisecond), q.After.Format(time.StampMilli))
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// Verify is Runner.Verify.
func (p *Process) Verify() (*Report, error) {
	a, err := p.exchange(command{Do: "verify"})
	return a.Report, err
}

// Close ends the process.
func (p *Process) Close() error {
	err := p.in.Close()
	done := make(chan error, 1)
	go func() { done <- p.cmd.Wait() }()
	select {
	case werr := <-done:
		return errors.Join(err, werr)
	case <-time.After(5 * time.Second):
		return errors.Join(err, errors.New("load: its process did not end and was killed"), p.cmd.Process.Kill(), <-done)
	}
}
