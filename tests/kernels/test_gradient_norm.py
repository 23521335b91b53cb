"""The norm of all gradients: fp64's to fp32 rounding, nothing beyond a tensor's end, specials kept, the same bits.

As tests/kernels/test_adamw.py, the file runs the reference here and the kernel under TRITON_INTERPRET=1 or on a GPU.
"""

import math

import pytest
import torch
from helpers import assert_passes_in_the_interpreter
from torch import Tensor

from halny.kernels import dispatch
from halny.kernels.gradient_norm import BLOCK_BYTES, block_norms_kernel, gradient_norm, gradient_norm_reference

DTYPES = [torch.bfloat16, torch.float32]
BLOCK = BLOCK_BYTES // 2  # elements of bf16 in a program
SIZES = [1, 7, 0, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 77, 0, 300]


def at_the_head_of_nans(x: Tensor) -> Tensor:
    """x with NaN beyond its end, which no mask may let in."""
    buffer = torch.full((x.numel() + BLOCK,), float("nan"), dtype=x.dtype, device=x.device)
    buffer[: x.numel()] = x.flatten()
    return buffer[: x.numel()].view(x.shape)


def truth_of(tensors: list[Tensor]) -> float:
    return math.sqrt(sum(x.double().square().sum().item() for x in tensors))


@pytest.mark.parametrize("spread", [0.0, 3.0])
@pytest.mark.parametrize("dtypes", [DTYPES[:1], DTYPES[1:], DTYPES])
def test_the_norm_is_that_of_fp64(dtypes, spread, launches):
    """Odd sizes, empty tensors, both dtypes side by side; NaN in the buffer of the sums would show, too."""
    tensors = []
    for i, n in enumerate(SIZES):
        x = 1e-3 * torch.randn(n) * torch.exp(spread * torch.randn(n))
        tensors.append(at_the_head_of_nans(x.to(dtypes[i % len(dtypes)])))
    tensors.append(at_the_head_of_nans(torch.randn(3, 41, 5).to(dtypes[0])))
    for some in (tensors, tensors[:1], tensors[2:3], [tensors[0], tensors[-1]]):
        norm = gradient_norm(some)
        assert norm.dtype == torch.float64 and norm.shape == ()
        assert math.isclose(norm.item(), truth_of(some), rel_tol=1e-6), [x.shape for x in some]
    with_elements = sum(x.numel() > 0 for x in tensors) + 1 + 0 + 2
    assert launches["block_norms_kernel"] == (with_elements if dispatch.INTERPRETED else 0)
    assert gradient_norm([]).item() == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_element_is_missed(dtype):
    """Each place in a program, a warp and a load of 16 bytes: one element alone is the whole norm."""
    n = BLOCK + 300
    for place in [*range(17), 31 * 8, 255 * 8 + 7, 2048, BLOCK // 2 - 1, BLOCK // 2, BLOCK - 1, BLOCK, n - 2, n - 1]:
        x = torch.zeros(n, dtype=dtype)
        x[place] = -3.0
        assert gradient_norm([x, torch.zeros(5, dtype=dtype)]).item() == 3.0, place


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_and_inf_reach_the_norm(dtype):
    """The guard skips a step whose norm is not finite."""
    for place in (0, 4097, BLOCK, BLOCK + 76):
        for value, seen in ((float("nan"), math.isnan), (float("inf"), math.isinf), (-float("inf"), math.isinf)):
            x = torch.randn(BLOCK + 77).to(dtype)
            x[place] = value
            assert seen(gradient_norm([torch.ones(3, dtype=dtype), x, torch.ones(3, dtype=dtype)]).item())
    x = torch.zeros(9, dtype=dtype)
    x[3], x[5] = float("inf"), float("nan")
    assert gradient_norm([x]).isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_and_tiny_elements_are_as_pytorch_has_them(dtype):
    """A square beyond fp32 makes inf, one beneath it nothing: gradients that no step survives, or none."""
    for size, factor in ((1e17, 1.0), (1e20, math.inf), (1e-17, 1.0), (1e-30, 0.0)):
        x = torch.full((1000,), size).to(dtype)  # of one element alone PyTorch takes the absolute value
        for norm in (gradient_norm([x]), gradient_norm_reference([x])):
            assert norm.item() == pytest.approx(factor * truth_of([x]), rel=1e-6)


def test_the_bits_are_the_same_again():
    tensors = [torch.randn(n).bfloat16() for n in SIZES]
    first = gradient_norm(tensors)
    assert all(torch.equal(gradient_norm([at_the_head_of_nans(x) for x in tensors]), first) for _ in range(5))


def test_bad_gradients_are_refused():
    x = torch.ones(8)
    for tensors, error, message in (
        ([x, x.double()], TypeError, "gradients must be bf16 or fp32 tensors, got torch.float64"),
        ([x, None], TypeError, "got NoneType"),
        ([x[::2]], ValueError, r"gradients must be contiguous, got strides \(2,\)"),
        ([x, torch.ones(8, device="meta")], ValueError, "gradients must be on one device, got cpu and meta"),
    ):
        with pytest.raises(error, match=message):
            gradient_norm(tensors)


@pytest.mark.skipif(dispatch.INTERPRETED, reason="says nothing about the interpreter")
def test_another_tensor_compiles_nothing():
    """A tensor's place among the sums is no reason for another kernel."""
    assert {p.name: p.do_not_specialize for p in block_norms_kernel.params}["first"]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu(dtype, launches):
    """Every size, and Mistral-7B's gate and up projection; a hundred times the same bits, and no wait."""
    tensors = [at_the_head_of_nans(torch.randn(n, device="cuda").to(dtype)) for n in [*SIZES, 28672 * 4096]]
    expected = truth_of(tensors)
    gradient_norm(tensors)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        norms = [gradient_norm(tensors) for _ in range(100)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert math.isclose(norms[0].item(), expected, rel_tol=1e-6)
    assert all(torch.equal(norm, norms[0]) for norm in norms)
    assert launches["block_norms_kernel"] == 101 * sum(x.numel() > 0 for x in tensors)
    for value, seen in ((float("nan"), math.isnan), (float("inf"), math.isinf)):
        for x in tensors:
            if x.numel():
                kept, x[-1] = x[-1].clone(), value
                assert seen(gradient_norm(tensors).item())
                x[-1] = kept


@pytest.mark.skipif(dispatch.INTERPRETED, reason="is it")
def test_in_the_interpreter():
    """This file again, where CPU tensors run the kernel."""
    assert_passes_in_the_interpreter(__file__)
