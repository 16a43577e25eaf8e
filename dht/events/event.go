package events

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/libp2p/go-libp2p/core/peer"
	"google.golang.org/protobuf/proto"

	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// Event is one thing that happened.
type Event struct {
	// ID is unique in the cluster; it is set when the event is published.
	ID string
	// Channel is a path, like "/apps/shop/store-0".
	Channel string
	Type    string
	// Time by the clock of the node that published it; Publish sets it where it is zero, and never lets it go back.
	Time time.Time
	// Node is the name of the node that published it; Publish sets it where it is empty.
	Node string
	// Trigger is what set it off, Cause why, Message the sentence for people.
	Trigger, Cause, Message string
	Fields                  map[string]string
}

const (
	maxChannel = 256
	maxWord    = 256
	maxMessage = 8 << 10
	maxFields  = 64
	maxField   = 1 << 10
	maxWire    = 96 << 10
)

var errInvalid = errors.New("invalid event")

// cut shortens a text to at most n bytes without breaking a character.
func cut(s string, n int) string {
	s = strings.ToValidUTF8(s, "\uFFFD")
	if len(s) > n {
		for n > 0 && !utf8.RuneStart(s[n]) {
			n--
		}
		s = s[:n]
	}
	return s
}

// wire returns what is stored and sent; origin, boot and counter are set later.
func (ev *Event) wire() *wirev1.Event {
	w := &wirev1.Event{
		Channel: CleanChannel(ev.Channel), Type: cut(ev.Type, maxWord), TimeUnixUs: ev.Time.UnixMicro(),
		Node: cut(ev.Node, maxWord), Trigger: cut(ev.Trigger, maxWord), Cause: cut(ev.Cause, maxField), Message: cut(ev.Message, maxMessage),
	}
	if len(ev.Fields) > 0 {
		w.Fields = map[string]string{}
		for _, k := range slices.Sorted(maps.Keys(ev.Fields)) {
			if len(w.Fields) == maxFields {
				break
			}
			w.Fields[cut(k, maxWord)] = cut(ev.Fields[k], maxField)
		}
	}
	return w
}

func fromWire(w *wirev1.Event) Event {
	return Event{
		ID:      fmt.Sprintf("%s/%x/%d", peer.ID(w.GetOrigin()), w.GetBoot(), w.GetCounter()),
		Channel: w.GetChannel(), Type: w.GetType(), Time: time.UnixMicro(w.GetTimeUnixUs()).UTC(), Node: w.GetNode(),
		Trigger: w.GetTrigger(), Cause: w.GetCause(), Message: w.GetMessage(), Fields: w.GetFields(),
	}
}

// check refuses what no node of ours would send.
func check(w *wirev1.Event) error {
	switch {
	case proto.Size(w) > maxWire:
		return fmt.Errorf("%w: %d bytes", errInvalid, proto.Size(w))
	case len(w.GetOrigin()) == 0 || len(w.GetOrigin()) > 128:
		return fmt.Errorf("%w: origin of %d bytes", errInvalid, len(w.GetOrigin()))
	case w.GetCounter() == 0:
		return fmt.Errorf("%w: no counter", errInvalid)
	case w.GetChannel() != CleanChannel(w.GetChannel()):
		return fmt.Errorf("%w: channel %q", errInvalid, w.GetChannel())
	}
	return nil
}

// CleanChannel returns the one way to write a channel: one slash before each part, none at the end, at most 256 bytes.
func CleanChannel(c string) string {
	parts := strings.FieldsFunc(c, func(r rune) bool { return r == '/' })
	c = cut("/"+strings.Join(parts, "/"), maxChannel)
	if len(c) > 1 {
		c = strings.TrimSuffix(c, "/")
	}
	return c
}

// under reports whether a channel is the one given or below it; both clean.
func under(channel, above string) bool {
	return above == "/" || channel == above || (strings.HasPrefix(channel, above) && channel[len(above)] == '/')
}

// compareTime orders events by time, then by identity.
func compareTime(a, b *wirev1.Event) int {
	switch {
	case a.GetTimeUnixUs() != b.GetTimeUnixUs():
		return sign(a.GetTimeUnixUs() < b.GetTimeUnixUs())
	case string(a.GetOrigin()) != string(b.GetOrigin()):
		return sign(string(a.GetOrigin()) < string(b.GetOrigin()))
	case a.GetBoot() != b.GetBoot():
		return sign(a.GetBoot() < b.GetBoot())
	case a.GetCounter() != b.GetCounter():
		return sign(a.GetCounter() < b.GetCounter())
	}
	return 0
}

func sign(less bool) int {
	if less {
		return -1
	}
	return 1
}
