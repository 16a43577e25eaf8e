package api

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"connectrpc.com/connect"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

// Fail makes the error of a verb. what is the operation with its subject ("swap shop/store"), why one line, try a command that helps or
// "". The codes in use: InvalidArgument (the request is wrong whatever the state), NotFound, AlreadyExists, FailedPrecondition (the
// state does not allow it), Aborted (somebody else was first: look and try again), Unavailable (nobody could answer now),
// DeadlineExceeded (a wait ended; why says what it waited for), ResourceExhausted, Unauthenticated, PermissionDenied, Unimplemented and
// Internal.
func Fail(code connect.Code, what, why, try string) *connect.Error {
	return FailWith(code, &apiv1.Problem{What: what, Why: why, Try: try})
}

// Ambiguous makes the error for an address that names several things or none: candidates are what it could have meant.
func Ambiguous(what, address string, candidates []string) *connect.Error {
	p := &apiv1.Problem{What: what, Candidates: candidates, Why: fmt.Sprintf("there is no %q", address), Try: "coppice ps"}
	code := connect.CodeNotFound
	if len(candidates) > 0 {
		code = connect.CodeInvalidArgument
		p.Why = fmt.Sprintf("%q names several: %s", address, strings.Join(candidates, ", "))
		p.Try = ""
	}
	return FailWith(code, p)
}

// FailWith makes an error from a Problem. Line ends in it become spaces: what is printed is one line.
func FailWith(code connect.Code, p *apiv1.Problem) *connect.Error {
	p.What, p.Why, p.Try = oneLine(p.What), oneLine(p.Why), oneLine(p.Try)
	err := connect.NewError(code, errors.New(p.What+": "+p.Why))
	detail, derr := connect.NewErrorDetail(p)
	if derr != nil { // only a Problem with invalid UTF-8 cannot be packed
		return connect.NewError(code, fmt.Errorf("%q: %q", p.What, p.Why))
	}
	err.AddDetail(detail)
	return err
}

// ProblemOf finds the Problem in an error that came from a server. ok is false where there is none: the error is not a server's.
func ProblemOf(err error) (p *apiv1.Problem, ok bool) {
	var ce *connect.Error
	if !errors.As(err, &ce) {
		return nil, false
	}
	for _, d := range ce.Details() {
		v, err := d.Value()
		if err != nil {
			continue // a detail of a kind this version does not know
		}
		if p, ok := v.(*apiv1.Problem); ok {
			return p, true
		}
	}
	return nil, false
}

// asProblem gives any error of a handler a code and a Problem. Errors of a forwarded call pass with the code and the Problem that the
// owner gave them, without its headers.
func asProblem(ctx context.Context, verb string, err error) *connect.Error {
	code := codeOf(ctx, err)
	if p, ok := ProblemOf(err); ok {
		return FailWith(code, p)
	}
	why := err.Error()
	var ce *connect.Error
	if errors.As(err, &ce) {
		why = ce.Message()
	}
	switch code {
	case connect.CodeDeadlineExceeded:
		if errors.Is(err, context.DeadlineExceeded) {
			why = "not done in time"
		}
	case connect.CodeUnimplemented:
		why = "this node's version has no such command"
	}
	return FailWith(code, &apiv1.Problem{What: verb, Why: why})
}

func codeOf(ctx context.Context, err error) connect.Code {
	var ce *connect.Error
	switch {
	case errors.As(err, &ce):
		return ce.Code()
	case errors.Is(err, context.DeadlineExceeded):
		return connect.CodeDeadlineExceeded
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		return connect.CodeCanceled
	}
	return connect.CodeInternal
}

func oneLine(s string) string {
	return strings.Join(strings.FieldsFunc(strings.ToValidUTF8(s, "\uFFFD"), func(r rune) bool { return r == '\n' || r == '\r' }), " ")
}
