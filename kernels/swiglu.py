"""SwiGLU on the packed gate and up projections.

    h = silu(gate) * up,   silu(z) = z * sigmoid(z)                        Shazeer 2020, https://arxiv.org/abs/2002.05202

gate and up are the two halves of one matrix product, so they lie side by side in every row. With s = sigmoid(gate):

    dgate = dh * up * s * (1 + gate * (1 - s)),   dup = dh * gate * s

**Bytes.** For M rows of N = F elements of b bytes: forward 3MNb (gate, up, h), backward 5MNb (dh, gate, up, dgate,
dup). Saved for the backward: the input only; s is cheaper to compute again than to read. On request the backward also
writes h, 6MNb, recomputed for the weight gradient of the projection after it, which then need not have kept h.

Arithmetic is fp32 with one rounding at the end, where PyTorch rounds silu(gate) on the way: nearer to the truth.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import silu

from halny.kernels.dispatch import (
    TileTable,
    as_rows,
    cdiv,
    check_floating,
    generation_of,
    launch,
    once_differentiable,
    register_operator,
    runs_kernel,
    tile,
)


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The definition of ``swiglu``, in plain PyTorch (the arithmetic of Hugging Face's MistralMLP)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


# -------------------------------------------------------------------------------------------------------------- kernels

# By F. A program takes a piece of one row: a block for all 14,336 columns would be 16,384 wide and waste an eighth.
TILES: TileTable = {
    0: [
        (256, {"BLOCK_F": 256, "num_warps": 1}),
        (512, {"BLOCK_F": 512, "num_warps": 2}),
        (2**62, {"BLOCK_F": 1024, "num_warps": 4}),
    ]
}


@triton.jit
def swiglu_forward_kernel(
    p_gate_up, p_h,
    gate_up_stride,
    F: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    PIECES: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    i_row = (tl.program_id(0) // PIECES).to(tl.int64)
    i_column = tl.program_id(0) % PIECES * BLOCK_F + tl.arange(0, BLOCK_F)
    m = i_column < F
    p_gate = p_gate_up + i_row * gate_up_stride + i_column
    b_gate = tl.load(p_gate, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate + F, mask=m, other=0.0).to(tl.float32)
    # exp may overflow to inf, and the quotient is then the right -0.0
    b_h = b_gate / (1.0 + tl.exp(-b_gate)) * b_up
    tl.store(p_h + i_row * F + i_column, b_h.to(p_h.dtype.element_ty), mask=m)


@triton.jit
def swiglu_backward_kernel(
    p_dh, p_gate_up, p_d_gate_up, p_h,
    dh_stride, gate_up_stride,
    F: tl.constexpr, RECOMPUTE_H: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    PIECES: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    i_row = (tl.program_id(0) // PIECES).to(tl.int64)
    i_column = tl.program_id(0) % PIECES * BLOCK_F + tl.arange(0, BLOCK_F)
    m = i_column < F
    p_gate = p_gate_up + i_row * gate_up_stride + i_column
    b_gate = tl.load(p_gate, mask=m, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate + F, mask=m, other=0.0).to(tl.float32)
    b_dh = tl.load(p_dh + i_row * dh_stride + i_column, mask=m, other=0.0).to(tl.float32)

    b_sigmoid = 1.0 / (1.0 + tl.exp(-b_gate))
    b_silu = b_gate / (1.0 + tl.exp(-b_gate))  # the forward's expression, for the forward's bits in h
    b_d_gate = b_dh * b_up * b_sigmoid * (1.0 + b_gate * (1.0 - b_sigmoid))
    p_d_gate = p_d_gate_up + i_row * (2 * F) + i_column
    tl.store(p_d_gate, b_d_gate.to(p_d_gate_up.dtype.element_ty), mask=m)
    tl.store(p_d_gate + F, (b_dh * b_silu).to(p_d_gate_up.dtype.element_ty), mask=m)
    if RECOMPUTE_H:
        tl.store(p_h + i_row * F + i_column, (b_silu * b_up).to(p_h.dtype.element_ty), mask=m)


# ------------------------------------------------------------------------------------------------------------ operators


def _forward(gate_up: Tensor) -> Tensor:
    h = _forward_fake(gate_up)
    if h.numel():
        rows, F = as_rows(gate_up), h.shape[-1]
        constants = tile(TILES, F, generation_of(gate_up))
        launch(
            swiglu_forward_kernel, (rows.shape[0] * cdiv(F, constants["BLOCK_F"]),),
            rows, h, rows.stride(0), F=F, **constants,
        )  # fmt: skip
    return h


def _forward_fake(gate_up: Tensor) -> Tensor:
    return torch.empty((*gate_up.shape[:-1], gate_up.shape[-1] // 2), dtype=gate_up.dtype, device=gate_up.device)


def _backward(dh: Tensor, gate_up: Tensor, recompute_h: bool) -> tuple[Tensor, Tensor]:
    d_gate_up, h = _backward_fake(dh, gate_up, recompute_h)
    if dh.numel():
        rows, dh_rows, F = as_rows(gate_up), as_rows(dh), dh.shape[-1]
        constants = tile(TILES, F, generation_of(gate_up))
        launch(
            swiglu_backward_kernel, (rows.shape[0] * cdiv(F, constants["BLOCK_F"]),),
            dh_rows, rows, d_gate_up, h, dh_rows.stride(0), rows.stride(0), F=F, RECOMPUTE_H=recompute_h, **constants,
        )  # fmt: skip
    return d_gate_up, h


def _backward_fake(dh: Tensor, gate_up: Tensor, recompute_h: bool) -> tuple[Tensor, Tensor]:
    d_gate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    return d_gate_up, torch.empty(dh.shape if recompute_h else (0,), dtype=gate_up.dtype, device=gate_up.device)


swiglu_forward = register_operator("swiglu_forward(Tensor gate_up) -> Tensor", _forward, _forward_fake)
swiglu_backward = register_operator(  # (d_gate_up, h), h empty unless it is asked for
    "swiglu_backward(Tensor dh, Tensor gate_up, bool recompute_h) -> (Tensor, Tensor)", _backward, _backward_fake
)


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up):
        ctx.save_for_backward(gate_up)
        return swiglu_forward(gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        return swiglu_backward(dh, *ctx.saved_tensors, False)[0]


# ------------------------------------------------------------------------------------------------------ public function


def swiglu(gate_up: Tensor) -> Tensor:
    """``gate, up = gate_up.chunk(2, dim=-1); return torch.nn.functional.silu(gate) * up``.

    gate_up [..., 2F], any floating dtype -> h [..., F] in the same dtype. Arithmetic in fp32. Saves gate_up only.
    fp64 runs the reference. Copies gate_up or dh where ``as_rows`` must.
    Raises TypeError if gate_up is not floating-point, ValueError if its last dimension is odd.
    """
    check_swiglu(gate_up)
    if not swiglu_runs_kernel(gate_up):
        return swiglu_reference(gate_up)
    return SwiGLU.apply(gate_up)


def swiglu_runs_kernel(gate_up: Tensor) -> bool:
    return runs_kernel(gate_up) and gate_up.dtype != torch.float64


def check_swiglu(gate_up: Tensor) -> None:
    check_floating("gate_up", gate_up)
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be [..., 2F] with an even last dimension, got {tuple(gate_up.shape)}")
