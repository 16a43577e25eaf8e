package main

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
)

func (c *cli) backupCmd() *cobra.Command {
	var partial bool
	cmd := c.command(spec{
		group: groupNode, use: "backup FILE", short: "Write everything that is not derivable into a file",
		long: "Write desired state, ownership, the registry and the checkpoints of all components into one file, with the pages of every checkpoint\n" +
			"and artifact, as of one entry of the arbiter's log: what has been acknowledged before is in it. Components run on meanwhile. A voter\n" +
			"fetches what it does not hold and needs room for that. The file has a checksum, takes the place of an older one only when it is whole,\n" +
			"and is readable by its owner alone: it holds the state of all components. coppice restore-cluster makes a new cluster from it.\n\n" +
			"It fails while the pages of a checkpoint cannot be had. With --partial that checkpoint is left out, and it says so.",
		example: examples(
			"coppice backup cluster.backup", "",
			"coppice backup /backups/$(date +%F).coppice -o json", "in a nightly job"),
		min: 1, max: 1,
		run: func(ctx context.Context, args []string) error { return c.backup(ctx, args[0], partial) },
	})
	cmd.Flags().BoolVar(&partial, "partial", false, "leave out what no node has any more")
	return cmd
}

func (c *cli) backup(ctx context.Context, path string, partial bool) (err error) {
	cl, err := c.client()
	if err != nil {
		return err
	}
	out, err := createBeside(path)
	if err != nil {
		return &failure{what: "backup", why: err.Error(), try: "another FILE", cause: err}
	}
	defer func() { err = errors.Join(err, out.drop()) }()
	st, err := cl.Backup(ctx, &apiv1.BackupRequest{Partial: partial})
	if err != nil {
		return err
	}
	p := c.progress()
	var done *apiv1.BackupSummary
	for st.Receive() {
		switch k := st.Msg().GetKind().(type) {
		case *apiv1.BackupChunk_State:
			p.state("%s", k.State)
		case *apiv1.BackupChunk_Data:
			if _, werr := out.Write(k.Data); werr != nil {
				p.clear()
				return &failure{what: "backup", why: werr.Error(), try: "another FILE, where there is room", cause: werr}
			}
		case *apiv1.BackupChunk_Done:
			done = k.Done
		}
	}
	p.clear()
	if err := st.Err(); err != nil {
		return err
	}
	if done == nil || hex.EncodeToString(out.sum.Sum(nil)) != done.GetSha256() {
		return &failure{what: "backup", why: "what arrived is not what the node sent", try: "the same command again"}
	}
	if err := out.settle(path); err != nil {
		return &failure{what: "backup", why: err.Error(), try: "another FILE", cause: err}
	}
	if done.File, err = filepath.Abs(path); err != nil {
		return err
	}
	return c.show(done, func(w io.Writer) { c.backupText(w, done) })
}

func (c *cli) backupText(w io.Writer, s *apiv1.BackupSummary) {
	fmt.Fprintf(w, "backup of cluster %s as of entry %d of incarnation %d, made on %s\n", s.GetCluster(), s.GetIndex(), s.GetIncarnation(), s.GetNode())
	fmt.Fprintf(w, "%s, %s, %s: %s in %s, in %s\n", plural(int(s.GetApplications()), "application", "applications"), plural(int(s.GetArtifacts()), "artifact", "artifacts"),
		plural(int(s.GetCheckpoints()), "checkpoint", "checkpoints"), bytesText(s.GetBytes()), s.GetFile(), msText(s.GetTookMs()))
	for _, o := range s.GetOmitted() {
		fmt.Fprintln(w, c.paint(yellow)("not in it:"), oneLine(o))
	}
}

// besideFile is a file that is being written beside the one that it is to become.
type besideFile struct {
	*os.File
	sum   hash.Hash
	moved bool
}

// createBeside begins one, in the same folder and for its owner alone.
func createBeside(path string) (*besideFile, error) {
	if st, err := os.Stat(path); err == nil && !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return nil, err
	}
	return &besideFile{File: f, sum: sha256.New()}, nil
}

func (b *besideFile) Write(p []byte) (int, error) {
	b.sum.Write(p)
	return b.File.Write(p)
}

// settle gives the file its name once its bytes are on disk.
func (b *besideFile) settle(path string) error {
	if err := b.Sync(); err != nil {
		return err
	}
	if err := os.Rename(b.Name(), path); err != nil {
		return err
	}
	b.moved = true
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// drop closes it, and removes what did not get its name.
func (b *besideFile) drop() error {
	err := b.Close()
	if !b.moved {
		err = errors.Join(err, os.Remove(b.Name()))
	}
	return err
}
