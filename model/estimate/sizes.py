"""The weights of a model: how many there are, in what shapes, and how FSDP pads them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halny.model.mistral import MistralConfig


FP32_BYTES = 4


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
