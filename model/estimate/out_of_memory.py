"""A GPU that ran out of memory, in one message: what was asked for, where the memory went, and what to change.

PyTorch's own message knows bytes and no settings. The trainer knows its settings, and what each of them costs:

    out of GPU memory: 234.9 MB were asked for, and 179.5 MB of 85.0 GB were free; this process had 84.8 GB
    estimated  83.7 GB at the peak: parameters 29.0, gradients 14.5, optimizer 14.5, activations 24.7, working 1.0
               5.5 GB more than the 78.2 GB that 8% kept for CUDA and fragments leave of 85.0 GB
    change     --micro-batch 1 instead of 2                  12.7 GB less: 71.0 GB, which fits

The estimate is memory.py's, as --plan prints it. Nothing here needs a GPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from halny.model.durable import in_words
from halny.model.estimate import memory
from halny.model.estimate.choices import divisors
from halny.model.estimate.memory import rank_memory
from halny.model.estimate.work import ALONE, Layout, Work

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
SIZE = r"([\d.]+) (bytes|[KMGT]iB)"
# Of the GPU's memory; less than that held by others, or lying in holes, is not what a step failed for. What only a
# subtraction says that others have may be this process's own CUDA and NCCL, and has to be more.
NOTABLE, NOTABLE_REST = 0.03, 0.10


@dataclass(frozen=True)
class Shortage:
    """What is known of the moment, in bytes; None where the allocator did not say."""

    asked: int | None
    free: int | None
    total: int | None
    own: int | None  # of this process
    holes: int | None  # of that, reserved by PyTorch and in no tensor
    others: dict[str, int]  # what has the rest: "process 4711" -> bytes

    @classmethod
    def of(cls, text: str, free: int | None, total: int | None, reserved: int | None) -> Shortage:
        """From torch.OutOfMemoryError's text; what that leaves out, from the numbers."""

        def find(pattern: str, otherwise: int | None = None) -> int | None:
            found = re.search(pattern.replace("SIZE", SIZE), text)
            return round(float(found[1]) * UNITS[found[2]]) if found else otherwise

        free, total = find("of which SIZE is free", free), find("total capacity of SIZE", total)
        own = find("this process has SIZE memory in use", reserved)
        listed = re.findall(rf"Process (\d+) has {SIZE} memory in use", text)
        others = {f"process {number}": round(float(size) * UNITS[unit]) for number, size, unit in listed}
        least = NOTABLE * (total or 0)
        if not others and None not in (free, total, own):
            others, least = {"other processes": total - free - own}, NOTABLE_REST * total
        notable = {who: size for who, size in others.items() if size > least}
        return cls(find("Tried to allocate SIZE"), free, total, own, find(r"and SIZE is reserved by PyTorch"), notable)

    @property
    def room(self) -> int | None:
        """What an estimate may need."""
        if self.total is None:
            return None
        return memory.room(self.total) - sum(self.others.values())


def explain(
    error: BaseException | str,
    work: Work,
    layout: Layout,
    *,
    free: int | None = None,
    total: int | None = None,
    reserved: int | None = None,
) -> str:
    """The message for a torch.OutOfMemoryError in training: some lines, for the log and for status.json.

    free and total are torch.cuda.mem_get_info()'s, reserved is torch.cuda.memory_reserved(): for what the error's text
    leaves out.
    """
    short = Shortage.of(str(error), free, total, reserved)
    parts = rank_memory(work, layout)
    needs, room = sum(parts.values()), short.room
    listed = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size >= 5e7)
    lines = [f"out of GPU memory{opening(short)}", f"estimated  {in_words(needs)} at the peak: {listed}"]
    if room is not None:
        kept = f"{memory.RESERVED:.0%} kept for CUDA and fragments" + ", and others," * bool(short.others)
        compared = f"{in_words(needs - room)} more than the" if needs > room else "it should fit into the"
        lines.append(f"           {compared} {in_words(max(room, 0))} that {kept} leave of {in_words(short.total)}")
    for who, size in short.others.items():
        lines.append(f"others     {who} had {in_words(size)} of this GPU: end what is no part of the run")
    if short.holes and short.holes > NOTABLE * (short.total or 0):
        lines.append(
            f"fragments  {in_words(short.holes)} were reserved and in no tensor; PYTORCH_CUDA_ALLOC_CONF="
            "expandable_segments:True, the default here, makes them fewer"
        )
    changes = list(remedies(work, layout, short))
    for i, (what, then) in enumerate(changes):
        verdict = "" if room is None else ", which fits" if then <= room else ", still too much"
        lines.append(
            f"{'' if i else 'change':<11}{what:<44}{in_words(needs - then):>9} less: {in_words(then)}{verdict}"
        )
    if not any(room is None or then <= room for _, then in changes):
        lines.append(f"{'' if changes else 'change':<11}or a GPU with more memory")
    return "\n".join(lines)


def opening(short: Shortage) -> str:
    """What was asked for, free and had, as far as that is known."""
    words = [f"{in_words(short.asked)} were asked for"] if short.asked is not None else []
    if short.free is not None and short.total is not None:
        words.append(f"{in_words(short.free)} of {in_words(short.total)} were free")
    text = (": " if words else "") + ", and ".join(words)
    return text + (f"; this process had {in_words(short.own)}" if short.own is not None else "")


def remedies(work: Work, layout: Layout, short: Shortage) -> Iterator[tuple[str, int]]:
    """(what to change, bytes that a rank then needs at the peak), those that change least first.

    Of each kind the smallest change that fits, or of micro batch and moments the largest there is; where the GPU's
    memory is not known, the smallest. "For a new run" stands at what a run cannot go on with.
    """
    share, room, ranks = work.micro_batch * work.accumulation, short.room, layout.ranks

    def needs(work: Work, layout: Layout = layout) -> int:
        """As the trainer would then choose: whole gradients only where by the estimate there is room for them."""
        limit = short.total and memory.room(short.total)
        held = sum(rank_memory(work, replace(layout, holds_gradients=True)).values())
        if limit is not None and held <= limit:
            return held
        return sum(rank_memory(work, replace(layout, holds_gradients=False)).values())

    def in_micro_batches(micro_batch: int, share: int = share) -> Work:
        return replace(work, micro_batch=micro_batch, accumulation=share // micro_batch)

    def first_that_fits(choices: list[tuple[str, int]], or_last: bool = False) -> list[tuple[str, int]]:
        choices = [choice for choice in choices if choice[1] < now]
        fit = [choice for choice in choices if room is None or choice[1] <= room]
        return fit[:1] or (choices[-1:] if or_last else [])

    now = sum(rank_memory(work, layout).values())
    smaller = [n for n in reversed(divisors(share)) if n < work.micro_batch]
    kinds = [first_that_fits(
        [(f"--micro-batch {n} instead of {work.micro_batch}", needs(in_micro_batches(n))) for n in smaller], True
    )]  # fmt: skip
    if not (work.recompute or work.whole_logits):
        kinds.insert(0, first_that_fits([("--recompute always", needs(replace(work, recompute=True)))], True))
    dropped = replace(layout, gathered_again=0)
    if layout.gathered_again and layout.fsdp:
        kinds.append(first_that_fits([("--reshard always", needs(work, dropped))], True))
    names = list(memory.MOMENT_BYTES)
    moments = names[names.index(work.moments) + 1 :] if not layout.fsdp else []
    kinds.append(first_that_fits(
        [(f"--moments {name}, for a new run", needs(replace(work, moments=name))) for name in moments], True
    ))  # fmt: skip
    found = [choice for kind in kinds for choice in kind]
    yield from found
    if room is not None and len(found) > 1 and all(then > room for _, then in found):
        least = replace(in_micro_batches(1), moments=moments[-1] if moments else work.moments)
        least = least if work.whole_logits else replace(least, recompute=True)
        yield "these together", needs(least, dropped)
    if work.compute_bytes == 4:
        in_bf16 = ALONE if ranks == 1 else layout
        yield "--dtype bf16, for a new run", needs(replace(work, compute_bytes=2), in_bf16)
    lengths = [work.seq_len >> i for i in range(1, 20) if work.seq_len >> i >= 128]
    yield from first_that_fits([(f"--seq-len {n}, for a new run", needs(replace(work, seq_len=n))) for n in lengths])
    more = []
    for n in (n for n in divisors(share * ranks) if n > ranks and n % ranks == 0):
        share_of_n = share * ranks // n
        micro_batch = max(m for m in divisors(share_of_n) if m <= work.micro_batch)
        note = ", --moments fp32, for a new run" if work.moments != "fp32" else ""
        spread = replace(in_micro_batches(micro_batch, share_of_n), moments="fp32")
        more.append((f"{n} GPUs{note}", needs(spread, Layout(n))))
    yield from first_that_fits(more)
