"""Attention: every backend that can do a case, at every window, with and without documents.

    python bench/attention.py [--only "window 4096"] [--out DIR]     on a GPU: DIR/attention.json
    python bench/attention.py --warm-only --out DIR                 compile first, as bench/kernels.py does
    python bench/attention.py --smoke                                here: the same code at tiny sizes, no figures

Mistral-7B's heads, 32 queries for 8 keys, head_dim 128, bf16; a step's 16,384 tokens, or 32,768. TFLOP/s count what the
mask admits and nothing else, so a window or documents that save no time show as a low rate: forward 4 H c FLOPs a
visible pair of query and key (two products), backward 2.5 times that (five, one of which recomputes the scores), as
flash-attention's own benchmarks count. "halny, BACKEND" is ``backend="auto"`` and what that chose, in one row. Masks
are made once and outside the clock, as a step makes them once for all its layers.

Right is decided as in kernels.py, against the reference on the first sequence and the heads of the last group, one
query head at a time: its score matrix of 32,768 positions takes 4 GB a head. The reference itself is not timed.

FlexAttention takes 30 s or more a case to compile, so it runs only with --flex, or where "auto" has nothing else.
flash-attn-4 keeps what it compiles on disk, which is off by default, for a kind of mask, whatever the lengths.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not bench/: see kernels.py

import torch
from torch import Tensor

from bench import kernels
from bench.lib.clocks import bench_on
from bench.lib.command import command, no_such
from bench.lib.operations import ROW_MODES, Operation, random
from bench.lib.peers import Peer
from bench.lib.process import die_with_parent
from bench.lib.results import results_folder
from halny.kernels.attention import BACKENDS, AttentionPlan, attention_reference, plan_attention, planned_attention
from halny.model.estimate import roofline

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
BACKWARD_OVER_FORWARD = 2.5


def document_lengths(n_tokens: int, mean: int, seed: int = 0) -> list[int]:
    """Lengths that sum to n_tokens, exponentially distributed about mean: many short documents, a few long ones."""
    generator, lengths = torch.Generator().manual_seed(seed), []
    while (left := n_tokens - sum(lengths)) > 0:
        drawn = torch.empty(()).exponential_(1 / mean, generator=generator).item()
        lengths.append(min(left, 1 + int(drawn)))
    return lengths


@dataclass(frozen=True)
class Attention(Operation):
    """One case; the shape is its own."""

    shape: dict = None
    lengths: tuple[int, ...] = ()  # of the documents, or of the sequences

    def counts(self, mode: str, shape: dict, b: int) -> tuple[int, int]:
        """(bytes if every tensor crossed the bus once, FLOPs)"""
        tokens = shape["sequences"] * shape["seq_len"]
        q, kv = tokens * shape["heads"] * shape["head_dim"], tokens * shape["kv_heads"] * shape["head_dim"]
        forward = 4 * shape["heads"] * shape["head_dim"] * roofline.attention_keys(self.lengths, shape["window"])
        n_bytes = {"forward": b * (2 * q + 2 * kv), "backward": b * (4 * q + 4 * kv)}
        n_bytes["both"] = n_bytes["forward"] + n_bytes["backward"]
        factor = {"forward": 1, "backward": BACKWARD_OVER_FORWARD, "both": 1 + BACKWARD_OVER_FORWARD}[mode]
        return n_bytes[mode], int(factor * forward)

    def compared(self, results: list[Tensor]) -> list[Tensor]:
        group = self.shape["heads"] // self.shape["kv_heads"]
        return [x[:1, :, -n:] for x, n in zip(results, (group, group, 1, 1), strict=True)]

    def output_shapes(self, inputs: list) -> list[torch.Size]:
        return [inputs[0].shape]

    def expected(self, inputs: list, upstream: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        if dtype == torch.float64 and self.shape["seq_len"] > 8192:
            dtype = torch.float32  # four such score matrices in fp64 would take 34 GB
        q, d_out, k, v = (x.to(dtype) for x in self.compared([inputs[0], upstream[0], *inputs[1:]]))
        cu_seqlens = self.cu_seqlens(inputs[0].device, sequences=1)
        outs, dqs, dk, dv = [], [], torch.zeros_like(k, dtype=torch.float64), torch.zeros_like(v, dtype=torch.float64)
        for h in range(q.shape[2]):
            leaves = [x.detach().requires_grad_() for x in (q[:, :, h : h + 1], k, v)]
            out = attention_reference(*leaves, window=self.shape["window"], cu_seqlens=cu_seqlens)
            dq, dk_h, dv_h = torch.autograd.grad(out, leaves, d_out[:, :, h : h + 1])
            outs.append(out.detach())
            dqs.append(dq)
            dk += dk_h
            dv += dv_h
        return [torch.cat(outs, 2), torch.cat(dqs, 2), dk.to(dtype), dv.to(dtype)]

    def cu_seqlens(self, device, sequences: int | None = None) -> Tensor | None:
        """Document boundaries of the first sequences (of all), or None where a sequence is one document."""
        if not self.shape["documents"]:
            return None
        end = (sequences or self.shape["sequences"]) * self.shape["seq_len"]
        boundaries = torch.tensor([0, *self.lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return boundaries[boundaries <= end].to(device)

    def plan(self, backend: str, dtype: torch.dtype, device: torch.device) -> AttentionPlan:
        shape, cu_seqlens = self.shape, self.cu_seqlens(device)
        options = dict(window=shape["window"], cu_seqlens=cu_seqlens, backend=backend)
        if cu_seqlens is not None:
            options["max_seqlen"] = max(self.lengths)
        size = shape["sequences"], shape["seq_len"], shape["head_dim"]
        return plan_attention(*size, dtype, device, **options)

    def peers(self, dtype: torch.dtype, device: torch.device, flex: bool) -> list[Peer]:
        left_out = {"reference"} if flex else {"reference", "flex", "flex_flash"}
        left_out.add(self.plan("auto", dtype, device).backend)  # it is measured as ours
        return [self.peer(name, dtype, device) for name in ("auto", *BACKENDS) if name not in left_out]

    def peer(self, backend: str, dtype: torch.dtype, device: torch.device) -> Peer:
        shape = self.shape

        def load():
            made = self.plan(backend, dtype, device)
            return lambda q, k, v: planned_attention(q, k, v, made)

        text = f"attention(q, k, v, window={shape['window']}{', cu_seqlens, max_seqlen' if shape['documents'] else ''}"
        if backend != "auto":
            return Peer(backend, load, False, "", f'{text}, backend="{backend}")')
        chosen = self.plan(backend, dtype, device).backend
        return Peer("halny", load, False, chosen, f'{text}, backend="auto") -> {chosen}')


def case(sequences: int, seq_len: int, window: int | None, mean_document: int | None, heads: tuple) -> Attention:
    """One row's case: a batch [sequences, seq_len], documents of a mean length or none."""
    lengths = [seq_len] * sequences
    if mean_document:
        lengths = [n for i in range(sequences) for n in document_lengths(seq_len, mean_document, seed=i)]
    shape = dict(sequences=sequences, seq_len=seq_len, heads=heads[0], kv_heads=heads[1], head_dim=heads[2])
    shape |= dict(window=window, documents=len(lengths) if mean_document else 0)

    def inputs(_, dtype, device):
        return [random(sequences, seq_len, h, heads[2], dtype=dtype, device=device)
                for h in (heads[0], heads[1], heads[1])]  # fmt: skip

    return Attention("attention", inputs, (0, 1, 2), attention_reference, ("out",), ROW_MODES,
                     "square_tflop_s", shape=shape, lengths=tuple(lengths))  # fmt: skip


def title(shape: dict) -> str:
    window = f", window {shape['window']}" if shape["window"] else ""
    return f"{shape['sequences']} x {shape['seq_len']}{window}{', documents' if shape['documents'] else ''}"


def cases(smoke: bool) -> list[Attention]:
    """The step's own shape first, then longer contexts; packed documents have 700 tokens on average."""
    heads = (4, 2, 16) if smoke else (HEADS, KV_HEADS, HEAD_DIM)
    rows = [(4, 4096, None, None), (4, 4096, None, 700), (1, 32768, 4096, None), (1, 32768, None, None),
            (2, 8192, None, None), (2, 8192, 4096, None), (1, 32768, 4096, 700)]  # fmt: skip
    if smoke:
        rows = [(2, 32, None, None), (2, 32, None, 7), (1, 64, 8, 9)]
    return [case(*row, heads) for row in rows]


COMPILED_AT_FIRST = ("flash4", "flex", "flex_flash")


def warm_jobs(providers: dict[str, list[Peer]]) -> list[tuple[str, str]]:
    """(title, provider) of all that runs and compiles."""
    return [
        (name, peer.name)
        for name, listed in providers.items()
        for peer in listed
        if (peer.note or peer.package) in COMPILED_AT_FIRST and kernels.load(peer)[0] is not None
    ]


@command
def main(arguments: list[str]) -> int:
    start = time.monotonic()
    parser = kernels.options_of(__doc__)
    parser.add_argument("--flex", action="store_true", help="FlexAttention too, which compiles for 30 s or more a case")
    given = parser.parse_args(arguments)
    bench = bench_on(given.smoke)
    dtype, device = torch.float32 if given.smoke else torch.bfloat16, bench.device
    every = {title(operation.shape): operation for operation in cases(given.smoke)}
    if given.warm:
        die_with_parent()
        operation = every[given.warm[0]]
        peer = next(peer for peer in operation.peers(dtype, device, flex=True) if peer.name == given.warm[1])
        kernels.run_once(bench, operation, peer.load(), operation.shape)
        return 0
    by_title = {name: operation for name, operation in every.items() if given.only in name}
    if not by_title:
        raise no_such(given.only, every)
    folder = given.out or results_folder(bench, partial=bool(given.only))
    providers = {name: operation.peers(dtype, device, given.flex) for name, operation in by_title.items()}
    sizes = {name: 2e9 + 2 * operation.counts("both", operation.shape, 2)[0] for name, operation in by_title.items()}
    if given.warm_only:
        return kernels.warm_up("attention", warm_jobs(providers), given, folder, sizes=sizes)
    excluded = kernels.read_warm(folder / "warm-attention.json")
    jobs = [(operation, name, operation.shape, providers[name], name) for name, operation in by_title.items()]
    return kernels.run_jobs(bench, given, "attention", folder, jobs, excluded, start, dtype)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
