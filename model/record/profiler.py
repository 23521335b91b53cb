"""torch.profiler around a few training steps: traces, memory, and the tables that breakdown.py makes of them.

train.py --profile records whole steps through ``StepProfiler``: chosen steps on chosen ranks, into RUN_DIR/traces/. The
parts of the model are named spans in the trace, by hooks that exist only while profiling: outside the chosen steps
there is no hook, no span and no profiler, and a step costs one comparison of its number.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from halny.model.durable import replacing
from halny.model.record.breakdown import (
    Floors,
    breakdown,
    category_lines,
    events_of,
    gap_lines,
    kernels_of,
    operators_of,
    regions_ms,
)


class _Spans:
    """Marks the forward parts of a Mistral and the optimizer as spans, until it is closed.

    A block is attention up to the end of its Attention module, with the norm and projection before it, and MLP from
    there on; the loss is what the model does after its last norm. FSDP's own hooks stay outside of them. The backward
    needs none: autograd's nodes are named, and the trace ties each to its forward operator.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        self._open: list[record_function] = []
        self._hooks = [
            optimizer.register_step_pre_hook(lambda *_: self.enter("optimizer")),
            optimizer.register_step_post_hook(lambda *_: self.leave()),
            *self._around(model.embed, "embedding"),
            model.norm.register_forward_hook(lambda *_: self.enter("loss")),
            model.register_forward_hook(lambda *_: self.leave(), prepend=True),
        ]
        for block in model.layers:
            self._hooks += self._around(block, "attention")
            self._hooks.append(block.attention.register_forward_hook(lambda *_: self.go_on("MLP")))

    def _around(self, module: nn.Module, name: str) -> list:
        return [
            module.register_forward_pre_hook(lambda *_: self.enter(name)),
            module.register_forward_hook(lambda *_: self.leave(), prepend=True),
        ]

    def enter(self, name: str) -> None:
        self._open.append(record_function(name))
        self._open[-1].__enter__()

    def leave(self) -> None:
        self._open.pop().__exit__(None, None, None)

    def go_on(self, name: str) -> None:
        self.leave()
        self.enter(name)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


class StepProfiler:
    """torch.profiler around the steps first to last of a run, on the ranks that are chosen.

    What the loop does between them, as an evaluation, is in the trace and the times too.
    The loop calls ``begin(step)``, wraps what is not in the model in ``region(name)``, and calls ``end()`` after the
    last step. What is left in ``folder`` is whole or not there:

        steps-FIRST-LAST-rank-R.json.gz         the Chrome trace
        steps-FIRST-LAST-rank-R.txt             the tables; with ``floors``, the gaps to them first
        steps-FIRST-LAST-rank-R.memory.pickle   on a GPU, if this torch has it: every allocation, for PyTorch's viewer
    """

    HISTORY = 200_000  # allocations remembered for the memory snapshot

    def __init__(
        self, first: int, last: int, chosen: bool, folder: Path, rank: int, device: torch.device,
        floors: Floors | None = None,
    ):  # fmt: skip
        self.first, self.last, self.chosen = first, last, chosen
        self.folder, self.rank, self.device, self.floors = folder, rank, device, floors
        self._profile: profile | None = None
        self._spans: _Spans | None = None
        self._step: record_function | None = None

    def begin(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """A step begins; from the first to the last of the chosen ones everything is recorded."""
        if self.chosen and step == self.first:
            self._start(model, optimizer)
        if self._profile is not None:
            self._mark(f"step {step}")

    def region(self, name: str) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._profile is None else record_function(name)

    def _start(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(self.device)
            self._record_memory(max_entries=self.HISTORY, stacks="python")  # C++'s too: addr2line, for minutes
        self._spans = _Spans(model, optimizer)
        self._profile = profile(activities=activities)
        self._profile.start()
        self._began = time.perf_counter()

    def _mark(self, name: str | None) -> None:
        if self._step is not None:
            self._step.__exit__(None, None, None)
        self._step = record_function(name) if name else None
        if self._step is not None:
            self._step.__enter__()

    def _record_memory(self, **options) -> None:
        """Switch torch's memory history, private in every release so far, where there is one."""
        record = getattr(torch.cuda.memory, "_record_memory_history", None)
        if record is not None and hasattr(torch.cuda.memory, "_dump_snapshot"):
            record(**options)

    def end(self) -> str | None:
        """After the last step: write the files; the tables, or what went wrong. None where nothing was recorded."""
        if self._profile is None:
            return None
        self._mark(None)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        wall_ms = (time.perf_counter() - self._began) * 1e3
        profiled = self._stop()
        name = f"steps-{self.first}-{self.last}-rank-{self.rank}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(self.folder / f"{name}.json.gz") as partial:
                profiled.export_chrome_trace(str(partial))
                events = events_of(partial)
            if self.device.type == "cuda" and hasattr(torch.cuda.memory, "_dump_snapshot"):
                with replacing(self.folder / f"{name}.memory.pickle") as partial:
                    torch.cuda.memory._dump_snapshot(str(partial))
            text = self._tables(events, profiled, wall_ms) + f"\ntrace      {self.folder / name}.json.gz"
            with replacing(self.folder / f"{name}.txt") as partial:
                partial.write_text(text + "\n", encoding="utf-8")
        except (OSError, ValueError, RuntimeError) as error:  # a full disk is no reason to stop training
            return f"profile of steps {self.first} to {self.last}: {self.folder / name} could not be written: {error}"
        finally:
            if self.device.type == "cuda":
                self._record_memory(enabled=None)
        return text

    def _stop(self) -> profile:
        self._spans.close()
        self._profile.stop()
        profiled, self._profile = self._profile, None
        return profiled

    def close(self) -> None:
        """The run ends; steps that are only begun leave nothing."""
        if self._profile is not None:
            self._mark(None)
            self._stop()
            if self.device.type == "cuda":
                self._record_memory(enabled=None)

    def _tables(self, events: list[dict], profiled: profile, wall_ms: float) -> str:
        n = self.last - self.first + 1
        on_gpu = self.device.type == "cuda"
        found = breakdown(kernels_of(events) if on_gpu else operators_of(profiled), wall_ms)
        what = "kernels" if on_gpu else "operators"
        return "\n".join([
            f"profile of steps {self.first} to {self.last} on rank {self.rank}: {wall_ms / n:.2f} ms a step, more than "
            "unprofiled",
            *([" where that goes, and the gap to what it takes at least", *gap_lines(found, self.floors, n)]
              if self.floors and on_gpu else []),
            f" time by category of the {what}",
            *category_lines(found, n),
            " time by region, of the model its forward pass",
            *(f"  {name:20}{ms / n:10.2f} ms {ms / wall_ms:6.1%}" for name, ms in regions_ms(events).items()),
            f" costliest {what}",
            *(f"  {k['ms'] / n:10.2f} ms {k['ms'] / wall_ms:6.1%}{k['n'] / n:9.1f} x  {k['kernel'][:70]}"
              for k in found["kernels"][:12]),
        ])  # fmt: skip
