"""The Triton cross-entropy and the fused head and loss: numerics, gradients, memory, and the company they keep.

Kernels need TRITON_INTERPRET=1 or a GPU. Without either, ``test_all_of_this_in_the_interpreter`` runs this file again
in a process that has the variable. Meaning and refusals, which the reference shares, are in test_kernels.py.
"""

import gc
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from helpers import assert_close_to_truth
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from halny.kernels import cross_entropy as ce
from halny.kernels import dispatch
from halny.kernels import linear_cross_entropy as lce
from halny.kernels import scale_gradient as sg
from halny.kernels.cross_entropy import cross_entropy, cross_entropy_
from halny.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
interpreted = pytest.mark.skipif(
    not dispatch.INTERPRETED, reason="needs TRITON_INTERPRET=1 or a GPU; one test here runs all of them so"
)
kernel = pytest.mark.gpu if CUDA else interpreted  # small, and the same on either
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
INF, NAN = float("inf"), float("nan")


@pytest.mark.skipif(CUDA or dispatch.INTERPRETED, reason="the kernels run in this very process")
def test_all_of_this_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, "-p", "no:cacheprovider"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]


def randn(*shape, dtype=torch.float32, scale=1.0):
    return (scale * torch.randn(*shape, device=DEVICE)).to(dtype)


def ints(*values, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def some_labels(n, vocab_size, ignore_index=-100):
    labels = torch.randint(vocab_size, (n,), device=DEVICE)
    labels[1::3] = ignore_index
    labels[0] = 0
    labels[-1] = vocab_size - 1
    return labels


def plain(logits, labels, ignore_index=-100, reduction="mean"):
    """PyTorch's own, in fp32 or, for fp64 logits, in fp64."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, labels.long(), ignore_index=ignore_index, reduction=reduction)


def with_gradients(function, inputs, upstream=None):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    loss = function(*inputs)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, inputs, upstream)


def compare(ours, theirs, inputs, upstream=None, roundings=1.0):
    """Loss and gradients of ours, bounded by the error that theirs makes of the same against itself in fp64."""
    sets = (
        with_gradients(ours, inputs, upstream),
        with_gradients(theirs, inputs, upstream),
        with_gradients(theirs, [x.double() for x in inputs], upstream),
    )
    for i, (a, b, c) in enumerate(zip(*sets, strict=True)):
        assert_close_to_truth(a, b, c, roundings=roundings, name=f"gradient {i - 1}" if i else "loss")


def every_tile(monkeypatch, tile):
    """Make the rows of small vocabularies as many blocks as those of large ones."""
    if tile == "several blocks":
        monkeypatch.setattr(ce, "BLOCK", 64)


# -------------------------------------------------------------------------------------------------------- cross-entropy


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", ["one block", "several blocks"])
@pytest.mark.parametrize("V", [2, 41, 300, 512])  # of 512, rows are 16 bytes wide and whole blocks
def test_against_the_truth(V, tile, dtype, monkeypatch, launches):
    every_tile(monkeypatch, tile)
    logits, labels = randn(14, V, dtype=dtype, scale=3), some_labels(14, V)
    for reduction in ("mean", "sum", "none"):
        upstream = torch.randn(14 if reduction == "none" else (), device=DEVICE)
        compare(
            lambda x: cross_entropy(x, labels, reduction=reduction),  # noqa: B023
            lambda x: plain(x, labels, reduction=reduction),  # noqa: B023
            [logits],
            upstream,
        )
    assert launches == {"cross_entropy_kernel": 3, "scale_kernel": 3}


@kernel
@pytest.mark.parametrize("operation", [cross_entropy, cross_entropy_])
def test_a_vocabulary_of_one_word_runs_the_reference(operation, launches):
    """For which triton 3.6 cannot compile the kernel: the loss is 0, and so is the gradient."""
    logits, labels = randn(3, 1, dtype=torch.bfloat16).requires_grad_(), ints(0, -100, 0)
    loss = operation(logits * 1.0, labels)
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any() and not launches


@kernel
@pytest.mark.parametrize("V", [31_999, 32_000, 32_001, 65_552])  # the last in the blocks of long rows
def test_real_vocabularies(V, launches):
    logits, labels = randn(3, V, dtype=torch.bfloat16), ints(0, V - 1, -100)
    compare(lambda x: cross_entropy(x, labels), lambda x: plain(x, labels), [logits])
    with torch.no_grad():
        assert_close_to_truth(cross_entropy(logits, labels), plain(logits, labels), plain(logits.double(), labels))
    assert launches == {"cross_entropy_kernel": 2, "scale_kernel": 1}


@kernel
@pytest.mark.parametrize("tile", ["one block", "several blocks"])
def test_extreme_logits(tile, monkeypatch):
    every_tile(monkeypatch, tile)
    V, labels = 208, ints(0, 150, 207, 7, -100)

    def check(logits):
        compare(lambda x: cross_entropy(x, labels), lambda x: plain(x, labels), [logits])

    check(1e4 * randn(5, V))
    check(torch.where(torch.rand(5, V, device=DEVICE) < 0.5, -1e4, 1e4))
    masked = randn(5, V)
    masked[:, 8:150] = -INF  # whole blocks, and with the next line the first of a row
    check(masked)
    few = masked.clone()
    few[:, 151:207] = -INF  # most threads have no logit at all
    check(few - 1e3)
    masked[1, :150] = -INF
    check(masked)
    masked[3, 7] = -INF  # the target itself: the loss is infinite
    check(masked)
    for value in (INF, NAN):
        bad = randn(5, V)
        bad[0, 70] = value
        assert cross_entropy(bad, labels).isnan()
        rows, gradient = with_gradients(lambda x: cross_entropy(x, labels, reduction="none"), [bad])
        assert rows[0].isnan() and gradient[0].isnan().all() and not gradient[1:].isnan().any()
    assert cross_entropy(torch.full((5, V), -INF, device=DEVICE), labels).isnan()


@kernel
@pytest.mark.parametrize("tile", ["one block", "several blocks"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [10.0, 20.0])  # beyond, fp64 is not the truth either
def test_confident_targets(lead, dtype, tile, monkeypatch):
    """Where p is nearly 1, p - 1 must not become the noise of a rounded p, nor the loss that of a rounded sum."""
    every_tile(monkeypatch, tile)
    logits, labels = randn(4, 300), ints(0, 100, 299, 63)
    logits[range(4), labels] = logits.amax(-1) + lead
    logits = logits.to(dtype)
    loss, gradient = with_gradients(lambda x: cross_entropy(x, labels, reduction="none"), [logits])
    same = with_gradients(lambda x: plain(x, labels, reduction="none"), [logits])
    truth = with_gradients(lambda x: plain(x, labels, reduction="none"), [logits.double()])
    torch.testing.assert_close(loss.double(), truth[0], rtol=1e-5, atol=0)
    truncated = torch.finfo(dtype).eps if dispatch.INTERPRETED and dtype == torch.bfloat16 else 0  # see helpers.py
    for ours, theirs, true in zip(gradient, same[1], truth[1], strict=True):
        error, torch_error = (ours - true).abs().max(), (theirs - true).abs().max()
        assert error <= 4 * torch_error + truncated * true.abs().max() + torch.finfo(dtype).smallest_normal
    at_target = gradient[range(4), labels].double(), truth[1][range(4), labels]
    if dtype != torch.float16 or lead == 10.0:  # the others leave fp16's range
        torch.testing.assert_close(*at_target, rtol=2 * torch.finfo(dtype).eps + 1e-5, atol=0)


@kernel
def test_ignored_labels():
    logits, none = randn(6, 41), torch.full((6,), -100, device=DEVICE)
    for reduction in ("mean", "sum", "none"):
        loss, gradient = with_gradients(lambda x: cross_entropy(x, none, reduction=reduction), [logits])  # noqa: B023
        assert loss.isnan() if reduction == "mean" else not loss.any()
        assert not gradient.any()
    # an ignored row is not even read
    poisoned, labels = logits.clone(), ints(-100, 3, -100, -100, -100, -100)
    poisoned[labels == -100] = NAN
    loss, gradient = with_gradients(lambda x: cross_entropy(x, labels), [poisoned])
    torch.testing.assert_close(loss, plain(logits[1:2], labels[1:2]))
    assert not gradient[labels == -100].any() and gradient[1].all()
    # nor does an infinite upstream gradient reach it
    rows = with_gradients(lambda x: cross_entropy(x, labels, reduction="none"), [logits], ints(*[1] * 6) * INF)[1]
    assert not rows[labels == -100].any()


@kernel
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 1, 16, 40, 1000, -(2**40)])
def test_ignore_index(ignore_index):
    logits, labels = randn(14, 41), some_labels(14, 41, ignore_index)
    for reduction in ("mean", "none"):
        compare(
            lambda x: cross_entropy(x, labels, ignore_index=ignore_index, reduction=reduction),  # noqa: B023
            lambda x: plain(x, labels, ignore_index, reduction),  # noqa: B023
            [logits],
        )


@kernel
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int16, torch.int32])
def test_label_dtypes(dtype):
    logits, labels = randn(3, 200), ints(0, 100, 156).to(dtype)
    if dtype == torch.int8:
        labels[2] = -100
    compare(lambda x: cross_entropy(x, labels), lambda x: plain(x, labels), [logits])


@kernel
@pytest.mark.parametrize("tile", ["one block", "several blocks"])
def test_unchecked_labels_out_of_range_read_nothing(tile, monkeypatch):
    """As CUDA tensors are, without the debug switch: the row becomes NaN, its neighbours do not."""
    every_tile(monkeypatch, tile)
    labels = ints(5, 300, -1, 2**62, -(2**62), 2**32 + 7, 7)
    wild = torch.tensor([False, True, True, True, True, True, False], device=DEVICE)
    loss, _, gradient = ce.cross_entropy_rows(randn(7, 300), labels, torch.ones((), device=DEVICE), -100, True)
    assert torch.equal(loss.isnan(), wild) and torch.equal(gradient.isnan(), wild[:, None].expand(7, 300))


@kernel
@pytest.mark.parametrize("tile", ["one block", "several blocks"])
def test_the_first_of_equal_logits_is_the_prediction(tile, monkeypatch):
    every_tile(monkeypatch, tile)
    V = 100
    logits = torch.randint(3, (2 * V, V), device=DEVICE).float()  # ties everywhere
    logits[-1] = 0.0
    labels = logits.argmax(-1)
    labels[::2] = torch.arange(0, 2 * V, 2, device=DEVICE) // 2
    want = labels == torch.stack([(row == row.max()).nonzero()[0, 0] for row in logits])
    _, correct, _ = ce.cross_entropy_rows(logits, labels, torch.ones((), device=DEVICE), -100, False)
    assert torch.equal(correct.bool(), want) and 0 < want.sum() < 2 * V


@kernel
@pytest.mark.parametrize("first", [0, 1_023, 1_024, 17_000])
def test_a_tie_is_looked_for_all_along_the_row(first):
    """The label's equal is in the first, the second and the last block that is read again; or behind the label."""
    logits = randn(1, 20_000, dtype=torch.bfloat16)
    logits[0, [first, 17_000, 19_999]] = 100.0
    for label in (17_000, 19_999):
        labels = torch.tensor([label], device=DEVICE)
        _, correct, _ = ce.cross_entropy_rows(logits, labels, torch.ones((), device=DEVICE), -100, True)
        assert correct.item() == (label == first)


@kernel
@pytest.mark.parametrize("tile", ["one block", "several blocks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [150, 256])
def test_targets_all_along_the_row(V, dtype, tile, monkeypatch):
    """None is among the others, which it outweighs; without a gradient too. In place the bits are the same."""
    every_tile(monkeypatch, tile)
    labels = torch.cat([torch.arange(0, V, 23, device=DEVICE), ints(V - 1)])
    logits, row = randn(len(labels), V), torch.arange(len(labels), device=DEVICE)
    logits[row, labels] = 20.0
    logits, scale = logits.to(dtype), torch.ones((), device=DEVICE)
    want = plain(logits.double(), labels, reduction="none")
    loss, correct, gradient = ce.cross_entropy_rows(logits, labels, scale, -100, True)
    for some in (loss, ce.cross_entropy_rows(logits, labels, scale, -100, False)[0]):
        torch.testing.assert_close(some.double(), want, rtol=1e-5, atol=0)
    assert correct.all() and (gradient[row, labels] < 0).all() and ((gradient > 0).sum(-1) == V - 1).all()
    overwritten = logits.clone()
    again = ce.cross_entropy_rows_(overwritten, labels, scale, -100)
    assert torch.equal(again[0], loss) and torch.equal(again[1], correct) and torch.equal(overwritten, gradient)


@kernel
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_a_program_scales_several_tiles(reduction, monkeypatch):
    """Of a gradient with more tiles than there are programs, into a new tensor and in place."""
    monkeypatch.setattr(sg, "PROGRAMS", 3)
    monkeypatch.setattr(sg, "BLOCK", 32)
    leaf, labels = randn(7, 41).requires_grad_(), some_labels(7, 41)
    upstream = torch.randn(7 if reduction == "none" else (), device=DEVICE)
    (want,) = torch.autograd.grad(plain(leaf, labels, reduction=reduction), leaf, upstream)
    loss = cross_entropy(leaf, labels, reduction=reduction)
    for keep in (True, False):
        (got,) = torch.autograd.grad(loss, leaf, upstream, retain_graph=keep)
        torch.testing.assert_close(got, want)


def poison(x):
    return torch.full_like(x, NAN if x.is_floating_point() else 2**40)


LAYOUTS = {
    "columns apart": lambda x: torch.stack([x, poison(x)], -1)[..., 0],
    "transposed": lambda x: x.mT.contiguous().mT,
    "rows apart": lambda x: torch.cat([x, poison(x)], -1)[..., : x.shape[-1]],
    "one element in": lambda x: torch.cat([ints(0).to(x), x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand_as(x),
}


@kernel
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts(layout):
    """Of logits, hidden, weight, labels and the upstream gradient; none of them changes."""
    labels = layout(ints(0, 40, -100, 7, 3, 3).view(6, 1))[:, 0]
    upstream = layout(randn(6, 1))[:, 0]
    logits, hidden, weight = layout(randn(6, 41)), layout(randn(6, 16)), layout(randn(41, 16))
    kept = [(x, x.clone()) for x in (labels, upstream, logits, hidden, weight)]
    for function, reference, inputs in (
        (cross_entropy, plain, [logits]),
        (
            lambda x, w, y, **k: linear_cross_entropy(x, w, y, **k).loss,
            lambda x, w, y, **k: plain(x @ w.T, y, **k),
            [hidden, weight],
        ),
    ):
        leaves = [x.detach().requires_grad_() for x in inputs]
        got = torch.autograd.grad(function(*leaves, labels, reduction="none"), leaves, upstream)
        want = with_gradients(lambda *x: reference(*x, labels, reduction="none"), inputs, upstream)[1:]  # noqa: B023
        torch.testing.assert_close(got, want)
    assert all(torch.equal(now.nan_to_num(9), then.nan_to_num(9)) for now, then in kept)


@kernel
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("in_place", [False, True])
def test_backward_again_changes_no_gradient_returned_before(reduction, in_place):
    leaf, labels = randn(6, 41).requires_grad_(), some_labels(6, 41)
    logits = leaf * 1
    before = logits.detach().clone()
    loss = (cross_entropy_ if in_place else cross_entropy)(logits, labels, reduction=reduction)
    if not in_place:
        assert torch.equal(logits, before)
    first = torch.autograd.grad(loss, leaf, torch.full_like(loss, 3.0), retain_graph=True)[0]
    kept = first.clone()
    second = torch.autograd.grad(loss, leaf, torch.full_like(loss, 0.5), retain_graph=True)[0]
    third = torch.autograd.grad(loss, leaf, torch.full_like(loss, 3.0))[0]
    assert torch.equal(first, kept) and torch.equal(third, kept)
    torch.testing.assert_close(second * 6, first)
    torch.testing.assert_close(first / 3, with_gradients(lambda x: plain(x, labels, reduction=reduction), [leaf])[1])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaf, torch.ones_like(loss))


@kernel
def test_loss_in_the_middle_and_another_branch_on_the_logits():
    labels = some_labels(6, 41)

    def function(loss):
        def both(x):
            y = x * 2
            return (y.softmax(-1).square().sum() + loss(y, labels).square()).log()

        return both

    compare(function(cross_entropy), function(plain), [randn(6, 41)], roundings=4)
    compare(function(cross_entropy_), function(plain), [randn(6, 41)], roundings=4)


@kernel
@pytest.mark.parametrize("power", [1, 2])  # the upstream gradient a constant, and one with a history
def test_second_derivatives_are_refused(power):
    x, w, labels = randn(3, 41).requires_grad_(), randn(7, 41).requires_grad_(), ints(0, 1, 2)
    for loss in (cross_entropy, cross_entropy_, lambda x, y: linear_cross_entropy(x, w, y).loss):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.grad(loss(x * 1, labels) ** power, x, create_graph=True)


# ---------------------------------------------------------------------------------------------------- the in-place form


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_in_place_overwrites_logits_with_their_gradient(reduction, dtype):
    leaf, labels = randn(2, 3, 41, dtype=dtype), some_labels(6, 41).view(2, 3)
    loss, gradient = with_gradients(lambda x: cross_entropy(x, labels, reduction=reduction), [leaf])
    leaf.requires_grad_()
    logits = leaf * 1
    got = cross_entropy_(logits, labels, reduction=reduction)
    torch.testing.assert_close(got, loss)
    torch.testing.assert_close(logits.detach(), gradient)
    upstream = torch.randn_like(loss)
    wanted = with_gradients(lambda x: cross_entropy(x, labels, reduction=reduction), [leaf], upstream)[1]
    torch.testing.assert_close(torch.autograd.grad(got, leaf, upstream)[0], wanted)


def test_in_place_is_loud_where_another_branch_would_be_wrong():
    labels = ints(0, 1, 2)
    leaf = randn(3, 41).requires_grad_()
    logits = leaf * 1
    square = logits.square()  # needs the logits for its own backward
    with pytest.raises(RuntimeError, match="inplace"):
        (cross_entropy_(logits, labels) + square.sum()).backward()
    logits = leaf * 1
    loss = cross_entropy_(logits, labels)
    with pytest.raises(RuntimeError, match="overwrote"):
        (loss + logits.sum()).backward()
    with pytest.raises(ValueError, match="logits"):
        cross_entropy_((leaf * 1).mT.contiguous().mT, labels)
    with pytest.raises(TypeError, match="logits"):
        cross_entropy_((leaf * 1).half(), labels)
    with torch.no_grad():
        before = leaf.clone()
        assert torch.equal(cross_entropy_(leaf, labels), cross_entropy(leaf, labels)) and torch.equal(leaf, before)


# ------------------------------------------------------------------------------------------------- linear cross-entropy


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 rows, as if 16 were enough for a matrix product; of D, if that is more."""
    monkeypatch.setattr(lce, "LEAST_ROWS", 16)
    monkeypatch.setattr(lce, "LOGITS_BYTES", 0)


def linear_loss(labels, **keywords):
    return lambda x, w: linear_cross_entropy(x, w, labels, **keywords).loss


def plain_linear(labels, **keywords):
    return lambda x, w: plain(x @ w.T, labels, **keywords)


def test_chunk_rows():
    assert lce.COLUMNS_MULTIPLE <= ce.PADDING.value
    assert lce.chunk_rows(16_384, 32_000, 4_096, 2) == 4_096
    assert lce.chunk_rows(16_384, 32_000, 256, 2) == 2_048
    assert lce.chunk_rows(16_384, 1_000, 256, 2) == 16_384  # all of it takes 33 MB
    assert lce.chunk_rows(2_048, 128_256, 4_096, 2) == 2_048  # one chunk: no sum, no fp32 d_weight
    assert lce.chunk_rows(2_049, 128_256, 256, 2) == 1_040  # two that are even, not 2,048 and 1
    assert lce.buffer_bytes(16_384, 32_000, 4_096, 2) == 4 * 32_000 * 4_096 + 8 * 16_384 < 0.7e9
    for n_rows in (0, 1, 15, 2_047, 2_048, 2_049, 5_000, 16_384, 100_000):
        for V, D in ((1, 8), (41, 64), (32_000, 4_096), (32_001, 1_000), (128_256, 4_096), (500_000, 100)):
            rows = lce.chunk_rows(n_rows, V, D, 2)
            assert rows % lce.ROWS_MULTIPLE == 0
            assert rows <= max(2_048, D) or rows * lce.padded_vocabulary(V) * 2 <= lce.LOGITS_BYTES
            if n_rows > 2_048:
                assert rows >= 1_024 and (-(-n_rows // rows) - 1) * rows < n_rows


@kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("n, D, V", [(1, 8, 41), (16, 24, 64), (37, 16, 100)])
def test_linear_against_the_truth(n, D, V, reduction, dtype, small_chunks, launches):
    hidden, weight, labels = randn(n, D, dtype=dtype), randn(V, D, dtype=dtype), some_labels(n, V)
    upstream = torch.randn(n if reduction == "none" else (), device=DEVICE)
    roundings = 8 if dtype == torch.float32 else 1  # a matrix product may sum in another order
    ours, theirs = linear_loss(labels, reduction=reduction), plain_linear(labels, reduction=reduction)
    compare(ours, theirs, [hidden, weight], upstream, roundings)
    n_chunks = -(-n // lce.chunk_rows(n, V, D, hidden.element_size()))
    ahead = reduction != "none" and dtype != torch.float16
    assert launches == {"cross_entropy_kernel": n_chunks} | (
        {"scale_kernel": 2} if ahead else {"cross_entropy_kernel": 2 * n_chunks}
    )
    got = linear_cross_entropy(hidden, weight, labels)
    want = linear_cross_entropy_reference(hidden, weight, labels)
    assert got[1:] == want[1:] and got.n_tokens.dtype == got.n_correct.dtype == torch.int64


@kernel
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_frozen_inputs_and_no_grad(reduction, small_chunks):
    """Gradients that nobody asks for are not made, not even in a buffer; the others keep their bits."""
    hidden, weight, labels = randn(40, 16), randn(50, 16), some_labels(40, 50)
    upstream = torch.randn(40 if reduction == "none" else (), device=DEVICE)
    both = with_gradients(linear_loss(labels, reduction=reduction), [hidden, weight], upstream)
    for frozen in (0, 1):
        leaves = [x.detach().requires_grad_(i != frozen) for i, x in enumerate((hidden, weight))]
        loss = linear_cross_entropy(*leaves, labels, reduction=reduction).loss
        saved = [x for x in loss.grad_fn.saved_tensors if x.ndim == 2] if reduction == "sum" else []
        assert len(saved) <= 1
        (gradient,) = torch.autograd.grad(loss, leaves[1 - frozen], upstream)
        assert torch.equal(gradient, both[2 - frozen])
    for guard in (torch.no_grad, torch.inference_mode):
        with guard():
            got = linear_cross_entropy(hidden.requires_grad_(not torch.is_inference_mode_enabled()), weight, labels)
        assert not any(x.requires_grad for x in got)
        hidden = hidden.detach()
    assert torch.equal(linear_cross_entropy(hidden, weight, labels, reduction=reduction).loss, both[0])


@kernel
def test_weight_gradient_is_summed_in_fp32(monkeypatch):
    """Of 60 rows, a large one and others; what a chunk of them adds is below half a unit of the sum in bf16."""
    for name in ("LEAST_ROWS", "ROWS_MULTIPLE"):
        monkeypatch.setattr(lce, name, 1)
    monkeypatch.setattr(lce, "LOGITS_BYTES", 0)
    n, D, V = 60, 8, 24
    hidden, weight = randn(n, D, dtype=torch.bfloat16).abs(), randn(V, D, dtype=torch.bfloat16, scale=1e-3)
    hidden[0] = 300.0
    labels = torch.zeros(n, dtype=torch.int64, device=DEVICE)
    runs = [with_gradients(linear_loss(labels, reduction="sum"), [hidden, weight]) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))  # and the same bits every time
    true = with_gradients(plain_linear(labels, reduction="sum"), [hidden.double(), weight.double()])[2]
    same = with_gradients(plain_linear(labels, reduction="sum"), [hidden, weight])[2]
    assert_close_to_truth(runs[0][2], same, true)
    d_logits = ((hidden @ weight.T).float().softmax(-1) - F.one_hot(labels, V)).bfloat16()
    in_bf16 = torch.zeros(V, D, dtype=torch.bfloat16, device=DEVICE)
    for i in range(n):
        in_bf16 += d_logits[i : i + 1].T @ hidden[i : i + 1]
    with pytest.raises(AssertionError, match="above the bound"):
        assert_close_to_truth(in_bf16, same, true)


@kernel
def test_linear_backward_twice_loss_in_the_middle(small_chunks):
    hidden, weight, labels = randn(40, 16).requires_grad_(), randn(50, 16).requires_grad_(), some_labels(40, 50)
    loss = linear_cross_entropy(hidden, weight, labels).loss.square()
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    kept = [g.clone() for g in first]
    torch.autograd.grad(7 * loss, (hidden, weight), retain_graph=True)
    last = torch.autograd.grad(loss, (hidden, weight))
    for a, b, c in zip(first, kept, last, strict=True):
        assert torch.equal(a, b) and torch.equal(b, c)
    want = with_gradients(lambda x, w: plain(x @ w.T, labels).square(), [hidden, weight])[1:]
    torch.testing.assert_close(first, want, rtol=1e-4, atol=1e-4)


@kernel
@pytest.mark.parametrize("n", [0, 5])
def test_all_ignored_and_no_rows(n, small_chunks):
    hidden, weight = randn(n, 16), randn(50, 16)
    labels = torch.full((n,), -100, device=DEVICE)
    for reduction in ("mean", "sum", "none"):
        loss, *gradients = with_gradients(linear_loss(labels, reduction=reduction), [hidden, weight])
        assert loss.isnan() if reduction == "mean" else not loss.any()
        assert [tuple(g.shape) for g in gradients] == [(n, 16), (50, 16)] and not any(g.any() for g in gradients)
        loss, gradient = with_gradients(lambda x: cross_entropy(x, labels, reduction=reduction), [randn(n, 50)])  # noqa: B023
        assert loss.isnan() if reduction == "mean" else not loss.any()
        assert gradient.shape == (n, 50) and not gradient.any()


@kernel
@pytest.mark.parametrize("tile", ["one block", "several blocks"])
def test_padding_of_an_odd_vocabulary_is_never_taken_for_logits(tile, small_chunks, monkeypatch):
    """The buffer's columns behind the vocabulary hold whatever was there: here NaN, then numbers above every logit."""
    every_tile(monkeypatch, tile)
    hidden, weight, labels = randn(20, 16), randn(101, 16), some_labels(20, 101)

    def results():
        with torch.no_grad():
            alone = linear_cross_entropy(hidden, weight, labels)
        return [*alone, *with_gradients(linear_loss(labels), [hidden, weight])]

    want = results()
    empty = torch.Tensor.new_empty
    for value in (NAN, INF, 1e30):

        def poisoned(x, *arguments, **keywords):
            new = empty(x, *arguments, **keywords)
            return new.fill_(value) if new.is_floating_point() else new  # noqa: B023

        monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
        assert all(torch.equal(a, b) for a, b in zip(results(), want, strict=True))


class LiveBytes(TorchDispatchMode):
    """The bytes of all storages that PyTorch operations made and that are still alive, and their peak."""

    def __init__(self, *inputs):
        super().__init__()
        self.live = self.peak = 0
        self.known = {x.untyped_storage()._cdata for x in inputs}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        outputs = function(*arguments, **(keywords or {}))
        for x in tree_leaves(outputs):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return outputs

    def freed(self, key, nbytes):
        self.known.remove(key)
        self.live -= nbytes


@kernel
@pytest.mark.skipif(CUDA, reason="test_memory_at_full_size asks the GPU's allocator")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_memory(reduction, dtype, small_chunks, monkeypatch):
    """Of forward and backward above inputs and returned gradients, counting every tensor that either makes."""
    monkeypatch.setattr(lce, "linear_cross_entropy_rows", lce._rows)  # an operator would hide what it allocates
    n, D, V, b = 200, 64, 500, dtype.itemsize
    hidden, weight = randn(n, D, dtype=dtype).requires_grad_(), randn(V, D, dtype=dtype).requires_grad_()
    labels = some_labels(n, V)
    upstream = torch.randn(n) if reduction == "none" else torch.tensor(2.0)
    with LiveBytes(hidden, weight, labels, upstream) as count:
        loss = linear_cross_entropy(hidden, weight, labels, reduction=reduction).loss
        gc.collect()  # the interpreter leaves cycles that hold its arguments
        gradients = torch.autograd.grad(loss, (hidden, weight), upstream)
    returned = sum(g.nbytes for g in gradients)

    assert lce.chunk_rows(n, V, D, b) == 64
    buffer, summed = 64 * 512 * b, 4 * V * D if b == 2 else 0
    ahead, after = buffer, 0
    if b == 2:
        # On a CPU no product of bf16 has an fp32 result: a chunk's two factors are widened, before d_weight is there
        ahead = buffer + summed + 4 * 64 * (V + D) - gradients[1].nbytes
        after = summed + (buffer if reduction == "none" else 0)  # held by such a cycle
        assert lce.buffer_bytes(n, V, D, b) == summed + buffer + 8 * n - b * V * D
    expected = max(ahead, after)
    assert expected <= count.peak - returned <= expected + 40 * n, (count.peak - returned, expected)


# ------------------------------------------------------------------------------------------------ the company they keep


@kernel
def test_operators():
    x, labels, scale = randn(3, 41), ints(0, -100, 40), torch.tensor(0.5, device=DEVICE)
    for operator, arguments in (
        (ce.cross_entropy_rows, (x, labels, scale, -100, True)),
        (ce.cross_entropy_rows, (x, labels, scale, -100, False)),
        (ce.cross_entropy_rows_, (x.clone(), labels, scale, -100)),
        (sg.scale_gradient, (x, scale, torch.bfloat16)),
        (sg.scale_gradient_, (x.clone(), randn(3))),
        (lce.linear_cross_entropy_rows, (randn(3, 8), randn(41, 8), labels, scale, -100, True, True)),
        (lce.linear_cross_entropy_rows, (randn(3, 8), randn(41, 8), labels, randn(3), -100, False, True)),
    ):
        torch.library.opcheck(operator, arguments)


@kernel
@pytest.mark.parametrize("reduction", ["mean", "none"])
@functorch_config.patch(donated_buffer=False)  # or torch refuses retain_graph, whatever the operators
def test_compiled(reduction, small_chunks):
    hidden, weight, labels = randn(40, 16), randn(50, 16), some_labels(40, 50)

    def function(x, w):
        two = cross_entropy(x @ w.T, labels, reduction=reduction)
        return two + linear_cross_entropy(x, w, labels, reduction=reduction).loss

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    upstream = torch.randn(40 if reduction == "none" else (), device=DEVICE)
    want = with_gradients(function, [hidden, weight], upstream)
    torch.testing.assert_close(with_gradients(compiled, [hidden, weight], upstream), want)
    leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    loss = compiled(*leaves)
    first = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    second = torch.autograd.grad(loss, leaves, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@kernel
@pytest.mark.parametrize("how", ["reentrant", "recompute", "save"])
def test_activation_checkpointing(how, small_chunks, launches):
    hidden, weight, labels = randn(40, 16), randn(50, 16), some_labels(40, 50)

    def policy(_, operator, *args, **kwargs):
        ours = operator in (lce.linear_cross_entropy_rows, torch.ops.aten.mul.Tensor)
        return CheckpointPolicy.MUST_SAVE if ours else CheckpointPolicy.PREFER_RECOMPUTE

    def loss(x, w):
        return linear_cross_entropy(2 * x, w, labels).loss

    want = with_gradients(loss, [hidden, weight], torch.tensor(3.0))
    launches.clear()
    keywords = {
        "reentrant": dict(use_reentrant=True),
        "recompute": dict(use_reentrant=False),
        "save": dict(use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy)),
    }[how]
    got = with_gradients_of_leaves(lambda x, w: checkpoint(loss, x, w, **keywords), [hidden, weight], 3.0)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert launches["cross_entropy_kernel"] == (3 if how == "save" else 6)


def with_gradients_of_leaves(function, inputs, upstream):
    """By ``backward``, which reentrant checkpointing insists on."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    loss = function(*inputs)
    loss.backward(torch.tensor(upstream, device=DEVICE))
    return loss.detach(), *(x.grad for x in inputs)


@kernel
def test_autocast():
    """hidden and weight are cast as for a linear layer, and each gets a gradient in its own dtype."""
    hidden, weight, labels = randn(6, 16), randn(41, 16), some_labels(6, 41)

    def narrow(function):
        def under(x, w):
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                return function(x, w)

        return under

    ours = with_gradients(narrow(linear_loss(labels)), [hidden, weight])
    same = with_gradients(narrow(plain_linear(labels)), [hidden, weight])
    true = with_gradients(plain_linear(labels), [hidden.bfloat16().double(), weight.bfloat16().double()])
    for a, b, c in zip(ours, same, true, strict=True):
        assert a.dtype == torch.float32
        assert_close_to_truth(a.bfloat16(), b.bfloat16(), c)
    mixed = with_gradients(narrow(linear_loss(labels)), [hidden.bfloat16(), weight])
    assert mixed[1].dtype == torch.bfloat16 and torch.equal(mixed[2], ours[2])
    with torch.autocast(DEVICE, dtype=torch.bfloat16):  # fp64 stays what it is, as for a linear layer
        assert linear_cross_entropy(hidden.double(), weight.double(), labels).loss.dtype == torch.float64
    with pytest.raises(TypeError, match="weight"):
        linear_cross_entropy(hidden.bfloat16(), weight, labels)


@kernel
def test_the_table_of_errors():
    """bench/kernels.py --loss-error: a line for each dtype, kind of target and form, ours within a few of PyTorch's."""
    script = Path(__file__).parents[2] / "bench" / "kernels.py"
    command = [sys.executable, script, *([] if CUDA else ["--smoke"]), "--loss-error", "32", "16", "50"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("float", "bfloat16"))]
    errors = [[float(x) for x in line.split()[-3:]] for line in lines if "torch native" not in line]
    assert len(lines) == 18 and len(errors) == 12
    for ours, theirs in zip(errors[::2], errors[1::2], strict=True):
        assert all(a <= 4 * b + 1e-6 for a, b in zip(ours, theirs, strict=True)), done.stdout


FSDP = """
import sys, torch, torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from halny.kernels import dispatch, linear_cross_entropy as lce

lce.LEAST_ROWS, lce.LOGITS_BYTES = 16, 0

class Head(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 41, bias=False)
    def forward(self, x, labels):
        return lce.linear_cross_entropy(self.body(x), self.head.weight, labels, reduction="sum")

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
x, labels = torch.randn(2, 40, 8), torch.randint(41, (2, 40))
plain, sharded = Head(), Head()
sharded.load_state_dict(plain.state_dict())
for reshard in (False, True):
    sharded = Head()
    sharded.load_state_dict(plain.state_dict())
    fully_shard(sharded, reshard_after_forward=reshard, mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.float32))
    plain.zero_grad()
    wants = [plain(x[i], labels[i]) for i in range(2)]
    (sum(w.loss for w in wants) / 2).backward()
    got = sharded(x[rank], labels[rank])
    assert torch.equal(got.loss, wants[rank].loss) and got.n_correct == wants[rank].n_correct
    got.loss.backward()
    for (name, p), q in zip(sharded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, msg=name)
    with torch.no_grad():
        assert not sharded(x[rank], labels[rank]).loss.requires_grad
assert dispatch.launches["cross_entropy_kernel"] > 0
dist.destroy_process_group()
"""


@kernel
@pytest.mark.skipif(CUDA, reason="for gloo and CPU tensors")
def test_under_fsdp(tmp_path):
    (tmp_path / "fsdp.py").write_text(FSDP)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, str(tmp_path / "fsdp.py")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@kernel
@pytest.mark.skipif(CUDA, reason="a CPU run")
def test_metrics_of_a_training_run_are_those_of_its_logits(tmp_path):
    """Every line of metrics.jsonl against logits recomputed from the weights that the step before left."""
    from runs import SMALL, metrics, run
    from runs import checkpoint as saved_tensors

    from halny.model.data.batches import Corpus, read_in_turn
    from halny.model.data.order import sample_order
    from halny.model.data.writer import write_dataset
    from halny.model.mistral import PRESETS, Mistral

    documents = [(np.arange(330) * 7 % 40 + np.random.default_rng(0).integers(0, 3, 330)).astype(np.int64)]
    write_dataset(documents, tmp_path / "data", vocab_size=256)
    run(
        *SMALL, "--data", tmp_path / "data", "--steps", 3, "--keep", 3, "--lr", "1e-2", "--run-dir", "run", cwd=tmp_path
    )
    lines = metrics(tmp_path / "run")
    assert len(lines) == 3

    [rows], model = Corpus([str(tmp_path / "data")], 64).train, Mistral(PRESETS["test"])
    model.init_weights(seed=0)
    for step, line in enumerate(lines, start=1):
        if step > 1:
            tensors = saved_tensors(tmp_path / "run", step - 1)
            model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
        numbers = np.arange(4 * step - 4, 4 * step)
        tokens, labels, *_ = read_in_turn([rows], sample_order(numbers, len(rows), seed=0))
        with torch.no_grad(), dispatch.reference_only():
            logits = model(tokens).double()
        counted = labels != -100
        loss = F.cross_entropy(logits[counted], labels[counted]).item()
        assert line["accuracy"] == (logits.argmax(-1) == labels)[counted].double().mean().item()
        assert line["loss"] == pytest.approx(loss, rel=1e-6)
        assert line["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert lines[2]["accuracy"] > 0


# ----------------------------------------------------------------------------------------------- at full size, on a GPU

gpu = pytest.mark.gpu


def peak_above(function) -> int:
    """Peak bytes of function() above what was allocated before, without the cuBLAS workspace of a first call."""
    function()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = function()
    torch.cuda.synchronize()
    returned = sum(x.nbytes for x in kept)
    return torch.cuda.max_memory_allocated() - before - returned


@gpu
def test_memory_at_full_size():
    hidden = randn(16_384, 4_096, dtype=torch.bfloat16).requires_grad_()
    weight = randn(32_000, 4_096, dtype=torch.bfloat16, scale=0.02).requires_grad_()
    labels = some_labels(16_384, 32_000)

    def step():
        return torch.autograd.grad(linear_cross_entropy(hidden, weight, labels).loss, (hidden, weight))

    assert peak_above(step) <= 0.7e9


@gpu
@pytest.mark.parametrize("n, V", [(4_096, 32_000), (4_096, 32_001), (4_096, 31_999), (2_048, 128_256)])
def test_linear_at_full_size(n, V):
    hidden, weight = randn(n, 4_096, dtype=torch.bfloat16), randn(V, 4_096, dtype=torch.bfloat16, scale=0.02)
    labels = some_labels(n, V)
    compare(linear_loss(labels), plain_linear(labels), [hidden, weight], torch.tensor(3.0, device=DEVICE))
    got = linear_cross_entropy(hidden, weight, labels)
    logits = hidden @ weight.T
    assert got.n_correct == ((logits.argmax(-1) == labels) & (labels != -100)).sum()
    again = [with_gradients(linear_loss(labels), [hidden, weight]) for _ in range(3)]
    assert all(torch.equal(a, b) for other in again[1:] for a, b in zip(again[0], other, strict=True))


@gpu
@pytest.mark.parametrize("V", [32_000, 32_001, 31_999, 128_256])
@pytest.mark.parametrize("n", [1, 133, 4_096])
def test_at_full_size(V, n):
    logits, labels = randn(n, V, dtype=torch.bfloat16, scale=3), some_labels(n, V)
    compare(lambda x: cross_entropy(x, labels), lambda x: plain(x, labels), [logits])


@gpu
def test_more_than_two_to_the_31_logits():
    """The last row of them: offsets need 64 bits."""
    n, V = 67_200, 32_000
    logits = torch.zeros(n, V, dtype=torch.bfloat16, device=DEVICE)
    logits[-1] = randn(V)
    labels = torch.full((n,), -100, device=DEVICE)
    labels[-1] = 17
    last = logits[-1:].clone()
    loss, gradient = with_gradients(lambda x: cross_entropy(x, labels), [logits])
    want = with_gradients(lambda x: cross_entropy(x, labels[-1:]), [last])
    assert torch.equal(loss, want[0]) and torch.equal(gradient[-1:], want[1]) and not gradient[:-1].any()


@gpu
def test_nothing_waits_for_the_device_and_other_streams_work():
    hidden, weight = randn(256, 64).requires_grad_(), randn(1_000, 64).requires_grad_()
    labels = some_labels(256, 1_000)

    def step():
        loss, n_tokens, n_correct = linear_cross_entropy(hidden, weight, labels)
        (loss * 3 + cross_entropy(hidden @ weight.T, labels)).backward()
        return loss

    want = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            got = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert torch.equal(got, want)
