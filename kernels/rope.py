"""Rotary position embedding on the packed query/key/value tensor.

For each pair (x1, x2) = (x[i], x[i + d/2]) of a head and position p, with angle a = p * theta^(-2i/d):

    y1 = x1 cos a - x2 sin a,   y2 = x2 cos a + x1 sin a             Su et al. 2021, https://arxiv.org/abs/2104.09864

This is the half-split pairing of Hugging Face and GPT-NeoX. Angles are the fp32 product of fp32 factors, as in Hugging
Face; the rotation is computed in fp32 and rounded once, which is closer to the truth than rounding cos and sin first.
"""

import torch
from torch import Tensor

from halny.kernels.dispatch import can_check_values, check_floating, check_integer, check_same_device, upcast


def rope_tables(max_len: int, head_dim: int, theta: float, device=None) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle: (cos, sin), each fp32 [max_len, head_dim // 2].

    Computed on the CPU and then moved, so that every device holds the same bits (and the bits Hugging Face uses).
    Raises ValueError for max_len < 1, an odd head_dim, or theta <= 0.
    """
    if not isinstance(max_len, int) or max_len < 1:
        raise ValueError(f"max_len must be an integer of at least 1, got {max_len!r}")
    if not isinstance(head_dim, int) or head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be an even, positive integer, got {head_dim!r}")
    if not isinstance(theta, int | float) or not 0 < theta < float("inf"):
        raise ValueError(f"theta must be a positive number, got {theta!r}")
    inverse_frequency = 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim))
    angle = torch.arange(max_len, dtype=torch.float32, device="cpu")[:, None] * inverse_frequency
    return angle.cos().to(device), angle.sin().to(device)


def rope_qkv_reference(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, positions: Tensor | None = None
) -> Tensor:
    """The definition of ``rope_qkv``, in plain PyTorch."""
    T = qkv.shape[1]
    rows = slice(T) if positions is None else positions.long()
    cos, sin = cos[rows][..., None, :], sin[rows][..., None, :]  # [(B,) T, 1, head_dim / 2]
    qk, v = qkv.split([n_heads + n_kv_heads, n_kv_heads], dim=2)
    x1, x2 = upcast(qk).chunk(2, dim=-1)
    rotated = torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], dim=-1)
    return torch.cat([rotated.to(qkv.dtype), v], dim=2)


def rope_qkv(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, positions: Tensor | None = None
) -> Tensor:
    """Rotate the queries and keys of a packed projection by their positions; values pass through unchanged.

    qkv [B, T, n_heads + 2 * n_kv_heads, head_dim]; cos and sin [max_len, head_dim // 2] from ``rope_tables``;
    positions int [B, T] (default: 0 .. T - 1 in every row) -> a new tensor like qkv. Arithmetic in fp32.

    Raises TypeError for wrong kinds of tensors, ValueError for shapes or devices that do not fit, a table shorter than
    T, or positions outside the table (on CUDA tensors only under ``dispatch.set_debug_checks``).
    """
    _check(qkv, cos, sin, n_heads, n_kv_heads, positions)
    return rope_qkv_reference(qkv, cos, sin, n_heads, n_kv_heads, positions)


def rope_qkv_(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, positions: Tensor | None = None
) -> Tensor:
    """``rope_qkv`` in place: overwrites qkv and returns it. Arguments and errors are those of ``rope_qkv``."""
    _check(qkv, cos, sin, n_heads, n_kv_heads, positions)
    return qkv.copy_(rope_qkv_reference(qkv, cos, sin, n_heads, n_kv_heads, positions))


def _check(qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, positions: Tensor | None) -> None:
    check_floating("qkv", qkv)
    check_floating("cos", cos)
    check_floating("sin", sin)
    check_same_device(qkv=qkv, cos=cos, sin=sin)
    for name, n in (("n_heads", n_heads), ("n_kv_heads", n_kv_heads)):
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {n!r}")
    if qkv.ndim != 4 or qkv.shape[2] != n_heads + 2 * n_kv_heads:
        raise ValueError(
            f"qkv must be [B, T, n_heads + 2 * n_kv_heads = {n_heads + 2 * n_kv_heads}, head_dim], "
            f"got {tuple(qkv.shape)}"
        )
    B, T, _, head_dim = qkv.shape
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"qkv's head_dim must be even and positive, got {head_dim}")
    if cos.shape != sin.shape or cos.ndim != 2 or cos.shape[1] != head_dim // 2:
        raise ValueError(
            f"cos and sin must both be [max_len, head_dim // 2 = {head_dim // 2}], "
            f"got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    if positions is None:
        if cos.shape[0] < T:
            raise ValueError(f"cos and sin hold {cos.shape[0]} positions, but qkv has T = {T}")
        return
    check_integer("positions", positions)
    check_same_device(qkv=qkv, positions=positions)
    if positions.shape != (B, T):
        raise ValueError(f"positions must be [B, T] = {(B, T)}, got {tuple(positions.shape)}")
    if can_check_values(positions):
        low, high = int(positions.long().min()), int(positions.long().max())
        if low < 0 or high >= cos.shape[0]:
            raise ValueError(f"positions must lie in 0 .. {cos.shape[0] - 1} (the table), got {low} .. {high}")
