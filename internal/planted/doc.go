// Package planted holds the switches that break the product's safety rules on purpose, one at a time. The simulation (internal/sim) has
// shown that it can find bugs when it finds each of them; docs/testing.md lists them.
//
// Without the build tag "planted" every question is a constant false and the compiler removes what depends on it: nothing that is
// shipped can be broken this way. With the tag, one bug at a time is switched on, by the environment variable COPPICE_PLANTED or by Set.
package planted
