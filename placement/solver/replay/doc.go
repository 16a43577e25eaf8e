// Package replay plays traces of a changing world and compares policies of redeployment on them: which group of nodes is in force in each period, what it is
// worth, and what changing it costs.
//
// A policy sees the present and the past and never the future. In each period it is shown the problem as it is now, with the group that is in force less its
// dead members (they leave by themselves), and names the group that is in force from then on.
//
// The baselines are those of Rhizoma's evaluation (Yin, Schüpbach, Cappos, Baumann, Roscoe: Rhizoma: a runtime for self-deploying, self-managing overlays,
// Middleware 2009, §5): the first configuration kept, and its hill climber, which considers all that at most h actions reach.
//
// Goroutines: none. Everything is deterministic for a seed as long as no solve runs into its deadline.
package replay
