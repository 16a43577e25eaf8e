package main

import (
	"context"
	"errors"
	"io"
	"io/fs"

	"github.com/coppice-project/coppice/dht/backup"
	"github.com/coppice-project/coppice/node"
)

// importing is what up --import was given: how the file is opened, once it was found to be whole. nil: nothing.
func importing(ctx context.Context, path string) (func() (io.ReadCloser, error), error) {
	if path == "" {
		return nil, nil
	}
	open := func() (io.ReadCloser, error) { return openBackup(path) }
	if _, err := node.CheckImport(ctx, open); err != nil {
		return nil, importFailure(path, err)
	}
	return open, nil
}

// importFailure says what to try.
func importFailure(path string, err error) error {
	f := &failure{what: "import " + path, why: err.Error(), cause: err}
	switch {
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, backup.ErrNoComponent), errors.Is(err, backup.ErrForeign):
		f.try = "a file that coppice fork --export wrote"
	case errors.Is(err, backup.ErrCut), errors.Is(err, backup.ErrDamaged):
		f.try = "copy it again from where it was made, or export it once more"
	case errors.Is(err, backup.ErrNewer):
		f.try = "the version of coppice that made it, or a later one"
	case errors.Is(err, context.Canceled):
		f.why = "interrupted; nothing was changed"
	}
	return f
}
