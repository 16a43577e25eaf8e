// Package kb is the query engine of the knowledge base: SQL over what this node knows. It knows no meaning; the owners of a meaning
// register their tables (name, columns, a function that lists the rows now). A query runs in a SQLite engine inside the process,
// over virtual tables: nothing is copied, nothing can be written, and a query is bounded in time and rows.
//
// Every row has the columns age_ms (how old what it says is, measured by the node that answers) and source (which node it came
// from), so that an answer always says how far it can be trusted.
//
// Goroutines: none of its own.
package kb
