"""The operations of kernels/: their dispatch, their meaning, and what they refuse.

Every operation is compared, forward and every gradient, with a statement of its formula that is not ours (PyTorch's
function or Hugging Face's Mistral), bounded by the error that the statement itself makes at that dtype. The whole file
also passes with TRITON_INTERPRET=1, where operations that have a Triton kernel run it.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_to_truth
from transformers import MistralConfig as HFConfig
from transformers.models.mistral import modeling_mistral as hf

from halny.kernels import dispatch
from halny.kernels.attention import attention, attention_reference
from halny.kernels.cross_entropy import cross_entropy, cross_entropy_reference
from halny.kernels.dispatch import reference_only
from halny.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from halny.kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from halny.kernels.rope import rope_qkv, rope_qkv_, rope_qkv_reference, rope_split_qkv_, rope_tables
from halny.kernels.swiglu import swiglu, swiglu_reference
from halny.model.mistral import PRESETS, Mistral

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
EPS = 1e-5


# ------------------------------------------------------------------------------------------------------- how to compare


def contiguous(x):
    return x.clone(memory_format=torch.contiguous_format)


def strided(x):
    """Every second element of the last dimension of a larger buffer, the others poisoned."""
    buffer = torch.full((*x.shape, 2), float("nan"), dtype=x.dtype)
    buffer[..., 0] = x
    return buffer[..., 0]


def transposed(x):
    return x.mT.contiguous().mT if x.ndim > 1 else contiguous(x)


def offset(x):
    """Starts one element into its storage, so that it is not aligned; NaN before and after."""
    buffer = torch.full((x.numel() + 2,), float("nan"), dtype=x.dtype)
    buffer[1:-1] = x.flatten()
    return buffer[1:-1].view(x.shape)


LAYOUTS = [contiguous, strided, transposed, offset]


def as_tuple(y):
    return y if isinstance(y, tuple) else (y,)


def outputs_and_gradients(operation: Callable, inputs, upstream):
    """The outputs of operation and the gradients of all inputs, from two backward passes that must agree bitwise."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = as_tuple(operation(*inputs))
    used = [(y, g) for y, g in zip(outputs, upstream, strict=True) if g is not None]
    first, second = (
        torch.autograd.grad(
            [y for y, _ in used],
            inputs,
            [g for _, g in used],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a[~a.isnan()], b[~b.isnan()]), (
            "second backward differs"
        )
    return [y.detach() for y in outputs], list(first)


def compare(ours: Callable, theirs: Callable, *inputs, layout=contiguous, unused=(), roundings=1.0, truth=None):
    """Outputs and all gradients of ours against theirs, which gives the truth too, in fp64 of the same inputs.

    layout is applied to the inputs and to the upstream gradients of ours; all of them must come out bitwise unchanged.
    unused: numbers of outputs that have no upstream gradient.
    """
    with torch.no_grad():
        shapes = as_tuple(theirs(*inputs))
    upstream = [None if i in unused else torch.randn_like(y) for i, y in enumerate(shapes)]
    laid = [layout(x) for x in (*inputs, *(g for g in upstream if g is not None))]
    before = [x.clone() for x in laid]
    gradients = iter(laid[len(inputs) :])
    got = outputs_and_gradients(ours, laid[: len(inputs)], [g if g is None else next(gradients) for g in upstream])
    for now, then in zip(laid, before, strict=True):
        assert torch.equal(now, then), "an input or an upstream gradient was changed"

    same = outputs_and_gradients(theirs, inputs, upstream)
    wide = [None if g is None else g.double() for g in upstream]
    true = outputs_and_gradients(truth or theirs, [x.double() for x in inputs], wide)
    for kind, *sets in zip(("output", "gradient"), got, same, true, strict=True):
        for i, (a, b, c) in enumerate(zip(*sets, strict=True)):
            # fp64 has no wider truth: leave room for another order of summation
            assert_close_to_truth(a, b, c, roundings=64 if a.dtype == torch.float64 else roundings, name=f"{kind} {i}")


def test_the_comparison_can_fail():
    torch_same = torch.tensor([1.0, 2.0, 3.01])
    truth = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
    assert_close_to_truth(torch.tensor([1.0, 2.019, 3.0]), torch_same, truth)
    wrong = {
        "error": torch.tensor([1.0, 2.021, 3.0]),
        "finite": torch.tensor([1.0, float("nan"), 3.0]),
        "shapes": torch.tensor([1.0, 2.0]),
        "dtype": torch.tensor([1.0, 2.0, 3.0], dtype=torch.float16),
    }
    for message, ours in wrong.items():
        with pytest.raises(AssertionError, match=message):
            assert_close_to_truth(ours, torch_same, truth)
    infinite = torch.tensor([1.0, -float("inf"), float("nan")])
    assert_close_to_truth(infinite, infinite, infinite.double())
    with pytest.raises(AssertionError, match="wrong inf"):
        assert_close_to_truth(-infinite, infinite, infinite.double())


# -------------------------------------------------------------------------------- every public function, one small call


class Case(NamedTuple):
    function: Callable
    inputs: Callable[[], list[torch.Tensor]]  # fresh ones
    call: Callable  # (function or its reference, *inputs) -> outputs
    reference: Callable
    n_differentiable: int  # of the inputs, from the first


def rotated(n_heads=4, n_kv_heads=2, T=6, head_dim=8):
    return [torch.randn(2, T, n_heads + 2 * n_kv_heads, head_dim), *rope_tables(T + 3, head_dim, 1e4)]


CASES = {
    "rms_norm": Case(
        rms_norm,
        lambda: [torch.randn(3, 41), torch.randn(41)],
        lambda f, x, w: f(x, w, EPS),
        rms_norm_reference,
        2,
    ),
    "add_rms_norm": Case(
        add_rms_norm,
        lambda: [torch.randn(3, 41), torch.randn(3, 41), torch.randn(41)],
        lambda f, x, r, w: f(x, r, w, EPS),
        add_rms_norm_reference,
        3,
    ),
    "rope_qkv": Case(rope_qkv, rotated, lambda f, x, cos, sin: f(x, cos, sin, 4, 2), rope_qkv_reference, 1),
    "rope_qkv_": Case(
        rope_qkv_,
        rotated,
        lambda f, x, cos, sin: f(x.clone(), cos, sin, 4, 2),
        rope_qkv_reference,
        1,
    ),
    "rope_split_qkv_": Case(
        rope_split_qkv_,
        rotated,
        lambda f, x, cos, sin: f(x.clone(), cos, sin, 4, 2),
        lambda *arguments: rope_qkv_reference(*arguments).split([4, 2, 2], dim=2),
        1,
    ),
    "swiglu": Case(swiglu, lambda: [torch.randn(3, 82)], lambda f, x: f(x), swiglu_reference, 1),
    "cross_entropy": Case(
        cross_entropy,
        lambda: [torch.randn(5, 41), torch.tensor([0, 40, -100, 7, 7])],
        lambda f, x, labels: f(x, labels),
        cross_entropy_reference,
        1,
    ),
    "linear_cross_entropy": Case(
        linear_cross_entropy,
        lambda: [torch.randn(5, 16), torch.randn(41, 16), torch.tensor([0, 40, -100, 7, 7])],
        lambda f, x, w, labels: f(x, w, labels),
        linear_cross_entropy_reference,
        2,
    ),
    "attention": Case(
        attention,
        lambda: [torch.randn(2, 9, 4, 8), torch.randn(2, 9, 2, 8), torch.randn(2, 9, 2, 8)],
        lambda f, q, k, v: f(q, k, v, window=4),
        attention_reference,
        3,
    ),
    "attention of documents": Case(
        attention,
        lambda: [*CASES["attention"].inputs(), torch.tensor([0, 1, 9, 14, 18], dtype=torch.int32)],
        lambda f, q, k, v, cu: f(q, k, v, cu_seqlens=cu, max_seqlen=8),
        attention_reference,
        3,
    ),
}
each_function = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def run_case(case: Case, inputs, wrap=lambda f: f, wanted=None):
    """Outputs, and the gradients of the inputs whose numbers are wanted, the loss touching every floating output."""
    wanted = range(case.n_differentiable) if wanted is None else wanted
    inputs = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
    outputs = as_tuple(wrap(lambda *x: case.call(case.function, *x))(*inputs))
    loss = sum(y.float().sin().sum() for y in outputs if y.is_floating_point())
    return [*outputs, *torch.autograd.grad(loss, [inputs[i] for i in wanted])]


@each_function
def test_compiles_without_a_graph_break(case):
    inputs = case.inputs()
    torch._dynamo.reset()
    compiled = run_case(case, inputs, lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"))
    for a, b in zip(compiled, run_case(case, inputs), strict=True):
        torch.testing.assert_close(a, b)


@each_function
def test_runs_on_the_meta_device(case, launches):
    inputs = case.inputs()
    on_meta = run_case(case, [x.to("meta") for x in inputs])
    assert not launches
    for a, b in zip(on_meta, run_case(case, inputs), strict=True):
        assert a.is_meta and (a.shape, a.dtype) == (b.shape, b.dtype)


@each_function
def test_reference_only_is_bitwise_the_reference(case, launches):
    inputs = case.inputs()
    with reference_only():
        got = as_tuple(case.call(case.function, *inputs))
    assert not launches
    for a, b in zip(got, as_tuple(case.call(case.reference, *inputs)), strict=True):
        assert torch.equal(a, b)


@each_function
@pytest.mark.skipif(dispatch.INTERPRETED, reason="TRITON_INTERPRET=1 sends CPU tensors to the kernels")
def test_cpu_tensors_run_the_reference(case, launches):
    run_case(case, case.inputs())
    assert not launches


@each_function
def test_without_gradients(case):
    inputs = case.inputs()
    want = as_tuple(case.call(case.function, *inputs))
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            leaves = [x.clone().requires_grad_(i < case.n_differentiable) for i, x in enumerate(inputs)]
            got = as_tuple(case.call(case.function, *leaves))
        assert not any(y.requires_grad for y in got)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@each_function
def test_each_input_may_be_frozen(case):
    """A gradient that nobody asks for changes no other one."""
    inputs = case.inputs()
    gradients = run_case(case, inputs)[-case.n_differentiable :]
    for i in range(case.n_differentiable):
        torch.testing.assert_close(run_case(case, inputs, wanted=[i])[-1], gradients[i])


# ------------------------------------------------------------------------------------------------------------- dispatch

TOY = '''
"""A toy operation as the files of kernels/ are made: kernel, reference, public function."""
import torch, triton, triton.language as tl
from halny.kernels import dispatch

@triton.jit
def double_kernel(p_x, p_y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + i, 2 * tl.load(p_x + i, mask=i < n), mask=i < n)

def double(x):
    if not dispatch.runs_kernel(x):
        return 2 * x
    y = torch.full_like(x, float("nan"))
    dispatch.launch(double_kernel, (triton.cdiv(x.numel(), 16),), x, y, x.numel(), BLOCK=16)
    return y

x = torch.randn(41)
'''


def run_toy(tmp_path, code: str, interpreted: bool) -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported, and kernels from their file."""
    (tmp_path / "toy.py").write_text(TOY + code)
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    done = subprocess.run([sys.executable, tmp_path / "toy.py"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_interpreted_kernels_run_on_cpu_tensors(tmp_path):
    code = """
assert dispatch.INTERPRETED and dispatch.runs_kernel(x) and not dispatch.runs_kernel(x.to("meta"))
assert torch.equal(double(x), 2 * x) and dispatch.launches == {"double_kernel": 1}
double(x)
assert dispatch.launches["double_kernel"] == 2
with dispatch.reference_only():
    assert torch.equal(double(x), 2 * x) and not dispatch.runs_kernel(x)
    with dispatch.reference_only(False):
        assert dispatch.runs_kernel(x)
    assert not dispatch.runs_kernel(x)
try:
    with dispatch.reference_only():
        raise KeyError
except KeyError:
    pass
assert dispatch.runs_kernel(x) and dispatch.launches["double_kernel"] == 2
dispatch.set_reference_only(True)
assert not dispatch.runs_kernel(x)
"""
    run_toy(tmp_path, code, interpreted=True)


def test_cpu_tensors_run_the_reference_without_the_interpreter(tmp_path):
    code = """
assert not dispatch.INTERPRETED and not dispatch.runs_kernel(x)
assert torch.equal(double(x), 2 * x) and not dispatch.launches
"""
    run_toy(tmp_path, code, interpreted=False)


def test_wrapped_kernels_launch_under_the_name_of_their_function(tmp_path):
    code = """
wrapped = triton.heuristics({"BLOCK": lambda arguments: 16})(double_kernel)
y = torch.empty_like(x)
dispatch.launch(wrapped, (3,), x, y, 41)
assert torch.equal(y, 2 * x) and dispatch.launches == {"double_kernel": 1}, dispatch.launches
"""
    run_toy(tmp_path, code, interpreted=True)


def test_register_operator():
    def implementation(x):
        return 2 * x

    double = dispatch.register_operator("test_double(Tensor x) -> Tensor", implementation, torch.empty_like)
    x = torch.randn(3)
    assert torch.equal(double(x), 2 * x) and double(x.to("meta")).shape == (3,)
    torch.library.opcheck(double, (x,))
    assert torch.equal(torch.compile(double, fullgraph=True, backend="eager")(x), 2 * x)


def test_value_checks_never_read_a_traced_or_meta_tensor():
    x = torch.zeros(3, dtype=torch.long)
    assert dispatch.can_check_values(x)
    assert not dispatch.can_check_values(x.to("meta")) and not dispatch.can_check_values(x[:0])
    with torch._subclasses.FakeTensorMode() as mode:
        assert not dispatch.can_check_values(mode.from_tensor(x))


# ------------------------------------------------------------------------------------------------------------- rms_norm


def torch_add_rms_norm(x, residual, weight):
    s = x + residual
    return F.rms_norm(s, s.shape[-1:], weight, EPS), s


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(16,), (1, 1), (3, 41), (2, 5, 123), (1, 760), (133, 64)])
def test_rms_norm(shape, dtype):
    x, weight = 3 * torch.randn(shape, dtype=dtype), torch.randn(shape[-1], dtype=dtype)
    compare(lambda x, w: rms_norm(x, w, EPS), lambda x, w: F.rms_norm(x, x.shape[-1:], w, EPS), x, weight)
    compare(lambda x, r, w: add_rms_norm(x, r, w, EPS), torch_add_rms_norm, x, torch.randn_like(x), weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("unused", [(), (0,), (1,)])
def test_add_rms_norm_layouts_and_unused_outputs(layout, unused):
    x, residual, weight = torch.randn(6, 5, 41), torch.randn(6, 5, 41), torch.randn(41)
    ours = lambda x, r, w: add_rms_norm(x, r, w, EPS)  # noqa: E731
    compare(ours, torch_add_rms_norm, x, residual, weight, layout=layout, unused=unused)


def test_rms_norm_layouts():
    for layout in LAYOUTS:
        x, weight = torch.randn(6, 5, 41), torch.randn(41)
        compare(lambda x, w: rms_norm(x, w, EPS), lambda x, w: F.rms_norm(x, (41,), w, EPS), x, weight, layout=layout)
    expanded = torch.randn(1, 5, 41).expand(3, 5, 41)
    assert torch.equal(rms_norm(expanded, weight, EPS), rms_norm(expanded.contiguous(), weight, EPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_reference_rounds_as_hugging_face_does(dtype):
    module = hf.MistralRMSNorm(123, eps=EPS).to(dtype)
    torch.nn.init.normal_(module.weight)
    x = 3 * torch.randn(7, 123, dtype=dtype)
    assert torch.equal(rms_norm_reference(x, module.weight, EPS), module(x))


def test_rms_norm_of_mixed_dtypes_and_no_rows():
    x, weight = torch.randn(4, 64).bfloat16(), torch.randn(64)
    y = rms_norm(x, weight, EPS)
    assert_close_to_truth(
        y, (F.rms_norm(x, (64,), None, EPS) * weight).bfloat16(), F.rms_norm(x.double(), (64,), weight.double(), EPS)
    )
    assert rms_norm(torch.randn(0, 64), weight, EPS).shape == (0, 64)
    y, s = add_rms_norm(torch.randn(2, 0, 64), torch.randn(2, 0, 64), weight, EPS)
    assert y.shape == s.shape == (2, 0, 64)


def test_rms_norm_of_zeros_and_of_large_rows():
    x = torch.stack([torch.zeros(64), torch.full((64,), 1e18), torch.full((64,), 1e-12)])
    y = rms_norm(x, torch.ones(64), EPS)
    assert torch.equal(y[0], torch.zeros(64))
    torch.testing.assert_close(y[1], torch.ones(64))
    torch.testing.assert_close(y[2], torch.full((64,), 1e-12 / EPS**0.5))


# ----------------------------------------------------------------------------------------------------------------- rope


@pytest.mark.parametrize("head_dim", [64, 92, 128])
@pytest.mark.parametrize("theta", [10_000.0, 1_000_000.0])
def test_rope_tables_have_hugging_faces_bits(head_dim, theta):
    config = HFConfig(
        hidden_size=4 * head_dim, num_attention_heads=4, head_dim=head_dim, max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": theta},
    )  # fmt: skip
    cos, sin = hf.MistralRotaryEmbedding(config)(torch.empty(0), torch.arange(32768)[None])
    ours_cos, ours_sin = rope_tables(32768, head_dim, theta)
    assert torch.equal(torch.cat([ours_cos, ours_cos], -1), cos[0])
    assert torch.equal(torch.cat([ours_sin, ours_sin], -1), sin[0])


def hf_rope(qkv, cos, sin, n_heads, n_kv_heads, positions):
    """Hugging Face's rotation of packed q, k, v. It rounds cos and sin to the dtype of q first, so do we here."""
    q, k, v = qkv.split([n_heads, n_kv_heads, n_kv_heads], dim=2)
    cos, sin = (torch.cat([t, t], -1)[positions].to(qkv.dtype) for t in (cos, sin))
    q, k = hf.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    return torch.cat([q, k, v], dim=2)


def own_positions(B, T, max_len):
    """Rows of their own: out of order, repeated, the table's last entry among them."""
    positions = torch.randint(max_len, (B, T))
    positions[0, 0] = max_len - 1
    return positions


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_heads, n_kv_heads, head_dim", [(4, 2, 64), (8, 1, 92), (1, 1, 2), (3, 3, 128)])
@pytest.mark.parametrize("given", [False, True], ids=["default positions", "own positions"])
def test_rope(n_heads, n_kv_heads, head_dim, dtype, given):
    B, T, max_len = 3, 7, 300
    qkv = torch.randn(B, T, n_heads + 2 * n_kv_heads, head_dim, dtype=dtype)
    cos, sin = rope_tables(max_len, head_dim, 1e4)
    positions = own_positions(B, T, max_len) if given else None
    theirs_positions = positions if given else torch.arange(T).expand(B, T)
    heads = (n_heads, n_kv_heads)
    for layout in LAYOUTS:
        compare(
            lambda x: rope_qkv(x, cos, sin, *heads, positions),
            lambda x: hf_rope(x, cos, sin, *heads, theirs_positions),
            qkv,
            layout=layout,
        )
    # in place, on a copy: the same bits, the same gradient
    out, (gradient,) = outputs_and_gradients(lambda x: rope_qkv(x, cos, sin, *heads, positions), [qkv], [qkv])
    in_place, (gradient_,) = outputs_and_gradients(
        lambda x: rope_qkv_(x.clone(), cos, sin, *heads, positions), [qkv], [qkv]
    )
    assert torch.equal(out[0], in_place[0]) and torch.equal(gradient, gradient_)
    assert torch.equal(out[0][:, :, -n_kv_heads:], qkv[:, :, -n_kv_heads:])  # v, bit for bit


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope_in_place_writes_only_where_it_may(layout):
    qkv, cos, sin = rotated()
    want = rope_qkv(qkv, cos, sin, 4, 2)
    x = layout(qkv)
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())  # everything, the gaps between strides as well
    gaps = storage.isnan()
    returned = rope_qkv_(x, cos, sin, 4, 2)
    assert returned is x or returned.data_ptr() == x.data_ptr()
    assert torch.equal(x, want) and torch.equal(storage.isnan(), gaps)


@pytest.mark.parametrize("flat", [False, True], ids=["by heads", "as a linear layer returns it"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_rope_split_overwrites_what_it_is_given(layout, flat):
    qkv, cos, sin = rotated()
    want = rope_qkv(qkv, cos, sin, 4, 2)
    x = layout(qkv.flatten(2) if flat else qkv)
    storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
    gaps = storage.isnan()
    outputs = rope_split_qkv_(x, cos, sin, 4, 2)
    assert all(torch.equal(a, b) for a, b in zip(outputs, want.split([4, 2, 2], dim=2), strict=True))
    assert torch.equal(x, want.view(x.shape)) and torch.equal(storage.isnan(), gaps)
    assert {y.untyped_storage().data_ptr() for y in outputs} == {x.untyped_storage().data_ptr()}


@pytest.mark.parametrize("function", [rope_qkv_, rope_split_qkv_])
def test_rope_refuses_to_overwrite_elements_that_share_memory(function):
    qkv, cos, sin = rotated()
    for shared in (qkv[:1].expand(2, 6, 8, 8), qkv[:, :1].expand(2, 6, 8, 8)):
        with pytest.raises(ValueError, match="expanded"):
            function(shared, cos, sin, 4, 2)
    function(qkv[:, :1].as_strided((2, 1, 8, 8), (512, 0, 8, 1)), cos, sin, 4, 2)  # of one position, any stride is fine


def after_a_linear(bias: bool):
    """(weight, the projection of the same inputs with it, cos, sin); with a bias torch returns a view."""
    qkv, cos, sin = rotated()
    linear, x = torch.nn.Linear(7, 64, bias=bias), torch.randn(2, 6, 7)
    return linear.weight, lambda: linear(x), cos, sin


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("used", ["qkv", "qk", "v", "q and the projection", "the projection", "qkv and the projection"])
def test_rope_split_gradients_are_those_of_rope_qkv(used, bias):
    """Whatever is used afterwards, the overwritten projection among it, which then stands for what it holds."""
    weight, projection, cos, sin = after_a_linear(bias)
    parts, _, projected = used.partition("the projection")
    results = []
    for in_place in (True, False):
        y = projection()
        if in_place:
            assert y._is_view() == bias
            outputs, y = rope_split_qkv_(y, cos, sin, 4, 2), y.view(2, 6, 8, 8)
        else:
            y = rope_qkv(y.view(2, 6, 8, 8), cos, sin, 4, 2)
            outputs = y.split([4, 2, 2], dim=2)
        losses = [(i + 1) * outputs["qkv".index(name)].sin().sum() for i, name in enumerate(parts.partition(" ")[0])]
        if projected or not parts:
            losses.append(y.cos().sum())
        results.append([*outputs, *torch.autograd.grad(sum(losses), weight)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("bias", [False, True])
def test_rope_split_in_place_is_noticed_by_autograd(bias):
    weight, projection, cos, sin = after_a_linear(bias)

    def split(y):
        return rope_split_qkv_(y, cos, sin, 4, 2)

    leaf = torch.randn(2, 6, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match="in-place operation"):
        split(leaf)
    with torch.no_grad():
        want = rope_qkv(leaf.view(2, 6, 8, 8), cos, sin, 4, 2)
        split(leaf)
    assert torch.equal(leaf.view(2, 6, 8, 8), want) and leaf.is_leaf
    y = projection()
    saved = y.sin()  # which keeps y for its backward
    q, _, _ = split(y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (q.sum() + saved.sum()).backward()
    for overwrite in (lambda q, y: q.mul_(2), lambda q, y: y.mul_(2)):
        y = projection()
        q, _, _ = split(y)
        with pytest.raises(RuntimeError, match="modified inplace"):
            overwrite(q, y)
            q.sum().backward()


def test_rope_split_of_a_projection_without_a_gradient():
    """Frozen, or under inference_mode: nothing is asked of autograd, and the numbers are the same."""
    weight, projection, cos, sin = after_a_linear(bias=False)
    want = rope_qkv(projection().view(2, 6, 8, 8), cos, sin, 4, 2)
    weight.requires_grad_(False)
    frozen = rope_split_qkv_(projection(), cos, sin, 4, 2)
    with torch.inference_mode():
        inferred = rope_split_qkv_(projection(), cos, sin, 4, 2)
    for outputs in (frozen, inferred):
        assert not any(y.requires_grad for y in outputs) and torch.equal(torch.cat(outputs, dim=2), want)


@pytest.mark.parametrize(
    "kind", ["argument", "argument without a gradient", "intermediate", "argument, used afterwards"]
)
@pytest.mark.parametrize("function", [rope_qkv_, rope_split_qkv_])
def test_rope_in_place_compiles_without_a_graph_break(function, kind):
    """Of an argument of the compiled graph as well: it is overwritten, and its gradient goes through the rotation."""
    _, cos, sin = rotated()
    torch.manual_seed(3)
    x = torch.randn(2, 6, 8, 8)

    def f(y):
        y = 2 * y if kind == "intermediate" else y
        outputs = as_tuple(function(y, cos, sin, 4, 2))
        return [z.sin() for z in (*outputs, *([y] if "afterwards" in kind else []))]

    results = []
    torch._dynamo.reset()
    for call in (f, torch.compile(f, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_("without" not in kind)
        y = leaf.clone()
        outputs = call(y)
        results.append([*outputs, y])
        if leaf.requires_grad:
            results[-1] += torch.autograd.grad(sum(z.sum() for z in outputs) + y.sum(), leaf)
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_rope_positions():
    qkv, cos, sin = rotated()
    default = rope_qkv(qkv, cos, sin, 4, 2)
    counted = torch.arange(6).expand(2, 6)  # not contiguous
    assert torch.equal(rope_qkv(qkv, cos, sin, 4, 2, counted), default)
    assert torch.equal(rope_qkv(qkv, cos, sin, 4, 2, counted.int()), default)
    # documents that restart: each as if it were alone
    restarted = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 0, 1, 2, 3, 4]])
    y = rope_qkv(qkv, cos, sin, 4, 2, restarted)
    assert torch.equal(y[:1, 3:], rope_qkv(qkv[:1, 3:], cos, sin, 4, 2))
    assert torch.equal(y[1:, 1:], rope_qkv(qkv[1:, 1:], cos, sin, 4, 2))
    assert not torch.equal(y, default)
    expanded = qkv[:1].expand(3, -1, -1, -1)
    assert torch.equal(rope_qkv(expanded, cos, sin, 4, 2), rope_qkv(expanded.contiguous(), cos, sin, 4, 2))
    assert rope_qkv(qkv[:, :0], cos, sin, 4, 2).shape == (2, 0, 8, 8)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int8, torch.uint8])
def test_rope_positions_of_narrow_dtypes(dtype):
    qkv, cos, sin = rotated()
    positions = own_positions(2, 6, 9)
    assert torch.equal(rope_qkv(qkv, cos, sin, 4, 2, positions.to(dtype)), rope_qkv(qkv, cos, sin, 4, 2, positions))


def test_rope_turns_by_relative_position_only():
    """The property that rotary embeddings exist for: q . k depends on the distance of the two alone."""
    cos, sin = rope_tables(200, 64, 1e4)
    qkv = torch.randn(1, 1, 3, 64, dtype=torch.float64)

    def dot(p_query, p_key):
        q = rope_qkv(qkv, cos, sin, 1, 1, torch.tensor([[p_query]]))[0, 0, 0]
        return q @ rope_qkv(qkv, cos, sin, 1, 1, torch.tensor([[p_key]]))[0, 0, 1]

    torch.testing.assert_close(dot(5, 2), dot(105, 102), rtol=0, atol=1e-4)  # the tables are fp32
    assert abs(dot(5, 2) - dot(6, 2)) > 0.1


# --------------------------------------------------------------------------------------------------------------- swiglu

ACTIVATION = hf.MistralMLP(HFConfig(hidden_size=8, intermediate_size=8)).act_fn


def hf_swiglu(gate_up):
    gate, up = gate_up.chunk(2, dim=-1)
    return ACTIVATION(gate) * up


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2,), (1, 2), (3, 82), (2, 5, 246), (133, 64)])
def test_swiglu(shape, dtype):
    compare(swiglu, hf_swiglu, 3 * torch.randn(shape, dtype=dtype))
    gate_up = torch.randn(shape, dtype=dtype)
    assert torch.equal(swiglu_reference(gate_up), hf_swiglu(gate_up))


def test_swiglu_layouts_and_extremes():
    for layout in LAYOUTS:
        compare(swiglu, hf_swiglu, torch.randn(4, 5, 82), layout=layout)
    expanded = torch.randn(1, 5, 82).expand(3, 5, 82)
    assert torch.equal(swiglu(expanded), swiglu(expanded.contiguous()))
    assert swiglu(torch.randn(0, 82)).shape == (0, 41)
    extreme = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4, 1.0, 2.0, 3.0, 4.0, 5.0]])
    compare(swiglu, hf_swiglu, extreme)
    assert torch.equal(swiglu(extreme), torch.tensor([[-0.0, 0.0, 0.0, 400.0, 5e4]]))  # exp never overflows into NaN


# -------------------------------------------------------------------------------------------------------- cross-entropy


def formula(logits, labels, ignore_index=-100, reduction="mean"):
    """Cross-entropy written down: logsumexp minus the label's logit, over the rows that count."""
    counted = labels != ignore_index
    rows = torch.logsumexp(logits, -1) - logits.gather(-1, (labels.long() * counted)[..., None])[..., 0]
    rows = rows * counted
    return {"none": rows, "sum": rows.sum(), "mean": rows.sum() / counted.sum()}[reduction]


def torch_cross_entropy(logits, labels, ignore_index=-100, reduction="mean"):
    logits = logits if logits.dtype == torch.float64 else logits.float()
    flat = F.cross_entropy(
        logits.flatten(0, -2), labels.flatten().long(), ignore_index=ignore_index, reduction=reduction
    )
    return flat.view(labels.shape) if reduction == "none" else flat


def some_labels(shape, vocab_size, ignore_index=-100, ignored=0.3):
    labels = torch.randint(vocab_size, shape)
    labels[torch.rand(shape) < ignored] = ignore_index
    labels.view(-1)[0], labels.view(-1)[-1] = 0, vocab_size - 1
    return labels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape, vocab_size", [((7,), 41), ((2, 3), 1000), ((3, 1), 1), ((2, 2, 2), 257)])
def test_cross_entropy(shape, vocab_size, reduction, dtype):
    logits, labels = 3 * torch.randn(*shape, vocab_size, dtype=dtype), some_labels(shape, vocab_size)
    for layout in LAYOUTS:
        compare(
            lambda x: cross_entropy(x, labels, reduction=reduction),
            lambda x: torch_cross_entropy(x, labels, reduction=reduction),
            logits,
            layout=layout,
            truth=lambda x: formula(x, labels, reduction=reduction),
        )


@pytest.mark.parametrize("vocab_size", [31999, 32000, 32001])
def test_cross_entropy_of_a_real_vocabulary(vocab_size):
    logits, labels = torch.randn(3, vocab_size).bfloat16(), torch.tensor([0, vocab_size - 1, 17])
    compare(lambda x: cross_entropy(x, labels), lambda x: torch_cross_entropy(x, labels), logits)


def test_cross_entropy_of_ignored_labels():
    logits = torch.randn(4, 41, requires_grad=True)
    none = torch.full((4,), -100)
    assert cross_entropy(logits, none).isnan() and F.cross_entropy(logits, none).isnan()
    for reduction in ("sum", "none"):
        loss = cross_entropy(logits, none, reduction=reduction).sum()
        assert loss == 0
        assert torch.equal(torch.autograd.grad(loss, logits)[0], torch.zeros(4, 41))
    one = torch.tensor([-100, -100, 5, -100])
    torch.testing.assert_close(cross_entropy(logits, one), -logits.log_softmax(-1)[2, 5])
    torch.testing.assert_close(cross_entropy(logits, one, reduction="none")[2], cross_entropy(logits, one))


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 7, 40])
def test_cross_entropy_ignore_index(ignore_index):
    logits = torch.randn(64, 41)
    labels = some_labels((64,), 41, ignore_index)
    for reduction in ("mean", "sum", "none"):
        compare(
            lambda x: cross_entropy(x, labels, ignore_index=ignore_index, reduction=reduction),  # noqa: B023
            lambda x: torch_cross_entropy(x, labels, ignore_index, reduction),  # noqa: B023
            logits,
            truth=lambda x: formula(x, labels, ignore_index, reduction),  # noqa: B023
        )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_labels_of_narrow_dtypes(dtype):
    logits, labels = torch.randn(9, 41), some_labels((9,), 41)
    assert torch.equal(cross_entropy(logits, labels.to(dtype)), cross_entropy(logits, labels))
    hidden, weight = torch.randn(9, 16), torch.randn(41, 16)
    for a, b in zip(
        linear_cross_entropy(hidden, weight, labels.to(dtype)),
        linear_cross_entropy(hidden, weight, labels),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_labels_are_compared_as_the_numbers_they_are():
    """Not wrapped into their dtype: 156 is no -100 in uint8, and 40,000 no negative number in int16."""
    hidden, weight, labels = torch.randn(2, 4), torch.randn(40_000, 4), torch.tensor([156, 2])
    for dtype in (torch.uint8, torch.int16):
        got = linear_cross_entropy(hidden, weight, labels.to(dtype))
        assert got.n_tokens == 2
        torch.testing.assert_close(got.loss, linear_cross_entropy(hidden, weight, labels).loss)


def test_cross_entropy_of_extreme_logits():
    labels = torch.tensor([0, 1, 2, 3])
    logits = 1e4 * torch.randn(4, 41)
    compare(lambda x: cross_entropy(x, labels), lambda x: torch_cross_entropy(x, labels), logits)
    logits[:, 20:] = -float("inf")  # a masked vocabulary
    compare(lambda x: cross_entropy(x, labels), lambda x: torch_cross_entropy(x, labels), logits)
    confident = torch.randn(4, 41)
    confident[range(4), labels] = confident.amax(-1) + 10
    compare(lambda x: cross_entropy(x, labels), lambda x: torch_cross_entropy(x, labels), confident)


def test_cross_entropy_result_is_fp32_and_scales():
    logits, labels = torch.randn(5, 41).bfloat16().requires_grad_(), torch.randint(41, (5,))
    loss = cross_entropy(logits, labels, reduction="sum")
    assert loss.dtype == torch.float32 and logits.grad is None
    (g1,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (g2,) = torch.autograd.grad(0.5 * loss, logits)
    assert g1.dtype == torch.bfloat16 and torch.equal(0.5 * g1, g2)


def torch_linear_cross_entropy(hidden, weight, labels, ignore_index, reduction):
    return torch_cross_entropy(hidden @ weight.T, labels, ignore_index, reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape, D, V, ignore_index", [((7,), 16, 41, -100), ((2, 3), 24, 1000, 5), ((3, 1), 8, 1, -1)])
def test_linear_cross_entropy(shape, D, V, ignore_index, reduction, dtype):
    hidden, weight = torch.randn(*shape, D, dtype=dtype), torch.randn(V, D, dtype=dtype)
    labels = some_labels(shape, V, ignore_index)
    keywords = {"ignore_index": ignore_index, "reduction": reduction}
    for layout in LAYOUTS:
        compare(
            lambda x, w: linear_cross_entropy(x, w, labels, **keywords).loss,
            lambda x, w: torch_linear_cross_entropy(x, w, labels, **keywords),
            hidden,
            weight,
            layout=layout,
            roundings=8 if dtype == torch.float32 else 1,  # a matrix product may sum in another order
            truth=lambda x, w: formula(x @ w.T, labels, **keywords),
        )


@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_linear_cross_entropy_counts(ignore_index):
    hidden, weight = torch.randn(4, 50, 8), torch.randn(11, 8)
    labels = some_labels((4, 50), 11, ignore_index)
    n_tokens = n_correct = 0
    for row, label in zip(hidden.view(-1, 8).tolist(), labels.flatten().tolist(), strict=True):
        if label == ignore_index:
            continue
        logits = [sum(a * b for a, b in zip(row, column, strict=True)) for column in weight.tolist()]
        n_tokens, n_correct = n_tokens + 1, n_correct + (logits.index(max(logits)) == label)
    got = linear_cross_entropy(hidden, weight, labels, ignore_index=ignore_index)
    assert (int(got.n_tokens), int(got.n_correct)) == (n_tokens, n_correct) and 0 < n_correct < n_tokens
    assert got.n_tokens.dtype == got.n_correct.dtype == torch.int64
    assert got.n_tokens.shape == got.n_correct.shape == got.loss.shape == ()
    nothing = linear_cross_entropy(hidden, weight, torch.full_like(labels, ignore_index), ignore_index=ignore_index)
    assert nothing.loss.isnan() and nothing.n_tokens == nothing.n_correct == 0
    loss, n, c = linear_cross_entropy(hidden[:0], weight, labels[:0], reduction="sum")
    assert loss == n == c == 0


# -------------------------------------------------------------------------------------------------------- bad arguments


def f32(*shape):
    return torch.zeros(shape)


def i64(*shape):
    return torch.zeros(shape, dtype=torch.int64)


def cu(*boundaries, dtype=torch.int32):
    return torch.tensor(boundaries, dtype=dtype)


def rope(qkv=None, cos=None, sin=None, n_heads=2, n_kv_heads=1, positions=None):
    """Good arguments to begin with; the three functions must refuse alike."""
    qkv = f32(2, 5, 4, 8) if qkv is None else qkv
    cos = f32(9, 4) if cos is None else cos
    sin = f32(9, 4) if sin is None else sin
    before = qkv.clone() if isinstance(qkv, torch.Tensor) else None
    errors = []
    for function in (rope_qkv, rope_qkv_, rope_split_qkv_):
        try:
            function(qkv, cos, sin, n_heads, n_kv_heads, positions)
        except (TypeError, ValueError) as error:
            errors.append(error)
    if before is not None and errors:
        assert torch.equal(qkv, before) or qkv.is_meta
        assert len(errors) == 3 and len({str(error) for error in errors}) == 1
    if errors:
        raise errors[0]


def attend(q=None, k=None, v=None, **keywords):
    q = f32(2, 6, 4, 8) if q is None else q
    k = f32(2, 6, 2, 8) if k is None else k
    return attention(q, k, k.clone() if v is None else v, **keywords)


def lce(hidden=None, weight=None, labels=None, **keywords):
    hidden = f32(3, 8) if hidden is None else hidden
    weight = f32(11, 8) if weight is None else weight
    return linear_cross_entropy(hidden, weight, i64(3) if labels is None else labels, **keywords)


def model(cu_seqlens, max_seqlen):
    return Mistral(PRESETS["test"])(i64(2, 6), cu_seqlens=cu_seqlens, max_seqlen=max_seqlen)


META = {"device": "meta"}
REFUSED = [
    (TypeError, "x", lambda: rms_norm([1.0], f32(1), EPS)),
    (TypeError, "x", lambda: rms_norm(i64(2, 4), f32(4), EPS)),
    (TypeError, "weight", lambda: rms_norm(f32(2, 4), i64(4), EPS)),
    (TypeError, "weight", lambda: rms_norm(f32(2, 4), None, EPS)),
    (ValueError, "x", lambda: rms_norm(torch.tensor(1.0), f32(1), EPS)),
    (ValueError, "weight", lambda: rms_norm(f32(2, 4), f32(5), EPS)),
    (ValueError, "weight", lambda: rms_norm(f32(2, 4), f32(1, 4), EPS)),
    (ValueError, "weight", lambda: rms_norm(f32(2, 4), torch.zeros(4, **META), EPS)),
    (ValueError, "eps", lambda: rms_norm(f32(2, 4), f32(4), -1e-6)),
    (ValueError, "eps", lambda: rms_norm(f32(2, 4), f32(4), float("nan"))),
    (TypeError, "x", lambda: add_rms_norm(i64(2, 4), f32(2, 4), f32(4), EPS)),
    (TypeError, "residual", lambda: add_rms_norm(f32(2, 4), i64(2, 4), f32(4), EPS)),
    (TypeError, "residual", lambda: add_rms_norm(f32(2, 4), f32(2, 4).double(), f32(4), EPS)),
    (ValueError, "residual", lambda: add_rms_norm(f32(2, 4), f32(1, 4), f32(4), EPS)),
    (ValueError, "residual", lambda: add_rms_norm(f32(2, 4), torch.zeros(2, 4, **META), f32(4), EPS)),
    (ValueError, "weight", lambda: add_rms_norm(f32(2, 4), f32(2, 4), f32(3), EPS)),
    (ValueError, "eps", lambda: add_rms_norm(f32(2, 4), f32(2, 4), f32(4), -1.0)),
    (ValueError, "max_len", lambda: rope_tables(0, 8, 1e4)),
    (ValueError, "head_dim", lambda: rope_tables(4, 7, 1e4)),
    (ValueError, "head_dim", lambda: rope_tables(4, 0, 1e4)),
    (ValueError, "theta", lambda: rope_tables(4, 8, 0.0)),
    (ValueError, "theta", lambda: rope_tables(4, 8, float("nan"))),
    (TypeError, "qkv", lambda: rope(qkv=i64(2, 5, 4, 8))),
    (TypeError, "qkv", lambda: rope(qkv=[1.0])),
    (TypeError, "cos", lambda: rope(cos=i64(9, 4))),
    (TypeError, "sin", lambda: rope(sin=i64(9, 4))),
    (ValueError, "qkv", lambda: rope(qkv=f32(2, 5, 30))),
    (ValueError, "qkv", lambda: rope(qkv=f32(2, 5, 5, 8))),
    (ValueError, "head_dim", lambda: rope(qkv=f32(2, 5, 4, 7))),
    (ValueError, "cos", lambda: rope(cos=f32(9, 8), sin=f32(9, 8))),
    (ValueError, "sin", lambda: rope(sin=f32(8, 4))),
    (ValueError, "cos", lambda: rope(cos=f32(4, 4), sin=f32(4, 4))),
    (ValueError, "cos", lambda: rope(cos=torch.zeros(9, 4, **META))),
    (ValueError, "n_heads", lambda: rope(n_heads=0)),
    (ValueError, "n_kv_heads", lambda: rope(n_kv_heads=0)),
    (ValueError, "n_heads", lambda: rope(n_heads=4)),
    (TypeError, "positions", lambda: rope(positions=f32(2, 5))),
    (TypeError, "positions", lambda: rope(positions=torch.zeros(2, 5, dtype=torch.bool))),
    (TypeError, "positions", lambda: rope(positions=[[0] * 5] * 2)),
    (ValueError, "positions", lambda: rope(positions=i64(5))),
    (ValueError, "positions", lambda: rope(positions=i64(2, 5) + 9)),
    (ValueError, "positions", lambda: rope(positions=i64(2, 5) - 1)),
    (ValueError, "positions", lambda: rope(positions=torch.zeros(2, 5, dtype=torch.int64, **META))),
    (TypeError, "gate_up", lambda: swiglu(i64(2, 4))),
    (TypeError, "gate_up", lambda: swiglu(None)),
    (ValueError, "gate_up", lambda: swiglu(f32(2, 5))),
    (ValueError, "gate_up", lambda: swiglu(torch.tensor(1.0))),
    (TypeError, "logits", lambda: cross_entropy(i64(3, 11), i64(3))),
    (TypeError, "labels", lambda: cross_entropy(f32(3, 11), f32(3))),
    (TypeError, "labels", lambda: cross_entropy(f32(3, 11), torch.zeros(3, dtype=torch.bool))),
    (TypeError, "labels", lambda: cross_entropy(f32(3, 11), [0, 1, 2])),
    (ValueError, "logits", lambda: cross_entropy(torch.tensor(1.0), i64())),
    (ValueError, "logits", lambda: cross_entropy(f32(3, 0), i64(3) - 100)),
    (ValueError, "ignore_index", lambda: cross_entropy(f32(3, 11), i64(3), ignore_index=2**63)),
    (TypeError, "ignore_index", lambda: cross_entropy(f32(3, 11), i64(3), ignore_index=1.0)),
    (ValueError, "labels", lambda: cross_entropy(f32(3, 11), i64(4))),
    (ValueError, "labels", lambda: cross_entropy(f32(2, 3, 11), i64(6))),
    (ValueError, "labels", lambda: cross_entropy(f32(3, 11), i64(3) + 11)),
    (ValueError, "labels", lambda: cross_entropy(f32(3, 11), i64(3) - 1)),
    (ValueError, "labels", lambda: cross_entropy(f32(3, 11), i64(3) - 100, ignore_index=-1)),
    (ValueError, "labels", lambda: cross_entropy(f32(3, 11), torch.zeros(3, dtype=torch.int64, **META))),
    (ValueError, "reduction", lambda: cross_entropy(f32(3, 11), i64(3), reduction="average")),
    (ValueError, "reduction", lambda: cross_entropy(f32(3, 11), i64(3), reduction=None)),
    (TypeError, "hidden", lambda: lce(hidden=i64(3, 8))),
    (TypeError, "weight", lambda: lce(weight=i64(11, 8))),
    (TypeError, "weight", lambda: lce(weight=f32(11, 8).bfloat16())),
    (ValueError, "weight", lambda: lce(weight=f32(11, 9))),
    (ValueError, "weight", lambda: lce(weight=f32(8))),
    (ValueError, "weight", lambda: lce(weight=f32(0, 8))),
    (ValueError, "weight", lambda: lce(hidden=f32(3, 0), weight=f32(11, 0))),
    (ValueError, "ignore_index", lambda: lce(ignore_index=-(2**70))),
    (ValueError, "weight", lambda: lce(weight=torch.zeros(11, 8, **META))),
    (ValueError, "hidden", lambda: lce(hidden=torch.tensor(1.0))),
    (TypeError, "labels", lambda: lce(labels=f32(3))),
    (ValueError, "labels", lambda: lce(labels=i64(2))),
    (ValueError, "labels", lambda: lce(labels=i64(3) + 11)),
    (ValueError, "reduction", lambda: lce(reduction="max")),
    (TypeError, "q", lambda: attend(q=i64(2, 6, 4, 8))),
    (TypeError, "k", lambda: attend(k=f32(2, 6, 2, 8).double())),
    (TypeError, "v", lambda: attend(v=i64(2, 6, 2, 8))),
    (ValueError, "q", lambda: attend(q=f32(6, 4, 8))),
    (ValueError, "k", lambda: attend(k=f32(2, 6, 16))),
    (ValueError, "v", lambda: attend(v=f32(2, 6, 4, 8))),
    (ValueError, "k", lambda: attend(k=f32(2, 5, 2, 8))),
    (ValueError, "k", lambda: attend(k=f32(2, 6, 2, 16))),
    (ValueError, "k", lambda: attend(k=f32(2, 6, 3, 8))),
    (ValueError, "k", lambda: attend(k=f32(2, 6, 0, 8))),
    (ValueError, "v", lambda: attend(v=torch.zeros(2, 6, 2, 8, **META))),
    (ValueError, "window", lambda: attend(window=0)),
    (ValueError, "window", lambda: attend(window=-1)),
    (ValueError, "window", lambda: attend(window=2.0)),
    (ValueError, "window", lambda: attend(window=True)),
    (ValueError, "backend", lambda: attend(backend="flash")),
    (ValueError, "max_seqlen", lambda: attend(max_seqlen=0)),
    (ValueError, "max_seqlen", lambda: attend(max_seqlen=True)),
    (ValueError, "max_seqlen", lambda: model(cu(0, 6, 12), 6.0)),
    (ValueError, "max_seqlen", lambda: model(None, 0)),
    (ValueError, "max_seqlen", lambda: attend(cu_seqlens=cu(0, 6, 12), max_seqlen=torch.tensor(6))),
    (ValueError, "max_seqlen", lambda: attend(cu_seqlens=cu(0, 6, 12), max_seqlen=5)),
    (TypeError, "cu_seqlens", lambda: attend(cu_seqlens=[0, 6, 12])),
    (TypeError, "cu_seqlens", lambda: attend(cu_seqlens=cu(0, 6, 12, dtype=torch.int64))),
    (ValueError, "cu_seqlens", lambda: attend(cu_seqlens=cu(0, 12))),
    (ValueError, "cu_seqlens", lambda: attend(cu_seqlens=cu(0, 6, 12)[None])),
    (ValueError, "cu_seqlens", lambda: attend(cu_seqlens=cu(1, 6, 12))),
    (ValueError, "cu_seqlens", lambda: attend(cu_seqlens=cu(0, 6, 11))),
    (ValueError, "cu_seqlens", lambda: attend(cu_seqlens=cu(0, 6, 13))),
    (ValueError, "cu_seqlens", lambda: attend(cu_seqlens=cu(0, 6, 6, 12))),
    (ValueError, "cu_seqlens", lambda: attend(cu_seqlens=cu(0, 8, 6, 12))),
    (ValueError, "cu_seqlens", lambda: attend(cu_seqlens=cu(0, 5, 7, 12))),
    (ValueError, "cu_seqlens", lambda: attend(cu_seqlens=cu(0, 6, 12).to("meta"))),
]


@pytest.mark.parametrize("number", range(len(REFUSED)), ids=lambda n: f"{n} {REFUSED[n][1]}")
def test_bad_arguments_are_refused_by_name(number, launches):
    exception, argument, call = REFUSED[number]
    with pytest.raises(exception, match=rf"\b{argument}\b") as caught:
        call()
    assert type(caught.value) is exception and not launches
    assert caught.traceback[-1].path.parent.name == "kernels", "raised by PyTorch underneath, not by our check"


def test_the_good_arguments_of_that_table_are_good():
    rope(), attend(), lce()
    rope(positions=i64(2, 5) + 8)
    attend(window=1, cu_seqlens=cu(0, 6, 7, 12), max_seqlen=6, backend="auto")
    attend(cu_seqlens=cu(0, 6, 12), max_seqlen=12)
