"""Cross-entropy between logits and integer labels, computed in fp32 whatever the dtype of the logits.

    loss = logsumexp(logits) - logits[label];   gradient = softmax(logits) - onehot(label)

Labels equal to ``ignore_index`` give no loss and no gradient.

Bytes, for M x V logits of b bytes: the gradient is made in the forward pass, while a row is in registers and caches, so
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
    cdiv,
    check_floating,
    check_overwritable,
    check_same_device,
    in_transform,
    launch,
    next_power_of_2,
    once_differentiable,
    register_operator,
    runs_kernel,
    upcast,
    wants_gradient,
)
from halny.kernels.loss_reduction import check_labels, mean_scale, reduce_rows
from halny.kernels.scale_gradient import scaled_gradient
from halny.kernels.stochastic_rounding import widened


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
# can issue 128 instructions meanwhile, 27 for a logit's 4 bytes, and 16 exponentials, 3.4 for a logit. Without a
# gradient it is half of each. So nothing that is rare costs every element: neither the target, which must not be in the
# sum of the others, nor a tie with the largest logit, nor the end of the row. exp2 is one instruction and flushes
# denormals; exp is four.
#
# And no thread waits for another before the row's end: each keeps the maximum and the sum of the exponentials of its
# own columns (Milakov and Gimelshein 2018, for each thread), which are put together once. A block of [ROWS, LANES,
# VECTOR] logits is laid out as it is loaded: VECTOR neighbours are a thread's 16 bytes, LANES are the threads.

LOG2_E = tl.constexpr(1.4426950408889634)
PADDING = tl.constexpr(64)  # the most columns of it


@triton.jit
def _accumulate(b_most, b_sum, b_x):
    """Each thread's maximum, and its sum of exp(x - maximum), with another block; and the block's exp(x - maximum)."""
    b_new = tl.maximum(b_most, tl.max(tl.max(b_x, 0), 1))
    b_shift = tl.where(b_new == -float("inf"), 0.0, b_new)  # -inf - -inf is NaN
    b_e = tl.exp2((b_x - b_shift[None, :, None]) * LOG2_E)
    return b_new, b_sum * tl.exp2((b_most - b_shift) * LOG2_E) + tl.sum(tl.sum(b_e, 0), 1), b_e


@triton.jit
def _label_and_target(p_row, label, n_columns):
    """The label's column as int32 and its logit.

    A label outside the vocabulary becomes -1, reads nothing and makes loss and gradient of its row NaN.
    """
    in_range = (label >= 0) & (label < n_columns)
    i_target = tl.where(in_range, label, -1).to(tl.int32)
    return i_target, tl.load(p_row + i_target, mask=in_range, other=float("nan")).to(tl.float32)


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
def _loss_of_row(target, largest, others):
    """(logsumexp - target, sum of exp(logits - largest)) from the sum over all columns but the target's."""
    shifted = target - largest
    total = others + tl.exp(shifted)
    # log1p(others) by Kahan's correction: neither total's rounding nor a library function that the interpreter lacks
    excess = tl.where(total == 1.0, 1.0, total - 1.0)
    log1p = tl.where(total == 1.0, others, tl.log(total) * (others / excess))
    return tl.where(shifted == 0.0, log1p, tl.log(total) - shifted), total


@triton.jit
def cross_entropy_kernel(
    p_logits, p_labels, p_scale, p_loss, p_correct, p_gradient,
    n_columns, n_touchable, ignore_index,
    logits_stride, gradient_stride, scale_stride,
    WITH_GRADIENT: tl.constexpr, PADDED: tl.constexpr,
    VECTOR: tl.constexpr, LANES: tl.constexpr, BLOCK: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Maxima and sums from the row's start to its end, then the gradient from its end to its start.

    The last block is still in registers then, and those before it are the likelier to be in L1 or L2 the later they
    were read: a row crosses the memory bus once in each direction, whatever its length.
    No loop is a range, for triton 3.6's interpreter: see rms_norm_backward_kernel.
    """
    i_row = tl.program_id(0).to(tl.int64)
    label = tl.load(p_labels + i_row)
    p_row, p_row_gradient = p_logits + i_row * logits_stride, p_gradient + i_row * gradient_stride
    i_block, i_lane = tl.arange(0, BLOCK), tl.arange(0, LANES)
    if label == ignore_index:
        tl.store(p_loss + i_row, 0.0)
        tl.store(p_correct + i_row, 0)
        if WITH_GRADIENT:
            b_zero = tl.zeros([BLOCK], p_gradient.dtype.element_ty)
            i_start = 0
            while i_start < n_touchable:
                tl.store(p_row_gradient + i_start + i_block, b_zero, mask=i_start + i_block < n_touchable)
                i_start += BLOCK
    else:
        if PADDED:  # becomes -inf, so that nothing below need know of it
            i_padding = n_columns + tl.arange(0, PADDING)
            tl.store(p_row + i_padding, -float("inf"), mask=i_padding < n_touchable)
            tl.debug_barrier()

        SHAPE: tl.constexpr = [BLOCK // (LANES * VECTOR), LANES, VECTOR]
        KEEP: tl.constexpr = "evict_last" if WITH_GRADIENT else "evict_first"
        b_most = tl.full([LANES], -float("inf"), tl.float32)
        b_sum = tl.zeros([LANES], tl.float32)
        i_start = 0
        while i_start + BLOCK < n_touchable:
            b_x = widened(tl.load(p_row + i_start + i_block, eviction_policy=KEEP))
            b_most, b_sum, _ = _accumulate(b_most, b_sum, tl.reshape(b_x, SHAPE))
            i_start += BLOCK
        m_last = i_start + i_block < n_touchable
        b_last = tl.load(p_row + i_start + i_block, mask=m_last, other=-float("inf"), eviction_policy="evict_first")
        b_x = widened(b_last)
        b_most, b_sum, b_e = _accumulate(b_most, b_sum, tl.reshape(b_x, SHAPE))
        b_most_with_target = b_most  # what b_e is relative to

        # The thread that had the target: its columns once more without it, dealt out among all threads
        i_target, target = _label_and_target(p_row, label, n_columns)
        if WITH_GRADIENT:
            scale = tl.load(p_scale + i_row * scale_stride)
        i_target_lane = tl.maximum(i_target, 0) // VECTOR % LANES
        i = tl.arange(0, LANES * AGAIN)
        i_again = i // VECTOR * (LANES * VECTOR) + i_target_lane * VECTOR + i % VECTOR
        m_again = (i_again < n_columns) & (i_again != i_target)
        b_again = widened(tl.load(p_row + i_again, mask=m_again, other=-float("inf")))
        b_most = tl.where(i_lane == i_target_lane, -float("inf"), b_most)  # which makes 0 of its sum
        b_most, b_sum, _ = _accumulate(b_most, b_sum, tl.reshape(b_again, [1, LANES, AGAIN]))

        # In place, the loads so far come before the stores, which need what these two reductions make of all of them.
        rival = tl.max(b_most, 0)
        correct = target > rival
        if target == rival:
            correct = _is_first(p_row, rival, i_target, n_touchable, LANES * VECTOR)
        largest = tl.maximum(target, rival)
        others = tl.sum(b_sum * tl.exp2((b_most - largest) * LOG2_E), 0)
        loss, total = _loss_of_row(target, largest, others)
        tl.store(p_loss + i_row, loss)
        tl.store(p_correct + i_row, correct.to(tl.int32))
        if WITH_GRADIENT:
            factor = scale / total
            b_factor = tl.exp2((b_most_with_target - largest) * LOG2_E) * factor
            b_gradient = tl.reshape(b_e * b_factor[None, :, None], [BLOCK]).to(p_gradient.dtype.element_ty)
            tl.store(p_row_gradient + i_start + i_block, b_gradient, mask=m_last)
            while i_start > 0:
                i_start -= BLOCK
                b_x = widened(tl.load(p_row + i_start + i_block, eviction_policy="evict_first"))
                b_gradient = (tl.exp2((b_x - largest) * LOG2_E) * factor).to(p_gradient.dtype.element_ty)
                tl.store(p_row_gradient + i_start + i_block, b_gradient)
            # The target's own, over what its exponential left there
            tl.debug_barrier()
            at_target = (-others * factor).to(p_gradient.dtype.element_ty)
            tl.store(p_row_gradient + i_target, at_target, mask=i_target >= 0)


# ------------------------------------------------------------------------------------------------ launchers, operators

# A block is 64 logits for each thread. Programs are small and several an SM, so that one row's loads go on behind
# another row's arithmetic: 4 or 5 with a gradient (sm_90), 5 or 6 without. What they have read and not yet written is
# half a row each on average, some 128 KB an SM at 32,000 columns in bf16, which L1 holds.
WARP_BLOCK, BLOCK = 2_048, 8_192
# Of long rows that are read twice only 2 an SM, since L2 must hold them: half of each is 34 MB at 131,072 columns.
LONG, LONG_BLOCK = 65_536, 16_384


def _tile(logits: Tensor, with_gradient: bool) -> dict[str, int]:
    """The launch constants for rows of logits."""
    vocab_size = logits.shape[1]
    block = min(next_power_of_2(vocab_size), LONG_BLOCK if with_gradient and vocab_size > LONG else BLOCK)
    num_warps = max(1, block // WARP_BLOCK)
    if logits.stride(0) % 16 == 0 and logits.data_ptr() % 16 == 0:  # as Triton's specialisation asks
        vector = 16 // logits.element_size()
    else:  # An instruction for each logit: 64 of them, and their addresses, would not fit the registers
        vector, block = 1, block // 8
    block = max(block, 32 * vector)
    lanes = min(32 * num_warps, block // vector)
    again = next_power_of_2(cdiv(cdiv(vocab_size, lanes * vector) * vector, lanes))
    return {"VECTOR": vector, "LANES": lanes, "BLOCK": block, "AGAIN": again, "num_warps": num_warps}


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
    """Fill loss and correct [M], and gradient [M, V] times scale (a scalar or [M]), which may be logits themselves.

    With n_touchable above V, up to PADDING columns behind the vocabulary are overwritten, without a gradient too.
    """
    n_columns = logits.shape[1]
    n_touchable = n_touchable or n_columns
    written = logits if gradient is None else gradient
    launch(
        cross_entropy_kernel,
        (logits.shape[0],),
        logits, labels, scale, loss, correct, written,
        n_columns, n_touchable, ignore_index,
        logits.stride(0), written.stride(0), scale.stride(0) if scale.ndim else 0,
        WITH_GRADIENT=gradient is not None, PADDED=n_touchable != n_columns,
        **_tile(logits, gradient is not None),
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
    def forward(ctx, whole, rows, labels, ignore_index, reduction):
        """rows: whole as [M, V], detached; what is written through it has been written to whole."""
        flat_labels = labels.reshape(-1).long().contiguous()
        ctx.has_kernel = _runs_kernel(rows)
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
        ctx.shape = whole.shape
        ctx.mark_dirty(whole)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(rows)
        return loss.detach().view(labels.shape if reduction == "none" else ()), whole

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, upstream_of_logits):
        if upstream_of_logits is not None:
            raise RuntimeError(
                "cross_entropy_ overwrote logits with their gradient, and something used them afterwards"
            )
        if upstream is None:
            return None, None, None, None, None
        (gradient,) = ctx.saved_tensors
        upstream = upstream.reshape(-1) if upstream.ndim else upstream
        if ctx.has_kernel:
            gradient = scaled_gradient(gradient, upstream, gradient.dtype)
        else:
            gradient = gradient * (upstream[:, None] if upstream.ndim else upstream).to(gradient.dtype)
        return gradient.view(ctx.shape), None, None, None, None


# ----------------------------------------------------------------------------------------------------- public functions


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """``torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=..., reduction=...)`` over the last dim.

    logits [..., V] of any floating dtype, labels [...] of any integer dtype -> fp32 (fp64 for fp64 logits): a scalar
    for "mean" (NaN if every label is ignored, as in PyTorch) and "sum", [...] for "none". logits are not overwritten.

    Everything is computed in fp32; the gradient is rounded once to the dtype of logits, and once more where the
    upstream gradient is not 1 (for fp16 it is held in fp32 until then). If logits need a gradient, the forward pass
    makes it and saves it instead of the logits: one buffer of their size. Rows of logits whose last dimension is not
    contiguous are copied. fp64 and a V of 1 run the reference. On the kernel's path a label out of range that is not
    checked makes its row NaN.

    Raises TypeError for wrong kinds of tensors; ValueError for shapes or devices that do not fit, an unknown reduction,
    or a label outside 0 .. V - 1 that is not ignore_index (on CUDA tensors only under ``dispatch.set_debug_checks``).
    """
    _check(logits, labels, ignore_index, reduction)
    if not _runs_kernel(logits):
        return cross_entropy_reference(logits, labels, ignore_index=ignore_index, reduction=reduction)
    rows, flat_labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).long().contiguous()
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    if wants_gradient(logits):
        loss = _CrossEntropy.apply(rows, flat_labels, ignore_index, reduction)
    else:
        n_tokens, scale = mean_scale(flat_labels, ignore_index, reduction)
        loss = reduce_rows(cross_entropy_rows(rows, flat_labels, scale, ignore_index, False)[0], n_tokens, reduction)
    return loss.view(labels.shape) if reduction == "none" else loss


def cross_entropy_(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """``cross_entropy``, with logits OVERWRITTEN by their gradient (times 1 / n for "mean"): no second buffer.

    logits [..., V], with rows evenly spaced and contiguous, not a leaf that requires a gradient; a view, such as
    ``logits.view(-1, V)``, if it shows all of a contiguous tensor, which is then what is overwritten. If no gradient is
    to be made, this is ``cross_entropy`` and logits stay what they are.

    Another branch that uses the logits is safe or loud: one that needs them for its own backward pass fails autograd's
    version check; one that takes them afterwards computes with the gradient's values, and this function's backward
    raises if a gradient comes back from there. A softmax taken before is safe, because it saves its own output.
    A backward pass that frees the graph multiplies the same buffer by the upstream gradient and hands it to autograd.
    torch.compile(fullgraph=True) refuses it; cross_entropy compiles.

    Raises before anything is written: as ``cross_entropy``; TypeError for fp16 logits, whose gradient may vanish before
    it is scaled; ValueError for rows that are not as above; RuntimeError for a leaf, for a view of a part or with
    hooks, and inside torch.func's transforms, forward-mode levels and torch.export.
    """
    _check(logits, labels, ignore_index, reduction)
    if logits.dtype == torch.float16:
        raise TypeError("logits must not be fp16: a gradient that is scaled later would vanish in it")
    if not wants_gradient(logits):
        return cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)
    if in_transform():
        raise RuntimeError("cross_entropy_ overwrites logits, which no transform or export follows: use cross_entropy")
    check_overwritable("logits", logits, "cross_entropy")
    try:
        rows = logits.detach().view(-1, logits.shape[-1])
    except RuntimeError:
        rows = None
    if rows is None or rows.stride(1) != 1:
        raise ValueError(f"logits must have contiguous rows at one distance to be overwritten, got {logits.stride()}")
    loss, _ = _CrossEntropyInPlace.apply(_whole(logits), rows, labels, ignore_index, reduction)
    return loss


def _runs_kernel(logits: Tensor) -> bool:
    # triton 3.6 cannot compile the kernel for a vocabulary of one word: of the argument 1 it makes a constant, and its
    # pass "coalesce" fails at a while loop that ends there
    return runs_kernel(logits) and logits.dtype != torch.float64 and logits.shape[-1] > 1


def _whole(logits: Tensor) -> Tensor:
    """The tensor that a view shows all of: a Function with two outputs may overwrite it, but not a view of it."""
    if not logits._is_view():
        return logits
    whole, node = logits._base, logits.grad_fn
    if not (logits.is_contiguous() and whole.is_contiguous() and logits.numel() == whole.numel()):
        raise RuntimeError(
            f"logits {tuple(logits.shape)} is a view of a part of a tensor {tuple(whole.shape)}, which autograd cannot "
            "overwrite here: use cross_entropy, or pass the whole tensor"
        )
    hooked = bool(logits._backward_hooks)
    while node is not None and node is not whole.grad_fn:
        hooked |= isinstance(node, torch.autograd.function.BackwardCFunction)
        node = node.next_functions[0][0]
    if hooked:
        raise RuntimeError("logits is a view with a backward hook, which would not be called: use cross_entropy")
    return whole


def _check(logits: Tensor, labels: Tensor, ignore_index: int, reduction: str) -> None:
    check_floating("logits", logits)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits must be [..., V] with V at least 1, got {tuple(logits.shape)}")
    check_labels(labels, logits.shape[:-1], logits.shape[-1], ignore_index, reduction)
    check_same_device(logits=logits, labels=labels)
