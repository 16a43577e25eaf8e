package membrane

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// Token is an ownership: the arbiter's incarnation and the instance's epoch, compared as one. The zero Token is older than any.
type Token struct {
	Incarnation, Epoch uint64
}

// Compare returns -1, 0 or +1 when t is older than, the same as or newer than o.
func (t Token) Compare(o Token) int {
	if c := cmp.Compare(t.Incarnation, o.Incarnation); c != 0 {
		return c
	}
	return cmp.Compare(t.Epoch, o.Epoch)
}

// String is the form on the wire, "incarnation.epoch".
func (t Token) String() string {
	return strconv.FormatUint(t.Incarnation, 10) + "." + strconv.FormatUint(t.Epoch, 10)
}

// Proto is the form in the contract's messages.
func (t Token) Proto() *componentv1.Token {
	return &componentv1.Token{Incarnation: t.Incarnation, Epoch: t.Epoch}
}

// ParseToken reads the form of String.
func ParseToken(s string) (Token, error) {
	inc, epoch, ok := strings.Cut(s, ".")
	if ok {
		i, ierr := strconv.ParseUint(inc, 10, 64)
		e, eerr := strconv.ParseUint(epoch, 10, 64)
		if ierr == nil && eerr == nil {
			return Token{i, e}, nil
		}
	}
	return Token{}, fmt.Errorf("token %q: want incarnation.epoch", s)
}

// Redirect says where an instance is served now.
type Redirect struct {
	Token Token
	Node  string
}

// String is the form of the trailer x-coppice-moved, "incarnation.epoch.node".
func (r Redirect) String() string { return r.Token.String() + "." + r.Node }

// ParseRedirect reads the form of String.
func ParseRedirect(s string) (Redirect, error) {
	parts := strings.SplitN(s, ".", 3)
	if len(parts) == 3 && parts[2] != "" {
		if t, err := ParseToken(parts[0] + "." + parts[1]); err == nil {
			return Redirect{Token: t, Node: parts[2]}, nil
		}
	}
	return Redirect{}, fmt.Errorf("redirect %q: want incarnation.epoch.node", s)
}
