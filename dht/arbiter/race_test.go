//go:build race

package arbiter

// underRace says that the race detector makes everything several times as dear.
const underRace = true
