"""The trainer's step, counted without a GPU: its matrix products, its kernels, the bytes they move, and its host time.

    python bench/account.py                 Mistral-7B, 4 x 4096 tokens, one rank
    python bench/account.py --ranks 256     the same as one rank of 256, FSDP2's copies and collectives included
    python bench/account.py --moments 8bit --accumulation 4     one rank that trains, four micro batches a step
    python bench/account.py --host          what Python and PyTorch's dispatcher take for a step, no kernel run
    python bench/account.py --host operations       and for a row operation, forward and backward

The step is train.py's own: ``build_model``, ``build_optimizer``, ``train_step``. Its tensors are on the meta device,
where a tensor has a shape and a dtype and nothing else: 7 billion weights take no memory, a product no time, and
whatever would read a value raises. A dispatch mode sees each operator; operators of ours are opened, so that what
counts is each launch of a kernel of ours (kernels/dispatch.py writes it down in place of starting it) and each product
given to cuBLAS. So the list is of what a Hopper GPU would run, in that order.

Then the list is held against the arithmetic that everything else quotes, model/estimate/roofline.py: FLOPs and bytes of
each kind of kernel, counted | roofline's | difference. More than 1% apart anywhere ends with exit code 1: either the
step moves bytes that it need not, or roofline.py leaves some out. The last columns are the floor of each kind on a GPU,
the longer of FLOPs and bytes at step_time.py's ideal rates, and the step's. These are calculated, no measurement.

What is counted, and what not:
- An operand is read once and a result written once, as many bytes as it has elements. Caches can make it less (a
  chunk's logits, read by the next kernel), a kernel's own scratch space makes it more.
- Attention's FLOPs are those of the pairs that the mask admits. Two products forward and five backward are executed
  (FlashAttention makes q k^T again), twelve fourteenths of which are what MFU counts.
- One operator of PyTorch may be several kernels (a norm over a list of tensors), and is listed as one.
- On several ranks the process group is PyTorch's fake one. What becomes of the gathered weights after the forward pass
  is decided by the trainer's rule for this GPU's memory and nodes of four, or by --reshard.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import time
import timeit
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not bench/: see kernels.py
    if "operations" in sys.argv:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported: CPU tensors take the kernels' path

import torch
import torch.distributed._tools.fake_collectives  # registers c10d's collectives for meta tensors
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from bench.lib.command import at_least_one, command
from bench.lib.meta_step import HOPPER, MetaCase, MetaMode, MetaStep, on_hopper, world_of
from bench.lib.traffic import TRAFFIC, size
from halny.kernels import rms_norm, rope, swiglu
from halny.kernels.adamw import MOMENTS
from halny.model.estimate import machines, roofline
from halny.model.estimate.choices import recomputed
from halny.model.estimate.machines import MACHINES
from halny.model.estimate.sizes import layer_shapes, matmul_parameters, shard_numel
from halny.model.estimate.step_time import RATES
from halny.model.exits import Refused
from halny.model.mistral import PRESETS, MistralConfig

TOLERANCE, TRIFLE = 0.01, 2**16  # of what roofline says; bytes that are no difference
LARGE = 32  # elements from which on an addition is one of activations or gradients, not of metrics
HOST_SHARE = 0.25  # of the step's floor that the host may take

# ----------------------------------------------------------------------------------------------------------- the count

ROWS, SUMS, OTHER = "norm, RoPE, SwiGLU", "optimizer: gradient sums", "other: "
PARTS = (  # the categories of model/record/profiler.py, some of them in parts
    *("matmul", "attention", ROWS, "loss", "optimizer", SUMS, "copies", "communication"),
    *(OTHER + name for name in ("residual adds", "embedding", "metrics")),
)


@dataclass(frozen=True)
class Product:
    """A matrix product [m, k] x [k, n]."""

    kind: str  # forward, dgrad (gradient to the input) or wgrad (to the weight)
    m: int
    n: int
    k: int

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> Product:
        """A linear layer's three differ in what is transposed: x W^T, dy W, dy^T x."""
        kind = "wgrad" if a.stride(-1) != 1 else "forward" if b.stride(-1) != 1 else "dgrad"
        return cls(kind, a.shape[0], b.shape[1], a.shape[1])

    @property
    def flops(self) -> int:
        return 2 * self.m * self.n * self.k

    @property
    def weight(self) -> tuple[int, int]:
        return {"forward": (self.n, self.k), "dgrad": (self.k, self.n), "wgrad": (self.m, self.n)}[self.kind]


@dataclass(frozen=True)
class Call:
    """A kernel of ours, or an operator that is one or some."""

    name: str
    part: str
    shape: tuple[int, ...]  # of its largest tensor
    read: int
    written: int
    flops: int = 0
    product: Product | None = None

    @property
    def bytes(self) -> int:
        return self.read + self.written


PART_OF = {
    **dict.fromkeys(("cross_entropy_kernel", "scale_kernel"), "loss"),
    **dict.fromkeys(("embedding", "embedding_backward", "embedding_backward_kernel"), OTHER + "embedding"),
    **dict.fromkeys(("adamw_kernel", "_fused_adamw_", "_foreach_mul_", "_foreach_norm"), "optimizer"),
    **dict.fromkeys(("block_norms_kernel", "linalg_vector_norm"), "optimizer"),
    **{"add_rounded_kernel": SUMS, "add_wide_kernel": SUMS},
    **dict.fromkeys(("copy_", "_to_copy", "clone", "_foreach_copy_"), "copies"),
    **dict.fromkeys(("all_gather_copy_in", "split_with_sizes_copy", "chunk_cat"), "copies"),
    "chunk_cat_kernel": "copies",
}
TRANSFERS = ("copy_", "_copy_from", "_to_copy", "_foreach_copy_", "index_put_", "_index_put_impl_")
MADE_OF_VALUES = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
WRITES_ONLY = ("copy_", "fill_", "zero_", "_foreach_copy_")
NO_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "_record_function_enter_new",
    "_record_function_exit", "wait_tensor")  # fmt: skip


class NoTransfers(TorchFunctionMode):
    """Raises RuntimeError for what would copy Python's values to the GPU, for which the host waits.

    Meta tensors hide such copies: they are filled with a value, where on CUDA a tensor on the host is made of it and
    copied. A number that is assigned to a slice is filled in; to a single element, or by an index that is no slice, it
    is copied. Tensors on the host are seen by ``Count``.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (Tensor.__setitem__, Tensor.__getitem__) and args[0].is_meta:
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            value = args[2] if function is Tensor.__setitem__ else None
            one = len(parts) == args[0].ndim and all(isinstance(part, int) for part in parts)
            indexed = any(isinstance(part, Tensor) and part.dtype != torch.bool for part in parts)
            copied = (isinstance(value, int | float) and (one or indexed)) or any(isinstance(p, list) for p in parts)
            if copied:
                raise RuntimeError(f"{function.__name__} with {args[1:]} copies from the host to the device")
        out = function(*args, **(kwargs or {}))
        if function in MADE_OF_VALUES and out.is_meta:
            raise RuntimeError(f"{function.__name__} copies {args[-1]!r} from the host to the device")
        return out


class Count(MetaMode):
    """Writes down every operator on meta tensors as ``calls``; ``launched`` is the record of a StandIn."""

    def __init__(self):
        super().__init__()
        self.calls: list[Call] = []
        self._inside: str | None = None  # the operator of ours that is being run

    def launched(self, kernel, grid: tuple[int, ...], arguments: tuple, constants: dict) -> None:
        name = kernel.__name__
        if name not in TRAFFIC:
            raise KeyError(f"bench/lib/traffic.py does not know what {name} reads and writes; add it to TRAFFIC")
        read, written = TRAFFIC[name](arguments, constants)
        self._add(name, PART_OF.get(name, ROWS), read, written)

    def _add(self, name: str, part: str, read, written, **more) -> None:
        shape = tuple(max((*read, *written), key=Tensor.numel).shape)
        self.calls.append(Call(name, part, shape, size(*read), size(*written), **more))

    def opens(self, operator, args: tuple, kwargs: dict):
        before, self._inside = self._inside, operator.overloadpacket.__name__
        try:
            return super().opens(operator, args, kwargs)
        finally:
            self._inside = before

    def ran(self, operator, args: tuple, kwargs: dict, out) -> None:
        schema, name = operator._schema, operator.overloadpacket.__name__
        outs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        read, written = [], [] if any(r.alias_info for r in schema.returns) else outs
        for i, argument in enumerate(schema.arguments):
            given = args[i] if i < len(args) else kwargs.get(argument.name)
            tensors = [x for x in tree_leaves(given) if isinstance(x, Tensor)]
            if argument.alias_info is None or not argument.alias_info.is_write:
                read += tensors
            else:
                written = written + tensors
                read += tensors if argument.name != "out" and name not in WRITES_ONLY else []
        views = schema.returns and all(r.alias_info and not r.alias_info.is_write for r in schema.returns)
        everything = [*read, *written]
        if views or name in NO_KERNEL or not any(x.is_meta for x in everything):
            return
        for x in everything:  # a number among tensors is an argument of the kernel, unless it is what is copied
            if not x.is_meta and (x.ndim or name in TRANSFERS) and not is_asynchronous(x, operator, args, kwargs):
                raise RuntimeError(f"{operator} moves a tensor between host and device inside the step")

        label = f"{operator.namespace}::{name}"
        if operator.namespace in ("c10d", "_c10d_functional"):
            whole = max(everything, key=Tensor.numel)
            self.calls.append(Call(label, "communication", tuple(whole.shape), size(whole), 0))
        elif name in ("mm", "addmm"):
            matrices = [x for x in args if isinstance(x, Tensor)]
            a, b = matrices[-2:]
            product = Product.of(a, b)
            adds = [matrices[0]] if name == "addmm" and kwargs.get("beta", 1) != 0 else []
            self._add(label, "matmul", [a, b, *adds], [out], flops=product.flops, product=product)
        elif "cudnn_attention" in name or "flash4" in name:
            self._add(label, "attention", read, written, flops=attention_flops(name, args))
        elif name == "embedding":
            self._add(label, PART_OF[name], [args[1], out], [out])  # the rows that it looks up, not the table
        elif name == "all_gather_copy_in":
            self._add(label, "copies", args[0], args[0])
        elif name == "_fused_adamw_":
            self._add(label, "optimizer", read, [x for tensors in (args[0], *args[2:4]) for x in tensors])
        else:
            part = PART_OF.get(name, OTHER + "metrics")
            if self._inside is not None:
                label = f"{label} in {self._inside}"
                part = PART_OF.get(self._inside, "loss" if "entropy" in self._inside else ROWS)
            elif name in ("add", "add_") and out.numel() >= LARGE:
                part = OTHER + "residual adds" if out.ndim == 3 else SUMS
            self._add(label, part, read, written)


def is_asynchronous(on_host: Tensor, operator, args: tuple, kwargs: dict) -> bool:
    """Whether an operator that copies was asked not to wait, and need not: from or to pinned memory."""
    for i, argument in enumerate(operator._schema.arguments):
        if argument.name == "non_blocking":
            return (args[i] if i < len(args) else kwargs.get("non_blocking", False)) and on_host.is_pinned()
    return False


def attention_flops(name: str, args: tuple) -> int:
    """Executed by an attention operator: 2 products of 2 FLOP a channel and pair forward, 5 backward."""
    backward = "backward" in name
    q = args[1] if backward else args[0]
    if "flash4" in name:
        (B, T, H, c), window = q.shape, args[8 if backward else 5]
    else:
        (B, H, T, c), window = q.shape, None
    return (10 if backward else 4) * c * H * roofline.attention_keys([T] * B, window)


# ------------------------------------------------------------------------------------------------------------ the step


def count_step(case: MetaCase) -> list[Call]:
    """Every kernel and operator of one step, in order."""
    count = Count()
    with world_of(case.ranks) as world, on_hopper(count.launched, case.window_hides):
        step = MetaStep(case, world)
        with count, NoTransfers():
            step.run()
    return count.calls


# ------------------------------------------------------------------------------------------------- beside roofline.py


@dataclass(frozen=True)
class KernelPart:
    """A kind of kernel: counted, by roofline.py, and its floor on a GPU."""

    name: str
    calls: int
    flops: int
    roofline_flops: int
    bytes: int
    roofline_bytes: int
    floor_ms: float

    @property
    def differs(self) -> bool:
        return apart(self.flops, self.roofline_flops) or apart(self.bytes, self.roofline_bytes)


def apart(counted: int, expected: int) -> bool:
    return abs(counted - expected) > max(TOLERANCE * expected, TRIFLE)


def expected(case: MetaCase) -> dict[str, tuple[int, int]]:
    """Executed FLOPs and bytes of a step by roofline.py, of each of PARTS."""
    config, T, micro, recompute = case.config, case.n_tokens, case.accumulation, case.work.recompute
    programs = rms_norm.backward_programs(T, config.dim, HOPPER["capability"][0], HOPPER["multiprocessors"])
    if case.ranks > 1:
        again = case.layout.gathered_again
        sent = sum(c.count * c.bytes for c in roofline.collectives(config, case.ranks, gathered_again=again))
        copied = roofline.fsdp_copy_bytes(config, case.ranks, again)
        updated = roofline.sharded_update_bytes(shard_numel(config, case.ranks))
    else:
        sent, copied, updated = 0, 0, roofline.split_update_bytes(config, case.moments, micro)
    attended = roofline.attention_flops(config, case.lengths) * 14 // 12
    return {
        "matmul": (micro * 6 * matmul_parameters(config) * T, micro * roofline.matmul_bytes(config, T)),
        "attention": (micro * attended, micro * roofline.attention_bytes(config, T)),
        ROWS: (0, micro * sum(roofline.row_kernel_bytes(config, T, recompute=recompute, programs=programs))),
        "loss": (0, micro * roofline.loss_bytes(config, T)),
        "optimizer": (0, updated),
        SUMS: (0, roofline.gradient_sum_bytes(config, case.moments, micro)),
        "copies": (0, copied),
        "communication": (0, sent),
        OTHER + "residual adds": (0, micro * roofline.residual_bytes(config, T)),
        OTHER + "embedding": (0, micro * roofline.embedding_bytes(config, T)),
        OTHER + "metrics": (0, micro * roofline.metrics_bytes(T)),
    }


def parts_of(calls: list[Call], case: MetaCase, gpu: machines.GPU) -> list[KernelPart]:
    """The calls by kind, beside roofline.py's; floors at the ideal rates of step_time.py, communication hidden."""
    rates, wanted, parts = RATES["ideal"], expected(case), []
    for name in PARTS:
        mine = [call for call in calls if call.part == name]
        flops, moved = sum(call.flops for call in mine), sum(call.bytes for call in mine)
        rate, counted = (rates.attention, flops * 12 // 14) if name == "attention" else (rates.matmul, flops)
        seconds = max(counted / (gpu.bf16_flops * rate), moved / (gpu.hbm_bytes_per_second * rates.memory))
        floor_ms = 0.0 if name == "communication" else seconds * 1e3
        parts.append(KernelPart(name, len(mine), flops, wanted[name][0], moved, wanted[name][1], floor_ms))
    return parts


def floor_ms(parts: list[KernelPart]) -> float:
    """One kind of kernel after another, nothing between them."""
    return sum(part.floor_ms for part in parts)


# ---------------------------------------------------------------------------------------------------------- the tables


def weight_names(config: MistralConfig) -> dict[tuple[int, int], str]:
    """[rows, columns] -> which weights of the model are that large."""
    names = defaultdict(list)
    matrices = [shape for shape in layer_shapes(config) if shape[1] > 1]
    for name, shape in zip(("qkv", "out", "gate_up", "down"), matrices, strict=True):
        names[shape].append(name)
    names[config.vocab_size, config.dim].append("head")
    return {shape: " or ".join(which) for shape, which in names.items()}


def product_lines(calls: list[Call], config: MistralConfig) -> list[str]:
    """The matrix products of a step, equal ones together."""
    lines = [f"  {'product':20}{'M':>7}{'N':>7}{'K':>7}{'a step':>8}{'TFLOP':>9}{'share':>8}"]
    names, groups = weight_names(config), Counter(call.product for call in calls if call.product)
    total, kinds = sum(p.flops * n for p, n in groups.items()), Counter()
    for name, p in sorted(((f"{names[p.weight]} {p.kind}", p) for p in groups), key=lambda one: one[0]):
        n, flops = groups[p], p.flops * groups[p]
        kinds[p.kind] += flops
        lines.append(f"  {name:20}{p.m:7}{p.n:7}{p.k:7}{n:8}{flops / 1e12:9.2f}{flops / total:8.2%}")
    parts = ", ".join(f"{kind} {flops / 1e12:.2f}" for kind, flops in kinds.items())
    return [*lines, f"  all {groups.total()}: {total / 1e12:.2f} TFLOP; {parts}"]


def kernel_lines(calls: list[Call], least: float = 1e7) -> list[str]:
    """What is no matrix product, equal ones together, most bytes first; below ``least`` bytes a step only how many."""
    lines = [f"  {'kernel or operator':54}{'of':16}{'a step':>7}{'GB read':>10}{'written':>9}  category"]
    groups, small = defaultdict(list), []
    for call in calls:
        if not call.product:
            groups[call.name, call.part, call.shape].append(call)
    for (name, part, shape), equal in sorted(groups.items(), key=lambda item: -sum(call.bytes for call in item[1])):
        read, written = sum(call.read for call in equal), sum(call.written for call in equal)
        if read + written < least:
            small += equal
            continue
        moved = f"{read / 1e9:10.3f}{written / 1e9:9.3f}"
        lines.append(f"  {name:54}{'x'.join(map(str, shape)):16}{len(equal):7}{moved}  {part}")
    return [*lines, f"  and {len(small)} more, of {sum(call.bytes for call in small) / 1e6:.1f} MB together"]


def part_lines(parts: list[KernelPart]) -> list[str]:
    head = f"  {'category':26}{'calls':>6}{'TFLOP':>9}{'roofline':>10}{'diff':>8}"
    lines = [f"{head}{'GB':>10}{'roofline':>10}{'diff':>8}{'floor ms':>10}"]
    for p in parts:
        flops = f"{p.flops / 1e12:9.2f}{p.roofline_flops / 1e12:10.2f}{difference(p.flops, p.roofline_flops):>8}"
        moved = f"{p.bytes / 1e9:10.3f}{p.roofline_bytes / 1e9:10.3f}{difference(p.bytes, p.roofline_bytes):>8}"
        floor = "hidden" if p.name == "communication" and p.calls else f"{p.floor_ms:.2f}"
        lines.append(f"  {p.name:26}{p.calls:6}{flops}{moved}{floor:>10}{'  <- apart' if p.differs else ''}")
    return lines


def difference(counted: int, expected: int) -> str:
    return f"{(counted - expected) / expected:+.2%}" if expected else "new" if apart(counted, 0) else ""


def summary_lines(case: MetaCase, parts: list[KernelPart], gpu_name: str) -> list[str]:
    gpu, ms = machines.GPUS[gpu_name], floor_ms(parts)
    by_name = {part.name: part for part in parts}
    executed = by_name["attention"].flops
    rate = case.accumulation * case.n_tokens / ms * 1e3
    mfu = machines.mfu(rate, roofline.flops_per_token(case.config, case.seq_len), gpu.bf16_flops)
    return [
        f"  attention: {executed * 12 / 14 / 1e12:.2f} TFLOP as MFU counts (backward 2 x forward), "
        f"{executed / 1e12:.2f} executed (2.5 x)",
        f"  floor on {gpu_name}, calculated: {ms:.1f} ms a step = {rate:,.0f} tokens/s, MFU {mfu:.1%};",
        f"  matrix products at {RATES['ideal'].matmul * gpu.bf16_flops / 1e12:.0f} TFLOP/s, memory at "
        f"{RATES['ideal'].memory * gpu.hbm_bytes_per_second / 1e12:.2f} TB/s, nothing in between, network hidden",
    ]


# ----------------------------------------------------------------------------------------------------------- host time


def host_ms(case: MetaCase, n_steps: int) -> dict[str, float]:
    """Median milliseconds of the host in a step, by what it is busy with. Every launch of ours is left out.

    CPU time of the one thread, which others on this machine do not lengthen by much. No dispatch mode is on. On the
    meta device PyTorch's own kernels are left out too, but shapes take longer: those of some operators are computed in
    Python there (``vector_norm``), so this is rather too much. FSDP2's streams and events are stubs, its collectives
    PyTorch's fakes.
    """
    times = defaultdict(list)
    backward = Tensor.backward

    def timed_backward(*args, **kwargs) -> None:
        mark("forward")
        backward(*args, **kwargs)
        mark("backward")

    def mark(name: str) -> None:
        nonlocal now
        before, now = now, time.thread_time()
        times[name].append((now - before) * 1e3)

    def addmm(total: Tensor, a: Tensor, b: Tensor, **options) -> Tensor:
        """torch.addmm; but its meta function in torch 2.11 takes out_dtype for beta (see MetaMode), mm's does not."""
        return torch.mm(a, b, **options) if options.get("out_dtype") else whole_addmm(total, a, b, **options)

    whole_addmm = torch.addmm
    hopper = on_hopper(lambda *_: None, case.window_hides)
    with world_of(case.ranks) as world, hopper, patch("torch.addmm", addmm):
        step = MetaStep(case, world)
        for _ in range(2):
            step.run()
        with patch.object(Tensor, "backward", timed_backward):
            for _ in range(n_steps):
                now = start = time.thread_time()
                step.run()
                mark("optimizer")
                times["step"].append((now - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def host_lines(host: dict[str, float], case: MetaCase, calls: list[Call], floor: float, gpu_name: str) -> list[str]:
    launches = sum(call.name in TRAFFIC for call in calls)
    parts = ", ".join(f"{name} {host[name]:.1f}" for name in ("forward", "backward", "optimizer"))
    streams = ", nor FSDP2's streams and events" if case.ranks > 1 else ""
    return [
        f"host time of a step, CPU time measured on this machine: {host['step']:.1f} ms ({parts})",
        f"  of a step's calculated floor on {gpu_name}, {floor:.0f} ms: {host['step'] / floor:.1%} (to be below "
        f"{HOST_SHARE:.0%})",
        f"  included: what the meta device computes in Python. Not: starting {launches} kernels of ours, and whatever",
        f"  {len(calls) - launches} operators of PyTorch start{streams}",
    ]


class Bare(torch.autograd.Function):
    """What torch.autograd.grad and a Function that only allocates cost on this machine: the part that is not ours."""

    @staticmethod
    def forward(ctx, x):
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return torch.empty_like(dy)


def operation_lines(calls: int = 2000) -> Iterator[str]:
    """Microseconds of the host for forward and backward of each row operation, the best of five rounds.

    On small CPU tensors that take the kernels' path; every launch is replaced by nothing. A kernel that is shorter on
    the GPU waits for the host.
    """
    torch.set_num_threads(1)
    x, residual, gate_up = (torch.randn(2, 8, 64, requires_grad=True) for _ in range(3))
    weight, qkv = torch.ones(64, requires_grad=True), torch.randn(2, 8, 8, 16, requires_grad=True)
    cos, sin = rope.rope_tables(8, 16, 1e4)
    cases = {
        "bare Function": (lambda: Bare.apply(x), [x]),
        "rms_norm": (lambda: rms_norm.rms_norm(x, weight, 1e-5), [x, weight]),
        "add_rms_norm": (lambda: rms_norm.add_rms_norm(x, residual, weight, 1e-5), [x, residual, weight]),
        "swiglu": (lambda: swiglu.swiglu(gate_up), [gate_up]),
        "rope_split_qkv_": (lambda: rope.rope_split_qkv_(Bare.apply(qkv), cos, sin, 4, 2), [qkv]),  # no leaf may change
    }
    with contextlib.ExitStack() as stack:
        for module in (rms_norm, rope, swiglu):
            stack.enter_context(patch.object(module, "launch", lambda *arguments, **constants: None))
        for name, (forward, inputs) in cases.items():
            upstream = [torch.ones_like(y) for y in tree_leaves(forward())]
            run = lambda f=forward, i=inputs, u=upstream: torch.autograd.grad(f(), i, u)  # noqa: E731
            yield f"{name:16} {min(timeit.repeat(run, number=calls)) / calls * 1e6:6.1f} us"


# ---------------------------------------------------------------------------------------------------------------- main


def gpu_names() -> dict[str, str]:
    """What --gpu takes -> the driver's name: Hopper GPUs, whose kernels are counted, by that or by machines.py's."""
    names = {name: name for name in machines.GPUS if any(kind in name for kind in ("H100", "H200", "GH200"))}
    return names | {short: machine.name for short, machine in MACHINES.items() if machine.name in names}


def case_of(given: argparse.Namespace) -> MetaCase:
    """What the command line asks for; Refused, naming flag and value, where that cannot be, or later by its layout."""
    at_least_one(given, "layers", "micro_batch", "seq_len", "accumulation", "ranks")
    config = PRESETS[given.model]
    config = replace(config, n_layers=given.layers or config.n_layers)
    if given.seq_len > config.max_seq_len:
        raise Refused(f"--seq-len {given.seq_len} is beyond {given.model}'s limit of {config.max_seq_len} positions")
    if given.accumulation > 1 and given.ranks > 1:
        raise Refused(f"--accumulation {given.accumulation} is counted on one rank only; leave out --ranks")
    if given.reshard and given.ranks == 1:
        raise Refused(f"--reshard {given.reshard} is for several ranks, and --ranks is 1; leave it out")
    if given.gpu not in gpu_names():
        raise Refused(f"--gpu {given.gpu} is not known; use one of {', '.join(gpu_names())}")
    return MetaCase(
        config, given.micro_batch, given.seq_len, given.ranks, given.moments, given.accumulation, given.reshard,
        machines.GPUS[gpu_names()[given.gpu]].memory_bytes, given.recompute,
    )  # fmt: skip


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", choices=PRESETS, default="mistral-7b", help="preset of model/mistral.py [mistral-7b]")
    add("--layers", type=int, help="layers instead of the preset's")
    add("--micro-batch", type=int, default=4, help="sequences computed at once [4]")
    add("--accumulation", type=int, default=1, help="micro batches of a step, on one rank [1]")
    add("--seq-len", type=int, default=4096, help="tokens of each [4096]")
    add("--ranks", type=int, default=1, help="1, or so many under FSDP2, of which rank 0 is counted [1]")
    add("--reshard", choices=("always", "never", "node"), help="what becomes of gathered weights [as train.py decides]")
    add("--recompute", choices=("auto", "always", "never"), default="auto",
        help="outputs of norms and SwiGLU in the backward pass; auto: as train.py for this GPU [auto]")  # fmt: skip
    add("--moments", choices=MOMENTS, default="fp32", help="AdamW's two moments, on one rank [fp32]")
    add("--gpu", default="NVIDIA H200", metavar="NAME",
        help=f"whose peaks the floors are of [NVIDIA H200]; one of {', '.join(gpu_names())}")  # fmt: skip
    add("--host", nargs="?", const="step", choices=("step", "operations"),
        help="time the host instead; of a step: exit code 1 from a quarter of the floor on [step]")  # fmt: skip
    return parser.parse_args(arguments)


@command
def main(arguments: list[str]) -> int:
    given = parse(arguments)
    if given.host == "operations":
        print(*operation_lines(), sep="\n")
        return 0
    case = case_of(given)
    gpu_name = gpu_names()[given.gpu]
    calls = count_step(case)
    parts = parts_of(calls, case, machines.GPUS[gpu_name])
    where = f"one rank, moments in {case.moments}"
    if case.ranks > 1:
        where = f"one of {case.ranks} ranks under FSDP2, --reshard {case.layout.reshard}"
    where += f", recomputed: {recomputed(case.work)}"
    title = f"{given.model}, {case.config.n_layers} layers, {case.tokens}, bf16, {where}"
    if given.host:
        host = host_ms(case, n_steps=7)
        fine = host["step"] < HOST_SHARE * floor_ms(parts)
        print(title, *host_lines(host, case, calls, floor_ms(parts), gpu_name), sep="\n")
    else:
        fine = not any(part.differs for part in parts)
        print(f"{title}: counted, no GPU involved", "matrix products", *product_lines(calls, case.config), sep="\n")
        print("everything else", *kernel_lines(calls), sep="\n")
        print("beside model/estimate/roofline.py", *part_lines(parts), *summary_lines(case, parts, gpu_name), sep="\n")
        if not fine:
            print("account.py: counted and calculated are more than 1% apart, see above", file=sys.stderr)
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
