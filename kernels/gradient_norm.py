"""The norm of all gradients together, sqrt(sum x^2): one pass over them, and one launch for each tensor.

A program writes the norm of BLOCK_BYTES of one tensor, made in fp32, into a buffer that all tensors share; the norm of
those norms is made in fp64. Every sum has one order, which the GPU's load does not decide, and nothing is added
atomically: equal gradients have equal norms to the bit, and a resumed run clips as an uninterrupted one would. The
error is that of adding a thread's 64 squares and 256 threads in fp32: below 2^-18 of the norm, however many weights.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from halny.kernels.dispatch import cdiv, launch, runs_kernel

# Reading alone is a matter of bytes in flight: 256 threads with eight loads of 16 bytes each, in 32 registers, so that
# an SM has 2,048 threads with some on their way. Short programs also end together: none runs last and alone.
BLOCK_BYTES, NUM_WARPS = 32768, 8


def gradient_norm_reference(tensors: list[Tensor]) -> Tensor:
    """The definition of ``gradient_norm``: PyTorch's norm of each tensor in fp32, and of these norms in fp64."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    norms = torch._foreach_norm(tensors, 2, dtype=torch.float32)  # clip_grad_norm_'s own
    return torch.linalg.vector_norm(torch.stack(norms).double())


@triton.jit(do_not_specialize=["first"])
def block_norms_kernel(p_x, p_norms, n, first, BLOCK: tl.constexpr):
    i_start = tl.program_id(0).to(tl.int64) * BLOCK
    o_block = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + i_start + o_block, mask=i_start + o_block < n, other=0.0).to(tl.float32)
    tl.store(p_norms + first + tl.program_id(0), tl.sqrt(tl.sum(b_x * b_x)))


@torch.no_grad()
def gradient_norm(tensors: list[Tensor]) -> Tensor:
    """``torch.nn.utils.get_total_norm(tensors).double()``: the 2-norm of all elements of all tensors, fp64, no wait.

    tensors: bf16 or fp32, contiguous, on one device; empty ones count nothing. Squares and their sums are fp32 within
    a block, as PyTorch's within a tensor: elements from 2^64 on make it inf. An inf makes it inf, a NaN NaN.
    No autograd. Reads each element once.

    Raises TypeError for other dtypes, ValueError for strides or devices that do not fit.
    """
    for x in tensors:
        if not isinstance(x, Tensor) or x.dtype not in (torch.bfloat16, torch.float32):
            raise TypeError(f"gradients must be bf16 or fp32 tensors, got {getattr(x, 'dtype', type(x).__name__)}")
        if not x.is_contiguous():
            raise ValueError(f"gradients must be contiguous, got strides {x.stride()}")
        if x.device != tensors[0].device:
            raise ValueError(f"gradients must be on one device, got {tensors[0].device} and {x.device}")
    if not tensors or not runs_kernel(tensors[0]):
        return gradient_norm_reference(tensors)
    programs = [cdiv(x.numel() * x.element_size(), BLOCK_BYTES) for x in tensors]
    norms = torch.empty(sum(programs), dtype=torch.float32, device=tensors[0].device)
    first = 0
    for x, n_programs in zip(tensors, programs, strict=True):
        if n_programs:
            constants = dict(BLOCK=BLOCK_BYTES // x.element_size(), num_warps=NUM_WARPS)
            launch(block_norms_kernel, (n_programs,), x, norms, x.numel(), first, **constants)
        first += n_programs
    return torch.linalg.vector_norm(norms, dtype=torch.float64)
