"""One rank of many without a network: a copy on this GPU in the place of each of FSDP's collectives."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import record_function
from torch.testing._internal.distributed.fake_pg import FakeStore

from halny.model.estimate.sizes import layer_shapes, padded_numel, root_shapes
from halny.model.mistral import MistralConfig
from halny.model.record import breakdown
from halny.model.run.ranks import World


class StandIn:
    """In the place of a network: one copy on this device for each collective of FSDP, of the collective's own bytes.

    A gather copies from a buffer of random values, as many as it would have received, so what is gathered is finite, of
    full rank and never changes. A reduction copies all its input into another buffer, and this rank's chunk from there.
    Both run where FSDP calls its communication, on the streams that it has for that.
    """

    def __init__(self, config: MistralConfig, ranks: int, dtype: torch.dtype, device: torch.device):
        n = largest_message(config, ranks)
        self.source = torch.empty(n, dtype=dtype, device=device).normal_(0.0, 0.02)
        self.target = torch.empty(n, dtype=torch.float32, device=device)
        self.calls: list[tuple[str, int, int]] = []  # kind, bytes of the whole, ranks

    @staticmethod
    def bytes_for(config: MistralConfig, ranks: int, element_bytes: int) -> int:
        return largest_message(config, ranks) * (element_bytes + 4)

    def on(self, model: torch.nn.Module) -> StandIn:
        """Put it in. Raises RuntimeError where this torch has no such switch."""
        if not hasattr(model, "set_custom_all_gather") or not hasattr(model, "set_custom_reduce_scatter"):
            raise RuntimeError(
                f"torch {torch.__version__} cannot replace FSDP's collectives (FSDPModule.set_custom_all_gather, "
                "set_custom_reduce_scatter); rank-of-256 needs one that can"
            )
        for module in (model, *model.layers):
            module.set_custom_all_gather(_Gather(self))
            module.set_custom_reduce_scatter(_Reduce(self))
        return self


def largest_message(config: MistralConfig, ranks: int) -> int:
    """Elements of the largest collective."""
    return max(padded_numel(shapes, ranks) for shapes in (layer_shapes(config), root_shapes(config)))


@dataclass
class _Comm:
    """FSDP asks the communication for its buffers as well; its own way to make them is this one."""

    stand_in: StandIn

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _Gather(_Comm):
    def __call__(self, output_tensor, input_tensor, group, async_op: bool = False) -> None:
        self.stand_in.calls.append(("all-gather", output_tensor.nbytes, group.size()))
        with record_function(f"{breakdown.STAND_IN} for an all-gather"):
            output_tensor.copy_(self.stand_in.source[: output_tensor.numel()])


class _Reduce(_Comm):
    def __call__(self, output_tensor, input_tensor, group, op, async_op: bool = False) -> None:
        self.stand_in.calls.append(("reduce-scatter", input_tensor.nbytes, group.size()))
        with record_function(f"{breakdown.STAND_IN} for a reduce-scatter"):
            reduced = self.stand_in.target[: input_tensor.numel()].copy_(input_tensor)
            output_tensor.copy_(reduced[: output_tensor.numel()])


def one_of(ranks: int, device: torch.device, node_size: int) -> World:
    """Rank 0 of so many that are not there."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    return World(0, ranks, device, init_device_mesh(device.type, (ranks,)), node_size)
