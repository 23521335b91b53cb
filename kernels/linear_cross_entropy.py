"""The language-model head and its loss as one operation: hidden states in; loss, target count and correct count out.

    logits = hidden @ weight.T;   loss = cross_entropy(logits, labels);   correct = (argmax(logits) == label)

One operation, because at V = 32,000 the logits of a 16,384-token micro batch are a gigabyte that nobody needs twice.
"""

from typing import NamedTuple

from torch import Tensor

from halny.kernels.cross_entropy import check_labels, cross_entropy_reference
from halny.kernels.dispatch import check_floating, check_same_device


class LinearCrossEntropy(NamedTuple):
    """loss: fp32 (fp64 for fp64 inputs). n_tokens, n_correct: int64 scalars on the same device, without gradient."""

    loss: Tensor
    n_tokens: Tensor
    n_correct: Tensor


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> LinearCrossEntropy:
    """The definition of ``linear_cross_entropy``, in plain PyTorch."""
    labels = labels.long()
    logits = hidden @ weight.T
    loss = cross_entropy_reference(logits, labels, ignore_index=ignore_index, reduction=reduction)
    counted = labels != ignore_index
    n_correct = ((logits.detach().argmax(-1) == labels) & counted).sum()
    return LinearCrossEntropy(loss, counted.sum(), n_correct)


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> LinearCrossEntropy:
    """``torch.nn.functional.cross_entropy((hidden @ weight.T).float(), labels, ...)`` with its top-1 accuracy.

    hidden [..., D] and weight [V, D] of one floating dtype, labels [...] of any integer dtype ->
    (loss, n_tokens, n_correct): the fp32 loss as ``cross_entropy`` reduces it, the number of labels that are not
    ignored, and how many of those the largest logit hits. Nothing is read back to the host.

    Raises as ``cross_entropy``, and ValueError if hidden and weight do not fit each other.
    """
    check_floating("hidden", hidden)
    check_floating("weight", weight)
    if weight.ndim != 2 or hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"weight must be [V, D] with D = hidden's last dimension, got weight {tuple(weight.shape)} "
            f"and hidden {tuple(hidden.shape)}"
        )
    if hidden.dtype != weight.dtype:
        raise TypeError(f"weight must have hidden's dtype {hidden.dtype}, got {weight.dtype}")
    check_labels(labels, hidden.shape[:-1], weight.shape[0], ignore_index, reduction)
    check_same_device(hidden=hidden, weight=weight, labels=labels)
    return linear_cross_entropy_reference(hidden, weight, labels, ignore_index=ignore_index, reduction=reduction)
