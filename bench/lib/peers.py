"""Who else does these operations, and how each is called: one small loader a peer and operation.

A loader imports its package (only when asked: most machines have few of them) and returns a function of the
operation's arguments, those of our ``*_reference``. The line it returns is the call that result files record, so what
is written there is what ran. A loader that raises ImportError or AttributeError means "absent", with its text.

Each peer is called as is best for it, and in several ways where that is not known beforehand: in place where it may be,
sums in fp32 or not, filtered gradients or not. What is not right is reported so and not timed (bench/kernels.py), so of
a peer's ways the fastest right one counts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

import torch
import torch.nn.functional as F

from halny.kernels import adamw, rms_norm, rope, swiglu
from halny.kernels import cross_entropy as ce
from halny.kernels import linear_cross_entropy as lce

EPS = 1e-5


class Peer(NamedTuple):
    package: str  # who: the name in tables
    load: Callable[[], Callable]
    ruins: bool  # whether it overwrites its inputs or the incoming gradient, which the clock then restores
    note: str  # what sets this way apart, if one package is called in several
    text: str = ""  # the call, where the loader's source would not show it
    leaves_v: bool = False  # whether RoPE's v is a view of the input, and so never moved

    @property
    def name(self) -> str:
        return f"{self.package}, {self.note}" if self.note else self.package

    @property
    def call(self) -> str:
        """The body of the loader, as it is written."""
        if self.text:
            return self.text
        _, _, body = inspect.getsource(self.load).partition("():\n")
        lines = [line.partition("  #")[0].strip() for line in body.splitlines()]
        return "; ".join(line for line in lines if line and line[0] != "#")


PEERS: dict[str, list[Peer]] = {}


def peer(operation: str, package: str, ruins: bool = False, note: str = "", leaves_v: bool = False):
    def add(load):
        PEERS.setdefault(operation, []).append(Peer(package, load, ruins, note, leaves_v=leaves_v))
        return load

    return add


def compiled(function: Callable, search: bool = True) -> Callable:
    """torch.compile at its best: tiles searched for row operations, where GEMMs are left to cuBLAS."""
    if not torch.cuda.is_available():  # a rehearsal: tracing without a C++ compiler
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    mode = "max-autotune-no-cudagraphs" if search else "default"
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


# ------------------------------------------------------------------------------------------------------------- RMSNorm


@peer("rms_norm", "halny")
def _():
    return lambda x, weight: rms_norm.rms_norm(x, weight, EPS)


@peer("rms_norm", "PyTorch eager")
def _():
    return lambda x, weight: rms_norm.rms_norm_reference(x, weight, EPS)


@peer("rms_norm", "torch.compile")
def _():
    return compiled(lambda x, weight: rms_norm.rms_norm_reference(x, weight, EPS))


@peer("rms_norm", "torch native")
def _():
    return lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, EPS)


@peer("rms_norm", "Liger-Kernel", ruins=True)
def _():
    from liger_kernel.ops import LigerRMSNormFunction

    return lambda x, weight: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", True)


@peer("rms_norm", "Liger-Kernel", note="CuTe DSL")
def _():
    from liger_kernel.functional import rms_norm

    import_module("cutlass.cute")  # the compiler of these kernels; without it they would be tried, and fail

    return lambda x, weight: rms_norm(x, weight, EPS, impl="nvidia-cutedsl")


@peer("rms_norm", "quack")
def _():
    from quack import rmsnorm

    return lambda x, weight: rmsnorm(x, weight, eps=EPS)


@peer("add_rms_norm", "halny")
def _():
    return lambda x, residual, weight: rms_norm.add_rms_norm(x, residual, weight, EPS)


@peer("add_rms_norm", "PyTorch eager")
def _():
    return lambda x, residual, weight: rms_norm.add_rms_norm_reference(x, residual, weight, EPS)


@peer("add_rms_norm", "torch.compile")
def _():
    return compiled(lambda x, residual, weight: rms_norm.add_rms_norm_reference(x, residual, weight, EPS))


def native_add_rms_norm(x, residual, weight):
    s = x + residual
    return F.rms_norm(s, s.shape[-1:], weight, EPS), s


@peer("add_rms_norm", "torch native")
def _():
    return native_add_rms_norm


@peer("add_rms_norm", "Liger-Kernel", ruins=True)
def _():
    from liger_kernel.ops import LigerFusedAddRMSNormFunction

    return lambda x, residual, weight: LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", True)


@peer("add_rms_norm", "Liger-Kernel", note="CuTe DSL")
def _():
    from liger_kernel.functional import fused_add_rms_norm

    import_module("cutlass.cute")  # the compiler of these kernels; without it they would be tried, and fail

    return lambda x, residual, weight: fused_add_rms_norm(x, residual, weight, EPS, impl="nvidia-cutedsl")


@peer("add_rms_norm", "quack")
def _():
    from quack import rmsnorm

    return lambda x, residual, weight: rmsnorm(x, weight, residual=residual, eps=EPS, prenorm=True)


# ---------------------------------------------------------------------------------------------------------------- RoPE
# From the packed projection to what attention takes, q, k and v apart; the gradient comes back apart, goes on packed.


def split(qkv, n_heads: int, n_kv_heads: int):
    return qkv.split([n_heads, n_kv_heads, n_kv_heads], dim=2)


def eager_rope(qkv, cos, sin, n_heads, n_kv_heads):
    return split(rope.rope_qkv_reference(qkv, cos, sin, n_heads, n_kv_heads), n_heads, n_kv_heads)


@peer("rope", "halny")
def _():
    return rope.rope_split_qkv


@peer("rope", "PyTorch eager")
def _():
    return eager_rope


@peer("rope", "torch.compile")
def _():
    return compiled(eager_rope)


@peer("rope", "torch native")
def _():
    raise ImportError("PyTorch has no rotary embedding of its own")


def liger_rope(apply, qkv, cos, sin, n_heads, n_kv_heads):
    q, k, v = split(qkv, n_heads, n_kv_heads)
    cos, sin = cos[None, : qkv.shape[1]], sin[None, : qkv.shape[1]]
    q, k = apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin, None, 1, qkv.shape[-1])
    return q.transpose(1, 2), k.transpose(1, 2), v


@peer("rope", "Liger-Kernel", ruins=True, leaves_v=True)
def _():
    from liger_kernel.ops import LigerRopeFunction

    return lambda *arguments: liger_rope(LigerRopeFunction.apply, *arguments)


def quack_rope(apply, qkv, cos, sin, n_heads, n_kv_heads):
    n_rotated = n_heads + n_kv_heads
    rotated = apply(qkv[:, :, :n_rotated], cos[: qkv.shape[1]], sin[: qkv.shape[1]])
    return rotated[:, :, :n_heads], rotated[:, :, n_heads:], qkv[:, :, n_rotated:]


@peer("rope", "quack", leaves_v=True)
def _():
    from quack.rotary import apply_rotary_emb

    return lambda *arguments: quack_rope(apply_rotary_emb, *arguments)


def quack_rope_in_place(apply, qkv, cos, sin, n_heads, n_kv_heads):
    cos, sin = cos[: qkv.shape[1]], sin[: qkv.shape[1]]
    return split(apply(qkv, cos, sin, num_heads_q=n_heads), n_heads, n_kv_heads)


@peer("rope", "quack", ruins=True, note="in place", leaves_v=True)
def _():
    from quack.rotary import apply_rotary_emb_qkv_

    return lambda *arguments: quack_rope_in_place(apply_rotary_emb_qkv_, *arguments)


# -------------------------------------------------------------------------------------------------------------- SwiGLU


@peer("swiglu", "halny")
def _():
    return swiglu.swiglu


@peer("swiglu", "PyTorch eager")
def _():
    return swiglu.swiglu_reference


@peer("swiglu", "torch.compile")
def _():
    return compiled(swiglu.swiglu_reference)


@peer("swiglu", "torch native")
def _():
    raise ImportError("PyTorch has silu, but no SwiGLU of its own")


@peer("swiglu", "Liger-Kernel")
def _():
    from liger_kernel.ops import LigerFusedGateUpSiLUMulFunction

    return lambda gate_up: LigerFusedGateUpSiLUMulFunction.apply(gate_up, False)


@peer("swiglu", "quack")
def _():
    raise ImportError("quack has SwiGLU only inside its matrix products (quack.mlp), not as an operation")


# ------------------------------------------------------------------------------------------------------- cross-entropy


@peer("cross_entropy", "halny")
def _():
    return ce.cross_entropy


@peer("cross_entropy", "PyTorch eager")
def _():
    return ce.cross_entropy_reference


@peer("cross_entropy", "torch.compile")
def _():
    return compiled(ce.cross_entropy_reference)


@peer("cross_entropy", "torch native")
def _():
    return lambda logits, labels: F.cross_entropy(logits, labels)


@peer("cross_entropy", "Liger-Kernel", ruins=True)
def _():
    from liger_kernel.ops import LigerCrossEntropyFunction

    # the options are: no class weights, ignored label, no z-loss, no smoothing
    return lambda logits, labels: LigerCrossEntropyFunction.apply(logits, labels, None, -100, 0.0, 0.0, "mean")[0]


@peer("cross_entropy", "Liger-Kernel", ruins=True, note="CuTe DSL")
def _():
    from liger_kernel.functional import cross_entropy

    import_module("cutlass.cute")  # the compiler of these kernels; without it they would be tried, and fail

    return lambda logits, labels: cross_entropy(logits, labels, impl="nvidia-cutedsl")[0]


@peer("cross_entropy", "quack", ruins=True, note="in place")
def _():
    from quack import cross_entropy

    return lambda logits, labels: cross_entropy(logits, labels, inplace_backward=True)


@peer("cross_entropy", "quack")
def _():
    from quack import cross_entropy

    return lambda logits, labels: cross_entropy(logits, labels)


# ------------------------------------------------------------------------------------------------ linear cross-entropy


def eager_linear_cross_entropy(hidden, weight, labels):
    return ce.cross_entropy_reference(hidden @ weight.T, labels)


@peer("linear_cross_entropy", "halny")
def _():
    return lambda hidden, weight, labels: lce.linear_cross_entropy(hidden, weight, labels).loss


@peer("linear_cross_entropy", "PyTorch eager")
def _():
    return eager_linear_cross_entropy


@peer("linear_cross_entropy", "torch.compile")
def _():
    return compiled(eager_linear_cross_entropy, search=False)


@peer("linear_cross_entropy", "torch native")
def _():
    F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions  # noqa: B018  absent from a torch before 2.13
    options = torch.nn.LinearCrossEntropyOptions()
    return lambda hidden, weight, labels: F.linear_cross_entropy(hidden, weight, labels, options=options)


@peer("linear_cross_entropy", "torch native", note="2,048 rows")
def _():
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=2048, chunking_method=None)
    return lambda hidden, weight, labels: F.linear_cross_entropy(hidden, weight, labels, options=options)


@peer("linear_cross_entropy", "torch native", note="4,096 rows")
def _():
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=4096, chunking_method=None)
    return lambda hidden, weight, labels: F.linear_cross_entropy(hidden, weight, labels, options=options)


@peer("linear_cross_entropy", "Liger-Kernel")
def _():
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

    return lambda hidden, weight, labels: liger(hidden, weight, labels)


@peer("linear_cross_entropy", "Liger-Kernel", note="fp32 sum, larger chunks")
def _():
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

    options = dict(accum_dtype=torch.float32, chunk_mem_const=4)
    return lambda hidden, weight, labels: liger(hidden, weight, labels, **options)


@peer("linear_cross_entropy", "quack")
def _():
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return lambda hidden, weight, labels: chunked_linear_cross_entropy(hidden, weight, labels)


@peer("linear_cross_entropy", "quack", note="dlogits, untuned")
def _():
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    # on capability 9.0 the default never makes the logits' gradient, and tunes nothing
    options = dict(use_scaled_exp=False, tuned=False)
    return lambda hidden, weight, labels: chunked_linear_cross_entropy(hidden, weight, labels, **options)


@peer("linear_cross_entropy", "cut-cross-entropy")
def _():
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels)


@peer("linear_cross_entropy", "cut-cross-entropy", note="unfiltered")
def _():
    from cut_cross_entropy import linear_cross_entropy

    return lambda hidden, weight, labels: linear_cross_entropy(hidden, weight, labels, filter_eps=None)


# --------------------------------------------------------------------------------------------------------------- AdamW

ADAMW = dict(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
LR = 1e-3


def first_update(weight, gradient):
    """The weight after AdamW's first step, in its own dtype: corrected by c1 and c2^2, m is g and v is g^2."""
    kept = weight * (1 - LR * ADAMW["weight_decay"])
    return kept - LR * gradient / (gradient.abs() + ADAMW["eps"])


def whole_weight(updated):
    """What a provider returned, the weight or its two halves, as one tensor in fp32."""
    return adamw.join(*updated) if isinstance(updated, tuple) else updated.detach().float()


def halves_updated_by(update, moments: str):
    """adamw_'s way: the weight in two halves, moments beside it, scalars on the device."""
    states = {}

    def step(weight, gradient):
        key = weight.data_ptr()
        if key not in states:
            c1, c2 = 1 - ADAMW["beta1"], (1 - ADAMW["beta2"]) ** 0.5
            scalars = torch.tensor([LR, c1, c2, 1.0, 0.0], device=weight.device)
            states[key] = *adamw.split(weight), adamw.new_moments(weight, moments), scalars
        high, low, kept, scalars = states[key]
        update(high, low, gradient, kept, scalars, **ADAMW, seed=0)
        return high, low

    return step


def torch_adamw():
    """torch.optim.AdamW(fused=True) on fp32 weights, whose gradient is cast to fp32 and result to what computes."""
    states = {}

    def step(weight, gradient):
        key = weight.data_ptr()
        if key not in states:
            parameter = torch.nn.Parameter(weight.clone())
            betas = ADAMW["beta1"], ADAMW["beta2"]
            options = dict(lr=LR, betas=betas, eps=ADAMW["eps"], weight_decay=ADAMW["weight_decay"], fused=True)
            states[key] = parameter, parameter.detach().to(gradient.dtype), torch.optim.AdamW([parameter], **options)
        parameter, computed_with, optimizer = states[key]
        parameter.grad = gradient.float()
        optimizer.step()
        computed_with.copy_(parameter.detach())
        return parameter

    return step


def adamw_peers(moments: str) -> list[Peer]:
    arguments = "(high, low, gradient, moments, scalars)"
    found = [
        Peer("halny", lambda: halves_updated_by(adamw.adamw_, moments), False, "", f"adamw_{arguments}"),
        Peer("PyTorch eager", lambda: halves_updated_by(adamw.adamw_reference_, moments), False, "",
             f"adamw_reference_{arguments}"),
        Peer("torch.compile", lambda: halves_updated_by(compiled(adamw.adamw_reference_), moments), False, "",
             f"compiled(adamw_reference_){arguments}"),
    ]  # fmt: skip
    if moments == "fp32":
        text = "AdamW([fp32 weight], fused=True).step(), its gradient from bf16, and a bf16 weight from it"
        found.append(Peer("torch native", torch_adamw, False, "fused, casts", text))
    return found


PEERS |= {f"adamw, {moments}": adamw_peers(moments) for moments in adamw.MOMENTS}
