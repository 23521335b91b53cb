"""SwiGLU on the packed gate and up projections.

    h = silu(gate) * up,   silu(z) = z * sigmoid(z)                        Shazeer 2020, https://arxiv.org/abs/2002.05202

gate and up are the two halves of one matrix product.
"""

from torch import Tensor
from torch.nn.functional import silu

from halny.kernels.dispatch import check_floating


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The definition of ``swiglu``, in plain PyTorch (the arithmetic of Hugging Face's MistralMLP)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate) * up


def swiglu(gate_up: Tensor) -> Tensor:
    """``gate, up = gate_up.chunk(2, dim=-1); return torch.nn.functional.silu(gate) * up``.

    gate_up [..., 2F], any floating dtype -> h [..., F] in the same dtype.
    Raises TypeError if gate_up is not floating-point, ValueError if its last dimension is odd.
    """
    check_floating("gate_up", gate_up)
    if gate_up.ndim == 0 or gate_up.shape[-1] % 2:
        raise ValueError(f"gate_up must be [..., 2F] with an even last dimension, got {tuple(gate_up.shape)}")
    return swiglu_reference(gate_up)
