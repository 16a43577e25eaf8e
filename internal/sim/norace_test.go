//go:build !race

package sim

// defaultSchedules is how many schedules TestSim plays in all.
const defaultSchedules = 2000
