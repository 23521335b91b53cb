"""The embedding's gradient: PyTorch's sums, in fp32 and rounded once, and the same bits every time.

The kernel runs in Triton's interpreter, in a process that has TRITON_INTERPRET=1, or on a GPU.
"""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_to_truth, assert_passes_in_the_interpreter

from halny.kernels import dispatch
from halny.kernels.embedding import embedding, embedding_backward

on_the_cpu = pytest.mark.skipif(not dispatch.INTERPRETED, reason="needs TRITON_INTERPRET=1: elsewhere it is PyTorch's")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
V = 50
# counts that meet each way through the kernel: 0 to 8 rows at once, several eights, all tokens one
TOKENS = {
    "random": lambda: torch.randint(V, (2, 37)),
    "every count": lambda: torch.arange(20).repeat_interleave(torch.arange(20))[torch.randperm(190)].view(10, 19),
    "one": lambda: torch.full((1, 100), V - 1),
    "first and last": lambda: torch.tensor([0, V - 1, 0]),
    "no two": lambda: torch.randperm(V),
    "scalar": lambda: torch.tensor(7),
    "none": lambda: torch.zeros(3, 0, dtype=torch.int64),
}


def gradient_of(function, tokens, weight, upstream):
    weight = weight.detach().requires_grad_()
    return torch.autograd.grad(function(tokens, weight), weight, upstream)[0]


@on_the_cpu
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("D", [1, 41, 64, 1032])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradient_is_that_of_fp64(dtype, D, tokens, launches):
    torch.manual_seed(0)
    tokens, weight = TOKENS[tokens](), torch.randn(V, D, dtype=dtype)
    upstream = torch.randn(*tokens.shape, D).to(dtype)
    assert torch.equal(embedding(tokens, weight), F.embedding(tokens, weight))
    found = gradient_of(embedding, tokens, weight, upstream)
    assert launches["embedding_backward_kernel"] == (tokens.numel() > 0)
    truth = gradient_of(F.embedding, tokens, weight.double(), upstream.double())
    # PyTorch on the CPU rounds a sum in bf16 after each token, which would allow anything: here once
    rounded = truth.to(dtype) if dtype != torch.float32 else gradient_of(F.embedding, tokens, weight, upstream)
    assert_close_to_truth(found, rounded, truth)
    absent = torch.ones(V, dtype=torch.bool).index_fill_(0, tokens.flatten(), False)
    assert not found[absent].any()


@on_the_cpu
def test_each_token_counts_once():
    """Whole numbers, whose sums are exact: nothing is missing, nothing is there twice."""
    for n in (1, 7, 8, 9, 16, 23, 200):
        tokens = torch.randint(5, (n,))
        upstream = torch.randint(-8, 9, (n, 24)).float()
        weight = torch.zeros(6, 24)
        found = gradient_of(embedding, tokens, weight, upstream)
        assert torch.equal(found, torch.zeros(6, 24).index_add_(0, tokens, upstream)), n


@on_the_cpu
def test_a_sum_of_many_small_gradients_loses_none():
    """In bf16 1 + 2^-9 is 1: rounded once at the end, 1 and 512 times 2^-9 are 2."""
    tokens = torch.zeros(513, dtype=torch.int64)
    upstream = torch.full((513, 8), 2.0**-9, dtype=torch.bfloat16)
    upstream[0] = 1.0
    found = embedding_backward(upstream, tokens, 3)
    assert (found[0] == 2.0).all() and not found[1:].any()


@on_the_cpu
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_tokens_of_any_integer_type(dtype):
    tokens, upstream = torch.randint(V, (40,)), torch.randn(40, 16)
    expected = gradient_of(embedding, tokens, torch.zeros(V, 16), upstream)
    assert torch.equal(embedding_backward(upstream, tokens.to(dtype), V), expected)


def test_upstream_gradients_as_they_come():
    """Expanded, transposed and cut ones are read where they lie, or copied; and none is written to."""
    tokens, weight = torch.randint(V, (6, 5)), torch.randn(V, 16)
    whole = torch.randn(6, 5, 16)
    for upstream in (torch.tensor(2.0).expand(6, 5, 16), whole.mT.contiguous().mT, whole[:, :1].expand(6, 5, 16)):
        before = upstream.clone()
        found = gradient_of(embedding, tokens, weight, upstream)
        assert torch.equal(found, gradient_of(embedding, tokens, weight, before.contiguous()))
        assert torch.equal(upstream, before)


def test_what_does_not_fit_is_refused():
    weight = torch.zeros(4, 8)
    with pytest.raises(TypeError, match="tokens must be an integer tensor"):
        embedding(torch.zeros(3), weight)
    with pytest.raises(TypeError, match="weight must be a floating-point tensor"):
        embedding(torch.zeros(3, dtype=torch.int64), weight.long())
    with pytest.raises(ValueError, match=r"weight must be \[V, D\], got \(4,\)"):
        embedding(torch.zeros(3, dtype=torch.int64), weight[:, 0])
    with pytest.raises(IndexError):
        embedding(torch.tensor([4]), weight)


def test_it_compiles_as_one_graph():
    tokens, weight = torch.randint(V, (2, 9)), torch.randn(V, 16, requires_grad=True)
    expected = gradient_of(embedding, tokens, weight, torch.ones(2, 9, 16))
    compiled = torch.compile(embedding, fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(tokens, weight).sum(), weight)
    torch._dynamo.reset()
    assert torch.equal(found, expected)


@on_the_cpu
def test_the_operator_and_its_second_derivative():
    tokens, weight = torch.randint(V, (2, 9)), torch.randn(V, 16, requires_grad=True)
    torch.library.opcheck(embedding_backward, (torch.randn(2, 9, 16), tokens, V))
    upstream = torch.ones(2, 9, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(embedding(tokens, weight), weight, upstream, create_graph=True)


def test_frozen_weights_have_no_gradient(launches):
    tokens, weight = torch.randint(V, (9,)), torch.randn(V, 16)
    assert not embedding(tokens, weight).requires_grad
    assert not launches["embedding_backward_kernel"]


@pytest.mark.skipif(dispatch.INTERPRETED, reason="TRITON_INTERPRET=1: this process runs the kernel itself")
def test_in_the_interpreter():
    assert_passes_in_the_interpreter(__file__)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n, different", [(4096, 200), (16384, 3), (16384, 32_000)])
def test_it_repeats_itself_on_a_gpu(dtype, n, different, launches):
    """At 7B's sizes: each sum within a rounding of fp64's, and always the same bits."""
    torch.manual_seed(0)
    weight = torch.randn(32_000, 4096, device="cuda").to(dtype).requires_grad_()
    tokens = torch.randint(different, (n,), device="cuda")
    upstream = torch.randn(n, 4096, device="cuda").to(dtype)
    truth = torch.zeros(32_000, 4096, dtype=torch.float64, device="cuda").index_add_(0, tokens, upstream.double())
    first = gradient_of(embedding, tokens, weight, upstream)
    for _ in range(20):
        assert torch.equal(gradient_of(embedding, tokens, weight, upstream), first)
    assert launches["embedding_backward_kernel"] == 21
    size = torch.zeros_like(truth).index_add_(0, tokens, upstream.double().abs())
    bound = truth.abs() * torch.finfo(dtype).eps / 2 + size * n * torch.finfo(torch.float32).eps / 2
    assert ((first.double() - truth).abs() <= bound).all()
