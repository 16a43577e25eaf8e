package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/coppice-project/coppice/dht/backup"
	"github.com/coppice-project/coppice/node"
)

func (c *cli) restoreClusterCmd() *cobra.Command {
	var data, name string
	var cmd *cobra.Command
	cmd = c.command(spec{
		group: groupNode, use: "restore-cluster FILE", short: "Make the first node of a new cluster from a backup",
		long: "Make the data folder of the first node of a new cluster from what coppice backup wrote: applications, registry and the components' state\n" +
			"are those of the backup. Nothing of the old cluster is needed. Start the node with coppice up, and let others join as in any new cluster:\n" +
			"each component starts from its checkpoint.\n\n" +
			"The new cluster has its own id, so nodes of the old one do not find back into it: empty their data folders and join them anew, and let none\n" +
			"of the old cluster run beside it. Its incarnation is the present time in seconds, so every fencing token is above all that the old cluster\n" +
			"gave out. What was revoked stays revoked; join tokens and places that commands had fixed are gone.\n\n" +
			"A data folder that is in use, and a file that is not whole, are refused, and nothing is changed.",
		example: examples(
			"coppice restore-cluster cluster.backup", "into the default data folder",
			"coppice restore-cluster cluster.backup --data /srv/coppice --name n1", "then: coppice up --data /srv/coppice --name n1"),
		min: 1, max: 1,
		run: func(ctx context.Context, args []string) error {
			if err := layer(cmd.Flags(), c.getenv); err != nil { // as for up, which is to find it there
				return err
			}
			return c.restoreCluster(ctx, args[0], data, name)
		},
	})
	cmd.Flags().StringVar(&data, "data", "", "data folder to make (default ~/.local/share/coppice/<name>)")
	cmd.Flags().StringVar(&name, "name", "", "name of the node (default: the host's)")
	return cmd
}

func (c *cli) restoreCluster(ctx context.Context, path, data, name string) error {
	named := name != ""
	if !named {
		name = hostName()
	}
	dir, err := dataDir(data, name, c.getenv)
	if err != nil {
		return err
	}
	res, err := node.Restore(ctx, node.RestoreConfig{
		Data: dir, Name: name, Now: c.now,
		Open: func() (io.ReadCloser, error) { return openBackup(path) },
	})
	if err != nil {
		return restoreFailure(path, err)
	}
	return c.show(res, func(w io.Writer) {
		fmt.Fprintf(w, "restored %s, %s and %s (%s of pages) of cluster %s as of %s\n",
			plural(int(res.GetApplications()), "application", "applications"), plural(int(res.GetArtifacts()), "artifact", "artifacts"),
			plural(int(res.GetCheckpoints()), "checkpoint", "checkpoints"), bytesText(res.GetBytes()), res.GetFromCluster(), res.GetTaken().AsTime().Format(time.RFC3339))
		fmt.Fprintf(w, "cluster %s begins with incarnation %d (the backup's was %d), in %s\n", res.GetCluster(), res.GetIncarnation(), res.GetFromIncarnation(), msText(res.GetTookMs()))
		for _, o := range res.GetOmitted() {
			fmt.Fprintln(w, c.paint(yellow)("not in the backup:"), oneLine(o))
		}
		line := "coppice up"
		if data != "" {
			line += " --data " + dir
		}
		if named {
			line += " --name " + name
		}
		fmt.Fprintln(w, "start it with:", line)
	})
}

func openBackup(path string) (io.ReadCloser, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%w: it is no regular file", backup.ErrForeign)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// restoreFailure says what to try.
func restoreFailure(path string, err error) error {
	f := &failure{what: "restore-cluster " + path, why: err.Error(), cause: err}
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, backup.ErrForeign):
		f.try = "a file that coppice backup wrote"
	case errors.Is(err, backup.ErrCut), errors.Is(err, backup.ErrDamaged):
		f.try = "copy it again from where it was made, or take another backup"
	case errors.Is(err, backup.ErrNewer):
		f.try = "the version of coppice that made it, or a later one"
	case errors.Is(err, node.ErrDataInUse):
		f.try = "coppice restore-cluster --data NEW_FOLDER " + path
	case errors.Is(err, node.ErrClock):
		f.try = "set the clock, then the same command again"
	case errors.Is(err, context.Canceled):
		f.why = "interrupted; nothing was changed"
	}
	return f
}
