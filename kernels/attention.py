"""Causal attention with a sliding window, packed documents and grouped queries, on the fastest backend that is right.

    out[i] = sum_j softmax_j(q[i] . k[j] / sqrt(head_dim)) v[j]   over the keys j that query i may see:

j <= i; with a window W also i - W < j; with documents also "j is in i's document". Softmax in fp32. Query head h reads
key/value head h // (H / Hkv) (grouped queries, Ainslie et al. 2023, https://arxiv.org/abs/2305.13245).

The kernels are other people's. What is ours is to know which of them is right for a case, and to call it right:

- Packages count a window differently. FlashAttention's pair (left, right) admits left keys *before* the query, so a
  window of W is (W - 1, 0); "none" is -1 in versions 2 and 3, None in 4.
- PyTorch's own choice between its kernels is made by other rules than ours, so each is asked for by name; and none of
  them is ever handed a mask, which would cost them their speed (and cuDNN, at lengths that 64 but not 128 divides, its
  gradients: pytorch issue 196678).
- Nothing reads a value from the GPU. The longest document, if the caller does not say, is bounded by the row.

A batch is decided on once, by ``plan_attention``, and all layers run that plan: arguments are checked, the backend is
chosen and FlexAttention's block mask is made once, not 32 times, and a layer run again under activation checkpointing
finds the same plan. A plan handed through the layers, and no cache behind the public function, because a cache would
have to know when a cu_seqlens tensor has been overwritten. ``attention`` is check, plan and run in one call.
"""

import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from halny.kernels.dispatch import (
    autocast_dtype,
    can_check_values,
    check_floating,
    check_same_device,
    is_reference_only,
    once_differentiable,
    register_operator,
    stands_for,
    upcast,
)

# ------------------------------------------------------------------------------------------------------- the definition


def attention_mask(T: int, window: int | None, cu_seqlens: Tensor | None, B: int, device) -> Tensor:
    """The definition of "may see": bool [B or 1, T, T], True where query i (dim 1) may see key j (dim 2)."""
    i, j = torch.arange(T, device=device)[:, None], torch.arange(T, device=device)[None, :]
    mask = (j <= i) if window is None else (j <= i) & (i - window < j)
    if cu_seqlens is None:
        return mask[None]
    document = document_ids(cu_seqlens, B, T)
    return mask & (document[:, :, None] == document[:, None, :])


def document_ids(cu_seqlens: Tensor, B: int, T: int) -> Tensor:
    """The number of the document that each of the B*T positions belongs to: int64 [B, T]."""
    position = torch.arange(B * T, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    return (torch.searchsorted(cu_seqlens, position, right=True) - 1).view(B, T)


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """The definition of ``attention``, in plain PyTorch; it holds the whole [B, H, T, T] score matrix."""
    B, T, H, head_dim = q.shape
    group = H // k.shape[2]
    k = k.repeat_interleave(group, dim=2)
    v = v.repeat_interleave(group, dim=2)
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * head_dim**-0.5
    hidden = ~attention_mask(T, window, cu_seqlens, B, q.device)[:, None]
    weights = torch.softmax(upcast(scores).masked_fill(hidden, float("-inf")), dim=-1).to(q.dtype)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


# ----------------------------------------------------------------------------------------------------------------- plan


@dataclass(frozen=True)  # not a tuple, which FSDP and checkpointing would take apart and put together again a layer
class AttentionPlan:
    """What all layers of one batch share; made by ``plan_attention``, run by ``planned_attention``."""

    backend: str
    window: int | None  # None also where it hides nothing
    cu_seqlens: Tensor | None  # None also where every row is one document
    max_seqlen: int  # the longest document's length, or a bound on it
    block_mask: BlockMask | None  # FlexAttention's
    deterministic: bool


# ------------------------------------------------------------------------------------------- FlashAttention's packages

# name here -> (module, what installs it). Imported when a case first asks for them: that takes seconds.
PACKAGES: dict[str, tuple[str, str]] = {
    "flash-attn-4": ("flash_attn.cute.interface", "pip install flash-attn-4, or halny's extra [flash]"),
    "flash-attn-3": ("flash_attn_interface", "pip install flash-attn-3 from PyTorch's wheels, or build its hopper/"),
    # Without that last name a namespace would answer: flash-attn-4 installs into flash_attn/ too, without __init__.py.
    "flash-attn": (
        "flash_attn.flash_attn_interface",
        "pip install flash-attn; no wheel for aarch64, so a GH200 compiles it",
    ),
}
_modules: dict[str, ModuleType] = {}  # those imported; a table, because torch.compile cannot look into an import


@functools.cache
def _load(package: str) -> str | None:
    """Import a package into _modules; None, or why it cannot be."""
    module, remedy = PACKAGES[package]
    try:
        _modules[package] = importlib.import_module(module)
        return None
    except ModuleNotFoundError as error:
        if error.name and (module == error.name or module.startswith(error.name + ".")):
            return f"{package} is not installed ({remedy})"
        return f"{package} does not import: {error}"
    except Exception as error:  # built for another torch: an ImportError of the loader, an OSError, anything
        return f"{package} does not import: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def _aligned(x: Tensor) -> Tensor:
    """x, copied if heads are not contiguous or do not begin at multiples of 16 bytes: kernels load 16 bytes at once."""
    offset = 0 if torch.compiler.is_compiling() else x.storage_offset()  # not traceable; Inductor aligns its inputs
    starts = (offset, *x.stride()[:-1])
    fine = x.stride(-1) == 1 and all(start * x.element_size() % 16 == 0 for start in starts)
    return x if fine else x.clone(memory_format=torch.contiguous_format)


def _document_keywords(cu_seqlens: Tensor, max_seqlen: int) -> dict:
    return {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": max_seqlen,
        "max_seqlen_k": max_seqlen,
    }


def _run_flash(package: str, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """FlashAttention 2 or 3, whose functions agree in all that is passed here."""
    module = _modules[package]
    q, k, v = (_aligned(x) for x in (q, k, v))
    keywords = {
        "softmax_scale": q.shape[-1] ** -0.5,
        "causal": True,
        "window_size": (-1, -1) if plan.window is None else (plan.window - 1, 0),
        "deterministic": plan.deterministic,
    }
    if plan.cu_seqlens is None:
        out = module.flash_attn_func(q, k, v, **keywords)
    else:
        keywords |= _document_keywords(plan.cu_seqlens, plan.max_seqlen)
        out = module.flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), **keywords)
    out = out[0] if isinstance(out, tuple) else out  # early builds of version 3 return the log-sum-exp as well
    return out.view(q.shape)


# FlashAttention 4 is plain Python over its own compiler: to PyTorch its function is nothing, neither traceable nor an
# operator that selective checkpointing could save. These two make it one. The backward is private in the package, but
# the name PyTorch's own bridge and FlexAttention call; its forward is not used, because its results change in number
# (2 in the versions that bridge was written for, 5 in 4.0.0b36). Delete both when the package registers operators.


def _window4(window: int | None) -> tuple[int | None, int | None]:
    return (None, None) if window is None else (window - 1, 0)


def _on(x: Tensor):
    """Kernels of the CuTe DSL run on the current device, whatever the tensors say."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def _flash4_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, max_seqlen: int, window: int | None
) -> tuple[Tensor, Tensor]:
    module = _modules["flash-attn-4"]
    scale = q.shape[-1] ** -0.5
    keywords = {"softmax_scale": scale, "causal": True, "window_size": _window4(window), "return_lse": True}
    with torch.no_grad(), _on(q):
        if cu_seqlens is None:
            return module.flash_attn_func(q, k, v, **keywords)
        return module.flash_attn_varlen_func(q, k, v, **keywords, **_document_keywords(cu_seqlens, max_seqlen))


def _flash4_forward_fake(q, k, v, cu_seqlens, max_seqlen, window):
    lse_shape = (*q.shape[:-3], q.shape[-2], q.shape[-3])  # [B, H, T], or [H, B * T] for documents
    return q.new_empty(q.shape), q.new_empty(lse_shape, dtype=torch.float32)


def _flash4_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    window: int | None,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    left, right = _window4(window)
    keywords = {"softmax_scale": q.shape[-1] ** -0.5, "causal": True, "deterministic": deterministic}
    keywords |= {"window_size_left": left, "window_size_right": right}
    if cu_seqlens is not None:
        keywords |= _document_keywords(cu_seqlens, max_seqlen)
    with _on(q):
        return _modules["flash-attn-4"]._flash_attn_bwd(q, k, v, out, d_out, lse, **keywords)


def _flash4_backward_fake(d_out, q, k, v, out, lse, cu_seqlens, max_seqlen, window, deterministic):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


flash4_forward = register_operator(
    "flash4_forward(Tensor q, Tensor k, Tensor v, Tensor? cu_seqlens, int max_seqlen, int? window) -> (Tensor, Tensor)",
    _flash4_forward,
    _flash4_forward_fake,
    launches=False,
)
flash4_backward = register_operator(
    "flash4_backward(Tensor d_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? cu_seqlens, "
    "int max_seqlen, int? window, bool deterministic) -> (Tensor, Tensor, Tensor)",
    _flash4_backward,
    _flash4_backward_fake,
    launches=False,
)


class Flash4(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, cu_seqlens, max_seqlen, window, deterministic):
        out, lse = flash4_forward(q, k, v, cu_seqlens, max_seqlen, window)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens)
        ctx.options = max_seqlen, window, deterministic
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        *tensors, cu_seqlens = ctx.saved_tensors
        return *flash4_backward(d_out, *tensors, cu_seqlens, *ctx.options), None, None, None, None


def _run_flash4(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    shape, options = q.shape, (plan.cu_seqlens, plan.max_seqlen, plan.window, plan.deterministic)
    if plan.cu_seqlens is not None:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return Flash4.apply(q, k, v, *options).view(shape)


# ------------------------------------------------------------------------------------------------------ PyTorch's own


def _run_sdpa(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """scaled_dot_product_attention on that kernel and no other; on the CPU PyTorch has but one."""
    q, k, v = (_aligned(x).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(kernel) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def make_block_mask(
    T: int, window: int | None, document_bt: Tensor | None, device, block_size: tuple[int, int] = (128, 128)
) -> BlockMask:
    """``create_block_mask`` of the definition above, computed from the corners of blocks instead of all T x T pairs.

    A row's documents lie one after another, so the pair of a block that is nearest to the diagonal is seen if any is,
    and if the farthest is seen all are. At T = 32,768 that is 65,536 comparisons where the general function makes
    several boolean tensors of 1 GiB. document_bt: int [B, T] from ``document_ids``, or None.
    """
    q_size, k_size = block_size
    q_first = torch.arange(0, T, q_size, device=device)[:, None]
    k_first = torch.arange(0, T, k_size, device=device)[None, :]
    q_last, k_last = (q_first + q_size - 1).clamp(max=T - 1), (k_first + k_size - 1).clamp(max=T - 1)
    before = k_last <= q_first  # every key of the block before every query, or at it
    some = before if window is None else before & (q_first - k_last < window)
    every = before if window is None else before & (q_last - k_first < window)
    if document_bt is not None:
        some = some & (document_bt[:, q_first] == document_bt[:, k_last])
        every = every & (document_bt[:, q_last] == document_bt[:, k_first])
    some = some | (~before & (k_first <= q_last))  # on the diagonal: a query sees itself
    every = every & (q_first + q_size <= T)  # the rows past T of a last block see nothing

    def ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
        blocks = blocks.expand(1, *blocks.shape) if blocks.ndim == 2 else blocks
        indices = blocks.to(torch.int32).argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[:, None], indices.to(torch.int32)[:, None]

    def may_see(b, h, i, j):
        seen = j <= i
        if window is not None:
            seen = seen & (i - j < window)
        if document_bt is not None:
            seen = seen & (document_bt[b, i] == document_bt[b, j])
        return seen

    return BlockMask.from_kv_blocks(
        *ordered(some & ~every), *ordered(every), BLOCK_SIZE=block_size, mask_mod=may_see, seq_lengths=(T, T)
    )


FLEX_VARIANTS = 128  # of one process: lengths, kinds of mask, dtypes, heads, with a backward or without


@functools.cache
def _compiled_flex_attention(flash: bool):
    """Compiled once; for a second T again, and then for all. The FLASH kernels want every number fixed.

    fullgraph, because what fails to compile would otherwise run as plain PyTorch, with all T x T scores. With it the
    ninth variant of a process raises FailOnRecompileLimitHit, if PyTorch's limit for one function stays at 8; it is
    read where something compiles, backward passes included, so it is raised for the process and not around a call.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, FLEX_VARIANTS)
    return torch.compile(flex_attention, fullgraph=True, dynamic=False if flash else None)


def _run_flex(flash: bool, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """FlexAttention compiled by Inductor; on the CPU, or inside a compiled model, as it is."""
    if not q.is_cuda and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("backend 'flex' has no backward on the CPU; use 'auto', or torch.no_grad()")
    function = flex_attention if not q.is_cuda or torch.compiler.is_compiling() else _compiled_flex_attention(flash)
    options = {"BACKEND": "FLASH"} if flash else None
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not q.is_cuda:  # PyTorch refuses leaves that require a gradient even under no_grad
        q, k, v = q.detach(), k.detach(), v.detach()
    out = function(q, k, v, block_mask=plan.block_mask, enable_gqa=True, kernel_options=options)
    return out.transpose(1, 2)


def _run_reference(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    return attention_reference(q, k, v, window=plan.window, cu_seqlens=plan.cu_seqlens)


# --------------------------------------------------------------------------------------------------- the decision table


class Case(NamedTuple):
    """All that the choice depends on."""

    capability: tuple[int, int] | None  # of the GPU; None on the CPU
    dtype: torch.dtype
    head_dim: int
    window: bool  # one that hides something: shorter than the longest document
    documents: bool  # some row holds several
    one_position: bool  # T = 1
    deterministic: bool
    installed: tuple[str, ...] | None = None  # of PACKAGES; None for those that import on this machine


def _lacks(package: str, case: Case) -> str | None:
    if case.installed is None:
        return _load(package)
    return None if package in case.installed else f"{package} is not installed ({PACKAGES[package][1]})"


GENERATIONS = range(8, 13)  # that general CUDA and Triton kernels run on: Ampere and later


def _unfit(case: Case, generations: Sequence[int], head_dims: range, dtypes=(torch.bfloat16, torch.float16)):
    """Why device, dtype or head_dim keep a kernel from running, or None."""
    if case.capability is None:
        return "needs a CUDA device"
    if case.capability[0] not in generations:
        return f"runs on capability {', '.join(map(str, generations))}, not {case.capability[0]}.{case.capability[1]}"
    if case.dtype not in dtypes:
        return f"computes in {', '.join(map(_short, dtypes))}, not {_short(case.dtype)}"
    if case.head_dim not in head_dims:
        step = "" if head_dims.step == 1 else f", multiples of {head_dims.step}"
        return f"takes head_dim {head_dims[0]} to {head_dims[-1]}{step}, not {case.head_dim}"
    return None


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain_only(case: Case) -> str | None:
    """Why a kernel that knows causal order alone is wrong for the case."""
    if case.documents:
        return "would attend across documents"
    return "would attend beyond the window" if case.window else None


def _can_flash4(case: Case) -> str | None:  # 4.0.0b36: head_dims by its _validate_head_dims, backward from capability 9
    longest = 128 if case.capability and case.capability[0] == 10 else 256
    return _unfit(case, (9, 10), range(8, longest + 1, 8)) or _lacks("flash-attn-4", case)


def _can_flash3(case: Case) -> str | None:
    if case.deterministic:
        # flash-attention pull requests 1766 and 1893; no build tells its date.
        return "builds from before September 2025 take the deterministic flag and ignore it"
    return _unfit(case, (9,), range(8, 257, 8)) or _lacks("flash-attn-3", case)


def _can_flash2(case: Case) -> str | None:
    return _unfit(case, GENERATIONS, range(8, 257, 8)) or _lacks("flash-attn", case)


def _can_cudnn(case: Case) -> str | None:  # PyTorch's check_cudnn_*; 256 on Hopper would need cuDNN 9.10
    if case.deterministic:
        return "PyTorch refuses it under deterministic algorithms"
    if case.one_position:
        return "does not take a single key"
    return _unfit(case, GENERATIONS, range(8, 129, 8)) or _plain_only(case)


def _can_sdpa(case: Case) -> str | None:
    on_cuda = case.capability is not None
    return (_unfit(case, GENERATIONS, range(1, 257)) if on_cuda else None) or _plain_only(case)


def _can_flex(case: Case) -> str | None:  # tl.dot starts at 16
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return None if case.capability is None else _unfit(case, GENERATIONS, range(16, 257), dtypes)


def _can_flex_flash(case: Case) -> str | None:
    if case.deterministic:
        return "PyTorch refuses its backward with a block mask under deterministic algorithms"
    return _unfit(case, (9, 10), range(8, 129, 8)) or _lacks("flash-attn-4", case)


class Backend(NamedTuple):
    what: str
    can: Callable[[Case], str | None]  # None, or why it cannot
    run: Callable[[Tensor, Tensor, Tensor, AttentionPlan], Tensor]


BACKENDS: dict[str, Backend] = {
    "flash4": Backend("FlashAttention 4, package flash-attn-4", _can_flash4, _run_flash4),
    "flash3": Backend("FlashAttention 3", _can_flash3, functools.partial(_run_flash, "flash-attn-3")),
    "flash2": Backend("FlashAttention 2, package flash-attn", _can_flash2, functools.partial(_run_flash, "flash-attn")),
    "cudnn": Backend(
        "cuDNN through scaled_dot_product_attention",
        _can_cudnn,
        functools.partial(_run_sdpa, SDPBackend.CUDNN_ATTENTION),
    ),
    "sdpa": Backend(
        "PyTorch's FlashAttention 2 through scaled_dot_product_attention",
        _can_sdpa,
        functools.partial(_run_sdpa, SDPBackend.FLASH_ATTENTION),
    ),
    "flex": Backend("FlexAttention, Triton kernels", _can_flex, functools.partial(_run_flex, False)),
    "flex_flash": Backend(
        "FlexAttention, FlashAttention 4 kernels", _can_flex_flash, functools.partial(_run_flex, True)
    ),
    "reference": Backend("plain PyTorch", lambda case: None, _run_reference),
}

# By GPU generation, fastest first; "auto" takes the first that can. Forward/backward TFLOP/s, head_dim 128, causal,
# from the flash-attention and PyTorch repositories:
#   9  H100: flash3 660/575, flash4 about the same, cudnn 566 to 609/470, flash2 306 to 368/166 to 322, sdpa the same
#      kernels. FlexAttention's Triton kernels come after them in every published comparison.
#   10 B200: flash4 was written for it; FlashAttention 2 uses none of its new units.
#   8  A100: FlashAttention 2 was written for it. Also the row of every generation not listed.
# flex_flash is in no row: where it can run, flash4 can, and does the same work without a mask.
FASTEST: dict[int, tuple[str, ...]] = {
    8: ("flash2", "sdpa", "flex", "reference"),
    9: ("flash3", "flash4", "cudnn", "flash2", "sdpa", "flex", "reference"),
    10: ("flash4", "cudnn", "flash2", "sdpa", "flex", "reference"),
}


def candidates(case: Case) -> tuple[str, ...]:
    """The backends that "auto" goes through, fastest first."""
    if case.capability is None:
        return ("reference",)
    return FASTEST.get(case.capability[0], FASTEST[8])


def choose(backend: str, case: Case) -> str:
    """The backend that runs the case; ValueError if the one named cannot."""
    if backend == "auto":
        return next(name for name in candidates(case) if BACKENDS[name].can(case) is None)
    reason = BACKENDS[backend].can(case)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot run this case: {reason}; use 'auto'")
    return backend


@torch.compiler.assume_constant_result  # the tracer would follow it into imports
def _choose(backend: str, *case) -> str:
    return choose(backend, Case(*case))


@torch.compiler.assume_constant_result
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def plan_attention(
    B: int,
    T: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    backend: str = "auto",
) -> AttentionPlan:
    """Decide once how all layers attend in a batch of [B, T]; arguments as ``attention``'s, already checked."""
    longest = T
    if cu_seqlens is not None:
        if cu_seqlens.shape[0] == B + 1:  # row boundaries are always among its own: no room for others
            cu_seqlens = None
        elif max_seqlen is not None:
            longest = min(max_seqlen, T)
    if window is not None and window >= longest:
        window = None
    deterministic = torch.are_deterministic_algorithms_enabled()
    capability = None
    if is_reference_only() or B == 0 or T == 0:
        backend = "reference"
    else:
        gpu, installed = stands_for(device), None
        if gpu is not None:
            capability, installed = gpu.capability, gpu.packages
        elif device.type == "cuda":
            capability = _capability(device)
        # What _choose is called with must be constants, and in a graph for any T and head_dim these two are symbols.
        # torch.compile makes a number of a symbol where a length is asked for, a bool of a comparison where "not" is.
        head_dim, one_position = len(range(head_dim)), not T > 1
        described = window is not None, cu_seqlens is not None, one_position, deterministic, installed
        backend = _choose(backend, capability, dtype, head_dim, *described)
    block_mask = None
    if backend in ("flex", "flex_flash"):
        document_bt = None if cu_seqlens is None else document_ids(cu_seqlens, B, T)
        on_blackwell = backend == "flex_flash" and capability[0] == 10  # its forward takes two tiles of queries at once
        block_mask = make_block_mask(T, window, document_bt, device, (256 if on_blackwell else 128, 128))
    return AttentionPlan(backend, window, cu_seqlens, longest, block_mask, deterministic)


def planned_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """``attention`` as ``plan_attention`` decided for tensors of these shapes, dtype and device."""
    return BACKENDS[plan.backend].run(q, k, v, plan)


# ----------------------------------------------------------------------------------------------------- public functions


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention(..., is_causal=True, enable_gqa=True)`` with T before heads.

    q [B, T, H, head_dim], k and v [B, T, Hkv, head_dim] with H a multiple of Hkv, one floating dtype -> out like q.
    Softmax in fp32 (fp64 for fp64). Keys and values are never repeated for their group, except by the reference. For
    its backward a FlashAttention kernel keeps q, k, v, out and an fp32 log-sum-exp a query and head; the reference
    keeps the [T, T] weights. Under autocast q, k and v are cast to its dtype, as that function's are.

    window: query i sees keys i - window < j <= i (Hugging Face's meaning); None for all of them.
    cu_seqlens: int32 [documents + 1] over the flattened B * T positions, from 0 to B * T, strictly increasing, with
        every multiple of T among its boundaries; attention stays inside each document, the window is counted inside
        it. max_seqlen, an int, is the longest document's length and may be left out: T bounds it.
    backend: "auto" takes the fastest that is right (``FASTEST``, ``explain``), on the CPU the reference. Or one of
        ``BACKENDS`` by name, which raises where it cannot run.

    Under ``torch.use_deterministic_algorithms(True)`` only what repeats itself bit by bit, backward included, is
    chosen, with options to match; a backend named that cannot, raises.

    Raises TypeError or ValueError naming the argument that does not fit. The values of cu_seqlens are checked on CPU
    tensors, on CUDA tensors under ``dispatch.set_debug_checks``.
    """
    q, k, v = (x.to(autocast_dtype(x)) if isinstance(x, Tensor) else x for x in (q, k, v))
    _check(q, k, v, window, cu_seqlens, max_seqlen, backend)
    B, T, _, head_dim = q.shape
    documents = {"window": window, "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
    return planned_attention(q, k, v, plan_attention(B, T, head_dim, q.dtype, q.device, **documents, backend=backend))


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
CAPABILITIES = {"A100": (8, 0), "H100": (9, 0), "H200": (9, 0), "GH200": (9, 0), "B200": (10, 0), "GB200": (10, 0)}


def describe_case(
    device: str | tuple[int, int] | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    head_dim: int = 128,
    T: int = 4096,
    window: int | None = None,
    documents: bool = False,
    deterministic: bool | None = None,
    installed: Iterable[str] | None = None,
) -> Case:
    """A Case without tensors or a GPU.

    device: a name in CAPABILITIES or a compute capability, "cpu", or None for this machine. documents: whether a row
    holds several, of unknown lengths. deterministic: None for PyTorch's present setting. installed: which of PACKAGES
    to take for installed; None for those that import here. Raises ValueError for what ``attention`` would not take.
    """
    if device is None:
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    elif device == "cpu" or isinstance(device, tuple | list):
        capability = None if device == "cpu" else tuple(device)
    elif device in CAPABILITIES:
        capability = CAPABILITIES[device]
    else:
        names = ", ".join(CAPABILITIES)
        raise ValueError(f"device must be one of {names}, 'cpu' or a compute capability like (9, 0), got {device!r}")
    if capability is not None and not (len(capability) == 2 and all(isinstance(n, int) for n in capability)):
        raise ValueError(f"device must be a name or a compute capability like (9, 0), got {device!r}")
    for name, value in (("T", T), ("head_dim", head_dim), *([("window", window)] if window is not None else [])):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
    if not isinstance(documents, bool):
        raise ValueError(f"documents must be True or False, whether a row holds several, got {documents!r}")
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    elif not isinstance(deterministic, bool):
        raise ValueError(f"deterministic must be True, False or None, got {deterministic!r}")
    if installed is not None:
        installed = (installed,) if isinstance(installed, str) or not isinstance(installed, Iterable) else installed
        installed = tuple(installed)
        unknown = [package for package in installed if package not in PACKAGES]
        if unknown:
            raise ValueError(f"installed must be among {', '.join(PACKAGES)}, got {', '.join(map(str, unknown))}")
    hides = window is not None and window < T
    return Case(capability, dtype, head_dim, hides, documents, T == 1, deterministic, installed)


def explain(device: str | tuple[int, int] | None = None, *, T: int = 4096, window: int | None = None, **case) -> str:
    """Which backend "auto" takes for a case, and why not each faster one; arguments as ``describe_case``'s."""
    described = describe_case(device, T=T, window=window, **case)
    where = "the CPU"
    if described.capability is not None:
        where = "capability {}.{}".format(*described.capability)
        where = f"{device} ({where})" if isinstance(device, str) else where
    documents = "several documents a row" if described.documents else "one document a row"
    deterministic = ", deterministic" if described.deterministic else ""
    lines = [
        f"attention on {where}: {_short(described.dtype)}, head_dim {described.head_dim}, T {T}, window {window}, "
        f"{documents}{deterministic}"
    ]
    for name in candidates(described):
        reason = BACKENDS[name].can(described)
        lines.append(f"  {name:9} {'<- chosen: ' + BACKENDS[name].what if reason is None else reason}")
        if reason is None:
            return "\n".join(lines)
    raise AssertionError("the reference runs everything")


def _check(q, k, v, window, cu_seqlens, max_seqlen, backend) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_floating(name, x)
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, T, heads, head_dim], got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be one of {', '.join(map(_short, DTYPES))}, got {_short(x.dtype)}")
    check_same_device(q=q, k=k, v=v)
    B, T, H, head_dim = q.shape
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if k.shape[:2] != (B, T) or k.shape[3] != head_dim:
        raise ValueError(f"k must match q {tuple(q.shape)} in all but the heads, got {tuple(k.shape)}")
    if head_dim == 0:
        raise ValueError("q's head_dim must be positive, got 0")
    if H == 0 or k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(f"q's {H} heads must be a positive multiple of k's {k.shape[2]}")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be None or an integer of at least 1, got {window!r}")
    if not isinstance(backend, str) or (backend != "auto" and backend not in BACKENDS):
        raise ValueError(f"backend must be one of auto, {', '.join(BACKENDS)}, got {backend!r}")
    check_documents(cu_seqlens, max_seqlen, B, T, q=q)


def check_documents(cu_seqlens: Tensor | None, max_seqlen: int | None, B: int, T: int, **beside: Tensor) -> None:
    """TypeError or ValueError unless these describe documents of a [B, T] batch, none of them over two rows.

    beside: a tensor by its name, whose device cu_seqlens must be on.
    """
    # a tensor would do in some backends, and make the host wait for the GPU in each
    if max_seqlen is not None and (isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int) or max_seqlen < 1):
        raise ValueError(f"max_seqlen must be None or a positive integer, got {max_seqlen!r}")
    if cu_seqlens is None:
        return
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an int32 tensor, got {kind}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < B + 1:
        raise ValueError(
            f"cu_seqlens must be [documents + 1] with at least one document in each of {B} rows, "
            f"got shape {tuple(cu_seqlens.shape)}"
        )
    check_same_device(**beside, cu_seqlens=cu_seqlens)
    if not can_check_values(cu_seqlens):
        return
    if B * T == 0:
        if cu_seqlens.any():
            raise ValueError(f"cu_seqlens must be zeros for a batch without positions, got {cu_seqlens.tolist()}")
        return
    lengths = cu_seqlens.diff()
    if cu_seqlens[0] != 0 or cu_seqlens[-1] != B * T:
        raise ValueError(
            f"cu_seqlens must run from 0 to B * T = {B * T}, got {int(cu_seqlens[0])} to {int(cu_seqlens[-1])}"
        )
    if (lengths <= 0).any():
        raise ValueError("cu_seqlens must be strictly increasing (no empty documents)")
    row_starts = torch.arange(0, B * T, T, dtype=torch.int32, device=cu_seqlens.device)
    missing = row_starts[~torch.isin(row_starts, cu_seqlens)]
    if missing.numel():
        raise ValueError(f"cu_seqlens lacks the row boundary {int(missing[0])}: a document may not span two rows")
    if max_seqlen is not None and int(lengths.max()) > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, but cu_seqlens has a document of {int(lengths.max())} positions")
