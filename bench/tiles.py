"""Search the tiles of the row kernels on this GPU and print table rows to paste into their files.

    python bench/tiles.py [--only swiglu] [--rows 16384] [--columns 4096]

Opt-in: nothing of halny searches by itself. Each candidate is timed by triton.testing.do_bench (cold L2, median), its
GB/s counting the kernel's minimum bytes (see the head of its file); candidates that do not compile or do not fit are
passed over. Needs a GPU. A better row belongs in the table under the GPU's generation, and its machine in LOG.md.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton

from halny.kernels import dispatch, rms_norm, rope, swiglu
from halny.kernels.dispatch import TileTable


class Search(NamedTuple):
    name: str
    table: TileTable
    columns: int  # the key of the table's rows
    candidates: list[dict[str, int]]
    call: Callable[[], object]
    n_bytes: int


def grid(**choices: tuple[int, ...]) -> list[dict[str, int]]:
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def searches(M: int, D: int, F: int, n_heads: int, n_kv_heads: int, head_dim: int, device) -> Iterator[Search]:
    """Every table at one shape. Forward and backward of SwiGLU and RoPE share a table, so each is searched by both."""

    def random(*shape):
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    x, residual, weight, rstd = random(M, D), random(M, D), random(D), torch.rand(M, device=device)
    tiles = grid(ROWS=(1, 2, 4), num_warps=(2, 4, 8, 16))
    forward = lambda: rms_norm.add_rms_norm_forward(x, residual, weight, 1e-5)  # noqa: E731
    yield Search("add_rms_norm forward", rms_norm.FORWARD_TILES, D, tiles, forward, 2 * 4 * M * D)
    tiles = grid(ROWS=(1, 2), num_warps=(4, 8, 16), PROGRAMS=(1, 2, 3, 4, 6, 8))
    backward = lambda: rms_norm.rms_norm_backward(x, residual, x, weight, rstd, True, True)  # noqa: E731
    yield Search("add_rms_norm backward", rms_norm.BACKWARD_TILES, D, tiles, backward, 2 * 4 * M * D)

    qkv = random(1, M, n_heads + 2 * n_kv_heads, head_dim)
    cos, sin = rope.rope_tables(M, head_dim, 1e4, device)
    q, k, v = qkv.split([n_heads, n_kv_heads, n_kv_heads], dim=2)
    tiles = grid(HEADS=(4, 8, 16, 32, 64), num_warps=(1, 2, 4, 8))
    rotate = lambda: rope.rope_rotate(q, k, v, cos, sin, None, True)  # noqa: E731
    yield Search("rope out of place", rope.TILES, head_dim, tiles, rotate, 2 * 2 * qkv.numel())

    gate_up, dh = random(M, 2 * F), random(M, F)
    tiles = grid(BLOCK_F=(512, 1024, 2048, 4096), num_warps=(1, 2, 4, 8))
    yield Search("swiglu forward", swiglu.TILES, F, tiles, lambda: swiglu.swiglu_forward(gate_up), 2 * 3 * M * F)
    backward = lambda: swiglu.swiglu_backward(dh, gate_up, True)  # noqa: E731
    yield Search("swiglu backward and h", swiglu.TILES, F, tiles, backward, 2 * 6 * M * F)


def search(s: Search, generation: int) -> list[tuple[float, dict[str, int]]]:
    """(milliseconds, constants) of every candidate that runs, the fastest first; the table is left as it was."""
    found, before = [], s.table.get(generation)
    try:
        for constants in s.candidates:
            s.table[generation] = [(2**62, constants)]
            try:
                found.append((triton.testing.do_bench(s.call, return_mode="median"), constants))
            except (triton.runtime.errors.OutOfResources, triton.compiler.errors.CompilationError) as error:
                print(f"    {constants}: {type(error).__name__}")
    finally:
        if before is None:
            del s.table[generation]
        else:
            s.table[generation] = before
    return sorted(found, key=lambda entry: entry[0])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="tables whose name contains this [all]")
    parser.add_argument("--rows", type=int, default=16384, help="rows, or tokens [16384]")
    parser.add_argument("--columns", type=int, default=4096, help="model width [4096]")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available() or dispatch.INTERPRETED:
        print("tiles.py: needs a CUDA GPU, and TRITON_INTERPRET unset", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    generation = torch.cuda.get_device_capability(device)[0]
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, triton {triton.__version__}, bf16")
    for s in searches(given.rows, given.columns, 14336, 32, 8, 128, device):
        if given.only not in s.name:
            continue
        now = triton.testing.do_bench(s.call, return_mode="median")
        print(f"\n{s.name}, {given.rows} rows; the table's own: {now:.4f} ms, {s.n_bytes / now / 1e6:,.0f} GB/s")
        for milliseconds, constants in search(s, generation)[:5]:
            print(f"    {generation}: ({s.columns}, {constants}),  # {s.n_bytes / milliseconds / 1e6:,.0f} GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
