package runner

import (
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
)

// program is an open file that this machine can execute.
type program struct {
	file   *os.File
	owned  bool // opened here
	name   string
	script bool // #!: its descriptor must stay open for the interpreter
	system bool // needs the system's directories: a script, or a dynamically linked program
}

func (p *program) close() {
	if p.owned {
		p.file.Close() //nolint:errcheck // opened for reading only
	}
}

var machines = map[elf.Machine]string{
	elf.EM_X86_64: "amd64", elf.EM_AARCH64: "arm64", elf.EM_386: "386", elf.EM_ARM: "arm",
	elf.EM_RISCV: "riscv64", elf.EM_PPC64: "ppc64le", elf.EM_S390: "s390x", elf.EM_LOONGARCH: "loong64",
}

// open checks the head of the file: what cannot be executed here is refused with the reason before anything is started.
func (e ExecFile) open() (*program, error) {
	p := &program{file: e.File, name: e.Path}
	if p.file == nil {
		if e.Path == "" {
			return nil, fmt.Errorf("%w: neither a file nor a path was given", ErrNoExecutable)
		}
		f, err := os.Open(e.Path)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrNoExecutable, err)
		}
		p.file, p.owned = f, true
	}
	if p.name == "" {
		p.name = p.file.Name()
	}
	if err := p.inspect(); err != nil {
		p.close()
		return nil, err
	}
	return p, nil
}

func (p *program) inspect() error {
	st, err := p.file.Stat()
	if err != nil {
		return fmt.Errorf("%w: %s: %w", ErrNoExecutable, p.name, err)
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("%w: %s is no regular file", ErrNoExecutable, p.name)
	}
	var head [4]byte
	if _, err := p.file.ReadAt(head[:], 0); err != nil {
		if errors.Is(err, io.EOF) {
			return fmt.Errorf("%w: %s has only %d bytes", ErrNoExecutable, p.name, st.Size())
		}
		return fmt.Errorf("%w: read %s: %w", ErrNoExecutable, p.name, err)
	}
	if head[0] == '#' && head[1] == '!' {
		p.script, p.system = true, true
		return nil
	}
	switch string(head[:]) {
	case "\x7fELF":
		return p.inspectELF()
	case "\xcf\xfa\xed\xfe", "\xce\xfa\xed\xfe", "\xca\xfe\xba\xbe":
		return fmt.Errorf("%w: %s is a macOS program, this node is %s/%s", ErrWrongArch, p.name, runtime.GOOS, runtime.GOARCH)
	}
	if head[0] == 'M' && head[1] == 'Z' {
		return fmt.Errorf("%w: %s is a Windows program, this node is %s/%s", ErrWrongArch, p.name, runtime.GOOS, runtime.GOARCH)
	}
	return fmt.Errorf("%w: %s is neither an ELF program nor a #! script", ErrNoExecutable, p.name)
}

func (p *program) inspectELF() error {
	var head [20]byte
	if _, err := p.file.ReadAt(head[:], 0); err != nil {
		return fmt.Errorf("%w: %s: its ELF header is cut off", ErrNoExecutable, p.name)
	}
	var order binary.ByteOrder = binary.LittleEndian
	if elf.Data(head[elf.EI_DATA]) == elf.ELFDATA2MSB {
		order = binary.BigEndian
	}
	machine := elf.Machine(order.Uint16(head[18:]))
	arch, known := machines[machine]
	if !known {
		arch = machine.String()
	}
	if arch != runtime.GOARCH {
		return fmt.Errorf("%w: %s is for linux/%s, this node is %s/%s", ErrWrongArch, p.name, arch, runtime.GOOS, runtime.GOARCH)
	}
	f, err := elf.NewFile(p.file)
	if err != nil {
		return fmt.Errorf("%w: %s: damaged ELF file (half-written?): %w", ErrNoExecutable, p.name, err)
	}
	if f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN {
		return fmt.Errorf("%w: %s is an ELF file of type %s", ErrNoExecutable, p.name, f.Type)
	}
	for _, seg := range f.Progs {
		if seg.Type == elf.PT_INTERP {
			p.system = true
		}
	}
	return nil
}
