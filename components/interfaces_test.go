package components

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"

	componentv1 "github.com/coppice-project/coppice/plugins/contract/component/v1"
)

const stock = `
provides { name: "store" service: "shop.v1.Store" }
provides { name: "http" kind: KIND_HTTP }
services { file {
  name: "shop.proto" package: "shop.v1" syntax: "proto3"
  message_type { name: "Order" field { name: "id" number: 1 type: TYPE_INT64 label: LABEL_OPTIONAL } field { name: "lines" number: 2 type: TYPE_MESSAGE type_name: ".shop.v1.Line" label: LABEL_REPEATED } }
  message_type { name: "Line" field { name: "isbn" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL } field { name: "n" number: 2 type: TYPE_UINT32 label: LABEL_OPTIONAL } }
  service { name: "Store"
    method { name: "Buy" input_type: ".shop.v1.Order" output_type: ".shop.v1.Order" }
    method { name: "Look" input_type: ".shop.v1.Order" output_type: ".shop.v1.Order" options { idempotency_level: NO_SIDE_EFFECTS } }
  }
} }`

func stockWith(t *testing.T, edit ...string) *componentv1.Description {
	t.Helper()
	text := stock
	for i := 0; i < len(edit); i += 2 {
		if !strings.Contains(text, edit[i]) {
			t.Fatalf("%q is not there", edit[i])
		}
		text = strings.Replace(text, edit[i], edit[i+1], 1)
	}
	d := &componentv1.Description{}
	if err := prototext.Unmarshal([]byte(text), d); err != nil {
		t.Fatal(err)
	}
	return d
}

// TestSubstitutes: what may change between two versions without a caller's noticing, and what may not.
func TestSubstitutes(t *testing.T) {
	old := stockWith(t)
	for _, c := range []struct {
		name string
		edit []string
		want string // a part of the only difference; "" none
	}{
		{"the same", nil, ""},
		{"a method more", []string{`method { name: "Buy"`, `method { name: "Sell" input_type: ".shop.v1.Order" output_type: ".shop.v1.Order" } method { name: "Buy"`}, ""},
		{"a field more", []string{`field { name: "n" number: 2`, `field { name: "price" number: 7 type: TYPE_DOUBLE label: LABEL_OPTIONAL } field { name: "n" number: 2`}, ""},
		{"a field less", []string{`field { name: "n" number: 2 type: TYPE_UINT32 label: LABEL_OPTIONAL }`, ""}, ""},
		{"a field renamed", []string{`name: "isbn"`, `name: "book"`}, ""},
		{"a wider integer", []string{`number: 2 type: TYPE_UINT32`, `number: 2 type: TYPE_UINT64`}, ""},
		{"an interface more", []string{`provides { name: "http"`, `provides { name: "audit" service: "shop.v1.Audit" } provides { name: "http"`}, ""},
		{"no side effects any more of a method that had some", []string{`method { name: "Buy" input_type: ".shop.v1.Order" output_type: ".shop.v1.Order" }`, `method { name: "Buy" input_type: ".shop.v1.Order" output_type: ".shop.v1.Order" options { idempotency_level: NO_SIDE_EFFECTS } }`}, ""},
		{"an interface less", []string{`provides { name: "http" kind: KIND_HTTP }`, ""}, "interface http (http) is gone"},
		{"another service", []string{`service: "shop.v1.Store"`, `service: "shop.v2.Store"`}, "interface store was shop.v1.Store and is shop.v2.Store"},
		{"a method less", []string{`method { name: "Buy" input_type: ".shop.v1.Order" output_type: ".shop.v1.Order" }`, ""}, "method shop.v1.Store/Buy is gone"},
		{"a stream", []string{`name: "Buy" input_type: ".shop.v1.Order" output_type: ".shop.v1.Order"`, `name: "Buy" input_type: ".shop.v1.Order" output_type: ".shop.v1.Order" server_streaming: true`}, "was one request, one answer and is a stream of answers"},
		{"side effects", []string{` options { idempotency_level: NO_SIDE_EFFECTS }`, ""}, "method shop.v1.Store/Look had no side effects and has some"},
		{"another type of a field of a field", []string{`number: 2 type: TYPE_UINT32`, `number: 2 type: TYPE_SINT32`}, "field 2 of shop.v1.Line (n) was an integer and is a zigzag integer"},
		{"one in place of many", []string{`label: LABEL_REPEATED`, `label: LABEL_OPTIONAL`}, "field 2 of shop.v1.Order (lines) was a list of a message and is a message"},
	} {
		t.Run(c.name, func(t *testing.T) {
			got := Substitutes(old, stockWith(t, c.edit...))
			switch {
			case c.want == "" && len(got) > 0:
				t.Errorf("it differs: %q", got)
			case c.want != "" && (len(got) != 1 || !strings.Contains(got[0], c.want)):
				t.Errorf("got %q, want %q", got, c.want)
			}
		})
	}
	if got := Substitutes(old, &componentv1.Description{}); len(got) != 2 {
		t.Errorf("of one that provides nothing: %q", got)
	}
	if got := Substitutes(&componentv1.Description{}, old); len(got) != 0 {
		t.Errorf("of one that provided nothing: %q", got)
	}
}

// TestProvides: a required interface is satisfied by its kind and service, whatever the provider calls it.
func TestProvides(t *testing.T) {
	d := stockWith(t)
	for want, r := range map[string]*componentv1.Interface{
		"":             {Name: "backend", Service: "shop.v1.Store"},
		"shop.v1.Till": {Name: "till", Service: "shop.v1.Till"},
		"events":       {Name: "news", Kind: componentv1.Kind_KIND_EVENT},
	} {
		err := Provides(d, r)
		if (err == nil) != (want == "") || err != nil && (!strings.Contains(err.Error(), want+" is required") || !strings.Contains(err.Error(), "shop.v1.Store, http")) {
			t.Errorf("%v: %v", r, err)
		}
	}
	if err := Provides(d, &componentv1.Interface{Name: "page", Kind: componentv1.Kind_KIND_HTTP}); err != nil {
		t.Error(err)
	}
	if err := Provides(proto.CloneOf(&componentv1.Description{}), &componentv1.Interface{Service: "x.Y"}); err == nil || !strings.Contains(err.Error(), "provides nothing") {
		t.Error(err)
	}
}
