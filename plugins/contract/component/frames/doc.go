// Package frames says what a stream of state frames has to be like (StateFrame in component.proto), for both of its ends: Digest seals a frame, a Verifier
// checks a stream while it passes. A membrane believes nothing about a state that it has not checked: what is cut off, damaged, repeated or left out by a
// component must not become a checkpoint.
//
// A checkpoint is a header frame, the frames of its sections, and an end frame. Within a section the offsets are those of one stream of bytes, without a gap; a
// section that has ended does not begin again; all data together are as long as the header says. A delta may hold the journal's entries instead: one for each
// mark, in order, from the one after since_mark to the header's. A journal stream is entries alone.
//
// It is not a decoder: what the bytes of a section mean is the component's business. The package starts no goroutines and keeps nothing of the data.
package frames
