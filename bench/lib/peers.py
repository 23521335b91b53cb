"""Who else does these operations, and how each is called: a line a peer and operation.

A peer's loader imports its package (only when asked: most machines have few of them) and returns a function of the
operation's arguments, those of our ``*_reference``. Result files record the line as it stands here, so what is written
there is what ran. A loader that raises ImportError or AttributeError means "absent", with its text.

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
    ruins: bool = False  # whether it overwrites its inputs or the incoming gradient, which the clock then restores
    note: str = ""  # what sets this way apart, if one package is called in several
    text: str = ""  # the call, where the loader's source would not show it
    leaves_v: bool = False  # whether RoPE's v is a view of the input, and so never moved

    @property
    def name(self) -> str:
        return f"{self.package}, {self.note}" if self.note else self.package

    @property
    def call(self) -> str:
        return self.text or source(self.load)


def source(function: Callable) -> str:
    """The lines that a function is written in, as one."""
    return " ".join(inspect.getsource(function).split()).rstrip(",")


def theirs(package: str, path: str, use: Callable, needs: str | None = None, **more) -> Peer:
    """Another package's: ``use`` of what path names, if what it needs can be imported too."""

    def load() -> Callable:
        if needs:
            import_module(needs)
        module, _, name = path.rpartition(".")
        return use(getattr(import_module(module), name))

    return Peer(package, load, text=f"{path}: {source(use)}", **more)


def absent(package: str, reason: str) -> Peer:
    def load():
        raise ImportError(reason)

    return Peer(package, load, text=f"none: {reason}")


def compiled(function: Callable, search: bool = True) -> Callable:
    """torch.compile at its best: tiles searched for row operations, where GEMMs are left to cuBLAS."""
    if not torch.cuda.is_available():  # a rehearsal: tracing without a C++ compiler
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    mode = "max-autotune-no-cudagraphs" if search else "default"
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


def eager_add_rms_norm(x, residual, weight):
    return rms_norm.add_rms_norm_reference(x, residual, weight, EPS)


def native_add_rms_norm(x, residual, weight):
    s = x + residual
    return F.rms_norm(s, s.shape[-1:], weight, EPS), s


# RoPE goes from the packed projection to q, k and v apart; the gradient comes back apart, and goes on packed


def split(qkv, n_heads: int, n_kv_heads: int):
    return qkv.split([n_heads, n_kv_heads, n_kv_heads], dim=2)


class Projected(torch.autograd.Function):
    """x for what a linear layer returns: to autograd neither a leaf nor a view, so that it may be overwritten."""

    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, dx):
        return dx


def eager_rope(qkv, cos, sin, n_heads, n_kv_heads):
    return split(rope.rope_qkv_reference(qkv, cos, sin, n_heads, n_kv_heads), n_heads, n_kv_heads)


def liger_rope(apply, qkv, cos, sin, n_heads, n_kv_heads):
    q, k, v = split(qkv, n_heads, n_kv_heads)
    cos, sin = cos[None, : qkv.shape[1]], sin[None, : qkv.shape[1]]
    q, k = apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin, None, 1, qkv.shape[-1])
    return q.transpose(1, 2), k.transpose(1, 2), v


def quack_rope(apply, qkv, cos, sin, n_heads, n_kv_heads):
    n_rotated = n_heads + n_kv_heads
    rotated = apply(qkv[:, :, :n_rotated], cos[: qkv.shape[1]], sin[: qkv.shape[1]])
    return rotated[:, :, :n_heads], rotated[:, :, n_heads:], qkv[:, :, n_rotated:]


def quack_rope_in_place(apply, qkv, cos, sin, n_heads, n_kv_heads):
    cos, sin = cos[: qkv.shape[1]], sin[: qkv.shape[1]]
    return split(apply(qkv, cos, sin, num_heads_q=n_heads), n_heads, n_kv_heads)


def eager_linear_cross_entropy(hidden, weight, labels):
    return ce.cross_entropy_reference(hidden @ weight.T, labels)


def native_linear_cross_entropy(**options) -> Callable:
    """Both are absent from a torch before 2.13."""

    def load() -> Callable:
        function, chosen = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions(**options)
        return lambda hidden, weight, labels: function(hidden, weight, labels, options=chosen)

    return load


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
    def ours(package: str, update: Callable[[], Callable], text: str) -> Peer:
        text += "(high, low, gradient, moments, scalars)"
        return Peer(package, lambda: halves_updated_by(update(), moments), text=text)

    found = [
        ours("halny", lambda: adamw.adamw_, "adamw_"),
        ours("PyTorch eager", lambda: adamw.adamw_reference_, "adamw_reference_"),
        ours("torch.compile", lambda: compiled(adamw.adamw_reference_), "compiled(adamw_reference_)"),
    ]
    if moments == "fp32":
        text = "AdamW([fp32 weight], fused=True).step(), its gradient from bf16, and a bf16 weight from it"
        found.append(Peer("torch native", torch_adamw, note="fused, casts", text=text))
    return found


# ----------------------------------------------------------------------------------------------------------- the table

LIGER, QUACK, CUT = "Liger-Kernel", "quack", "cut-cross-entropy"
CUTE = dict(note="CuTe DSL", needs="cutlass.cute")  # the compiler; without it these would be tried, and fail

# fmt: off
PEERS: dict[str, list[Peer]] = {
    "rms_norm": [
        Peer("halny", lambda: lambda x, weight: rms_norm.rms_norm(x, weight, EPS)),
        Peer("PyTorch eager", lambda: lambda x, weight: rms_norm.rms_norm_reference(x, weight, EPS)),
        Peer("torch.compile", lambda: compiled(lambda x, weight: rms_norm.rms_norm_reference(x, weight, EPS))),
        Peer("torch native", lambda: lambda x, weight: F.rms_norm(x, x.shape[-1:], weight, EPS)),
        theirs(LIGER, "liger_kernel.ops.LigerRMSNormFunction",
               lambda their: lambda x, weight: their.apply(x, weight, EPS, 0.0, "llama", True), ruins=True),
        theirs(LIGER, "liger_kernel.functional.rms_norm",
               lambda their: lambda x, weight: their(x, weight, EPS, impl="nvidia-cutedsl"), **CUTE),
        theirs(QUACK, "quack.rmsnorm", lambda their: lambda x, weight: their(x, weight, eps=EPS)),
    ],
    "add_rms_norm": [
        Peer("halny", lambda: lambda x, residual, weight: rms_norm.add_rms_norm(x, residual, weight, EPS)),
        Peer("PyTorch eager", lambda: eager_add_rms_norm),
        Peer("torch.compile", lambda: compiled(eager_add_rms_norm)),
        Peer("torch native", lambda: native_add_rms_norm),
        theirs(LIGER, "liger_kernel.ops.LigerFusedAddRMSNormFunction",
               lambda their: lambda x, residual, weight: their.apply(x, residual, weight, EPS, 0.0, "llama", True),
               ruins=True),
        theirs(LIGER, "liger_kernel.functional.fused_add_rms_norm",
               lambda their: lambda x, residual, weight: their(x, residual, weight, EPS, impl="nvidia-cutedsl"),
               **CUTE),
        theirs(QUACK, "quack.rmsnorm",
               lambda their: lambda x, residual, weight: their(x, weight, residual=residual, eps=EPS, prenorm=True)),
    ],
    "rope": [
        Peer("halny", lambda: lambda qkv, *rest: rope.rope_split_qkv_(Projected.apply(qkv), *rest),
             ruins=True, leaves_v=True),
        Peer("PyTorch eager", lambda: eager_rope),
        Peer("torch.compile", lambda: compiled(eager_rope)),
        absent("torch native", "PyTorch has no rotary embedding of its own"),
        theirs(LIGER, "liger_kernel.ops.LigerRopeFunction",
               lambda their: lambda *arguments: liger_rope(their.apply, *arguments), ruins=True, leaves_v=True),
        theirs(QUACK, "quack.rotary.apply_rotary_emb",
               lambda their: lambda *arguments: quack_rope(their, *arguments), leaves_v=True),
        theirs(QUACK, "quack.rotary.apply_rotary_emb_qkv_",
               lambda their: lambda *arguments: quack_rope_in_place(their, *arguments),
               ruins=True, note="in place", leaves_v=True),
    ],
    "swiglu": [
        Peer("halny", lambda: swiglu.swiglu),
        Peer("PyTorch eager", lambda: swiglu.swiglu_reference),
        Peer("torch.compile", lambda: compiled(swiglu.swiglu_reference)),
        absent("torch native", "PyTorch has silu, but no SwiGLU of its own"),
        theirs(LIGER, "liger_kernel.ops.LigerFusedGateUpSiLUMulFunction",
               lambda their: lambda gate_up: their.apply(gate_up, False)),
        absent(QUACK, "quack has SwiGLU only inside its matrix products (quack.mlp), not as an operation"),
    ],
    "cross_entropy": [
        Peer("halny", lambda: ce.cross_entropy),
        Peer("PyTorch eager", lambda: ce.cross_entropy_reference),
        Peer("torch.compile", lambda: compiled(ce.cross_entropy_reference)),
        Peer("torch native", lambda: lambda logits, labels: F.cross_entropy(logits, labels)),
        # Liger's options are: no class weights, ignored label, no z-loss, no smoothing
        theirs(LIGER, "liger_kernel.ops.LigerCrossEntropyFunction",
               lambda their: lambda logits, labels: their.apply(logits, labels, None, -100, 0.0, 0.0, "mean")[0],
               ruins=True),
        theirs(LIGER, "liger_kernel.functional.cross_entropy",
               lambda their: lambda logits, labels: their(logits, labels, impl="nvidia-cutedsl")[0],
               ruins=True, **CUTE),
        theirs(QUACK, "quack.cross_entropy",
               lambda their: lambda logits, labels: their(logits, labels, inplace_backward=True),
               ruins=True, note="in place"),
        theirs(QUACK, "quack.cross_entropy", lambda their: lambda logits, labels: their(logits, labels)),
    ],
    "linear_cross_entropy": [
        Peer("halny", lambda: lambda hidden, weight, labels: lce.linear_cross_entropy(hidden, weight, labels).loss),
        Peer("PyTorch eager", lambda: eager_linear_cross_entropy),
        Peer("torch.compile", lambda: compiled(eager_linear_cross_entropy, search=False)),
        Peer("torch native", native_linear_cross_entropy(), text="F.linear_cross_entropy(hidden, weight, labels)"),
        *(Peer("torch native", native_linear_cross_entropy(batch_chunk_size=n, chunking_method=None),
               note=f"{n:,} rows", text=f"F.linear_cross_entropy(hidden, weight, labels), batch_chunk_size={n}")
          for n in (2048, 4096)),
        theirs(LIGER, "liger_kernel.transformers.functional.liger_fused_linear_cross_entropy",
               lambda their: lambda hidden, weight, labels: their(hidden, weight, labels)),
        theirs(LIGER, "liger_kernel.transformers.functional.liger_fused_linear_cross_entropy",
               lambda their: lambda hidden, weight, labels: their(hidden, weight, labels, accum_dtype=torch.float32,
                                                                  chunk_mem_const=4), note="fp32 sum, larger chunks"),
        theirs(QUACK, "quack.linear_cross_entropy.chunked_linear_cross_entropy",
               lambda their: lambda hidden, weight, labels: their(hidden, weight, labels)),
        # on capability 9.0 the default never makes the logits' gradient, and tunes nothing
        theirs(QUACK, "quack.linear_cross_entropy.chunked_linear_cross_entropy",
               lambda their: lambda hidden, weight, labels: their(hidden, weight, labels, use_scaled_exp=False,
                                                                  tuned=False), note="dlogits, untuned"),
        theirs(CUT, "cut_cross_entropy.linear_cross_entropy",
               lambda their: lambda hidden, weight, labels: their(hidden, weight, labels)),
        theirs(CUT, "cut_cross_entropy.linear_cross_entropy",
               lambda their: lambda hidden, weight, labels: their(hidden, weight, labels, filter_eps=None),
               note="unfiltered"),
    ],
    **{f"adamw, {moments}": adamw_peers(moments) for moments in adamw.MOMENTS},
}
# fmt: on
