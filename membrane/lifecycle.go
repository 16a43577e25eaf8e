package membrane

import "fmt"

// State is where an instance is in its life.
type State uint8

const (
	Created  State = iota // attached or not, not started
	Starting              // Start is under way
	Running
	Frozen // calls are held and the component is quiet
	Stopped
	Failed
)

func (s State) String() string {
	return [...]string{"created", "starting", "running", "frozen", "stopped", "failed"}[s]
}

// Verb is what moves an instance from one state to another.
type Verb uint8

const (
	VerbStart  Verb = iota // begin to start
	VerbReady              // Start has returned, calls may come
	VerbFreeze             // calls are held, the component is quiet
	VerbThaw
	VerbStop
	VerbFail // the process ended or hangs, or a step failed for good
)

func (v Verb) String() string {
	return [...]string{"start", "ready", "freeze", "thaw", "stop", "fail"}[v]
}

// ErrTransition is wrapped by Next for what cannot follow.
type ErrTransition struct {
	From State
	Verb Verb
}

func (e *ErrTransition) Error() string {
	return fmt.Sprintf("cannot %s: the instance is %s", e.Verb, e.From)
}

// transitions lists what moves; what is not listed and not in idle is refused.
var transitions = map[State]map[Verb]State{
	Created:  {VerbStart: Starting, VerbStop: Stopped, VerbFail: Failed},
	Starting: {VerbReady: Running, VerbStop: Stopped, VerbFail: Failed},
	Running:  {VerbFreeze: Frozen, VerbStop: Stopped, VerbFail: Failed},
	Frozen:   {VerbThaw: Running, VerbStop: Stopped, VerbFail: Failed},
	Stopped:  {VerbStart: Starting, VerbFail: Failed},
	Failed:   {VerbStart: Starting, VerbStop: Stopped},
}

// idle lists verbs that ask for what already is: level-triggered callers repeat themselves.
var idle = map[State]map[Verb]bool{
	Starting: {VerbStart: true},
	Running:  {VerbStart: true, VerbReady: true, VerbThaw: true},
	Frozen:   {VerbFreeze: true},
	Stopped:  {VerbStop: true},
	Failed:   {VerbFail: true},
}

// Next is the lifecycle as a pure function: the state after a verb, and whether it is another one. What cannot follow is an
// *ErrTransition, and the state stays.
func Next(s State, v Verb) (next State, changed bool, err error) {
	if idle[s][v] {
		return s, false, nil
	}
	if n, ok := transitions[s][v]; ok {
		return n, true, nil
	}
	return s, false, &ErrTransition{s, v}
}
