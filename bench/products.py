"""Whether cuBLAS picks the best kernel for each matrix product of the step, once the GPU is at its power limit.

    python bench/products.py [--only gate_up] [--budget-s 45] [--out DIR]     on a GPU: DIR/products.json
    python bench/products.py --smoke                                          here: torch.mm alone, tiny, no figures

A 7B step spends four fifths of its time in cuBLAS with the GPU at its power limit, where the clock falls until the
power fits. There the fastest kernel is the one with the least energy per FLOP, and a heuristic made at other clocks
need not choose it. So for every product of the step (measure.products_of; bf16, fp32 accumulation, bf16 output, also
for the head's weight gradient, whose sum the step keeps in fp32) torch.mm stands beside

- what cublasLtMatmulAlgoGetHeuristic offers for the same result, described in two ways that need no copy:
  "transposes", as torch does, the transposed product of column-major matrices; and "orders", the product itself of
  matrices in row or column order. The library's heuristic may answer them differently;
- torch.mm with cuBLASLt as torch's preferred library.

A candidate counts only if it overwrites a poisoned output with torch.mm's values, but for two roundings of the largest.

**Two phases.** The limiter averages over tens of milliseconds, so a few interleaved runs do not show who needs more
energy: they only choose the few that go on. These and torch.mm then run back to back for STRETCH_S each, in turn and
in reverse turn, without a pause between stretches; what counts is the median of the second half of each stretch. Before
all that every candidate runs once under the profiler, which names its kernels: those that turn out to be torch.mm's own
kernel, or one another, do not take each other's places.

**What decides** is the end: the whole step's products back to back, for two seconds with torch.mm, two with the best of
each, and so again. A best of four is partly luck, and there it has to show itself once more. Sums over a step are of
each product's median times how often a step has it.

An algorithm is recorded with its configuration and its 64 bytes, which the same version of the library takes again.
"""
# ruff: noqa: E402  the clock starts before torch is imported

from __future__ import annotations

import argparse
import contextlib
import ctypes
import itertools
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from ctypes import c_char_p, c_float, c_int, c_int32, c_int64, c_size_t, c_uint16, c_uint32, c_uint64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

BEGAN = time.monotonic()  # the budget is the process's: torch takes seconds to import
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not bench/: see kernels.py

import torch
from torch import Tensor

from bench import measure
from bench.measure import Bench, mark, milliseconds_between
from halny.model.mistral import PRESETS

PRESET, TOKENS = "mistral-7b", 16384
SCREENING_RUNS, TOO_SLOW = 4, 1.3  # one whose first run takes so many times torch.mm's is not run again
KEPT = 3  # beside torch.mm
SAME = 0.005  # candidates of one kernel whose times differ by less are taken for one
STRETCH_S, STRETCHES = 0.15, 2
DECISION_S, DECISION_LEAST_S, DECISION_STRETCHES = 2.0, 0.4, 4
NAMING_S = 6.0  # the longest that the profiler is given

# ------------------------------------------------------------------------------------------------- cuBLASLt by ctypes

# From cublas_api.h, library_types.h and cublasLt.h of CUDA 13; tests/test_products.py holds them against the headers.
CUBLAS_STATUS_SUCCESS = 0
CUBLAS_COMPUTE_32F = 68
CUDA_R_32F, CUDA_R_16BF = 0, 14
CUBLAS_OP_N, CUBLAS_OP_T = 0, 1
CUBLASLT_ORDER_COL, CUBLASLT_ORDER_ROW = 0, 1
CUBLASLT_MATRIX_LAYOUT_ORDER = 1
CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB = 3, 4
CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1
CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3
CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5  # B, C and D follow
CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2  # the only sum of parts that is not rounded to bf16 in between

CONFIG = {  # attributes of an algorithm: their number, their type
    "CUBLASLT_ALGO_CONFIG_ID": (0, c_int32),
    "CUBLASLT_ALGO_CONFIG_TILE_ID": (1, c_uint32),
    "CUBLASLT_ALGO_CONFIG_SPLITK_NUM": (2, c_int32),
    "CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME": (3, c_uint32),
    "CUBLASLT_ALGO_CONFIG_CTA_SWIZZLING": (4, c_uint32),
    "CUBLASLT_ALGO_CONFIG_CUSTOM_OPTION": (5, c_uint32),
    "CUBLASLT_ALGO_CONFIG_STAGES_ID": (6, c_uint32),
    "CUBLASLT_ALGO_CONFIG_INNER_SHAPE_ID": (7, c_uint16),
    "CUBLASLT_ALGO_CONFIG_CLUSTER_SHAPE_ID": (8, c_uint16),
}
NAMED = {  # attributes whose values have names in the header: the names' prefix
    "tile_id": "CUBLASLT_MATMUL_TILE_",
    "stages_id": "CUBLASLT_MATMUL_STAGES_",
    "inner_shape_id": "CUBLASLT_MATMUL_INNER_SHAPE_",
    "cluster_shape_id": "CUBLASLT_CLUSTER_SHAPE_",
}
WORKSPACE_BYTES, ALIGNMENT = 2**26, 16
REQUESTED = {"transposes": 16, "orders": 8}


class Algorithm(ctypes.Structure):
    """cublasLtMatmulAlgo_t"""

    _fields_ = [("data", c_uint64 * 8)]


class HeuristicResult(ctypes.Structure):
    """cublasLtMatmulHeuristicResult_t"""

    _fields_ = [
        ("algo", Algorithm),
        ("workspaceSize", c_size_t),
        ("state", c_int),
        ("wavesCount", c_float),
        ("reserved", c_int * 4),
    ]


HANDLE, OUT = c_void_p, ctypes.POINTER(c_void_p)
SIGNATURES = {
    "cublasLtCreate": [OUT],
    "cublasLtMatmulDescCreate": [OUT, c_int, c_int],
    "cublasLtMatmulDescSetAttribute": [HANDLE, c_int, c_void_p, c_size_t],
    "cublasLtMatrixLayoutCreate": [OUT, c_int, c_uint64, c_uint64, c_int64],
    "cublasLtMatrixLayoutSetAttribute": [HANDLE, c_int, c_void_p, c_size_t],
    "cublasLtMatmulPreferenceCreate": [OUT],
    "cublasLtMatmulPreferenceSetAttribute": [HANDLE, c_int, c_void_p, c_size_t],
    "cublasLtMatmulAlgoGetHeuristic": [*[HANDLE] * 7, c_int, ctypes.POINTER(HeuristicResult), ctypes.POINTER(c_int)],
    "cublasLtMatmulAlgoConfigGetAttribute": [c_void_p, c_int, c_void_p, c_size_t, ctypes.POINTER(c_size_t)],
    "cublasLtMatmul": [
        *(HANDLE, HANDLE, c_void_p, c_void_p, HANDLE, c_void_p, HANDLE),  # handle, description, alpha, A, B
        *(c_void_p, c_void_p, HANDLE, c_void_p, HANDLE),  # beta, C, D
        *(c_void_p, c_void_p, c_size_t, c_void_p),  # algorithm, workspace, its bytes, stream
    ],
}


def library() -> ctypes.CDLL:
    """The libcublasLt that torch has loaded, with its functions' types. RuntimeError if torch has none."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError as error:
        raise RuntimeError(f"which libraries are loaded cannot be read: {error}") from None
    paths = re.findall(r"(/\S*libcublasLt\.so\S*)$", maps, re.MULTILINE)
    if not paths:
        raise RuntimeError("torch has loaded no libcublasLt")
    found = ctypes.CDLL(paths[0])
    for name, types in SIGNATURES.items():
        function = getattr(found, name)
        function.argtypes, function.restype = types, c_int
    found.cublasLtGetVersion.argtypes, found.cublasLtGetVersion.restype = [], c_size_t
    found.cublasLtGetStatusName.argtypes, found.cublasLtGetStatusName.restype = [c_int], c_char_p
    return found


def ask(lib: ctypes.CDLL, name: str, *arguments) -> None:
    """Call a function of the library. RuntimeError, with the status's name, unless it succeeds."""
    status = getattr(lib, name)(*arguments)
    if status != CUBLAS_STATUS_SUCCESS:
        raise RuntimeError(f"{name}: {lib.cublasLtGetStatusName(status).decode()}")


def created(lib: ctypes.CDLL, name: str, *arguments) -> c_void_p:
    made = c_void_p()
    ask(lib, name, ctypes.byref(made), *arguments)
    return made


def set_attribute(lib: ctypes.CDLL, name: str, of: c_void_p, attribute: int, value) -> None:
    ask(lib, name, of, attribute, ctypes.byref(value), ctypes.sizeof(value))


def headers() -> list[Path]:
    """cublasLt.h, cublas_api.h and library_types.h beside an installed nvidia-cublas; empty without one."""
    for folder in map(Path, sys.path):
        for found in sorted(folder.glob("nvidia/*/include/cublasLt.h")):
            return [found, *(p for p in map(found.with_name, ("cublas_api.h", "library_types.h")) if p.exists())]
    return []


def enumerators(header: str) -> dict[str, int]:
    """name -> value of all enumerators with a written value."""
    return {
        name: int(value, 0) for name, value in re.findall(r"\b([A-Z]\w+)\s*=\s*(0x[0-9a-fA-F]+|\d+)\s*[,\n}/]", header)
    }


def value_names() -> dict[str, dict[int, str]]:
    """attribute -> value -> its name without the prefix, from the headers; empty without them."""
    found = headers()
    known = enumerators(found[0].read_text(encoding="utf-8")) if found else {}
    return {
        attribute: {value: name.removeprefix(prefix) for name, value in known.items() if name.startswith(prefix)}
        for attribute, prefix in NAMED.items()
    }


class Layout(NamedTuple):
    """A matrix as it lies in memory, and whether the product takes its transpose."""

    rows: int
    columns: int
    ld: int
    order: int
    transposed: bool = False


def layouts(formulation: str, a: Tensor, b: Tensor) -> tuple[Layout, Layout, Layout, bool]:
    """(first, second, result, whether the first is b): how ``first @ second`` gives a @ b in row-major order.

    a [m, k] and b [k, n] have a unit stride each. "transposes" says b.T @ a.T, of column-major matrices; "orders" says
    a @ b, each in the order in which it lies.
    """
    (m, _), n = a.shape, b.shape[1]
    for x in (a, b):
        if 1 not in x.stride():
            raise ValueError(f"each operand needs a unit stride, got {x.stride()}")
    if formulation == "orders":
        found = [
            Layout(*x.shape, x.stride(0), CUBLASLT_ORDER_ROW)
            if x.stride(1) == 1
            else Layout(*x.shape, x.stride(1), CUBLASLT_ORDER_COL)
            for x in (a, b)
        ]
        return *found, Layout(m, n, n, CUBLASLT_ORDER_ROW), False
    # what lies in memory by rows is its transpose by columns
    found = [
        Layout(x.shape[1], x.shape[0], x.stride(0), CUBLASLT_ORDER_COL)
        if x.stride(1) == 1
        else Layout(*x.shape, x.stride(1), CUBLASLT_ORDER_COL, transposed=True)
        for x in (b, a)
    ]
    return *found, Layout(n, m, n, CUBLASLT_ORDER_COL), True


class Problem:
    """out = a @ b in bf16 as cuBLASLt's descriptors say it. Needs the library, but no GPU."""

    def __init__(self, lib: ctypes.CDLL, formulation: str, a: Tensor, b: Tensor, out: Tensor):
        *matrices, swapped = layouts(formulation, a, b)
        self.lib, self.formulation = lib, formulation
        self.tensors = (b, a, out) if swapped else (a, b, out)
        self.description = created(lib, "cublasLtMatmulDescCreate", CUBLAS_COMPUTE_32F, CUDA_R_32F)
        for attribute, one in zip(
            (CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB), matrices[:2], strict=True
        ):
            operation = c_int32(CUBLAS_OP_T if one.transposed else CUBLAS_OP_N)
            set_attribute(lib, "cublasLtMatmulDescSetAttribute", self.description, attribute, operation)
        self.matrices = []
        for one in matrices:
            made = created(lib, "cublasLtMatrixLayoutCreate", CUDA_R_16BF, one.rows, one.columns, one.ld)
            order = c_int32(one.order)
            set_attribute(lib, "cublasLtMatrixLayoutSetAttribute", made, CUBLASLT_MATRIX_LAYOUT_ORDER, order)
            self.matrices.append(made)
        self.preference = created(lib, "cublasLtMatmulPreferenceCreate")
        wanted = {
            CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES: c_uint64(WORKSPACE_BYTES),
            CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK: c_uint32(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE),
        } | {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES + i: c_uint32(ALIGNMENT) for i in range(4)}
        for attribute, value in wanted.items():
            set_attribute(lib, "cublasLtMatmulPreferenceSetAttribute", self.preference, attribute, value)

    def algorithms(self, handle: c_void_p, most: int) -> list[HeuristicResult]:
        """What the heuristic offers, in its order."""
        results, n = (HeuristicResult * most)(), c_int(0)
        a, b, d = self.matrices
        described = (handle, self.description, a, b, d, d, self.preference)
        ask(self.lib, "cublasLtMatmulAlgoGetHeuristic", *described, most, results, ctypes.byref(n))
        return [one for one in results[: n.value] if one.state == CUBLAS_STATUS_SUCCESS]

    def caller(self, handle: c_void_p, algorithm: Algorithm, workspace: Tensor) -> Callable[[], None]:
        """A function that enqueues the product, by this algorithm, on the stream that is current now."""
        first, second, out = (x.data_ptr() for x in self.tensors)
        a, b, d = self.matrices
        one, zero = c_float(1.0), c_float(0.0)
        stream = torch.cuda.current_stream().cuda_stream
        arguments = (
            *(handle, self.description, ctypes.addressof(one), first, a, second, b),
            *(ctypes.addressof(zero), out, d, out, d),
            *(ctypes.addressof(algorithm), workspace.data_ptr(), workspace.numel(), stream),
        )
        kept = (self, one, zero, algorithm, workspace)  # the arguments are only addresses

        def call(kept=kept) -> None:
            ask(kept[0].lib, "cublasLtMatmul", *arguments)

        return call


def configuration(lib: ctypes.CDLL, result: HeuristicResult, names: dict[str, dict[int, str]]) -> dict:
    """What a file should say of an algorithm so that it can be had again."""
    found = {}
    for name, (attribute, kind) in CONFIG.items():
        value, written, short = kind(), c_size_t(), name.removeprefix("CUBLASLT_ALGO_CONFIG_").lower()
        arguments = (ctypes.byref(result.algo), attribute, ctypes.byref(value), ctypes.sizeof(value))
        if lib.cublasLtMatmulAlgoConfigGetAttribute(*arguments, ctypes.byref(written)) != CUBLAS_STATUS_SUCCESS:
            continue
        found[short] = value.value
        if named := names.get(short, {}).get(value.value):
            found[short.removesuffix("_id")] = named
    found |= {"workspace_bytes": result.workspaceSize, "waves": round(result.wavesCount, 3)}
    return found | {"algo": bytes(result.algo).hex()}


# ----------------------------------------------------------------------------------------------------------- candidates


@dataclass
class Candidate:
    """A way to make the product: run enqueues it, into the product's output. kernels: what the profiler saw."""

    name: str
    run: Callable[[], object]
    config: dict = field(default_factory=dict)
    kernels: list[str] = field(default_factory=list)


@dataclass
class Product:
    """One of the step's: out = a @ b."""

    name: str
    kind: str
    rows: int
    n_out: int
    n_in: int
    times: int
    a: Tensor
    b: Tensor
    out: Tensor

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.n_out * self.n_in


def products_on(bench: Bench) -> list[Product]:
    """The step's products, those first in which it spends most."""
    shapes = measure.products_of(PRESETS[PRESET], TOKENS)
    if bench.smoke:
        shapes = {name: (kind, 8, 16, 16, times) for name, (kind, *_, times) in shapes.items()}
    operands = measure.product_operands(bench, shapes)
    room = torch.empty(max(a.shape[0] * b.shape[1] for a, b in operands), device=bench.device, dtype=torch.bfloat16)
    found = []
    for (name, shape), (a, b) in zip(shapes.items(), operands, strict=True):
        out = room[: a.shape[0] * b.shape[1]].view(a.shape[0], b.shape[1])
        found.append(Product(name, *shape, a, b, out))
    return sorted(found, key=lambda p: -p.times * p.flops)


def default_of(product: Product) -> Candidate:
    return Candidate("torch.mm", lambda: torch.mm(product.a, product.b, out=product.out))


def by_torch_lt(product: Product) -> None:
    """torch.mm by cuBLASLt; a setting of the process, put back at once."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        torch.mm(product.a, product.b, out=product.out)
    finally:
        torch.backends.cuda.preferred_blas_library(before)


class CublasLt:
    """The library with its handle and workspace, on the current GPU."""

    def __init__(self, device: torch.device):
        self.lib, self.names = library(), value_names()
        self.version = self.lib.cublasLtGetVersion()
        self.workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
        self.handle = created(self.lib, "cublasLtCreate")

    def candidates(self, product: Product) -> tuple[list[Candidate], dict[str, str]]:
        """What the heuristic offers, by formulation and rank; and why a formulation has nothing."""
        found, reasons = [], {}
        for formulation, most in REQUESTED.items():
            try:
                problem = Problem(self.lib, formulation, product.a, product.b, product.out)
                offered = problem.algorithms(self.handle, most)
            except RuntimeError as error:
                reasons[formulation] = str(error)
                continue
            if not offered:
                reasons[formulation] = "the heuristic offers nothing"
            for i, one in enumerate(offered):
                run = problem.caller(self.handle, one.algo, self.workspace)
                found.append(Candidate(f"{formulation} {i}", run, configuration(self.lib, one, self.names)))
        return found, reasons


def opened(bench: Bench) -> tuple[CublasLt | None, str]:
    """(cuBLASLt, its version), or (None, why not): the rest goes on without it."""
    if not bench.on_gpu:
        return None, "no GPU"
    try:
        lt = CublasLt(bench.device)
    except (RuntimeError, OSError, AttributeError) as error:
        return None, f"{type(error).__name__}: {error}"
    return lt, str(lt.version)


def candidates_of(bench: Bench, lt: CublasLt | None, product: Product) -> tuple[list[Candidate], dict[str, str]]:
    """Everything beside torch.mm as it is."""
    found, reasons = lt.candidates(product) if lt else ([], {})
    if bench.on_gpu:
        found.append(Candidate("torch.mm, cublaslt preferred", lambda: by_torch_lt(product)))
    return found, reasons


# --------------------------------------------------------------------------------------------------------------- timing


class DeviceLost(RuntimeError):
    """The GPU is in an error that every later call of this process would raise too."""


def right(bench: Bench, product: Product, candidate: Candidate, truth: Tensor, largest: float) -> str:
    """Why a candidate's result does not count; empty if it does. Its kernel is loaded by this."""
    bound = 2 * torch.finfo(truth.dtype).eps * largest
    try:
        product.out.fill_(float("nan"))
        candidate.run()
        bench.synchronize()
    except RuntimeError as error:
        if lost_words(bench):
            raise DeviceLost(f"{candidate.name}: {error}") from None
        return " ".join(str(error).split())[:200]
    error = measure.largest(product.out, truth)
    return "" if error <= bound else f"differs from torch.mm by {error:.3g}, more than {bound:.3g}"


def timed(bench: Bench, candidate: Candidate, n: int) -> list:
    """Marks around n runs, enqueued."""
    marks = [mark(bench)]
    for _ in range(n):
        candidate.run()
        marks.append(mark(bench))
    return marks


def between(marks: list) -> list[float]:
    return list(itertools.starmap(milliseconds_between, itertools.pairwise(marks)))


def screened(bench: Bench, candidates: list[Candidate], end: float) -> dict[str, list[float]]:
    """name -> milliseconds of SCREENING_RUNS interleaved runs; the first is torch.mm. Fewer if the time is over."""
    found: dict[str, list[float]] = {one.name: [] for one in candidates}
    for i in range(SCREENING_RUNS):
        first = found[candidates[0].name]
        still = [one for one in candidates if i == 0 or found[one.name][0] <= TOO_SLOW * first[0]]
        candidates[0].run()  # while it runs the queue fills: the first one's events would else see its launch
        marks = [(one.name, timed(bench, one, 1)) for one in still]
        bench.synchronize()
        for name, pair in marks:
            found[name] += between(pair)
        if time.monotonic() > end:
            break
    return found


def sustained(bench: Bench, candidates: list[Candidate], ms: dict[str, float], stretch_s: float) -> dict[str, float]:
    """name -> milliseconds: of each stretch's second half the median, of those the mean. Without a pause anywhere."""
    stretches = []
    for i in range(STRETCHES):
        for one in candidates[:: 1 if i % 2 == 0 else -1]:
            n = max(4, math.ceil(stretch_s * 1e3 / max(ms[one.name], 1e-3)))
            stretches.append((one.name, timed(bench, one, n)))
    bench.synchronize()
    halves: dict[str, list[float]] = {one.name: [] for one in candidates}
    for name, marks in stretches:
        times = between(marks)
        halves[name].append(statistics.median(times[len(times) // 2 :]))
    return {name: statistics.mean(medians) for name, medians in halves.items()}


def distinct(candidates: list[Candidate], ms: dict[str, float], n: int) -> list[Candidate]:
    """torch.mm, the first, and the n fastest others that are neither its kernel again nor one another's."""
    kept = [candidates[0]]
    for one in sorted(candidates[1:], key=lambda one: ms[one.name]):
        for other in kept:
            known = other.config and one.config
            equal = one.config["algo"] == other.config["algo"] if known else one.kernels == other.kernels != []
            if equal and abs(ms[one.name] / ms[other.name] - 1) < SAME:
                break
        else:
            kept.append(one)
    return kept[: 1 + n]


def measured(
    bench: Bench, product: Product, candidates: list[Candidate], end: float, keep: int
) -> tuple[dict, Candidate]:
    """(what the row of a product says, the best candidate, which may be torch.mm: the first of them)."""
    default = candidates[0]
    default.run()
    truth = product.out.clone()
    largest = measure.largest(truth)
    rows, good = {}, []
    for one in candidates:
        reason = "no time was left" if time.monotonic() > end else ""
        reason = "" if one is default else reason or right(bench, product, one, truth, largest)
        rows[one.name] = {"name": one.name, "config": one.config, "kernels": one.kernels, "reason": reason,
                          "screened_ms": None, "ms": None}  # fmt: skip
        good += [] if reason else [one]
    del truth
    screening = {name: statistics.median(times) for name, times in screened(bench, good, end).items()}
    for name, ms in screening.items():
        rows[name]["screened_ms"] = ms
    kept = distinct(good, screening, keep)
    stretch_s = 1e-3 if bench.smoke else STRETCH_S
    with measure.Watch() if bench.on_gpu else contextlib.nullcontext() as watch:
        final = sustained(bench, kept, screening, stretch_s)
    for name, ms in final.items():
        rows[name]["ms"] = ms
    best = min(kept, key=lambda one: final[one.name])
    default_ms, best_ms = final[default.name], final[best.name]
    row = {
        "status": "ok",
        "default_ms": default_ms,
        "default_tflop_s": product.flops / default_ms / 1e9,
        "best": best.name,
        "best_ms": best_ms,
        "gain": 1 - best_ms / default_ms,
        "candidates": sorted(rows.values(), key=lambda r: (r["ms"] or 1e9, r["screened_ms"] or 1e9)),
        "watched": watch.found if watch else None,
    }
    return row, best


def decided(bench: Bench, products: list[Product], best: dict[str, Candidate], seconds: float) -> dict:
    """The step's whole set back to back, by torch.mm and by the best of each in turn, ``seconds`` a stretch."""
    sets = {
        "default": [default_of(p) for p in products],
        "best": [best.get(p.name) or default_of(p) for p in products],
    }
    stretches = []
    for which in ("default", "best", "best", "default")[:DECISION_STRETCHES]:
        turns: list[list] = []
        with measure.Watch() if bench.on_gpu else contextlib.nullcontext() as watch:
            stop = time.monotonic() + seconds
            while time.monotonic() < stop or len(turns) < 2:
                marks = [mark(bench)]
                for one in sets[which]:
                    one.run()
                    marks.append(mark(bench))
                turns.append(marks)
                if bench.on_gpu and len(turns) > 1:
                    turns[-2][-1].synchronize()  # one turn ahead of the GPU, and no more
            bench.synchronize()
        half = [between(marks) for marks in turns[len(turns) // 2 :]]
        medians = {p.name: statistics.median(one[i] for one in half) for i, p in enumerate(products)}
        ms = sum(p.times * medians[p.name] for p in products)
        stretches.append({"set": which, "ms": ms, "turns": len(turns), "products_ms": medians,
                          "watched": watch.found if watch else None})  # fmt: skip
    mean = {which: statistics.mean(s["ms"] for s in stretches if s["set"] == which) for which in sets}
    return {"seconds": seconds, "default_ms": mean["default"], "best_ms": mean["best"],
            "gain": 1 - mean["best"] / mean["default"], "stretches": stretches}  # fmt: skip


def name_kernels(bench: Bench, products: list[Product], candidates: dict[str, list[Candidate]]) -> None:
    """Run every candidate once under the profiler, for NAMING_S at most, and have it say which kernels it launched."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile, record_function

    by_label = {f"products|{i}|{j}": one for i, p in enumerate(products) for j, one in enumerate(candidates[p.name])}
    stop = time.monotonic() + NAMING_S
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        for label, one in by_label.items():
            if time.monotonic() > stop:
                break
            with record_function(label):
                with contextlib.suppress(RuntimeError):  # said when its result is checked
                    one.run()
                bench.synchronize()
    events = recorded.events()
    ranges = [e for e in events if e.name in by_label and e.device_type == DeviceType.CPU]
    kernels = [e for e in events if e.name not in by_label and e.device_type != DeviceType.CPU]
    for e in ranges:
        inside = [k.name[:160] for k in kernels if e.time_range.start <= k.time_range.start <= e.time_range.end]
        by_label[e.name].kernels = inside


# --------------------------------------------------------------------------------------------------------------- report


def guessed_seconds(bench: Bench, product: Product, keep: int) -> float:
    """An upper guess of what a product takes, as if every candidate were run in all rounds, at 600 TFLOP/s."""
    if bench.smoke:
        return 0.0
    n = sum(REQUESTED.values()) + 2
    checks = n * product.out.numel() / 4e10
    return n * (1 + SCREENING_RUNS) * product.flops / 6e14 + checks + (1 + keep) * STRETCHES * STRETCH_S + 0.3


def table(rows: list[dict]) -> list[str]:
    """The rows as lines, and the sum over a step of those that have figures."""
    lines = [f"{'product':28} {'times':>5} {'default ms':>10} {'TFLOP/s':>8} {'best ms':>8} {'gain':>6}  best"]
    for row in rows:
        if row["status"] != "ok":
            lines.append(f"{row['name']:28} {row['times']:5d} {row['status']}: {row['reason']}")
            continue
        lines.append(
            f"{row['name']:28} {row['times']:5d} {row['default_ms']:10.3f} {row['default_tflop_s']:8.1f} "
            f"{row['best_ms']:8.3f} {row['gain']:6.1%}  {row['best']}"
        )
    ok = [row for row in rows if row["status"] == "ok"]
    default, best = (sum(row["times"] * row[which] for row in ok) for which in ("default_ms", "best_ms"))
    missing = f" (without {len(rows) - len(ok)} products that have no figures)" if len(ok) < len(rows) else ""
    return [*lines, f"the step's products: default {default:,.1f} ms, with the best of each {best:,.1f} ms{missing}"]


def kernel_lines(rows: list[dict]) -> list[str]:
    """Of each product that has figures, torch.mm's kernels and those of the best."""
    lines = []
    for row in rows:
        named = {one["name"]: ", ".join(one["kernels"]) or "unknown" for one in row.get("candidates", [])}
        if row["status"] == "ok" and any(one["kernels"] for one in row["candidates"]):
            lines.append(f"{row['name']}: {named['torch.mm']} -> {named[row['best']]}")
    return lines


def line_of(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def lost_words(bench: Bench) -> str:
    """What the device says if it is in an error that lasts; empty if it works."""
    try:
        bench.synchronize()
    except RuntimeError as error:
        return line_of(error)
    return ""


def watched_words(found: dict | None) -> str:
    return f"{found['sm_mhz']:.0f} MHz {found['watts']:.0f} W" if found else "clock unknown"


def decision_line(decision: dict | None, reason: str) -> str:
    if decision is None:
        return f"the whole set back to back: not measured, {reason}"
    each = "; ".join(f"{s['set']} {s['ms']:,.1f} ms, {watched_words(s['watched'])}" for s in decision["stretches"])
    return (
        f"the whole set back to back, {decision['seconds']:.1f} s each: default {decision['default_ms']:,.1f} ms, best "
        f"of each {decision['best_ms']:,.1f} ms, gain {decision['gain']:.2%} ({each})"
    )


def run(bench: Bench, given: argparse.Namespace, path: Path, result: dict) -> int:
    """Fill the result and its file; the exit code."""
    end = BEGAN + given.budget_s if __name__ == "__main__" else time.monotonic() + given.budget_s
    products = products_on(bench)
    if given.only:
        products = [p for p in products if given.only in p.name]
    if not products:
        print(f"products.py: no product's name contains {given.only!r}", file=sys.stderr)
        return 2
    lt, result["cublaslt"] = opened(bench)
    print(f"cuBLASLt: {result['cublaslt']}", flush=True)
    rows = result["rows"]
    candidates: dict[str, list[Candidate]] = {}
    for p in products:
        row = {"name": p.name, "kind": p.kind, "shape": {"rows": p.rows, "out": p.n_out, "in": p.n_in}}
        row |= {"times": p.times, "status": "not reached", "reason": "no time was left"}
        found, row["absent"] = candidates_of(bench, lt, p)
        candidates[p.name] = [default_of(p), *(one for one in found if not given.skip or given.skip not in one.name)]
        rows.append(row)
    lost = ""
    if bench.on_gpu:
        try:
            name_kernels(bench, products, candidates)
        except Exception as error:  # names are a help, no figure
            print(f"no kernel names: {line_of(error)}", flush=True)
        lost = lost_words(bench)
        print(f"{sum(map(len, candidates.values()))} candidates, {time.monotonic() - BEGAN:.1f} s so far", flush=True)
    reserve = 0.0 if bench.smoke else DECISION_STRETCHES * DECISION_S + 1.0
    reserve = min(reserve, 0.25 * given.budget_s)
    best: dict[str, Candidate] = {}
    for i, product in enumerate(products):
        now = time.monotonic()
        if lost or now + guessed_seconds(bench, product, given.keep) > end - reserve:
            continue  # a later, smaller one may fit
        one_end = end - reserve - (1 + given.keep) * STRETCHES * STRETCH_S
        try:
            found, best[product.name] = measured(bench, product, candidates[product.name], one_end, given.keep)
            rows[i] |= found | {"reason": ""}
            words = f"{found['default_ms']:.3f} ms, best {found['best_ms']:.3f} by {found['best']}"
            words += f", {watched_words(found['watched'])}" if bench.on_gpu else ""
        except Exception as error:
            words = line_of(error)
            rows[i] |= {"status": "failed", "reason": words}
            lost = words if lost_words(bench) else ""
        measure.write_json(path, result)
        print(f"{product.name}: {words} ({time.monotonic() - now:.1f} s)", flush=True)
    left = end - time.monotonic() - 1.0
    seconds = 0.01 if bench.smoke else min(DECISION_S, left / DECISION_STRETCHES - 0.1)
    reason = lost or f"{max(left, 0.0):.1f} s were left"
    if not lost and (bench.smoke or seconds >= DECISION_LEAST_S):
        try:
            result["decision"] = decided(bench, products, best, seconds)
        except Exception as error:
            lost = reason = line_of(error)
    measure.write_json(path, result)
    for line in [*kernel_lines(rows), *table(rows), decision_line(result["decision"], reason)]:
        print(line, flush=True)
    if bench.on_gpu:
        result["machine"]["nvidia_smi_after"] = measure.nvidia_smi()
    measure.write_json(path, result)
    return 1 if lost or any(row["status"] == "failed" for row in rows) else 0


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    made.add_argument("--smoke", action="store_true", help="rehearse on the CPU: torch.mm alone, tiny, without figures")
    made.add_argument("--only", default="", help="products whose name contains this [all]")
    made.add_argument("--budget-s", type=float, default=45, help="seconds for everything [45]")
    made.add_argument("--keep", type=int, default=KEPT, help=f"candidates that go on from the first phase [{KEPT}]")
    made.add_argument("--skip", default="", help="leave out candidates whose name contains this, as orders [none]")
    made.add_argument("--out", type=Path, help="folder for the file [bench/results/DATE-DEVICE; else runs/bench]")
    made.add_argument("--commit", help="commit to record where there is no git checkout")
    return made


def main(arguments: list[str]) -> int:
    given = parser().parse_args(arguments)
    try:
        bench = measure.bench_on(given.smoke)
    except RuntimeError as error:
        print(f"products.py: {error}", file=sys.stderr)
        return 2
    folder = given.out or measure.results_folder(bench, partial=bool(given.only))
    note = {"note": "smoke: no performance figure"} if given.smoke else {}
    result = {"format": 1, "kind": "products", "smoke": given.smoke} | note
    result |= {"machine": measure.machine(bench, given.commit), "preset": PRESET, "tokens": TOKENS, "cublaslt": ""}
    result |= {"rows": [], "decision": None}
    return run(bench, given, folder / "products.json", result)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
