"""FSDP2's copy of gradients into the input of a reduce-scatter, cast on the way: ``torch.ops.fsdp.chunk_cat``.

Rank r of R is to receive its rows of every gradient, one after another, so with n_t elements a rank of tensor t

    out[r, o_t + i] = float(x_t[r n_t + i]),   o_t = n_0 + ... + n_(t-1)

**Bytes.** b + 4 an element: at 7B 43.5 GB a step, on the stream that computes, where nothing hides them. PyTorch's
kernel, which does not vectorise a copy that casts, took 21.7 ms for them on an H200, 2.0 TB/s; at the rate of a plain
copy there they take 10.2. PyTorch launches once for a list of tensors, this file once for each of them.

**How FSDP comes to run it.** FSDP2 calls the operator through PyTorch's dispatcher, which has an implementation for
each kind of device, and torch.library lets a later one take an earlier one's place. ``use_in_fsdp`` puts this one in
place for CUDA. No line of FSDP is patched, and what the kernel is not made for goes to the function that all of FSDP's
own implementations call, ``torch._chunk_cat``. Delete the file when that reaches a copy's speed.
"""

import functools
import warnings
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from halny.kernels import dispatch
from halny.kernels.dispatch import INTERPRETED, cdiv, check_no_gradient, launch, runs_kernel


def chunk_cat_reference(tensors: Sequence[Tensor], dim: int, num_chunks: int, *, out: Tensor) -> None:
    """The definition of ``chunk_cat`` where rows divide by the chunks, in plain PyTorch."""
    assert dim == 0
    out.copy_(torch.cat([x.reshape(num_chunks, -1) for x in tensors], dim=1))


# --------------------------------------------------------------------------------------------------------------- kernel

BLOCK, NUM_WARPS = 2048, 4  # two 16-byte loads of bf16 and four stores a thread, in registers for full occupancy


@triton.jit
def chunk_cat_kernel(
    p_x, p_out,
    n,
    out_stride,
    BLOCK: tl.constexpr,
):  # fmt: skip
    pieces = tl.cdiv(n, BLOCK)  # of a row
    i_row = (tl.program_id(0) // pieces).to(tl.int64)
    i_column = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    m = i_column < n
    b_x = tl.load(p_x + i_row * n + i_column, mask=m, other=0.0).to(tl.float32)
    tl.store(p_out + i_row * out_stride + i_column, b_x, mask=m)


# ----------------------------------------------------------------------------------------------------- public functions


def chunk_cat(tensors: Sequence[Tensor], dim: int, num_chunks: int, *, out: Tensor) -> None:
    """``torch._chunk_cat(tensors, dim, num_chunks, out=out)``, to the bit, NaNs included.

    tensors [num_chunks m_t, ...], bf16 or fp32 -> out [num_chunks, sum of m_t ...], fp32, contiguous. Whatever
    else there is, PyTorch does: rows that do not divide, which it pads with zeros, other layouts, dtypes and devices.
    Raises RuntimeError where a gradient is wanted.
    """
    check_no_gradient("torch.no_grad()", **{f"tensors[{i}]": x for i, x in enumerate(tensors)}, out=out)
    if not (runs_kernel(out) and fits(tensors, dim, num_chunks, out)):
        torch._chunk_cat(tensors, dim, num_chunks, out=out)
        return
    start = 0
    for x in tensors:
        n = x.numel() // num_chunks
        launch(
            chunk_cat_kernel, (num_chunks * cdiv(n, BLOCK),),
            x, out[:, start : start + n], n, out.stride(0), BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
        start += n


def fits(tensors: Sequence[Tensor], dim: int, num_chunks: int, out: Tensor) -> bool:
    """Whether the kernel makes of them what PyTorch makes: nothing to pad, nothing to round."""
    return (
        dim == 0
        and num_chunks > 0
        and out.dtype == torch.float32
        and out.is_contiguous()
        and all(
            x.dtype in (torch.bfloat16, torch.float32)
            and x.device == out.device
            and x.is_contiguous()
            and x.numel() > 0
            for x in tensors
        )
        and out.shape == (num_chunks, sum(x.numel() for x in tensors) // num_chunks)  # wider if a tensor is padded
    )


@functools.cache
def use_in_fsdp() -> bool:
    """Let every FSDP2 model of this process copy its gradients with ``chunk_cat``, on CUDA. Once; later calls are free.

    In Triton's interpreter on the CPU as well. False, with a warning, where this torch's operator is not, or no longer
    does, what the kernel does in its place: FSDP then runs as it is.
    """
    import torch.distributed.fsdp  # defines and implements the operator

    try:
        operator = torch.ops.fsdp.chunk_cat.default
        x, y = torch.arange(12.0, device="cpu").view(4, 3).bfloat16(), torch.arange(4.0, device="cpu").bfloat16()
        theirs, ours = torch.empty(2, 2, 8, device="cpu")
        operator([x, y], dim=0, num_chunks=2, out=theirs)
        chunk_cat_reference([x, y], dim=0, num_chunks=2, out=ours)
        if not torch.equal(theirs, ours):
            raise ValueError("fsdp::chunk_cat lays gradients out in another way")
        library = torch.library.Library("fsdp", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*[Oo]verrid")  # which is what we are here for
            for device in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
                library.impl("chunk_cat", chunk_cat, device, allow_override=True)
    except (AttributeError, TypeError, RuntimeError, ValueError) as error:
        warnings.warn(
            f"torch {torch.__version__}: FSDP copies gradients by its own kernel, not by kernels/chunk_cat.py: {error}",
            stacklevel=2,
        )
        return False
    _libraries.append(library)
    dispatch.implementations[operator] = chunk_cat  # for bench/account.py, whose tensors are not on CUDA
    return True


_libraries: list[torch.library.Library] = []  # an implementation lives as long as its library
