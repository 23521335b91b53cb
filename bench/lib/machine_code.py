"""What a compiled kernel's machine code (SASS) says: registers, spills, load widths, and what the path taken issues.

A memory-bound kernel has a budget of instructions: what the multiprocessors can issue while the memory moves its bytes.
Above some 60% of that budget the two no longer hide each other, since neither arrives evenly. Hence ``path``: the
instructions that a warp issues from start to end, counted without a GPU. It is the longest way through the code, where

- a loop's body counts as often as the launch runs through it,
- a loop that multiplies and adds nothing counts never: it zeroes a row without a label, or looks among equals,
- a subroutine counts never: it is what a root or quotient does with a denormal number.

Rates per multiprocessor and cycle of compute capability 9.0 are those of the CUDA C++ Programming Guide (Arithmetic
Instructions): four schedulers issue one instruction of a warp each; comparisons, integer sums, shifts and logic go 64
threads wide, which is two warps; special functions and most conversions 16.
"""

from __future__ import annotations

import math
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

SCHEDULERS = 4  # of a multiprocessor
# opcodes -> warps a cycle and multiprocessor that their unit takes; what is not here, the four that are issued
ALU = frozenset(
    ("LOP3", "SHF", "IADD3", "ISETP", "SEL", "FSEL", "FMNMX", "IMNMX", "VIMNMX", "VIMNMX3", "VIADD", "VIADDMNMX",
     "PRMT", "FSETP", "FSET", "LEA", "PLOP3", "F2FP", "I2FP", "IABS", "SGXT", "BMSK", "MOV", "P2R", "R2P", "FCHK",
     "CS2R")
)  # fmt: skip
SPECIAL = frozenset(("MUFU", "I2F", "F2I", "F2F", "FRND", "POPC", "FLO", "BREV"))
ALU_RATE, SPECIAL_RATE = 2.0, 0.5
LOADS, STORES = ("LDG", "LDGSTS"), ("STG",)  # of global memory; LDGSTS is a load that goes to shared memory
FLOATING = frozenset(("FFMA", "FMUL", "FADD", "HFMA2", "HMUL2", "HADD2", "DFMA", "DMUL", "DADD"))


def binary(name: str) -> Path:
    """A program of CUDA's that Triton's package holds."""
    import triton.backends.nvidia as nvidia

    return Path(nvidia.__path__[0]) / "bin" / name


class Instruction(NamedTuple):
    predicate: str  # "", or such as "@!P0"
    opcode: str  # without modifiers
    modifiers: str  # ".E.128" and the like
    target: int | None  # of a branch: the number of an instruction

    @property
    def width(self) -> int:
        """Bytes that a thread moves: 16 for LDG.E.128 and the like, 4 unless a modifier says otherwise."""
        bits = re.search(r"\.(?:[US](8|16)|(64|128|256))\b", self.modifiers)
        return 4 if bits is None else int(bits[1] or bits[2]) // 8


class Compiled(NamedTuple):
    registers: int
    spills: int  # bytes of local memory and the instructions that touch it
    shared_bytes: int
    loads: Counter[int]  # width in bytes -> global loads in the machine code
    stores: Counter[int]
    code: tuple[Instruction, ...] = ()

    @property
    def narrow(self) -> int:
        return sum(n for widths in (self.loads, self.stores) for width, n in widths.items() if width < 16)


def compiled(cubin: bytes, shared_bytes: int) -> Compiled:
    """What NVIDIA's cuobjdump finds in a kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, text = (
            subprocess.run([binary("cuobjdump"), option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    number = {name: int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    code = instructions(text)
    spills = number["STACK"] + number["LOCAL"] + sum(x.opcode in ("LDL", "STL") for x in code)
    loads, stores = (Counter(x.width for x in code if x.opcode in names) for names in (LOADS, STORES))
    return Compiled(number["REG"], spills, shared_bytes, loads, stores, code)


def instructions(text: str) -> tuple[Instruction, ...]:
    """Those of cuobjdump's listing, numbered from 0: ``/*0170*/  @P0 BRA 0x1570 ;``."""
    found = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z0-9_]+)((?:\.\w+)*)([^;]*);", text, re.M)
    number = {int(address, 16): i for i, (address, *_) in enumerate(found)}
    return tuple(
        Instruction(predicate, opcode, modifiers, number[int(operands.split()[-1], 16)] if opcode == "BRA" else None)
        for _, predicate, opcode, modifiers, operands in found
    )


def widths_words(counts: Counter[int]) -> str:
    return " ".join(f"{n}x{width}" for width, n in sorted(counts.items(), reverse=True))


def resident_programs(registers: int, shared_bytes: int, num_warps: int) -> int:
    """How many programs a multiprocessor holds at once, on sm_90.

    CUDA's occupancy calculation with the limits of compute capability 9.0 (CUDA C++ Programming Guide, Technical
    Specifications): 64 warps, 32 blocks and 228 KB of shared memory a multiprocessor; 16,384 registers in each of its
    four partitions, given to a warp 256 at a time; shared memory 128 bytes at a time, 1 KB of each block the system's.
    """
    by_warps = 64 // num_warps
    a_warp = -(-registers * 32 // 256) * 256
    warps_a_block = -(-num_warps // 4) * 4  # spread over the partitions
    by_registers = 16384 // a_warp * 4 // warps_a_block
    by_shared = 228 * 1024 // (-(-(shared_bytes + 1024) // 128) * 128)
    return min(by_warps, by_registers, by_shared, 32)


# ------------------------------------------------------------------------------------------------------- the path taken


class PathTaken(NamedTuple):
    """Per warp, from a program's start to its end; bytes are what a thread loads, in its loop where it has one."""

    instructions: float
    alu: float
    special: float
    early_bytes: int  # asked for before the thread first waits for others of its program
    load_bytes: int


def path_taken(code: tuple[Instruction, ...], trips: float | None = None) -> PathTaken:
    """The longest way through the code, a loop run through ``trips`` times. ValueError for a loop and no trips."""
    weight = [1.0] * len(code)
    loops = [(x.target, i) for i, x in enumerate(code) if x.opcode == "BRA" and x.target < i]
    for start, end in loops:
        times = trips if any(x.opcode in FLOATING for x in code[start : end + 1]) else 0
        if times is None:
            raise ValueError(f"instructions {start} to {end} are a loop: say how often it is run through")
        weight[start : end + 1] = [w * times for w in weight[start : end + 1]]

    best: list[tuple[float, int | None]] = [(0.0, None)] * (len(code) + 1)  # length of the rest, and what comes next
    for i in reversed(range(len(code))):
        x, after = code[i], []
        ends = x.opcode in ("EXIT", "RET")
        if x.opcode == "CALL":
            best[i] = -math.inf, None
            continue
        if x.opcode == "BRA" and x.target > i:
            after.append(x.target)
        if x.predicate or not (ends or (x.opcode == "BRA" and x.target != i)):
            after.append(i + 1)
        length, following = max(((best[j][0], j) for j in after if j < len(code)), default=(0.0, None))
        best[i] = weight[i] + length, following

    taken, i = [], 0
    while i is not None:
        taken.append(i)
        i = best[i][1]
    counted = [(code[i], weight[i]) for i in taken]
    once = [(i, code[i]) for i in taken if weight[i] == max(weight)]  # the loop's body, or all
    loads = [(i, x.width) for i, x in once if x.opcode in LOADS]
    barrier = next((i for i, x in once if x.opcode == "BAR"), len(code))
    return PathTaken(
        sum(w for _, w in counted),
        sum(w for x, w in counted if x.opcode in ALU),
        sum(w for x, w in counted if x.opcode in SPECIAL),
        sum(width for i, width in loads if i < barrier),
        sum(width for _, width in loads),
    )
