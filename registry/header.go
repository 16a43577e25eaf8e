package registry

import (
	"debug/elf"
	"debug/macho"
	"errors"
	"fmt"
	"io"
)

// ErrIncomplete says that a file ends before its own header says it should: it is still being written, or was cut.
var ErrIncomplete = errors.New("the file ends before its header says it should")

// ErrNotExecutable says that a file is no executable of any kind we know.
var ErrNotExecutable = errors.New("not an executable (neither ELF, Mach-O nor a script)")

// Platform reads os/arch from an executable's header. It fails with ErrIncomplete or ErrNotExecutable.
func Platform(r io.ReaderAt, size int64) (string, error) {
	magic := make([]byte, 4)
	if n, err := r.ReadAt(magic, 0); n < 2 {
		if err == nil || errors.Is(err, io.EOF) {
			return "", fmt.Errorf("%w: %d bytes", ErrIncomplete, size)
		}
		return "", err
	}
	switch {
	case string(magic[:2]) == "#!":
		return "any", nil
	case string(magic) == elf.ELFMAG:
		return elfPlatform(r, size)
	case magic[0] == 0xcf && magic[1] == 0xfa, magic[0] == 0xfe && magic[1] == 0xed, string(magic) == "\xca\xfe\xba\xbe":
		return machoPlatform(r)
	}
	return "", ErrNotExecutable
}

func elfPlatform(r io.ReaderAt, size int64) (string, error) {
	f, err := elf.NewFile(r)
	if err != nil {
		if size < 64 || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return "", fmt.Errorf("%w: %d bytes", ErrIncomplete, size)
		}
		var format *elf.FormatError
		if errors.As(err, &format) {
			return "", fmt.Errorf("%w: damaged ELF header: %w", ErrIncomplete, err)
		}
		return "", fmt.Errorf("read the ELF header: %w", err)
	}
	for _, s := range f.Sections {
		if s.Type != elf.SHT_NOBITS && int64(s.Offset)+int64(s.FileSize) > size {
			return "", fmt.Errorf("%w: section %s ends at %d, the file at %d", ErrIncomplete, s.Name, int64(s.Offset)+int64(s.FileSize), size)
		}
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD && int64(p.Off)+int64(p.Filesz) > size {
			return "", fmt.Errorf("%w: a segment ends at %d, the file at %d", ErrIncomplete, int64(p.Off)+int64(p.Filesz), size)
		}
	}
	if f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN {
		return "", fmt.Errorf("%w: an ELF file of type %s", ErrNotExecutable, f.Type)
	}
	arch, ok := map[elf.Machine]string{
		elf.EM_X86_64: "amd64", elf.EM_AARCH64: "arm64", elf.EM_386: "386", elf.EM_ARM: "arm", elf.EM_RISCV: "riscv64",
		elf.EM_PPC64: "ppc64le", elf.EM_S390: "s390x", elf.EM_LOONGARCH: "loong64",
	}[f.Machine]
	if !ok {
		arch = f.Machine.String()
	}
	return "linux/" + arch, nil
}

func machoPlatform(r io.ReaderAt) (string, error) {
	f, err := macho.NewFile(r)
	if err != nil {
		return "", fmt.Errorf("read the Mach-O header: %w", err)
	}
	arch := map[macho.Cpu]string{macho.CpuAmd64: "amd64", macho.CpuArm64: "arm64"}[f.Cpu]
	if arch == "" {
		arch = f.Cpu.String()
	}
	return "darwin/" + arch, nil
}
