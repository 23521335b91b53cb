"""Compile every kernel for GPUs that are not here, and hold registers, spills and load widths against recorded limits.

    python bench/aot.py [--arch sm_90] [--only rope] [--json FILE]      no GPU needed; exits 1 if a limit is exceeded

A memory-bound kernel is fast if it moves the minimum of bytes in 16-byte instructions with enough warps in flight. The
first two show in the machine code, and the third needs few registers and no spills; so a table of these, at the shapes
of Mistral-7B, stands in for a stopwatch where there is no GPU, and catches the change that costs a kernel its width.

A module of kernels/ takes part by a function ``aot_cases()`` that returns records (``dispatch.AotCase``) of:
a name that says kernel, shape and dtype, the dtype last; the @triton.jit function; its signature, argument ->
Triton type, with ":16" where a launch would find the pointer or integer divisible by 16 ("*bf16:16", "i32:16", "i32",
"fp32"); its constexpr arguments; num_warps. Limits are in LIMITS below; a case without a row there fails, so that
nothing slips in unmeasured.

The columns "load" and "store" count global memory instructions by width in bytes: 8x16 is eight of 16 bytes. They come
from the machine code (SASS), not PTX: what the hardware runs. "occup" is theoretical occupancy, for sm_90: the share of
a multiprocessor's 64 warps that registers, shared memory and warps a program let be there at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

MODULES = ("rms_norm", "rope", "swiglu", "cross_entropy", "adamw", "gradient_norm", "chunk_cat")
ARCHS = ("sm_80", "sm_90", "sm_100")

# Recorded on sm_90 with triton 3.9, held by 3.6: name -> (most registers, most bytes of shared memory, global memory
# instructions narrower than 16 bytes). The narrow ones are named: rstd, positions, a row's scalars; never a row's
# elements.
LIMITS: dict[str, tuple[int, int, int]] = {
    "rms_norm forward 4096 bf16": (56, 32, 1),  # stores rstd
    "rms_norm forward 4096 fp32": (72, 32, 1),
    "add_rms_norm forward 4096 bf16": (64, 32, 1),
    "add_rms_norm forward 4096 fp32": (72, 32, 1),
    "rms_norm remake 4096 bf16": (40, 0, 1),  # loads rstd
    "rms_norm remake 4096 fp32": (56, 0, 1),
    "rms_norm backward 4096 bf16": (80, 8192, 1),  # loads rstd; 80 registers are the most for 3 programs an SM
    "rms_norm backward 4096 fp32": (80, 32, 1),
    "add_rms_norm backward 4096 bf16": (80, 8192, 1),
    "add_rms_norm backward 4096 fp32": (80, 32, 1),
    "add_rms_norm backward and y 4096 bf16": (64, 16384, 1),  # 64 are the most for 2 programs of 16 warps an SM
    "add_rms_norm backward and y 4096 fp32": (64, 64, 1),
    "rope forward 32/8x128 bf16": (56, 0, 0),
    "rope forward 32/8x128 fp32": (56, 0, 0),
    "rope forward, positions 32/8x128 bf16": (56, 0, 1),  # loads the position
    "rope forward, positions 32/8x128 fp32": (56, 0, 1),
    "rope in place 32/8x128 bf16": (56, 0, 0),
    "rope in place 32/8x128 fp32": (56, 0, 0),
    "rope backward 32/8x128 bf16": (56, 0, 0),
    "rope backward 32/8x128 fp32": (56, 0, 0),
    "swiglu forward 14336 bf16": (32, 0, 0),
    "swiglu forward 14336 fp32": (40, 0, 0),
    "swiglu backward 14336 bf16": (40, 0, 0),
    "swiglu backward 14336 fp32": (40, 0, 0),
    "swiglu backward and h 14336 bf16": (40, 0, 0),
    "swiglu backward and h 14336 fp32": (48, 0, 0),
    # a row's scalars: label, its logit, the scale; loss, correct, the target's gradient (once for each path)
    "cross_entropy 32000 bf16": (64, 128, 8),  # 1024 threads have 64 registers each
    "cross_entropy, loss only 32000 bf16": (40, 32, 7),
    "cross_entropy 32001 bf16": (64, 128, 8),
    "cross_entropy, loss only 32001 bf16": (64, 32, 7),
    "cross_entropy 131072 bf16": (64, 128, 7),
    "cross_entropy, loss only 131072 bf16": (40, 32, 7),
    "scale_gradient in place bf16": (32, 0, 1),
    "scale_gradient fp32": (32, 0, 1),
    # five scalars; of four elements a thread, bf16 is 8 bytes, and of eight a code is; a group's exponents
    "adamw, fp32 moments bf16": (32, 0, 10),
    "adamw, bf16 moments bf16": (48, 0, 5),
    "adamw, 8bit moments bf16": (56, 64, 13),
    "add_rounded bf16": (32, 0, 0),
    "add_rounded fp32": (32, 0, 0),
    "add_wide bf16": (32, 4096, 0),
    "chunk_cat bf16": (32, 4096, 0),
    "chunk_cat fp32": (32, 0, 0),
    "gradient_norm bf16": (32, 32, 1),  # stores a program's sum
    "gradient_norm fp32": (32, 32, 1),
}


class Compiled(NamedTuple):
    registers: int
    spills: int  # bytes of local memory and the instructions that touch it
    shared_bytes: int
    loads: Counter[int]  # width in bytes -> global loads in the machine code
    stores: Counter[int]

    @property
    def narrow(self) -> int:
        return sum(n for widths in (self.loads, self.stores) for width, n in widths.items() if width < 16)


def occupancy(registers: int, shared_bytes: int, num_warps: int) -> float:
    """Resident warps over the most there can be, on sm_90.

    CUDA's occupancy calculation with the limits of compute capability 9.0 (CUDA C++ Programming Guide, Technical
    Specifications): 64 warps, 32 blocks and 228 KB of shared memory a multiprocessor; 16,384 registers in each of its
    four partitions, given to a warp 256 at a time; shared memory 128 bytes at a time, 1 KB of each block the system's.
    """
    by_warps = 64 // num_warps
    a_warp = -(-registers * 32 // 256) * 256
    warps_a_block = -(-num_warps // 4) * 4  # spread over the partitions
    by_registers = 16384 // a_warp * 4 // warps_a_block
    by_shared = 228 * 1024 // (-(-(shared_bytes + 1024) // 128) * 128)
    return min(by_warps, by_registers, by_shared, 32) * num_warps / 64


def binary(name: str) -> Path:
    import triton.backends.nvidia as nvidia

    return Path(nvidia.__path__[0]) / "bin" / name


def compile_case(case, arch: str) -> Compiled:
    """One kernel for one GPU generation. Raises what Triton or ptxas raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    _, kernel, types, constants, num_warps = case
    names = kernel.arg_names
    unknown = [name for name in (*types, *constants) if name not in names]
    if unknown or set(names) - set(types) - set(constants):
        raise ValueError(f"{case[0]}: arguments do not match the kernel's {names}")
    source = ASTSource(
        kernel,
        {name: types[name].partition(":")[0] if name in types else "constexpr" for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if types.get(name, "").endswith(":16")},
    )
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options={"num_warps": num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([binary("cuobjdump"), option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    number = {name: int(re.search(rf"\b{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL")}
    spills = number["STACK"] + number["LOCAL"] + len(re.findall(r"\b(?:LDL|STL)\b", code))
    # LDG and STG are global accesses; LDGSTS is a load that goes to shared memory
    loads, stores = (
        Counter(_width(modifiers) for modifiers in re.findall(rf"\b(?:{names})((?:\.\w+)*)", code))
        for names in ("LDG|LDGSTS", "STG")
    )
    return Compiled(number["REG"], spills, compiled.metadata.shared, loads, stores)


def _width(modifiers: str) -> int:
    """Bytes of LDG.E.128 and the like: 4 unless a modifier says otherwise."""
    bits = re.search(r"\.(?:[US](8|16)|(64|128|256))\b", modifiers)
    return 4 if bits is None else int(bits[1] or bits[2]) // 8


def cases(only: str | None = None) -> list:
    """The records of every kernel module that has some."""
    found = []
    for module in MODULES:
        listed = importlib.import_module(f"halny.kernels.{module}").aot_cases()
        found += [case for case in listed if only is None or only in case.name]
    return found


def complaints(name: str, arch: str, result: Compiled) -> list[str]:
    """What is beyond the limits: spills anywhere; registers, shared memory and widths where they were recorded."""
    found = [f"{result.spills} bytes of spills"] if result.spills else []
    if name not in LIMITS:
        return [*found, "no row in LIMITS"]
    registers, shared_bytes, narrow = LIMITS[name]
    if result.narrow > narrow:
        found.append(f"{result.narrow} global accesses below 16 bytes, the limit is {narrow}")
    if arch == "sm_90" and result.registers > registers:
        found.append(f"{result.registers} registers, the limit is {registers}")
    if arch == "sm_90" and result.shared_bytes > shared_bytes:
        found.append(f"{result.shared_bytes} bytes of shared memory, the limit is {shared_bytes}")
    return found


def write_rows(path: Path, rows: list[dict]) -> None:
    """A result file that says the same wherever it was made: nothing in it was measured."""
    import torch

    from bench.lib.clocks import Bench
    from bench.lib.results import machine, write_json

    described = machine(Bench(torch.device("cpu"), False, 0)) | {"device": "none: compiled ahead of time"}
    write_json(path, {"format": 1, "kind": "aot", "smoke": False, "machine": described, "rows": rows})


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", choices=ARCHS, action="append", help="GPU generation; may be repeated [all]")
    parser.add_argument("--only", help="kernels whose name contains this [all]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a result file, for report.py")
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("aot.py: TRITON_INTERPRET is set; interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton 3.9's default; 3.10 would change it under us
    warnings.filterwarnings("ignore", module="triton")
    import triton

    archs = [arch for arch in given.arch or ARCHS if arch != "sm_100" or binary("ptxas-blackwell").exists()]
    print(f"triton {triton.__version__}; no GPU is used; registers a thread, shared memory a program")
    if len(archs) < len(given.arch or ARCHS):
        print("sm_100: absent, this triton package has no ptxas-blackwell")
    print(
        f"{'kernel, shape, dtype':42} {'arch':7} {'warps':>5} {'regs':>5} {'spills':>6} {'shared':>6} {'occup':>5}"
        "  load / store"
    )
    failures, rows = 0, []
    jobs = [(case, arch) for case in cases(given.only) for arch in archs]
    with ThreadPoolExecutor(2) as pool:  # ptxas and cuobjdump are processes of their own
        results = list(pool.map(lambda job: compile_case(*job), jobs))
    for (case, arch), result in zip(jobs, results, strict=True):
        widths = [
            " ".join(f"{n}x{width}" for width, n in sorted(x.items(), reverse=True))
            for x in (result.loads, result.stores)
        ]
        warps, share = case[4], occupancy(result.registers, result.shared_bytes, case[4]) if arch == "sm_90" else None
        row = f"{case[0]:42} {arch:7} {warps:5} {result.registers:5} {result.spills:6} {result.shared_bytes:6} "
        row += f"{share:5.0%}" if share is not None else f"{'':5}"
        wrong = complaints(case[0], arch, result)
        failures += bool(wrong)
        print(f"{row}  {' / '.join(widths)}{'  <- ' + '; '.join(wrong) if wrong else ''}")
        rows.append({
            "kernel": case[0], "arch": arch, "warps": warps, "registers": result.registers, "spills": result.spills,
            "shared_bytes": result.shared_bytes, "occupancy": share, "loads": result.loads, "stores": result.stores,
        })  # fmt: skip
    if given.json:
        write_rows(given.json, rows)
    print(f"{len(jobs)} kernels compiled, {failures} beyond their limits")
    return 1 if failures or not jobs else 0


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not bench/: see kernels.py
    sys.exit(main(sys.argv[1:]))
