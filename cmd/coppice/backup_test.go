package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coppice-project/coppice/dht/arbiter"
	"github.com/coppice-project/coppice/dht/backup"
	wirev1 "github.com/coppice-project/coppice/dht/wire/v1"
)

// smallBackup is a whole backup without any pages.
func smallBackup(t *testing.T, taken time.Time) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := backup.NewWriter(&b, &wirev1.BackupHeader{Cluster: "c1", Incarnation: 3, Index: 42, TakenUnixMs: uint64(taken.UnixMilli()), TakenBy: "n1"})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Register(arbiter.Register{Key: "meta/x", Body: bytes.Repeat([]byte("x"), 300)}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestBackupWritesAFileOrNothing(t *testing.T) {
	f := newFixture(t)
	f.fake.backup = smallBackup(t, epoch)
	dir := t.TempDir()
	path := filepath.Join(dir, "b")
	code, out, errs := f.run("backup", path)
	want := "backup of cluster c1 as of entry 42 of incarnation 1, made on n1\n1 application, 2 artifacts, 2 checkpoints: "
	if code != 0 || !strings.HasPrefix(out, want) || !strings.Contains(out, path) || !strings.Contains(errs, "writing registers (3)") {
		t.Errorf("status %d\n%s%s", code, out, errs)
	}
	check := func(content []byte) {
		t.Helper()
		got, err := os.ReadFile(path)
		if err != nil || !bytes.Equal(got, content) {
			t.Errorf("the file has %d bytes, want %d: %v", len(got), len(content), err)
		}
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("its mode is %v, %v", st.Mode(), err)
		}
		if list, err := os.ReadDir(dir); err != nil || len(list) != 1 {
			t.Errorf("beside it lies %v, %v", list, err)
		}
	}
	check(f.fake.backup)

	// What breaks off, or arrives as something else, leaves the older file as it was.
	older := f.fake.backup
	f.fake.backup = append([]byte("other"), older...)
	f.fake.hang = true
	if code, _, errs := f.run("backup", path); code != 1 || !strings.Contains(errs, "it is nowhere") || !strings.Contains(errs, "try: coppice doctor") {
		t.Errorf("broken off: status %d, %s", code, errs)
	}
	check(older)
	f.fake.hang, f.fake.unwell = false, true
	if code, _, errs := f.run("backup", path); code != 1 || !strings.Contains(errs, "what arrived is not what the node sent") {
		t.Errorf("garbled: status %d, %s", code, errs)
	}
	check(older)
	f.fake.unwell = false
	if code, out, errs := f.run("backup", path, "--partial"); code != 0 || !strings.Contains(out, "not in it: checkpoint 7 of shop/web-0") {
		t.Errorf("partial: status %d, %s%s", code, out, errs)
	}
	check(f.fake.backup)
	for _, bad := range []string{dir, filepath.Join(dir, "no", "folder")} {
		if code, _, errs := f.run("backup", bad); code != 1 || !strings.Contains(errs, "try: ") {
			t.Errorf("into %s: status %d, %s", bad, code, errs)
		}
	}
	if code, _, _ := f.run("backup"); code != 2 {
		t.Errorf("without a FILE: status %d", code)
	}
}

func TestRestoreClusterSaysWhyNot(t *testing.T) {
	f := newFixture(t)
	dir := t.TempDir()
	whole := smallBackup(t, epoch.Add(-time.Hour))
	put := func(name string, content []byte) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	damaged := bytes.Clone(whole)
	damaged[len(damaged)-60] ^= 4
	used := filepath.Join(dir, "used")
	if err := os.MkdirAll(filepath.Join(used, "db"), 0o700); err != nil {
		t.Fatal(err)
	}
	fresh := filepath.Join(dir, "fresh")
	for _, x := range []struct{ file, data, why, try string }{
		{put("cut", whole[:len(whole)-5]), fresh, "it is cut off after", "copy it again"},
		{put("empty", nil), fresh, "it is cut off after 0 bytes", "copy it again"},
		{put("damaged", damaged), fresh, "it is damaged", "copy it again"},
		{put("foreign", []byte("#!/bin/sh\necho no\n")), fresh, "it is no backup of a cluster", "a file that coppice backup wrote"},
		{put("newer", []byte("coppice backup 9\n")), fresh, "it was made by a newer version", "the version of coppice that made it"},
		{dir, fresh, "no regular file", "a file that coppice backup wrote"},
		{filepath.Join(dir, "nothing"), fresh, "no such file", "a file that coppice backup wrote"},
		{put("tomorrow", smallBackup(t, epoch.Add(24*time.Hour))), fresh, "the clock of this machine is behind", "set the clock"},
		{put("whole", whole), used, "the data folder is in use", "--data NEW_FOLDER"},
	} {
		code, out, errs := f.run("restore-cluster", x.file, "--data", x.data)
		if code != 1 || out != "" || !strings.Contains(errs, x.why) || !strings.Contains(errs, "\ntry: ") || !strings.Contains(errs, x.try) {
			t.Errorf("%s: status %d, %s%s", filepath.Base(x.file), code, out, errs)
		}
		if _, err := os.Stat(fresh); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("%s: it left something: %v", filepath.Base(x.file), err)
		}
	}

	// A drop folder may be there already, and what an earlier try left.
	for _, sub := range []string{"plugins", "restore.tmp"} {
		if err := os.MkdirAll(filepath.Join(fresh, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	code, out, errs := f.run("restore-cluster", filepath.Join(dir, "whole"), "--data", fresh, "--name", "m1")
	if code != 0 || !strings.Contains(out, "start it with: coppice up --data "+fresh+" --name m1") || !strings.Contains(out, "(the backup's was 3)") {
		t.Fatalf("status %d, %s%s", code, out, errs)
	}
	var names []string
	list, err := os.ReadDir(fresh)
	for _, e := range list {
		names = append(names, e.Name())
	}
	if got := strings.Join(names, " "); err != nil || got != "cluster.json db identity.key plugins raft" {
		t.Errorf("the folder has %s, %v", got, err)
	}
	if code, _, errs := f.run("restore-cluster", filepath.Join(dir, "whole"), "--data", fresh); code != 1 || !strings.Contains(errs, "that of node m1") {
		t.Errorf("again: status %d, %s", code, errs)
	}
}
