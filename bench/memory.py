"""The memory of the trainer's step, counted without a GPU and held against model/estimate/memory.py's prediction.

    python bench/memory.py             Mistral-7B at 4 x 4096: one rank of 256 under FSDP2, and one rank alone
    python bench/memory.py --cards     what memory.py predicts for GPUs of 80, 96 and 141 GB; nothing is counted

The step is train.py's own, at full size, on the meta device, with kernels and FSDP2 going the way of a Hopper GPU
(bench/account.py): every tensor that a GPU would hold has its size here, and no bytes. For the other 255 ranks stands
PyTorch's fake process group. A dispatch mode sees each tensor made and follows its storage until it is freed, those
included that FSDP2 empties and fills again: the largest sum of all that live at once is the step's peak, and what makes
it up is known by part. The prediction is the largest of memory.py's moments. More than 1% of the peak apart in any
part, or in the sum, ends with exit code 1. The loss, where the logits are, is a moment beside it.

Counted are bytes that tensors ask for. What a GPU holds besides is not: CUDA's context, workspaces of cuBLAS and
FlashAttention, NCCL's buffers, what the allocator rounds up and cannot use for its holes; memory.RESERVED stands for
these. A tensor is held until the last reference is gone; FSDP2's streams may free some of them some kernels later.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from unittest.mock import patch

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # not bench/: see kernels.py

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from bench.lib.meta_step import MetaCase, MetaMode, MetaStep, on_hopper, world_of
from halny.model.estimate import choices, machines, memory
from halny.model.estimate.choices import decide
from halny.model.estimate.sizes import parameters
from halny.model.estimate.work import ALONE, Layout, Work
from halny.model.mistral import PRESETS, MistralConfig
from halny.model.run import fsdp
from halny.model.run.recipe import PRESETS as RECIPES

BOUND = 0.01  # of the peak, that a part or the sum may differ from the prediction
OTHER = "not predicted"  # RoPE tables, the batch, metrics

# ----------------------------------------------------------------------------------------------------------- the count

# What FSDP2 makes for itself, by the function of torch.distributed.fsdp that asks for it. A reduce-scatter's output
# stays and is told from its input by that: see ``Live``.
FSDP_PARTS = {
    **dict.fromkeys(("foreach_all_gather", "wait_for_unshard", "to_sharded_post_forward"), "gathered_parameters"),
    "foreach_reduce": "working",
}
PHASES = {"activations": "forward", "logits": "loss", "working": "backward"}  # of the step, by what is made in it


@dataclass
class Storage:
    bytes: int
    part: str
    reference: weakref.ref | None = None


@dataclass
class Moment:
    """The largest sum seen, and what made it."""

    total: int = 0
    parts: list[tuple[Storage, int]] = field(default_factory=list)

    def by_part(self) -> Counter[str]:
        sizes = Counter()
        for storage, size in self.parts:
            sizes[storage.part] += size
        return sizes


class Live(MetaMode):
    """Follows the storages of meta tensors; ``most`` has the largest moments of "forward", "loss" and "backward".

    A storage's part is decided where it is made: by FSDP2's collectives; in the loss; otherwise activations in the
    forward and working memory in the backward. In the backward, working memory is also what the loss made and is still
    there: its gradients. What of working memory outlives the backward was a gradient.
    """

    def __init__(self):
        super().__init__()
        self.total = 0
        self.most = {"forward": Moment(), "loss": Moment(), "backward": Moment()}
        self._live: dict[int, Storage] = {}
        self._phase = "forward"  # of what was made last
        self._rising = self._in_backward = False

    @contextlib.contextmanager
    def watch_resizes(self) -> Iterator[None]:
        """FSDP2 empties and fills storages by ``resize_``, of which no operator is told."""
        resize = torch.UntypedStorage.resize_

        def resize_(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resize(storage, size)
            if id(storage) in self._live:
                self._change(self._live[id(storage)], storage.nbytes())
            return storage

        with patch.object(torch.UntypedStorage, "resize_", resize_, create=True):
            yield

    def hold(self, x: Tensor, part: str | None = None) -> None:
        """Follow x's storage, if it is a new one, as of that part."""
        storage = x.untyped_storage()
        key = id(storage)  # the same object as long as any tensor has it
        if key not in self._live:
            held = self._live[key] = Storage(0, part or self._part())
            self._phase = PHASES.get(held.part, self._phase)
            held.reference = weakref.ref(storage, lambda _: self._forget(key))
            self._change(held, storage.nbytes())

    def _forget(self, key: int) -> None:
        self._change(self._live[key], 0)
        del self._live[key]

    def _change(self, storage: Storage, size: int) -> None:
        if size < storage.bytes and self._rising:  # after a rise: is it the largest?
            moment = self.most[self._phase]
            if self.total > moment.total:
                moment.total, moment.parts = self.total, [(s, s.bytes) for s in self._live.values()]
            self._rising = False
        self._rising |= size > storage.bytes
        self.total += size - storage.bytes
        storage.bytes = size

    def _part(self) -> str:
        frame = sys._getframe(3)
        while frame is not None:
            file, function = frame.f_code.co_filename, frame.f_code.co_name
            if "_fully_shard" in file and function in FSDP_PARTS:
                return FSDP_PARTS[function]
            if file.endswith("linear_cross_entropy.py") and not self._in_backward:
                return "logits"
            frame = frame.f_back
        return "working" if self._in_backward else "activations"

    def begins(self, operator) -> None:
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and not self._in_backward:
            of_loss = {key: storage for key, storage in self._live.items() if storage.part == "logits"}
            self._live |= {key: replace(storage, part="working") for key, storage in of_loss.items()}
        if self._in_backward and not in_backward:
            for storage in self._live.values():
                storage.part = "gradients" if storage.part == "working" else storage.part
        self._in_backward = in_backward

    def ran(self, operator, args: tuple, kwargs: dict, out) -> None:
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.is_meta:
                self.hold(x)


# ---------------------------------------------------------------------------------------------------------- its result


def count(case: MetaCase) -> Live:
    """Two steps, of which the second finds what the first leaves behind."""
    live = Live()
    with (
        world_of(case.ranks) as world,
        on_hopper(lambda *_: None, case.window_hides),
        patch.object(fsdp, "has_streams", lambda device: True),  # prefetch and buffers as on a GPU
    ):
        step = MetaStep(case, world)
        for part, tensors in state(step).items():
            for x in tensors:
                live.hold(x.to_local() if isinstance(x, DTensor) else x, part)
        with live, live.watch_resizes():
            step.run()
            step.run()
    return live


def state(step: MetaStep) -> dict[str, list[Tensor]]:
    """What is there between two steps, by part."""
    halves = getattr(step.optimizer, "low", {}).values()  # of one rank's master weights
    moments = [x for of_one in step.optimizer.state.values() for x in of_one.values()]
    return {
        "parameters": [*step.model.parameters(), *halves],
        "optimizer": moments,
        OTHER: [*step.model.buffers(), *(x for batch in step.batches for x in (batch.tokens, batch.labels))],
    }


@dataclass(frozen=True)
class Row:
    part: str
    counted: int
    predicted: int
    peak: int

    @property
    def differs(self) -> bool:
        return abs(self.counted - self.predicted) > BOUND * self.peak


def compare(moment: Moment, estimate: memory.MemoryEstimate) -> list[Row]:
    """Part by part, and last their sum."""
    counted, expected = moment.by_part(), asdict(estimate) | {OTHER: 0}
    unknown = counted.keys() - expected.keys()
    if unknown:
        raise KeyError(f"parts that no prediction has: {', '.join(unknown)}")
    rows = [Row(part, counted[part], size, moment.total) for part, size in expected.items()]
    return [*rows, Row("sum", moment.total, estimate.total, moment.total)]


def tables(case: MetaCase) -> Iterator[tuple[str, list[Row]]]:
    """(which moment, its rows): the peak of the step, and the loss."""
    live, moments = count(case), memory.memory_moments(case.work, case.layout)
    name, peak = max(moments.items(), key=lambda item: item[1].total)
    yield f"the peak: {name}", compare(max(live.most.values(), key=lambda moment: moment.total), peak)
    yield "the loss", compare(live.most["loss"], moments["loss"])


def describe(case: MetaCase) -> str:
    if case.ranks == 1:
        return f"one rank, AdamW's moments in {case.moments}, {case.tokens}"
    return f"one rank of {case.ranks} under FSDP2, {case.tokens}"


def print_tables(case: MetaCase) -> bool:
    """Whether everything is within BOUND."""
    fine = True
    print(f"\n{describe(case)}, {case.config.n_layers} layers, bf16: GB", flush=True)
    for name, rows in tables(case):
        print(f"  {name:<44}{'counted':>9}{'predicted':>11}{'difference':>12}{'of the peak':>13}")
        for row in rows:
            fine &= not row.differs
            if max(row.counted, row.predicted) < 1e6:
                continue
            apart = row.counted - row.predicted
            print(f"    {row.part.replace('_', ' '):<42}{row.counted / 1e9:>9.3f}{row.predicted / 1e9:>11.3f}"
                f"{apart / 1e9:>+12.3f}{apart / row.peak:>+13.2%}{'  <- too much' * row.differs}")  # fmt: skip
    return fine


# --------------------------------------------------------------------------------------------------------------- cards

CARDS = ("NVIDIA H100 80GB HBM3", "NVIDIA GH200 480GB", "NVIDIA H200")  # of 80, 96 and 141 GB, as they are sold
MICRO_BATCHES = (1, 2, 4, 8)
RANKS = 256


def card_lines(model: MistralConfig, recompute: str, name: str = "mistral-7b-1gpu") -> Iterator[str]:
    """What memory.py predicts that a step needs, what that leaves of each card, and what the preset takes there."""
    recipe = RECIPES[name]
    seq_len, share = recipe["seq_len"], recipe["batch_tokens"] // recipe["seq_len"]
    sizes = {card: machines.GPUS[card].memory_bytes for card in CARDS}
    rooms = {card: memory.room(size) for card, size in sizes.items()}
    yield (
        f"predicted by model/estimate/memory.py, nothing measured: GB at a step's peak for {parameters(model):,} "
        f"parameters, sequences of {seq_len}"
    )
    yield (
        f"left: of the memory less {memory.RESERVED:.0%}, reserved for CUDA, NCCL and fragments; - does not fit. "
        "Lines are of --recompute always\n"
    )
    yield f"{'':<44}{'':>9}" + "".join(f"{card.removeprefix('NVIDIA '):>18}" for card in CARDS)
    yield f"{'':<44}{'needs':>9}" + "".join(f"{size / 1e9:>12.1f}, left" for size in sizes.values())

    def line(what: str, estimate: memory.MemoryEstimate) -> str:
        left = (f"{room / 1e9:.1f}" if room >= 0 else "-" for room in (x - estimate.total for x in rooms.values()))
        return f"{what:<44}{estimate.total / 1e9:>9.1f}" + "".join(f"{words:>18}" for words in left)

    for moments in memory.MOMENT_BYTES:
        for accumulates in (False, True):
            for n in MICRO_BATCHES:
                accumulation = share // n if accumulates else 1
                what = f"one rank, moments in {moments}, {f'{accumulation} x ' * accumulates}{n} x {seq_len}"
                yield line(what, memory.memory_estimate(Work(model, n, seq_len, accumulation, moments=moments), ALONE))
    for n in MICRO_BATCHES:
        estimate = memory.memory_estimate(Work(model, n, seq_len), Layout(RANKS))
        yield line(f"one rank of {RANKS}, {n} x {seq_len}", estimate)

    yield f"\n{name} --recompute {recompute}, {recipe['batch_tokens']:,} tokens a step, takes as train.py --plan says"
    for card, machine in machines.MACHINES.items():
        found = decide(model, ranks=1, node=1, memory_bytes=machine.gpu.memory_bytes, seq_len=seq_len, share=share,
                       moments=recipe["moments"], recompute=recompute)  # fmt: skip
        work, needed = found.work, sum(found.memory.values())
        if needed > memory.room(machine.gpu.memory_bytes):
            yield f"  {card:<12} nothing: one sequence does not fit"
            continue
        listed = ", ".join(f"{part} {x / 1e9:.1f}" for part, x in found.memory.items())
        yield (
            f"  {card:<12} {work.accumulation:>2} x {work.micro_batch} x {seq_len}: {needed / 1e9:.1f} GB: {listed}; "
            f"recomputed: {choices.recomputed(work)}"
        )


CASES = [
    {"ranks": RANKS, "reshard": "always"},
    *({"ranks": 1, "moments": moments} for moments in memory.MOMENT_BYTES),
    *({"ranks": 1, "moments": moments, "accumulation": 4} for moments in ("bf16", "8bit")),
]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cards", action="store_true", help="the prediction alone, and what fits each GPU")
    parser.add_argument(
        "--recompute", choices=("auto", "always", "never"), default="auto", help="with --cards: as train.py's [auto]"
    )
    given = parser.parse_args(arguments)
    model = PRESETS["mistral-7b"]
    if given.cards:
        print("\n".join(card_lines(model, given.recompute)))
        return 0
    print("counted: tensors of train.py's step on the meta device; predicted: memory.py. No GPU, nothing measured")
    fine = [print_tables(MetaCase(model, 4, 4096, **case)) for case in CASES]
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
