"""A gradient that the forward pass has made, multiplied in the backward pass by the upstream gradient.

    out = gradient * upstream,   upstream a scalar, or a number for each row

Both cross-entropies make their gradients ahead. ``loss.backward()`` starts from an upstream gradient of 1: in place
there is then nothing to do, which is decided on the device, so that the host need not wait for the number. Otherwise
2 M N b bytes for M x N elements of b bytes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halny.kernels.dispatch import cdiv, in_transform, launch, register_operator

# --------------------------------------------------------------------------------------------------------------- kernel

BLOCK, NUM_WARPS, PROGRAMS = 4_096, 8, 1_056  # 8 programs on each of 132 SMs


@triton.jit
def scale_kernel(
    p_gradient, p_upstream, p_out,
    n_rows, n_columns,
    gradient_stride, out_stride, upstream_stride,
    IN_PLACE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = gradient * upstream, row by row; in place it leaves alone what would be multiplied by 1."""
    n_blocks = tl.cdiv(n_columns, BLOCK)
    i_tile = tl.program_id(0)
    while i_tile < n_rows * n_blocks:
        i_row = tl.cast(i_tile // n_blocks, tl.int64)
        upstream = tl.load(p_upstream + i_row * upstream_stride).to(tl.float32)
        if not IN_PLACE or upstream != 1.0:
            i_column = tl.cast(i_tile % n_blocks, tl.int64) * BLOCK + tl.arange(0, BLOCK)
            m = i_column < n_columns
            b_x = tl.load(p_gradient + i_row * gradient_stride + i_column, mask=m).to(tl.float32)
            # 0 stays 0 even if upstream is infinite: the rows of ignored labels have no gradient
            b_x = tl.where(b_x == 0.0, 0.0, b_x * upstream)
            tl.store(p_out + i_row * out_stride + i_column, b_x.to(p_out.dtype.element_ty), mask=m)
        i_tile += tl.num_programs(0)


# ------------------------------------------------------------------------------------------------------------ operators


def _launch_scale(gradient: Tensor, upstream: Tensor, out: Tensor) -> None:
    in_place = out is gradient
    if upstream.ndim == 0 and gradient.is_contiguous():  # out too: it is new, or the gradient
        gradient, out = gradient.view(1, gradient.numel()), out.view(1, gradient.numel())
    n_rows, n_columns = gradient.shape
    launch(
        scale_kernel,
        (min(n_rows * cdiv(n_columns, BLOCK), PROGRAMS),),
        gradient, upstream, out,
        n_rows, n_columns,
        gradient.stride(0), out.stride(0), upstream.stride(0) if upstream.ndim else 0,
        IN_PLACE=in_place, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


def _scaled(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    _launch_scale(gradient, upstream, out)
    return out


def _scale_(gradient: Tensor, upstream: Tensor) -> None:
    _launch_scale(gradient, upstream, gradient)


scale_gradient = register_operator(
    "scale_gradient(Tensor gradient, Tensor upstream, ScalarType dtype) -> Tensor",
    _scaled,
    lambda gradient, upstream, dtype: torch.empty(gradient.shape, dtype=dtype, device=gradient.device),
)
scale_gradient_ = register_operator(
    "scale_gradient_(Tensor(a!) gradient, Tensor upstream) -> ()", _scale_, lambda gradient, upstream: None
)


# ------------------------------------------------------------------------------------------------------ public function


def scaled_gradient(gradient: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """gradient (2-D, private to the node that calls this in its backward) times upstream, in dtype.

    If this backward pass frees the graph, nobody can ask for the gradient again, and the buffer itself is handed out:
    multiplied in place, which the device skips where upstream is 1. If the graph is kept, the buffer stays as it is and
    a new tensor is returned. Which of the two the engine knows; it tells torch's own compiled backward by this name.
    """
    if (
        gradient.dtype == dtype
        and not torch.compiler.is_compiling()
        and not (in_transform() or torch._C._functorch.is_legacy_batchedtensor(upstream))  # several of them at once
        and not torch._C._autograd._get_current_graph_task_keep_graph()
    ):
        scale_gradient_(gradient, upstream)
        return gradient
    return scale_gradient(gradient, upstream, dtype)
