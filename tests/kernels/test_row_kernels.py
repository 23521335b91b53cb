"""RMSNorm, RoPE and SwiGLU as Triton kernels: what test_kernels.py does not ask of an operation, whoever runs it.

Here every test runs kernels: small ones in Triton's interpreter (TRITON_INTERPRET=1), full-size ones on a GPU. Without
either they are skipped by name; test_interpreted.py runs this file in a process that has the variable.
"""

from collections import Counter
from functools import partial
from itertools import chain, combinations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_to_truth
from test_kernels import LAYOUTS, compare, hf_rope, hf_swiglu, outputs_and_gradients, torch_add_rms_norm
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from halny.kernels import dispatch, recompute_linear, rms_norm, rope, swiglu
from halny.kernels.attention import plan_attention
from halny.kernels.rms_norm import add_rms_norm, rms_norm_reference
from halny.kernels.rope import rope_qkv, rope_qkv_, rope_split_qkv_, rope_tables
from halny.model import mistral
from halny.model.estimate import memory

EPS = 1e-5
on_the_cpu = pytest.mark.skipif(not dispatch.INTERPRETED, reason="needs TRITON_INTERPRET=1 (see test_interpreted.py)")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
norm = rms_norm.rms_norm


def half_norm(x, w):
    return norm(x, w, EPS)


def torch_norm(x, w):
    return rms_norm_reference(x, w, EPS) if w.dtype != x.dtype else F.rms_norm(x, x.shape[-1:], w, EPS)


def row_operations(dtype=torch.float32, rows=5):
    """name -> (operation, its PyTorch, inputs), small and of odd sizes."""
    cos, sin = rope_tables(9, 12, 1e4)
    positions = lambda x: torch.tensor([[3, 0, 8, 8, 1]]).expand(len(x), 5)  # noqa: E731
    x = torch.randn(rows, 123, dtype=dtype)
    qkv = torch.randn(2, 5, 8, 12, dtype=dtype)
    return {
        "rms_norm": (half_norm, torch_norm, [x, torch.randn(123, dtype=dtype)]),
        "add_rms_norm": (
            lambda x, r, w: add_rms_norm(x, r, w, EPS),
            torch_add_rms_norm,
            [x, torch.randn_like(x), torch.randn(123, dtype=dtype)],
        ),
        "rope": (
            lambda x: rope_qkv(x, cos, sin, 4, 2, positions(x)),
            lambda x: hf_rope(x, cos, sin, 4, 2, positions(x)),
            [qkv],
        ),
        "rope_split": (
            lambda x: rope_split_qkv_(x.clone(), cos, sin, 4, 2, positions(x)),
            lambda x: hf_rope(x, cos, sin, 4, 2, positions(x)).split([4, 2, 2], dim=2),
            [qkv],
        ),
        "swiglu": (swiglu.swiglu, hf_swiglu, [torch.randn(rows, 246, dtype=dtype)]),
    }


each_operation = pytest.mark.parametrize("name", row_operations())
NORM = ("rms_norm_forward_kernel", "rms_norm_backward_kernel", "rms_norm_dweight_kernel")
KERNELS = {  # forward, and the backward's
    "rms_norm": NORM,
    "add_rms_norm": NORM,
    "rope": ("rope_kernel", "rope_kernel"),
    "rope_split": ("rope_kernel", "rope_kernel"),
    "swiglu": ("swiglu_forward_kernel", "swiglu_backward_kernel"),
}


def passes(name, forward=1, backward=2):
    """The launches of so many passes. Two backward ones are what compare holds against each other bit for bit."""
    first, *rest = KERNELS[name]
    return Counter([first] * forward + rest * backward)


# ------------------------------------------------------------------------------------------------------------- numerics


@on_the_cpu
@each_operation
@pytest.mark.parametrize("dtype", DTYPES)
def test_numerics_and_one_launch_each_way(name, dtype, launches):
    ours, theirs, inputs = row_operations(dtype)[name]
    compare(ours, theirs, *inputs)
    assert launches == passes(name)


@on_the_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, N", [(1, 760), (3, 4097), (133, 41), (2, 3), (1, 1030)])
def test_rms_norm_sizes(rows, N, dtype, launches):
    """One row, more rows than programs of the backward's grid, every kind of tile and an incomplete last one."""
    x, w = 3 * torch.randn(rows, N, dtype=dtype), torch.randn(N, dtype=dtype)
    compare(half_norm, torch_norm, x, w)
    compare(lambda x, r, w: add_rms_norm(x, r, w, EPS), torch_add_rms_norm, x, torch.randn_like(x), w)
    assert launches == passes("rms_norm", 2, 4)


@on_the_cpu
@pytest.mark.parametrize("x_dtype", DTYPES)
@pytest.mark.parametrize("weight_dtype", DTYPES)
def test_rms_norm_weight_of_another_dtype(x_dtype, weight_dtype, launches):
    x, w = torch.randn(5, 123, dtype=x_dtype), torch.randn(123, dtype=weight_dtype)
    compare(half_norm, torch_norm, x, w, truth=lambda x, w: F.rms_norm(x, (123,), w, EPS))
    assert launches == passes("rms_norm")


@on_the_cpu
@pytest.mark.parametrize(
    "head_dim, n_heads, n_kv_heads", [(64, 32, 8), (92, 8, 1), (128, 3, 3), (130, 2, 1), (2, 1, 1)]
)
def test_rope_heads(head_dim, n_heads, n_kv_heads, launches):
    cos, sin = rope_tables(6, head_dim, 1e4)
    heads = (n_heads, n_kv_heads)
    qkv = torch.randn(2, 3, n_heads + 2 * n_kv_heads, head_dim)
    compare(
        lambda x: rope_split_qkv_(x.clone(), cos, sin, *heads),
        lambda x: hf_rope(x, cos, sin, *heads, torch.arange(3).expand(2, 3)).split([*heads, n_kv_heads], dim=2),
        qkv,
    )
    assert torch.equal(rope_qkv_(qkv.clone(), cos, sin, *heads), rope_qkv(qkv, cos, sin, *heads))
    assert launches == {"rope_kernel": 5}


@on_the_cpu
@pytest.mark.parametrize("F_", [1, 123, 600, 2049])
def test_swiglu_sizes(F_, launches):
    compare(swiglu.swiglu, hf_swiglu, 3 * torch.randn(2, 2 * F_))
    assert launches == {"swiglu_forward_kernel": 1, "swiglu_backward_kernel": 2}


@on_the_cpu
@each_operation
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(name, layout, launches):
    ours, theirs, inputs = row_operations()[name]
    compare(ours, theirs, *inputs, layout=layout)
    assert launches


@on_the_cpu
@each_operation
def test_expanded_inputs_and_gradients(name, launches):
    """Stride 0 everywhere, as ``.sum()`` makes upstream gradients; the bits are those of contiguous tensors."""
    ours, _, inputs = row_operations()[name]
    inputs = [x if x.ndim == 1 else x[:1].expand(3, *x.shape[1:]) for x in inputs]

    def gradients(inputs, contiguous):
        inputs = [x.detach().requires_grad_() for x in inputs]
        outputs = ours(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = [torch.full((), 0.5).expand(y.shape) for y in outputs]
        upstream = [g.contiguous() if contiguous else g for g in upstream]
        return [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]

    expanded = gradients(inputs, contiguous=False)
    for a, b in zip(expanded, gradients([x.contiguous() for x in inputs], contiguous=True), strict=True):
        assert torch.equal(a, b)
    assert launches


@on_the_cpu
@each_operation
def test_no_output_element_is_left_unwritten(name, monkeypatch, launches):
    """Whatever torch.empty returns is NaN here, and stays NaN where no kernel writes."""
    ours, theirs, inputs = row_operations()[name]
    with torch.no_grad():
        like = theirs(*inputs)
    like = like if isinstance(like, tuple) else (like,)
    upstream = [torch.randn_like(y) for y in like]
    clean = outputs_and_gradients(ours, inputs, upstream)
    for function in ("empty", "empty_like"):
        real = getattr(torch, function)

        def poisoned(*arguments, real=real, **keywords):
            y = real(*arguments, **keywords)
            return y.fill_(float("nan")) if y.is_floating_point() else y

        monkeypatch.setattr(torch, function, poisoned)
    launches.clear()
    for a, b in zip(chain(*outputs_and_gradients(ours, inputs, upstream)), chain(*clean), strict=True):
        assert not a.isnan().any() and torch.equal(a, b)
    assert launches == passes(name)


@on_the_cpu
@each_operation
def test_empty_tensors_launch_nothing(name, launches):
    ours, _, inputs = row_operations()[name]
    inputs = [x if x.ndim == 1 else x[:0] for x in inputs]
    inputs = [x.detach().requires_grad_() for x in inputs]
    outputs = ours(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    gradients = torch.autograd.grad(sum(y.sum() for y in outputs), inputs)
    assert all(torch.equal(g, torch.zeros_like(x)) for g, x in zip(gradients, inputs, strict=True))
    assert not launches


@on_the_cpu
@each_operation
def test_fp64_runs_the_reference(name, launches):
    ours, _, inputs = row_operations(torch.float64)[name]
    ours(*inputs)
    assert not launches


@on_the_cpu
def test_offsets_are_64_bit_rms_norm_rope_swiglu(launches):
    """Rows 2^30 elements apart: the third begins where a 32-bit offset wraps, which then ends in a segmentation fault.

    The memory between the rows is reserved, never touched.
    """
    stride = 2**30
    far = torch.empty(5 * stride // 2 + 4096, dtype=torch.float16)

    def rows(*shape):
        x = far.as_strided((3, *shape), (stride, *torch.empty(shape).stride()))
        return x.copy_(torch.randn(x.shape))

    x, w = rows(64), torch.randn(64).half()
    near = x.clone()
    assert torch.equal(norm(x, w, EPS), norm(near, w, EPS))
    assert torch.equal(add_rms_norm(near, x, w, EPS)[1], near + near)
    rstd = torch.rand(3)
    for a, b in zip(
        rms_norm.rms_norm_backward(x, x, x, w, rstd, True, True),
        rms_norm.rms_norm_backward(near, near, near, w, rstd, True, True),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert torch.equal(swiglu.swiglu(x), swiglu.swiglu(near))
    assert torch.equal(
        swiglu.swiglu_backward(x[:, :32], x, True)[0], swiglu.swiglu_backward(near[:, :32], near, True)[0]
    )
    qkv, (cos, sin) = rows(4, 16).unsqueeze(1), rope_tables(3, 16, 1e4)
    far_heads = far.as_strided((1, 1, 6, 16), (1, 1, stride // 2, 1))  # the key's offset is 2^31
    for apart, n_heads in ((qkv, 2), (qkv.transpose(0, 1), 2), (far_heads, 4)):  # far batches, positions, heads
        apart.copy_(torch.randn(apart.shape))
        want = rope_qkv(apart.clone(), cos, sin, n_heads, 1)
        assert torch.equal(rope_qkv(apart, cos, sin, n_heads, 1), want)
        assert torch.equal(rope_qkv_(apart, cos, sin, n_heads, 1), want)
    assert sum(launches.values()) == 20


# ----------------------------------------------------------------------------------------------- what each one promises


@on_the_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_is_recomputed_bit_for_bit(dtype, launches):
    x, w = torch.randn(7, 123, dtype=dtype), torch.randn(123, dtype=dtype)
    y, rstd = rms_norm.rms_norm_forward(x, w, EPS)
    assert torch.equal(rms_norm.rms_norm_recompute(x, w, rstd), y)
    assert rstd.dtype == torch.float32 and rstd.shape == (7,) and launches == {"rms_norm_forward_kernel": 2}
    apart = rms_norm.rms_norm_backward(x, x, x, w, rstd, True, True)
    for needs in ((True, True), (False, True), (True, False)):  # by the backward too, which does nothing else otherwise
        *gradients, again = rms_norm.rms_norm_backward(x, x, x, w, rstd, *needs, True)
        assert torch.equal(again, y)
        assert all(torch.equal(g, want) for g, want, needed in zip(gradients, apart, needs, strict=False) if needed)


@on_the_cpu
def test_rms_norm_skips_the_gradients_nobody_asked_for(launches):
    x, w = torch.randn(7, 123), torch.randn(123)
    _, rstd = rms_norm.rms_norm_forward(x, w, EPS)
    both = rms_norm.rms_norm_backward(x, None, x, w, rstd, True, True)
    dx, dw, y = rms_norm.rms_norm_backward(x, None, x, w, rstd, True, False)
    assert torch.equal(dx, both[0]) and dw.numel() == y.numel() == 0
    dx, dw, _ = rms_norm.rms_norm_backward(x, None, x, w, rstd, False, True)
    assert torch.equal(dw, both[1]) and dx.numel() == 0


@on_the_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_backward_of_more_tiles_than_programs(dtype):
    """Each program asks for a tile before it works on the one before; the last asks for one that is not there."""
    x, dy, ds = (torch.randn(133, 41, dtype=dtype) for _ in range(3))  # nine tiles of 16 rows, in three programs
    w, rstd = torch.randn(41), torch.rand(133)
    all_rows = rms_norm.rms_norm_backward(dy, ds, x, w, rstd, True, True, True)
    apart = [
        rms_norm.rms_norm_backward(dy[i], ds[i], x[i], w, rstd[i], True, True, True)
        for i in torch.arange(133).split(16)
    ]  # fmt: skip
    for whole, parts in ((all_rows[0], [p[0] for p in apart]), (all_rows[2], [p[2] for p in apart])):
        assert torch.equal(whole, torch.cat(parts))
    torch.testing.assert_close(all_rows[1], torch.stack([p[1] for p in apart]).sum(0))


@on_the_cpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_partials", [1, 512, 1030])
def test_rms_norm_sums_its_partials_and_rounds_once(n_partials, dtype):
    """Fewer than a step takes, as many, and more; nothing is written beyond the last column."""
    partials, dw = torch.randn(n_partials, 41), torch.full((64,), float("nan"), dtype=dtype)
    poisoned = torch.cat([partials.flatten(), torch.full((4096,), float("nan"))])
    dispatch.launch(rms_norm.rms_norm_dweight_kernel, (2,), poisoned, dw, n_partials, N=41, **rms_norm.DWEIGHT_TILE)
    ulps = 2 if dtype == torch.bfloat16 else 1  # the interpreter truncates bf16
    truth = partials.double().sum(0)
    limit = ulps * torch.finfo(dtype).eps / 2 * truth.abs() + 1e-6 * partials.double().abs().sum(0)
    assert ((dw[:41].double() - truth).abs() <= limit).all() and dw[41:].isnan().all()


@pytest.mark.parametrize("n_columns", [41, 600, 4096, 5000])
@pytest.mark.parametrize("n_rows", [1, 263, 264, 265, 4223, 16_384])
def test_rms_norm_backward_has_no_more_programs_than_it_needs(n_rows, n_columns):
    constants = dispatch.tile(rms_norm.BACKWARD_TILES, n_columns, 9)
    n_tiles, most = dispatch.cdiv(n_rows, constants["ROWS"]), 132 * constants["PROGRAMS"]
    programs = rms_norm.backward_programs(n_rows, n_columns, 9, 132)
    longest = dispatch.cdiv(n_tiles, programs)
    assert 1 <= programs <= min(most, n_tiles) and longest == dispatch.cdiv(n_tiles, most)
    assert programs == 1 or dispatch.cdiv(n_tiles, programs - 1) > longest


@on_the_cpu
def test_add_rms_norm_adds_the_upstream_gradient_of_s_after_the_norm(launches):
    """With s along the norm's null direction the norm contributes nothing, and ds must arrive whole and unscaled."""
    x, residual, w = torch.randn(3, 64), torch.randn(3, 64), torch.randn(64)
    x, residual = x.requires_grad_(), residual.requires_grad_()
    y, s = add_rms_norm(x, residual, w, EPS)
    ds = torch.randn(3, 64)
    dx, dresidual = torch.autograd.grad([y, s], [x, residual], [torch.zeros_like(y), ds], retain_graph=True)
    assert torch.equal(dx, ds) and torch.equal(dresidual, ds)
    assert torch.equal(torch.autograd.grad(s, x, ds, retain_graph=True)[0], ds)  # y unused: no kernel at all
    assert launches == {"rms_norm_forward_kernel": 1, "rms_norm_backward_kernel": 1}  # no weight that needs a gradient
    dx, dresidual = torch.autograd.grad(y, [x, residual], ds)
    assert dx.data_ptr() == dresidual.data_ptr()  # one tensor for both branches


@on_the_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_rope_leaves_v_bit_for_bit(dtype, launches):
    cos, sin = rope_tables(4, 8, 1e4)
    qkv = torch.randn(1, 4, 4, 8, dtype=dtype)
    qkv[..., 3, :4] = torch.tensor([-0.0, 0.0, float("inf"), float("nan")])
    y = rope_qkv(qkv, cos, sin, 2, 1)
    bits = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    assert torch.equal(y[..., 3, :].contiguous().view(bits), qkv[..., 3, :].contiguous().view(bits))
    assert launches == {"rope_kernel": 1}


class Recorded(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        self.names.append(str(function))
        return function(*arguments, **(keywords or {}))


@on_the_cpu
@pytest.mark.parametrize("order", ["as q, k, v", "heads before positions", "heads expanded"])
def test_rope_backward_packs_three_gradients_in_one_pass(order, launches):
    """No copy, no zeros, no concat: attention's gradients in whatever order they lie, one kernel, one new tensor."""
    cos, sin = rope_tables(5, 16, 1e4)
    qkv = torch.randn(2, 5, 8, 16, requires_grad=True)
    upstream = [torch.randn(2, 5, n, 16) for n in (4, 2, 2)]
    if order == "heads before positions":
        upstream = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in upstream]
    elif order == "heads expanded":
        upstream = [g[:, :, :1].expand(g.shape) for g in upstream]
    before = [g.clone() for g in upstream]
    outputs = rope_split_qkv_(qkv.clone(), cos, sin, 4, 2)
    with Recorded() as recorded:
        (got,) = torch.autograd.grad(outputs, qkv, upstream)
    made = [name for name in recorded.names if "detach" not in name and "view" not in name]
    assert made == ["halny.rope_rotate.default"] and launches == {"rope_kernel": 2}
    assert got.is_contiguous() and all(torch.equal(g, b) for g, b in zip(upstream, before, strict=True))
    gradients = []
    for dtype in (torch.float32, torch.float64):
        x = qkv.detach().to(dtype).requires_grad_()
        y = hf_rope(x, cos.to(dtype), sin.to(dtype), 4, 2, torch.arange(5).expand(2, 5))
        gradients += torch.autograd.grad(y, x, torch.cat(upstream, dim=2).to(dtype))
    assert_close_to_truth(got, *gradients)


@on_the_cpu
@pytest.mark.parametrize("unused", [0, 1, 2])
def test_rope_split_with_an_output_that_has_no_gradient(unused):
    cos, sin = rope_tables(5, 16, 1e4)
    qkv = torch.randn(2, 5, 8, 16)
    compare(
        lambda x: rope_split_qkv_(x.clone(), cos, sin, 4, 2),
        lambda x: hf_rope(x, cos, sin, 4, 2, torch.arange(5).expand(2, 5)).split([4, 2, 2], dim=2),
        qkv,
        unused=(unused,),
    )


@on_the_cpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_backward_recomputes_h_bit_for_bit(dtype, launches):
    gate_up, dh = 3 * torch.randn(5, 246, dtype=dtype), torch.randn(5, 123, dtype=dtype)
    d_gate_up, h = swiglu.swiglu_backward(dh, gate_up, True)
    assert torch.equal(h, swiglu.swiglu_forward(gate_up))
    alone, nothing = swiglu.swiglu_backward(dh, gate_up, False)
    assert torch.equal(alone, d_gate_up) and nothing.numel() == 0


@on_the_cpu
@each_operation
def test_saves_what_it_says(name):
    """RMSNorm its input, weight and one fp32 a row; RoPE the tables and positions; SwiGLU its input."""
    ours, _, inputs = row_operations()[name]
    inputs = [x.requires_grad_() for x in inputs]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        outputs = ours(*inputs)
    shapes = sorted(tuple(x.shape) for x in saved)
    want = {
        "rms_norm": [(5,), (5, 123), (123,)],
        "add_rms_norm": [(5,), (5, 123), (123,)],
        "rope": [(2, 5), (9, 6), (9, 6)],
        "rope_split": [(2, 5), (9, 6), (9, 6)],
        "swiglu": [(5, 246)],
    }
    assert shapes == sorted(want[name])
    del outputs


@on_the_cpu
def test_opcheck_of_every_rms_norm_rope_and_swiglu_operator():
    x, w, rstd = torch.randn(5, 41), torch.randn(41), torch.rand(5)
    cos, sin = rope_tables(9, 12, 1e4)
    q, k, v = torch.randn(2, 5, 8, 12).split([4, 2, 2], dim=2)
    positions = torch.randint(9, (2, 5))
    for operator, arguments in (
        (rms_norm.rms_norm_forward, (x, w, EPS)),
        (rms_norm.rms_norm_forward, (x[:0], w, EPS)),
        (rms_norm.add_rms_norm_forward, (x.bfloat16(), x.bfloat16(), w, EPS)),
        (rms_norm.rms_norm_recompute, (x.T.contiguous().T, w, rstd)),
        (rms_norm.rms_norm_backward, (x, None, x, w, rstd, True, True)),
        (rms_norm.rms_norm_backward, (x, x, x, w.half(), rstd, False, True)),
        (rms_norm.rms_norm_backward, (x, x, x, w, rstd, True, False)),
        (rms_norm.rms_norm_backward, (x, x, x, w, rstd, True, True, True)),
        (rope.rope_rotate, (q, k, v, cos, sin, None, False)),
        (rope.rope_rotate, (q, k, v, cos, sin, positions, True)),
        (rope.rope_rotate_, (torch.randn(2, 5, 8, 12), cos, sin, 4, 2, positions.int())),
        (swiglu.swiglu_forward, (torch.randn(2, 3, 82),)),
        (swiglu.swiglu_backward, (x, torch.randn(5, 82), True)),
        (swiglu.swiglu_backward, (x, torch.randn(5, 82), False)),
    ):
        torch.library.opcheck(operator, arguments)


@on_the_cpu
@each_operation
def test_activation_checkpointing(name, launches):
    ours, _, inputs = row_operations()[name]
    inputs = [x.requires_grad_() for x in inputs]
    upstream = None
    gradients = []
    for f in (ours, lambda *x: checkpoint(ours, *x, use_reentrant=False)):
        outputs = f(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = upstream or [torch.randn_like(y) for y in outputs]
        gradients.append(torch.autograd.grad(outputs, inputs, upstream))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    # the second time forward, again, backward; but rope_split saves nothing that would have to be rotated again
    assert launches == passes(name, forward=2 if name == "rope_split" else 3)


# ----------------------------------------------------------------------------------------------- linears that recompute


def recompute_operations(dtype=torch.float32):
    x, w = torch.randn(5, 123, dtype=dtype), torch.randn(123, dtype=dtype)
    return {
        "rms_norm_linear": (
            lambda x, n, w: recompute_linear.rms_norm_linear(x, n, w, EPS),
            lambda x, n, w: F.linear(torch_norm(x, n), w),
            [x, w, torch.randn(7, 123, dtype=dtype)],
            [(5,), (5, 123), (123,), (7, 123)],
        ),
        "add_rms_norm_linear": (
            lambda x, r, n, w: recompute_linear.add_rms_norm_linear(x, r, n, w, EPS),
            lambda x, r, n, w: (lambda y, s: (F.linear(y, w), s))(*torch_add_rms_norm(x, r, n)),
            [x, torch.randn_like(x), w, torch.randn(7, 123, dtype=dtype)],
            [(5,), (5, 123), (123,), (7, 123)],
        ),
        "swiglu_linear": (
            recompute_linear.swiglu_linear,
            lambda x, w: F.linear(hf_swiglu(x), w),
            [torch.randn(5, 246, dtype=dtype), torch.randn(7, 123, dtype=dtype)],
            [(5, 246), (7, 123)],
        ),
    }


each_recompute = pytest.mark.parametrize("name", recompute_operations())


@on_the_cpu
@each_recompute
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recompute_numerics(name, dtype, launches):
    ours, theirs, inputs, _ = recompute_operations(dtype)[name]
    # a matrix product rounds its input and sums in another order than the one of another process
    compare(ours, theirs, *inputs, roundings=4)
    compare(ours, theirs, *inputs, roundings=4, layout=LAYOUTS[1])
    assert launches == passes(name.removesuffix("_linear"), 2, 4)  # what is recomputed costs no launch


@on_the_cpu
@each_recompute
def test_recompute_equals_the_composition_and_any_input_may_be_frozen(name):
    ours, _, inputs, _ = recompute_operations()[name]
    plain = getattr(recompute_linear, f"{name}_reference")
    arguments = () if name == "swiglu_linear" else (EPS,)

    def gradients(f, wanted):
        leaves = [x.clone().requires_grad_(i in wanted) for i, x in enumerate(inputs)]
        outputs = f(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        loss = sum(y.sin().sum() for y in outputs)
        return [*outputs, *torch.autograd.grad(loss, [leaves[i] for i in wanted])]

    for r in range(1, len(inputs) + 1):
        for wanted in combinations(range(len(inputs)), r):
            got = gradients(ours, wanted)
            for a, b in zip(got, gradients(lambda *x: plain(*x, *arguments), wanted), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        y = ours(*(x.requires_grad_() for x in inputs))
    assert not (y if torch.is_tensor(y) else y[0]).requires_grad


@on_the_cpu
@each_recompute
def test_recompute_saves_what_it_says(name):
    ours, _, inputs, want = recompute_operations()[name]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        ours(*(x.requires_grad_() for x in inputs))
    assert sorted(tuple(x.shape) for x in saved) == sorted(want)


@on_the_cpu
@each_recompute
def test_recompute_compiles_without_a_graph_break(name):
    ours, _, inputs, _ = recompute_operations()[name]
    inputs = [x.requires_grad_() for x in inputs]
    torch._dynamo.reset()
    results = []
    for f in (ours, torch.compile(ours, fullgraph=True, backend="aot_eager")):
        outputs = f(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        results.append([*outputs, *torch.autograd.grad(sum(y.sin().sum() for y in outputs), inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@on_the_cpu
@each_recompute
def test_recompute_under_autocast_and_checkpointing(name):
    """Autocast runs the product in bf16 and leaves weights and their gradients fp32, as for the plain composition."""
    ours, _, inputs, _ = recompute_operations()[name]
    plain = getattr(recompute_linear, f"{name}_reference")
    arguments = () if name == "swiglu_linear" else (EPS,)
    inputs = [x.requires_grad_() for x in inputs]
    results = []
    for f in (
        lambda *x: plain(*x, *arguments),
        ours,
        lambda *x: checkpoint(ours, *x, use_reentrant=False),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            y = f(*inputs)
        y = y[0] if isinstance(y, tuple) else y
        assert y.dtype == torch.bfloat16
        results.append([y, *torch.autograd.grad(y.float().sin().sum(), inputs)])
    for got in results[1:]:
        for a, b in zip(got, results[0], strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("wrong", [torch.randn(7, 122), torch.randn(123), torch.ones(7, 123, dtype=torch.int32)])
def test_recompute_linears_refuse_a_weight_that_does_not_fit_rms_norm_swiglu(wrong):
    x, n = torch.randn(5, 123), torch.randn(123)
    for call in (
        lambda: recompute_linear.rms_norm_linear(x, n, wrong, EPS),
        lambda: recompute_linear.add_rms_norm_linear(x, x, n, wrong, EPS),
        lambda: recompute_linear.swiglu_linear(torch.randn(5, 246), wrong),
    ):
        with pytest.raises((ValueError, TypeError), match="weight"):
            call()


# ------------------------------------------------------------------------------------------------------ the whole model


class CountedAttention(torch.autograd.Function):
    """What an attention kernel keeps: q, k, v, its output, and one fp32 log-sum-exp a head and position."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        ctx.save_for_backward(q, k, v, out, torch.empty(q.shape[:3], dtype=torch.float32))
        return out


def kept_bytes(config, recompute: bool, B: int = 1, T: int = 4096) -> tuple[int, int]:
    """Bytes a token that one layer keeps for its backward in bf16, and attention's own share (output, log-sum-exp).

    Fake tensors have shapes and storages but no memory, so the shapes are the real ones. Each storage is counted once,
    weights and tables left out; the sum of its two inputs counts, that of its outputs (the next layer's) does not.
    """
    with FakeTensorMode():
        layer = mistral.Block(config, recompute)
        tables = [torch.empty(T, config.head_dim // 2, dtype=torch.float32) for _ in range(2)]
        x, residual = (torch.empty(B, T, config.dim, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        not_counted = {y.untyped_storage()._cdata for y in (*layer.parameters(), *tables)}
        kept = {}

        def pack(y):
            storage = y.untyped_storage()
            if storage._cdata not in not_counted:
                kept[storage._cdata] = (storage.nbytes(), storage)  # held, so that no other takes its address
            return y

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda y: y):
            layer(x, residual, *tables, None, None)
    heads = 2 * config.n_heads * config.head_dim + 4 * config.n_heads
    return sum(size for size, _ in kept.values()) // (B * T), heads


@on_the_cpu
@pytest.mark.parametrize("recompute, most", [(True, 95_000), (False, 140_000)])
def test_bytes_kept_a_token_a_layer_at_7b_rms_norm_rope_swiglu(recompute, most, monkeypatch):
    monkeypatch.setattr(mistral, "planned_attention", lambda q, k, v, plan: CountedAttention.apply(q, k, v))
    config = mistral.PRESETS["mistral-7b"]
    torch.set_default_dtype(torch.bfloat16)
    try:
        kept, attention = kept_bytes(config, recompute)
    finally:
        torch.set_default_dtype(torch.float32)
    print(f"7B, bf16, {recompute=}: {kept:,} B a token a layer; {attention:,} B of it attention's (out, log-sum-exp)")
    assert kept <= most
    assert kept == memory.activation_bytes_per_token(config, recompute=recompute) // config.n_layers


@on_the_cpu
@pytest.mark.parametrize("recompute", [True, False])
def test_the_model_equals_its_reference_rms_norm_rope_swiglu(recompute, launches):
    """Loss and every gradient, with and without documents, at twice the error of the reference against fp64."""
    config = mistral.PRESETS["test"]
    model = mistral.Mistral(config, recompute)
    model.init_weights(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    wide = mistral.Mistral(config).double()
    wide.load_state_dict(model.state_dict())
    tokens, labels = torch.randint(256, (2, 24)), torch.randint(256, (2, 24))
    documents = torch.tensor([0, 10, 11, 24, 48], dtype=torch.int32)

    def run(model, reference):
        model.zero_grad()
        with dispatch.reference_only(reference):
            loss = model(tokens, labels, cu_seqlens=documents).loss
            loss.backward()
        return [loss.detach(), *(parameter.grad for parameter in model.parameters())]

    ours, same, truth = run(model, False), run(model, True), run(wide, True)
    for a, b, c in zip(ours, same, truth, strict=True):
        errors = [((x - c).norm() / c.norm()).item() for x in (a, b)]
        assert errors[0] <= 2 * errors[1] + 4 * torch.finfo(torch.float32).eps
    assert launches["rope_kernel"] == 4 and launches["rms_norm_backward_kernel"] == 5
    assert launches["rms_norm_forward_kernel"] == launches["rms_norm_dweight_kernel"] == 5


@on_the_cpu
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_model_rotates_its_projections_where_they_lie_rope(recompute, autocast, launches):
    """One launch a layer each way: nothing copies v, joins the gradients or overwrites by way of a copy."""
    config = mistral.PRESETS["test"]
    model, tokens = mistral.Mistral(config, recompute), torch.randint(256, (2, 24))
    with Recorded() as forward, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(tokens, tokens).loss
    with Recorded() as backward:
        loss.backward()
    for recorded, wanted in ((forward, "halny.rope_rotate_.default"), (backward, "halny.rope_rotate.default")):
        assert [name for name in recorded.names if "rope" in name] == [wanted] * config.n_layers
        joined = ("aten.cat.", "aten.copy_.", "aten.new_zeros.", "aten.new_empty_strided.")
        assert not any(name.startswith(joined) for name in recorded.names)


@on_the_cpu
@pytest.mark.parametrize("recompute", [True, False])
def test_a_checkpointed_block_rms_norm_rope_swiglu(recompute, launches):
    """Whole, and selectively: the norms' operators saved by name, so that they are not launched again."""
    config = mistral.PRESETS["test"]
    block = mistral.Block(config, recompute)
    x, residual = (torch.randn(1, 6, config.dim, requires_grad=True) for _ in range(2))
    tables = rope_tables(6, config.head_dim, 1e4)
    plan = plan_attention(1, 6, config.head_dim, x.dtype, x.device, window=config.window)
    saved = [rms_norm.rms_norm_forward, rms_norm.add_rms_norm_forward]
    select = partial(create_selective_checkpoint_contexts, saved)
    gradients, counts = [], []
    for wrap in (
        lambda *x: block(*x),
        lambda *x: checkpoint(block, *x, use_reentrant=False),
        lambda *x: checkpoint(block, *x, use_reentrant=False, context_fn=select),
    ):
        launches.clear()
        y, stream = wrap(x, residual, *tables, None, plan)
        gradients.append(torch.autograd.grad((y + stream).sin().sum(), [x, residual, *block.parameters()]))
        counts.append(dict(launches))
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))
    assert [count["rms_norm_forward_kernel"] for count in counts] == [2, 4, 2]
    assert [count["rope_kernel"] for count in counts] == [2, 3, 3]


# -------------------------------------------------------------------------------------------------- full size, on a GPU

on_a_gpu = pytest.mark.gpu
BIG = 16_384  # tokens


def full_size(dtype):
    """name -> (operation, its PyTorch, inputs) at Mistral-7B's sizes."""
    cos, sin = rope_tables(4096, 128, 1e4, "cuda")
    cuda = {"dtype": dtype, "device": "cuda"}
    wide = lambda x: torch.arange(x.shape[1], device="cuda").expand(x.shape[:2])  # noqa: E731
    return {
        "rms_norm": (half_norm, torch_norm, lambda M: [torch.randn(M, 4096, **cuda), torch.randn(4096, **cuda)]),
        "add_rms_norm": (
            lambda x, r, w: add_rms_norm(x, r, w, EPS),
            torch_add_rms_norm,
            lambda M: [torch.randn(M, 4096, **cuda), torch.randn(M, 4096, **cuda), torch.randn(4096, **cuda)],
        ),
        "rope": (
            lambda x: rope_qkv(x, cos, sin, 32, 8),
            lambda x: hf_rope(x, cos, sin, 32, 8, wide(x)),
            lambda M: [torch.randn(max(M // 4096, 1), min(M, 4096), 48, 128, **cuda)],
        ),
        "rope_split": (
            lambda x: rope_split_qkv_(x.clone(), cos, sin, 32, 8),
            lambda x: hf_rope(x, cos, sin, 32, 8, wide(x)).split([32, 8, 8], dim=2),
            lambda M: [torch.randn(max(M // 4096, 1), min(M, 4096), 48, 128, **cuda)],
        ),
        "swiglu": (swiglu.swiglu, hf_swiglu, lambda M: [torch.randn(M, 28_672, **cuda)]),
    }


@on_a_gpu
@each_operation
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 133, 4096])
def test_numerics_at_full_width(name, dtype, M, launches):
    """4,096 rows at once: the fp64 truth of more does not fit beside them."""
    ours, theirs, inputs = full_size(dtype)[name]
    compare(ours, theirs, *inputs(M))
    assert launches == passes(name)


@on_a_gpu
@each_operation
def test_a_hundred_repeats_are_bitwise_equal(name):
    ours, _, inputs = full_size(torch.bfloat16)[name]
    inputs = [x.requires_grad_() for x in inputs(BIG)]

    def once():
        outputs = ours(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return [*outputs, *torch.autograd.grad(outputs, inputs, [y.detach().cos() for y in outputs])]

    first = once()
    for _ in range(99):
        assert all(torch.equal(a, b) for a, b in zip(once(), first, strict=True))


@on_a_gpu
@each_operation
def test_tensors_beyond_two_to_the_31_elements(name):
    """Their last rows, forward and backward, are bit for bit those of the same rows alone."""
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of GPU memory")
    ours, _, inputs = full_size(torch.bfloat16)[name]
    columns = {"swiglu": 28_672, "rope": 6144, "rope_split": 6144}.get(name, 4096)
    rows = 4096 * (2**31 // columns // 4096 + 1)
    inputs = [x.requires_grad_() for x in inputs(rows)]
    assert inputs[0].numel() > 2**31

    def tail(x):
        return x if x.ndim == 1 else x[-1:] if x.ndim == 4 else x[-4096:]

    def outputs_and_dx(inputs):
        outputs = ours(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        # the gradients of rows; those of weights sum over other rows here and there
        wanted = [x for x in inputs if x.ndim > 1]
        return [tail(y).clone() for y in (*outputs, *torch.autograd.grad(outputs, wanted, outputs))]

    whole = outputs_and_dx(inputs)
    alone = outputs_and_dx([tail(x).detach().clone().requires_grad_() for x in inputs])
    assert all(torch.equal(a, b) for a, b in zip(whole, alone, strict=True))


@on_a_gpu
@each_operation
def test_on_another_stream_and_device(name):
    ours, _, inputs = full_size(torch.bfloat16)[name]
    inputs = inputs(133)
    want = ours(*inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # a launch on the default stream would overtake this and read what is not written yet
        copies = [x.clone() for x in inputs]
        got = ours(*copies)
    stream.synchronize()
    as_list = lambda y: y if isinstance(y, tuple) else (y,)  # noqa: E731
    assert all(torch.equal(a, b) for a, b in zip(as_list(got), as_list(want), strict=True))
    if torch.cuda.device_count() > 1 and "rope" not in name:  # its tables are on device 0
        there = ours(*(x.to("cuda:1") for x in inputs))
        assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(as_list(there), as_list(want), strict=True))
