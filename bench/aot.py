"""Compile every kernel for GPUs that are not here, and hold registers, spills and load widths against recorded limits.

    python bench/aot.py [--arch sm_90] [--only rope] [--json FILE]      no GPU needed; exits 1 if a limit is exceeded
    python bench/aot.py --issue             what each kernel issues on sm_90, beside the time that its bytes take

A memory-bound kernel is fast if it moves the minimum of bytes in 16-byte instructions with enough warps in flight. The
first two show in the machine code, and the third needs few registers and no spills; so a table of these, at the shapes
of Mistral-7B, stands in for a stopwatch where there is no GPU, and catches the change that costs a kernel its width.

``operations`` lists the cases: a name, and a call of an operation on tensors of the meta device, which have shapes and
no data. kernels/dispatch.py writes down each launch in place of making it, and Triton's own code then specialises it,
as on a GPU: by dtypes, by integers that are 1, by integers and addresses that 16 divides. (Of a meta tensor's memory
it always does, so an address is as aligned as the tensor's offset.) Limits are in LIMITS below. A case without a row
there fails, and so does a launch that is no case's, so that nothing slips in unmeasured.

The columns "load" and "store" count global memory instructions by width in bytes: 8x16 is eight of 16 bytes. They come
from the machine code (SASS), not PTX: what the hardware runs. "occup" is theoretical occupancy, for sm_90: the share of
a multiprocessor's 64 warps that registers, shared memory and warps a program let be there at once.

``--issue`` counts the instructions along the path taken (bench/lib/machine_code.py) and divides the time that they need
by the time that the launch's bytes need on an H200: "issue" of the four schedulers' slots, "ALU" of the unit for
integers and comparisons, "special" of the one for roots, exponentials and most conversions. A row is one of the
launch's largest tensor, a token for RoPE. "early" is the share of a thread's loads that are asked for before it first
waits for the other threads of its program; in a kernel that loops over rows, within one run through the loop.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not bench/: see kernels.py

import torch
from torch import Tensor

from bench.lib import machine_code
from bench.lib.machine_code import Compiled, binary, path_taken, resident_programs, widths_words
from bench.lib.traffic import TRAFFIC, size
from halny.kernels import adamw, dispatch, rms_norm, rope, swiglu
from halny.kernels.chunk_cat import chunk_cat
from halny.kernels.cross_entropy import cross_entropy
from halny.kernels.embedding import embedding
from halny.kernels.gradient_norm import gradient_norm
from halny.kernels.linear_cross_entropy import linear_cross_entropy
from halny.kernels.recompute_linear import add_rms_norm_linear, rms_norm_linear, swiglu_linear
from halny.kernels.scale_gradient import scale_gradient
from halny.kernels.stochastic_rounding import add_rounded_, add_wide

ARCHS = ("sm_80", "sm_90", "sm_100")

# An H200: the rate at which it copies, and a clock between that of a kernel alone, 1.98 GHz, and that of the 7B's step
# at 700 W, 1.49 GHz (bench/results/2026-11-27-NVIDIA-H200)
MULTIPROCESSORS, BYTES_A_SECOND, HERTZ = 132, 4.3e12, 1.75e9

# Recorded on sm_90 with triton 3.9, held by 3.6: name -> (most registers, most bytes of shared memory, global memory
# instructions narrower than 16 bytes, most percent of the time of its bytes that a unit needs for its instructions).
# The narrow ones are named: rstd, positions, a row's scalars; never a row's elements.
LIMITS: dict[str, tuple[int, int, int, int]] = {
    "rms_norm forward 4096 bf16": (64, 32, 1, 30),  # stores rstd
    "rms_norm forward 4096 fp32": (72, 32, 1, 15),
    "add_rms_norm forward 4096 bf16": (64, 32, 1, 20),
    "add_rms_norm forward 4096 fp32": (72, 32, 1, 10),
    "rms_norm recompute 4096 bf16": (40, 0, 1, 20),  # loads rstd
    "rms_norm recompute 4096 fp32": (56, 0, 1, 9),
    "rms_norm dweight 4096 bf16": (96, 1024, 1, 44),  # 32 columns of weight a program, one a thread
    "rms_norm dweight 4096 fp32": (96, 1024, 1, 44),
    "rms_norm backward 4096 bf16": (128, 8192, 2, 36),  # loads rstd, the first row's and the next's
    "rms_norm backward 4096 fp32": (104, 32, 1, 14),  # 128 registers are the most for 16 warps an SM
    "add_rms_norm backward 4096 bf16": (128, 8192, 2, 33),
    "add_rms_norm backward 4096 fp32": (120, 32, 1, 13),
    "rms_norm backward and y 4096 bf16": (128, 8192, 2, 32),
    "rms_norm backward and y 4096 fp32": (128, 32, 1, 13),
    "add_rms_norm backward and y 4096 bf16": (128, 8192, 2, 30),
    "add_rms_norm backward and y 4096 fp32": (128, 32, 1, 12),
    "rope out of place 32/8x128 bf16": (72, 0, 0, 29),
    "rope out of place 32/8x128 fp32": (64, 0, 0, 19),
    "rope forward 32/8x128 bf16": (64, 0, 0, 31),
    "rope forward 32/8x128 fp32": (48, 0, 0, 19),
    "rope forward, positions 32/8x128 bf16": (64, 0, 1, 32),  # loads the position
    "rope forward, positions 32/8x128 fp32": (48, 0, 1, 19),
    "rope backward 32/8x128 bf16": (72, 0, 0, 29),
    "rope backward 32/8x128 fp32": (64, 0, 0, 19),
    "swiglu forward 14336 bf16": (32, 0, 0, 49),
    "swiglu forward 14336 fp32": (40, 0, 0, 21),
    "swiglu backward 14336 bf16": (40, 0, 0, 47),
    "swiglu backward 14336 fp32": (40, 0, 0, 20),
    "swiglu backward and h 14336 bf16": (40, 0, 0, 42),
    "swiglu backward and h 14336 fp32": (48, 0, 0, 18),
    # a row's scalars: label, its logit, the scale, padding; loss, correct (once for each path), the target's gradient;
    # and what the target's thread had, dealt out among the others. 128 registers are 4 programs of 4 warps an SM
    "cross_entropy 32000 bf16": (128, 16, 10, 55),
    "cross_entropy, loss only 32000 bf16": (96, 16, 8, 63),  # the exponentials alone are 58
    "cross_entropy 32001 bf16": (128, 16, 11, 55),
    "cross_entropy, loss only 32001 bf16": (80, 16, 9, 63),
    "cross_entropy 131072 bf16": (128, 32, 10, 56),
    "cross_entropy, loss only 131072 bf16": (96, 16, 14, 61),
    "scale_gradient in place bf16": (32, 0, 1, 40),
    "scale_gradient fp32": (32, 0, 1, 31),
    # five scalars; of four elements a thread, bf16 is 8 bytes, and of eight a code is; a group's exponents
    "adamw, fp32 moments bf16": (32, 0, 10, 21),
    "adamw, bf16 moments bf16": (48, 0, 5, 35),
    "adamw, fp32 moments fp32": (32, 0, 9, 20),
    "adamw, bf16 moments fp32": (56, 0, 5, 31),
    "adamw, 8bit moments bf16": (56, 0, 13, 58),
    "add_rounded bf16": (32, 0, 0, 35),
    "add_rounded fp32": (32, 0, 0, 26),
    "add_wide bf16": (32, 4096, 0, 21),
    "chunk_cat bf16": (32, 4096, 0, 19),
    "chunk_cat fp32": (32, 0, 0, 10),
    # tokens and the places of up to 8 of them; the longest way adds 8 rows, which one program in eight can go
    "embedding backward bf16": (56, 0, 18, 126),
    "embedding backward fp32": (56, 0, 18, 46),
    "gradient_norm bf16": (32, 32, 1, 36),  # stores a program's sum
    "gradient_norm fp32": (32, 32, 1, 20),
}


# --------------------------------------------------------------------------------------------------------- the launches


class Launch(NamedTuple):
    """What dispatch.launch was given."""

    kernel: Callable
    grid: tuple[int, ...]
    arguments: tuple
    constants: dict[str, object]  # num_warps among them


def launches_of(operation: Callable[[], object]) -> list[Launch]:
    """Those that an operation on meta tensors would make on a Hopper GPU, in order."""
    found: list[Launch] = []
    gpu = dispatch.StandIn((9, 0), MULTIPROCESSORS, (), record=lambda *launch: found.append(Launch(*launch)))
    with dispatch.stand_in(gpu):
        operation()
    return found


def meta(*shape: int, dtype: torch.dtype, leaf: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=leaf)


def gradients(outputs: Tensor | tuple[Tensor, ...], *inputs: Tensor) -> None:
    outputs = [outputs] if isinstance(outputs, Tensor) else [y for y in outputs if y.requires_grad]
    torch.autograd.grad(outputs, inputs, [torch.empty_like(y) for y in outputs])


# Mistral-7B, the published run's micro batch, and the ranks that share a gradient
B, T, DIM, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY, RANKS = 4, 4096, 4096, 14336, 32, 8, 128, 32_000, 256
BF16 = torch.bfloat16
DTYPES = {"bf16": BF16, "fp32": torch.float32}


# The cases: a name, the dtype last, and an operation whose last launch is what the name stands for, or its last launch
# of a kernel that is named third
Operations = Iterator[tuple[str, Callable[[], object]] | tuple[str, Callable[[], object], str]]


def operations() -> Operations:
    for part in (norms, rotations, mlps):
        for name, dtype in DTYPES.items():
            yield from part(name, dtype)
    for vocab_size in (32_000, 32_001, 131_072):
        yield from losses(vocab_size)
    yield from scalings()
    yield from (update(moments, "bf16") for moments in adamw.MOMENTS)
    yield from (update(moments, "fp32") for moments in ("fp32", "bf16"))  # of several micro batches
    yield from sums()
    for part in (embeddings, gradient_norms, chunk_cats):
        yield from (part(name, dtype) for name, dtype in DTYPES.items())


def norms(name: str, dtype: torch.dtype) -> Operations:
    x, r = (meta(B * T, DIM, dtype=dtype, leaf=True) for _ in range(2))
    n, w = meta(DIM, dtype=dtype, leaf=True), meta(2 * HIDDEN, DIM, dtype=dtype, leaf=True)
    rstd, of, eps = meta(B * T, dtype=torch.float32), f"{DIM} {name}", 1e-5
    yield f"rms_norm forward {of}", lambda: rms_norm.rms_norm(x, n, eps)
    yield f"add_rms_norm forward {of}", lambda: rms_norm.add_rms_norm(x, r, n, eps)
    yield f"rms_norm recompute {of}", lambda: rms_norm.rms_norm_recompute(x, n, rstd)
    backward = "rms_norm_backward_kernel"  # not the last, which is dweight's
    yield f"rms_norm dweight {of}", lambda: gradients(rms_norm.rms_norm(x, n, eps), x, n)
    yield f"rms_norm backward {of}", lambda: gradients(rms_norm.rms_norm(x, n, eps), x, n), backward
    yield f"add_rms_norm backward {of}", lambda: gradients(rms_norm.add_rms_norm(x, r, n, eps), x, r, n), backward
    yield f"rms_norm backward and y {of}", lambda: gradients(rms_norm_linear(x, n, w, eps), x, n, w), backward
    yield (
        f"add_rms_norm backward and y {of}",
        lambda: gradients(add_rms_norm_linear(x, r, n, w, eps), x, r, n, w),
        backward,
    )


def rotations(name: str, dtype: torch.dtype) -> Operations:
    qkv, positions = meta(B, T, HEADS + 2 * KV_HEADS, HEAD_DIM, dtype=dtype), meta(B, T, dtype=torch.int64)
    leaf = qkv.detach().requires_grad_()
    rest = (*(meta(T, HEAD_DIM // 2, dtype=torch.float32) for _ in range(2)), HEADS, KV_HEADS)
    of = f"{HEADS}/{KV_HEADS}x{HEAD_DIM} {name}"
    yield f"rope out of place {of}", lambda: rope.rope_qkv(qkv, *rest)
    yield f"rope forward {of}", lambda: rope.rope_split_qkv_(qkv, *rest)
    yield f"rope forward, positions {of}", lambda: rope.rope_split_qkv_(qkv, *rest, positions)
    yield f"rope backward {of}", lambda: gradients(rope.rope_split_qkv_(leaf.clone(), *rest), leaf)


def mlps(name: str, dtype: torch.dtype) -> Operations:
    x, w = meta(B * T, 2 * HIDDEN, dtype=dtype, leaf=True), meta(DIM, HIDDEN, dtype=dtype, leaf=True)
    yield f"swiglu forward {HIDDEN} {name}", lambda: swiglu.swiglu(x)
    yield f"swiglu backward {HIDDEN} {name}", lambda: gradients(swiglu.swiglu(x), x)
    yield f"swiglu backward and h {HIDDEN} {name}", lambda: gradients(swiglu_linear(x, w), x, w)


def losses(vocab_size: int) -> Operations:
    """With the head where the vocabulary is odd: its buffer pads the rows."""
    labels = meta(T, dtype=torch.int64)
    if vocab_size % 16 == 0:
        operation, inputs = cross_entropy, (meta(T, vocab_size, dtype=BF16, leaf=True),)
    else:  # in one chunk: torch 2.11 has no sum over several on the meta device, see account.MetaMode
        operation, inputs = linear_cross_entropy, tuple(meta(n, DIM, dtype=BF16, leaf=True) for n in (T, vocab_size))
    yield f"cross_entropy {vocab_size} bf16", lambda: operation(*inputs, labels)
    constants = (x.detach() for x in inputs)
    yield f"cross_entropy, loss only {vocab_size} bf16", lambda: operation(*constants, labels)


def scalings() -> Operations:
    """Of a gradient that the forward pass has made: of logits, and of a head's weight, summed over chunks in fp32."""
    logits, labels = meta(T, VOCABULARY, dtype=BF16, leaf=True), meta(T, dtype=torch.int64)
    summed, upstream = meta(VOCABULARY, DIM, dtype=torch.float32), meta(dtype=torch.float32)
    yield "scale_gradient in place bf16", lambda: gradients(cross_entropy(logits, labels), logits)
    yield "scale_gradient fp32", lambda: scale_gradient(summed, upstream, BF16)


def update(moments: str, gradient: str) -> tuple[str, Callable[[], None]]:
    weight, low, g = (meta(HIDDEN, DIM, dtype=dtype) for dtype in (BF16, torch.int16, DTYPES[gradient]))
    state, scalars = adamw.new_moments(weight, moments), meta(5, dtype=torch.float32)
    settings = dict(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1, seed=0)
    return f"adamw, {moments} moments {gradient}", lambda: adamw.adamw_(weight, low, g, state, scalars, **settings)


def sums() -> Operations:
    x, y = (meta(HIDDEN, DIM, dtype=dtype) for dtype in (BF16, torch.float32))
    yield "add_rounded bf16", lambda: add_rounded_(x, x, seed=0)
    yield "add_rounded fp32", lambda: add_rounded_(x, y, seed=0)
    yield "add_wide bf16", lambda: add_wide(x, x)


def embeddings(name: str, dtype: torch.dtype) -> tuple[str, Callable[[], None]]:
    tokens, weight = meta(B, T, dtype=torch.int64), meta(VOCABULARY, DIM, dtype=dtype, leaf=True)
    return f"embedding backward {name}", lambda: gradients(embedding(tokens, weight), weight)


def gradient_norms(name: str, dtype: torch.dtype) -> tuple[str, Callable[[], Tensor]]:
    x = meta(HIDDEN, DIM, dtype=dtype)
    return f"gradient_norm {name}", lambda: gradient_norm([x, x])


def chunk_cats(name: str, dtype: torch.dtype) -> tuple[str, Callable[[], None]]:
    x, out = meta(HIDDEN, DIM, dtype=dtype), meta(RANKS, 2 * HIDDEN * DIM // RANKS, dtype=torch.float32)
    return f"chunk_cat {name}", lambda: chunk_cat([x, x], 0, RANKS, out=out)


def cases(only: str | None = None) -> dict[str, list[Launch]]:
    """By name, those that contain ``only``: what else the operation launches, and last the case."""
    found = {}
    for name, operation, *kernel in operations():
        if only is None or only in name:
            found[name] = sorted(launches_of(operation), key=lambda launch: launch.kernel.__name__ in kernel)
    return found


def specialised(launch: Launch, arch: str):
    """(signature, constants, attributes, options, target): what Triton compiles a launch's kernel for.

    The steps of its JITFunction.run before it compiles, which asks the GPU's driver for the target.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    kernel, _, arguments, constants = launch
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    backend = make_backend(target)
    bound, specialization, options = create_function_from_signature(kernel.signature, kernel.params, backend)(
        *arguments, **constants
    )
    options, *rest = kernel._pack_args(backend, constants, bound, specialization, options)
    return *rest, options, target


def described(launch: Launch) -> str:
    """The same for what Triton compiles once."""
    signature, constants, attributes, options, _ = specialised(launch, "sm_90")
    return f"{launch.kernel.__name__} {signature} {constants} {attributes}, {options.num_warps} warps"


def of_no_case(launches: list[Launch], named: list[Launch]) -> list[str]:
    """Descriptions of the launches for which Triton would compile something that it does not compile for a case."""
    known = {described(launch) for launch in named}
    return sorted({described(launch) for launch in launches} - known)


# ---------------------------------------------------------------------------------------------------- the machine code


def compile_launch(launch: Launch, arch: str) -> Compiled:
    """One kernel for one GPU generation. Raises what Triton or ptxas raises."""
    import triton
    from triton.compiler import ASTSource

    *source, options, target = specialised(launch, arch)
    compiled = triton.compile(ASTSource(launch.kernel, *source), target=target, options=options.__dict__)
    return machine_code.compiled(compiled.asm["cubin"], compiled.metadata.shared)


# Programs loop over rows, or over pieces of one: kernel -> how often, from the programs and the launch
TRIPS: dict[str, Callable[[int, tuple, dict], float]] = {
    "rms_norm_backward_kernel": lambda programs, a, c: a[8] / (programs * c["ROWS"]),
    "rms_norm_dweight_kernel": lambda programs, a, c: math.ceil(a[2] / c["ROWS"]),
    "embedding_backward_kernel": lambda programs, a, c: 1,
    "cross_entropy_kernel": lambda programs, a, c: math.ceil(a[7] / c["BLOCK"]) - 1,  # its last block is in no loop
    "scale_kernel": lambda programs, a, c: a[3] * math.ceil(a[4] / c["BLOCK"]) / programs,
}


class Issue(NamedTuple):
    """What a launch issues, beside the time that its bytes take."""

    rows: int
    bytes: int
    instructions: float  # of warps, in the whole launch
    issue: float  # shares of that time
    alu: float
    special: float
    early: float  # share of a thread's loads that are asked for before its first barrier

    @property
    def busiest(self) -> float:
        return max(self.issue, self.alu, self.special)


def issue_of(launch: Launch, code: tuple[machine_code.Instruction, ...]) -> Issue:
    name, programs = launch.kernel.__name__, math.prod(launch.grid)
    read, written = TRAFFIC[name](launch.arguments, launch.constants)
    trips = TRIPS[name](programs, launch.arguments, launch.constants) if name in TRIPS else None
    path, warps = path_taken(code, trips), programs * launch.constants["num_warps"]
    largest = max((*read, *written), key=torch.Tensor.numel)
    row = largest.shape[-1] * (largest.shape[-2] if name == "rope_kernel" else 1)
    cycles = size(*read, *written) / BYTES_A_SECOND * HERTZ * MULTIPROCESSORS
    shares = (
        warps * n / (rate * cycles)
        for n, rate in (
            (path.instructions, machine_code.SCHEDULERS),
            (path.alu, machine_code.ALU_RATE),
            (path.special, machine_code.SPECIAL_RATE),
        )
    )
    early = path.early_bytes / path.load_bytes if path.load_bytes else 1.0
    return Issue(largest.numel() // row, size(*read, *written), warps * path.instructions, *shares, early)


def complaints(name: str, arch: str, result: Compiled, issue: Issue | None = None) -> list[str]:
    """What is beyond the limits: spills anywhere; the rest where it was recorded."""
    found = [f"{result.spills} bytes of spills"] if result.spills else []
    if name not in LIMITS:
        return [*found, "no row in LIMITS"]
    registers, shared_bytes, narrow, percent = LIMITS[name]
    if result.narrow > narrow:
        found.append(f"{result.narrow} global accesses below 16 bytes, the limit is {narrow}")
    if issue is not None and issue.busiest * 100 > percent:
        found.append(f"{issue.busiest:.0%} of the time of its bytes to issue its instructions, the limit is {percent}%")
    if arch == "sm_90" and result.registers > registers:
        found.append(f"{result.registers} registers, the limit is {registers}")
    if arch == "sm_90" and result.shared_bytes > shared_bytes:
        found.append(f"{result.shared_bytes} bytes of shared memory, the limit is {shared_bytes}")
    return found


def write_rows(path: Path, rows: list[dict]) -> None:
    """A result file that says the same wherever it was made: nothing in it was measured."""
    from bench.lib.clocks import Bench
    from bench.lib.results import machine, write_json

    described = machine(Bench(torch.device("cpu"), False, 0)) | {"device": "none: compiled ahead of time"}
    write_json(path, {"format": 1, "kind": "aot", "smoke": False, "machine": described, "rows": rows})


def widths_row(name: str, arch: str, warps: int, result: Compiled, share: float | None) -> str:
    row = f"{name:42} {arch:7} {warps:5} {result.registers:5} {result.spills:6} {result.shared_bytes:6} "
    row += f"{share:5.0%}" if share is not None else f"{'':5}"
    return f"{row}  {' / '.join(widths_words(x) for x in (result.loads, result.stores))}"


WIDTHS_HEAD = (
    f"{'kernel, shape, dtype':42} {'arch':7} {'warps':>5} {'regs':>5} {'spills':>6} {'shared':>6} {'occup':>5}"
    "  load / store"
)


def issue_row(name: str, result: Compiled, issue: Issue, programs: int) -> str:
    a_row = f"{issue.bytes / issue.rows:14,.0f} {issue.instructions / issue.rows:12,.1f}"
    shares = f"{issue.issue:6.0%} {issue.alu:6.0%} {issue.special:7.0%} {issue.early:6.0%}"
    return f"{name:42} {a_row} {shares} {result.registers:5} {result.spills:6} {programs:9}"


ISSUE_HEAD = (
    f"{'kernel, shape, dtype':42} {'bytes per row':>14} {'instructions':>12} {'issue':>6} {'ALU':>6} {'special':>7} "
    f"{'early':>6} {'regs':>5} {'spills':>6} {'resident':>9}"
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", choices=ARCHS, action="append", help="GPU generation; may be repeated [all]")
    parser.add_argument("--issue", action="store_true", help="what is issued while the bytes move; sm_90 alone")
    parser.add_argument("--only", help="kernels whose name contains this [all]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to a result file, for report.py")
    given = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        print("aot.py: TRITON_INTERPRET is set; interpreted kernels cannot be compiled", file=sys.stderr)
        return 2
    if given.issue and (given.arch or given.json):
        parser.error("--issue is for sm_90 and prints its table only: leave out --arch and --json")
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # triton 3.9's default; 3.10 would change it under us
    warnings.filterwarnings("ignore", module="triton")
    import triton

    wanted = ["sm_90"] if given.issue else given.arch or ARCHS
    archs = [arch for arch in wanted if arch != "sm_100" or binary("ptxas-blackwell").exists()]
    print(f"triton {triton.__version__}; no GPU is used; registers a thread, shared memory a program")
    if len(archs) < len(wanted):
        print("sm_100: absent, this triton package has no ptxas-blackwell")
    if given.issue:
        gpu = f"{MULTIPROCESSORS} multiprocessors at {HERTZ / 1e9} GHz"
        print(f"instructions of warps per row; shares of the time of the bytes at {BYTES_A_SECOND / 1e12} TB/s, {gpu}")
    print(ISSUE_HEAD if given.issue else WIDTHS_HEAD)
    failures, rows = 0, []
    launches = cases(given.only)
    jobs = [(name, found[-1], arch) for name, found in launches.items() for arch in archs]
    with ThreadPoolExecutor(2) as pool:  # ptxas and cuobjdump are processes of their own
        results = list(pool.map(lambda job: compile_launch(*job[1:]), jobs))
    for (name, launch, arch), result in zip(jobs, results, strict=True):
        warps, issue, share = launch.constants["num_warps"], None, None
        if arch == "sm_90":
            issue = issue_of(launch, result.code)
            programs = resident_programs(result.registers, result.shared_bytes, warps)
            share = programs * warps / 64
        wrong = complaints(name, arch, result, issue)
        failures += bool(wrong)
        row = issue_row(name, result, issue, programs) if given.issue else widths_row(name, arch, warps, result, share)
        print(f"{row}{'  <- ' + '; '.join(wrong) if wrong else ''}")
        rows.append({
            "kernel": name, "arch": arch, "warps": warps, "registers": result.registers, "spills": result.spills,
            "shared_bytes": result.shared_bytes, "occupancy": share, "loads": result.loads, "stores": result.stores,
        })  # fmt: skip
    if given.only is None:
        found = launches.values()
        unmeasured = of_no_case([launch for some in found for launch in some], [some[-1] for some in found])
        failures += len(unmeasured)
        print(*(f"a launch of no case: {launch}\n" for launch in unmeasured), sep="", end="")
    if given.json:
        write_rows(given.json, rows)
    print(f"{len(jobs)} kernels compiled, {failures} beyond their limits")
    return 1 if failures or not jobs else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
