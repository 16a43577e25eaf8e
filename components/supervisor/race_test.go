//go:build race

package supervisor

// underRace says that the race detector makes everything several times as dear.
const underRace = true
