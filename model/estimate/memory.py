"""What a rank holds at the moments of a step, in bytes."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING

from halny.model.estimate.sizes import (
    FP32_BYTES,
    layer_parameters,
    layer_shapes,
    padded_numel,
    parameters,
    root_parameters,
    root_shapes,
    shard_numel,
)
from halny.model.estimate.work import Sharding, Work

if TYPE_CHECKING:
    from halny.model.mistral import MistralConfig


def rank_memory(work: Work, sharding: Sharding, gpus: int, compute_bytes: int = 2) -> dict[str, int]:
    """Bytes of the fullest rank's tensors at the peak, by part; parts of nothing are left out."""
    config, sizes = work.config, (work.micro_batch, work.seq_len)
    if gpus == 1 and compute_bytes == 2:
        parts = asdict(one_rank_memory(config, *sizes, work.moments, work.accumulation, work.lean))
    else:
        reduced = 1 if sharding.holds_gradients else work.accumulation  # times a step
        parts = asdict(
            memory_estimate(config, sharding.shards, *sizes, compute_bytes, work.lean, work.whole_logits, reduced)
        )
        if sharding.gathered_again:
            layer = compute_bytes * padded_numel(layer_shapes(config), sharding.shards)
            others = config.n_layers - (2 if sharding.gathered_again == 1 else 1)  # than those that are whole anyway
            parts["kept for the backward"] = max(0, others) * layer // sharding.gathered_again
        if work.accumulation > 1 and sharding.holds_gradients and gpus > 1:
            parts["whole gradients"] = 4 * parameters(config)
    return {name.replace("_", " "): size for name, size in parts.items() if size}


# Of a GPU's memory, for what no estimate here counts: CUDA's context, NCCL's and cuBLAS's buffers, fragments. Assumed.
RESERVED = 0.08


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
