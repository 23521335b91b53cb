"""The trainer's own sharding on 256 and 1,024 ranks without one: PyTorch's fake process group, one process, a CPU.

Its collectives move nothing, so numbers are meaningless; shapes, memory, and the order and bytes of the collectives are
those of the real thing, and are compared with roofline.py's. The 7B is built whole; what computes here is narrow,
because each fake gather costs as many real copies as there are ranks. ``python tests/run/test_simulated.py`` (minutes)
lets two layers of full width compute too, and prints what the Python side of a first step takes.
"""

import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

import train
from halny.model.estimate import memory, roofline, sizes
from halny.model.estimate.choices import choose_layout
from halny.model.estimate.work import Work
from halny.model.mistral import PRESETS
from halny.model.run.fsdp import reduce_gradients
from halny.model.run.ranks import World

MISTRAL_7B = PRESETS["mistral-7b"]
NARROW = replace(MISTRAL_7B, n_layers=4, dim=256, n_heads=8, n_kv_heads=2, head_dim=32, hidden_dim=520, vocab_size=1000)
NODE = 4
GATHER = ("all-gather", "layer")


class Record(TorchDispatchMode):
    """Writes down FSDP's collectives: [operator, elements of the whole, its bytes, ranks]."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        if name in ("_allgather_base_", "_reduce_scatter_base_"):  # (output, input, ...)
            part, whole = sorted(args[:2], key=torch.Tensor.numel)
            self.calls.append([name, whole.numel(), whole.nbytes, whole.numel() // part.numel()])
        elif name == "allreduce_":
            self.calls.append([name, args[0][0].numel(), args[0][0].nbytes])
        return operator(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def _ends():
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def build(config, world: int, rank: int = 0, **asked):
    """(model, optimizer, layout) of one rank, as train.py makes them."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    everyone = World(rank, world, torch.device("cpu"), init_device_mesh("cpu", (world,)), NODE)
    layout = choose_layout(Work(config, 1, 8, 2), ranks=world, node=NODE, **asked)
    recipe, work = SimpleNamespace(dtype="bf16", freeze=None), Work(config, 1, 1)
    spec = SimpleNamespace(model=config, recipe=recipe, layout=layout, work=work)
    model = train.build_model(spec, everyone)
    return model, train.build_optimizer(model, train.Recipe()), layout


def compute(model, optimizer) -> list[list]:
    """The collectives of an optimizer step of two micro batches."""
    with torch.no_grad():
        for p in model.parameters():
            p.to_local().zero_()
    tokens = torch.zeros(1, 8, dtype=torch.long)
    with Record() as record:
        for last in (False, True):
            reduce_gradients(model, last)
            model(tokens, tokens)[0].backward()
        optimizer.step()
    return record.calls


@pytest.mark.parametrize("world, rank", [(256, 0), (256, 255), (1024, 0), (1024, 999), (1024, 1000), (1024, 1023)])
def test_full_size_shards(world, rank):
    """All 32 layers: every shard's rows, a rank's memory. 32,000 rows on 1,024 ranks: 32 each, none on the last 24."""
    model, optimizer, _ = build(MISTRAL_7B, world, rank)
    seen = {name: list(p.to_local().shape) for name, p in model.named_parameters()}
    shapes = {f"layers.{i}.{n}": s for i in range(32) for n, s in layer_names(MISTRAL_7B).items()}
    shapes |= root_names(MISTRAL_7B)
    numel = 0
    for name, (rows, columns) in shapes.items():
        each = -(-rows // world)
        mine = max(0, min(each, rows - rank * each))
        expected = [mine, columns] if columns > 1 else [mine]
        assert seen.pop(name) == expected, name
        numel += mine * columns
    assert not seen
    for moment in ("exp_avg", "exp_avg_sq"):
        assert sum(state[moment].to_local().numel() for state in optimizer.state.values()) == numel
    if rank:
        assert sizes.shard_numel(MISTRAL_7B, world) >= numel
    else:  # the fullest
        assert memory.optimizer_bytes(MISTRAL_7B, world) == 8 * numel
        assert memory.checkpoint_bytes(MISTRAL_7B, shards=world) == 12 * numel


def layer_names(config) -> dict[str, tuple[int, int]]:
    names = ("attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.gate_up", "mlp.down")
    return {f"{name}.weight": shape for name, shape in zip(names, sizes.layer_shapes(config), strict=True)}


def root_names(config) -> dict[str, tuple[int, int]]:
    return {f"{n}.weight": s for n, s in zip(("embed", "norm", "head"), sizes.root_shapes(config), strict=True)}


def sequence(config, shards: int, replicas: int, again: int, holds: bool) -> list[list]:
    """The collectives of two micro batches, one after another, from roofline.collectives' kinds."""
    kinds = {
        (c.kind, c.group, c.when): [c.numel, c.bytes, c.ranks]
        for c in roofline.collectives(config, shards, replicas, again, 2, holds_gradients=holds)
    }
    gather = {when: ["_allgather_base_", *c] for (kind, group, when), c in kinds.items() if (kind, group) == GATHER}
    calls, n = [], config.n_layers
    for micro in (0, 1):
        calls.append(["_allgather_base_", *kinds["all-gather", "root", "forward"]])
        calls += n * [gather["forward"]]
        # beside the backward of one layer the next is gathered, and then the gradients of this one are reduced
        calls += [gather["backward"]] if "backward" in gather else []
        for layer in reversed(range(-1, n)):
            group = "layer" if layer >= 0 else "root"
            calls += [gather["backward"]] if layer > 0 and "backward" in gather else []
            if micro or not holds:
                calls.append(["_reduce_scatter_base_", *kinds["reduce-scatter", group, "backward"]])
            if micro and replicas > 1:
                numel, size, _ = kinds["all-reduce", group, "backward"]
                calls.append(["allreduce_", numel, size])
    return calls


def check_collectives(config, world: int, **asked) -> None:
    model, optimizer, layout = build(config, world, **asked)
    again = layout.gathered_again
    assert again == {"node": NODE, "never": 1}.get(asked.get("reshard"), 0)
    assert layout.holds_gradients == ("memory_bytes" not in asked)
    shards, replicas = layout.shard, layout.replicate
    assert replicas == world // asked.get("shard", world)
    calls = compute(model, optimizer)
    assert calls == sequence(config, shards, replicas, again, layout.holds_gradients)
    kinds = roofline.collectives(config, shards, replicas, again, 2, holds_gradients=layout.holds_gradients)
    assert len(calls) == sum(c.count for c in kinds)
    assert sum(n_bytes for _, _, n_bytes, *_ in calls) == sum(c.count * c.bytes for c in kinds)


# 1,000 rows of vocabulary and 256 of a norm on 96, 256 and 1,024 ranks: most of it pads
@pytest.mark.parametrize(
    "world, asked",
    [
        (1024, {}),
        (256, {"reshard": "node"}),
        (256, {"reshard": "never"}),
        (384, {"shard": 96}),
        (96, {"memory_bytes": 10**6}),  # too little to hold whole gradients, or anything
        (96, {"shard": 4, "memory_bytes": 10**6}),
    ],
)
def test_collectives_are_rooflines(world, asked):
    check_collectives(NARROW, world, **asked)


if __name__ == "__main__":
    for world in (256, 1024):
        times = [time.perf_counter()]
        build(MISTRAL_7B, world)
        times.append(time.perf_counter())
        dist.destroy_process_group()
        deep = build(replace(NARROW, n_layers=32), world)[:2]
        times.append(time.perf_counter())
        compute(*deep)
        times.append(time.perf_counter())
        dist.destroy_process_group()
        check_collectives(replace(MISTRAL_7B, n_layers=2), world)
        dist.destroy_process_group()
        print(
            f"{world} ranks: sharding the 7B and making its optimizer {times[1] - times[0]:.1f} s; two micro batches "
            f"and an update of 32 narrow layers {times[3] - times[2]:.1f} s, fake copies included; the collectives of "
            "lets two layers of full width are roofline.py's"
        )
