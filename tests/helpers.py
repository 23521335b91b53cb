"""Plain functions for tests: what "equal" means here, and a file of tests run once more in the interpreter."""

import os
import subprocess
import sys

import torch
from torch import Tensor

from halny.kernels.dispatch import INTERPRETED


def assert_close_to_truth(
    ours: Tensor, torch_same_dtype: Tensor, truth: Tensor, *, roundings: float = 1.0, name: str = "result"
) -> None:
    """|ours - truth| <= 2 |torch_same_dtype - truth| + roundings x eps x |truth|, each | | the largest over the tensor.

    truth: what PyTorch makes in fp64 of the same (already rounded) inputs; torch_same_dtype: what it makes in ours'
    dtype, which sets the scale of an honest error; eps: of ours' dtype. Raising ``roundings`` is for operations that
    round more often than PyTorch's does, and needs a reason. Infinities must agree in place and sign, NaNs in place.
    """
    assert ours.dtype == torch_same_dtype.dtype, f"{name}: dtype {ours.dtype}, PyTorch's is {torch_same_dtype.dtype}"
    shapes = [tuple(x.shape) for x in (ours, torch_same_dtype, truth)]
    assert shapes[0] == shapes[1] == shapes[2], f"{name}: shapes of ours, PyTorch's and the truth differ: {shapes}"
    finite = truth.isfinite()
    assert torch.equal(ours.isfinite(), finite), f"{name}: not finite where the truth is, or finite where it is not"
    torch.testing.assert_close(
        ours[~finite].double(), truth[~finite].double(), rtol=0, atol=0, equal_nan=True, msg=f"{name}: wrong inf or NaN"
    )
    truth = truth[finite].double()
    if truth.numel() == 0:
        return
    if INTERPRETED and ours.dtype == torch.bfloat16:
        # Triton's interpreter truncates fp32 to bf16 instead of rounding, at the end and wherever a kernel rounds on
        # the way. Delete when it rounds.
        roundings += 2
    if ours.is_cuda and ours.dtype == torch.float32:
        # kernels take the GPU's own exp2, reciprocal and division, good to 2^-22.5; PyTorch's are rounded almost right
        roundings += 2
    error = (ours[finite].double() - truth).abs().max().item()
    torch_error = (torch_same_dtype[finite].double() - truth).abs().max().item()
    bound = 2 * torch_error + roundings * torch.finfo(ours.dtype).eps * truth.abs().max().item()
    assert error <= bound, f"{name}: error {error:.3g} above the bound {bound:.3g} (PyTorch's own is {torch_error:.3g})"


def assert_passes_in_the_interpreter(file: str) -> None:
    """A file of tests, or "file::test", passes in a process of its own, where CPU tensors run the kernels."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", file, "-p", "no:cacheprovider"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert " passed" in done.stdout.splitlines()[-1] and "failed" not in done.stdout.splitlines()[-1]
