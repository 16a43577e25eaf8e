//go:build !linux

package cluster

import (
	"errors"
	"time"
)

var errLinux = errors.New("clusters of several processes on one machine need Linux")

// NewNamespaces fails: there are none.
func NewNamespaces(int) (Network, error) { return nil, errLinux }

// BecomeReaper fails.
func BecomeReaper() error { return errLinux }

func descendants(int) ([]int, error) { return nil, errLinux }

func reap([]int) {}

// Usage is what a process has used.
type Usage struct {
	RSS  uint64
	CPU  time.Duration
	Time time.Time
}

// UsageOf fails.
func UsageOf(int) (Usage, error) { return Usage{}, errLinux }

// EnterUserNamespace does nothing.
func EnterUserNamespace(string) error { return nil }
