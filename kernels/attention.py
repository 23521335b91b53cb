"""Causal attention with a sliding window, packed documents and grouped queries.

    out[i] = sum_j softmax_j(q[i] . k[j] / sqrt(head_dim)) v[j]   over the keys j that query i may see:

j <= i; with a window W also i - W < j; with documents also "j is in i's document". Softmax in fp32. Query head h reads
key/value head h // (H / Hkv) (grouped queries, Ainslie et al. 2023, https://arxiv.org/abs/2305.13245).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from halny.kernels.dispatch import can_check_values, check_floating, check_same_device, is_reference_only, upcast

BACKENDS = ("auto", "sdpa", "reference")


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

    window: query i sees keys i - window < j <= i (Hugging Face's meaning); None for all of them.
    cu_seqlens: int32 [documents + 1] over the flattened B * T positions, from 0 to B * T, strictly increasing, with
        every multiple of T among its boundaries; attention stays inside each document. max_seqlen, an int, is the
        longest document's length and may be left out.
    backend: "reference"; "sdpa" for PyTorch's own, which is right only where the window covers the sequence and there
        are no documents (asked for elsewhere it raises); "auto" takes sdpa on CUDA where it is right, the reference on
        the CPU and otherwise.

    Raises TypeError or ValueError naming the argument that does not fit.
    """
    _check(q, k, v, window, cu_seqlens, max_seqlen, backend)
    B, T = q.shape[:2]
    plain_causal = cu_seqlens is None and (window is None or window >= T)
    if backend == "sdpa" and not plain_causal:
        raise ValueError(f"backend 'sdpa' has neither documents nor a window below T = {T}; use 'auto'")
    if not is_reference_only() and (backend == "sdpa" or (backend == "auto" and plain_causal and q.is_cuda)):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    return attention_reference(q, k, v, window=window, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)


def _check(q, k, v, window, cu_seqlens, max_seqlen, backend) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_floating(name, x)
        if x.ndim != 4:
            raise ValueError(f"{name} must be [B, T, heads, head_dim], got {tuple(x.shape)}")
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have q's dtype {q.dtype}, got {x.dtype}")
    check_same_device(q=q, k=k, v=v)
    B, T, H, head_dim = q.shape
    if k.shape != v.shape:
        raise ValueError(f"k and v must have one shape, got {tuple(k.shape)} and {tuple(v.shape)}")
    if k.shape[:2] != (B, T) or k.shape[3] != head_dim:
        raise ValueError(f"k must match q {tuple(q.shape)} in all but the heads, got {tuple(k.shape)}")
    if head_dim == 0:
        raise ValueError("q's head_dim must be positive, got 0")
    if k.shape[2] == 0 or H % k.shape[2]:
        raise ValueError(f"q's {H} heads must be a multiple of k's {k.shape[2]}")
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be None or an integer of at least 1, got {window!r}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if max_seqlen is not None and (isinstance(max_seqlen, bool) or not isinstance(max_seqlen, int) or max_seqlen < 1):
        raise ValueError(f"max_seqlen must be None or a positive integer, got {max_seqlen!r}")
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, B, T, max_seqlen)
        check_same_device(q=q, cu_seqlens=cu_seqlens)


def check_cu_seqlens(cu_seqlens: Tensor, B: int, T: int, max_seqlen: int | None) -> None:
    """TypeError or ValueError unless cu_seqlens describes documents of a [B, T] batch, none of them over two rows."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype != torch.int32:
        kind = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
        raise TypeError(f"cu_seqlens must be an int32 tensor, got {kind}")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < B + 1:
        raise ValueError(
            f"cu_seqlens must be [documents + 1] with at least one document in each of {B} rows, "
            f"got shape {tuple(cu_seqlens.shape)}"
        )
    if not can_check_values(cu_seqlens):
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
