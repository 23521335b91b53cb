"""Linear layers that do not keep their input for the backward, which recomputes it in a pass over memory.

    rms_norm_linear(x)          = linear(rms_norm(x))
    add_rms_norm_linear(x, r)   = linear(rms_norm(x + r)), x + r
    swiglu_linear(gate_up)      = linear(swiglu(gate_up))

A linear layer keeps its input for its weight's gradient, and a norm or SwiGLU keeps its own input: the same information
twice. To recompute the output of these row operations costs MNb bytes, since their backward has everything in registers
and writes it as well, and no matrix product. At Mistral-7B's sizes in bf16 this is 94 kB a token a layer instead of
139 kB (roofline.saved_activations), for 45 kB more moved: 10 ns at an H200's copy bandwidth, of the 3.4 us that a token
takes a layer at 9,200 tokens/s.

Chosen over selective checkpointing of the operators, which would recompute the same tensors: that needs a policy far
from the place it is about, runs every operation through a dispatch mode, and cannot let a backward kernel write what
it recomputes on the way. An autograd.Function owns both halves of each pair instead, and one reads here what is kept.

A weight arrives as the plain tensor that FSDP2 has gathered: saved as itself, it is freed after the forward and
gathered again before the backward, as it is for torch.nn.functional.linear.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from halny.kernels.dispatch import check_floating, check_same_device, once_differentiable
from halny.kernels.rms_norm import (
    add_rms_norm,
    add_rms_norm_forward,
    check_add_rms_norm,
    check_rms_norm,
    norm_runs_kernel,
    rms_norm,
    rms_norm_backward,
    rms_norm_forward,
    rms_norm_recompute,
)
from halny.kernels.swiglu import check_swiglu, swiglu, swiglu_backward, swiglu_forward, swiglu_runs_kernel


def rms_norm_linear_reference(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The definition of ``rms_norm_linear``."""
    return linear(rms_norm(x, norm_weight, eps), weight)


def add_rms_norm_linear_reference(
    x: Tensor, residual: Tensor, norm_weight: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The definition of ``add_rms_norm_linear``."""
    y, s = add_rms_norm(x, residual, norm_weight, eps)
    return linear(y, weight), s


def swiglu_linear_reference(gate_up: Tensor, weight: Tensor) -> Tensor:
    """The definition of ``swiglu_linear``."""
    return linear(swiglu(gate_up), weight)


def _input_gradient(d_out: Tensor, weight: Tensor) -> Tensor:
    return d_out @ weight.to(d_out.dtype)  # the dtypes differ under autocast only, where the forward cast as well


def _weight_gradient(d_out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    d_out, x = d_out.reshape(-1, d_out.shape[-1]), x.reshape(-1, x.shape[-1])
    return (d_out.T @ x.to(d_out.dtype)).to(weight.dtype)


class NormLinear(torch.autograd.Function):
    """Both norms: residual is None for the plain one. Saves s (or x), rstd and the weights."""

    @staticmethod
    def forward(ctx, x, residual, norm_weight, weight, eps):
        if residual is None:
            s, (y, rstd) = x, rms_norm_forward(x, norm_weight, eps)
        else:
            y, s, rstd = add_rms_norm_forward(x, residual, norm_weight, eps)
        ctx.save_for_backward(s, norm_weight, rstd, weight)
        ctx.set_materialize_grads(False)
        out = linear(y, weight)
        return out if residual is None else (out, s)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out, ds=None):
        s, norm_weight, rstd, weight = ctx.saved_tensors
        needs_x, needs_residual, needs_norm_weight, needs_weight, _ = ctx.needs_input_grad
        if d_out is None:  # only s was used
            return ds if needs_x else None, ds if needs_residual else None, None, None, None
        needs_dx, dx, d_norm_weight = needs_x or needs_residual, None, None
        if needs_dx or needs_norm_weight:
            dy = _input_gradient(d_out, weight)
            dx, d_norm_weight, y = rms_norm_backward(
                dy, ds, s, norm_weight, rstd, needs_dx, needs_norm_weight, needs_weight
            )
        elif needs_weight:
            y = rms_norm_recompute(s, norm_weight, rstd)
        d_weight = _weight_gradient(d_out, y, weight) if needs_weight else None
        return (
            dx if needs_x else None,
            dx if needs_residual else None,
            d_norm_weight if needs_norm_weight else None,
            d_weight,
            None,
        )


class SwiGLULinear(torch.autograd.Function):
    """Saves gate_up and the weight."""

    @staticmethod
    def forward(ctx, gate_up, weight):
        ctx.save_for_backward(gate_up, weight)
        return linear(swiglu_forward(gate_up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):
        gate_up, weight = ctx.saved_tensors
        needs_gate_up, needs_weight = ctx.needs_input_grad
        if not needs_gate_up:
            return None, _weight_gradient(d_out, swiglu_forward(gate_up), weight) if needs_weight else None
        d_gate_up, h = swiglu_backward(_input_gradient(d_out, weight), gate_up, needs_weight)
        return d_gate_up, _weight_gradient(d_out, h, weight) if needs_weight else None


def rms_norm_linear(x: Tensor, norm_weight: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``linear(rms_norm(x, norm_weight, eps), weight)`` without keeping the norm's output.

    x [..., D], norm_weight [D], weight [N, D] -> [..., N]. Saves x, fp32 rstd [...] and the weights. Where the
    reference runs (dispatch.py) it is the plain composition, and keeps the norm's output. Raises as ``rms_norm``, and
    ValueError or TypeError for a weight that does not fit.
    """
    check_rms_norm(x, norm_weight, eps)
    _check_weight(weight, x)
    if not norm_runs_kernel(x, norm_weight):
        return rms_norm_linear_reference(x, norm_weight, weight, eps)
    return NormLinear.apply(x, None, norm_weight, weight, eps)


def add_rms_norm_linear(
    x: Tensor, residual: Tensor, norm_weight: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """``y, s = add_rms_norm(x, residual, norm_weight, eps); return linear(y, weight), s`` without keeping y.

    As ``rms_norm_linear``; x and residual get one gradient tensor.
    """
    check_add_rms_norm(x, residual, norm_weight, eps)
    _check_weight(weight, x)
    if not norm_runs_kernel(x, norm_weight):
        return add_rms_norm_linear_reference(x, residual, norm_weight, weight, eps)
    return NormLinear.apply(x, residual, norm_weight, weight, eps)


def swiglu_linear(gate_up: Tensor, weight: Tensor) -> Tensor:
    """``linear(swiglu(gate_up), weight)`` without keeping swiglu's output, which the backward writes on its way.

    gate_up [..., 2F], weight [N, F] -> [..., N]. Saves gate_up and weight. Otherwise as ``rms_norm_linear``.
    """
    check_swiglu(gate_up)
    _check_weight(weight, gate_up, 2)
    if not swiglu_runs_kernel(gate_up):
        return swiglu_linear_reference(gate_up, weight)
    return SwiGLULinear.apply(gate_up, weight)


def _check_weight(weight: Tensor, x: Tensor, fold: int = 1) -> None:
    check_floating("weight", weight)
    check_same_device(x=x, weight=weight)
    if weight.ndim != 2 or weight.shape[1] * fold != x.shape[-1]:
        raise ValueError(f"weight must be [N, {x.shape[-1] // fold}], got {tuple(weight.shape)}")
