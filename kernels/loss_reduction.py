"""Labels and reductions, as both cross-entropies take them: the checks, and what is done with a loss for each row."""

import torch
from torch import Tensor

from halny.kernels.dispatch import can_check_values, check_integer

REDUCTIONS = ("mean", "sum", "none")


def check_labels(labels: Tensor, shape: tuple[int, ...], vocab_size: int, ignore_index: int, reduction: str) -> None:
    """What both cross-entropies ask of labels, ignore_index and reduction."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"ignore_index must be an integer, got {ignore_index!r}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"ignore_index must fit an int64, got {ignore_index}")
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


def mean_scale(labels: Tensor, ignore_index: int, reduction: str) -> tuple[Tensor, Tensor]:
    """(number of labels that count, int64; what each row's gradient is multiplied by, fp32), scalars on the device."""
    n_tokens = (labels != ignore_index).sum()
    if reduction == "mean":
        return n_tokens, n_tokens.float().reciprocal()
    return n_tokens, torch.ones((), dtype=torch.float32, device=labels.device)


def reduce_rows(loss: Tensor, n_tokens: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return loss
    return loss.sum() / n_tokens if reduction == "mean" else loss.sum()
