package main

import (
	"fmt"
	"os"
	"strings"

	"github.com/coppice-project/coppice/node/api"
	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

// client makes a client of the node that this run talks to: --api, else $COPPICE_API, else the only node of this user here.
func (c *cli) client() (apiv1connect.ControlClient, error) {
	t, err := c.target()
	if err != nil {
		return nil, err
	}
	c.api = t.Addr
	return api.Dial(t)
}

func (c *cli) target() (api.Target, error) {
	addr := c.api
	if addr == "" {
		addr = c.getenv("COPPICE_API")
	}
	token, err := c.givenToken()
	if err != nil {
		return api.Target{}, err
	}
	switch {
	case addr == "":
		e, err := api.Discover()
		if err != nil {
			return api.Target{}, err
		}
		return entryTarget(e, token)
	case !strings.Contains(addr, "://"):
		return namedTarget(addr, token)
	}
	return api.Target{Addr: addr, Token: token}, nil
}

// namedTarget finds a node of this machine by its name.
func namedTarget(name, token string) (api.Target, error) {
	entries, err := api.Registered()
	if err != nil {
		return api.Target{}, err
	}
	var names []string
	for _, e := range entries {
		if e.Name == name {
			return entryTarget(e, token)
		}
		names = append(names, e.Name)
	}
	here := "none runs here"
	if len(names) > 0 {
		here = "here run " + strings.Join(names, ", ")
	}
	return api.Target{}, &failure{
		what: "find node " + name, why: "no node of this user on this machine has that name: " + here,
		try: "coppice --api unix:///path|https://host:port …",
	}
}

func entryTarget(e api.Entry, token string) (api.Target, error) {
	if token == "" {
		var err error
		if token, err = api.ReadToken(e.Data + "/" + api.TokenFile); err != nil {
			return api.Target{}, err
		}
	}
	return api.Target{Addr: e.API, Token: token}, nil
}

// givenToken is --token, else $COPPICE_TOKEN; @FILE reads it from a file.
func (c *cli) givenToken() (string, error) {
	tok := c.token
	if tok == "" {
		tok = c.getenv("COPPICE_TOKEN")
	}
	if path, ok := strings.CutPrefix(tok, "@"); ok {
		return api.ReadToken(path)
	}
	return tok, nil
}

// where is the address being talked to, for messages.
func (c *cli) where() string {
	if c.api != "" {
		return c.api
	}
	return "the node"
}

// readInput reads a file, or stdin for "-"; most is a bound in bytes.
func (c *cli) readInput(path string, most int64) ([]byte, error) {
	in := c.in
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("read it: %w", err)
		}
		defer f.Close()
		in = f
	}
	raw, err := readAtMost(in, most)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return raw, nil
}
