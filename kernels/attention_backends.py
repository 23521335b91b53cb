"""Other people's attention kernels, called right, and what each of them can run.

Which of them runs a case is decided in attention.py, from ``can``, None or why a kernel cannot run a case. ``run`` is
what a plan runs. Imported by attention.py alone, and by tests of the calls.

- Packages count a window differently. FlashAttention's pair (left, right) admits left keys *before* the query, so a
  window of W is (W - 1, 0); "none" is -1 in versions 2 and 3, None in 4.
- PyTorch's own choice between its kernels is made by other rules than ours, so each is asked for by name; and none of
  them is ever handed a mask, which would cost them their speed (and cuDNN, at lengths that 64 but not 128 divides, its
  gradients: pytorch issue 196678).
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from halny.kernels.dispatch import once_differentiable, register_operator


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


class OnceDifferentiable(torch.autograd.Function):
    """The identity, which refuses create_graph: the packages' own backward passes would return constants there."""

    @staticmethod
    def forward(ctx, out):
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        return d_out


def run_flash(package: str, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
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
    return OnceDifferentiable.apply(out.view(q.shape))


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


def run_flash4(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    shape, options = q.shape, (plan.cu_seqlens, plan.max_seqlen, plan.window, plan.deterministic)
    if plan.cu_seqlens is not None:
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return Flash4.apply(q, k, v, *options).view(shape)


# ------------------------------------------------------------------------------------------------------ PyTorch's own


def run_sdpa(kernel: SDPBackend, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """scaled_dot_product_attention on that kernel and no other; on the CPU PyTorch has but one."""
    q, k, v = (_aligned(x).transpose(1, 2) for x in (q, k, v))
    with sdpa_kernel(kernel) if q.is_cuda else nullcontext():
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def make_block_mask(
    T: int, window: int | None, document_bt: Tensor | None, device, block_size: tuple[int, int] = (128, 128)
) -> BlockMask:
    """``create_block_mask`` of ``attention_mask``, computed from the corners of blocks instead of all T x T pairs.

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


def run_flex(flash: bool, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
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


# ----------------------------------------------------------------------------------------- which of them can run a case


class AttentionCase(NamedTuple):
    """All that the choice depends on."""

    capability: tuple[int, int] | None  # of the GPU; None on the CPU
    dtype: torch.dtype
    head_dim: int
    window: bool  # one that hides something: shorter than the longest document
    documents: bool  # some row holds several
    one_position: bool  # T = 1
    deterministic: bool
    installed: tuple[str, ...] | None = None  # of PACKAGES; None for those that import on this machine


def _lacks(package: str, case: AttentionCase) -> str | None:
    if case.installed is None:
        return _load(package)
    return None if package in case.installed else f"{package} is not installed ({PACKAGES[package][1]})"


GENERATIONS = range(8, 13)  # that general CUDA and Triton kernels run on: Ampere and later


def _unfit(case: AttentionCase, generations: Sequence[int], head_dims: range, dtypes=(torch.bfloat16, torch.float16)):
    """Why device, dtype or head_dim keep a kernel from running, or None."""
    if case.capability is None:
        return "needs a CUDA device"
    if case.capability[0] not in generations:
        return f"runs on capability {', '.join(map(str, generations))}, not {case.capability[0]}.{case.capability[1]}"
    if case.dtype not in dtypes:
        return f"computes in {', '.join(map(dtype_name, dtypes))}, not {dtype_name(case.dtype)}"
    if case.head_dim not in head_dims:
        step = "" if head_dims.step == 1 else f", multiples of {head_dims.step}"
        return f"takes head_dim {head_dims[0]} to {head_dims[-1]}{step}, not {case.head_dim}"
    return None


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _plain_only(case: AttentionCase) -> str | None:
    """Why a kernel that knows causal order alone is wrong for the case."""
    if case.documents:
        return "would attend across documents"
    return "would attend beyond the window" if case.window else None


def can_flash4(
    case: AttentionCase,
) -> str | None:  # 4.0.0b36: head_dims by its _validate_head_dims, backward from capability 9
    longest = 128 if case.capability and case.capability[0] == 10 else 256
    return _unfit(case, (9, 10), range(8, longest + 1, 8)) or _lacks("flash-attn-4", case)


def can_flash3(case: AttentionCase) -> str | None:
    if case.deterministic:
        # flash-attention pull requests 1766 and 1893; no build tells its date.
        return "builds from before September 2025 take the deterministic flag and ignore it"
    return _unfit(case, (9,), range(8, 257, 8)) or _lacks("flash-attn-3", case)


def can_flash2(case: AttentionCase) -> str | None:
    return _unfit(case, GENERATIONS, range(8, 257, 8)) or _lacks("flash-attn", case)


def can_cudnn(case: AttentionCase) -> str | None:  # PyTorch's check_cudnn_*; 256 on Hopper would need cuDNN 9.10
    if case.deterministic:
        return "PyTorch refuses it under deterministic algorithms"
    if case.one_position:
        return "does not take a single key"
    return _unfit(case, GENERATIONS, range(8, 129, 8)) or _plain_only(case)


def can_sdpa(case: AttentionCase) -> str | None:
    on_cuda = case.capability is not None
    return (_unfit(case, GENERATIONS, range(1, 257)) if on_cuda else None) or _plain_only(case)


def can_flex(case: AttentionCase) -> str | None:  # tl.dot starts at 16
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    return None if case.capability is None else _unfit(case, GENERATIONS, range(16, 257), dtypes)


def can_flex_flash(case: AttentionCase) -> str | None:
    if case.deterministic:
        return "PyTorch refuses its backward with a block mask under deterministic algorithms"
    return _unfit(case, (9, 10), range(8, 129, 8)) or _lacks("flash-attn-4", case)


class Backend(NamedTuple):
    what: str
    can: Callable[[AttentionCase], str | None]  # None, or why it cannot
    run: Callable[[Tensor, Tensor, Tensor, AttentionPlan], Tensor]
