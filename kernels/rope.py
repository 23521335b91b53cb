"""Rotary position embedding on the packed query/key/value tensor.

For each pair (x1, x2) = (x[i], x[i + d/2]) of a head and position p, with angle a = p * theta^(-2i/d):

    y1 = x1 cos a - x2 sin a,   y2 = x2 cos a + x1 sin a             Su et al. 2021, https://arxiv.org/abs/2104.09864

This is the half-split pairing of Hugging Face and GPT-NeoX. Angles are the fp32 product of fp32 factors, as in Hugging
Face; the rotation is computed in fp32 and rounded once, which is closer to the truth than rounding cos and sin first.
A rotation is orthogonal, so its backward is the rotation by -a: no activation is saved, nothing but the tables.

**Bytes.** For M tokens, D = head_dim, elements of b bytes: in place 2M(Hq + Hkv)Db, v being left alone; out of place
2M(Hq + 2 Hkv)Db, v being copied; the tables stay in the L2 cache. A model rotates in place, since nobody else reads
its packed projection. The backward is given dq, dk and dv apart, as attention makes them. Left to autograd, they would
be written into one zeroed packed tensor and read again to be rotated; here one kernel reads the three where they lie
and writes the packed gradient, 2M(Hq + 2 Hkv)Db once more.

So there is one kernel: it reads three tensors, whatever their strides, and writes a packed one. In the forward the
three are views of the packed input. A program has all heads of a token: it computes addresses and reads the tables
once for them, and no load has to choose between the three.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halny.kernels.dispatch import (
    TileTable,
    can_check_values,
    cdiv,
    check_floating,
    check_integer,
    check_no_gradient,
    check_overwritable,
    check_same_device,
    generation_of,
    launch,
    next_power_of_2,
    once_differentiable,
    register_operator,
    runs_kernel,
    tile,
    upcast,
    wants_gradient,
)


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


# --------------------------------------------------------------------------------------------------------------- kernel

# By bytes of a token's queries: a thread takes 64, and up to 128 in larger models
TILES: TileTable = {
    0: [
        (2048, {"num_warps": 1}),
        (4096, {"num_warps": 2}),
        (8192, {"num_warps": 4}),
        (32768, {"num_warps": 8}),
        (2**62, {"num_warps": 16}),
    ]
}


@triton.jit
def first_halves(
    p_token, head_stride, N: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    """Pointers to the first halves of a token's N heads, [BLOCK, BLOCK_HALF], and the mask of those there are."""
    i_head, i_half = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK_HALF)[None, :]
    return p_token + i_head.to(tl.int64) * head_stride + i_half, (i_head < N) & (i_half < HALF)


@triton.jit
def load_heads(
    p_token, head_stride, N: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_HALF: tl.constexpr
):
    p_half, m = first_halves(p_token, head_stride, N, HALF, BLOCK, BLOCK_HALF)
    return tl.load(p_half, mask=m), tl.load(p_half + HALF, mask=m)


@triton.jit
def store_heads(
    p_token, head_stride, b_1, b_2,
    N: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    p_half, m = first_halves(p_token, head_stride, N, HALF, BLOCK, BLOCK_HALF)
    tl.store(p_half, b_1, mask=m)
    tl.store(p_half + HALF, b_2, mask=m)


@triton.jit
def rotate(b_1, b_2, b_cos, b_sin):
    b_x1, b_x2 = b_1.to(tl.float32), b_2.to(tl.float32)
    b_y1 = b_x1 * b_cos - b_x2 * b_sin
    # As the compiler fuses the line above. Of a sum it chooses which product to round first by the code around it.
    b_y2 = tl.fma(b_x1, b_sin, b_x2 * b_cos)
    return b_y1.to(b_1.dtype), b_y2.to(b_2.dtype)


@triton.jit(do_not_specialize=["n_positions"])
def rope_kernel(
    p_q, p_k, p_v, p_packed, p_cos, p_sin, p_positions,
    n_positions,
    q_batch_stride, q_position_stride, q_head_stride, k_batch_stride, k_position_stride, k_head_stride,
    v_batch_stride, v_position_stride, v_head_stride, packed_batch_stride, packed_position_stride, packed_head_stride,
    positions_batch_stride, positions_position_stride,
    N_HEADS: tl.constexpr, N_KV_HEADS: tl.constexpr, HALF: tl.constexpr, WITH_V: tl.constexpr,
    HAS_POSITIONS: tl.constexpr, CONJUGATE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr, BLOCK_KV_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """Program: one token. May be in place: a program writes only what it alone has read."""
    i_token = tl.program_id(0)
    i_batch, i_position = (i_token // n_positions).to(tl.int64), (i_token % n_positions).to(tl.int64)
    i_angle = i_position
    if HAS_POSITIONS:
        p_position = p_positions + i_batch * positions_batch_stride + i_position * positions_position_stride
        i_angle = tl.load(p_position).to(tl.int64)

    p_q += i_batch * q_batch_stride + i_position * q_position_stride
    p_k += i_batch * k_batch_stride + i_position * k_position_stride
    b_q1, b_q2 = load_heads(p_q, q_head_stride, N_HEADS, HALF, BLOCK_HEADS, BLOCK_HALF)
    b_k1, b_k2 = load_heads(p_k, k_head_stride, N_KV_HEADS, HALF, BLOCK_KV_HEADS, BLOCK_HALF)
    if WITH_V:  # copied as it is, with the bits of its NaNs
        p_v += i_batch * v_batch_stride + i_position * v_position_stride
        b_v1, b_v2 = load_heads(p_v, v_head_stride, N_KV_HEADS, HALF, BLOCK_KV_HEADS, BLOCK_HALF)
    o_angle = i_angle * HALF + tl.arange(0, BLOCK_HALF)
    m_angle = tl.arange(0, BLOCK_HALF) < HALF
    b_cos = tl.load(p_cos + o_angle, mask=m_angle).to(tl.float32)[None, :]
    b_sin = tl.load(p_sin + o_angle, mask=m_angle).to(tl.float32)[None, :]
    if CONJUGATE:
        b_sin = 0.0 - b_sin

    # In the order v, k, q, ptxas has all loads begin before it uses the first. In the order q, k, v it loads and
    # rotates a part of q, and only then asks for the rest: a program waits for memory twice.
    p_packed += i_batch * packed_batch_stride + i_position * packed_position_stride
    p_packed_k = p_packed + tl.cast(packed_head_stride, tl.int64) * N_HEADS
    if WITH_V:
        p_packed_v = p_packed_k + tl.cast(packed_head_stride, tl.int64) * N_KV_HEADS
        store_heads(p_packed_v, packed_head_stride, b_v1, b_v2, N_KV_HEADS, HALF, BLOCK_KV_HEADS, BLOCK_HALF)
    b_k1, b_k2 = rotate(b_k1, b_k2, b_cos, b_sin)
    store_heads(p_packed_k, packed_head_stride, b_k1, b_k2, N_KV_HEADS, HALF, BLOCK_KV_HEADS, BLOCK_HALF)
    b_q1, b_q2 = rotate(b_q1, b_q2, b_cos, b_sin)
    store_heads(p_packed, packed_head_stride, b_q1, b_q2, N_HEADS, HALF, BLOCK_HEADS, BLOCK_HALF)


# ------------------------------------------------------------------------------------------------------------ operators


def _launch(q, k, v, packed, cos, sin, positions, conjugate: bool, with_v: bool) -> None:
    B, T, n_heads, head_dim = q.shape
    n_kv_heads = k.shape[2]
    if not packed.numel():
        return
    # heads are read where they lie, but each in one piece: a stride inside it costs a copy
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    n_bytes, block_half = q.element_size(), next_power_of_2(head_dim // 2)
    constants = tile(TILES, n_heads * head_dim * n_bytes, generation_of(packed))
    # A block has 16 bytes for every thread: of few heads, lanes that a mask turns off cost less than narrow accesses.
    least = cdiv(constants["num_warps"] * 32 * 16, block_half * n_bytes)
    launch(
        rope_kernel, (B * T,),
        q, k, v, packed, cos.contiguous(), sin.contiguous(), cos if positions is None else positions,
        T,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *packed.stride()[:3],
        *((0, 0) if positions is None else positions.stride()),
        N_HEADS=n_heads, N_KV_HEADS=n_kv_heads, HALF=head_dim // 2, WITH_V=with_v,
        HAS_POSITIONS=positions is not None, CONJUGATE=conjugate,
        BLOCK_HEADS=next_power_of_2(max(n_heads, least)), BLOCK_KV_HEADS=next_power_of_2(max(n_kv_heads, least)),
        BLOCK_HALF=block_half, **constants,
    )  # fmt: skip


def _by_heads(qkv: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """A linear layer's [B, T, heads * head_dim] as [B, T, heads, head_dim]; whatever is not one stays as it is."""
    heads = n_heads + 2 * n_kv_heads
    if qkv.ndim != 3 or qkv.shape[2] % heads:
        return qkv
    return qkv.view(*qkv.shape[:2], heads, qkv.shape[2] // heads)


def _split(qkv: Tensor, n_heads: int, n_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.split([n_heads, n_kv_heads, n_kv_heads], dim=2)


def _rotate(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, conjugate: bool):
    packed = _rotate_fake(q, k, v, cos, sin, positions, conjugate)
    _launch(q, k, v, packed, cos, sin, positions, conjugate, with_v=True)
    return packed


def _rotate_fake(q, k, v, cos, sin, positions, conjugate):
    B, T, n_heads, head_dim = q.shape
    return torch.empty((B, T, n_heads + 2 * k.shape[2], head_dim), dtype=q.dtype, device=q.device)


def _rotate_in_place(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, positions: Tensor | None
) -> None:
    in_pieces = qkv if qkv.stride(-1) == 1 else qkv.contiguous()
    _launch(*_split(in_pieces, n_heads, n_kv_heads), in_pieces, cos, sin, positions, False, with_v=False)
    if in_pieces is not qkv:
        qkv.copy_(in_pieces)


rope_rotate = register_operator(
    "rope_rotate(Tensor q, Tensor k, Tensor v, Tensor cos, Tensor sin, Tensor? positions, bool conjugate) -> Tensor",
    _rotate,
    _rotate_fake,
)
rope_rotate_ = register_operator(
    "rope_rotate_(Tensor(a!) qkv, Tensor cos, Tensor sin, int n_heads, int n_kv_heads, Tensor? positions) -> ()",
    _rotate_in_place,
    lambda *arguments: None,
)


class RopeQKV(torch.autograd.Function):
    """Packed in, packed out."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, n_heads, n_kv_heads, positions):
        ctx.save_for_backward(cos, sin, positions)
        ctx.heads = n_heads, n_kv_heads
        return rope_rotate(*_split(qkv, n_heads, n_kv_heads), cos, sin, positions, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_qkv):
        return rope_rotate(*_split(d_qkv, *ctx.heads), *ctx.saved_tensors, True), None, None, None, None, None


class RopeQKVInPlace(torch.autograd.Function):
    """Records the rotation and does not make it: the caller does, so that autograd's errors come before any writing."""

    @staticmethod
    def forward(ctx, qkv, cos, sin, n_heads, n_kv_heads, positions):
        ctx.save_for_backward(cos, sin, positions)
        ctx.heads = n_heads, n_kv_heads
        ctx.mark_dirty(qkv)
        return qkv

    backward = RopeQKV.backward


class RopeSplit(torch.autograd.Function):
    """In place, with q, k and v apart as views: their gradients come back apart, and become the packed one in one pass.

    As RopeQKVInPlace it only records the rotation. It also returns qkv, as autograd asks of what is overwritten.
    Whoever goes on with it, beside q, k and v, has a gradient of it added here. Whoever overwrites it again has
    autograd's error, as has who overwrites q, k or v.
    """

    @staticmethod
    def forward(ctx, qkv, cos, sin, n_heads, n_kv_heads, positions):
        ctx.save_for_backward(cos, sin, positions)
        ctx.mark_dirty(qkv)
        ctx.set_materialize_grads(False)  # qkv's would be zeros of its size
        ctx.heads, ctx.shape = (n_heads, n_kv_heads), qkv.shape
        q, k, v = _split(_by_heads(qkv.detach(), n_heads, n_kv_heads), n_heads, n_kv_heads)
        ctx.shapes = q.shape, k.shape, v.shape
        return qkv, q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx, d_qkv, *gradients):
        some = next((g for g in (d_qkv, *gradients) if g is not None), None)
        if some is None:
            return (None,) * 6
        if d_qkv is not None:
            of_qkv = _split(_by_heads(d_qkv, *ctx.heads), *ctx.heads)
            gradients = [a if b is None else a + b for a, b in zip(of_qkv, gradients, strict=True)]
        dq, dk, dv = (some.new_zeros(shape) if g is None else g for g, shape in zip(gradients, ctx.shapes, strict=True))
        return rope_rotate(dq, dk, dv, *ctx.saved_tensors, True).view(ctx.shape), None, None, None, None, None


# ----------------------------------------------------------------------------------------------------- public functions


def rope_qkv(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, positions: Tensor | None = None
) -> Tensor:
    """Rotate the queries and keys of a packed projection by their positions; values pass through unchanged.

    qkv [B, T, n_heads + 2 * n_kv_heads, head_dim]; cos and sin [max_len, head_dim // 2] from ``rope_tables``;
    positions int [B, T] (default: 0 .. T - 1 in every row) -> a new tensor like qkv. Arithmetic in fp32. Saves the
    tables and positions. Any strides; a head that is not contiguous in itself costs a copy. fp64 runs the reference, as
    do tables that require a gradient, which the kernel does not make.

    Raises TypeError for wrong kinds of tensors, ValueError for shapes or devices that do not fit, a table shorter than
    T, or positions outside the table (on CUDA tensors only under ``dispatch.set_debug_checks``).
    """
    _check(qkv, cos, sin, n_heads, n_kv_heads, positions)
    return _rotated(qkv, cos, sin, n_heads, n_kv_heads, positions)


def rope_qkv_(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, positions: Tensor | None = None
) -> Tensor:
    """``rope_qkv`` in place: overwrites qkv and returns it. Arguments and errors are those of ``rope_qkv``.

    Also raises, before anything is written: ValueError for a qkv that overlaps itself, RuntimeError for a leaf that
    requires a gradient, for its views, and for tables that require one.
    """
    _check(qkv, cos, sin, n_heads, n_kv_heads, positions)
    _check_in_place(qkv, cos, sin)
    return _rotated_in_place(qkv, cos, sin, n_heads, n_kv_heads, positions)


def rope_split_qkv_(
    qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, positions: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``rope_qkv_(...).split([n_heads, n_kv_heads, n_kv_heads], dim=2)``: overwrites qkv; q, k and v are views of it.

    For attention: its three gradients, of any strides, become the packed one in one pass. qkv may also be what a linear
    layer returns, [B, T, (n_heads + 2 * n_kv_heads) * head_dim]. If it is a view of another tensor, autograd takes more
    passes: of a Function that overwrites a view it allows one output. Otherwise as ``rope_qkv_``.
    """
    check_floating("qkv", qkv)
    _check_heads(n_heads, n_kv_heads)
    by_heads = _by_heads(qkv, n_heads, n_kv_heads)
    _check(by_heads, cos, sin, n_heads, n_kv_heads, positions)
    _check_in_place(by_heads, cos, sin)
    if not _runs_kernel(qkv) or torch.compiler.is_compiling() or qkv._is_view() or not wants_gradient(qkv):
        return _split(_rotated_in_place(by_heads, cos, sin, n_heads, n_kv_heads, positions), n_heads, n_kv_heads)
    _, q, k, v = RopeSplit.apply(qkv, cos, sin, n_heads, n_kv_heads, positions)
    _rotate_recorded(by_heads, cos, sin, n_heads, n_kv_heads, positions)
    return q, k, v


def _rotated(qkv, cos, sin, n_heads, n_kv_heads, positions) -> Tensor:
    """``rope_qkv``, its arguments checked; so the next."""
    if not _runs_kernel(qkv) or wants_gradient(cos, sin):
        return rope_qkv_reference(qkv, cos, sin, n_heads, n_kv_heads, positions)
    return RopeQKV.apply(qkv, cos, sin, n_heads, n_kv_heads, positions)


def _rotated_in_place(qkv, cos, sin, n_heads, n_kv_heads, positions) -> Tensor:
    # Compiled graphs leave out a copy that nobody reads. Of a Function that overwrites a graph's argument torch 2.13's
    # compiler loses the gradient, without a word.
    if not _runs_kernel(qkv) or torch.compiler.is_compiling():
        return qkv.copy_(_rotated(qkv, cos, sin, n_heads, n_kv_heads, positions))
    if not wants_gradient(qkv):
        rope_rotate_(qkv, cos, sin, n_heads, n_kv_heads, positions)
        return qkv
    rotated = RopeQKVInPlace.apply(qkv, cos, sin, n_heads, n_kv_heads, positions)
    _rotate_recorded(qkv, cos, sin, n_heads, n_kv_heads, positions)
    return rotated


def _rotate_recorded(qkv: Tensor, *arguments) -> None:
    """Make the rotation that autograd has recorded; it is not recorded again, nor counted as a second overwriting."""
    with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(qkv):
        rope_rotate_(qkv, *arguments)


def _runs_kernel(qkv: Tensor) -> bool:
    return runs_kernel(qkv) and qkv.dtype != torch.float64


def _check_heads(n_heads: int, n_kv_heads: int) -> None:
    for name, n in (("n_heads", n_heads), ("n_kv_heads", n_kv_heads)):
        if not isinstance(n, int) or n < 1:
            raise ValueError(f"{name} must be an integer of at least 1, got {n!r}")


def _check_in_place(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_overwritable("qkv", qkv, "rope_qkv")
    check_no_gradient("rope_qkv", cos=cos, sin=sin)


def _check(qkv: Tensor, cos: Tensor, sin: Tensor, n_heads: int, n_kv_heads: int, positions: Tensor | None) -> None:
    check_floating("qkv", qkv)
    check_floating("cos", cos)
    check_floating("sin", sin)
    check_same_device(qkv=qkv, cos=cos, sin=sin)
    _check_heads(n_heads, n_kv_heads)
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
