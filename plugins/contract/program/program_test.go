package program

import (
	"slices"
	"testing"
)

func TestWords(t *testing.T) {
	for line, want := range map[string][]string{
		`redis-server --port 6379`:         {"redis-server", "--port", "6379"},
		`nginx -g 'daemon off;'`:           {"nginx", "-g", "daemon off;"},
		`x --save '' "a b" c\ d`:           {"x", "--save", "", "a b", "c d"},
		`sh -c "echo \"$HOME\" \n"`:        {"sh", "-c", `echo "$HOME" \n`},
		"  a\n\tb  ":                       {"a", "b"},
		`a'b'"c"`:                          {"abc"},
		`echo '{"a": 1}' | cat > file * ~`: {"echo", `{"a": 1}`, "|", "cat", ">", "file", "*", "~"},
	} {
		got, err := Words(line)
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("%s: %q, %v; want %q", line, got, err, want)
		}
	}
	for _, line := range []string{"", "  ", `''`, `a 'b`, `a "b`, `a \`, "a\x00b"} {
		if got, err := Words(line); err == nil {
			t.Errorf("%q: %q, want an error", line, got)
		}
	}
}

func TestExpand(t *testing.T) {
	v := Values{Port: 80, StateDir: "/s d", Program: "/p"}
	got, err := v.Expand(`{program} --port={port} -p $PORT -q ${PORT} --dir {state_dir} '{"other": 1}' $HOME`)
	want := []string{"/p", "--port=80", "-p", "80", "-q", "80", "--dir", "/s d", `{"other": 1}`, "$HOME"}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
	if got, err = (Values{}).Expand("a {port} {state_dir}"); err != nil || !slices.Equal(got, []string{"a", "{port}", "{state_dir}"}) {
		t.Errorf("without values: %q, %v", got, err)
	}
}

func TestConfigGoesThrough(t *testing.T) {
	port := uint32(0)
	in := Config{Start: "a 'b'", Port: &port, StateDir: "data", Unattended: true}
	text, err := in.Text()
	if err != nil {
		t.Fatal(err)
	}
	out, err := Parse(text)
	if err != nil || out.Port == nil || *out.Port != 0 || out.Start != in.Start || !out.Unattended {
		t.Errorf("%+v, %v", out, err)
	}
	if (Config{}).Command() != Program {
		t.Error("without start it is the artifact's program")
	}
	for _, bad := range []string{"", "{"} {
		if _, err := Parse(bad); err == nil {
			t.Errorf("%q was taken", bad)
		}
	}
}
