package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/coppice-project/coppice/node/api"
	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// Exit statuses.
const (
	exitDone   = 0
	exitFailed = 1
	exitUsage  = 2
)

// failure is how a command ends that did not do what it should: `coppice: <what>: <why>` and `try: <try>`.
type failure struct {
	what, why, try string
	details        []string // lines below the first, one for each of several errors
	cause          error
}

func (f *failure) Error() string { return f.what + ": " + f.why }
func (f *failure) Unwrap() error { return f.cause }

// usageError is wrong usage of a command.
type usageError struct {
	cmd *cobra.Command // nil: the command being run
	why string
}

func (u *usageError) Error() string { return u.why }

// usagef refuses what was typed.
func usagef(format string, args ...any) error { return &usageError{why: fmt.Sprintf(format, args...)} }

// failed turns what a command returned into a failure or a usageError.
func (c *cli) failed(cmd *cobra.Command, args []string, err error) error {
	var u *usageError
	var f *failure
	switch {
	case errors.As(err, &u):
		if u.cmd == nil {
			u.cmd = cmd
		}
		return u
	case errors.As(err, &f):
		return f
	}
	return c.asFailure(strings.TrimSpace(verb(cmd)+" "+shortArgs(args)), err)
}

func (c *cli) asFailure(what string, err error) *failure {
	f := &failure{what: what, why: oneLine(err.Error()), cause: err}
	var none *api.NoneError
	var several *api.SeveralError
	var ce *connect.Error
	switch p, ok := api.ProblemOf(err); {
	case ok:
		f.what, f.why, f.try = p.What, p.Why, p.Try
		if missing := lacking(p.Why, p.Candidates); len(missing) > 0 {
			f.why += " (" + strings.Join(missing, ", ") + ")"
		}
	case errors.As(err, &none):
		f.try = "coppice up"
	case errors.As(err, &several):
		f.try = "coppice --api " + several.Entries[0].Name + " " + what
	case errors.As(err, &ce):
		c.transport(f, ce)
	case errors.Is(err, context.DeadlineExceeded):
		f.why = "no answer in time"
	case errors.Is(err, context.Canceled):
		f.why = "interrupted"
	}
	return f
}

// transport explains an error that no server made: the node was not reached or did not answer.
func (c *cli) transport(f *failure, err *connect.Error) {
	var sys syscall.Errno
	switch code := err.Code(); {
	case code == connect.CodeDeadlineExceeded || errors.Is(err, context.DeadlineExceeded):
		f.why = "no answer in time"
		if c.timeout > 0 {
			f.why = fmt.Sprintf("no answer within %s", c.timeout)
		}
		f.try = "coppice doctor"
	case code == connect.CodeCanceled:
		f.why = "interrupted"
	case errors.As(err, &sys) && (sys == syscall.ECONNREFUSED || sys == syscall.ENOENT):
		f.why, f.try = "no node answers at "+c.where(), "coppice up"
	case errors.As(err, &sys) && (sys == syscall.EACCES || sys == syscall.EPERM):
		f.why = "this user may not talk to the node at " + c.where()
	case errors.As(err, new(net.Error)):
		f.why = "no node answers at " + c.where() + ": " + oneLine(err.Message())
	case code == connect.CodeUnauthenticated:
		f.why, f.try = "the node wants a token", "coppice --token @DATA/"+api.TokenFile+" …"
	case code == connect.CodeUnavailable:
		f.why = "the node went away: " + oneLine(err.Message())
	default:
		f.why = oneLine(err.Message())
	}
}

// problemOf says whether a server gave the reason of an error.
func problemOf(err error) (*apiv1.Problem, bool) { return api.ProblemOf(err) }

// lacking are the candidates that the text does not name already.
func lacking(text string, candidates []string) []string {
	var out []string
	for _, s := range candidates {
		if !strings.Contains(text, s) {
			out = append(out, s)
		}
	}
	return out
}

// end prints why a command failed and returns the exit status.
func (c *cli) end(cmd *cobra.Command, err error) int {
	var f *failure
	var u *usageError
	switch {
	case err == nil:
		return exitDone
	case errors.As(err, &f):
		c.printFailure(f.what, f.why, f.try, f.details...)
		return exitFailed
	case errors.As(err, &u) && u.cmd != nil:
		cmd = u.cmd
	}
	// What is left comes from cobra before a command ran: an unknown command, a wrong flag.
	what, help := verb(cmd), "coppice help "+verb(cmd)
	if what == "" {
		what, help = "usage", "coppice help"
	}
	c.printFailure(what, strings.TrimSuffix(firstLine(err.Error()), ` for "coppice"`), help)
	return exitUsage
}

func (c *cli) printFailure(what, why, try string, details ...string) {
	red, dim := c.errPaint(red), c.errPaint(dim)
	fmt.Fprintf(c.err, "%s %s: %s\n", red("coppice:"), oneLine(what), oneLine(why))
	for _, d := range details {
		fmt.Fprintln(c.err, " ", oneLine(d))
	}
	if try != "" {
		fmt.Fprintf(c.err, "%s %s\n", dim("try:"), oneLine(try))
	}
}

// warn tells something that does not make the command fail.
func (c *cli) warn(format string, args ...any) {
	fmt.Fprintf(c.err, "coppice: "+format+"\n", args...)
}

// verb is a command without the name of the binary: "dht closest".
func verb(cmd *cobra.Command) string {
	if cmd == nil {
		return ""
	}
	_, rest, _ := strings.Cut(cmd.CommandPath(), " ")
	return rest
}

func shortArgs(args []string) string {
	s := oneLine(strings.Join(args, " "))
	if r := []rune(s); len(r) > 60 {
		s = string(r[:59]) + "…"
	}
	return s
}

func firstLine(s string) string {
	s, _, _ = strings.Cut(s, "\n")
	return s
}

func oneLine(s string) string {
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
}

// isTerminal says whether a file is a terminal.
func isTerminal(f *os.File) bool {
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0 && isatty(f.Fd())
}
