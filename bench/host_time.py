"""Host time of the row operations, forward and backward: what Python and the dispatcher cost, with no kernel launched.

    python bench/host_time.py        no GPU needed: every launch is replaced by nothing

A kernel shorter than this waits for the host. "bare Function" is what torch.autograd.grad and an autograd.Function that
only allocates cost on the same machine: the part that is not ours. Best of five rounds, microseconds a call.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"  # so that CPU tensors take the kernels' path

import time

import torch

from halny.kernels import rms_norm, rope, swiglu


class Bare(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, dy):
        return torch.empty_like(dy)


def microseconds(call, n: int = 2000) -> float:
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(n):
            call()
        best = min(best, (time.perf_counter() - start) / n)
    return best * 1e6


def main() -> None:
    for module in (rms_norm, rope, swiglu):
        module.launch = lambda *arguments, **constants: None
    torch.set_num_threads(1)
    x, residual, gate_up = (torch.randn(2, 8, 64, requires_grad=True) for _ in range(3))
    weight, qkv = torch.ones(64, requires_grad=True), torch.randn(2, 8, 8, 16, requires_grad=True)
    cos, sin = rope.rope_tables(8, 16, 1e4)
    cases = {
        "bare Function": (lambda: Bare.apply(x), [x]),
        "rms_norm": (lambda: rms_norm.rms_norm(x, weight, 1e-5), [x, weight]),
        "add_rms_norm": (lambda: rms_norm.add_rms_norm(x, residual, weight, 1e-5), [x, residual, weight]),
        "swiglu": (lambda: swiglu.swiglu(gate_up), [gate_up]),
        "rope_split_qkv": (lambda: rope.rope_split_qkv(qkv, cos, sin, 4, 2), [qkv]),
    }
    for name, (forward, inputs) in cases.items():
        out = forward()
        upstream = [torch.ones_like(y) for y in (out if isinstance(out, tuple) else (out,))]
        print(
            f"{name:16} {microseconds(lambda f=forward, i=inputs, u=upstream: torch.autograd.grad(f(), i, u)):6.1f} us"
        )


if __name__ == "__main__":
    main()
