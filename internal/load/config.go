package load

import (
	"errors"
	"fmt"
	"time"
)

// Gateway is how a client reaches one node.
type Gateway struct {
	Name string `json:"name"`
	HTTP string `json:"http"` // http://host:port
	API  string `json:"api"`  // as api.Dial takes it
}

// Config is what a run of the generator is told.
type Config struct {
	Seed     uint64    `json:"seed"`
	Run      string    `json:"run"`    // begins the names of clients, carts and keys; unique among the runs against a cluster
	Ledger   string    `json:"ledger"` // file; one JSON object a line
	Gateways []Gateway `json:"gateways"`

	Shop         string `json:"shop"`          // application of the web clients; empty: none
	ShopClients  int    `json:"shop_clients"`  // through the gateways' /app/<Shop>/
	Store        string `json:"store"`         // component of the store clients
	StoreClients int    `json:"store_clients"` // through the control API
	KV           string `json:"kv"`            // key-value component
	KVClients    int    `json:"kv_clients"`
	KVKeys       int    `json:"kv_keys"`     // keys a client writes over and over; 0: each write has a key of its own
	ValueBytes   int    `json:"value_bytes"` // of a value; 0: 32

	Rate     float64       `json:"rate"`     // calls per second of all clients together; 0: it begins paused
	Reads    float64       `json:"reads"`    // share of reads, 0 to 1
	Deadline time.Duration `json:"deadline"` // of a call, over all its attempts; 0: a minute
	Attempt  time.Duration `json:"attempt"`  // of one attempt; 0: two seconds
}

func (c *Config) check() error {
	if c.ValueBytes <= 0 {
		c.ValueBytes = 32
	}
	if c.Deadline <= 0 {
		c.Deadline = time.Minute
	}
	if c.Attempt <= 0 {
		c.Attempt = 2 * time.Second
	}
	switch {
	case len(c.Gateways) == 0:
		return errors.New("load: no gateway to send to")
	case c.clients() == 0:
		return errors.New("load: no clients")
	case c.ShopClients > 0 && c.Shop == "", c.ShopClients+c.StoreClients > 0 && c.Store == "", c.KVClients > 0 && c.KV == "":
		return errors.New("load: clients without a component to call")
	case c.Run == "" || c.Ledger == "":
		return errors.New("load: run and ledger must be set")
	case c.Reads < 0 || c.Reads > 1 || c.Rate < 0:
		return fmt.Errorf("load: rate %g, share of reads %g", c.Rate, c.Reads)
	}
	return nil
}

func (c *Config) clients() int { return c.ShopClients + c.StoreClients + c.KVClients }
