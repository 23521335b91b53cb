"""Cross-entropy between logits and integer labels, computed in fp32 whatever the dtype of the logits.

    loss = logsumexp(logits) - logits[label]

Labels equal to ``ignore_index`` give no loss and no gradient.
"""

import torch.nn.functional as F
from torch import Tensor

from halny.kernels.dispatch import can_check_values, check_floating, check_integer, check_same_device, upcast

REDUCTIONS = ("mean", "sum", "none")


def cross_entropy_reference(
    logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean"
) -> Tensor:
    """The definition of ``cross_entropy``, in plain PyTorch."""
    labels = labels.long()  # before comparing: in a narrower type -100 may be a label like any other (uint8's 156)
    flat_logits, flat_labels = upcast(logits).reshape(-1, logits.shape[-1]), labels.reshape(-1)
    loss = F.cross_entropy(flat_logits, flat_labels, ignore_index=ignore_index, reduction=reduction)
    return loss.view(labels.shape) if reduction == "none" else loss


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """``torch.nn.functional.cross_entropy(logits.float(), labels, ignore_index=..., reduction=...)`` over the last dim.

    logits [..., V] of any floating dtype, labels [...] of any integer dtype -> fp32 (fp64 for fp64 logits): a scalar
    for "mean" (NaN if every label is ignored, as in PyTorch) and "sum", [...] for "none". logits are not overwritten.

    Raises TypeError for wrong kinds of tensors; ValueError for shapes or devices that do not fit, an unknown reduction,
    or a label outside 0 .. V - 1 that is not ignore_index (on CUDA tensors only under ``dispatch.set_debug_checks``).
    """
    check_floating("logits", logits)
    if logits.ndim == 0:
        raise ValueError("logits must have at least one dimension, [..., V]")
    check_labels(labels, logits.shape[:-1], logits.shape[-1], ignore_index, reduction)
    check_same_device(logits=logits, labels=labels)
    return cross_entropy_reference(logits, labels, ignore_index=ignore_index, reduction=reduction)


def check_labels(labels: Tensor, shape: tuple[int, ...], vocab_size: int, ignore_index: int, reduction: str) -> None:
    """What both cross-entropies ask of labels, ignore_index and reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
    check_integer("labels", labels)
    if labels.shape != shape:
        raise ValueError(f"labels must have shape {tuple(shape)}, got {tuple(labels.shape)}")
    if can_check_values(labels):
        labels = labels.long()
        wrong = labels[((labels < 0) | (labels >= vocab_size)) & (labels != ignore_index)]
        if wrong.numel():
            raise ValueError(
                f"labels must lie in 0 .. {vocab_size - 1} or equal ignore_index {ignore_index}, got {int(wrong[0])}"
            )
