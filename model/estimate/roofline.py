"""What a step computes and moves: FLOPs, bytes by kind of kernel, collectives. bench/account.py counts the real one.

Everything that quotes such a number (the trainer's MFU, --plan, floors, the benches) takes it from here. Pure Python;
``config`` is a ``halny.model.mistral.MistralConfig``. In the formulas: L layers, d model width, H query heads, K
key/value heads, c channels of a head, f MLP width, V vocabulary, s sequence length, b bytes of the compute dtype. One
FLOP is one addition or one multiplication, so a matrix product of [m, k] by [k, n] is 2 m k n of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from halny.model.estimate.memory import loss_chunk_rows, moment_bytes
from halny.model.estimate.sizes import (
    FP32_BYTES,
    layer_shapes,
    matmul_parameters,
    padded_numel,
    parameters,
    root_shapes,
)

if TYPE_CHECKING:
    from halny.model.mistral import MistralConfig


def attention_keys(lengths: Iterable[int], window: int | None) -> int:
    """Pairs of a query and a key it may see, exactly, in documents of these lengths, causal, through a window.

    Position i of a document, from 0, sees min(i + 1, W) keys, so a document of n positions with w = min(W, n) has
    w (w + 1) / 2 + (n - w) w. What lies between documents, or beyond the window, is not counted. A batch of full rows
    of s is ``[s] * B``; of packed documents, the differences of its cu_seqlens.
    """
    pairs = 0
    for length in lengths:
        n = int(length)  # numpy's int32 would overflow at 46,341
        w = n if window is None else min(window, n)
        pairs += w * (w + 1) // 2 + (n - w) * w
    return pairs


def attention_flops(config: MistralConfig, lengths: Iterable[int]) -> int:
    """12 L H c x (pairs of query and key), forward and backward, for a batch of documents of these lengths.

    12 is 2 products (q k^T, weights v) x 2 FLOP x 3, and 3 is one forward and two gradients a product. What
    FlashAttention recomputes in its backward is not counted.
    """
    return _flops_per_pair(config) * attention_keys(lengths, config.window)


def _flops_per_pair(config: MistralConfig) -> int:
    return 12 * config.n_layers * config.n_heads * config.head_dim


def step_flops(config: MistralConfig, n_tokens: int, pairs: float) -> float:
    """FLOPs of a step on so many tokens, whose mask admits so many pairs of query and key (``attention_keys``).

    6 x matmul weights a token + attention; 6 = 2 FLOP a weight x (forward, gradient to the input, gradient to the
    weight). What a trainer's MFU divides by the step's time.
    """
    return 6 * matmul_parameters(config) * n_tokens + _flops_per_pair(config) * pairs


def batch_flops(config: MistralConfig, lengths: Iterable[int]) -> int:
    """``step_flops`` of documents of these lengths: counts only what the mask admits."""
    lengths = list(lengths)
    return step_flops(config, int(sum(lengths)), attention_keys(lengths, config.window))


def flops_per_token(config: MistralConfig, seq_len: int) -> float:
    """``batch_flops`` a token, where every sequence is one document. 7B at 4096: 45.88e9."""
    return batch_flops(config, [seq_len]) / seq_len


def palm_flops_per_token(config: MistralConfig, seq_len: int) -> float:
    """The same by PaLM's convention, which others' MFU use: 6 x all weights + 12 L (H c) s. 7B at 4096: 49.89e9.

    Chowdhery et al. 2022, appendix B (https://arxiv.org/abs/2204.02311): attention as if every query saw every key,
    and here the embedding counted as if it were multiplied, as most frameworks do.
    """
    return 6 * parameters(config) + 12 * config.n_layers * config.n_heads * config.head_dim * seq_len


# --------------------------------------------------------------------------------- bytes of a step, by kind of kernel

# What each kind must move if it reads every operand and writes every result once; what bench/account.py counts is held
# against these. n_tokens: of a micro batch. b stands for compute_bytes.


def matmul_bytes(config: MistralConfig, n_tokens: int, compute_bytes: int = 2) -> int:
    """Operands and results of a micro batch's matrix products, forward and backward, the head's in chunks of rows.

    A weight of [n, k] on T tokens has three products on the same three matrices, [T, k], [n, k] and [T, n], so moves
    3 b (T k + n k + T n). In c chunks the head's weight is read c times in two of them; its gradient is summed in fp32,
    written c times and read c - 1 times, or for c = 1 written once in the compute dtype.
    """
    b, d, V, T = compute_bytes, config.dim, config.vocab_size, n_tokens
    weights = [shape for shape in layer_shapes(config) if shape[1] > 1]
    layer = sum(3 * b * (T * k + n * k + T * n) for n, k in weights)
    c = -(-T // loss_chunk_rows(config, T, b))
    summed = FP32_BYTES * V * d * (2 * c - 1) if c > 1 else b * V * d
    return config.n_layers * layer + 3 * b * T * (d + V) + 2 * c * b * V * d + summed


def attention_bytes(config: MistralConfig, n_tokens: int, compute_bytes: int = 2) -> int:
    """What fused attention takes and gives, q and kv elements a token: L T (6 b (q + kv) + 8 H).

    Forward q, k, v in, out and an fp32 log-sum-exp a head out: 2q + 2kv. Backward those five and d_out in, three
    gradients out: 4q + 4kv. What a kernel keeps for itself (FlashAttention's fp32 sum for dq) is not counted.
    """
    q, kv = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return config.n_layers * n_tokens * (6 * compute_bytes * (q + kv) + 2 * FP32_BYTES * config.n_heads)


def row_kernel_bytes(
    config: MistralConfig, n_tokens: int, compute_bytes: int = 2, recompute: bool = True, programs: int = 264
) -> tuple[int, int]:
    """Norms, RoPE and SwiGLU of a micro batch, (forward, backward); q, kv and f elements a token.

    A norm with the addition before it is 4d each way, and a layer has two; the first of all has nothing to add, 2d and
    3d, and the last's sum goes nowhere else, 4d and 3d. RoPE turns q and k where they lie, 2 (q + kv), and backward
    packs the gradients of all three, 2 (q + 2kv). SwiGLU moves 3f and 5f, and with ``recompute`` the backward also
    writes the outputs of norms and SwiGLU, 2d + f. Each norm's fp32 rstd is written and read, its weight read twice,
    and of the weight's gradient each of ``programs`` (at most two on each of an H100's 132 multiprocessors) writes an
    fp32 row, read once; their sum is rounded. 7B, 16,384 tokens: 90.5 and 146.9 GB.
    """
    b, d, T, L = compute_bytes, config.dim, n_tokens, config.n_layers
    q, kv, f = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim, config.hidden_dim
    norms = 2 * L + 1
    again = 2 * d + f if recompute else 0
    forward = T * b * (L * (8 * d + 2 * (q + kv) + 3 * f) + 2 * d) + norms * (FP32_BYTES * T + b * d)
    backward = T * b * (L * (8 * d + 2 * (q + 2 * kv) + 5 * f + again) + 2 * d) + norms * (FP32_BYTES * T + b * d)
    return forward, backward + norms * d * (FP32_BYTES * 2 * programs + b)


def residual_bytes(config: MistralConfig, n_tokens: int, compute_bytes: int = 2) -> int:
    """3 b T d: autograd's sum of the two gradients that meet at the embedding's output, the stream's and the norm's.

    All other additions are parts of norms.
    """
    return 3 * compute_bytes * n_tokens * config.dim


def loss_bytes(config: MistralConfig, n_tokens: int, compute_bytes: int = 2) -> int:
    """The loss beside its products: logits read and overwritten by their gradient, 2 b T V; gradients scaled.

    The scaling reads and writes d_hidden, 2 b T d, and the head's gradient, which it rounds from the chunks' fp32 sum.
    A row's label (int64), loss (fp32) and whether it is right (int32) are 16 bytes.
    """
    b, d, V, T = compute_bytes, config.dim, config.vocab_size, n_tokens
    head = (FP32_BYTES if T > loss_chunk_rows(config, T, b) else b) + b
    return 2 * b * T * V + 16 * T + 2 * b * T * d + head * V * d


def embedding_bytes(config: MistralConfig, n_tokens: int, compute_bytes: int = 2) -> int:
    """Rows looked up by int64 ids, 2 b T d + 8 T; the gradient: b T d in, b V d of zeros and the rows it has.

    Those rows are at most as many as tokens or as the vocabulary has, and are counted so. Sorting makes the ids int32,
    12 T, writes them in order with their places, 4 T + 12 T, which the gradient's kernel reads, 12 T.
    """
    b, d, V, T = compute_bytes, config.dim, config.vocab_size, n_tokens
    return T * (3 * b * d + 48) + b * d * (V + min(T, V))


def other_bytes(config: MistralConfig, n_tokens: int, compute_bytes: int = 2) -> int:
    """What is no product, attention, row kernel or loss: the embedding, the sum of its gradients, the metrics."""
    streams = residual_bytes(config, n_tokens, compute_bytes) + embedding_bytes(config, n_tokens, compute_bytes)
    return streams + metrics_bytes(n_tokens)


def metrics_bytes(n_tokens: int) -> int:
    """28 T: labels compared with the ignored one and 1-byte results summed, by trainer and loss; loss, hits summed."""
    return n_tokens * (2 * (8 + 1 + 1) + 2 * FP32_BYTES)


ADAMW_BYTES = 28  # a weight: fp32 weight, gradient and two moments read, all but the gradient written


def sharded_update_bytes(n_weights: int) -> int:
    """AdamW on fp32 shards, 28 B a weight, the norm of their gradients, 4, and clipping, which rewrites them, 8."""
    return (ADAMW_BYTES + 3 * FP32_BYTES) * n_weights


def split_update_bytes(config: MistralConfig, moments: str, accumulation: int = 1) -> int:
    """AdamW on one rank's weights in two halves (kernels/adamw.py).

    Both halves and the moments read and written; the gradient read, by the norm before that once more. It is bf16, or
    fp32 where it is a sum over micro batches and moments are not 8bit.
    """
    gradient = FP32_BYTES if accumulation > 1 and moments != "8bit" else 2
    return (2 * FP32_BYTES + 2 * gradient) * parameters(config) + 2 * moment_bytes(config, moments)


def gradient_sum_bytes(config: MistralConfig, moments: str, accumulation: int) -> int:
    """Sums of one rank's gradients over its micro batches: in bf16 for 8bit moments, 6 B a weight and micro batch.

    Otherwise in fp32: two in bf16 make the first sum, 8 B a weight, and each further one is 10.
    """
    each, first = (6, 6) if moments == "8bit" else (FP32_BYTES + 2 + FP32_BYTES, 2 + 2 + FP32_BYTES)
    return parameters(config) * (first + each * (accumulation - 2) if accumulation > 1 else 0)


def copy_bytes(
    shapes: list[tuple[int, int]], shards: int, gathered_again: int = 0, compute_bytes: int = 2
) -> tuple[int, int]:
    """FSDP2's copies beside its collectives, of weights of these shapes: a micro batch's (forward, backward).

    For a gather a rank's fp32 shard is cast and copied into place, 4 + 3 b a weight of it, and what arrives is copied
    out into one tensor a weight, padding included, 2 b. Parts kept by each of n ranks for the second gather are b-byte
    copies, copied into place twice: 6 b a weight of them. Gradients are copied into the fp32 input of the
    reduce-scatter, b + 4. gathered_again as in ``collectives``.
    """
    b, padded, own = compute_bytes, padded_numel(shapes, shards), sum(rows * columns for rows, columns in shapes)
    gather = 2 * b * padded + (FP32_BYTES + 3 * b) * padded // shards
    if gathered_again == 0:
        again = gather
    else:
        parts = padded_numel(shapes, gathered_again) // gathered_again
        again = 0 if gathered_again == 1 else 2 * b * padded + 6 * b * parts
    return gather, again + b * own + FP32_BYTES * padded


def fsdp_copy_bytes(config: MistralConfig, shards: int, gathered_again: int = 0, compute_bytes: int = 2) -> int:
    """``copy_bytes`` of all layers and of the root group, which stays gathered."""
    layer = sum(copy_bytes(layer_shapes(config), shards, gathered_again, compute_bytes))
    return config.n_layers * layer + sum(copy_bytes(root_shapes(config), shards, 1, compute_bytes))


# -------------------------------------------------------------------------------------------------------- communication


@dataclass(frozen=True)
class Collective:
    """One kind of collective of an optimizer step, as FSDP2 issues it."""

    kind: str  # all-gather, reduce-scatter or all-reduce
    group: str  # layer or root: whose weights
    when: str  # forward or backward
    count: int  # times a step
    numel: int  # elements of the whole, padded: an all-gather's output, the input of the other two
    bytes: int  # numel in the dtype that travels
    ranks: int  # that take part in each


def collectives(
    config: MistralConfig,
    shards: int,
    replicas: int = 1,
    gathered_again: int = 0,
    accumulation: int = 1,
    compute_bytes: int = 2,
    reduce_bytes: int = FP32_BYTES,
    holds_gradients: bool = True,
) -> list[Collective]:
    """The collectives of one optimizer step on shards x replicas ranks, in the order of their first use.

    Each micro step gathers root and layers in the compute dtype for its forward, and the layers once more for its
    backward, among ``gathered_again`` ranks (0: all shards; 1: they were kept, so not at all; a node's GPUs: inside
    the node). Gradients are reduced in fp32 here: by the last micro step, or where whole ones are not held by each of
    them, between replicas by the last. Those of a few numbers (gradient norm, loss) are left out.
    """
    layer, root = padded_numel(layer_shapes(config), shards), padded_numel(root_shapes(config), shards)
    gather = [
        Collective("all-gather", "root", "forward", accumulation, root, compute_bytes * root, shards),
        Collective(
            "all-gather", "layer", "forward", accumulation * config.n_layers, layer, compute_bytes * layer, shards
        ),
    ]
    if gathered_again != 1:
        ranks = gathered_again or shards
        gather.append(replace(gather[1], when="backward", ranks=ranks))
    times, reduce = 1 if holds_gradients else accumulation, []
    for group, count, numel in (("layer", config.n_layers, layer), ("root", 1, root)):
        size = reduce_bytes * numel
        reduce.append(Collective("reduce-scatter", group, "backward", times * count, numel, size, shards))
        if replicas > 1:
            part = numel // shards, size // shards
            reduce.append(Collective("all-reduce", group, "backward", count, *part, replicas))
    return gather + reduce
