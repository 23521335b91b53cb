"""The arithmetic of a training step: parameters, FLOPs, bytes, memory, and the peaks of the machines that run it.

Everything that quotes such a number (the trainer's start-up print, its MFU, the benches) takes it from here. Pure
Python; ``config`` is a ``halny.model.mistral.MistralConfig``. In the formulas: L layers, d model width, H query heads,
K key/value heads, c channels of a head, f MLP width, V vocabulary, s sequence length, b bytes of the compute dtype.
One FLOP is one addition or one multiplication, so a matrix product of [m, k] by [k, n] is 2 m k n of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # mistral.py imports torch; the trainer's --help does not want to wait for it
    from halny.model.mistral import MistralConfig

FP32_BYTES = 4

# Of a GPU's memory, for what no estimate here counts: CUDA's context, NCCL's and cuBLAS's buffers, fragments. Assumed.
RESERVED = 0.08

# ------------------------------------------------------------------------------------------------ parameters and FLOPs


def layer_matmul_parameters(config: MistralConfig) -> int:
    """Weights of one layer's matrices: qkv d (H + 2K) c, out H c d, gate_up 2 d f, down f d."""
    qkv = config.dim * (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    out = config.n_heads * config.head_dim * config.dim
    return qkv + out + 3 * config.dim * config.hidden_dim


def layer_parameters(config: MistralConfig) -> int:
    """All weights of one layer: its matrices and its two norms."""
    return layer_matmul_parameters(config) + 2 * config.dim


def root_parameters(config: MistralConfig) -> int:
    """Weights outside the layers: embedding, head (they are not tied) and final norm."""
    return 2 * config.vocab_size * config.dim + config.dim


def parameters(config: MistralConfig) -> int:
    """All weights. Mistral-7B: 7,241,732,096."""
    return config.n_layers * layer_parameters(config) + root_parameters(config)


def matmul_parameters(config: MistralConfig) -> int:
    """The weights that are multiplied: the layers' matrices and the head, no embedding, no norms. 7B: 7,110,393,856."""
    return config.n_layers * layer_matmul_parameters(config) + config.vocab_size * config.dim


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


def keys_per_query(seq_len: int, window: int | None) -> float:
    """Mean number of keys that a query of one causal sequence sees through a window."""
    return attention_keys([seq_len], window) / seq_len


def attention_flops_per_token(config: MistralConfig, seq_len: int) -> float:
    """``attention_flops`` a token, where every sequence is one document."""
    return attention_flops(config, [seq_len]) / seq_len


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
    config: MistralConfig, n_tokens: int, programs: int, compute_bytes: int = 2, lean: bool = True
) -> int:
    """Norms, RoPE and SwiGLU of a micro batch, forward and backward; q, kv and f elements a token.

    A norm with the addition before it is 4d each way, and a layer has two; the first of all has nothing to add, 2d and
    3d, and the last's sum goes nowhere else, 4d and 3d. RoPE moves q, k and the v that it copies along, 2 (q + 2kv)
    each way, SwiGLU 3f and 5f, and lean the backward also writes the outputs of norms and SwiGLU, 2d + f. Each
    norm's fp32 rstd is written and read, its weight read twice, and of the weight's gradient each of ``programs``
    writes an fp32 row; their sum is rounded.
    """
    b, d, T = compute_bytes, config.dim, n_tokens
    q, kv, f = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim, config.hidden_dim
    layer = 16 * d + 4 * (q + 2 * kv) + 8 * f + (2 * d + f if lean else 0)
    norms = 2 * config.n_layers + 1
    rows = b * (config.n_layers * layer + 4 * d) + 2 * FP32_BYTES * norms
    return T * rows + norms * d * (2 * b + FP32_BYTES * (2 * programs + 2) + b)


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
    """Rows looked up by int64 ids, 2 b T d + 8 T; the gradient: b T d + 8 T in, b V d of zeros and the rows it has.

    Those rows are at most as many as tokens or as the vocabulary has, and are counted so.
    """
    b, d, V, T = compute_bytes, config.dim, config.vocab_size, n_tokens
    return T * (3 * b * d + 16) + b * d * (V + min(T, V))


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


def fsdp_copy_bytes(config: MistralConfig, shards: int, gathered_again: int = 0, compute_bytes: int = 2) -> int:
    """FSDP2's copies beside its collectives, after one micro batch; gathered_again as in ``collectives``.

    For a gather a rank's fp32 shard is cast and copied into place, 4 + 3 b a weight of it, and what arrives is copied
    out into one tensor a weight, padding included, 2 b. Parts kept by each of n ranks for the second gather are b-byte
    copies, copied into place twice: 6 b a weight of them. Gradients are copied into the fp32 input of the
    reduce-scatter, b + 4.
    """
    b, total = compute_bytes, 0
    for shapes, n_groups, again in (
        (layer_shapes(config), config.n_layers, gathered_again),
        (root_shapes(config), 1, 1),
    ):
        padded, own = padded_numel(shapes, shards), sum(rows * columns for rows, columns in shapes)
        first = 2 * b * padded + (FP32_BYTES + 3 * b) * padded // shards
        if again == 0:
            second = first
        else:
            second = 0 if again == 1 else 2 * b * padded + 6 * b * padded_numel(shapes, again) // again
        total += n_groups * (first + second + b * own + FP32_BYTES * padded)
    return total


# --------------------------------------------------------------------------------------------------------------- memory


def layer_shapes(config: MistralConfig) -> list[tuple[int, int]]:
    """[rows, columns] of one layer's weights, in the model's order; a norm has one column. FSDP cuts the rows."""
    qkv_rows = (config.n_heads + 2 * config.n_kv_heads) * config.head_dim
    norm = (config.dim, 1)
    attention = [(qkv_rows, config.dim), (config.dim, config.n_heads * config.head_dim)]
    mlp = [(2 * config.hidden_dim, config.dim), (config.dim, config.hidden_dim)]
    return [norm, *attention, norm, *mlp]


def root_shapes(config: MistralConfig) -> list[tuple[int, int]]:
    """[rows, columns] of the weights outside the layers: embedding, final norm, head."""
    return [(config.vocab_size, config.dim), (config.dim, 1), (config.vocab_size, config.dim)]


def padded_numel(shapes: Iterable[tuple[int, int]], shards: int) -> int:
    """Elements that a collective moves for weights of these shapes: each's rows padded to a multiple of the shards.

    32,000 rows on 1,024 shards are 32 a rank, of which the last 24 ranks have none: 2.4% of padding.
    """
    return sum(-(-rows // shards) * shards * columns for rows, columns in shapes)


def shard_numel(config: MistralConfig, world_size: int) -> int:
    """Weights a rank holds under FSDP, padding included: what the fullest rank has."""
    layer, root = padded_numel(layer_shapes(config), world_size), padded_numel(root_shapes(config), world_size)
    return (config.n_layers * layer + root) // world_size


def parameter_bytes(config: MistralConfig, world_size: int = 1) -> int:
    """A rank's share of the fp32 master weights."""
    return FP32_BYTES * shard_numel(config, world_size)


def gradient_bytes(config: MistralConfig, world_size: int = 1) -> int:
    """A rank's share of the fp32 gradients."""
    return FP32_BYTES * shard_numel(config, world_size)


def optimizer_bytes(config: MistralConfig, world_size: int = 1) -> int:
    """A rank's share of AdamW's two fp32 moments. With the master weights: 12 B a weight; with gradients too: 16 B."""
    return 2 * FP32_BYTES * shard_numel(config, world_size)


def checkpoint_bytes(config: MistralConfig, world_size: int = 1) -> int:
    """A rank's share of a checkpoint: master weights and both moments, 12 B a weight."""
    return parameter_bytes(config, world_size) + optimizer_bytes(config, world_size)


def checkpoint_stall_s(config: MistralConfig, world_size: int, host_bytes_per_second: float) -> float:
    """Seconds that a save holds up the training: its copy into pinned host memory, at that bandwidth a rank.

    The rest (writing, reading back, checksums) goes on beside the training; the look whether the weights are finite,
    one pass over a third of the bytes at the device's own bandwidth, is some hundred times less.
    """
    return checkpoint_bytes(config, world_size) / host_bytes_per_second


def gathered_parameter_bytes(config: MistralConfig, compute_bytes: int = 2, layers: int = 2) -> int:
    """Whole weights in the compute dtype that FSDP2 holds at the worst moment, whatever the world size.

    The root group (embedding, head, final norm) stays gathered; of the layers one computes and the next arrives.
    """
    return compute_bytes * (root_parameters(config) + min(layers, config.n_layers) * layer_parameters(config))


def saved_activations(config: MistralConfig, compute_bytes: int = 2) -> dict[str, int]:
    """What one layer keeps for its backward: name -> bytes a token. 7B in bf16: 139,400 B.

    The rows marked "remade" are dropped in lean mode and recomputed from their neighbours, which costs one pass over
    memory and no matrix product. 7B in bf16 keeps 94,344 B then.
    """
    b, d, f = compute_bytes, config.dim, config.hidden_dim
    q = config.n_heads * config.head_dim
    qkv = q + 2 * config.n_kv_heads * config.head_dim
    return {
        "attention norm: input": b * d,
        "attention norm: rstd, fp32": FP32_BYTES,
        "attention norm: output (remade)": b * d,
        "packed q, k, v after RoPE": b * qkv,
        "attention: output": b * q,
        "attention: log-sum-exp, fp32": FP32_BYTES * config.n_heads,
        "residual after attention, the MLP norm's input": b * d,
        "MLP norm: rstd, fp32": FP32_BYTES,
        "MLP norm: output (remade)": b * d,
        "packed gate, up": b * 2 * f,
        "SwiGLU: output (remade)": b * f,
    }


def activation_bytes_per_token(config: MistralConfig, compute_bytes: int = 2, lean: bool = False) -> int:
    """Bytes a token that all layers keep for the backward; ``saved_activations`` x L."""
    saved = saved_activations(config, compute_bytes)
    return config.n_layers * sum(n for name, n in saved.items() if not (lean and name.endswith("(remade)")))


def loss_chunk_rows(config: MistralConfig, n_rows: int, compute_bytes: int = 2) -> int:
    """Rows of logits that ``halny.kernels.linear_cross_entropy`` holds at once, by its own rule (its ``chunk_rows``).

    128 MiB of them or ``dim`` rows, at least 2,048, in even chunks, a multiple of 16. 7B, 16,384 rows in bf16: 4,096.
    """
    most = max(2**27 // (-(-config.vocab_size // 64) * 64 * compute_bytes), config.dim)
    most = max(2048, most // 16 * 16)
    even = -(-n_rows // max(1, -(-n_rows // most)))
    return min(most, max(1, -(-even // 16)) * 16)


def logits_bytes(config: MistralConfig, n_rows: int, compute_bytes: int = 2, chunk_rows: int | None = None) -> int:
    """Peak bytes of the head's logits and of the loss made from n_rows of them.

    With chunk_rows = None what PyTorch's cross-entropy needs at its worst, in its backward: three fp32 [n_rows, V]
    (log-probabilities, their gradient, the logits' gradient). In chunks: one buffer in the compute dtype, overwritten
    by its own gradient, and if there are several the fp32 sum of the head's weight gradient.
    """
    if chunk_rows is None:
        return 3 * FP32_BYTES * n_rows * config.vocab_size
    buffer = compute_bytes * min(chunk_rows, n_rows) * config.vocab_size
    summed = chunk_rows < n_rows and compute_bytes < FP32_BYTES
    return buffer + (FP32_BYTES if summed else compute_bytes) * config.vocab_size * config.dim


def memory_bound_bytes(config: MistralConfig, compute_bytes: int = 2, lean: bool = True) -> tuple[int, int]:
    """Bytes a token that one layer's kernels without matrix products move: (forward, backward). 7B lean: 446,464 B.

    What a fused kernel must read and write (b bytes an element; d, q and kv, f elements a token): residual add with
    RMSNorm 4d each way, twice; RoPE twice q and k each way; SwiGLU 3f and 5f. Lean, the backward also writes the
    outputs of both norms and of SwiGLU (2d + f).
    """
    d, f = config.dim, config.hidden_dim
    rope = 2 * (config.n_heads + config.n_kv_heads) * config.head_dim
    forward = 8 * d + rope + 3 * f
    backward = 8 * d + rope + 5 * f + (2 * d + f if lean else 0)
    return compute_bytes * forward, compute_bytes * backward


def head_bytes(config: MistralConfig, n_tokens: int, compute_bytes: int = 2) -> int:
    """Bytes that the loss moves beside its matrix products.

    Five passes over the logits (written, read and overwritten by the gradient, read by two products), and the head's
    fp32 gradient read and written once a chunk.
    """
    logits = 5 * compute_bytes * n_tokens * config.vocab_size
    chunks = -(-n_tokens // loss_chunk_rows(config, n_tokens, compute_bytes))
    return logits + chunks * 2 * FP32_BYTES * config.vocab_size * config.dim


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


@dataclass(frozen=True)
class MemoryEstimate:
    """A rank's memory at one moment of a step, in bytes, by part: what there is at that moment."""

    parameters: int  # master weights, sharded: 4 B a weight
    gradients: int  # sharded, those made so far
    optimizer: int  # AdamW's two moments, sharded
    gathered_parameters: int  # compute dtype, whole: root group and two layers; 0 on one rank, which has no other
    activations: int  # kept for the backward
    logits: int  # and what the loss makes of them; 0 once the layers' backward has begun
    working: int  # of the backward, and gradients on their way to be reduced or summed; 0 in the forward

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def working_bytes(config: MistralConfig, n_tokens: int, compute_bytes: int = 2, lean: bool = True) -> int:
    """Most of what a layer's backward holds beside the saved activations: b (d + 4f) a token. 7B in bf16: 122,880 B.

    In SwiGLU's: the gradient of the layer's output (d), the gradient of SwiGLU's output (f), that of gate and up (2f),
    and SwiGLU's output, made again for the weight's gradient (f); or where it was kept, that gradient.
    """
    d, f = config.dim, config.hidden_dim
    return compute_bytes * (n_tokens * (d + 3 * f) + (n_tokens * f if lean else d * f))


def _loss_moments(
    config: MistralConfig, n_tokens: int, compute_bytes: int, lean: bool, whole_logits: bool
) -> dict[str, dict[str, int]]:
    """While the loss is made, and in its own backward: activations of all layers, logits, working memory.

    Three more [n_tokens, d] are there: the last norm's input, its output, and the gradient of that, which is made at
    once and counted as the loss's. The backward rounds the head's gradient from its fp32 sum, if there are chunks.
    """
    chunk_rows = None if whole_logits else loss_chunk_rows(config, n_tokens, compute_bytes)
    stream = compute_bytes * n_tokens * config.dim
    layers = n_tokens * activation_bytes_per_token(config, compute_bytes, lean) + FP32_BYTES * n_tokens
    logits = logits_bytes(config, n_tokens, compute_bytes, chunk_rows) + stream
    moments = {"loss": {"activations": layers + 2 * stream, "logits": logits, "working": 0}}
    if chunk_rows is not None and chunk_rows < n_tokens and compute_bytes < FP32_BYTES:
        head = config.vocab_size * config.dim
        moments["backward of the loss"] = {
            "activations": layers + stream,
            "logits": FP32_BYTES * head + stream,
            "working": compute_bytes * head,
        }
    return moments


def memory_moments(
    config: MistralConfig,
    world_size: int,
    micro_batch: int,
    seq_len: int,
    compute_bytes: int = 2,
    lean: bool = True,
    whole_logits: bool = False,
    accumulation: int = 1,
) -> dict[str, MemoryEstimate]:
    """A rank's memory at the moments of a step that may be its peak, under FSDP2 with AdamW: what happens -> parts.

    lean: outputs of norms and SwiGLU are made again. whole_logits: the loss is PyTorch's, not ours in chunks. Layers
    leave their activations behind one by one, from the last; in exchange gradients come: a reduce-scatter's fp32 input
    is there until the one after the next, so the third layer may be the peak, where a layer has less activations than
    weights; and at the end there are all gradients. Those of the root group wait for the end. Where each of several
    micro batches is reduced, the sums of those before are there from the start (accumulation).

    Left out are the CUDA context, buffers of libraries and fragments (RESERVED), and the [s, s] score matrix and other
    temporaries of the reference's attention and SwiGLU.
    """
    n_tokens, n_layers = micro_batch * seq_len, config.n_layers
    own = {
        "parameters": parameter_bytes(config, world_size),
        "optimizer": optimizer_bytes(config, world_size),
        "gathered_parameters": gathered_parameter_bytes(config, compute_bytes),
    }
    a_layer = n_tokens * activation_bytes_per_token(config, compute_bytes, lean) // n_layers
    gone = 0 if lean else compute_bytes * n_tokens * config.hidden_dim  # SwiGLU's output, when its backward begins
    working = working_bytes(config, n_tokens, compute_bytes, lean) + compute_bytes * config.vocab_size * config.dim
    layer, root = (padded_numel(shapes(config), world_size) for shapes in (layer_shapes, root_shapes))

    whole = gradient_bytes(config, world_size)

    def backward(done: int) -> MemoryEstimate:
        return MemoryEstimate(
            gradients=whole if accumulation > 1 else FP32_BYTES * done * layer // world_size,
            activations=(n_layers - done) * a_layer - gone,
            logits=0,
            working=working + min(done, 2) * FP32_BYTES * layer,
            **own,
        )

    end = {"gradients": whole, "activations": 0, "logits": 0}
    reducing = FP32_BYTES * (layer + root) + compute_bytes * root
    loss = _loss_moments(config, n_tokens, compute_bytes, lean, whole_logits)
    at_loss = own | {
        "gradients": whole if accumulation > 1 else 0,
        "gathered_parameters": gathered_parameter_bytes(config, compute_bytes, layers=1),
    }
    return {
        **{when: MemoryEstimate(**parts, **at_loss) for when, parts in loss.items()},
        "backward of the last layer": backward(0),
        "backward of the third layer from the end": backward(min(2, n_layers - 1)),
        "backward of the first layer": backward(n_layers - 1),
        "reduction of the root group": MemoryEstimate(working=reducing, **end, **own),
    }


def memory_estimate(
    config: MistralConfig,
    world_size: int,
    micro_batch: int,
    seq_len: int,
    compute_bytes: int = 2,
    lean: bool = True,
    whole_logits: bool = False,
    accumulation: int = 1,
) -> MemoryEstimate:
    """The largest of ``memory_moments``: micro_batch sequences of seq_len, FSDP2, AdamW. bench/memory.py counts it."""
    moments = memory_moments(config, world_size, micro_batch, seq_len, compute_bytes, lean, whole_logits, accumulation)
    return max(moments.values(), key=lambda moment: moment.total)


MOMENT_BYTES = {"fp32": 8, "bf16": 4, "8bit": 2}  # a weight, both of them
GROUP_OF_8BIT = 256  # weights that share an exponent of one byte in each moment (kernels/adamw.py)


def moment_bytes(config: MistralConfig, moments: str) -> int:
    """AdamW's two moments on one rank, as --moments has them: fp32, bf16 or 8bit. Raises ValueError for others."""
    if moments not in MOMENT_BYTES:
        raise ValueError(f"moments must be one of {', '.join(MOMENT_BYTES)}, got {moments!r}")
    size = MOMENT_BYTES[moments] * parameters(config)
    if moments == "8bit":
        shapes = config.n_layers * layer_shapes(config) + root_shapes(config)
        size += sum(2 * -(-rows * columns // GROUP_OF_8BIT) for rows, columns in shapes)
    return size


def one_rank_moments(
    config: MistralConfig,
    micro_batch: int,
    seq_len: int,
    moments: str,
    accumulation: int = 1,
    lean: bool = True,
    compute_bytes: int = 2,
) -> dict[str, MemoryEstimate]:
    """``memory_moments`` of one rank in bf16 without FSDP (model/optimizer.py), in the last of its micro batches.

    A master weight is the bf16 that the model computes with and 16 bits more, 4 B. Gradients come in bf16. Of one micro
    batch they are not there while all activations are; over several the sums are: with 8bit moments in bf16, otherwise
    in fp32 from the second on. The last gradient to come beside its sum is the embedding's.
    """
    n, n_tokens, n_layers = parameters(config), micro_batch * seq_len, config.n_layers
    own = {"parameters": FP32_BYTES * n, "optimizer": moment_bytes(config, moments), "gathered_parameters": 0}
    narrow = moments == "8bit" or accumulation == 1
    after = compute_bytes if narrow else FP32_BYTES  # a weight, once its gradient has come
    before = 0 if accumulation == 1 else compute_bytes if accumulation == 2 else after
    embedding = config.vocab_size * config.dim
    a_layer = n_tokens * activation_bytes_per_token(config, compute_bytes, lean) // n_layers
    gone = 0 if lean else compute_bytes * n_tokens * config.hidden_dim  # SwiGLU's output, when its backward begins

    def backward(done: int) -> MemoryEstimate:
        weights = embedding + done * layer_parameters(config)  # the head has as many as the embedding
        return MemoryEstimate(
            gradients=after * weights + before * (n - weights),
            activations=(n_layers - done) * a_layer - gone,
            logits=0,
            working=working_bytes(config, n_tokens, compute_bytes, lean),
            **own,
        )

    loss = _loss_moments(config, n_tokens, compute_bytes, lean, whole_logits=False)
    return {
        **{when: MemoryEstimate(gradients=before * n, **parts, **own) for when, parts in loss.items()},
        "backward of the last layer": backward(0),
        "backward of the first layer": backward(n_layers - 1),
        "gradient of the embedding": MemoryEstimate(
            gradients=after * n + (before * embedding if before != after else 0),
            activations=0,
            logits=0,
            working=compute_bytes * embedding if accumulation > 1 else 0,
            **own,
        ),
    }


def one_rank_memory(
    config: MistralConfig,
    micro_batch: int,
    seq_len: int,
    moments: str,
    accumulation: int = 1,
    lean: bool = True,
    compute_bytes: int = 2,
) -> MemoryEstimate:
    """The largest of ``one_rank_moments``: a rank's memory at the peak of a step. Raises ValueError for bad moments."""
    estimates = one_rank_moments(config, micro_batch, seq_len, moments, accumulation, lean, compute_bytes)
    return max(estimates.values(), key=lambda estimate: estimate.total)


def most_micro_batch(
    config: MistralConfig,
    memory_bytes: int,
    seq_len: int,
    moments: str,
    divides: int,
    at_most: int = 8,
    lean: bool = True,
    compute_bytes: int = 2,
) -> int:
    """The largest micro batch that divides a rank's share of ``divides`` sequences and fits, by ``one_rank_memory``.

    memory_bytes is the whole of the GPU's, of which RESERVED is left alone. 0 if not even one sequence fits.
    """
    room = memory_bytes * (1 - RESERVED)
    for micro_batch in range(min(at_most, divides), 0, -1):
        if divides % micro_batch == 0:
            accumulation = divides // micro_batch
            if one_rank_memory(config, micro_batch, seq_len, moments, accumulation, lean, compute_bytes).total <= room:
                return micro_batch
    return 0


# ------------------------------------------------------------------------------------------------------------- machines


@dataclass(frozen=True)
class GPU:
    bf16_flops: float  # dense tensor-core peak, FLOP/s
    hbm_bytes_per_second: float
    memory_bytes: int


def _gpu(bf16_tflops: float, hbm_gb_per_second: float, memory_mib: int) -> GPU:
    return GPU(bf16_tflops * 1e12, hbm_gb_per_second * 1e9, memory_mib * 2**20)


# torch.cuda.get_device_name() -> peaks. Names are the driver's own (the list of supported chips in its README). FLOP/s
# and bytes/s are from NVIDIA's data sheets; those since Hopper print the rate with 2:4 sparsity, so half of it stands
# here. Memory is the total that nvidia-smi reports. The GH200's "120GB" and "480GB" are its LPDDR; both have 96 GB of
# HBM3.
GPUS: dict[str, GPU] = {
    # A100 data sheet, June 2021: 312 TFLOP/s; 1,555, 2,039 and (80 GB PCIe) 1,935 GB/s
    "NVIDIA A100-SXM4-40GB": _gpu(312, 1555, 40960),
    "NVIDIA A100-SXM4-80GB": _gpu(312, 2039, 81920),
    "NVIDIA A100-PCIE-40GB": _gpu(312, 1555, 40960),
    "NVIDIA A100 80GB PCIe": _gpu(312, 1935, 81920),
    # H100 data sheets: SXM 1,979 sparse, 3.35 TB/s; PCIe 1,513 sparse, 2 TB/s; NVL 1,671 sparse a GPU, 3.9 TB/s
    "NVIDIA H100 80GB HBM3": _gpu(989.5, 3350, 81559),
    "NVIDIA H100 PCIe": _gpu(756.5, 2000, 81559),
    "NVIDIA H100 NVL": _gpu(835.5, 3900, 95830),
    # H200 data sheet: SXM 1,979 sparse, NVL 1,671 sparse; 4.8 TB/s both
    "NVIDIA H200": _gpu(989.5, 4800, 143771),
    "NVIDIA H200 NVL": _gpu(835.5, 4800, 143771),
    # GH200 data sheet: 1,979 sparse; 4 TB/s with 96 GB of HBM3, 4.9 TB/s with 144 GB of HBM3e
    "NVIDIA GH200 120GB": _gpu(989.5, 4000, 97871),
    "NVIDIA GH200 480GB": _gpu(989.5, 4000, 97871),
    "NVIDIA GH200 144G HBM3e": _gpu(989.5, 4900, 146831),
    # Blackwell architecture brief, HGX B200 at 1,000 W: 4,500 sparse, 8 TB/s
    "NVIDIA B200": _gpu(2250, 8000, 183359),
}


def peak_flops(device_name: str, override_tflops: float | None = None) -> float | None:
    """bf16 FLOP/s of the device that torch.cuda.get_device_name calls so; override_tflops if given; None if unknown.

    Never a guess by part of a name: frameworks that take the "A100"-like branch for a GH200 print an MFU 3.2 times too
    high. Raises ValueError for an override that is not a positive finite number.
    """
    if override_tflops is not None:
        if not 0 < override_tflops < float("inf"):
            raise ValueError(f"override_tflops must be a positive number, got {override_tflops}")
        return override_tflops * 1e12
    gpu = GPUS.get(device_name)
    return None if gpu is None else gpu.bf16_flops


def mfu(tokens_per_second: float, flops_per_token: float, peak: float | None) -> float | None:
    """Model FLOPs utilisation of one GPU, 1.0 at its peak; None where the peak is unknown."""
    return None if peak is None else tokens_per_second * flops_per_token / peak
