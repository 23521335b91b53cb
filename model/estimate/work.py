"""What a rank computes in an optimizer step (Work), and how the ranks share the model (Layout): all that the
arithmetic of this folder is about."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halny.model.mistral import MistralConfig


@dataclass(frozen=True)
class Work:
    """What one rank computes in an optimizer step."""

    config: MistralConfig
    micro_batch: int  # sequences computed at once
    seq_len: int
    accumulation: int = 1  # micro batches in a step
    recompute: bool = True  # the backward recomputes the outputs of norms and SwiGLU, instead of keeping them
    whole_logits: bool = False  # the loss is PyTorch's, on all logits at once
    moments: str = "fp32"  # AdamW's
    compute_bytes: int = 2  # of the dtype of the computation
    # other programs' steps, in bench/published.py:
    recomputed_matmuls: float = 0.0  # share of the layers' forward products computed again, and all between them
    row_bytes: float = 1.0  # of norms, RoPE and SwiGLU, beside fused kernels'; more where PyTorch runs them op by op
    recomputes_attention: bool = False
    reduce_bytes: int = 4  # of a gradient on the network
    shared_by: int = 1  # ranks that compute a micro batch together: parts of its sequences, or of its layers

    @property
    def tokens(self) -> int:
        """Of a micro batch, or a rank's part of it."""
        return self.micro_batch * self.seq_len // self.shared_by


@dataclass(frozen=True)
class Layout:
    """Weights cut into ``shard`` pieces on neighbouring ranks, in ``replicate`` copies; what is gathered, reduced when.

    gathered_again   ranks among which the backward gathers a layer's weights again: 0 all that have a shard, 1 none, as
                     they were kept, n those of a node
    holds_gradients  each rank sums whole gradients over its micro batches and reduces them once a step
    fsdp             False where one rank in bf16 holds the whole model and does without (run/optimizer.py)
    gathers_once     others' ZeRO-1 and 2: weights stay gathered from one micro step to the next
    """

    shard: int = 1
    replicate: int = 1
    gathered_again: int = 0
    holds_gradients: bool = True
    fsdp: bool = True
    reshard_why: str = field(default="", compare=False)
    gradients_why: str = field(default="", compare=False)
    gathers_once: bool = False

    @property
    def ranks(self) -> int:
        return self.shard * self.replicate

    @property
    def reshard(self) -> str:
        """What becomes of gathered weights after the forward pass, as --reshard takes it."""
        return {0: "always", 1: "never"}.get(self.gathered_again, str(self.gathered_again))

    @property
    def reshard_after_forward(self) -> bool | int:
        """The same as fully_shard takes it."""
        return {0: True, 1: False}.get(self.gathered_again, self.gathered_again)

    @property
    def name(self) -> str:
        """In a table."""
        if not self.fsdp:
            return "none"
        kept = {0: "gathered again", 1: "kept gathered"}.get(
            self.gathered_again, f"gathered again among {self.gathered_again}"
        )
        return f"HSDP {self.shard} x {self.replicate}, {kept}" if self.replicate > 1 else f"FSDP, {kept}"


ALONE = Layout(gathered_again=1, fsdp=False)  # one rank in bf16
