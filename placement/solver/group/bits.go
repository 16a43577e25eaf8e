package group

import "math/bits"

// bitset of candidates of a box, in the order of their value: lower bits are worth more.
type bitset []uint64

func newBitset(n int) bitset { return make(bitset, (n+63)/64) }

func (b bitset) set(i int)      { b[i>>6] |= 1 << (i & 63) }
func (b bitset) drop(i int)     { b[i>>6] &^= 1 << (i & 63) }
func (b bitset) has(i int) bool { return b[i>>6]>>(i&63)&1 != 0 }

// next is the first member from i on, -1: none.
func (b bitset) next(i int) int {
	w := i >> 6
	if w >= len(b) {
		return -1
	}
	if v := b[w] >> (i & 63); v != 0 {
		return i + bits.TrailingZeros64(v)
	}
	for w++; w < len(b); w++ {
		if b[w] != 0 {
			return w<<6 + bits.TrailingZeros64(b[w])
		}
	}
	return -1
}

// common counts what b and c share and finds the first of it, -1: nothing.
func (b bitset) common(c bitset) (n, first int) {
	first = -1
	for i, w := range b {
		if v := w & c[i]; v != 0 {
			if first < 0 {
				first = i<<6 + bits.TrailingZeros64(v)
			}
			n += bits.OnesCount64(v)
		}
	}
	return n, first
}

// and sets b to c without what d lacks.
func (b bitset) and(c, d bitset) {
	for i := range b {
		b[i] = c[i] & d[i]
	}
}

func (b bitset) without(c bitset) {
	for i := range b {
		b[i] &^= c[i]
	}
}

func (b bitset) fill(n int) {
	clear(b)
	for i := range n {
		b.set(i)
	}
}
