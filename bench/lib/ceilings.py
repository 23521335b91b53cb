"""What the machine can do, measured now: a large copy, and the matrix products of a step, by torch."""

from __future__ import annotations

import itertools
import statistics
import time

import torch

from bench.lib.clocks import Bench, Call, Clocks, mark, milliseconds_between
from halny.kernels.linear_cross_entropy import chunk_rows
from halny.model.mistral import MistralConfig

# Matrix products of a 7B step, [m, k] by [k, n], m the tokens of a micro batch: one a linear layer, forward; and the
# head's three over one of its chunks of 4,096 rows.
STEP_PRODUCTS = {
    "qkv": (16384, 4096, 6144),
    "out": (16384, 4096, 4096),
    "gate_up": (16384, 4096, 28672),
    "down": (16384, 14336, 4096),
    "gate_up, input gradient": (16384, 28672, 4096),
    "gate_up, weight gradient": (28672, 16384, 4096),
}
HEAD_PRODUCTS = {
    "head": (4096, 4096, 32000),
    "head, input gradient": (4096, 32000, 4096),
    "head, weight gradient": (32000, 4096, 4096),
}


def copy_rate(bench: Bench) -> dict:
    """GB/s of a copy of 2 GiB, bytes read plus bytes written: what no memory-bound kernel can beat."""
    n_bytes = 2**22 if bench.smoke else 2**31
    source = torch.randint(0, 255, (n_bytes,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    ms = kernel_times(bench, {"copy": Call(lambda _: target.copy_(source), 1)})["copy"]
    return {"gb_s": 2 * n_bytes / ms["median"] / 1e6, "kernel_ms": ms}


def kernel_times(bench: Bench, calls: dict[str, Call]) -> dict[str, dict]:
    """Milliseconds of each call's kernels. Raises what one of them raised."""
    results = Clocks(bench).time(calls)
    for result in results.values():
        if isinstance(result, Exception):
            raise result
    return {name: result["kernel_ms"] for name, result in results.items()}


def product_rates(bench: Bench, products: dict[str, tuple[int, int, int]]) -> dict[str, dict]:
    """name -> TFLOP/s of torch's bf16 matrix product (cuBLAS) on random data at each shape."""
    calls, flops = {}, {}
    for name, (m, k, n) in products.items():
        if bench.smoke:
            m, k, n = m // 128, k // 128, n // 128
        x, w = (torch.randn(*shape, device=bench.device, dtype=torch.bfloat16) for shape in ((m, k), (k, n)))
        calls[name], flops[name] = Call(lambda _, x=x, w=w: x @ w, 1), 2 * m * k * n
    times = kernel_times(bench, calls)
    return {
        name: {"tflop_s": flops[name] / ms["median"] / 1e9, "flops": flops[name], "kernel_ms": ms}
        for name, ms in times.items()
    }


def combined_rate(rates: dict[str, dict]) -> float:
    """TFLOP/s of several products one after another."""
    return sum(r["flops"] for r in rates.values()) / sum(r["kernel_ms"]["median"] for r in rates.values()) / 1e9


def ceilings(bench: Bench) -> dict:
    """What this machine can do, measured now: "copy" in GB/s; "step", "head" and "square" (8192^3) in TFLOP/s."""
    step, head = product_rates(bench, STEP_PRODUCTS), product_rates(bench, HEAD_PRODUCTS)
    square = product_rates(bench, {"square": (8192, 8192, 8192)})
    copy = copy_rate(bench)
    return {
        "copy_gb_s": copy["gb_s"],
        "step_tflop_s": combined_rate(step),
        "head_tflop_s": combined_rate(head),
        "square_tflop_s": square["square"]["tflop_s"],
        "products": step | head | square,
        "copy": copy,
    }


def products_of(config: MistralConfig, n_tokens: int) -> dict[str, tuple[str, int, int, int, int]]:
    """name -> (kind, rows, out, in, times a step) of every matrix product of a step on n_tokens, out and in a weight's.

    forward: x [rows, in] by w [out, in] transposed; input gradient: dy [rows, out] by w; weight gradient: dy transposed
    by x. The head's come a chunk of rows at a time (kernels/linear_cross_entropy.py).
    """
    weights = {
        "qkv": ((config.n_heads + 2 * config.n_kv_heads) * config.head_dim, config.dim),
        "out": (config.dim, config.n_heads * config.head_dim),
        "gate_up": (2 * config.hidden_dim, config.dim),
        "down": (config.dim, config.hidden_dim),
    }
    rows = chunk_rows(n_tokens, config.vocab_size, config.dim, 2)
    found = {}
    for kind in ("forward", "input gradient", "weight gradient"):
        for name, (n_out, n_in) in weights.items():
            found[f"{name}, {kind}"] = kind, n_tokens, n_out, n_in, config.n_layers
        found[f"head, {kind}"] = kind, rows, config.vocab_size, config.dim, -(-n_tokens // rows)
    return found


def matmul_ceiling(bench: Bench, config: MistralConfig, n_tokens: int, seconds: float = 2.0) -> dict:
    """The step's own matrix products and nothing else, by torch (cuBLAS) in bf16 on random data, back to back.

    In turn and without a pause for about ``seconds``, so clocks and power are those of work that goes on. tflop_s and
    ms are of all products of a step, ``products`` has each one's median.
    """
    products = products_of(config, n_tokens)
    if bench.smoke:
        products = {name: (kind, 8, 16, 16, times) for name, (kind, *_, times) in products.items()}
    # x, dy and w of all products are views of three buffers
    shapes = [((rows, n_in), (rows, n_out), (n_out, n_in)) for _, rows, n_out, n_in, _ in products.values()]
    largest = [max(a * b for a, b in one) for one in zip(*shapes, strict=True)]
    flat = [torch.randn(n, device=bench.device, dtype=torch.bfloat16) for n in largest]
    pairs = []
    for (kind, *_), sizes in zip(products.values(), shapes, strict=True):
        x, dy, w = (buffer[: a * b].view(a, b) for buffer, (a, b) in zip(flat, sizes, strict=True))
        pairs.append({"forward": (x, w.T), "input gradient": (dy, w), "weight gradient": (dy.T, x)}[kind])

    def turn() -> list:
        marks = []
        for a, b in pairs:
            marks.append(mark(bench))
            torch.mm(a, b)
        return [*marks, mark(bench)]

    turn()
    bench.synchronize()
    begun = time.perf_counter()
    turn()
    bench.synchronize()
    n = 2 if bench.smoke else max(5, int(seconds / (time.perf_counter() - begun)))
    turns = [turn() for _ in range(n)]
    bench.synchronize()
    times = [list(itertools.starmap(milliseconds_between, itertools.pairwise(marks))) for marks in turns]
    found, ms, flops = {}, 0.0, 0
    for i, (name, (_, rows, n_out, n_in, n_times)) in enumerate(products.items()):
        median = statistics.median(one[i] for one in times)
        found[name] = {"ms": median, "tflop_s": 2 * rows * n_out * n_in / median / 1e9, "times": n_times}
        ms, flops = ms + n_times * median, flops + n_times * 2 * rows * n_out * n_in
    return {"tflop_s": flops / ms / 1e9, "ms": ms, "flops": flops, "products": found}
