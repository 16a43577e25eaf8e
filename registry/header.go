package registry

import (
	"debug/elf"
	"debug/macho"
	"errors"
	"fmt"
	"io"
	"strings"
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
	case string(magic) == "\xcf\xfa\xed\xfe", string(magic) == "\xce\xfa\xed\xfe", string(magic[:3]) == "\xfe\xed\xfa":
		return machoPlatform(r, size)
	case string(magic) == "\xca\xfe\xba\xbe":
		return "", fmt.Errorf("%w: several architectures in one file; push a file for each", ErrNotExecutable)
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
		if s.Type != elf.SHT_NOBITS && beyond(s.Offset, s.FileSize, size) {
			return "", fmt.Errorf("%w: section %s lies beyond byte %d", ErrIncomplete, s.Name, size)
		}
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD && beyond(p.Off, p.Filesz, size) {
			return "", fmt.Errorf("%w: a segment lies beyond byte %d", ErrIncomplete, size)
		}
	}
	if f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN {
		return "", fmt.Errorf("%w: an ELF file of type %s", ErrNotExecutable, f.Type)
	}
	arch := archs[f.Machine]
	if f.Machine == elf.EM_PPC64 && f.Data == elf.ELFDATA2LSB {
		arch = "ppc64le"
	}
	if arch == "" {
		arch = strings.ToLower(strings.TrimPrefix(f.Machine.String(), "EM_"))
	}
	system := systems[f.OSABI]
	if system == "" {
		system = "linux"
	}
	return system + "/" + arch, nil
}

// archs and systems are what Go calls what ELF numbers.
var (
	archs = map[elf.Machine]string{
		elf.EM_X86_64: "amd64", elf.EM_AARCH64: "arm64", elf.EM_386: "386", elf.EM_ARM: "arm", elf.EM_RISCV: "riscv64", elf.EM_PPC64: "ppc64",
		elf.EM_S390: "s390x", elf.EM_LOONGARCH: "loong64",
	}
	systems = map[elf.OSABI]string{elf.ELFOSABI_FREEBSD: "freebsd", elf.ELFOSABI_NETBSD: "netbsd", elf.ELFOSABI_OPENBSD: "openbsd", elf.ELFOSABI_SOLARIS: "solaris"}
)

// beyond says whether something in a file does not lie within its size.
func beyond(offset, length uint64, size int64) bool {
	return offset > uint64(size) || length > uint64(size)-offset
}

func machoPlatform(r io.ReaderAt, size int64) (string, error) {
	f, err := macho.NewFile(r)
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return "", fmt.Errorf("%w: %d bytes", ErrIncomplete, size)
	}
	if err != nil {
		return "", fmt.Errorf("%w: damaged Mach-O header: %w", ErrIncomplete, err)
	}
	for _, l := range f.Loads {
		if s, ok := l.(*macho.Segment); ok && beyond(s.Offset, s.Filesz, size) {
			return "", fmt.Errorf("%w: segment %s lies beyond byte %d", ErrIncomplete, s.Name, size)
		}
	}
	if f.Type != macho.TypeExec {
		return "", fmt.Errorf("%w: a Mach-O file of type %s", ErrNotExecutable, f.Type)
	}
	arch := map[macho.Cpu]string{macho.CpuAmd64: "amd64", macho.CpuArm64: "arm64"}[f.Cpu]
	if arch == "" {
		arch = strings.ToLower(strings.TrimPrefix(f.Cpu.String(), "Cpu"))
	}
	return "darwin/" + arch, nil
}
