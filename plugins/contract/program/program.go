// Package program is what a node and the exec component agree on about an ordinary program: how a manifest's `run:` reaches the component, and how the command
// lines in it are read. It starts no goroutines and holds no state.
package program

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// Env is the environment variable that holds a Config as JSON.
const Env = "COPPICE_RUN"

const (
	// TunnelPath is the path of the interface http under which a connection to the program's port is had, by an upgrade to TunnelProtocol.
	TunnelPath = "/.coppice/tcp"
	// TunnelProtocol is the name of that upgrade: from then on the bytes are those of the connection.
	TunnelProtocol = "coppice-tcp"
)

// Config is how a program is run. The keys are those of a manifest's run.
type Config struct {
	Start    string  `json:"start,omitempty"`     // command line; "" = the program of the artifact, without arguments
	Stop     string  `json:"stop,omitempty"`      // name of the signal that ends it; "" = SIGTERM
	Port     *uint32 `json:"port,omitempty"`      // where it listens; 0: the node chooses a free one for each start; nil: nowhere
	Health   string  `json:"health,omitempty"`    // GET /path, tcp, or a command line
	StateDir string  `json:"state_dir,omitempty"` // below its working folder; "" = it has no state
	Quiesce  string  `json:"quiesce,omitempty"`   // command line, before each snapshot
	Resume   string  `json:"resume,omitempty"`    // command line, after each snapshot

	File string `json:"file,omitempty"` // path of the program that its artifact brought
	// Unattended says that its state is saved without anybody asking: then it is saved once more when the program has ended of itself.
	Unattended bool `json:"unattended,omitempty"`
}

// Parse reads what Env holds.
func Parse(text string) (Config, error) {
	var c Config
	if text == "" {
		return c, fmt.Errorf("$%s is not set: a node starts this component for a manifest's run", Env)
	}
	if err := json.Unmarshal([]byte(text), &c); err != nil {
		return c, fmt.Errorf("$%s: %w", Env, err)
	}
	return c, nil
}

// Text is what Parse reads.
func (c Config) Text() (string, error) {
	b, err := json.Marshal(c)
	return string(b), err
}

// Program stands for the file of the artifact in a command line.
const Program = "{program}"

// Command is the command line that starts it.
func (c Config) Command() string {
	if c.Start == "" {
		return Program
	}
	return c.Start
}

// Words splits a command line as a shell does: at blanks, with '…', "…" and \ for what they keep together. Nothing else of a shell is known: no variables, no
// wildcards, no pipes. An error says what is open at its end, or that there is no word at all.
func Words(line string) ([]string, error) {
	var words []string
	var word strings.Builder
	inside, quote := false, rune(0)
	escaped := false
	for _, r := range line {
		switch {
		case r == 0:
			return nil, errors.New("a zero byte")
		case escaped:
			if quote == '"' && r != '"' && r != '\\' {
				word.WriteByte('\\')
			}
			word.WriteRune(r)
			escaped = false
		case r == '\\' && quote != '\'':
			escaped, inside = true, true
		case quote != 0 && r == quote:
			quote = 0
		case quote != 0:
			word.WriteRune(r)
		case r == '\'' || r == '"':
			quote, inside = r, true
		case r == ' ' || r == '\t' || r == '\n' || r == '\r':
			if inside {
				words = append(words, word.String())
			}
			word.Reset()
			inside = false
		default:
			word.WriteRune(r)
			inside = true
		}
	}
	switch {
	case quote != 0:
		return nil, fmt.Errorf("a quote %c that is not closed", quote)
	case escaped:
		return nil, errors.New(`a \ at the end`)
	}
	if inside {
		words = append(words, word.String())
	}
	if len(words) == 0 || words[0] == "" {
		return nil, errors.New("no command")
	}
	return words, nil
}

// Values are what stands for names in a command line.
type Values struct {
	Port     int    // 0: none
	StateDir string // absolute; "" none
	Program  string // path of the artifact's file; "" none
}

// Environ are the variables that the program and its hooks are given, besides the node's.
func (v Values) Environ() []string {
	var out []string
	if v.Port > 0 {
		out = append(out, "PORT="+strconv.Itoa(v.Port))
	}
	if v.StateDir != "" {
		out = append(out, "STATE_DIR="+v.StateDir)
	}
	return out
}

// Expand splits a command line and puts the values in: {port} and $PORT, {state_dir} and $STATE_DIR, {program}.
func (v Values) Expand(line string) ([]string, error) {
	words, err := Words(line)
	if err != nil {
		return nil, err
	}
	var pairs []string
	if v.Port > 0 {
		port := strconv.Itoa(v.Port)
		pairs = append(pairs, "{port}", port, "${PORT}", port, "$PORT", port)
	}
	if v.StateDir != "" {
		pairs = append(pairs, "{state_dir}", v.StateDir, "${STATE_DIR}", v.StateDir, "$STATE_DIR", v.StateDir)
	}
	if v.Program != "" {
		pairs = append(pairs, Program, v.Program)
	}
	r := strings.NewReplacer(pairs...)
	for i, w := range words {
		words[i] = r.Replace(w)
	}
	return words, nil
}
