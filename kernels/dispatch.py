"""Which code runs an operation, decided in one place for every file of this folder.

======================================  ===========================================================
tensors on CUDA                         the Triton kernel
tensors on the CPU                      the reference, plain PyTorch
tensors on the CPU, TRITON_INTERPRET=1  the Triton kernel, in Triton's interpreter (for its numerics)
inside ``reference_only()``             the reference, everywhere: is a kernel to blame?
where derivatives are wanted that       the reference, which PyTorch can differentiate: inside torch.func's transforms,
only PyTorch's code has                 at a forward-mode level, while torch.export makes a graph that may be trained
tensors on meta, inside ``stand_in``    the Triton kernel's path, each launch written down and none made
======================================  ===========================================================

An operation's public function checks its arguments, asks ``runs_kernel``, and calls one or the other. Kernels start
through ``launch``, which counts them: a test that compares a kernel with its reference asserts the count, so it cannot
pass on the reference alone.

Kernels name by prefixes: p_ is a pointer, i_ an index (of a row, a column, a program's first element), o_ an offset, an
index in elements of memory, m_ or m alone a mask, b_ a block of values. What has none is a scalar or a size. Upper case
is known when a kernel is compiled. Arguments are pointers, sizes and numbers, strides, constants, in this order.
"""

import functools
import os
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

# Triton reads the variable when it decorates a kernel, that is at import: later changes would split the two of us.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

launches: Counter[str] = Counter()  # kernel name -> launches since the test that counts cleared it
_reference_only = False
_checks_cuda_values = False


class StandIn(NamedTuple):
    """The GPU that meta tensors stand for inside ``stand_in``: all that decides which kernels run, and their grids."""

    capability: tuple[int, int]
    multiprocessors: int
    packages: tuple[str, ...]  # those of attention_backends.PACKAGES that it has
    record: Callable[[Callable, tuple, tuple, dict], None]  # in place of a launch: kernel, grid, arguments, constants


_stand_in: StandIn | None = None


@contextmanager
def stand_in(gpu: StandIn):
    """Let meta tensors go the way of that GPU's tensors, up to the launches: for bench/account.py and bench/aot.py."""
    global _stand_in
    before, _stand_in = _stand_in, gpu
    try:
        yield
    finally:
        _stand_in = before


def stands_for(device: torch.device) -> StandIn | None:
    """The GPU that tensors on this device stand for, if they do."""
    return _stand_in if device.type == "meta" else None


def on_gpu(x: Tensor) -> bool:
    """Whether x is on a CUDA device, or stands for a tensor that is."""
    return x.is_cuda or (_stand_in is not None and x.is_meta)


def runs_kernel(x: Tensor) -> bool:
    """Whether an operation on ``x`` runs its Triton kernel (True) or its reference (False)."""
    return not is_reference_only() and (on_gpu(x) or (INTERPRETED and x.device.type == "cpu"))


def launch(kernel, grid: tuple[int, ...], *args, **constants) -> None:
    """``kernel[grid](*args, **constants)`` on the device of its first argument, counted in ``launches``.

    The device guard is needed because Triton launches on the *current* device, whatever the tensors say.
    """
    named = kernel
    while not hasattr(named, "__name__"):  # heuristics and autotuners wrap the function in ``fn``
        named = named.fn
    launches[named.__name__] += 1
    device = args[0].device
    if gpu := stands_for(device):
        gpu.record(named, grid, args, constants)
    elif device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[grid](*args, **constants)
    else:
        kernel[grid](*args, **constants)


_library = torch.library.Library("halny", "FRAGMENT")
implementations: dict[Callable, Callable] = {}  # of the operators below that launch kernels of ours


def register_operator(schema: str, implementation, fake, launches: bool = True):
    """Register ``torch.ops.halny.NAME`` and return it, for schema "NAME(Tensor x, ...) -> Tensor".

    A registered operator is what selective checkpointing can save, torch.compile keeps whole and profilers name.
    implementation launches the kernels; fake makes outputs of the right shape, dtype and strides without data.
    launches: whether the kernels are ours, started by ``launch``; if not, a ``stand_in`` has the fake run.
    Autograd stays outside, in an autograd.Function that calls operators in both directions (the cheapest on the host).
    An operator that is reached without its Function, in an exported graph for one, refuses to be differentiated.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    _library.impl(name, implementation, "CUDA")
    _library.impl(name, implementation, "CPU")  # for the interpreter
    operator = getattr(torch.ops.halny, name).default
    overwritten = [i for i, x in enumerate(operator._schema.arguments) if x.alias_info and x.alias_info.is_write]

    def without_data(*args):
        real = launches and _stand_in is not None and not any(isinstance(x, FakeTensor) for x in args)
        return (implementation if real else fake)(*args)

    def without_derivative(*args):
        if _is_dual(args):
            raise NotImplementedError(f"{operator} has no forward-mode derivative: {_REMEDY}")
        if not wants_gradient(*(x for x in args if isinstance(x, Tensor))):
            for i in overwritten:
                torch.autograd.graph.increment_version(args[i])
            with torch._C._AutoDispatchBelowAutograd():
                return operator(*args)
        if overwritten or in_transform():
            raise NotImplementedError(f"{operator} has no derivative of its own: {_REMEDY}")
        return _NoDerivative.apply(operator, *args)

    torch.library.register_fake(f"halny::{name}", without_data, lib=_library)
    _library.impl(name, without_derivative, "Autograd")
    if launches:
        implementations[operator] = implementation
    return operator


_REMEDY = (
    "call the function of halny.kernels that it belongs to, or trace and run inside "
    "halny.kernels.dispatch.reference_only(), where all is plain PyTorch"
)


class _NoDerivative(torch.autograd.Function):
    """Runs an operator on tensors that require gradients; a backward pass that reaches it raises."""

    @staticmethod
    def forward(ctx, operator, *args):
        ctx.operator = operator
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*args)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(f"{ctx.operator} has no derivative of its own: {_REMEDY}")


def once_differentiable(backward):
    """For the backward of kernels, whose results have no derivatives: raises where they are asked for.

    PyTorch's decorator of that name refuses later, in the second backward pass, and only on paths that lead through
    the upstream gradient: of ``loss + grad(loss, x, create_graph=True)[0].square().sum()`` the penalty would be lost.
    """
    once = torch.autograd.function.once_differentiable(backward)

    @functools.wraps(backward)
    def strictly(ctx, *upstream):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # enabled in a backward by create_graph
            raise RuntimeError(
                f"{type(ctx).__name__} is once_differentiable: create_graph=True asks for derivatives of its gradients,"
                " and kernels have none; compute it inside halny.kernels.dispatch.reference_only(), and not in place"
            )
        return once(ctx, *upstream)

    return strictly


@torch.compiler.assume_constant_result
def in_transform() -> bool:
    """Whether derivatives may be wanted that only PyTorch's code has.

    Inside a transform of torch.func; at a level of forward-mode derivatives; and while torch.export makes a graph that
    may be trained, since it holds what a Function's forward does, and no Function. (Exported under no_grad, it holds
    operators.)
    """
    return (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or (torch.compiler.is_exporting() and torch.is_grad_enabled())
    )


def _is_dual(args) -> bool:
    """Whether a tensor among args carries a forward-mode derivative."""
    return forward_ad._current_level >= 0 and any(
        isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args
    )


def is_reference_only() -> bool:
    """Whether every operation runs its reference, by the switch or because only it has the derivatives asked for."""
    return _reference_only or in_transform()


def set_reference_only(enabled: bool) -> None:
    """The one switch: with True every operation of halny runs its reference, until switched back."""
    global _reference_only
    _reference_only = enabled


@contextmanager
def reference_only(enabled: bool = True):
    """``set_reference_only`` for the length of a with block."""
    before = _reference_only
    set_reference_only(enabled)
    try:
        yield
    finally:
        set_reference_only(before)


def set_debug_checks(enabled: bool) -> None:
    """With True, checks that must read values (label ranges, positions, cu_seqlens) run on CUDA tensors as well.

    Off by default, because each of them makes the host wait for the GPU. On CPU tensors they always run.
    """
    global _checks_cuda_values
    _checks_cuda_values = enabled


def can_check_values(x: Tensor) -> bool:
    """Whether the values of ``x`` may be read for a check: not in a trace or transform, nor if a GPU had to stall."""
    if torch.compiler.is_compiling() or in_transform() or isinstance(x, FakeTensor) or x.is_meta or x.numel() == 0:
        return False
    return x.device.type == "cpu" or _checks_cuda_values


def upcast(x: Tensor) -> Tensor:
    """x in the dtype that references compute in: fp32, or fp64 for fp64 (which makes them a test's truth)."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product computes x in: autocast's where it is enabled, which leaves fp64 and integers."""
    device = x.device.type
    if x.dtype == torch.float64 or not x.is_floating_point() or device not in ("cuda", "cpu"):
        return x.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def autocast_disabled(x: Tensor):
    """A context in which what is computed on x's device is computed in the dtypes that it has."""
    device = "cuda" if on_gpu(x) else x.device.type
    return torch.autocast(device, enabled=False) if device in ("cuda", "cpu") else nullcontext()


def check_floating(name: str, x: Tensor) -> None:
    """TypeError unless ``x`` is a floating-point tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, got {x.dtype}")


def check_integer(name: str, x: Tensor) -> None:
    """TypeError unless ``x`` is an integer tensor (bool is none)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
        raise TypeError(f"{name} must be an integer tensor, got {x.dtype}")


def check_tensor(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...], shape: torch.Size | None = None) -> None:
    """TypeError unless ``x`` is of one of the dtypes, ValueError unless it is of that shape and contiguous."""
    if not isinstance(x, Tensor) or x.dtype not in dtypes:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a tensor of {' or '.join(str(d) for d in dtypes)}, got {got}")
    if shape is not None and x.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(x.shape)}")
    if not x.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {x.stride()}")


def check_overwritable(name: str, x: Tensor, instead: str) -> None:
    """What in-place functions check before they write. instead: the function that writes elsewhere.

    ValueError if elements of x share memory; RuntimeError, as PyTorch's but before the damage, for a leaf that requires
    a gradient and for its views.
    """
    if _overlaps(x):
        raise ValueError(
            f"{name} is expanded or overlaps itself, and what shares memory cannot be overwritten: "
            f"strides {x.stride()} of shape {tuple(x.shape)}; use {instead}"
        )
    if torch.is_grad_enabled() and any(y is not None and y.is_leaf and y.requires_grad for y in (x, x._base)):
        raise RuntimeError(
            f"{name} is a leaf that requires a gradient, or a view of one, which allows no in-place operation: "
            f"use {instead}"
        )


def _overlaps(x: Tensor) -> bool:
    """Whether two elements may share memory: a stride must exceed the span of the dimensions with smaller strides."""
    if x.is_contiguous() or x.numel() == 0:
        return False
    dimensions = [(stride, n) for stride, n in zip(x.stride(), x.shape, strict=True) if n > 1]
    for i, (stride, _) in enumerate(dimensions):
        if stride <= sum(s * (n - 1) for j, (s, n) in enumerate(dimensions) if j != i and s <= stride):
            return True
    return False


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether autograd is to differentiate with respect to one of them."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def check_no_gradient(instead: str, **tensors: Tensor) -> None:
    """RuntimeError naming the first tensor for which a gradient is wanted that is not made."""
    for name, x in tensors.items():
        if wants_gradient(x):
            raise RuntimeError(f"{name} requires a gradient, which is not made here: detach it, or use {instead}")


def check_same_device(**tensors: Tensor) -> None:
    """ValueError unless all tensors are on one device; names the first that is elsewhere."""
    (first_name, first), *rest = tensors.items()
    for name, x in rest:
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device}, but {first_name} is on {first.device}")


# ------------------------------------------------------------------------------------------------- what launchers share


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. As next_power_of_2, not Triton's, whose wrapper costs the host 2 us a call."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def as_rows(x: Tensor) -> Tensor:
    """x [..., N] as [rows, N] with one stride between rows and unit stride inside them; a copy only where it must be.

    Kernels of row operations take any row stride, 0 of an expanded row included. Copied are a last dimension that is
    not contiguous and leading dimensions that no single stride describes, such as those of ``y[:, :5]``.
    """
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        return x.contiguous().view(-1, x.shape[-1])
    return x.reshape(-1, x.shape[-1])


# By GPU generation (the major number of the compute capability; 0 for those not listed): rows of (columns up to which
# it holds, the launch constants). `bench/kernels.py --only NAME` says what a change of a row is worth.
TileTable = dict[int, list[tuple[int, dict[str, int]]]]


def tile(table: TileTable, n_columns: int, generation: int) -> dict[str, int]:
    """The launch constants of a table for rows of n_columns on a GPU of that generation."""
    rows = table.get(generation, table[0])
    return next((constants for limit, constants in rows if n_columns <= limit), rows[-1][1])


def generation_of(x: Tensor) -> int:
    """The GPU generation of x's device, 0 on the CPU."""
    if gpu := stands_for(x.device):
        return gpu.capability[0]
    return _generation(x.device) if x.is_cuda else 0


@functools.cache
def _generation(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def multiprocessors(device: torch.device) -> int:
    """SMs of a GPU; in the interpreter 1, so that a persistent grid there is a few programs that loop."""
    if gpu := stands_for(device):
        return gpu.multiprocessors
    return _multiprocessors(device) if device.type == "cuda" else 1


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
