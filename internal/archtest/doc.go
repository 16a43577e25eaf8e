// Package archtest holds the rules of the house as tests: who may import whom, that components stay small, that every package says
// what it is.
package archtest
