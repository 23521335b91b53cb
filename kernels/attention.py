"""Causal attention with a sliding window, packed documents and grouped queries, on the fastest backend that is right.

    out[i] = sum_j softmax_j(q[i] . k[j] / sqrt(head_dim)) v[j]   over the keys j that query i may see:

j <= i; with a window W also i - W < j; with documents also "j is in i's document". Softmax in fp32. Query head h reads
key/value head h // (H / Hkv) (grouped queries, Ainslie et al. 2023, https://arxiv.org/abs/2305.13245).

The kernels are other people's. What is ours is to know which of them is right for a case, here, and to call it right,
in attention_backends.py. Nothing reads a value from the GPU: the longest document, if the caller does not say, is
bounded by the row.

A batch is decided on once, by ``plan_attention``, and all layers run that plan: arguments are checked, the backend is
chosen and FlexAttention's block mask is made once, not 32 times, and a layer run again under activation checkpointing
finds the same plan. A plan handed through the layers, and no cache behind the public function, because a cache would
have to know when a cu_seqlens tensor has been overwritten. ``attention`` is check, plan and run in one call.
"""

import functools

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from halny.kernels.attention_backends import (
    AttentionCase,
    AttentionPlan,
    Backend,
    can_cudnn,
    can_flash2,
    can_flash3,
    can_flash4,
    can_flex,
    can_flex_flash,
    can_sdpa,
    dtype_name,
    make_block_mask,
    run_flash,
    run_flash4,
    run_flex,
    run_sdpa,
)
from halny.kernels.dispatch import (
    autocast_disabled,
    autocast_dtype,
    can_check_values,
    check_floating,
    check_same_device,
    is_reference_only,
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
    """The definition of ``attention``, in plain PyTorch; it holds the whole [B, H, T, T] score matrix.

    All in fp32 (fp64 for fp64), scores and both products included, and rounded once, at the end: in bf16 a score of 59
    would be off by up to 0.3, and in fp16 a dot product beyond 65504 would be infinite.
    """
    B, T, H, head_dim = q.shape
    group, dtype = H // k.shape[2], q.dtype
    seen = attention_mask(T, window, cu_seqlens, B, q.device)
    with autocast_disabled(q):
        q, k, v = upcast(q), upcast(k).repeat_interleave(group, dim=2), upcast(v)
        scores = torch.einsum("bihd,bjhd->bhij", q, k) * head_dim**-0.5
        weights = torch.softmax(scores.masked_fill(~seen[:, None], float("-inf")), dim=-1)
        # A weight of 0 keeps no NaN out, nor an infinity: what is no number reaches those who may see it, as NaN.
        # A query sees the keys from some first one to itself: two values of a running count tell what lies there
        no_number = ~v.isfinite()
        first = (torch.arange(1, T + 1, device=v.device) - seen.sum(-1)).expand(B, T)[:, :, None, None]
        count = no_number.cumsum(1)
        reached = count > (count - no_number.long()).gather(1, first.expand_as(count))
        v, reached = (x.repeat_interleave(group, dim=2) for x in (v.masked_fill(no_number, 0.0), reached))
        return torch.einsum("bhij,bjhd->bihd", weights, v).masked_fill(reached, float("nan")).to(dtype)


# --------------------------------------------------------------------------------------------------- the decision table


def _run_reference(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    return attention_reference(q, k, v, window=plan.window, cu_seqlens=plan.cu_seqlens)


BACKENDS: dict[str, Backend] = {
    "flash4": Backend("FlashAttention 4, package flash-attn-4", can_flash4, run_flash4),
    "flash3": Backend("FlashAttention 3", can_flash3, functools.partial(run_flash, "flash-attn-3")),
    "flash2": Backend("FlashAttention 2, package flash-attn", can_flash2, functools.partial(run_flash, "flash-attn")),
    "cudnn": Backend(
        "cuDNN through scaled_dot_product_attention",
        can_cudnn,
        functools.partial(run_sdpa, SDPBackend.CUDNN_ATTENTION),
    ),
    "sdpa": Backend(
        "PyTorch's FlashAttention 2 through scaled_dot_product_attention",
        can_sdpa,
        functools.partial(run_sdpa, SDPBackend.FLASH_ATTENTION),
    ),
    "flex": Backend("FlexAttention, Triton kernels", can_flex, functools.partial(run_flex, False)),
    "flex_flash": Backend("FlexAttention, FlashAttention 4 kernels", can_flex_flash, functools.partial(run_flex, True)),
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


def candidates(case: AttentionCase) -> tuple[str, ...]:
    """The backends that "auto" goes through, fastest first."""
    if case.capability is None:
        return ("reference",)
    return FASTEST.get(case.capability[0], FASTEST[8])


def choose(backend: str, case: AttentionCase) -> str:
    """The backend that runs the case; ValueError if the one named cannot."""
    if backend == "auto":
        return next(name for name in candidates(case) if BACKENDS[name].can(case) is None)
    reason = BACKENDS[backend].can(case)
    if reason is not None:
        raise ValueError(f"backend {backend!r} cannot run this case: {reason}; use 'auto'")
    return backend


@torch.compiler.assume_constant_result  # the tracer would follow it into imports
def _choose(backend: str, *case) -> str:
    return choose(backend, AttentionCase(*case))


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


def explain(case: AttentionCase | None = None) -> str:
    """Which backend "auto" takes for a case, and why not each faster one; None is Mistral-7B's on this machine."""
    if case is None:
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
        deterministic = torch.are_deterministic_algorithms_enabled()
        case = AttentionCase(capability, torch.bfloat16, 128, False, False, False, deterministic)
    where = "the CPU" if case.capability is None else "capability {}.{}".format(*case.capability)
    words = [dtype_name(case.dtype), f"head_dim {case.head_dim}"]
    words += [
        "a window shorter than the documents" if case.window else "no window",
        "several documents a row" if case.documents else "one document a row",
        *["one position"] * case.one_position,
        *["deterministic"] * case.deterministic,
    ]
    lines = [f"attention on {where}: {', '.join(words)}"]
    for name in candidates(case):
        reason = BACKENDS[name].can(case)
        lines.append(f"  {name:9} {'<- chosen: ' + BACKENDS[name].what if reason is None else reason}")
        if reason is None:
            return "\n".join(lines)
    raise AssertionError("the reference runs everything")


DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def _check(q, k, v, window, cu_seqlens, max_seqlen, backend) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_floating(name, x)
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, T, heads, head_dim], got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{name} must be one of {', '.join(map(dtype_name, DTYPES))}, got {dtype_name(x.dtype)}")
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
