package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"debug/macho"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"connectrpc.com/connect"

	apiv1 "github.com/coppice-project/coppice/node/api/v1"
	"github.com/coppice-project/coppice/node/api/v1/apiv1connect"
)

// pushChunk is how much of a file one message carries.
const pushChunk = 256 << 10

type pushStream = connect.ClientStreamForClientSimple[apiv1.RegistryPushRequest, apiv1.RegistryPushResponse]

// localFile is an open file with what its first reading told.
type localFile struct {
	*os.File
	path   string
	bytes  uint64
	sha256 [sha256.Size]byte
}

// openLocal opens a regular file and reads it once for its digest.
func openLocal(path string) (*localFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	l, err := digestLocal(f, path)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return l, nil
}

func digestLocal(f *os.File, path string) (*localFile, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is no regular file", path)
	}
	if st.Size() == 0 {
		return nil, fmt.Errorf("%s is empty", path)
	}
	h := sha256.New()
	n, err := io.Copy(h, f)
	if err == nil {
		_, err = f.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	return &localFile{File: f, path: path, bytes: uint64(n), sha256: [sha256.Size]byte(h.Sum(nil))}, nil
}

// push publishes files as one version.
func (c *cli) push(ctx context.Context, cl apiv1connect.ControlClient, name, ver string, paths []string) (*apiv1.RegistryPushResponse, error) {
	var files []*localFile
	defer func() {
		for _, f := range files {
			f.Close() // read only
		}
	}()
	header := &apiv1.RegistryPushHeader{Name: name, Version: ver}
	for _, path := range paths {
		f, err := openLocal(path)
		if err != nil {
			return nil, &failure{what: "push " + path, why: err.Error(), cause: err}
		}
		files = append(files, f)
		header.Files = append(header.Files, &apiv1.RegistryPushFile{Name: filepath.Base(path), Bytes: f.bytes, Sha256: hex.EncodeToString(f.sha256[:])})
	}
	st, err := cl.RegistryPush(ctx)
	if err != nil {
		return nil, err
	}
	err = st.Send(&apiv1.RegistryPushRequest{Part: &apiv1.RegistryPushRequest_Header{Header: header}})
	for i, f := range files {
		if err == nil {
			err = c.sendFile(st, uint32(i), f)
		}
	}
	if err != nil && !errors.Is(err, io.EOF) { // EOF: the server has answered already, with its reason
		return nil, err
	}
	return st.CloseAndReceive()
}

func (c *cli) sendFile(st *pushStream, index uint32, f *localFile) error {
	p := c.progress()
	defer p.clear()
	if !c.errTTY {
		p.step("push %s (%s)", f.path, bytesText(f.bytes))
	}
	buf := make([]byte, pushChunk)
	for sent := uint64(0); sent < f.bytes; {
		n, err := io.ReadFull(f, buf[:min(uint64(len(buf)), f.bytes-sent)])
		if err != nil {
			return &failure{what: "push " + f.path, why: "it changed while it was being read", cause: err}
		}
		chunk := &apiv1.RegistryPushChunk{File: index, Data: bytes.Clone(buf[:n])}
		if err := st.Send(&apiv1.RegistryPushRequest{Part: &apiv1.RegistryPushRequest_Chunk{Chunk: chunk}}); err != nil {
			return err
		}
		sent += uint64(n)
		p.bar("push "+f.path, sent, f.bytes)
	}
	return nil
}

// platformOf reads os/arch from an executable's header; "" for what is none that we know. The registry looks again.
func platformOf(r io.ReaderAt) string {
	if f, err := elf.NewFile(r); err == nil {
		arch := map[elf.Machine]string{
			elf.EM_X86_64: "amd64", elf.EM_AARCH64: "arm64", elf.EM_386: "386", elf.EM_ARM: "arm", elf.EM_RISCV: "riscv64",
		}[f.Machine]
		if arch == "" {
			return ""
		}
		if f.OSABI == elf.ELFOSABI_FREEBSD {
			return "freebsd/" + arch
		}
		return "linux/" + arch
	}
	if f, err := macho.NewFile(r); err == nil {
		switch f.Cpu {
		case macho.CpuAmd64:
			return "darwin/amd64"
		case macho.CpuArm64:
			return "darwin/arm64"
		}
	}
	return ""
}
