package records

import (
	"slices"
	"testing"
	"time"

	"github.com/coppice-project/coppice/dht/store"
)

// A record that is broken on one holder's disk is refused there, told of, and had again from another holder; what lies beside it is found all the while.
func TestABrokenRecordIsReplacedFromAnotherHolder(t *testing.T) {
	for _, how := range []struct{ name, asked string }{{"asked for", "get"}, {"listed", "scan"}, {"met by nobody but the comparison", ""}} {
		t.Run(how.name, func(t *testing.T) {
			inGrove(t, 5, func(t *testing.T, g *grove) {
				key, beside := "/kb/own/app/x-0", "/kb/own/app/y-0"
				g.nodes[0].mustPut(key, "whole", 0)
				g.nodes[0].mustPut(beside, "beside", 0)
				time.Sleep(time.Second)
				broken := g.nodes[3]
				if !slices.Contains(g.holders(key, 1), 3) {
					t.Fatal("node 3 does not hold it")
				}
				disk := broken.disk.Datastore("dht", store.NoSync())
				if err := disk.Put(ctx, valueKey(key), []byte("\xffgarbage")); err != nil {
					t.Fatal(err)
				}
				switch how.asked {
				case "get":
					g.nodes[1].mustGet(key, "whole")
				case "scan":
					if recs, asked, answered := g.nodes[1].ScanAll(ctx, "/kb/own/"); len(recs) != 2 || answered != asked {
						t.Errorf("%d records of 2, %d of %d answered", len(recs), answered, asked)
					}
				default:
					if _, ok, err := broken.local.record(ctx, key); ok || err != nil {
						t.Errorf("it is read: %v, %v", ok, err)
					}
				}
				time.Sleep(2 * time.Minute) // rounds of comparison
				if rec, ok, err := broken.local.record(ctx, key); !ok || err != nil || string(rec.Value) != "whole" {
					t.Errorf("afterwards: %q, %v, %v", rec.Value, ok, err)
				}
				if st := broken.Status(); st.ReadFailures != 1 {
					t.Errorf("%d broken records are told of, want 1", st.ReadFailures)
				}
			})
		})
	}
}
