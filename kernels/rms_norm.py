"""RMSNorm, alone and fused with the residual addition before it.

    y = x / sqrt(mean(x^2) + eps) * weight                      Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467

Rounding follows Hugging Face's Mistral: mean and reciprocal root in fp32, x-hat rounded to x's dtype, then the weight.
"""

import torch
from torch import Tensor

from halny.kernels.dispatch import check_floating, check_same_device, upcast


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition of ``rms_norm``, in plain PyTorch."""
    x_wide = upcast(x)
    rstd = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + eps)
    return ((x_wide * rstd).to(x.dtype) * weight).to(x.dtype)


def add_rms_norm_reference(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The definition of ``add_rms_norm``, in plain PyTorch."""
    s = x + residual
    return rms_norm_reference(s, weight, eps), s


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)``, rounded as Hugging Face's Mistral rounds.

    x [..., D], weight [D], any floating dtypes -> y [..., D] in x's dtype. Statistics in fp32.
    Raises TypeError for tensors that are not floating-point, ValueError for shapes, devices or an eps that do not fit.
    """
    _check(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``s = x + residual; return rms_norm(s, weight, eps), s``.

    x and residual [..., D] of one dtype, weight [D] -> (y, s), both [..., D] in x's dtype. s is rounded to x's dtype
    before it is normalised. Raises as ``rms_norm``.
    """
    _check(x, weight, eps)
    check_floating("residual", residual)
    check_same_device(x=x, residual=residual)
    if residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if residual.dtype != x.dtype:
        raise TypeError(f"residual must have x's dtype {x.dtype}, got {residual.dtype}")
    return add_rms_norm_reference(x, residual, weight, eps)


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    check_floating("x", x)
    check_floating("weight", weight)
    check_same_device(x=x, weight=weight)
    if x.ndim == 0:
        raise ValueError("x must have at least one dimension")
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must have shape ({x.shape[-1]},) to match x's last one, got {tuple(weight.shape)}")
    if not isinstance(eps, int | float) or not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a finite number, zero or positive, got {eps!r}")
