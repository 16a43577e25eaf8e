package harm

import (
	"encoding/json"
	"fmt"
	"os"
	"time"
)

// Variable names the file with the orders of a process.
const Variable = "COPPICE_HARM"

// Orders are what a process is harmed with.
type Orders struct {
	// Clock is added to the wall clock, in seconds.
	Clock int64 `json:"clock,omitempty"`
	// Fail names folders (a part of the path, "/raft/") in which every fsync fails.
	Fail []string `json:"fail,omitempty"`
	// Slow names folders in which every fsync takes SlowFor longer.
	Slow    []string      `json:"slow,omitempty"`
	SlowFor time.Duration `json:"slow_for,omitempty"`
	// Format is the highest format of the arbiter's entries that the program claims to know; 0: the real one. It is read at the start only.
	Format uint32 `json:"format,omitempty"`
}

// Write gives orders to the processes that look at the file.
func (o Orders) Write(path string) error {
	raw, err := json.Marshal(o)
	if err != nil {
		return fmt.Errorf("orders for %s: %w", path, err)
	}
	next := path + ".next"
	if err := os.WriteFile(next, raw, 0o600); err != nil {
		return fmt.Errorf("write orders: %w", err)
	}
	if err := os.Rename(next, path); err != nil { // never half of them
		return fmt.Errorf("write orders: %w", err)
	}
	return nil
}
