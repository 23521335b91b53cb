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
from halny.model.estimate.work import Layout, Work

if TYPE_CHECKING:
    from halny.model.mistral import MistralConfig

# Of a GPU's memory, for what no estimate here counts: CUDA's context, NCCL's and cuBLAS's buffers, fragments. Assumed.
RESERVED = 0.08


def room(memory_bytes: int) -> int:
    """Bytes of a GPU's memory that are there for tensors."""
    return int(memory_bytes * (1 - RESERVED))


MOMENT_BYTES = {"fp32": 8, "bf16": 4, "8bit": 2}  # a weight, both of AdamW's moments
GROUP_OF_8BIT = 256  # weights that share an exponent of one byte in each moment (kernels/adamw.py)

# ---------------------------------------------------------------------------------------- weights, moments, checkpoints


def parameter_bytes(config: MistralConfig, shards: int = 1) -> int:
    """A rank's share of the fp32 master weights, or of fp32 gradients."""
    return FP32_BYTES * shard_numel(config, shards)


def optimizer_bytes(config: MistralConfig, shards: int = 1) -> int:
    """A rank's share of AdamW's two fp32 moments. With the master weights: 12 B a weight; with gradients too: 16 B."""
    return 2 * FP32_BYTES * shard_numel(config, shards)


def moment_bytes(config: MistralConfig, moments: str) -> int:
    """AdamW's two moments on one rank, as --moments has them: fp32, bf16 or 8bit. Raises ValueError for others."""
    if moments not in MOMENT_BYTES:
        raise ValueError(f"moments must be one of {', '.join(MOMENT_BYTES)}, got {moments!r}")
    size = MOMENT_BYTES[moments] * parameters(config)
    if moments == "8bit":
        shapes = config.n_layers * layer_shapes(config) + root_shapes(config)
        size += sum(2 * -(-rows * columns // GROUP_OF_8BIT) for rows, columns in shapes)
    return size


def checkpoint_bytes(config: MistralConfig, moments: str = "fp32", shards: int = 1) -> int:
    """A rank's share of a checkpoint: fp32 master weights and both moments. In fp32 12 B a weight.

    A save holds up the training for its copy into pinned host memory; the rest (writing, reading back, checksums) goes
    on beside it. The look whether the weights are finite, one pass over a third of the bytes at the device's own
    bandwidth, is some hundred times less.
    """
    own = moment_bytes(config, moments) if shards == 1 else optimizer_bytes(config, shards)
    return parameter_bytes(config, shards) + own


def gathered_parameter_bytes(config: MistralConfig, compute_bytes: int = 2, layers: int = 2) -> int:
    """Whole weights in the compute dtype that FSDP2 holds at the worst moment, however many shards there are.

    The root group (embedding, head, final norm) stays gathered; of the layers one computes and the next arrives.
    """
    return compute_bytes * (root_parameters(config) + min(layers, config.n_layers) * layer_parameters(config))


# ---------------------------------------------------------------------------------------------- activations and logits


def saved_activations(config: MistralConfig, compute_bytes: int = 2) -> dict[str, int]:
    """What one layer keeps for its backward: name -> bytes a token. 7B in bf16: 139,400 B.

    The rows marked "recomputed" may be dropped and recomputed from their neighbours, which costs one pass over memory
    and no matrix product. 7B in bf16 keeps 94,344 B then.
    """
    b, d, f = compute_bytes, config.dim, config.hidden_dim
    q = config.n_heads * config.head_dim
    qkv = q + 2 * config.n_kv_heads * config.head_dim
    return {
        "attention norm: input": b * d,
        "attention norm: rstd, fp32": FP32_BYTES,
        "attention norm: output (recomputed)": b * d,
        "packed q, k, v after RoPE": b * qkv,
        "attention: output": b * q,
        "attention: log-sum-exp, fp32": FP32_BYTES * config.n_heads,
        "residual after attention, the MLP norm's input": b * d,
        "MLP norm: rstd, fp32": FP32_BYTES,
        "MLP norm: output (recomputed)": b * d,
        "packed gate, up": b * 2 * f,
        "SwiGLU: output (recomputed)": b * f,
    }


def activation_bytes_per_token(config: MistralConfig, compute_bytes: int = 2, recompute: bool = False) -> int:
    """Bytes a token that all layers keep for the backward; ``saved_activations`` x L."""
    saved = saved_activations(config, compute_bytes)
    return config.n_layers * sum(n for name, n in saved.items() if not (recompute and name.endswith("(recomputed)")))


def loss_chunk_rows(config: MistralConfig, n_rows: int, compute_bytes: int = 2) -> int:
    """Rows of logits that the loss holds at once, by its own rule. 7B, 16,384 rows in bf16: 4,096."""
    from halny.kernels.linear_cross_entropy import chunk_rows  # imports torch, which --help does not wait for

    return chunk_rows(n_rows, config.vocab_size, config.dim, compute_bytes)


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


def working_bytes(work: Work) -> int:
    """Most of what a layer's backward holds beside the saved activations: b (d + 4f) a token. 7B in bf16: 122,880 B.

    In SwiGLU's: the gradient of the layer's output (d), the gradient of SwiGLU's output (f), that of gate and up (2f),
    and SwiGLU's output, recomputed for the weight's gradient (f); or where it was kept, that gradient.
    """
    n_tokens, d, f = work.tokens, work.config.dim, work.config.hidden_dim
    return work.compute_bytes * (n_tokens * (d + 3 * f) + (n_tokens * f if work.recompute else d * f))


# ------------------------------------------------------------------------------------------------ the moments of a step


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


def memory_moments(work: Work, layout: Layout) -> dict[str, MemoryEstimate]:
    """A rank's memory at the moments of a step that may be its peak: what happens -> parts.

    Left out are the CUDA context, buffers of libraries and fragments (RESERVED), and the [s, s] score matrix and other
    temporaries of the reference's attention and SwiGLU. Raises ValueError for moments that AdamW does not know.
    """
    return _under_fsdp(work, layout) if layout.fsdp else _without_fsdp(work)


def memory_estimate(work: Work, layout: Layout) -> MemoryEstimate:
    """The largest of ``memory_moments``. bench/memory.py counts it."""
    return max(memory_moments(work, layout).values(), key=lambda moment: moment.total)


def rank_memory(work: Work, layout: Layout) -> dict[str, int]:
    """Bytes of the fullest rank's tensors at the peak, by part; parts of nothing are left out.

    To ``memory_estimate`` it adds what the layout keeps from one moment to the next: gathered weights, whole gradients.
    """
    parts, config = asdict(memory_estimate(work, layout)), work.config
    if layout.fsdp and layout.gathered_again:
        layer = work.compute_bytes * padded_numel(layer_shapes(config), layout.shard)
        others = config.n_layers - (2 if layout.gathered_again == 1 else 1)  # than those that are whole anyway
        parts["kept for the backward"] = max(0, others) * layer // layout.gathered_again
    if layout.fsdp and layout.holds_gradients and work.accumulation > 1 and layout.ranks > 1:
        parts["whole gradients"] = FP32_BYTES * parameters(config)
    return {name.replace("_", " "): size for name, size in parts.items() if size}


def _activations_of_layers(work: Work, done: int) -> int:
    """Saved activations when the backward of so many layers is done and that of the next begins."""
    n_layers, b = work.config.n_layers, work.compute_bytes
    a_layer = work.tokens * activation_bytes_per_token(work.config, b, work.recompute) // n_layers
    gone = 0 if work.recompute else b * work.tokens * work.config.hidden_dim  # SwiGLU's output, as its backward begins
    return (n_layers - done) * a_layer - gone


def _loss_moments(work: Work) -> dict[str, dict[str, int]]:
    """While the loss is made, and in its own backward: activations of all layers, logits, working memory.

    Three more [n_tokens, d] are there: the last norm's input, its output, and the gradient of that, which is made at
    once and counted as the loss's. The backward rounds the head's gradient from its fp32 sum, if there are chunks.
    """
    config, n_tokens, b = work.config, work.tokens, work.compute_bytes
    chunk_rows = None if work.whole_logits else loss_chunk_rows(config, n_tokens, b)
    stream = b * n_tokens * config.dim
    layers = n_tokens * activation_bytes_per_token(config, b, work.recompute) + FP32_BYTES * n_tokens
    logits = logits_bytes(config, n_tokens, b, chunk_rows) + stream
    moments = {"loss": {"activations": layers + 2 * stream, "logits": logits, "working": 0}}
    if chunk_rows is not None and chunk_rows < n_tokens and b < FP32_BYTES:
        head = config.vocab_size * config.dim
        moments["backward of the loss"] = {
            "activations": layers + stream,
            "logits": FP32_BYTES * head + stream,
            "working": b * head,
        }
    return moments


def _under_fsdp(work: Work, layout: Layout) -> dict[str, MemoryEstimate]:
    """Under FSDP2 with AdamW on fp32 shards.

    Layers leave their activations behind one by one, from the last; in exchange gradients come: a reduce-scatter's fp32
    input is there until the one after the next, so the third layer may be the peak, where a layer has less activations
    than weights; and at the end there are all gradients. Those of the root group wait for the end. Where each of
    several micro batches is reduced, the sums of those before are there from the start.
    """
    config, shards, n_layers, b = work.config, layout.shard, work.config.n_layers, work.compute_bytes
    whole = parameter_bytes(config, shards)  # of gradients, once all are there
    before = whole if work.accumulation > 1 and not layout.holds_gradients else 0
    own = {"parameters": parameter_bytes(config, shards), "optimizer": optimizer_bytes(config, shards)}
    gathered = {"gathered_parameters": gathered_parameter_bytes(config, b)}
    layer, root = (padded_numel(shapes(config), shards) for shapes in (layer_shapes, root_shapes))
    working = working_bytes(work) + b * config.vocab_size * config.dim

    def backward(done: int) -> MemoryEstimate:
        return MemoryEstimate(
            gradients=before or FP32_BYTES * done * layer // shards,
            activations=_activations_of_layers(work, done),
            logits=0,
            working=working + min(done, 2) * FP32_BYTES * layer,
            **own,
            **gathered,
        )

    at_loss = own | {"gradients": before, "gathered_parameters": gathered_parameter_bytes(config, b, layers=1)}
    reducing = FP32_BYTES * (layer + root) + b * root
    return {
        **{when: MemoryEstimate(**parts, **at_loss) for when, parts in _loss_moments(work).items()},
        "backward of the last layer": backward(0),
        "backward of the third layer from the end": backward(min(2, n_layers - 1)),
        "backward of the first layer": backward(n_layers - 1),
        "reduction of the root group": MemoryEstimate(
            gradients=whole, activations=0, logits=0, working=reducing, **own, **gathered
        ),
    }


def _without_fsdp(work: Work) -> dict[str, MemoryEstimate]:
    """Of one rank in bf16 (run/optimizer.py), in the last of its micro batches.

    A master weight is the bf16 that the model computes with and 16 bits more, 4 B. Gradients come in bf16. Of one micro
    batch they are not there while all activations are; over several the sums are: with 8bit moments in bf16, otherwise
    in fp32 from the second on. The last gradient to come beside its sum is the embedding's.
    """
    config, n, n_layers, b = work.config, parameters(work.config), work.config.n_layers, work.compute_bytes
    own = {"parameters": FP32_BYTES * n, "optimizer": moment_bytes(config, work.moments), "gathered_parameters": 0}
    narrow = work.moments == "8bit" or work.accumulation == 1
    after = b if narrow else FP32_BYTES  # a weight, once its gradient has come
    before = 0 if work.accumulation == 1 else b if work.accumulation == 2 else after
    embedding = config.vocab_size * config.dim

    def backward(done: int) -> MemoryEstimate:
        weights = embedding + done * layer_parameters(config)  # the head has as many as the embedding
        return MemoryEstimate(
            gradients=after * weights + before * (n - weights),
            activations=_activations_of_layers(work, done),
            logits=0,
            working=working_bytes(work),
            **own,
        )

    return {
        **{when: MemoryEstimate(gradients=before * n, **parts, **own) for when, parts in _loss_moments(work).items()},
        "backward of the last layer": backward(0),
        "backward of the first layer": backward(n_layers - 1),
        "gradient of the embedding": MemoryEstimate(
            gradients=after * n + (before * embedding if before != after else 0),
            activations=0,
            logits=0,
            working=b * embedding if work.accumulation > 1 else 0,
            **own,
        ),
    }
