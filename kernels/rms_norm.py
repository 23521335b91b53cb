"""RMSNorm, alone and fused with the residual addition before it.

    y = x / sqrt(mean(x^2) + eps) * weight                      Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467

Rounding follows Hugging Face's Mistral: mean and reciprocal root in fp32, x-hat rounded to x's dtype, then the weight.

With g = dy * weight, x-hat = x * rstd and rstd = 1 / sqrt(mean(x^2) + eps), all of one row of N:

    dx = rstd * (g - x-hat * mean(g * x-hat)),   dweight = sum over rows of dy * x-hat

**Bytes.** Memory sets the time, so no tensor passes twice. For M rows of N elements of b bytes: forward 2MNb (x, y),
with the addition 4MNb (x, residual, s, y); backward 3MNb (x, dy, dx), with the addition 4MNb (ds as well, and one dx
that serves both branches, because d(x + residual) is the same for either). A row stays in registers between the
reduction and its use, hence one block a row. Saved for the backward: x (or s) and one fp32 rstd a row.

**dweight** is a sum over rows, the other way than everything else. The backward's grid is persistent: a few programs
an SM, each adding up its rows in registers and writing one fp32 row of partials; a second kernel sums [programs, N],
which is 4 MB on an H200 and still in its L2 cache, and rounds once. Atomics would be slower and would not give the same
bits twice.

**Waiting.** A row's sum makes all threads of a program wait for each other, and what is asked for only afterwards
arrives late. So a kernel asks for all that it needs for a row before the sum, and the backward, whose programs are few,
also for the next row's x and dy.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halny.kernels.dispatch import (
    TileTable,
    as_rows,
    cdiv,
    check_floating,
    check_same_device,
    generation_of,
    launch,
    multiprocessors,
    next_power_of_2,
    once_differentiable,
    register_operator,
    runs_kernel,
    tile,
    upcast,
)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition of ``rms_norm``, in plain PyTorch."""
    x_wide = upcast(x)
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return ((x_wide * rstd).to(x.dtype) * weight).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The definition of ``add_rms_norm``, in plain PyTorch."""
    s = x + residual
    return rms_norm_reference(s, weight, eps), s


# -------------------------------------------------------------------------------------------------------------- kernels

MAX_COLUMNS = 32768  # a row is one block; beyond, the reference runs

# ROWS a program takes at once: several where one row is too little work for its warps
FORWARD_TILES: TileTable = {
    0: [
        (128, {"ROWS": 16, "num_warps": 4}),
        (512, {"ROWS": 4, "num_warps": 4}),
        (1024, {"ROWS": 2, "num_warps": 4}),
        (4096, {"ROWS": 1, "num_warps": 4}),
        (8192, {"ROWS": 1, "num_warps": 8}),
        (16384, {"ROWS": 1, "num_warps": 16}),
        (MAX_COLUMNS, {"ROWS": 1, "num_warps": 32}),
    ]
}
# PROGRAMS an SM: as many as its registers hold at once, so that the grid is a single wave. Up to 8192 columns a thread
# has 16 elements of a row and 128 registers, hence 16 warps an SM. Of the registers dweight's sums and the weight take
# 32 in fp32, x and dy as well, and AHEAD, which keeps the next row's x and dy as they are loaded, 16 less what ptxas
# reuses. By estimate, at 4096 columns in bf16: an H200 moves 33 KB an SM and us, so that two programs may take 1.5 us
# for a row of 25 KB, 2.5 with ds and y. A load takes 0.8 us and the work on a row 0.5; with AHEAD the second half of
# the work goes on meanwhile, which makes 1.1 us, with ds 1.2, and without 1.3 and 1.4. In fp32, where the next row does
# not fit, there is twice the time. maxnreg: with no limit ptxas is content with fewer registers, and spills in fp32.
# Beyond 8192 columns there are 32 warps of 64 registers, and spills begin (sm_90, 82 to 360 bytes at 16384).
BACKWARD_TILES: TileTable = {
    0: [
        (128, {"ROWS": 16, "num_warps": 4, "PROGRAMS": 4, "AHEAD": 1, "maxnreg": 128}),
        (512, {"ROWS": 4, "num_warps": 4, "PROGRAMS": 4, "AHEAD": 1, "maxnreg": 128}),
        (1024, {"ROWS": 2, "num_warps": 4, "PROGRAMS": 4, "AHEAD": 1, "maxnreg": 128}),
        (2048, {"ROWS": 1, "num_warps": 4, "PROGRAMS": 4, "AHEAD": 1, "maxnreg": 128}),
        (4096, {"ROWS": 1, "num_warps": 8, "PROGRAMS": 2, "AHEAD": 1, "maxnreg": 128}),
        (8192, {"ROWS": 1, "num_warps": 16, "PROGRAMS": 1, "AHEAD": 1, "maxnreg": 128}),
        (MAX_COLUMNS, {"ROWS": 1, "num_warps": 32, "PROGRAMS": 1, "AHEAD": 0}),
    ]
}
# dweight: 128 programs for 4096 columns, which take what an H200's programs wrote, 264 rows at most, in one step
DWEIGHT_TILE = {"ROWS": 512, "BLOCK_N": 32, "num_warps": 8}


@triton.jit(do_not_specialize=["n_rows"])
def rms_norm_forward_kernel(
    p_x, p_residual, p_weight, p_y, p_s, p_rstd,
    n_rows, x_stride, residual_stride, eps,
    N: tl.constexpr, ADD: tl.constexpr, RECOMPUTE: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """RECOMPUTE: y once more from x and the rstd of an earlier launch, which is read instead of written."""
    i_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i_column = tl.arange(0, BLOCK_N)
    m_row = i_row < n_rows
    m = m_row[:, None] & (i_column < N)[None, :]
    o_out = i_row[:, None] * N + i_column[None, :]

    b_x = tl.load(p_x + i_row[:, None] * x_stride + i_column[None, :], mask=m, other=0.0).to(tl.float32)
    if ADD:
        p_residual_rows = p_residual + i_row[:, None] * residual_stride + i_column[None, :]
        b_s = (b_x + tl.load(p_residual_rows, mask=m, other=0.0).to(tl.float32)).to(p_s.dtype.element_ty)
        tl.store(p_s + o_out, b_s, mask=m)
        b_x = b_s.to(tl.float32)  # what is normalised is what the next layer reads, rounding included
    # a weight of 16 bits before the sum, which all threads wait for; in fp32 it would cost programs, or spills
    EARLY: tl.constexpr = p_weight.dtype.element_ty.primitive_bitwidth <= 16
    if EARLY:
        b_weight = tl.load(p_weight + i_column, mask=i_column < N, other=0.0)
    if RECOMPUTE:
        b_rstd = tl.load(p_rstd + i_row, mask=m_row, other=0.0)
    else:
        b_rstd = 1.0 / tl.sqrt_rn(tl.sum(b_x * b_x, axis=1) / N + eps)
        tl.store(p_rstd + i_row, b_rstd, mask=m_row)

    if not EARLY:
        b_weight = tl.load(p_weight + i_column, mask=i_column < N, other=0.0)
    b_x_hat = (b_x * b_rstd[:, None]).to(p_y.dtype.element_ty).to(tl.float32)
    tl.store(p_y + o_out, (b_x_hat * b_weight.to(tl.float32)[None, :]).to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _load_tile(
    p_dy, p_x, p_rstd, i_tile, n_rows, dy_stride, x_stride, i_column, m_column, ROWS: tl.constexpr
):  # fmt: skip
    """dy, x and rstd of a tile of rows, as they lie in memory; zeros beyond the last row."""
    i_row = i_tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
    m_row = i_row < n_rows
    m = m_row[:, None] & m_column[None, :]
    b_dy = tl.load(p_dy + i_row[:, None] * dy_stride + i_column[None, :], mask=m, other=0.0)
    b_x = tl.load(p_x + i_row[:, None] * x_stride + i_column[None, :], mask=m, other=0.0)
    return b_dy, b_x, tl.load(p_rstd + i_row, mask=m_row, other=0.0)[:, None]


@triton.jit(do_not_specialize=["n_rows"])
def rms_norm_backward_kernel(
    p_dy, p_ds, p_x, p_weight, p_rstd, p_dx, p_dw, p_y,
    n_rows, dy_stride, ds_stride, x_stride,
    N: tl.constexpr, HAS_DS: tl.constexpr, NEEDS_DX: tl.constexpr, NEEDS_DW: tl.constexpr, RECOMPUTE_Y: tl.constexpr,
    AHEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """RECOMPUTE_Y: the forward's y once more, to the bit, since x is here.

    AHEAD: the next tile is asked for before this one is worked on. dy and x stay as loaded until then, half of fp32.
    """
    i_program = tl.program_id(0)
    i_column = tl.arange(0, BLOCK_N)
    m_column = i_column < N
    b_weight = tl.load(p_weight + i_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
    b_dw = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    i_tile = i_program  # 32 bits, since rows are fewer than 2^31
    if AHEAD:
        b_dy_next, b_x_next, b_rstd_next = _load_tile(
            p_dy, p_x, p_rstd, i_tile, n_rows, dy_stride, x_stride, i_column, m_column, ROWS
        )
    # not a range: triton 3.6's interpreter cannot take its bounds from numpy >= 2.4; delete when 3.9 is the least
    while i_tile * ROWS < n_rows:
        i_next = i_tile + tl.num_programs(0)
        if AHEAD:
            b_dy_raw, b_x_raw, b_rstd = b_dy_next, b_x_next, b_rstd_next
            b_dy_next, b_x_next, b_rstd_next = _load_tile(
                p_dy, p_x, p_rstd, i_next, n_rows, dy_stride, x_stride, i_column, m_column, ROWS
            )
        else:
            b_dy_raw, b_x_raw, b_rstd = _load_tile(
                p_dy, p_x, p_rstd, i_tile, n_rows, dy_stride, x_stride, i_column, m_column, ROWS
            )
        i_row = i_tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        m = (i_row < n_rows)[:, None] & m_column[None, :]
        if HAS_DS:  # before the sum, which all threads wait for
            b_ds = tl.load(p_ds + i_row[:, None] * ds_stride + i_column[None, :], mask=m, other=0.0)
        o_out = i_row[:, None] * N + i_column[None, :]
        b_dy, b_x = b_dy_raw.to(tl.float32), b_x_raw.to(tl.float32)
        if NEEDS_DW:
            b_dw += b_dy * (b_x * b_rstd)
        if RECOMPUTE_Y:  # here: above dw or below dx it costs registers, in triton 3.6 or 3.9
            b_x_hat = (b_x * b_rstd).to(p_y.dtype.element_ty).to(tl.float32)
            tl.store(p_y + o_out, (b_x_hat * b_weight).to(p_y.dtype.element_ty), mask=m)
        if NEEDS_DX:
            b_g = b_dy * b_weight
            # mean(g x-hat) rstd^2, multiplied in the order that keeps rows of 1e18 and of 1e-18 in range
            b_c = tl.sum(b_g * b_x, axis=1)[:, None] * b_rstd / N * b_rstd * b_rstd
            b_dx = b_g * b_rstd - b_x * b_c
            if HAS_DS:
                # s feeds the norm and the residual stream: the stream's gradient joins after the norm's backward
                b_dx += b_ds.to(tl.float32)
            tl.store(p_dx + o_out, b_dx.to(p_dx.dtype.element_ty), mask=m)
        i_tile = i_next
    if NEEDS_DW:
        tl.store(p_dw + i_program.to(tl.int64) * N + i_column, tl.sum(b_dw, axis=0), mask=m_column)


@triton.jit(do_not_specialize=["n_partials"])
def rms_norm_dweight_kernel(p_partials, p_dw, n_partials, N: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """dweight of BLOCK_N columns: the sum of the partials, in one order, rounded once."""
    i_column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_row = tl.arange(0, ROWS)
    m_column = i_column < N
    b_dw = tl.zeros([ROWS, BLOCK_N], dtype=tl.float32)
    i_first = 0
    while i_first < n_partials:
        m = (i_first + i_row < n_partials)[:, None] & m_column[None, :]
        b_dw += tl.load(p_partials + (i_first + i_row)[:, None] * N + i_column[None, :], mask=m, other=0.0)
        i_first += ROWS
    tl.store(p_dw + i_column, tl.sum(b_dw, axis=0).to(p_dw.dtype.element_ty), mask=m_column)


# ------------------------------------------------------------------------------------------------------------ operators


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _rstd_like(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)


def _launch_forward(x: Tensor, residual: Tensor | None, weight: Tensor, rstd: Tensor | None, eps: float):
    """(y, s or None, rstd); with rstd given, y is recomputed from it."""
    recompute = rstd is not None
    y, s = _contiguous_like(x), None if residual is None else _contiguous_like(x)
    rstd = rstd if recompute else _rstd_like(x)
    if x.numel():
        rows, N = as_rows(x), x.shape[-1]
        residual_rows = rows if residual is None else as_rows(residual)
        constants = tile(FORWARD_TILES, N, generation_of(x))
        launch(
            rms_norm_forward_kernel, (cdiv(rows.shape[0], constants["ROWS"]),),
            rows, residual_rows, weight.contiguous(), y, y if s is None else s, rstd,
            rows.shape[0], rows.stride(0), residual_rows.stride(0), eps,
            N=N, ADD=residual is not None, RECOMPUTE=recompute, BLOCK_N=next_power_of_2(N), **constants,
        )  # fmt: skip
    return y, s, rstd


def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    y, _, rstd = _launch_forward(x, None, weight, None, eps)
    return y, rstd


def _add_forward(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _launch_forward(x, residual, weight, None, eps)


def _recompute(x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    return _launch_forward(x, None, weight, rstd, 0.0)[0]


def _dx_and_y(x: Tensor, needs_dx: bool, recompute_y: bool) -> tuple[Tensor, Tensor]:
    dx, y = (torch.empty(x.shape if w else (0,), dtype=x.dtype, device=x.device) for w in (needs_dx, recompute_y))
    return dx, y


def _backward(
    dy: Tensor,
    ds: Tensor | None,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    needs_dx: bool,
    needs_dw: bool,
    recompute_y: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    dx, y = _dx_and_y(x, needs_dx, recompute_y)
    if not x.numel():
        return dx, torch.zeros(weight.shape if needs_dw else (0,), dtype=weight.dtype, device=x.device), y
    rows, N = as_rows(x), x.shape[-1]
    dy_rows = as_rows(dy)
    ds_rows = dy_rows if ds is None else as_rows(ds)
    constants = dict(tile(BACKWARD_TILES, N, generation_of(x)))
    n_programs = backward_programs(rows.shape[0], N, generation_of(x), multiprocessors(x.device))
    del constants["PROGRAMS"]
    ahead = bool(constants.pop("AHEAD")) and x.element_size() == 2
    partials = torch.empty((n_programs if needs_dw else 0, N), dtype=torch.float32, device=x.device)
    launch(
        rms_norm_backward_kernel, (n_programs,),
        dy_rows, ds_rows, rows, weight.contiguous(), rstd, dx, partials, y,
        rows.shape[0], dy_rows.stride(0), ds_rows.stride(0), rows.stride(0),
        N=N, HAS_DS=ds is not None, NEEDS_DX=needs_dx, NEEDS_DW=needs_dw, RECOMPUTE_Y=recompute_y,
        AHEAD=ahead, BLOCK_N=next_power_of_2(N), **constants,
    )  # fmt: skip
    dw = torch.empty(weight.shape if needs_dw else (0,), dtype=weight.dtype, device=x.device)
    if needs_dw:
        grid = (cdiv(N, DWEIGHT_TILE["BLOCK_N"]),)
        launch(rms_norm_dweight_kernel, grid, partials, dw, n_programs, N=N, **DWEIGHT_TILE)
    return dx, dw, y


def backward_programs(n_rows: int, n_columns: int, generation: int, n_multiprocessors: int) -> int:
    """Programs of the backward's grid: as many as run at once, less those that spare no other a tile.

    They end together, at 16,384 rows 261 after 62 or 63; of 264, 16 would work on a last row while all others are done.
    """
    constants = tile(BACKWARD_TILES, n_columns, generation)
    n_tiles = cdiv(n_rows, constants["ROWS"])
    return cdiv(n_tiles, cdiv(n_tiles, constants["PROGRAMS"] * n_multiprocessors))


def _backward_fake(dy, ds, x, weight, rstd, needs_dx, needs_dw, recompute_y=False):
    dx, y = _dx_and_y(x, needs_dx, recompute_y)
    return dx, torch.empty(weight.shape if needs_dw else (0,), dtype=weight.dtype, device=x.device), y


rms_norm_forward = register_operator(
    "rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
    _forward,
    lambda x, weight, eps: (_contiguous_like(x), _rstd_like(x)),
)
add_rms_norm_forward = register_operator(
    "add_rms_norm_forward(Tensor x, Tensor residual, Tensor weight, float eps) -> (Tensor, Tensor, Tensor)",
    _add_forward,
    lambda x, residual, weight, eps: (_contiguous_like(x), _contiguous_like(x), _rstd_like(x)),
)
rms_norm_recompute = register_operator(
    "rms_norm_recompute(Tensor x, Tensor weight, Tensor rstd) -> Tensor",
    _recompute,
    lambda x, weight, rstd: _contiguous_like(x),
)
rms_norm_backward = register_operator(  # (dx, dweight, y): what is not asked for comes back empty
    "rms_norm_backward(Tensor dy, Tensor? ds, Tensor x, Tensor weight, Tensor rstd, bool needs_dx, bool needs_dw,"
    " bool recompute_y=False) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


class RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        y, rstd = rms_norm_forward(x, weight, eps)
        ctx.save_for_backward(x, weight, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        needs_dx, needs_dw, _ = ctx.needs_input_grad
        dx, dw, _ = rms_norm_backward(dy, None, *ctx.saved_tensors, needs_dx, needs_dw)
        return dx if needs_dx else None, dw if needs_dw else None, None


class AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, eps):
        y, s, rstd = add_rms_norm_forward(x, residual, weight, eps)
        ctx.save_for_backward(s, weight, rstd)
        ctx.set_materialize_grads(False)
        return y, s

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, ds):
        needs_dx, needs_dresidual, needs_dw, _ = ctx.needs_input_grad
        if dy is None:  # only s was used
            return ds if needs_dx else None, ds if needs_dresidual else None, None, None
        dx, dw, _ = rms_norm_backward(dy, ds, *ctx.saved_tensors, needs_dx or needs_dresidual, needs_dw)
        return dx if needs_dx else None, dx if needs_dresidual else None, dw if needs_dw else None, None


# ----------------------------------------------------------------------------------------------------- public functions


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)``, rounded as Hugging Face's Mistral rounds.

    x [..., D], weight [D], any floating dtypes -> y [..., D] in x's dtype. Statistics and gradients in fp32.
    Saves x, weight and fp32 rstd [...]. fp64 and D > 32768 run the reference. Copies x or dy where ``as_rows`` must.
    Raises TypeError for tensors that are not floating-point, ValueError for shapes, devices or an eps that do not fit.
    """
    check_rms_norm(x, weight, eps)
    if not norm_runs_kernel(x, weight):
        return rms_norm_reference(x, weight, eps)
    return RMSNorm.apply(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``s = x + residual; return rms_norm(s, weight, eps), s``.

    x and residual [..., D] of one dtype, weight [D] -> (y, s), both [..., D] in x's dtype. s is rounded to x's dtype
    before it is normalised. x and residual get one and the same gradient tensor. Saves s, weight and fp32 rstd [...].
    Raises as ``rms_norm``.
    """
    check_add_rms_norm(x, residual, weight, eps)
    if not norm_runs_kernel(x, weight):
        return add_rms_norm_reference(x, residual, weight, eps)
    return AddRMSNorm.apply(x, residual, weight, eps)


def norm_runs_kernel(x: Tensor, weight: Tensor) -> bool:
    return runs_kernel(x) and torch.float64 not in (x.dtype, weight.dtype) and x.shape[-1] <= MAX_COLUMNS


def check_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    check_rms_norm(x, weight, eps)
    check_floating("residual", residual)
    check_same_device(x=x, residual=residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual must have x's dtype {x.dtype}, got {residual.dtype}")


def check_rms_norm(x: Tensor, weight: Tensor, eps: float) -> None:
    check_floating("x", x)
    check_floating("weight", weight)
    check_same_device(x=x, weight=weight)
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must have shape ({x.shape[-1]},) to match x's last one, got {tuple(weight.shape)}")
    if not isinstance(eps, int | float) or not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a finite number, zero or positive, got {eps!r}")
