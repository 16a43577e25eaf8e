package components

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

// Token is the pair that fences a stale instance: the number of the arbiter's life and the number of the ownership. Compared as one.
// The zero token is older than any.
type Token struct{ Incarnation, Epoch uint64 }

// Compare is negative when t is older than o, 0 when they are the same ownership, positive when t is newer.
func (t Token) Compare(o Token) int {
	if c := cmp.Compare(t.Incarnation, o.Incarnation); c != 0 {
		return c
	}
	return cmp.Compare(t.Epoch, o.Epoch)
}

// IsZero tells whether t names no ownership.
func (t Token) IsZero() bool { return t == Token{} }

// String is "incarnation.epoch", as it travels in metadata.
func (t Token) String() string {
	return strconv.FormatUint(t.Incarnation, 10) + "." + strconv.FormatUint(t.Epoch, 10)
}

// ParseToken is the reverse of String.
func ParseToken(s string) (Token, error) {
	inc, epoch, ok := strings.Cut(s, ".")
	if !ok {
		return Token{}, fmt.Errorf("%q is no token: expected incarnation.epoch", shorten(s))
	}
	var t Token
	var err error
	if t.Incarnation, err = parseDecimal(inc); err != nil {
		return Token{}, fmt.Errorf("incarnation of token %q: %w", shorten(s), err)
	}
	if t.Epoch, err = parseDecimal(epoch); err != nil {
		return Token{}, fmt.Errorf("epoch of token %q: %w", shorten(s), err)
	}
	return t, nil
}

// Proto is the token as the contract carries it.
func (t Token) Proto() *componentv1.Token {
	return &componentv1.Token{Incarnation: t.Incarnation, Epoch: t.Epoch}
}

// TokenFrom reads the contract's token; nil is the zero token.
func TokenFrom(p *componentv1.Token) Token {
	return Token{Incarnation: p.GetIncarnation(), Epoch: p.GetEpoch()}
}

// parseDecimal takes only what String writes: no sign, no leading zero.
func parseDecimal(s string) (uint64, error) {
	if len(s) > 1 && s[0] == '0' {
		return 0, fmt.Errorf("found %q, expected a number without leading zeros", shorten(s))
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("found %q, expected a whole number", shorten(s))
	}
	return n, nil
}
