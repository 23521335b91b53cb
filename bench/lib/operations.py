"""What kernels.py times: operations, the shapes they are timed at, and the least that each must move and do.

An operation has inputs, a reference in plain PyTorch, and modes; who does it, and how, is in peers.py.

``minimum`` and ``Update.counts`` say how many bytes a mode must move if every tensor crosses the memory bus once, and
how many FLOPs of matrix products it must do. GB/s in tables are these bytes over the time, whatever a provider moves.
One operation can be had for less: RoPE's forward need not move v, which a view of the input can be
(``Operation.unmoved``). The rate of a provider that copies it into a new output counts it; that of one that leaves v
where it is, as ours does (``Peer.leaves_v``), does not. A row has both figures, "bytes" for its rate and "least_bytes".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.lib import peers
from halny.kernels import adamw, rms_norm, rope, swiglu

# -------------------------------------------------------------------------------------------------------------- shapes

MISTRAL = dict(dim=4096, hidden=14336, heads=32, kv_heads=8, head_dim=128, vocabulary=32000)
SETS: dict[str, dict] = {
    # the published run's micro batch, 4 x 4096
    "7b": dict(tokens=16384, sequences=4, **MISTRAL),
    # the same head with 2,048 rows, where quack's and Liger's published figures are; it comes with 7b
    "2k": dict(tokens=2048, sequences=1, **MISTRAL),
    # the head of Llama 3 and of most newer models, where the loss dominates
    "128k": dict(tokens=2048, sequences=1, **(MISTRAL | dict(vocabulary=128256))),
    # one short sequence: 4 MB a tensor, some microseconds a kernel, so what the host costs decides
    "short": dict(tokens=512, sequences=1, **MISTRAL),
}
SMOKE_SETS: dict[str, dict] = {
    name: dict(tokens=4 * n, sequences=n, dim=64, hidden=48, heads=4, kv_heads=2, head_dim=16, vocabulary=96)
    for name, n in (("7b", 2), ("128k", 1))
}
LOSSES = ("cross_entropy", "linear_cross_entropy")


def minimum(operation: str, mode: str, shape: dict, b: int) -> tuple[int, int]:
    """(bytes, FLOPs of matrix products) that an operation must move and do, with elements of b bytes.

    M tokens, N = dim, F = hidden, H query and K key/value heads of c channels, V words; labels are int64. Tables of cos
    and sin, statistics and scalars are left out: they stay in the cache. "both" is forward plus backward, except for
    losses, whose gradient needs no second read of the logits.
    """
    M, N, F, V = (shape[name] for name in ("tokens", "dim", "hidden", "vocabulary"))
    H, K, c = (shape[name] for name in ("heads", "kv_heads", "head_dim"))
    elements = {
        ("rms_norm", "forward"): 2 * M * N + N,  # x, weight; y
        ("rms_norm", "backward"): 3 * M * N + 2 * N,  # x, dy, weight; dx, dweight
        ("add_rms_norm", "forward"): 4 * M * N + N,  # x, residual, weight; y, s
        ("add_rms_norm", "backward"): 4 * M * N + 2 * N,  # s, dy, ds, weight; one gradient for x and residual, dweight
        ("rope", "forward"): 2 * M * (H + 2 * K) * c,  # q, k, v; q, k, v
        ("rope", "backward"): 2 * M * (H + 2 * K) * c,  # dq, dk, dv; all packed
        ("swiglu", "forward"): 3 * M * F,  # gate, up; h
        ("swiglu", "backward"): 5 * M * F,  # gate, up, dh; dgate, dup
        ("cross_entropy", "loss only"): M * V,  # logits
        ("cross_entropy", "both"): 2 * M * V,  # logits; their gradient
        ("linear_cross_entropy", "loss only"): M * N + V * N,  # hidden, weight
        ("linear_cross_entropy", "both"): 2 * (M * N + V * N),  # hidden, weight; their gradients
    }
    products = {"loss only": 2 * M * N * V, "both": 6 * M * N * V}
    if operation in LOSSES:
        flops = products[mode] if operation == "linear_cross_entropy" else 0
        return b * elements[operation, mode] + 8 * M, flops
    modes = ("forward", "backward") if mode == "both" else (mode,)
    return b * sum(elements[operation, m] for m in modes), 0


# ---------------------------------------------------------------------------------------------------------- operations


@dataclass(frozen=True)
class Operation:
    name: str
    inputs: Callable[[dict, torch.dtype, torch.device], list]  # tensors and numbers, in the reference's order
    gradients: tuple[int, ...]  # which inputs have one
    reference: Callable
    outputs: tuple[str, ...]
    modes: tuple[str, ...]
    ceiling: str  # what it is compared with: a key of ceilings.ceilings

    def counts(self, mode: str, shape: dict, b: int) -> tuple[int, int]:
        return minimum(self.name, mode, shape, b)

    def unmoved(self, mode: str, shape: dict, b: int) -> int:
        """Bytes of ``counts`` that a provider can leave out: RoPE's v, read and written, if it stays where it is."""
        if self.name != "rope" or mode == "backward":  # whose three gradients become one packed tensor
            return 0
        return b * 2 * shape["tokens"] * shape["kv_heads"] * shape["head_dim"]

    def results(self, function: Callable, inputs: list, upstream: list[Tensor]) -> list[Tensor]:
        """Outputs, then the gradients of inputs."""
        leaves = [x.detach().requires_grad_() if i in self.gradients else x for i, x in enumerate(inputs)]
        outputs = tuple_of(function(*leaves))
        gradients = torch.autograd.grad(outputs, [leaves[i] for i in self.gradients], upstream or None)
        return [x.detach() for x in (*outputs, *gradients)]

    def expected(self, inputs: list, upstream: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """What the reference makes of the same, already rounded, values in a dtype; ``compared`` gives its like."""
        cast = [x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
        return self.results(self.reference, cast, [u.to(dtype) for u in upstream])

    def compared(self, results: list[Tensor]) -> list[Tensor]:
        """The part of a provider's results that ``expected`` computes: here all."""
        return results

    def output_shapes(self, inputs: list) -> list[torch.Size]:
        with torch.no_grad():
            return [y.shape for y in tuple_of(self.reference(*inputs))]

    @property
    def result_names(self) -> list[str]:
        return [*self.outputs, *(f"gradient of input {i}" for i in self.gradients)]


@dataclass(frozen=True)
class Update(Operation):
    """AdamW on a weight of the MLP, [hidden, dim], from moments that are zero; fp32 weight in and out.

    A provider keeps weight and moments as it likes, made when it first sees a weight; later calls only update them.
    The first result is judged, before anything that a provider rounds can matter: all must agree.
    """

    moments: str = "fp32"

    def counts(self, mode: str, shape: dict, b: int) -> tuple[int, int]:
        """Master weights of 4 bytes and moments read and written, and the gradient, of b bytes, read; no products."""
        n = shape["hidden"] * shape["dim"]
        return n * (2 * 4 + b) + 2 * adamw.moment_bytes(n, self.moments), 0

    def results(self, function: Callable, inputs: list, upstream: list[Tensor]) -> list[Tensor]:
        return [peers.whole_weight(function(*inputs))]

    def expected(self, inputs: list, upstream: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """In fp32 for any dtype of the gradient below fp64: that is what the arithmetic is."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return [peers.first_update(*(x.to(wide) for x in inputs))]


def tuple_of(outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def random(*shape: int, dtype, device, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, device=device) * scale).to(dtype)


def row_inputs(n_rows: int) -> Callable:
    """n_rows tensors [tokens, dim] and a norm weight near 1."""

    def make(shape, dtype, device):
        size = shape["tokens"], shape["dim"]
        weight = 1 + random(shape["dim"], dtype=dtype, device=device, scale=0.1)
        return [*(random(*size, dtype=dtype, device=device) for _ in range(n_rows)), weight]

    return make


def rope_inputs(shape, dtype, device):
    B, T = shape["sequences"], shape["tokens"] // shape["sequences"]
    heads, kv_heads, head_dim = shape["heads"], shape["kv_heads"], shape["head_dim"]
    qkv = random(B, T, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device)
    return [qkv, *rope.rope_tables(T, head_dim, 1e4, device), heads, kv_heads]


def swiglu_inputs(shape, dtype, device):
    return [random(shape["tokens"], 2 * shape["hidden"], dtype=dtype, device=device)]


def labels_of(shape, device) -> Tensor:
    return torch.randint(shape["vocabulary"], (shape["tokens"],), device=device)


def cross_entropy_inputs(shape, dtype, device):
    return [random(shape["tokens"], shape["vocabulary"], dtype=dtype, device=device), labels_of(shape, device)]


def linear_cross_entropy_inputs(shape, dtype, device):
    hidden = random(shape["tokens"], shape["dim"], dtype=dtype, device=device)
    weight = random(shape["vocabulary"], shape["dim"], dtype=dtype, device=device, scale=shape["dim"] ** -0.5)
    return [hidden, weight, labels_of(shape, device)]


def update_inputs(shape, dtype, device):
    """A weight in fp32, and its gradient in the dtype of the computation."""
    kinds = (torch.float32, 0.02), (dtype, 1e-3)
    return [random(shape["hidden"], shape["dim"], dtype=kind, device=device, scale=scale) for kind, scale in kinds]


ROW_MODES, LOSS_MODES = ("forward", "backward", "both"), ("both", "loss only")
OPERATIONS = {
    o.name: o
    for o in (
        Operation("rms_norm", row_inputs(1), (0, 1), lambda x, w: rms_norm.rms_norm_reference(x, w, peers.EPS),
                  ("y",), ROW_MODES, "copy_gb_s"),
        Operation("add_rms_norm", row_inputs(2), (0, 1, 2),
                  lambda x, r, w: rms_norm.add_rms_norm_reference(x, r, w, peers.EPS),
                  ("y", "s"), ROW_MODES, "copy_gb_s"),
        Operation("rope", rope_inputs, (0,), peers.eager_rope, ("q", "k", "v"), ROW_MODES, "copy_gb_s"),
        Operation("swiglu", swiglu_inputs, (0,), swiglu.swiglu_reference, ("h",), ROW_MODES, "copy_gb_s"),
        Operation("cross_entropy", cross_entropy_inputs, (0,), peers.ce.cross_entropy_reference,
                  ("loss",), LOSS_MODES, "copy_gb_s"),
        Operation("linear_cross_entropy", linear_cross_entropy_inputs, (0, 1), peers.eager_linear_cross_entropy,
                  ("loss",), LOSS_MODES, "head_tflop_s"),
        *(Update(f"adamw, {moments}", update_inputs, (), peers.first_update, ("weight",), ("update",), "copy_gb_s",
                 moments=moments) for moments in adamw.MOMENTS),
    )
}  # fmt: skip


# The order of value, which is the order of running
ORDER = ("rms_norm", "add_rms_norm", "swiglu", "rope", "cross_entropy", "linear_cross_entropy")


def chosen_sets(sets: dict[str, dict], names: list[str] | None) -> dict[str, dict]:
    """Those of the names (all for None) in their order; "2k" comes with "7b", whose head it is."""
    wanted = set(names or sets) | ({"2k"} if "7b" in (names or ()) else set())
    return {name: shape for name, shape in sets.items() if name in wanted}


def cases(sets: dict[str, dict], only: str) -> Iterator[tuple[Operation, str, dict]]:
    """The most valuable first: everything at the 7B micro batch, then the large vocabulary, then short sequences."""
    names = [*ORDER, *(name for name in OPERATIONS if name not in ORDER)]
    for set_name, shape in sets.items():
        if set_name == "2k" and "7b" in sets:
            continue  # it had its turn
        for name in names:
            operation = OPERATIONS[name]
            if only not in name:
                continue
            if set_name == "7b" and name == "linear_cross_entropy" and "2k" in sets:
                yield operation, "2k", sets["2k"]
            if set_name == "2k" and name != "linear_cross_entropy":
                continue
            if set_name == "128k" and name not in LOSSES:
                continue
            if set_name != "7b" and isinstance(operation, Update):
                continue  # a weight's size does not depend on the tokens
            yield operation, set_name, shape


# -------------------------------------------------------------------------------------------------------------- errors


def largest(x: Tensor, truth: Tensor | None = None) -> float:
    """max |x - truth|, or max |x|, in fp64, a piece at a time; inf if a value that should be finite is not."""
    if truth is not None and x.shape != truth.shape:
        return float("inf")
    found, flat = 0.0, x.detach().reshape(-1)
    flat_truth = None if truth is None else truth.reshape(-1)
    for start in range(0, flat.numel(), 2**26):
        piece = flat[start : start + 2**26].double()
        if flat_truth is not None:
            piece = piece - flat_truth[start : start + 2**26].double()
        top = piece.abs().max().item()
        if not top < float("inf"):
            return float("inf")
        found = max(found, top)
    return found


def limits(same_dtype: Tensor, truth: Tensor) -> tuple[float, float]:
    """(max |same_dtype - truth|, max |truth|): all that the bound needs, once a case and not once a provider."""
    return largest(same_dtype, truth), largest(truth)


def excess(out: Tensor, truth: Tensor, torch_error: float, largest_truth: float) -> dict[str, float]:
    """The error of out and its bound, 2 torch_error + eps |truth|, each the largest over the tensor; see ``limits``.

    torch_error is of what plain PyTorch makes in the dtype of the inputs, truth what it makes in a wider one; eps is of
    out's dtype. Right is error <= bound.
    """
    bound = 2 * torch_error + torch.finfo(out.dtype).eps * largest_truth
    return {"error": largest(out, truth), "torch_error": torch_error, "bound": bound}
