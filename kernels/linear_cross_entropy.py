"""The language-model head and its loss as one operation: hidden states in; loss, target count and correct count out.

    logits = hidden @ weight.T;   loss = cross_entropy(logits, labels);   correct = (argmax(logits) == label)

One operation, because at V = 32,000 the logits of a 16,384-token micro batch are a gigabyte that nobody needs twice.
They exist a chunk of rows at a time, in one buffer that the gradient overwrites, and so the backward pass is done while
a chunk is there: three matrix products and 2 V b bytes a row, nothing computed twice.

Per chunk: logits = hidden @ weight.T (cuBLAS); loss, argmax and gradient in place (Triton, kernels/cross_entropy.py);
d_hidden = gradient @ weight; d_weight += gradient.T @ hidden, summed over chunks in fp32. The backward pass only
multiplies by the upstream gradient, in the same pass that rounds the fp32 sum to the weight's dtype.

Two cases know too little in the forward pass to make gradients there, and compute the logits again in the backward pass
(a fourth matrix product): reduction "none", where each row's upstream gradient goes into the sum d_weight, and fp16,
where a gradient yet to be multiplied by a loss scale would vanish.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from halny.kernels.cross_entropy import cross_entropy, cross_entropy_reference, launch_rows
from halny.kernels.dispatch import (
    autocast_disabled,
    autocast_dtype,
    check_floating,
    check_same_device,
    on_gpu,
    once_differentiable,
    register_operator,
    runs_kernel,
    wants_gradient,
)
from halny.kernels.loss_reduction import check_labels, mean_scale, reduce_rows
from halny.kernels.scale_gradient import scaled_gradient


class LinearCrossEntropy(NamedTuple):
    """loss: fp32 (fp64 for fp64 inputs). n_tokens, n_correct: int64 scalars on the same device, without gradient."""

    loss: Tensor
    n_tokens: Tensor
    n_correct: Tensor


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> LinearCrossEntropy:
    """The definition of ``linear_cross_entropy``, in plain PyTorch."""
    logits = hidden @ weight.T
    loss = cross_entropy_reference(logits, labels, ignore_index=ignore_index, reduction=reduction)
    return _counted(loss, logits, labels, ignore_index)


def _counted(loss: Tensor, logits: Tensor, labels: Tensor, ignore_index: int) -> LinearCrossEntropy:
    labels = labels.long()
    counted = labels != ignore_index
    n_correct = ((logits.detach().argmax(-1) == labels) & counted).sum()
    return LinearCrossEntropy(loss, counted.sum(), n_correct)


# --------------------------------------------------------------------------------------------------------------- chunks

# Every chunk reads and writes the fp32 sum for d_weight, 8 D V bytes for 2 D V FLOP a row: from 2,048 rows on the
# product takes three times as long as that traffic (700 TFLOP/s, 4.3 TB/s) and can hide it, so never fewer. More are
# better, and up to D they are free: D V logits are as many elements as the d_weight into which the backward rounds the
# sum, when the logits are gone. Where that is little, 128 MiB of them. At V = 32,000, D = 4,096 in bf16: 4,096 rows.
LOGITS_BYTES = 2**27
LEAST_ROWS = 2048
ROWS_MULTIPLE = 16  # rows start 16-byte aligned in d_hidden and in labels, whatever D is
COLUMNS_MULTIPLE = 64  # of the buffer's row stride: 128 bytes in bf16; odd strides cost cuBLAS and Triton wide accesses


def padded_vocabulary(vocab_size: int) -> int:
    """Columns of the logits buffer; those from vocab_size on are neither logits nor gradient."""
    return -(-vocab_size // COLUMNS_MULTIPLE) * COLUMNS_MULTIPLE


def chunk_rows(n_rows: int, vocab_size: int, dim: int, element_bytes: int) -> int:
    """Rows of a chunk: dim, or as many as LOGITS_BYTES hold; at least LEAST_ROWS; evened out, so that none is small."""
    most = max(LOGITS_BYTES // (padded_vocabulary(vocab_size) * element_bytes), dim)
    most = max(LEAST_ROWS, most // ROWS_MULTIPLE * ROWS_MULTIPLE)
    n_chunks = max(1, -(-n_rows // most))
    even = -(-n_rows // n_chunks)
    return min(most, max(1, -(-even // ROWS_MULTIPLE)) * ROWS_MULTIPLE)


def buffer_bytes(n_rows: int, vocab_size: int, dim: int, element_bytes: int) -> int:
    """Peak above inputs and returned gradients, where both are wanted: 0.52 GB at 16,384 x 4,096 x 32,000 in bf16.

    One chunk, or fp32, whose sum is what is returned: the logits. Several: the fp32 sum, and what the logits take more
    than d_weight, which is not there yet. (Where the backward keeps its graph, what it scales is there once more.)
    """
    rows = chunk_rows(n_rows, vocab_size, dim, element_bytes)
    logits = rows * padded_vocabulary(vocab_size) * element_bytes + 8 * n_rows
    if rows >= n_rows or element_bytes == 4:
        return logits
    summed = 4 * vocab_size * dim
    return summed + max(0, logits - element_bytes * vocab_size * dim)


def _outputs(hidden: Tensor, weight: Tensor, hidden_gradient: bool, weight_gradient: bool):
    """Uninitialised loss, correct, d_hidden and d_weight; empty ones for gradients that nobody wants.

    d_weight is fp32 where chunks are summed. A single chunk needs no sum: the product itself accumulates in fp32 and
    rounds once.
    """
    (n_rows, dim), vocab_size = hidden.shape, weight.shape[0]
    several = chunk_rows(n_rows, vocab_size, dim, weight.element_size()) < n_rows
    loss = hidden.new_empty(n_rows, dtype=torch.float32)
    correct = hidden.new_empty(n_rows, dtype=torch.int32)
    d_hidden = hidden.new_empty((n_rows, dim) if hidden_gradient else (0,))
    d_weight = weight.new_empty(
        (vocab_size, dim) if weight_gradient else (0,), dtype=torch.float32 if several else weight.dtype
    )
    return loss, correct, d_hidden, d_weight


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """total += a @ b, or = if first, accumulated in total's dtype: the inputs', or fp32 for narrower inputs."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    elif not on_gpu(a):  # only CUDA has products of narrow inputs with a wide output
        torch.addmm(total, a.float(), b.float(), beta=0 if first else 1, out=total)
    elif first:
        torch.mm(a, b, out_dtype=torch.float32, out=total)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)


class _FullPrecisionReductions:
    """No bf16 or fp16 partial sums where cuBLAS splits a product along its inner dimension (V for d_hidden)."""

    NAMES = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")

    def __enter__(self):
        matmul = torch.backends.cuda.matmul
        self.before = []
        for name in self.NAMES:
            reduced, split_k = getattr(matmul, name), getattr(matmul, f"{name}_split_k", True)
            self.before.append(reduced if split_k else (reduced, split_k))
            setattr(matmul, name, False if split_k else (False, split_k))

    def __exit__(self, *_):
        for name, before in zip(self.NAMES, self.before, strict=True):
            setattr(torch.backends.cuda.matmul, name, before)


def _rows(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    scale: Tensor,
    ignore_index: int,
    hidden_gradient: bool,
    weight_gradient: bool,
):
    loss, correct, d_hidden, d_weight = _outputs(hidden, weight, hidden_gradient, weight_gradient)
    n_rows, vocab_size = hidden.shape[0], weight.shape[0]
    size, columns = chunk_rows(n_rows, *weight.shape, weight.element_size()), padded_vocabulary(vocab_size)
    buffer = hidden.new_empty(min(size, n_rows), columns)
    with _FullPrecisionReductions(), autocast_disabled(hidden):
        for start in range(0, n_rows, size):
            part = slice(start, start + size)
            rows = hidden[part]
            logits = buffer[: rows.shape[0], :vocab_size]
            torch.mm(rows, weight.T, out=logits)
            launch_rows(
                logits,
                labels[part],
                scale[part] if scale.ndim else scale,
                ignore_index,
                loss[part],
                correct[part],
                logits if hidden_gradient or weight_gradient else None,
                columns,
            )
            if hidden_gradient:
                torch.mm(logits, weight, out=d_hidden[part])
            if weight_gradient:
                _add_product(d_weight, logits.T, rows, first=start == 0)
    if weight_gradient and n_rows == 0:
        d_weight.zero_()
    return loss, correct, d_hidden, d_weight


linear_cross_entropy_rows = register_operator(
    "linear_cross_entropy_rows(Tensor hidden, Tensor weight, Tensor labels, Tensor scale, int ignore_index,"
    " bool hidden_gradient, bool weight_gradient) -> (Tensor loss, Tensor correct, Tensor d_hidden, Tensor d_weight)",
    _rows,
    lambda hidden, weight, labels, scale, ignore_index, hidden_gradient, weight_gradient: _outputs(
        hidden, weight, hidden_gradient, weight_gradient
    ),
)


# ------------------------------------------------------------------------------------------------------------- autograd


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, ignore_index, reduction, wanted):
        n_tokens, scale = mean_scale(labels, ignore_index, reduction)
        ctx.wanted, ctx.dtype, ctx.ignore_index = wanted, hidden.dtype, ignore_index
        ctx.ahead = reduction != "none" and hidden.dtype != torch.float16
        loss, correct, d_hidden, d_weight = linear_cross_entropy_rows(
            hidden, weight, labels, scale, ignore_index, *(ctx.ahead and w for w in wanted)
        )
        if ctx.ahead:
            ctx.save_for_backward(d_hidden, d_weight)
        else:
            ctx.save_for_backward(hidden, weight, labels, scale)
        n_correct = correct.sum()
        ctx.mark_non_differentiable(n_tokens, n_correct)
        return reduce_rows(loss, n_tokens, reduction), n_tokens, n_correct

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream, *_):
        if ctx.ahead:
            gradients = [
                scaled_gradient(gradient, upstream, ctx.dtype) if wanted else None
                for gradient, wanted in zip(ctx.saved_tensors, ctx.wanted, strict=True)
            ]
        else:
            hidden, weight, labels, scale = ctx.saved_tensors
            made = linear_cross_entropy_rows(hidden, weight, labels, scale * upstream, ctx.ignore_index, *ctx.wanted)
            gradients = [g.to(ctx.dtype) if wanted else None for g, wanted in zip(made[2:], ctx.wanted, strict=True)]
        return *gradients, None, None, None, None


# ----------------------------------------------------------------------------------------------------- public functions


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> LinearCrossEntropy:
    """``torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels, ...)`` with its top-1 accuracy.

    hidden [..., D] and weight [V, D] of one floating dtype, labels [...] of any integer dtype ->
    (loss, n_tokens, n_correct): the fp32 loss as ``cross_entropy`` reduces it, the number of labels that are not
    ignored, and how many of those the largest logit hits (the first of equals). Nothing is read back to the host.
    Under autocast hidden and weight are cast to its dtype, as for any linear layer.

    Logits are rounded to the inputs' dtype, as a linear layer would; loss and gradient at the logits are computed from
    them in fp32, and that gradient is rounded to the dtype again for the two products, which accumulate in fp32. For
    "mean" and "sum" the forward pass makes and saves the gradients that are needed (none without grad mode, one for a
    frozen hidden or weight): d_hidden, and d_weight in fp32 if there are several chunks; not hidden, weight or labels.
    For "none", and for fp16, it saves hidden, weight and labels, and the backward pass repeats the forward's product.
    Equal inputs give equal bits.

    Memory above inputs and gradients: ``buffer_bytes``, 0.52 GB for 16,384 x 4,096 x 32,000 in bf16.
    Raises as ``cross_entropy``, and ValueError if hidden and weight do not fit each other.
    """
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    hidden, weight = (x.to(autocast_dtype(x)) for x in (hidden, weight))
    if weight.ndim != 2 or hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1] or weight.numel() == 0:
        raise ValueError(
            f"weight must be [V, D], neither 0, with D = hidden's last dimension, got weight {tuple(weight.shape)} "
            f"and hidden {tuple(hidden.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise TypeError(f"weight must have hidden's dtype {hidden.dtype}, got {weight.dtype}")
    check_labels(labels, hidden.shape[:-1], weight.shape[0], ignore_index, reduction)
    check_same_device(hidden=hidden, weight=weight, labels=labels)
    if not runs_kernel(hidden) or hidden.dtype == torch.float64:
        return linear_cross_entropy_reference(hidden, weight, labels, ignore_index=ignore_index, reduction=reduction)

    rows, flat_labels = hidden.reshape(-1, hidden.shape[-1]), labels.reshape(-1).long().contiguous()
    if 1 not in weight.stride():
        weight = weight.contiguous()  # once, and not in every product
    wanted = [wants_gradient(x) for x in (hidden, weight)]
    if any(wanted):
        loss, n_tokens, n_correct = _LinearCrossEntropy.apply(
            rows, weight, flat_labels, ignore_index, reduction, tuple(wanted)
        )
    else:
        n_tokens, scale = mean_scale(flat_labels, ignore_index, reduction)
        loss, correct, _, _ = linear_cross_entropy_rows(rows, weight, flat_labels, scale, ignore_index, False, False)
        loss, n_correct = reduce_rows(loss, n_tokens, reduction), correct.sum()
    return LinearCrossEntropy(loss.view(labels.shape) if reduction == "none" else loss, n_tokens, n_correct)


def counted_cross_entropy(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> LinearCrossEntropy:
    """The loss and the counts of ``linear_cross_entropy``, from logits [..., V]. Raises as ``cross_entropy``."""
    loss = cross_entropy(logits, labels, ignore_index=ignore_index, reduction=reduction)
    return _counted(loss, logits, labels, ignore_index)
