package registry

import (
	"bytes"
	"debug/elf"
	"debug/macho"
	"encoding/binary"
	"errors"
	"os"
	"runtime"
	"strings"
	"testing"
)

// elfFile is a small ELF executable: a header, one segment and a body.
func elfFile(machine elf.Machine, edit ...func(*elf.Header64, *elf.Prog64)) []byte {
	h := elf.Header64{Type: uint16(elf.ET_EXEC), Machine: uint16(machine), Version: 1, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA], h.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), 1
	p := elf.Prog64{Type: uint32(elf.PT_LOAD), Off: 120, Filesz: 200, Memsz: 200}
	for _, f := range edit {
		f(&h, &p)
	}
	var b bytes.Buffer
	for _, v := range []any{h, p, make([]byte, 200)} {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			panic(err)
		}
	}
	return b.Bytes()
}

// machoFile is a small Mach-O executable.
func machoFile(cpu macho.Cpu, typ macho.Type) []byte {
	seg := macho.Segment64{Cmd: macho.LoadCmdSegment64, Len: 72, Offset: 104, Filesz: 100}
	h := macho.FileHeader{Magic: macho.Magic64, Cpu: cpu, Type: typ, Ncmd: 1, Cmdsz: 72}
	var b bytes.Buffer
	for _, v := range []any{h, uint32(0), seg, make([]byte, 100)} {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			panic(err)
		}
	}
	return b.Bytes()
}

func platformOf(b []byte) (string, error) { return Platform(bytes.NewReader(b), int64(len(b))) }

func TestPlatform(t *testing.T) {
	abi := func(a elf.OSABI) func(*elf.Header64, *elf.Prog64) {
		return func(h *elf.Header64, _ *elf.Prog64) { h.Ident[elf.EI_OSABI] = byte(a) }
	}
	for want, file := range map[string][]byte{
		"linux/amd64":   elfFile(elf.EM_X86_64),
		"linux/arm64":   elfFile(elf.EM_AARCH64),
		"linux/riscv64": elfFile(elf.EM_RISCV),
		"linux/ppc64le": elfFile(elf.EM_PPC64),
		"linux/sparcv9": elfFile(elf.EM_SPARCV9),
		"freebsd/amd64": elfFile(elf.EM_X86_64, abi(elf.ELFOSABI_FREEBSD)),
		"openbsd/arm64": elfFile(elf.EM_AARCH64, abi(elf.ELFOSABI_OPENBSD)),
		"darwin/arm64":  machoFile(macho.CpuArm64, macho.TypeExec),
		"darwin/amd64":  machoFile(macho.CpuAmd64, macho.TypeExec),
		"any":           []byte("#!/bin/sh\necho hello\n"),
	} {
		if got, err := platformOf(file); got != want || err != nil {
			t.Errorf("%q, %v, want %q", got, err, want)
		}
	}
	f, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Skip(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := Platform(f, st.Size()); got != runtime.GOOS+"/"+runtime.GOARCH || err != nil {
		t.Errorf("this test is for %q, %v", got, err)
	}
}

func TestWhatIsNoExecutable(t *testing.T) {
	for name, file := range map[string][]byte{
		"text":                  []byte("hello, I am a README"),
		"a picture":             []byte("\x89PNG\r\n\x1a\n and so on"),
		"an archive":            []byte("PK\x03\x04 and so on"),
		"zeros":                 make([]byte, 4096),
		"a library's object":    elfFile(elf.EM_X86_64, func(h *elf.Header64, _ *elf.Prog64) { h.Type = uint16(elf.ET_REL) }),
		"a core":                elfFile(elf.EM_X86_64, func(h *elf.Header64, _ *elf.Prog64) { h.Type = uint16(elf.ET_CORE) }),
		"several architectures": []byte("\xca\xfe\xba\xbe\x00\x00\x00\x02 and so on"),
		"a Mach-O library":      machoFile(macho.CpuArm64, macho.TypeDylib),
	} {
		if got, err := platformOf(file); !errors.Is(err, ErrNotExecutable) {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

func TestWhatIsCutOffIsIncompleteHoweverMuchIsThere(t *testing.T) {
	for name, file := range map[string][]byte{"ELF": elfFile(elf.EM_X86_64), "Mach-O": machoFile(macho.CpuArm64, macho.TypeExec)} {
		for n := range len(file) {
			if got, err := platformOf(file[:n]); err == nil || n > 3 && !errors.Is(err, ErrIncomplete) {
				t.Fatalf("%s: %d of %d bytes: %q, %v", name, n, len(file), got, err)
			}
		}
	}
	// A length that overflows with its offset is beyond the end, too.
	for _, huge := range []uint64{1 << 62, 1<<63 - 100, 1<<64 - 1} {
		file := elfFile(elf.EM_X86_64, func(_ *elf.Header64, p *elf.Prog64) { p.Filesz = huge })
		if got, err := platformOf(file); err == nil {
			t.Errorf("a segment of %d bytes: %q", huge, got)
		}
	}
}

func FuzzPlatform(f *testing.F) {
	f.Add(elfFile(elf.EM_X86_64))
	f.Add(elfFile(elf.EM_X86_64)[:70])
	f.Add(machoFile(macho.CpuArm64, macho.TypeExec))
	f.Add([]byte("#!/bin/sh\n"))
	f.Add([]byte{})
	f.Add([]byte("\x7fELF"))
	f.Fuzz(func(t *testing.T, b []byte) {
		got, err := platformOf(b)
		if (err == nil) != (got != "") || err == nil && got != anyPlatform && strings.Count(got, "/") != 1 {
			t.Errorf("%q, %v", got, err)
		}
	})
}
