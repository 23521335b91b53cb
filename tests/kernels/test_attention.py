"""kernels/attention.py: its meaning, its plan, the choice of a backend, and the calls into other people's packages.

What an answer should be comes from Hugging Face's eager attention and its masks, from PyTorch's attention with an
explicit mask, or from counting by hand. The packages are not installed here: stand-ins with their parameters, as read
in flash-attn 2.8.3, its hopper/ and flash-attn-4 4.0.0b36, check the calls and answer by the formula. Tests marked gpu
run every backend that imports.
"""

import importlib.util
import itertools
import sys
import types
import warnings
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close_to_truth
from test_kernels import DTYPES, LAYOUTS, compare, contiguous
from torch.nn.attention import SDPBackend
from torch.nn.attention import flex_attention as flex
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import masking_utils
from transformers.models.mistral import modeling_mistral as hf

from halny.kernels import attention_backends as backends
from halny.kernels import dispatch
from halny.kernels.attention import (
    BACKENDS,
    FASTEST,
    attention,
    attention_mask,
    attention_reference,
    candidates,
    choose,
    document_ids,
    explain,
    plan_attention,
    planned_attention,
)
from halny.kernels.attention_backends import PACKAGES, AttentionCase, make_block_mask
from halny.model import mistral
from halny.model.mistral import PRESETS, Mistral

# The stand-in statements below know nothing of Triton; the interpreter would only run the same code once more.
pytestmark = pytest.mark.skipif(dispatch.INTERPRETED, reason="attention has no Triton kernel of ours")

# ------------------------------------------------------------------------------------------------------- the definition


def brute_mask(T, window=None, documents=None):
    """bool [T, T], counted by hand; documents: the lengths that fill one row."""
    document = [d for d, length in enumerate(documents or [T]) for _ in range(length)]
    sees = lambda i, j: j <= i and (window is None or i - window < j) and document[i] == document[j]  # noqa: E731
    return torch.tensor([[sees(i, j) for j in range(T)] for i in range(T)])


def sdpa(q, k, v, mask):
    """PyTorch's attention with an explicit mask, [T, T] or [B, 1, T, T]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


def hf_eager(q, k, v, mask):
    """Hugging Face's eager attention: what plain PyTorch makes of it at that dtype, rounding scores and weights."""
    module = torch.nn.Module().eval()
    module.num_key_value_groups = q.shape[2] // k.shape[2]
    bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return hf.eager_attention_forward(module, q, k, v, bias, scaling=q.shape[-1] ** -0.5)[0]


def random_qkv(B, T, H, Hkv, head_dim, dtype=torch.float32):
    return [torch.randn(B, T, n, head_dim, dtype=dtype) for n in (H, Hkv, Hkv)]


def compare_attention(q, k, v, mask, layout=contiguous, **keywords):
    compare(
        lambda *qkv: attention(*qkv, **keywords),
        lambda *qkv: hf_eager(*qkv, mask),
        q, k, v,
        layout=layout,
        truth=lambda *qkv: sdpa(*qkv, mask),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, H, Hkv, head_dim", [(1, 2, 1, 8), (17, 4, 2, 16), (9, 8, 1, 92), (64, 32, 8, 8)])
def test_attention(T, H, Hkv, head_dim, dtype):
    q, k, v = random_qkv(2, T, H, Hkv, head_dim, dtype)
    for window in (None, 1, 3, max(T - 1, 1), T, T + 1, 10**9):
        compare_attention(q, k, v, brute_mask(T, window), window=window)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_layouts(layout):
    compare_attention(*random_qkv(2, 9, 4, 2, 16), brute_mask(9, 4), layout, window=4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype, offset", [(torch.float16, 24.0), (torch.bfloat16, 2.3)])
def test_reference_computes_scores_in_fp32(dtype, offset, autocast):
    """fp16 cannot hold a dot product of 73,728, and bf16 has no number between 59.75 and 60.25."""
    q, k, v = random_qkv(1, 8, 2, 2, 128)
    q, k, v = (x.to(dtype) for x in (q + offset, k + offset, v))
    truth = attention(q.double(), k.double(), v.double())
    theirs = sdpa(q, k, v, brute_mask(8))
    with torch.autocast("cpu", dtype, enabled=autocast):
        ours = attention(*((x.float() if autocast else x) for x in (q, k, v)))
    assert ours.dtype == dtype
    assert (ours - truth).abs().max() <= 2 * (theirs - truth).abs().max() < 0.02


def test_what_is_no_number_reaches_only_those_who_may_see_it():
    """Through values: in the output, and in the gradients of a loss of the other queries."""
    q, k, v = random_qkv(1, 8, 2, 2, 16)
    v[0, 5, 0, 3], v[0, 1, 1] = float("nan"), float("inf")
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, window=2, cu_seqlens=torch.tensor([0, 3, 8], dtype=torch.int32))
    reached = torch.zeros(1, 8, 2, 16, dtype=torch.bool)
    reached[0, 5:7, 0, 3] = reached[0, 1:3, 1] = True
    assert torch.equal(out.isnan(), reached)
    out[:, [0, 3, 4, 7]].sum().backward()
    assert all(x.grad.isfinite().all() for x in leaves)


def test_attention_of_a_packed_projection():
    """q, k and v as views of one buffer, the way the model calls it, gradients meeting in the buffer."""
    mask = brute_mask(11, 5)
    compare(
        lambda qkv: attention(*qkv.split([4, 2, 2], dim=2), window=5),
        lambda qkv: hf_eager(*qkv.split([4, 2, 2], dim=2), mask),
        torch.randn(2, 11, 8, 16),
        truth=lambda qkv: sdpa(*qkv.split([4, 2, 2], dim=2), mask),
    )


ROWS = [[5, 1, 6], [1, 1, 1, 9]]  # documents of two rows of 12, one-token ones among them
CU = torch.tensor([0, 5, 6, 12, 13, 14, 15, 24], dtype=torch.int32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 3, 12])
def test_attention_of_documents(window, dtype):
    q, k, v = random_qkv(2, 12, 4, 2, 16, dtype)
    mask = torch.stack([brute_mask(12, window, lengths) for lengths in ROWS])[:, None]
    compare_attention(q, k, v, mask, window=window, cu_seqlens=CU, max_seqlen=9)
    out = attention(q, k, v, window=window, cu_seqlens=CU)
    alone = [
        attention(*(x.flatten(0, 1)[None, start:end] for x in (q, k, v)), window=window)
        for start, end in zip(CU[:-1].tolist(), CU[1:].tolist(), strict=True)
    ]
    torch.testing.assert_close(out.flatten(0, 1), torch.cat(alone, 1)[0])


@pytest.mark.parametrize("S", [1, 2, 24])
def test_the_mask_is_hugging_faces(S):
    """The rule that transformers builds Mistral's masks by, at windows of one key, around S, and beyond any length."""
    i, j = torch.arange(S)[:, None], torch.arange(S)[None, :]
    for window in {1, 2, max(S - 1, 1), S, S + 1, 10**9}:
        theirs = masking_utils.sliding_window_causal_mask_function(window)(0, 0, i, j)
        assert torch.equal(attention_mask(S, window, None, 1, "cpu")[0], theirs)
    assert torch.equal(attention_mask(S, None, None, 1, "cpu")[0], masking_utils.causal_mask_function(0, 0, i, j))


def test_one_document_a_row_is_plain_causal():
    q, k, v = random_qkv(3, 7, 4, 1, 8)
    cu = torch.tensor([0, 7, 14, 21], dtype=torch.int32)
    torch.testing.assert_close(attention(q, k, v, cu_seqlens=cu), attention(q, k, v))


@pytest.mark.parametrize("window", [None, 1, 4])
def test_documents_of_one_token_return_their_values(window):
    q, k, v = random_qkv(2, 5, 4, 2, 8)
    cu = torch.arange(11, dtype=torch.int32)
    got = attention(q, k, v, window=window, cu_seqlens=cu, max_seqlen=1)
    assert torch.equal(got, v.repeat_interleave(2, dim=2))


def test_every_packed_batch_equals_its_documents_alone():
    """All ways to cut a row of 6 into documents, forward and every gradient."""
    T = 6
    cuts = [[j + 1 for j in range(T - 1) if bits >> j & 1] for bits in range(2 ** (T - 1))]
    q, k, v = (x.requires_grad_() for x in random_qkv(1, T, 2, 1, 8))
    upstream = torch.randn(1, T, 2, 8)
    for cut, window in itertools.product(cuts, (None, 2)):
        boundaries = [0, *cut, T]
        cu = torch.tensor(boundaries, dtype=torch.int32)
        packed = attention(q, k, v, window=window, cu_seqlens=cu)
        alone = [attention(*(x[:, s:e] for x in (q, k, v)), window=window) for s, e in pairwise(boundaries)]
        alone = torch.cat(alone, dim=1)
        torch.testing.assert_close(packed, alone)
        for a, b in zip(*(torch.autograd.grad(y, (q, k, v), upstream) for y in (packed, alone)), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("documents", [None, [20], [3, 17]])
@pytest.mark.parametrize("window", [1, 2, 7, 19])
def test_a_key_outside_the_window_changes_nothing(window, documents):
    """A poisoned key at distance exactly W from the last query changes no bit of its results; one at W - 1 does."""
    T, last = 20, 19
    cu = None if documents is None else torch.tensor([0, *torch.tensor(documents).cumsum(0)], dtype=torch.int32)
    q, k, v = random_qkv(1, T, 4, 2, 8)

    def last_query(poisoned):
        keys, values = k.clone(), v.clone()
        if poisoned is not None:
            keys[:, poisoned], values[:, poisoned] = 1e3, -1e3
        leaves = [x.clone().requires_grad_() for x in (q, keys, values)]
        y = attention(*leaves, window=window, cu_seqlens=cu)[:, last]
        gradients = torch.autograd.grad(y.square().sum(), leaves)
        return [y, gradients[0], *(g[:, : last - window + 1] for g in gradients[1:])]

    clean = last_query(None)
    far = last_query(last - window)
    assert all(torch.equal(a, b) for a, b in zip(clean, far, strict=True))
    assert all(g.count_nonzero() == 0 for g in clean[2:])  # keys and values outside the window get none
    in_its_document = documents is None or last - window + 1 >= T - documents[-1]
    assert torch.equal(clean[0], last_query(last - window + 1)[0]) == (not in_its_document)


def test_nothing_flows_between_documents_or_back_in_time():
    q, k, v = (x.requires_grad_() for x in random_qkv(2, 12, 4, 2, 8))
    out = attention(q, k, v, cu_seqlens=CU)
    for position in (0, 4, 5, 11):
        for g in torch.autograd.grad(out[0, position].sum(), (k, v), retain_graph=True):
            touched = g.abs().sum((2, 3)).nonzero().tolist()
            start = max(s for s in (0, 5, 6) if s <= position)
            # the gradient of a softmax over one key is zero, that of its value is not
            assert all(row == 0 and start <= j <= position for row, j in touched)
    assert touched == [[0, j] for j in range(6, 12)]


# ------------------------------------------------------------------------------------- the plan, and the model with it


def test_the_plan_drops_what_hides_nothing():
    """A window no shorter than the longest document, and documents that are the rows: plain causal is faster."""
    plan = partial(plan_attention, 2, 12, 16, torch.float32, torch.device("cpu"))
    assert plan(window=12).window is None and plan(window=11).window == 11
    assert plan(window=5, cu_seqlens=CU, max_seqlen=9).window == 5
    assert plan(window=9, cu_seqlens=CU, max_seqlen=9).window is None
    assert plan(window=9, cu_seqlens=CU).window == 9  # the longest is not known without reading the tensor
    assert plan(cu_seqlens=CU).cu_seqlens is CU and plan(cu_seqlens=CU).max_seqlen == 12
    assert plan(cu_seqlens=CU, max_seqlen=9).max_seqlen == 9 and plan(cu_seqlens=CU, max_seqlen=99).max_seqlen == 12
    rows = plan(window=9, cu_seqlens=torch.tensor([0, 12, 24], dtype=torch.int32), max_seqlen=12)
    assert rows.cu_seqlens is None and rows.window == 9


def test_the_plan_reads_no_values():
    """On meta tensors, which have none; so nothing in it can wait for a GPU."""
    for max_seqlen in (None, 9):
        plan = plan_attention(
            2, 12, 16, torch.float32, torch.device("meta"), window=3, cu_seqlens=CU.to("meta"), max_seqlen=max_seqlen
        )
        q, k, v = (x.to("meta") for x in random_qkv(2, 12, 4, 2, 16))
        assert planned_attention(q, k, v, plan).shape == q.shape
    mask = make_block_mask(12, 3, document_ids(CU.to("meta"), 2, 12), torch.device("meta"))
    assert mask.kv_indices.is_meta


DOCUMENTS = torch.tensor([0, 5, 6, 24, 40, 48], dtype=torch.int32)  # in two rows of 24


def tiny_batch(config):
    tokens = torch.randint(0, config.vocab_size, (2, 24))
    labels = torch.randint(0, config.vocab_size, (2, 24)).masked_fill(torch.rand(2, 24) < 0.2, -100)
    return tokens, labels


@pytest.mark.parametrize("wrap", ["eager", "checkpointed", "compiled"])
def test_the_model_plans_once_a_batch(wrap, monkeypatch):
    """One plan for all layers, forward and recomputation, and the same loss and gradients as without any wrapping."""
    config = PRESETS["test"]
    model = Mistral(config)
    tokens, labels = tiny_batch(config)
    want = model(tokens, labels, cu_seqlens=DOCUMENTS).loss
    gradients = torch.autograd.grad(want, list(model.parameters()))
    plans, used = [], []
    if wrap != "compiled":
        plan, run = mistral.plan_attention, mistral.planned_attention
        monkeypatch.setattr(mistral, "plan_attention", lambda *a, **k: plans.append(plan(*a, **k)) or plans[-1])
        monkeypatch.setattr(mistral, "planned_attention", lambda q, k, v, p: used.append(p) or run(q, k, v, p))
    if wrap == "checkpointed":
        for layer in model.layers:
            monkeypatch.setattr(layer, "forward", partial(checkpoint, layer.forward, use_reentrant=False))
    torch._dynamo.reset()
    call = torch.compile(model, fullgraph=True, backend="aot_eager") if wrap == "compiled" else model
    loss = call(tokens, labels, cu_seqlens=DOCUMENTS).loss
    torch.testing.assert_close(loss, want)
    for a, b in zip(torch.autograd.grad(loss, list(model.parameters())), gradients, strict=True):
        torch.testing.assert_close(a, b)
    if wrap != "compiled":
        assert len(plans) == 1 and len(used) == config.n_layers * (2 if wrap == "checkpointed" else 1)
        assert all(p is plans[0] for p in used)


def test_the_plan_is_for_the_dtype_that_attention_sees(monkeypatch):
    """Autocast changes it between the embedding, where the plan is made, and the layers."""
    config = PRESETS["test"]
    dtypes = []
    plan, run = mistral.plan_attention, mistral.planned_attention
    monkeypatch.setattr(mistral, "plan_attention", lambda B, T, c, dtype, *a, **k: (
        dtypes.append(dtype) or plan(B, T, c, dtype, *a, **k)
    ))  # fmt: skip
    monkeypatch.setattr(mistral, "planned_attention", lambda q, k, v, p: dtypes.append(q.dtype) or run(q, k, v, p))
    tokens, _ = tiny_batch(config)
    for recompute, enabled in itertools.product((True, False), (True, False)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            Mistral(config, recompute)(tokens)
        assert set(dtypes) == {torch.bfloat16 if enabled else torch.float32} and len(dtypes) == 1 + config.n_layers
        dtypes.clear()


def test_attention_under_autocast():
    """Cast as PyTorch's own is, whatever mixture comes in; each gradient in its own dtype; fp64 left as it is."""
    q, k, v = random_qkv(2, 12, 4, 2, 16)
    leaves = [x.requires_grad_() for x in (q, k.bfloat16(), v)]
    narrow = [x.detach().bfloat16().requires_grad_() for x in leaves]
    upstream = torch.randn(2, 12, 4, 16).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(*leaves, window=5, cu_seqlens=CU)
        assert torch.equal(attention(q, k, v, backend="sdpa"), attention(*narrow, backend="sdpa"))
        assert attention(*(x.double() for x in (q, k, v)), window=5).dtype == torch.float64
    want = attention(*narrow, window=5, cu_seqlens=CU)
    assert out.dtype == torch.bfloat16 and torch.equal(out, want)
    got = torch.autograd.grad(out, leaves, upstream)
    assert [g.dtype for g in got] == [torch.float32, torch.bfloat16, torch.float32]
    for a, b in zip(got, torch.autograd.grad(want, narrow, upstream), strict=True):
        assert torch.equal(a.bfloat16(), b)


@pytest.mark.parametrize("max_seqlen", [torch.tensor(18), 18.0, True, "18", 0])
def test_the_model_refuses_a_max_seqlen_that_is_no_length(max_seqlen):
    """A tensor among them: packages that take one make the host wait for its value."""
    config = PRESETS["test"]
    model, (tokens, _) = Mistral(config), tiny_batch(config)
    for cu in (DOCUMENTS, None):
        with pytest.raises(ValueError, match="max_seqlen must be None or a positive integer"):
            model(tokens, cu_seqlens=cu, max_seqlen=max_seqlen)


@pytest.mark.parametrize("restart", [True, False])
def test_positions_restart_with_each_document_unless_told_not_to(restart, monkeypatch):
    config = PRESETS["test"]
    model, (tokens, _) = Mistral(config), tiny_batch(config)
    positions = []
    rope = mistral.rope_split_qkv_
    monkeypatch.setattr(mistral, "rope_split_qkv_", lambda *args: positions.append(args[-1]) or rope(*args))
    with torch.no_grad():
        logits = model(tokens, cu_seqlens=DOCUMENTS, restart_positions=restart)
        if restart:
            assert positions[0].tolist() == [[*range(5), 0, *range(18)], [*range(16), *range(8)]]
        else:
            assert positions == [None] * config.n_layers  # 0 .. T - 1 in every row
        for start, end in pairwise(DOCUMENTS.tolist()):  # relative positions: the same to rounding
            alone = model(tokens.flatten()[None, start:end])
            torch.testing.assert_close(logits.flatten(0, 1)[start:end], alone[0], rtol=1e-5, atol=1e-5)


def test_training_on_packed_documents_equals_training_on_them_alone():
    """Ten AdamW steps: each loss is the token-weighted mean of the documents' own, and the weights stay together."""
    config = PRESETS["test"]
    packed, alone = Mistral(config), Mistral(config)
    alone.load_state_dict(packed.state_dict())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=3e-3) for model in (packed, alone)]
    for _ in range(10):
        tokens, labels = tiny_batch(config)
        loss, n_tokens, _ = packed(tokens, labels, cu_seqlens=DOCUMENTS, max_seqlen=18)
        together = loss / n_tokens
        means, weights = [], []
        for start, end in pairwise(DOCUMENTS.tolist()):
            loss, n, _ = alone(tokens.flatten()[None, start:end], labels.flatten()[None, start:end])
            if n:
                means.append(loss / n)
                weights.append(n / n_tokens)
        weighted = sum(m * w for m, w in zip(means, weights, strict=True))
        torch.testing.assert_close(together, weighted, rtol=1e-5, atol=0)
        unweighted = torch.stack(means).mean()
        assert abs(unweighted - weighted) > 1e-3  # so that weighting matters here
        for loss, optimizer in zip((together, weighted), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for a, b in zip(packed.parameters(), alone.parameters(), strict=True):
        # AdamW divides by the gradient's own size, which magnifies rounding where that is almost 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- block masks


def random_documents(B: int, T: int, generator) -> torch.Tensor:
    """cu_seqlens of B rows of T, cut at random; sometimes into single tokens, sometimes not at all."""
    cuts = [torch.rand(T, generator=generator) < 10 ** -(3 * torch.rand(1, generator=generator)) for _ in range(B)]
    starts = [row * T + j for row, cut in enumerate(cuts) for j in range(T) if j == 0 or cut[j]]
    return torch.tensor([*starts, B * T], dtype=torch.int32)


@pytest.mark.parametrize("block_size", [(16, 16), (32, 16)])
@pytest.mark.parametrize("T", [1, 15, 16, 17, 64, 100])
def test_block_masks_are_those_that_pytorch_makes_pair_by_pair(T, block_size):
    """Block by block: which are computed, which of them without looking at pairs, in both directions."""
    generator = torch.Generator().manual_seed(T)
    for window, packed in itertools.product((None, 1, 2, 16, 17, 31, 32, 47, 48, 10**9), (False, True)):
        cu = random_documents(2, T, generator) if packed else None
        document = None if cu is None else document_ids(cu, 2, T)
        ours = make_block_mask(T, window, document, "cpu", block_size)
        mask = attention_mask(T, window, cu, 2, "cpu")
        theirs = flex.create_block_mask(
            lambda b, h, i, j, mask=mask: mask[b, i, j], len(mask), None, T, T, device="cpu", BLOCK_SIZE=block_size
        )
        assert ours.shape == theirs.shape and ours.seq_lengths == theirs.seq_lengths == (T, T)
        pair_by_pair = flex.create_mask(ours.mask_mod, len(mask), None, T, T, device="cpu")
        assert torch.equal(pair_by_pair[:, 0], mask)
        for kind in ("kv", "full_kv", "q", "full_q"):
            counts, indices = (getattr(ours, f"{kind}_{what}") for what in ("num_blocks", "indices"))
            assert torch.equal(counts, getattr(theirs, f"{kind}_num_blocks")), kind
            used = torch.arange(indices.shape[-1]) < counts[..., None]  # what follows a row's count is never read
            assert torch.equal(indices[used], getattr(theirs, f"{kind}_indices")[used]), kind
            assert counts.dtype == indices.dtype == torch.int32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 3, 140, 199])
def test_flex_attention_on_the_cpu(window, dtype):
    """Forward only: FlexAttention has no backward there. Longer than a block, and ragged."""
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile")
        q, k, v = random_qkv(2, 200, 4, 2, 16, dtype)
        for cu in (None, torch.tensor([0, 130, 131, 200, 400], dtype=torch.int32)):
            got = attention(q, k, v, window=window, cu_seqlens=cu, backend="flex")
            mask = attention_mask(200, window, cu, 2, "cpu")[:, None]
            truth = sdpa(q.double(), k.double(), v.double(), mask)
            roundings = 64 if dtype == torch.float64 else 1
            assert_close_to_truth(got, hf_eager(q, k, v, mask), truth, roundings=roundings)
    with pytest.raises(ValueError, match="no backward on the CPU"):
        attention(q.requires_grad_(), k, v, backend="flex")
    with torch.no_grad():
        assert torch.equal(attention(q, k, v, window=window, cu_seqlens=cu, backend="flex"), got)


@pytest.mark.parametrize("window, packed", [(None, False), (3, False), (3, True)])
def test_flex_attention_in_a_compiled_function(window, packed):
    """Plan, block mask and all inside one graph."""
    q, k, v = random_qkv(2, 12, 4, 2, 16)
    cu = CU if packed else None
    torch._dynamo.reset()
    function = torch.compile(
        lambda q, k, v: attention(q, k, v, window=window, cu_seqlens=cu, backend="flex"), fullgraph=True,
        backend="aot_eager",
    )  # fmt: skip
    with torch.no_grad():
        torch.testing.assert_close(function(q, k, v), attention_reference(q, k, v, window=window, cu_seqlens=cu))


@torch._dynamo.config.patch(recompile_limit=8)  # monkeypatch would leave PyTorch without that setting
def test_flex_attention_compiles_for_every_kind_of_mask_that_a_process_meets(monkeypatch):
    """More than the eight variants of one function after which PyTorch's fullgraph raises."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    compiled = backends._compiled_flex_attention.__wrapped__(False)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for window, packed, kv_heads, head_dim in itertools.product((None, 3), (False, True), (1, 2), (16, 32)):
        q, k, v = random_qkv(2, 12, 4, kv_heads, head_dim)
        plan = plan_attention(
            2, 12, head_dim, q.dtype, q.device, window=window, cu_seqlens=CU if packed else None, backend="flex"
        )
        with torch.no_grad():
            out = compiled(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=plan.block_mask, enable_gqa=True)
        want = attention_reference(q, k, v, window=window, cu_seqlens=CU if packed else None)
        torch.testing.assert_close(out.transpose(1, 2), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before > 8


# --------------------------------------------------------------------------------------------------- the decision table

DEVICES = [None, (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (13, 0)]
INSTALLED = [subset for n in range(4) for subset in itertools.combinations(PACKAGES, n)]


def all_cases():
    for installed, *rest in itertools.product(
        INSTALLED,
        DEVICES,
        [*DTYPES, torch.float16],
        (4, 8, 17, 64, 128, 192, 256, 264),
        *[(False, True)] * 4,
    ):
        yield AttentionCase(*rest, installed)


def is_wrong(name: str, case: AttentionCase) -> str | None:
    """The rules once more, each a line, from the packages' own documents; what a choice must never break."""
    generation = case.capability and case.capability[0]
    if name == "reference":
        return None
    if generation is None:
        return None if name in ("flex", "sdpa") and not (name == "sdpa" and (case.window or case.documents)) else "CPU"
    rules = {
        "before Ampere, or not known yet": generation not in (8, 9, 10, 12),
        "double precision": case.dtype == torch.float64,
        "fp32 on tensor-core kernels": case.dtype == torch.float32 and name != "flex",
        "too wide": case.head_dim > 256,
        "flash and cuDNN take multiples of 8": case.head_dim % 8 and name not in ("sdpa", "flex"),
        "Triton's dot": case.head_dim < 16 and name == "flex",
        "flash-attn-4 missing": name in ("flash4", "flex_flash") and "flash-attn-4" not in case.installed,
        "flash-attn-4 trains on Hopper and B200 only": name in ("flash4", "flex_flash") and generation not in (9, 10),
        "flash-attn-4 on B200 stops at 128": name == "flash4" and generation == 10 and case.head_dim > 128,
        "flash-attn-3 missing": name == "flash3" and "flash-attn-3" not in case.installed,
        "flash-attn-3 is Hopper's": name == "flash3" and generation != 9,
        "flash-attn-3 ignores the flag": name == "flash3" and case.deterministic,
        "flash-attn missing": name == "flash2" and "flash-attn" not in case.installed,
        "PyTorch's kernels know no window": name in ("cudnn", "sdpa") and case.window,
        "PyTorch's kernels know no documents": name in ("cudnn", "sdpa") and case.documents,
        "cuDNN's backward is not deterministic": name == "cudnn" and case.deterministic,
        "cuDNN refuses one key": name == "cudnn" and case.one_position,
        "cuDNN stops at 128": name == "cudnn" and case.head_dim > 128,
    }
    return next((rule for rule, broken in rules.items() if broken), None)


def test_the_decision_table_exhaustively():
    chosen, number = {}, 0
    for case in all_cases():
        name = choose("auto", case)
        order = candidates(case)
        assert is_wrong(name, case) is None, (name, case, is_wrong(name, case))
        for faster in order[: order.index(name)]:
            assert BACKENDS[faster].can(case), (faster, case)
            with pytest.raises(ValueError, match=f"backend '{faster}' cannot run this case"):
                choose(faster, case)
        assert choose(name, case) == name
        chosen.setdefault(case.capability and case.capability[0], set()).add(name)
        number += 1
    for generation, row in FASTEST.items():
        assert chosen[generation] == set(row), (
            f"rows of {generation} that no case reaches: {set(row) - chosen[generation]}"
        )
        assert row[-1] == "reference" and len(set(row)) == len(row)
    assert chosen[None] == chosen[7] == {"reference"}
    assert number == 8 * 9 * 4 * 8 * 16


def test_what_can_run_breaks_no_rule():
    """A backend may refuse more than the rules ask for, never less, whether auto looks at it or not."""
    for case in all_cases():
        for name, backend in BACKENDS.items():
            if backend.can(case) is None:
                assert is_wrong(name, case) is None, (name, case, is_wrong(name, case))


def case_of(
    capability, *, dtype=torch.bfloat16, head_dim=128, window=False, documents=False, one_position=False,
    deterministic=False, installed=(),
) -> AttentionCase:  # fmt: skip
    return AttentionCase(capability, dtype, head_dim, window, documents, one_position, deterministic, installed)


@pytest.mark.parametrize(
    "capability, described, installed, name",
    [
        ((9, 0), {}, (), "cudnn"),
        ((9, 0), {}, ("flash-attn-4",), "flash4"),
        ((9, 0), {}, ("flash-attn-3", "flash-attn-4", "flash-attn"), "flash3"),
        ((9, 0), {"deterministic": True}, ("flash-attn-3", "flash-attn-4", "flash-attn"), "flash4"),
        ((9, 0), {"deterministic": True}, (), "sdpa"),
        ((9, 0), {"window": True}, (), "flex"),
        ((9, 0), {"window": True}, ("flash-attn",), "flash2"),
        ((9, 0), {"documents": True}, (), "flex"),
        ((9, 0), {"documents": True}, ("flash-attn-4",), "flash4"),
        ((9, 0), {"dtype": torch.float32}, ("flash-attn-4",), "flex"),
        ((9, 0), {"dtype": torch.float64}, ("flash-attn-4",), "reference"),
        ((9, 0), {"head_dim": 12}, ("flash-attn-4",), "sdpa"),
        ((9, 0), {"head_dim": 12, "documents": True}, ("flash-attn-4",), "reference"),
        ((9, 0), {"one_position": True}, (), "sdpa"),
        ((10, 0), {}, (), "cudnn"),
        ((10, 0), {"window": True}, ("flash-attn-4",), "flash4"),
        ((8, 0), {}, ("flash-attn-3", "flash-attn-4"), "sdpa"),
        ((8, 0), {"documents": True}, ("flash-attn",), "flash2"),
        # the order of neighbours in the rows of FASTEST that nothing above tells apart
        ((8, 0), {}, tuple(PACKAGES), "flash2"),
        ((10, 0), {}, ("flash-attn",), "cudnn"),
        ((10, 0), {"head_dim": 192}, tuple(PACKAGES), "flash2"),
        ((9, 0), {"head_dim": 256}, ("flash-attn",), "flash2"),
        ((8, 9), {"window": True}, (), "flex"),
        (None, {}, tuple(PACKAGES), "reference"),
    ],
)
def test_explain(capability, described, installed, name):
    case = case_of(capability, installed=installed, **described)
    assert choose("auto", case) == name
    text = explain(case)
    header, *lines = text.splitlines()
    assert all(str(x) in header for x in (case.head_dim, "CPU" if capability is None else f"{capability[0]}."))
    assert ("several documents" in header, "no window" in header) == (case.documents, not case.window)
    assert ("one position" in header, "deterministic" in header) == (case.one_position, case.deterministic)
    assert [line.split()[0] for line in lines] == [*candidates(case)[: len(lines)]]
    assert lines[-1].split()[0] == name and "<- chosen" in lines[-1] and text.count("chosen") == 1
    for line in lines[:-1]:
        passed_over, reason = line.split(maxsplit=1)
        assert reason == BACKENDS[passed_over].can(case)


def test_explain_of_this_machine(monkeypatch):
    backends._load.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    here = case_of((9, 0), installed=None)
    assert explain() == explain(here) and choose("auto", here) in explain().splitlines()[-1]
    assert explain().startswith("attention on capability 9.0: bfloat16, head_dim 128, no window, one document a row\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert explain() == explain(case_of(None)) and "reference <- chosen" in explain()


def test_a_named_backend_that_cannot_says_why_and_how():
    q, k, v = random_qkv(2, 9, 4, 2, 16)
    want = attention_reference(q, k, v)
    assert torch.equal(attention(q, k, v, backend="reference"), want)
    rows = torch.tensor([0, 9, 18], dtype=torch.int32)
    for keywords in ({}, {"window": 9}, {"window": 10}, {"cu_seqlens": rows}):
        torch.testing.assert_close(attention(q, k, v, backend="sdpa", **keywords), want)
    with pytest.raises(ValueError, match=r"backend 'sdpa' cannot run this case: would attend beyond the window"):
        attention(q, k, v, window=8, backend="sdpa")
    documents = torch.tensor([0, 4, 9, 18], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"backend 'sdpa' .*across documents"):
        attention(q, k, v, cu_seqlens=documents, backend="sdpa")
    for name in ("flash4", "flash3", "flash2", "cudnn", "flex_flash"):
        with pytest.raises(ValueError, match=f"backend '{name}' cannot run this case: needs a CUDA device"):
            attention(q, k, v, backend=name)
    on_hopper = AttentionCase((9, 0), torch.bfloat16, 128, True, False, False, False, ())
    with pytest.raises(ValueError, match=r"flash-attn-4 is not installed \(pip install flash-attn-4"):
        choose("flash4", on_hopper)
    with pytest.raises(ValueError, match="backend must be one of auto, flash4"):
        attention(q, k, v, backend="flash")
    with pytest.raises(ValueError, match="q must be one of bfloat16, float16, float32, float64, got float8_e4m3fn"):
        attention(*(x.to(torch.float8_e4m3fn) for x in (q, k, v)))
    with pytest.raises(ValueError, match="q's 0 heads must be a positive multiple of k's 2"):
        attention(q[:, :, :0], k, v)
    with dispatch.reference_only():
        assert torch.equal(attention(q, k, v, backend="flash4"), want)  # the one switch wins over names


def test_deterministic_algorithms_change_the_choice():
    """PyTorch's own switch, read when a batch is planned."""
    assert "chosen: FlashAttention 3" in explain(case_of((9, 0), installed=("flash-attn-3",)))
    plan = partial(plan_attention, 1, 8, 16, torch.float32, torch.device("cpu"))
    assert not plan().deterministic
    torch.use_deterministic_algorithms(True)
    try:
        explained = explain(case_of((9, 0), deterministic=True, installed=("flash-attn-3",)))
        assert "flash3    builds from before" in explained and "PyTorch refuses" in explained
        assert "chosen: PyTorch's FlashAttention 2" in explained
        assert plan().deterministic and "deterministic" in explain().splitlines()[0]
    finally:
        torch.use_deterministic_algorithms(False)


# ----------------------------------------------------------------------------- calls into the packages, with stand-ins


def by_formula(q, k, v, scale, causal, left, right, cu_seqlens=None):
    """FlashAttention's documented meaning: query i sees keys from i - left to i + right, None for no bound.

    Returns out and the log-sum-exp. q [B, T, H, c], or [total, H, c] with cu_seqlens.
    """
    if cu_seqlens is not None:
        parts = [
            by_formula(*(x[s:e][None] for x in (q, k, v)), scale, causal, left, right)
            for s, e in pairwise(cu_seqlens.tolist())
        ]
        return torch.cat([out[0] for out, _ in parts]), torch.cat([lse[0] for _, lse in parts], dim=-1)
    group = q.shape[2] // k.shape[2]
    scores = torch.einsum("bihc,bjhc->bhij", q, k.repeat_interleave(group, 2)).float() * scale
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])[None, :]
    seen = torch.ones_like(distance, dtype=torch.bool)
    seen &= (distance >= 0) if causal else seen
    seen &= (distance <= left) if left is not None else seen
    seen &= (distance >= -right) if right is not None else seen
    scores = scores.masked_fill(~seen, float("-inf"))
    out = torch.einsum("bhij,bjhc->bihc", scores.softmax(-1).to(v.dtype), v.repeat_interleave(group, 2))
    return out.contiguous(), scores.logsumexp(-1)


def gradients(d_out, q, k, v, out, lse, scale, left):
    """FlashAttention's backward, causal: weights again from the log-sum-exp, then the chain rule by hand."""
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])[None, :]
    seen = (distance >= 0) & (distance <= (len(distance) if left is None else left))
    scores = torch.einsum("bihc,bjhc->bhij", q, k) * scale
    weights = (scores - lse[..., None]).exp().masked_fill(~seen, 0.0)
    d_weights = torch.einsum("bihc,bjhc->bhij", d_out, v)
    d_scores = weights * (d_weights - (d_out * out).sum(-1).transpose(1, 2)[..., None]) * scale
    d_k = torch.einsum("bhij,bihc->bjhc", d_scores, q).unflatten(2, (-1, group)).sum(3)
    d_v = torch.einsum("bhij,bihc->bjhc", weights, d_out).unflatten(2, (-1, group)).sum(3)
    return torch.einsum("bhij,bjhc->bihc", d_scores, k).contiguous(), d_k, d_v


class StandIn:
    """What all three packages ask of a call; counts calls and remembers the last call's options."""

    def __init__(self, unbounded):
        self.unbounded, self.calls = unbounded, []

    def bound(self, x):
        assert x is None or type(x) is int, f"a window's end must be a Python int, got {x!r}"
        assert self.unbounded is None or x is not None, "versions 2 and 3 take -1 for no bound"
        return None if x == self.unbounded else x

    def check(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic):
        documents = cu_seqlens_q is not None
        assert q.ndim == k.ndim == v.ndim == (3 if documents else 4)
        for x in (q, k, v):
            assert x.stride(-1) == 1 and x.data_ptr() % 16 == 0, "kernels load 16 bytes at once"
        assert k.shape == v.shape and q.shape[-2] % k.shape[-2] == 0 and q.shape[-2] > k.shape[-2], "keys repeated"
        if documents:
            assert cu_seqlens_q is cu_seqlens_k or torch.equal(cu_seqlens_q, cu_seqlens_k)
            assert cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q[-1] == len(q)
            assert type(max_seqlen_q) is int and type(max_seqlen_k) is int, "a tensor here makes the host wait"
            assert max_seqlen_q == max_seqlen_k >= cu_seqlens_q.diff().max()
        assert type(deterministic) is bool
        self.calls.append({"documents": documents, "deterministic": deterministic})


def version2(stand_in: StandIn):
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        stand_in.check(q, k, v, None, None, None, None, deterministic)
        left, right = map(stand_in.bound, window_size)
        return by_formula(q, k, v, softmax_scale, causal, left, right)[0]

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        stand_in.check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic)
        left, right = map(stand_in.bound, window_size)
        return by_formula(q, k, v, softmax_scale, causal, left, right, cu_seqlens_q)[0]

    return {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


def version3(stand_in: StandIn):
    """As of version 2, but for dropout and what inference needs; early builds return the log-sum-exp as well."""

    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0,
    ):  # fmt: skip
        stand_in.check(q, k, v, None, None, None, None, deterministic)
        left, right = map(stand_in.bound, window_size)
        return by_formula(q, k, v, softmax_scale, causal, left, right)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0,
    ):  # fmt: skip
        stand_in.check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic)
        left, right = map(stand_in.bound, window_size)
        return by_formula(q, k, v, softmax_scale, causal, left, right, cu_seqlens_q)[0]

    return {"flash_attn_func": flash_attn_func, "flash_attn_varlen_func": flash_attn_varlen_func}


def version4(stand_in: StandIn):
    """None for no bound; (out, log-sum-exp) always, the second None where nobody asks; a backward of its own."""

    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
        block_sparse_tensors_bwd=None, return_lse=False,
    ):  # fmt: skip
        assert return_lse and not torch.is_grad_enabled()
        stand_in.check(q, k, v, None, None, None, None, deterministic)
        left, right = map(stand_in.bound, window_size)
        return by_formula(q, k, v, softmax_scale, causal, left, right)

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
        softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
        block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False,
    ):  # fmt: skip
        assert return_lse and not torch.is_grad_enabled()
        stand_in.check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic)
        left, right = map(stand_in.bound, window_size)
        return by_formula(q, k, v, softmax_scale, causal, left, right, cu_seqlens_q)

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        deterministic=False,
    ):  # fmt: skip
        stand_in.check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, deterministic)
        left, right = stand_in.bound(window_size_left), stand_in.bound(window_size_right)
        assert causal and right in (None, 0)
        if cu_seqlens_q is None:
            return gradients(dout, q, k, v, out, lse, softmax_scale, left)
        parts = [
            gradients(*(x[None, s:e] for x in (dout, q, k, v, out)), lse[None, :, s:e], softmax_scale, left)
            for s, e in pairwise(cu_seqlens_q.tolist())
        ]
        return tuple(torch.cat([part[i][0] for part in parts]) for i in range(3))

    functions = (flash_attn_func, flash_attn_varlen_func, _flash_attn_bwd)
    return {function.__name__: function for function in functions}


VERSIONS = {"flash2": (version2, -1), "flash3": (version3, -1), "flash4": (version4, None)}
PACKAGE_OF = {"flash2": "flash-attn", "flash3": "flash-attn-3", "flash4": "flash-attn-4"}


@pytest.fixture
def install(monkeypatch):
    """install("flash4"): its stand-in becomes importable, on a machine that claims to be an H100."""

    def install(name: str) -> StandIn:
        version, unbounded = VERSIONS[name]
        stand_in = StandIn(unbounded)
        path = PACKAGES[PACKAGE_OF[name]][0]
        parts = path.split(".")
        for n in range(1, len(parts) + 1):
            monkeypatch.setitem(sys.modules, ".".join(parts[:n]), types.ModuleType(".".join(parts[:n])))
        vars(sys.modules[path]).update(version(stand_in))
        return stand_in

    backends._load.cache_clear()
    monkeypatch.setattr(backends, "_modules", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    yield install
    backends._load.cache_clear()


def hopper_plan(T=12, dtype=torch.bfloat16, backend="auto", head_dim=16, **documents):
    return plan_attention(2, T, head_dim, dtype, torch.device("cuda", 0), backend=backend, **documents)


CALLS = [
    pytest.param({}, False, id="causal"),
    pytest.param({"window": 1}, False, id="window-1"),
    pytest.param({"window": 5}, False, id="window-5"),
    pytest.param({"window": 12}, False, id="window-covers"),
    pytest.param({"max_seqlen": 9}, True, id="documents"),
    pytest.param({"max_seqlen": 9, "window": 3}, True, id="documents-window"),
    pytest.param({"window": 3}, True, id="documents-window-no-max_seqlen"),
]


@pytest.mark.parametrize("keywords, packed", CALLS)
@pytest.mark.parametrize("name", VERSIONS)
def test_flash_attention_is_called_right(name, keywords, packed, install):
    """Forward and every gradient through each package's stand-in, from views of one packed projection."""
    stand_in = install(name)
    if packed:
        keywords = {**keywords, "cu_seqlens": CU}
    plan = hopper_plan(backend="auto", **keywords)
    if not packed and plan.window is None:
        assert plan.backend == ("cudnn" if name == "flash2" else name)  # which is faster than version 2 where it can
    plan = hopper_plan(backend=name, **keywords)
    mask = attention_mask(12, keywords.get("window"), keywords.get("cu_seqlens"), 2, "cpu")[:, None]
    compare(
        lambda qkv: planned_attention(*qkv.split([4, 2, 2], dim=2), plan),
        lambda qkv: hf_eager(*qkv.split([4, 2, 2], dim=2), mask),
        torch.randn(2, 12, 8, 16),
        truth=lambda qkv: sdpa(*qkv.split([4, 2, 2], dim=2), mask),
        roundings=8 if name == "flash4" else 1,  # its stand-in makes the weights again from an fp32 log-sum-exp
    )
    assert {call["documents"] for call in stand_in.calls} == {packed}
    assert len(stand_in.calls) == (3 if name == "flash4" else 1)  # compare() runs two backward passes


def test_a_package_is_never_called_for_an_empty_batch(install):
    install("flash4")
    assert hopper_plan().backend == hopper_plan(1).backend == "flash4" and hopper_plan(0).backend == "reference"


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["flash2", "flash3"])
def test_flash_attention_2_and_3_get_what_they_can_load(name, layout, install):
    """Version 4 sees to it itself."""
    install(name)
    for documents in ({}, {"cu_seqlens": CU}):
        plan = hopper_plan(backend=name, window=4, **documents)
        mask = attention_mask(12, 4, documents.get("cu_seqlens"), 2, "cpu")[:, None]
        compare(
            lambda *qkv, plan=plan: planned_attention(*qkv, plan),
            lambda *qkv, mask=mask: hf_eager(*qkv, mask),
            *random_qkv(2, 12, 4, 2, 16),
            layout=layout,
            truth=lambda *qkv, mask=mask: sdpa(*qkv, mask),
        )


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", VERSIONS)
def test_a_key_at_distance_w_through_each_package(name, packed, install):
    """Distance exactly W changes no bit of out or gradients; W - 1 does."""
    install(name)
    plan = hopper_plan(backend=name, window=4, **({"cu_seqlens": CU} if packed else {}))
    q, k, v = random_qkv(2, 12, 4, 2, 16)

    def last_query(poisoned=None):  # of the second row, whose last document has 9 positions
        leaves = [x.clone() for x in (q, k, v)]
        if poisoned is not None:
            leaves[1][1, poisoned] = leaves[2][1, poisoned] = 100.0
        leaves = [x.requires_grad_() for x in leaves]
        y = planned_attention(*leaves, plan)[1, 11]
        return [y, *torch.autograd.grad(y.sum(), leaves)]

    clean, far, near = last_query(), last_query(11 - 4), last_query(11 - 3)
    assert all(torch.equal(a, b) for a, b in zip(clean, far, strict=True))
    assert not torch.equal(clean[0], near[0])
    assert clean[2][1, 7].count_nonzero() == clean[3][1, 7].count_nonzero() == 0 < clean[3][1, 8].count_nonzero()


@pytest.mark.parametrize("name", ["flash2", "flash4"])
def test_the_deterministic_flag_reaches_the_backward(name, install):
    stand_in = install(name)
    torch.use_deterministic_algorithms(True)
    try:
        plan = hopper_plan(backend=name)
        q, k, v = (x.requires_grad_() for x in random_qkv(2, 12, 4, 2, 16))
        planned_attention(q, k, v, plan).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert stand_in.calls[-1]["deterministic"] is True
    with pytest.raises(ValueError, match="backend 'flash3' cannot run this case: builds from before"):
        torch.use_deterministic_algorithms(True)
        try:
            hopper_plan(backend="flash3")
        finally:
            torch.use_deterministic_algorithms(False)


def test_packages_that_are_missing_or_broken(install, monkeypatch, tmp_path):
    """Missing: how to install it. Broken: what its import said. Neither stops auto."""
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash_attn is installed, and comes before the broken one here")
    # flash-attn-4 alone makes flash_attn a namespace package, which is no flash-attn 2
    (tmp_path / "flash_attn" / "cute").mkdir(parents=True)
    (tmp_path / "flash_attn" / "cute" / "__init__.py").touch()
    (tmp_path / "flash_attn" / "cute" / "interface.py").write_text("import a_compiler_that_is_missing")
    (tmp_path / "flash_attn_interface.py").write_text("raise OSError('libtorch.so: undefined symbol: _ZN3c10\\nmore')")
    monkeypatch.syspath_prepend(tmp_path)
    backends._load.cache_clear()
    try:
        import flash_attn  # noqa: F401  a namespace: the trap

        missing = "flash-attn is not installed (pip install flash-attn; no wheel for aarch64"
        assert backends._load("flash-attn").startswith(missing)
        broken = "flash-attn-4 does not import: No module named 'a_compiler_that_is_missing'"
        assert backends._load("flash-attn-4") == broken
        broken = "flash-attn-3 does not import: OSError: libtorch.so: undefined symbol: _ZN3c10"
        assert backends._load("flash-attn-3") == broken
        assert broken in explain(case_of((9, 0), installed=None)) and hopper_plan().backend == "cudnn"
    finally:  # monkeypatch would bring these back
        for name in [name for name in sys.modules if name.split(".")[0] in ("flash_attn", "flash_attn_interface")]:
            del sys.modules[name]


@pytest.mark.parametrize("packed", [False, True])
def test_flash_attention_4_as_operators(packed, install):
    """Registered as PyTorch asks, whole in a compiled graph, saved by name under selective checkpointing."""
    stand_in = install("flash4")
    plan = hopper_plan(backend="flash4", window=3, **({"cu_seqlens": CU} if packed else {}))
    q, k, v = (x.requires_grad_() for x in random_qkv(2, 12, 4, 2, 16))
    flat = [x.detach().flatten(0, 1) if packed else x.detach() for x in (q, k, v)]
    arguments = (plan.cu_seqlens, plan.max_seqlen, plan.window)
    torch.library.opcheck(backends.flash4_forward, (*flat, *arguments))
    out, lse = backends.flash4_forward(*flat, *arguments)
    torch.library.opcheck(backends.flash4_backward, (torch.randn_like(out), *flat, out, lse, *arguments, False))

    call = lambda q, k, v: planned_attention(q, k, v, plan)  # noqa: E731
    want = call(q, k, v)
    gradients = torch.autograd.grad(want.sin().sum(), (q, k, v))
    torch._dynamo.reset()
    select = partial(create_selective_checkpoint_contexts, [backends.flash4_forward])
    wrapped = {
        "compiled": torch.compile(call, fullgraph=True, backend="aot_eager"),
        "checkpointed": lambda *x: checkpoint(call, *x, use_reentrant=False),
        "selectively": lambda *x: checkpoint(call, *x, use_reentrant=False, context_fn=select),
    }
    calls = {}
    for name, function in wrapped.items():
        stand_in.calls.clear()
        got = function(q, k, v)
        torch.testing.assert_close(got, want)
        for a, b in zip(torch.autograd.grad(got.sin().sum(), (q, k, v)), gradients, strict=True):
            torch.testing.assert_close(a, b)
        calls[name] = len(stand_in.calls)
    assert calls == {"compiled": 2, "checkpointed": 3, "selectively": 2}  # forward, backward, and one forward again


@pytest.mark.parametrize("name", VERSIONS)
def test_flash_attention_refuses_second_derivatives(name, install):
    """Also of a plain sum, whose upstream gradient is a constant: the gradient must not pass for one."""
    install(name)
    q, k, v = (x.requires_grad_() for x in random_qkv(2, 12, 4, 2, 16))
    for function in (torch.sum, torch.norm):
        loss = function(planned_attention(q, k, v, hopper_plan(backend=name)))
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.grad(loss, q, create_graph=True)


@pytest.mark.parametrize("name", VERSIONS)
def test_plan_and_call_compile_into_one_graph(name, install, monkeypatch):
    """The choice, with the import that it may take, is made while tracing, from the second T on for all."""
    install(name)
    monkeypatch.setattr(StandIn, "check", lambda *_: None)  # the stand-in's own checks read values
    assert hopper_plan(window=3).backend == name
    backends._load.cache_clear()
    torch._dynamo.reset()
    function = torch.compile(
        lambda *x: planned_attention(*x, hopper_plan(x[0].shape[1], window=3)), fullgraph=True, backend="aot_eager"
    )
    for T in (12, 13, 14):
        q, k, v = random_qkv(2, T, 4, 2, 16)
        torch.testing.assert_close(function(q, k, v), attention_reference(q, k, v, window=3))


@pytest.mark.parametrize("dynamic", [None, True])
def test_one_graph_serves_all_lengths(dynamic):
    """Compiled for one T, or for any: others, one position, other documents and, if for any, another head_dim."""
    torch._dynamo.reset()
    function = torch.compile(
        lambda q, k, v, cu: attention(q, k, v, window=3, cu_seqlens=cu), fullgraph=True, backend="aot_eager",
        dynamic=dynamic,
    )  # fmt: skip
    for T, cuts, head_dim in ((9, None, 8), (12, None, 8), (1, None, 8), (12, (5,), 8), (20, (1, 7), 8), (9, None, 16)):
        q, k, v = random_qkv(2, T, 4, 2, head_dim)
        cu = None if cuts is None else torch.tensor([0, *cuts, T, 2 * T], dtype=torch.int32)
        want = attention_reference(q, k, v, window=3, cu_seqlens=cu)
        torch.testing.assert_close(function(q, k, v, cu), want)


@pytest.mark.parametrize("name, kernel", [("cudnn", SDPBackend.CUDNN_ATTENTION), ("sdpa", SDPBackend.FLASH_ATTENTION)])
def test_pytorchs_kernels_are_asked_for_by_name_and_without_a_mask(name, kernel, install, monkeypatch):
    """On tensors that claim to be CUDA's: which kernels PyTorch may choose from when it is called, and with what."""
    plan = hopper_plan(backend=name, window=12)
    seen = []

    def scaled_dot_product_attention(q, k, v, **keywords):
        allowed = {backend for backend in SDPBackend.__members__.values() if is_allowed(backend)}
        seen.append((q.shape, k.shape, keywords, allowed))
        return q

    def is_allowed(backend):
        flags = {
            SDPBackend.CUDNN_ATTENTION: torch.backends.cuda.cudnn_sdp_enabled,
            SDPBackend.FLASH_ATTENTION: torch.backends.cuda.flash_sdp_enabled,
            SDPBackend.EFFICIENT_ATTENTION: torch.backends.cuda.mem_efficient_sdp_enabled,
            SDPBackend.MATH: torch.backends.cuda.math_sdp_enabled,
        }
        return backend in flags and flags[backend]()

    class OnCUDA(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(F, "scaled_dot_product_attention", scaled_dot_product_attention)
    q, k, v = (x.as_subclass(OnCUDA) for x in random_qkv(2, 12, 4, 2, 16))
    assert planned_attention(q, k, v, plan).shape == q.shape
    [(q_shape, k_shape, keywords, allowed)] = seen
    assert q_shape == (2, 4, 12, 16) and k_shape == (2, 2, 12, 16)  # heads before positions, keys not repeated
    assert keywords == {"is_causal": True, "enable_gqa": True} and allowed == {kernel}


# ------------------------------------------------------------------------------------------------------------- on a GPU


def by_chunks(q, k, v, d_out, window, cu_seqlens, chunk=1024):
    """The reference's out, dq, dk, dv a kv head and some queries at a time: [T, T] at 32,768 would not fit.

    Scores and weights are rounded to q's dtype as the reference rounds them; dk and dv are added up in fp32 or wider.
    """
    B, T, H, _ = q.shape
    group = H // k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    out, d_q = torch.empty_like(q), torch.empty_like(q)
    d_k, d_v = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    document = torch.zeros(B, T, device=q.device) if cu_seqlens is None else document_ids(cu_seqlens, B, T)
    position = torch.arange(T, device=q.device)
    for b, h, start in itertools.product(range(B), range(k.shape[2]), range(0, T, chunk)):
        rows, heads = slice(start, min(start + chunk, T)), slice(h * group, (h + 1) * group)
        keys = slice(0 if window is None else max(start - window + 1, 0), rows.stop)
        i, j = position[rows, None], position[None, keys]
        seen = (j <= i) & (document[b, rows, None] == document[b, None, keys])
        seen = seen if window is None else seen & (i - window < j)
        leaves = [x.detach().requires_grad_() for x in (q[b, rows, heads], k[b, keys, h], v[b, keys, h])]
        scores = torch.einsum("ihc,jc->hij", *leaves[:2]) * q.shape[-1] ** -0.5
        weights = scores.to(wide).masked_fill(~seen, float("-inf")).softmax(-1).to(q.dtype)
        y = torch.einsum("hij,jc->ihc", weights, leaves[2])
        d_q[b, rows, heads], part_k, part_v = torch.autograd.grad(y, leaves, d_out[b, rows, heads])
        out[b, rows, heads] = y.detach()
        d_k[b, keys, h] += part_k
        d_v[b, keys, h] += part_v
    return out, d_q, d_k.to(k.dtype), d_v.to(v.dtype)


@pytest.mark.parametrize("window, packed", [(None, False), (5, False), (5, True), (1, True)])
def test_the_chunked_reference_is_the_reference(window, packed):
    q, k, v = (x.requires_grad_() for x in random_qkv(2, 12, 4, 2, 8))
    d_out, cu = torch.randn_like(q), CU if packed else None
    out = attention_reference(q, k, v, window=window, cu_seqlens=cu)
    want = [out, *torch.autograd.grad(out, (q, k, v), d_out)]
    for a, b in zip(by_chunks(q, k, v, d_out, window, cu, chunk=5), want, strict=True):
        torch.testing.assert_close(a, b)


on_a_gpu = pytest.mark.gpu
each_backend = pytest.mark.parametrize("name", BACKENDS)


def cuda_qkv(B, T, H, Hkv, head_dim=128, dtype=torch.bfloat16):
    """q, k, v as views of one packed projection, as the model makes them."""
    packed = torch.randn(B, T, H + 2 * Hkv, head_dim, device="cuda", dtype=dtype)
    return packed.split([H, Hkv, Hkv], dim=2)


def mixed_documents(B: int, T: int) -> torch.Tensor:
    """cu_seqlens of rows cut into long and short documents, some of one token; every row another way."""
    boundaries = {row * T for row in range(B + 1)}
    for row in range(B):
        boundaries |= {row * T + cut for cut in (1, 2, T // 3 + row, T // 2, T // 2 + 64, T - 1) if 0 < cut < T}
    return torch.tensor(sorted(boundaries), dtype=torch.int32, device="cuda")


def skip_unless_it_can(name: str, window, cu_seqlens, T, head_dim=128, dtype=torch.bfloat16, deterministic=False):
    hides = window is not None and window < T
    case = AttentionCase(
        torch.cuda.get_device_capability(), dtype, head_dim, hides, cu_seqlens is not None, T == 1, deterministic
    )
    reason = BACKENDS[name].can(case)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")


def run_backend(name, q, k, v, d_out, **keywords):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attention(*leaves, backend=name, **keywords)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


@on_a_gpu
@each_backend
@pytest.mark.parametrize("heads", [(32, 8), (8, 1)], ids=["32-8", "8-1"])
@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize(
    "T, windows",
    [
        (128, (None, 1, 64, 127, 128)),
        (4096, (None, 1000, 4095, 4096)),
        (4160, (None, 1000, 4096)),  # 64 more than a multiple of 128: where cuDNN once went wrong
        (8192, (None, 4096)),
        (32_768, (None, 4096)),
    ],
    ids=lambda x: str(x) if isinstance(x, int) else "",
)
def test_every_backend_against_the_fp32_reference(name, heads, packed, T, windows):
    """Forward and all gradients in bf16, within twice the error that plain PyTorch makes in bf16."""
    if name == "reference" and T > 4160:
        pytest.skip("reference: its score matrix does not fit; by_chunks is the same, and tested")
    if name == "flex_flash" and (T, heads) != (4160, (32, 8)):
        pytest.skip("flex_flash: compiles for each length, window and number of heads, and auto never takes it")
    B = 2 if T <= 8192 else 1
    ran = 0
    for window in windows:
        cu = mixed_documents(B, T) if packed else None
        hides = window is not None and window < T
        case = AttentionCase(torch.cuda.get_device_capability(), torch.bfloat16, 128, hides, packed, False, False)
        if BACKENDS[name].can(case) is not None:
            continue
        ran += 1
        q, k, v = cuda_qkv(B, T, *heads)
        d_out = torch.randn(B, T, heads[0], 128, device="cuda", dtype=torch.bfloat16)
        longest = None if cu is None else int(cu.diff().max())
        got = run_backend(name, q, k, v, d_out, window=window, cu_seqlens=cu, max_seqlen=longest)
        same = by_chunks(q, k, v, d_out, window, cu)
        truth = by_chunks(*(x.float() for x in (q, k, v, d_out)), window, cu)
        for what, a, b, c in zip(("out", "dq", "dk", "dv"), got, same, truth, strict=True):
            if window == 1 and what in ("dq", "dk"):  # 0, of two sums over head_dim that a kernel makes in two orders
                assert not c.any() and a.abs().max() < 1e-3, f"{name}, window 1: {what}"
            else:
                assert_close_to_truth(a, b, c, name=f"{name}, window {window}: {what}")
    if not ran:
        pytest.skip(f"{name}: {BACKENDS[name].can(case)}")


@on_a_gpu
@each_backend
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [1, 100, 128, 129])
def test_a_key_at_distance_w_on_every_backend(name, window, packed):
    """Distance exactly W from the last query changes no bit of its output, W - 1 does.

    Its dq may be summed in another order from run to run, so that one is compared to rounding: a leak would be huge.
    """
    T = 520
    cu = torch.tensor([0, 3, T], dtype=torch.int32, device="cuda") if packed else None
    skip_unless_it_can(name, window, cu, T)
    q, k, v = cuda_qkv(1, T, 8, 2)
    d_out = torch.zeros_like(q).index_fill_(1, torch.tensor([T - 1], device="cuda"), 1.0)

    def last_query(poisoned=None):
        leaves = [x.clone() for x in (q, k, v)]
        if poisoned is not None:
            leaves[1][:, poisoned] = leaves[2][:, poisoned] = 300.0
        out, d_q, d_k, d_v = run_backend(name, *leaves, d_out, window=window, cu_seqlens=cu)
        return out[:, -1], d_q[:, -1], d_k[:, : T - window], d_v[:, : T - window]

    clean, far, near = (last_query(x) for x in (None, T - 1 - window, T - window))
    assert torch.equal(clean[0], far[0]) and not torch.equal(clean[0], near[0])
    torch.testing.assert_close(clean[1], far[1])
    assert all(x.count_nonzero() == 0 for x in (*clean[2:], *far[2:]))


@on_a_gpu
@each_backend
@pytest.mark.parametrize("window, packed", [(None, False), (1000, False), (1000, True)])
def test_a_hundred_deterministic_repeats(name, window, packed):
    T = 4160
    cu = mixed_documents(2, T) if packed else None
    skip_unless_it_can(name, window, cu, T, deterministic=True)
    q, k, v = cuda_qkv(2, T, 32, 8)
    d_out = torch.randn(2, T, 32, 128, device="cuda", dtype=torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        first = run_backend(name, q, k, v, d_out, window=window, cu_seqlens=cu)
        for _ in range(99):
            again = run_backend(name, q, k, v, d_out, window=window, cu_seqlens=cu)
            assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


@on_a_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("window, packed", [(None, False), (100, True)])
def test_auto_in_full_precision(dtype, window, packed):
    T = 300
    cu = mixed_documents(2, T) if packed else None
    q, k, v = cuda_qkv(2, T, 8, 2, 64, dtype)
    d_out = torch.randn(2, T, 8, 64, device="cuda", dtype=dtype)
    got = run_backend("auto", q, k, v, d_out, window=window, cu_seqlens=cu)
    same = by_chunks(q, k, v, d_out, window, cu)
    truth = by_chunks(*(x.double() for x in (q, k, v, d_out)), window, cu)
    for a, b, c in zip(got, same, truth, strict=True):
        assert_close_to_truth(a, b, c, roundings=64)


@on_a_gpu
@pytest.mark.parametrize("packed", [False, True])
def test_a_training_step_never_waits_for_the_gpu(packed):
    config = PRESETS["test"]
    model = Mistral(config).cuda().bfloat16()
    tokens, labels = (x.cuda() for x in tiny_batch(config))
    cu = DOCUMENTS.cuda() if packed else None
    model(tokens, labels, cu_seqlens=cu).loss.backward()  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(tokens, labels, cu_seqlens=cu).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_gpu
@each_backend
def test_on_another_stream_and_device(name):
    q, k, v = (x.contiguous() for x in cuda_qkv(1, 256, 8, 2))  # as the copies: nothing is to compile while it sleeps
    skip_unless_it_can(name, None, None, 256)
    want = attention(q, k, v, backend=name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**8)  # a launch on the default stream would overtake this and read what is not written yet
        copies = [x.clone() for x in (q, k, v)]
        got = attention(*copies, backend=name)
    stream.synchronize()
    assert torch.equal(got, want)
    if torch.cuda.device_count() > 1:
        there = attention(*(x.to("cuda:1") for x in (q, k, v)), backend=name)
        assert torch.equal(there.cpu(), want.cpu())


def test_corners_of_empty_batches():
    zeros = torch.zeros(1, dtype=torch.int32)
    empty = torch.zeros(0, 4, 2, 8)
    assert attention(empty, empty, empty, cu_seqlens=zeros, max_seqlen=3).shape == empty.shape
    with pytest.raises(ValueError, match="backend"):
        attention(empty, empty, empty, backend=["flex"])
    no_channels = torch.zeros(1, 4, 2, 0)
    with pytest.raises(ValueError, match="q's head_dim must be positive, got 0"):
        attention(no_channels, no_channels, no_channels)
