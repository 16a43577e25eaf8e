//go:build harm && linux

#include "textflag.h"

// func installClock()
TEXT ·installClock(SB), NOSPLIT, $0-0
	LEAQ clockGettime<>(SB), AX
	MOVQ AX, runtime·vdsoClockgettimeSym(SB)
	RET

// clockGettime is called as the kernel's function would be, by C's convention: the clock in DI, where the answer goes in SI.
TEXT clockGettime<>(SB), NOSPLIT|NOFRAME, $0-0
	MOVL $228, AX // clock_gettime
	SYSCALL
	CMPL DI, $0 // CLOCK_REALTIME
	JNE  done
	MOVQ ·skew(SB), CX
	ADDQ CX, 0(SI)

done:
	RET
