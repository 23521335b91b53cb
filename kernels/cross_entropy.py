"""Cross-entropy between logits and integer labels, computed in fp32 whatever the dtype of the logits.

    loss = logsumexp(logits) - logits[label];   gradient = softmax(logits) - onehot(label)

Labels equal to ``ignore_index`` give no loss and no gradient.

Bytes, for M x V logits of b bytes: the gradient is made in the forward pass, while the logits are in registers, so
loss and gradient cost one read and one write, 2 M V b; a backward pass that came back to the logits would make it 3.
The price is that the upstream gradient is not known yet. The backward pass multiplies by it: nothing to do where it is
1 (decided on the device: ``loss.backward()``), another 2 M V b otherwise.

The gradient at the target, p - 1, is computed as -(sum of the others) / (sum of all): where the target dominates, p
rounds to 1 and the difference would be noise. The loss there is log1p(others), for the same reason.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from halny.kernels.dispatch import (
    check_floating,
    check_same_device,
    launch,
    next_power_of_2,
    once_differentiable,
    register_operator,
    runs_kernel,
    upcast,
)
from halny.kernels.loss_reduction import check_labels, mean_scale, reduce_rows
from halny.kernels.scale_gradient import scaled_gradient


def cross_entropy_reference(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """The definition of ``cross_entropy``, in plain PyTorch."""
    labels = labels.long()  # before comparing: in a narrower type -100 may be a label like any other (uint8's 156)
    flat_logits, flat_labels = upcast(logits).reshape(-1, logits.shape[-1]), labels.reshape(-1)
    loss = F.cross_entropy(flat_logits, flat_labels, ignore_index=ignore_index, reduction=reduction)
    return loss.view(labels.shape) if reduction == "none" else loss


# -------------------------------------------------------------------------------------------------------------- kernels
# One program a row; values without a prefix are scalars of the row. Columns n_columns .. n_touchable - 1 are padding
# that may be read and overwritten but does not count: with n_touchable a multiple of 16 the masks do not forbid 16-byte
# accesses where the vocabulary is odd. PADDED says that there is some.
#
# Instructions count as bytes do: in a cycle an H200 moves 18.6 bytes for each SM (4.3 TB/s, 132 SMs at 1.75 GHz), which
# can issue 128 instructions meanwhile: 27 for a logit's 4 bytes. exp2 is one and flushes denormals; exp is four.

LOG2_E = tl.constexpr(1.4426950408889634)
TIE_BLOCK = tl.constexpr(8_192)


@triton.jit
def _label_and_target(p_row, label, n_columns):
    """The label's column as int32, which costs the comparisons with columns half the registers of int64, and its logit.

    A label outside the vocabulary becomes -1, reads nothing and makes loss and gradient of its row NaN.
    """
    in_range = (label >= 0) & (label < n_columns)
    i_target = tl.where(in_range, label, -1).to(tl.int32)
    return i_target, tl.load(p_row + i_target, mask=in_range, other=float("nan")).to(tl.float32)


@triton.jit
def _loss_of_row(target, largest, others):
    """(logsumexp - target, sum of exp(logits - largest)) from the sum over all columns but the target's."""
    shifted = target - largest
    total = others + tl.exp(shifted)
    # log1p(others) by Kahan's correction: neither total's rounding nor a library function that the interpreter lacks
    excess = tl.where(total == 1.0, 1.0, total - 1.0)
    log1p = tl.where(total == 1.0, others, tl.log(total) * (others / excess))
    return tl.where(shifted == 0.0, log1p, tl.log(total) - shifted), total


@triton.jit
def _is_first(p_row, largest, i_target, n_touchable, BLOCK: tl.constexpr):
    """Whether no column before ``i_target`` has the largest logit too; the row is read again, being in a cache."""
    i_first = i_target
    i_start = 0
    while i_start < i_first:
        i_column = i_start + tl.arange(0, BLOCK)
        b_x = tl.load(p_row + i_column, mask=i_column < n_touchable, other=-float("inf")).to(tl.float32)
        i_first = tl.min(tl.where((b_x == largest) & (i_column < i_target), i_column, i_first), 0)
        i_start += BLOCK
    return i_first == i_target


@triton.jit
def one_block_kernel(
    p_logits, p_labels, p_scale, p_loss, p_correct, p_gradient,
    n_columns, n_touchable, ignore_index,
    logits_stride, gradient_stride, scale_stride,
    WITH_GRADIENT: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The row in registers: read once, written once.

    One program fills an SM, and nothing runs there while it waits: what it reads is asked for at once, an ignored row
    with it, and what is rare, a tie with the largest logit, reads again instead of costing every element.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_column = tl.arange(0, BLOCK)
    p_row, p_row_gradient = p_logits + i_row * logits_stride, p_gradient + i_row * gradient_stride
    b_x = tl.load(p_row + i_column, mask=i_column < n_touchable, other=-float("inf")).to(tl.float32)
    label = tl.load(p_labels + i_row)
    if WITH_GRADIENT:
        scale = tl.load(p_scale + i_row * scale_stride)
    if label == ignore_index:
        tl.store(p_loss + i_row, 0.0)
        tl.store(p_correct + i_row, 0)
        if WITH_GRADIENT:
            tl.store(
                p_row_gradient + i_column, tl.zeros([BLOCK], p_gradient.dtype.element_ty), mask=i_column < n_touchable
            )
    else:
        # In place, this load is ordered before the stores by the barriers of the reductions between them.
        i_target, target = _label_and_target(p_row, label, n_columns)
        if PADDED:
            b_x = tl.where(i_column < n_columns, b_x, -float("inf"))
        b_x = tl.where(i_column == i_target, -float("inf"), b_x)
        rival = tl.max(b_x, 0)
        correct = target > rival
        if target == rival:
            correct = _is_first(p_row, rival, i_target, n_touchable, TIE_BLOCK if BLOCK > TIE_BLOCK else BLOCK)
        largest = tl.maximum(target, rival)
        b_e = tl.exp2((b_x - largest) * LOG2_E)
        others = tl.sum(b_e, 0)
        loss, total = _loss_of_row(target, largest, others)
        tl.store(p_loss + i_row, loss)
        tl.store(p_correct + i_row, correct.to(tl.int32))
        if WITH_GRADIENT:
            factor = scale / total
            b_gradient = (b_e * factor).to(p_gradient.dtype.element_ty)
            tl.store(p_row_gradient + i_column, b_gradient, mask=i_column < n_touchable)
            # The target's own, over the 0 stored there: as a select in the block it costs 8 registers and so a spill
            tl.debug_barrier()
            at_target = (-others * factor).to(p_gradient.dtype.element_ty)
            tl.store(p_row_gradient + i_target, at_target, mask=i_target >= 0)


@triton.jit
def online_kernel(
    p_logits, p_labels, p_scale, p_loss, p_correct, p_gradient,
    n_columns, n_touchable, ignore_index,
    logits_stride, gradient_stride, scale_stride,
    WITH_GRADIENT: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A row too long for registers: maximum and sum in one pass (Milakov and Gimelshein 2018), the gradient in another.
    Without a gradient one pass is all there is, whatever the length, and nothing need be kept.

    The second pass reads what the first left in L2: 132 rows of 128,256 in bf16 are 34 MB.
    No loop is a range, for triton 3.6's interpreter: see rms_norm_backward_kernel.
    """
    i_row = tl.program_id(0).to(tl.int64)
    label = tl.load(p_labels + i_row)
    p_row_gradient = p_gradient + i_row * gradient_stride
    if label == ignore_index:
        tl.store(p_loss + i_row, 0.0)
        tl.store(p_correct + i_row, 0)
        if WITH_GRADIENT:
            b_zero = tl.zeros([BLOCK], p_gradient.dtype.element_ty)
            i_start = 0
            while i_start < n_touchable:
                i_column = i_start + tl.arange(0, BLOCK)
                tl.store(p_row_gradient + i_column, b_zero, mask=i_column < n_touchable)
                i_start += BLOCK
    else:
        p_row = p_logits + i_row * logits_stride
        i_target, target = _label_and_target(p_row, label, n_columns)

        rival = -float("inf")
        others = 0.0
        i_start = 0
        while i_start < n_columns:
            i_column = i_start + tl.arange(0, BLOCK)
            b_x = tl.load(
                p_row + i_column,
                mask=i_column < n_touchable,
                other=-float("inf"),
                eviction_policy="evict_last" if WITH_GRADIENT else "evict_first",
            ).to(tl.float32)
            if PADDED:
                b_x = tl.where(i_column < n_columns, b_x, -float("inf"))
            b_x = tl.where(i_column == i_target, -float("inf"), b_x)
            new_rival = tl.maximum(rival, tl.max(b_x, 0))
            shift = tl.where(new_rival == -float("inf"), 0.0, new_rival)  # -inf - -inf is NaN
            others = others * tl.exp2((rival - shift) * LOG2_E) + tl.sum(tl.exp2((b_x - shift) * LOG2_E), 0)
            rival = new_rival
            i_start += BLOCK
        correct = target > rival
        if target == rival:
            correct = _is_first(p_row, rival, i_target, n_touchable, BLOCK)
        largest = tl.maximum(target, rival)
        others *= tl.where(rival == largest, 1.0, tl.exp2((rival - largest) * LOG2_E))
        loss, total = _loss_of_row(target, largest, others)
        tl.store(p_loss + i_row, loss)
        tl.store(p_correct + i_row, correct.to(tl.int32))
        if WITH_GRADIENT:
            factor = tl.load(p_scale + i_row * scale_stride) / total
            i_start = 0
            while i_start < n_touchable:
                i_column = i_start + tl.arange(0, BLOCK)
                b_x = tl.load(
                    p_row + i_column, mask=i_column < n_touchable, other=-float("inf"), eviction_policy="evict_first"
                ).to(tl.float32)
                if PADDED:
                    b_x = tl.where(i_column < n_columns, b_x, -float("inf"))
                b_gradient = tl.where(i_column == i_target, -others, tl.exp2((b_x - largest) * LOG2_E)) * factor
                tl.store(
                    p_row_gradient + i_column,
                    b_gradient.to(p_gradient.dtype.element_ty),
                    mask=i_column < n_touchable,
                )
                i_start += BLOCK


# ------------------------------------------------------------------------------------------------ launchers, operators

# Up to here a row fits the registers of one program: 32 fp32 values for each of 1024 threads, which have 64 registers.
# bf16 rows take 63 or 64, padded ones too; fp32 rows, and unpadded ones of an odd length, spill some into L1 (ptxas).
ONE_BLOCK = 32_768
ONLINE_BLOCK, ONLINE_WARPS = 16_384, 32  # one program an SM, so that the rows in flight stay in L2 for the second pass
LOSS_BLOCK, LOSS_WARPS = 4_096, 8  # without a second pass, several programs an SM


def _tile(vocab_size: int, with_gradient: bool):
    """(kernel, BLOCK, num_warps) for a vocabulary."""
    if not with_gradient and vocab_size > LOSS_BLOCK:
        return online_kernel, LOSS_BLOCK, LOSS_WARPS
    if vocab_size > ONE_BLOCK:
        return online_kernel, ONLINE_BLOCK, ONLINE_WARPS
    block = max(128, next_power_of_2(vocab_size))
    return one_block_kernel, block, min(32, max(4, block // 1024))


def launch_rows(
    logits: Tensor,
    labels: Tensor,
    scale: Tensor,
    ignore_index: int,
    loss: Tensor,
    correct: Tensor,
    gradient: Tensor | None,
    n_touchable: int | None = None,
) -> None:
    """Fill loss and correct [M], and gradient [M, V] times scale (a scalar or [M]), which may be logits themselves."""
    n_columns = logits.shape[1]
    n_touchable = n_touchable or n_columns
    kernel, block, num_warps = _tile(n_columns, gradient is not None)
    written = logits if gradient is None else gradient
    launch(
        kernel,
        (logits.shape[0],),
        logits, labels, scale, loss, correct, written,
        n_columns, n_touchable, ignore_index,
        logits.stride(0), written.stride(0), scale.stride(0) if scale.ndim else 0,
        WITH_GRADIENT=gradient is not None, PADDED=n_touchable != n_columns, BLOCK=block, num_warps=num_warps,
    )  # fmt: skip


def _rows_outputs(logits: Tensor) -> tuple[Tensor, Tensor]:
    loss = torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    return loss, torch.empty(logits.shape[0], dtype=torch.int32, device=logits.device)


def _gradient_buffer(logits: Tensor, with_gradient: bool) -> Tensor:
    # fp16 has no range to spare for a gradient that is yet to be multiplied: p / n of a rare token would become 0
    dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    return torch.empty(logits.shape if with_gradient else (0,), dtype=dtype, device=logits.device)


def _rows(logits: Tensor, labels: Tensor, scale: Tensor, ignore_index: int, with_gradient: bool):
    loss, correct = _rows_outputs(logits)
    gradient = _gradient_buffer(logits, with_gradient)
    launch_rows(logits, labels, scale, ignore_index, loss, correct, gradient if with_gradient else None)
    return loss, correct, gradient


def _rows_(logits: Tensor, labels: Tensor, scale: Tensor, ignore_index: int):
    loss, correct = _rows_outputs(logits)
    launch_rows(logits, labels, scale, ignore_index, loss, correct, logits)
    return loss, correct


cross_entropy_rows = register_operator(
    "cross_entropy_rows(Tensor logits, Tensor labels, Tensor scale, int ignore_index, bool with_gradient)"
    " -> (Tensor loss, Tensor correct, Tensor gradient)",
    _rows,
    lambda logits, labels, scale, ignore_index, with_gradient: (
        *_rows_outputs(logits),
        _gradient_buffer(logits, with_gradient),
    ),
)
cross_entropy_rows_ = register_operator(
    "cross_entropy_rows_(Tensor(a!) logits, Tensor labels, Tensor scale, int ignore_index)"
    " -> (Tensor loss, Tensor correct)",
    _rows_,
    lambda logits, labels, scale, ignore_index: _rows_outputs(logits),
)


# ------------------------------------------------------------------------------------------------------------- autograd


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, ignore_index, reduction):
        n_tokens, scale = mean_scale(labels, ignore_index, reduction)
        loss, _, gradient = cross_entropy_rows(logits, labels, scale, ignore_index, True)
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return reduce_rows(loss, n_tokens, reduction)

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        (gradient,) = ctx.saved_tensors
        return scaled_gradient(gradient, upstream, ctx.dtype), None, None, None


class _CrossEntropyInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, ignore_index, reduction):
        rows, flat_labels = logits.view(-1, logits.shape[-1]), labels.reshape(-1).long().contiguous()
        ctx.has_kernel = runs_kernel(logits) and logits.dtype != torch.float64
        if ctx.has_kernel:
            n_tokens, scale = mean_scale(flat_labels, ignore_index, reduction)
            loss, _ = cross_entropy_rows_(rows, flat_labels, scale, ignore_index)
            loss = reduce_rows(loss, n_tokens, reduction)
        else:
            with torch.enable_grad():
                leaf = rows.detach().requires_grad_()
                loss = cross_entropy_reference(leaf, flat_labels, ignore_index=ignore_index, reduction=reduction)
                (gradient,) = torch.autograd.grad(loss.sum(), leaf)
            rows.copy_(gradient)
        ctx.shape = logits.shape
        ctx.mark_dirty(logits)
        ctx.set_materialize_grads(False)
        # Not save_for_backward, whose version check would find the scaling in place of the backward pass itself
        ctx.gradient = rows.detach()
        return loss.detach().view(labels.shape if reduction == "none" else ()), logits

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, upstream_of_logits):
        if upstream_of_logits is not None:
            raise RuntimeError(
                "cross_entropy_ overwrote logits with their gradient, and something used them afterwards"
            )
        if upstream is None:
            return None, None, None, None
        upstream = upstream.reshape(-1) if upstream.ndim else upstream
        if ctx.has_kernel:
            gradient = scaled_gradient(ctx.gradient, upstream, ctx.gradient.dtype)
        else:
            gradient = ctx.gradient * (upstream[:, None] if upstream.ndim else upstream).to(ctx.gradient.dtype)
        return gradient.view(ctx.shape), None, None, None


# ----------------------------------------------------------------------------------------------------- public functions


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """``torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=..., reduction=...)`` over the last dim.

    logits [..., V] of any floating dtype, labels [...] of any integer dtype -> fp32 (fp64 for fp64 logits): a scalar
    for "mean" (NaN if every label is ignored, as in PyTorch) and "sum", [...] for "none". logits are not overwritten.

    Everything is computed in fp32; the gradient is rounded once to the dtype of logits, and once more where the
    upstream gradient is not 1 (for fp16 it is held in fp32 until then). If logits need a gradient, the forward pass
    makes it and saves it instead of the logits: one buffer of their size. Rows of logits whose last dimension is not
    contiguous are copied. On the kernel's path a label out of range that is not checked makes its row NaN.

    Raises TypeError for wrong kinds of tensors; ValueError for shapes or devices that do not fit, an unknown reduction,
    or a label outside 0 .. V - 1 that is not ignore_index (on CUDA tensors only under ``dispatch.set_debug_checks``).
    """
    _check(logits, labels, ignore_index, reduction)
    if not runs_kernel(logits) or logits.dtype == torch.float64:
        return cross_entropy_reference(logits, labels, ignore_index=ignore_index, reduction=reduction)
    rows, flat_labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).long().contiguous()
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if torch.is_grad_enabled() and logits.requires_grad:
        loss = _CrossEntropy.apply(rows, flat_labels, ignore_index, reduction)
    else:
        n_tokens, scale = mean_scale(flat_labels, ignore_index, reduction)
        loss = reduce_rows(cross_entropy_rows(rows, flat_labels, scale, ignore_index, False)[0], n_tokens, reduction)
    return loss.view(labels.shape) if reduction == "none" else loss


def cross_entropy_(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """``cross_entropy``, with logits OVERWRITTEN by their gradient (times 1 / n for "mean"): no second buffer.

    logits [..., V], with rows evenly spaced and contiguous, and neither a leaf that requires a gradient nor a view of
    another tensor. If no gradient is to be made, this is ``cross_entropy`` and logits stay what they are.

    Another branch that uses the logits is safe or loud: one that needs them for its own backward pass fails autograd's
    version check; one that takes them afterwards computes with the gradient's values, and this function's backward
    raises if a gradient comes back from there. A softmax taken before is safe, because it saves its own output.
    A backward pass that frees the graph multiplies the same buffer by the upstream gradient and hands it to autograd.
    torch.compile(fullgraph=True) refuses it; cross_entropy compiles.

    Raises as ``cross_entropy``; TypeError for fp16 logits, whose gradient may vanish before it is scaled; ValueError
    for rows that are not as above; autograd's own RuntimeError for a leaf or a view.
    """
    _check(logits, labels, ignore_index, reduction)
    if logits.dtype == torch.float16:
        raise TypeError("logits must not be fp16: a gradient that is scaled later would vanish in it")
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)
    try:
        rows = logits.detach().view(-1, logits.shape[-1])
    except RuntimeError:
        rows = None
    if rows is None or rows.stride(1) != 1:
        raise ValueError(f"logits must have contiguous rows at one distance to be overwritten, got {logits.stride()}")
    loss, _ = _CrossEntropyInPlace.apply(logits, labels, ignore_index, reduction)
    return loss


def _check(logits: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> None:
    check_floating("logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V at least 1, got {tuple(logits.shape)}")
    check_labels(labels, logits.shape[:-1], logits.shape[-1], ignore_index, reduction)
    check_same_device(logits=logits, labels=labels)
