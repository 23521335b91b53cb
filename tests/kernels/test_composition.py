"""Operations combined in ways that their author did not think of: each gives the right value, or refuses in words.

What is right is what plain PyTorch makes, ``reference_only()``. The kernels run in Triton's interpreter, in a process
that has TRITON_INTERPRET=1, and how many of them were launched is asserted: where a derivative is asked for that the
kernels lack, that is none, and the reference runs in their place.
"""

import gc
import weakref
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch._dynamo.testing
from helpers import assert_passes_in_the_interpreter
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from halny.kernels import dispatch, rms_norm, stochastic_rounding
from halny.kernels.chunk_cat import chunk_cat
from halny.kernels.cross_entropy import cross_entropy, cross_entropy_, cross_entropy_rows, cross_entropy_rows_
from halny.kernels.dispatch import INTERPRETED, reference_only
from halny.kernels.embedding import embedding
from halny.kernels.linear_cross_entropy import linear_cross_entropy
from halny.kernels.recompute_linear import add_rms_norm_linear, rms_norm_linear, swiglu_linear
from halny.kernels.rope import rope_qkv, rope_qkv_, rope_split_qkv_, rope_tables
from halny.kernels.swiglu import swiglu

on_the_cpu = pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1: elsewhere the reference runs")
COS, SIN = rope_tables(9, 4, 10000.0)
LABELS = torch.tensor([1, 2, -100, 4])


def made(*shapes: tuple[int, ...]) -> Callable[[], list[Tensor]]:
    return lambda: [torch.randn(shape) for shape in shapes]


class Operation(NamedTuple):
    """A scalar of the operation's outputs, curved in each of them, as a function of all that it differentiates."""

    function: Callable[..., Tensor]
    inputs: Callable[[], list[Tensor]]


def curved(*outputs: Tensor) -> Tensor:
    return sum((y.sin() * (i + 1)).sum() for i, y in enumerate(outputs))


OPERATIONS = {
    "rms_norm": Operation(lambda x, w: curved(rms_norm.rms_norm(x, w, 1e-5)), made((4, 8), (8,))),
    "add_rms_norm": Operation(
        lambda x, r, w: curved(*rms_norm.add_rms_norm(x, r, w, 1e-5)), made((4, 8), (4, 8), (8,))
    ),
    "swiglu": Operation(lambda x: curved(swiglu(x)), made((4, 8))),
    "rope_qkv": Operation(lambda x: curved(rope_qkv(x, COS, SIN, 2, 1)), made((2, 3, 4, 4))),
    "rope_qkv_": Operation(lambda x: curved(rope_qkv_(x * 1, COS, SIN, 2, 1)), made((2, 3, 4, 4))),
    "rope_split_qkv_": Operation(lambda x: curved(*rope_split_qkv_(x * 1, COS, SIN, 2, 1)), made((2, 3, 4, 4))),
    "cross_entropy": Operation(lambda x: cross_entropy(x, LABELS).sin(), made((4, 8))),
    "cross_entropy none": Operation(lambda x: curved(cross_entropy(x, LABELS, reduction="none")), made((4, 8))),
    "cross_entropy_": Operation(lambda x: cross_entropy_(x * 1, LABELS).sin(), made((4, 8))),
    "linear_cross_entropy": Operation(lambda x, w: linear_cross_entropy(x, w, LABELS).loss.sin(), made((4, 8), (7, 8))),
    "linear_cross_entropy none": Operation(
        lambda x, w: curved(linear_cross_entropy(x, w, LABELS, reduction="none").loss), made((4, 8), (7, 8))
    ),
    "rms_norm_linear": Operation(
        lambda x, n, w: curved(rms_norm_linear(x, n, w, 1e-5)), made((4, 8), (8,), (5, 8))
    ),
    "add_rms_norm_linear": Operation(
        lambda x, r, n, w: curved(*add_rms_norm_linear(x, r, n, w, 1e-5)), made((4, 8), (4, 8), (8,), (5, 8))
    ),
    "swiglu_linear": Operation(lambda x, w: curved(swiglu_linear(x, w)), made((4, 8), (5, 4))),
    "embedding": Operation(lambda w: curved(embedding(torch.tensor([1, 3, 1]), w)), made((5, 8))),
}  # fmt: skip
every_operation = pytest.mark.parametrize("name", OPERATIONS)


@pytest.fixture(autouse=True)
def _nothing_compiled():
    torch._dynamo.reset()


def leaves(inputs: list[Tensor]) -> list[Tensor]:
    return [x.clone().requires_grad_() for x in inputs]


def gradients(function, inputs: list[Tensor]) -> list[Tensor]:
    inputs = leaves(inputs)
    return list(torch.autograd.grad(function(*inputs), inputs))


def compiled(function):
    return torch.compile(function, backend="aot_eager", fullgraph=True)


# -------------------------------------------------------------------------------------------------------- derivatives


def dual_numbers(function, inputs, tangents):
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, t) for x, t in zip(inputs, tangents, strict=True)]
        return forward_ad.unpack_dual(function(*duals)).tangent


def dual_leaves(function, inputs, tangents):
    return dual_numbers(function, leaves(inputs), tangents)


def exported(strict: bool):
    """A model of the operation, exported and then trained."""

    class Model(torch.nn.Module):
        def __init__(self, function, inputs):
            super().__init__()
            self.function, self.weights = function, torch.nn.ParameterList(inputs)

        def forward(self, x):
            # beside the operation a way on which nothing can be lost, as a residual stream is
            return self.function(*self.weights) + sum((w * x).sum() for w in self.weights)

    def gradients_of_the_export(function, inputs, _):
        model = torch.export.export(Model(function, inputs), (torch.ones(1),), strict=strict).module()
        model(torch.ones(1)).backward()
        found = dict(model.named_parameters())
        return [found[f"weights.{i}"].grad - 1.0 for i in range(len(inputs))]

    return gradients_of_the_export


TRANSFORMS = {
    "func.grad": lambda f, x, t: torch.func.grad(f, tuple(range(len(x))))(*x),
    "func.vjp": lambda f, x, t: torch.func.vjp(f, *x)[1](torch.tensor(2.0)),
    "func.jvp": lambda f, x, t: torch.func.jvp(f, tuple(x), tuple(t))[1],
    "func.hessian": lambda f, x, t: torch.func.hessian(f)(*x),
    "vmap(grad)": lambda f, x, t: torch.vmap(torch.func.grad(f))(*map(torch.stack, zip(x, t, strict=True))),
    "compile(grad)": lambda f, x, t: compiled(torch.func.grad(f, tuple(range(len(x)))))(*x),
    "compile(jvp)": lambda f, x, t: compiled(lambda *y: torch.func.jvp(f, y, tuple(t))[1])(*x),
    "dual numbers": dual_numbers,
    "dual leaves": dual_leaves,
    "export, then train": exported(strict=False),
    "strict export, then train": exported(strict=True),
}  # fmt: skip


@on_the_cpu
@every_operation
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_runs_the_reference_or_refuses(transform, name, launches):
    operation, torch_makes = OPERATIONS[name], TRANSFORMS[transform]
    inputs, tangents = operation.inputs(), operation.inputs()
    if name == "cross_entropy_" and not transform.endswith(("jvp", "jvp)", "numbers")):  # which make no gradient
        with pytest.raises(RuntimeError, match=r"overwrites logits.*use cross_entropy"):
            torch_makes(operation.function, inputs, tangents)
    else:
        got = torch_makes(operation.function, inputs, tangents)
        with reference_only():
            want = torch_makes(operation.function, inputs, tangents)
        torch.testing.assert_close(got, want)
        assert any(x.count_nonzero() for x in ([want] if isinstance(want, Tensor) else want))
    assert not launches


@on_the_cpu
@every_operation
@pytest.mark.parametrize(
    "way", ["backward", "compile", "retain_graph", "backward(inputs)", "is_grads_batched", "vmap over backward"]
)
def test_a_first_derivative_runs_kernels(way, name, launches):
    operation = OPERATIONS[name]
    inputs = operation.inputs()
    with reference_only():
        want = gradients(operation.function, inputs)
    assert not launches
    mine = leaves(inputs)
    if way == "compile":
        if name == "cross_entropy_":
            with pytest.raises(torch._dynamo.exc.Unsupported):
                compiled(operation.function)(*mine)
            return
        got = [torch.autograd.grad(compiled(operation.function)(*mine), mine)]
    elif way == "retain_graph":
        loss = operation.function(*mine)
        got = [torch.autograd.grad(loss, mine, retain_graph=keep) for keep in (True, True, False)]
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(loss, mine)
    elif way == "is_grads_batched":
        batched = torch.autograd.grad(operation.function(*mine), mine, torch.tensor([1.0, -2.0]), is_grads_batched=True)
        got = [[x[0] for x in batched], [x[1] / -2 for x in batched]]
    elif way == "vmap over backward":
        loss = operation.function(*mine)
        pull = lambda upstream: torch.autograd.grad(loss, mine, upstream, retain_graph=True)  # noqa: E731
        batched = torch.vmap(pull)(torch.tensor([1.0, -2.0]))
        got = [[x[0] for x in batched], [x[1] / -2 for x in batched]]
    elif way == "backward(inputs)":
        operation.function(*mine).backward(inputs=mine)
        got = [[x.grad for x in mine]]
    else:
        got = [torch.autograd.grad(operation.function(*mine), mine)]
    for each in got:
        torch.testing.assert_close(list(each), want)
    assert launches


@on_the_cpu
@pytest.mark.parametrize("name", ["rope_qkv", "rope_qkv_", "rope_split_qkv_"])
def test_a_graph_for_any_length_is_compiled_once(name):
    """No check makes a number of a symbol."""
    loss, counter = OPERATIONS[name].function, torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    for T in (3, 4, 5, 7):
        inputs = [torch.randn(2, T, 4, 4)]
        torch.testing.assert_close(
            gradients(torch.compile(loss, backend=counter, fullgraph=True), inputs), gradients(loss, inputs)
        )
    assert counter.frame_count == 2  # of the first length, and of all


@on_the_cpu
@every_operation
@pytest.mark.parametrize("way", ["loss and penalty", "penalty alone", "backward(inputs)"])
def test_a_second_derivative_is_refused(way, name, launches):
    """As soon as it is announced, so that nowhere the penalty on a gradient is lost."""
    mine = leaves(OPERATIONS[name].inputs())
    with pytest.raises(RuntimeError, match=r"once_differentiable.*create_graph=True.*reference_only"):
        loss = OPERATIONS[name].function(*mine)
        if way == "backward(inputs)":
            loss.backward(inputs=mine, create_graph=True)
        penalty = sum(g.square().sum() for g in torch.autograd.grad(loss, mine, create_graph=True))
        torch.autograd.grad(penalty + loss if way == "loss and penalty" else penalty, mine)
    assert launches or name == "embedding"  # whose forward pass is PyTorch's


KEEPS_AN_INPUT = ["rms_norm", "add_rms_norm", "swiglu", "rms_norm_linear", "add_rms_norm_linear", "swiglu_linear"]


@on_the_cpu
@pytest.mark.parametrize("name", KEEPS_AN_INPUT)
def test_a_second_derivative_of_a_compiled_function_is_refused(name, launches):
    """By torch.compile, if the backward is handed an argument of the graph; else it loses F.cross_entropy's too."""
    mine = leaves(OPERATIONS[name].inputs())
    loss = compiled(OPERATIONS[name].function)(*mine)
    first = torch.autograd.grad(loss, mine, create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(loss + sum(g.square().sum() for g in first), mine)
    assert launches


# ----------------------------------------------------------------------------------------------------- bare operators


def test_every_operator_has_an_autograd_kernel():
    """Not only those tried here: PyTorch's default would return zeros."""
    operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("halny::")]
    assert len(operators) >= len(dispatch.implementations)
    for name in operators:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd"), name


BARE = {
    "backward": lambda f, x: f(x.requires_grad_()).backward(),
    "func.grad": lambda f, x: torch.func.grad(f)(x),
    "func.jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "dual numbers": lambda f, x: dual_numbers(f, [x], [x]),
    "compile(grad)": lambda f, x: compiled(torch.func.grad(f))(x),
    "compile(jvp)": lambda f, x: compiled(lambda y: torch.func.jvp(f, (y,), (y,)))(x),
    "exported as it is": lambda f, x: torch.export.export(Bare(f), (x,)).module()(x.requires_grad_()).backward(),
}


class Bare(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@on_the_cpu
@pytest.mark.parametrize("route", BARE)
def test_a_bare_operator_refuses_to_be_differentiated(route):
    x, w, one = torch.randn(4, 8), torch.ones(8), torch.ones(())
    for name, function in {
        "rms_norm_forward": lambda z: rms_norm.rms_norm_forward(z, w, 1e-5)[0].sum(),
        "cross_entropy_rows": lambda z: cross_entropy_rows(z, LABELS, one, -100, False)[0].sum(),
        "cross_entropy_rows_": lambda z: cross_entropy_rows_(z * 1, LABELS, one, -100)[0].sum(),
    }.items():
        torch._dynamo.reset()
        with pytest.raises((RuntimeError, torch._dynamo.exc.Unsupported), match=rf"(?s)halny\W*{name}.*reference_only"):
            BARE[route](function, x.clone())
    with torch.no_grad():
        assert not rms_norm.rms_norm_forward(x.requires_grad_(), w, 1e-5)[0].requires_grad
    assert torch.vmap(lambda z: rms_norm.rms_norm_forward(z, w, 1e-5)[0])(torch.stack([x, x])).shape == (2, 4, 8)


@on_the_cpu
@every_operation
def test_a_graph_of_operators_refuses_to_be_differentiated(name, launches):
    """make_fx records what runs, and no Function."""
    graph = make_fx(OPERATIONS[name].function)(*OPERATIONS[name].inputs())
    mine = leaves(OPERATIONS[name].inputs())
    if name == "embedding":  # whose forward pass is PyTorch's
        torch.testing.assert_close(torch.autograd.grad(graph(*mine), mine), torch.autograd.grad(
            OPERATIONS[name].function(*mine), mine))  # fmt: skip
    else:
        with pytest.raises(NotImplementedError, match=r"halny\S* has no derivative of its own.*reference_only"):
            torch.autograd.grad(graph(*mine), mine)
        assert launches


# ----------------------------------------------------------------------------------------------------------- in place


IN_PLACE = {
    "cross_entropy_": lambda x: cross_entropy_(x.view(-1, 8), torch.tensor([1, 2, 3, 4])),
    "rope_qkv_": lambda x: rope_qkv_(x.view(1, 2, 4, 4), COS, SIN, 2, 1),
    "rope_split_qkv_": lambda x: rope_split_qkv_(x.view(1, 2, 4, 4), COS, SIN, 2, 1),
}
in_place = pytest.mark.parametrize("name", IN_PLACE)
UNTOUCHED = {  # what is refused: (a tensor of four rows of 8, what the refusal says)
    "a leaf": (lambda: torch.randn(4, 8).requires_grad_(), "leaf"),
    "a view of a leaf": (lambda: torch.randn(2, 2, 8).requires_grad_().view(4, 8), "leaf"),
    "expanded": (lambda: (torch.randn(1, 1, 1, 4).requires_grad_() * 1).expand(1, 2, 4, 4), "shares memory"),
    "overlapping": (
        lambda: (torch.randn(99).requires_grad_() * 1).as_strided((1, 2, 4, 4), (32, 6, 4, 1)), "shares memory",
    ),
}  # fmt: skip


@in_place
@pytest.mark.parametrize("kind", UNTOUCHED)
def test_what_cannot_be_overwritten_is_refused_untouched(kind, name, launches):
    make, words = UNTOUCHED[kind]
    x = make()
    memory = torch.empty(0).set_(x.untyped_storage())
    before = memory.clone()
    with pytest.raises((RuntimeError, ValueError), match=f"{words}.*use (cross_entropy|rope_qkv)$"):
        if x.ndim == 4 and name == "cross_entropy_":
            cross_entropy_(x, torch.ones(1, 2, 4, dtype=torch.int64))
        elif x.ndim == 4:
            {"rope_qkv_": rope_qkv_, "rope_split_qkv_": rope_split_qkv_}[name](x, COS, SIN, 2, 1)
        else:
            IN_PLACE[name](x)
    assert torch.equal(memory, before) and not launches


@in_place
def test_autograd_refuses_before_anything_is_overwritten(name, launches):
    """One of several views that one function returned."""
    both = torch.randn(2, 4, 8).requires_grad_() * 1
    before = both.detach().clone()
    with pytest.raises(RuntimeError, match="view"):
        IN_PLACE[name](both.unbind(0)[0])
    assert torch.equal(both, before) and not launches


@in_place
def test_a_view_of_all_is_overwritten(name, launches):
    """``cross_entropy_(logits.view(-1, V), labels)``, the usual call."""
    leaf = torch.randn(2, 2, 8).requires_grad_()
    outside = {"cross_entropy_": "cross_entropy", "rope_qkv_": "rope_qkv", "rope_split_qkv_": "rope_qkv"}[name]
    functions = {"cross_entropy": lambda x: cross_entropy(x.view(-1, 8), torch.tensor([1, 2, 3, 4])),
                 "rope_qkv": lambda x: rope_qkv(x.view(1, 2, 4, 4), COS, SIN, 2, 1)}  # fmt: skip
    want = functions[outside](leaf)
    want_gradient = torch.autograd.grad(want.sin().sum(), leaf)[0]
    whole = leaf * 1
    got = IN_PLACE[name](whole)
    if name == "rope_split_qkv_":
        got = torch.cat(got, dim=2)
    torch.testing.assert_close(got, want)
    if name != "cross_entropy_":
        torch.testing.assert_close(whole.detach().view(want.shape), want.detach())
    torch.testing.assert_close(torch.autograd.grad(got.sin().sum(), leaf)[0], want_gradient)
    assert bool(launches) == INTERPRETED


def test_a_view_is_refused_untouched_where_overwriting_all_would_lose_something():
    """A neighbour's memory; a hook of the view, or of the module that made it."""
    labels = torch.tensor([[1, 2, 3, 4]])
    linear = torch.nn.Linear(8, 8, bias=False)
    linear.register_full_backward_hook(lambda *_: None)
    hooked = (torch.randn(4, 8).requires_grad_() * 1).view(1, 4, 8)
    hooked.register_hook(lambda gradient: gradient)
    for logits, words in (
        ((torch.randn(1, 5, 8).requires_grad_() * 1)[:, :-1], r"a part of a tensor \(1, 5, 8\)"),
        (hooked, "hook"),
        (linear(torch.randn(4, 8)).view(1, 4, 8), "hook"),
    ):
        before = logits.detach().clone()
        with pytest.raises(RuntimeError, match=f"^logits.*{words}.*use cross_entropy"):
            cross_entropy_(logits, labels)
        assert torch.equal(logits, before)


@pytest.mark.parametrize("used", ["the view before", "the view afterwards", "the whole afterwards"])
def test_other_uses_of_a_view_that_was_overwritten_are_noticed(used):
    whole = torch.randn(2, 2, 8).requires_grad_() * 1
    view = whole.view(-1, 8)
    other = view.square().sum() if "before" in used else None
    loss = cross_entropy_(view, torch.tensor([1, 2, 3, 4]))
    other = other if other is not None else (view if "view" in used else whole).sum()
    with pytest.raises(RuntimeError, match="inplace" if "before" in used else "overwrote logits"):
        (loss + other).backward()


def test_in_place_the_gradient_is_a_saved_tensor():
    """It is freed with the graph, is not multiplied twice, and must not be written to by others."""
    leaf, labels = torch.randn(4, 8).requires_grad_(), torch.tensor([1, 2, 3, 4])
    loss = cross_entropy_(leaf * 1, labels)
    (first,) = torch.autograd.grad(loss * 3, leaf)
    before = first.clone()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaf)
    assert torch.equal(first, before)

    logits = leaf * 1
    loss = cross_entropy_(logits, labels)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()

    held = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(weakref.ref(x)) or x, lambda x: x):
        loss = cross_entropy_(leaf * 1, labels)
    loss.backward()
    gc.collect()
    assert held and all(x() is None for x in held) and loss.grad_fn is not None


# ------------------------------------------------------------------------------------- gradients of every argument


def test_rope_tables_that_are_trained_get_their_gradient():
    qkv, theta = torch.randn(2, 3, 4, 4).requires_grad_(), torch.tensor(10000.0, requires_grad=True)

    def loss(function):
        angle = torch.arange(9.0)[:, None] * theta ** (-torch.arange(0, 4, 2) / 4)
        return curved(function(qkv * 1, angle.cos(), angle.sin(), 2, 1))

    with reference_only():
        want = torch.autograd.grad(loss(rope_qkv), [qkv, theta])
    torch.testing.assert_close(torch.autograd.grad(loss(rope_qkv), [qkv, theta]), want)
    assert want[1] != 0
    for function in (rope_qkv_, rope_split_qkv_):
        with pytest.raises(RuntimeError, match=r"cos requires a gradient.*use rope_qkv"):
            loss(function)


def test_what_makes_no_gradients_refuses_tensors_that_require_them():
    a, b = torch.randn(4, 8).bfloat16().requires_grad_(), torch.randn(4, 8).bfloat16()
    for wrong, name in (((a, b), "a"), ((b, a), "b")):
        with pytest.raises(RuntimeError, match=f"^{name} requires a gradient"):
            stochastic_rounding.add_wide(*wrong)
    with pytest.raises(RuntimeError, match=r"^x requires a gradient"):
        stochastic_rounding.add_rounded_(b, a, seed=1)
    with pytest.raises(RuntimeError, match=r"^tensors\[0\] requires a gradient"):
        chunk_cat([a], 0, 2, out=torch.empty(2, 16))
    with torch.no_grad():
        torch.testing.assert_close(stochastic_rounding.add_wide(a, b), a.float() + b.float())


def test_what_an_operation_lacks_is_a_type_error():
    x, w, labels = torch.randn(4, 8), torch.randn(7, 8), torch.tensor([1, 2, 3, 4])
    for call in (
        lambda: cross_entropy(x, labels, label_smoothing=0.1),
        lambda: cross_entropy(x, labels, weight=torch.ones(8)),
        lambda: cross_entropy_(x, labels, label_smoothing=0.1),
        lambda: linear_cross_entropy(x, w, labels, bias=torch.ones(7)),
        lambda: linear_cross_entropy(x, w, labels, label_smoothing=0.1),
        lambda: rms_norm.rms_norm(x, None, 1e-5),
        lambda: rms_norm.rms_norm(x, torch.ones(8), 1e-5, offset=1.0),
    ):
        with pytest.raises(TypeError):
            call()


def test_value_checks_do_not_break_vmap():
    logits, labels = torch.randn(3, 4, 8), torch.randint(8, (3, 4))
    want = torch.stack([cross_entropy(x, y) for x, y in zip(logits, labels, strict=True)])
    torch.testing.assert_close(torch.vmap(cross_entropy)(logits, labels), want)
    qkv, positions = torch.randn(3, 1, 5, 4, 4), torch.randint(9, (3, 1, 5))
    want = torch.stack([rope_qkv(x, COS, SIN, 2, 1, p) for x, p in zip(qkv, positions, strict=True)])
    torch.testing.assert_close(torch.vmap(lambda x, p: rope_qkv(x, COS, SIN, 2, 1, p))(qkv, positions), want)
    with pytest.raises(ValueError, match="labels must lie in"):
        cross_entropy(logits[0], labels[0] + 8)


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: this process runs the kernels itself")
def test_in_the_interpreter():
    assert_passes_in_the_interpreter(__file__)
