"""What a rank computes in an optimizer step, and how the model is spread over the ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halny.model.mistral import MistralConfig


@dataclass(frozen=True)
class Sharding:
    """Weights cut into ``shards`` on neighbouring GPUs; gpus / shards replicas of them."""

    name: str
    shards: int
    gathered_again: int = 0  # for the backward, among so many ranks (roofline.collectives); 0 all, 1 kept: not at all
    holds_gradients: bool = True  # whole ones over the micro batches, reduced once

    @classmethod
    def of(cls, layout: Layout) -> Sharding:
        """The trainer's layout, in this module's words."""
        again = (
            {"always": 0, "never": 1}.get(layout.reshard_name) if isinstance(layout.reshard, bool) else layout.reshard
        )
        kept = {0: "gathered again", 1: "kept gathered"}.get(again, f"gathered again among {again}")
        name = f"HSDP {layout.shard} x {layout.replicate}" if layout.replicate > 1 else "FSDP"
        return cls(f"{name}, {kept}", layout.shard, again, layout.holds_gradients)


@dataclass(frozen=True)
class Work:
    """What one GPU computes in an optimizer step."""

    config: MistralConfig
    micro_batch: int
    seq_len: int
    accumulation: int = 1
    lean: bool = True  # the backward makes the outputs of norms and SwiGLU again, instead of keeping them
    whole_logits: bool = False  # the loss is PyTorch's
    moments: str = "fp32"  # AdamW's, where there is one GPU: that does without FSDP (model/optimizer.py)
    recomputed: float = 0.0  # share of the layers' forward matrix products that the backward computes again
    recomputes_attention: bool = False
    reduce_bytes: int = 4  # of a gradient on the network

    @property
    def tokens(self) -> int:
        return self.micro_batch * self.seq_len


@dataclass(frozen=True)
class Layout:
    """Shards and replicas, and the two choices, each with its reason."""

    shard: int
    replicate: int
    reshard: bool | int  # as fully_shard's reshard_after_forward takes it, for the layers
    reshard_why: str
    holds_gradients: bool  # sums whole gradients over the micro batches
    gradients_why: str

    @property
    def reshard_name(self) -> str:
        """As --reshard takes it."""
        return {True: "always", False: "never"}[self.reshard] if isinstance(self.reshard, bool) else str(self.reshard)
