package main

import (
	"github.com/spf13/cobra"
)

func (c *cli) dhtCmd() *cobra.Command {
	return c.groupCommand(groupKnow, "dht", "Look into the DHT",
		examples("coppice dht closest /system/placement", "the coordinator and its voters", "coppice dht get /kb/ckpt/shop/store-0", ""),
		c.dhtClosestCmd(), c.dhtGetCmd())
}

func (c *cli) dhtTable() *table {
	return c.table("", "NODE", "STATE", "DISTANCE", "ELIGIBLE", "VOTER", "HOLDS", "ID")
}
