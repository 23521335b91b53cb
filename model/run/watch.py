"""Who is late: a watch over every rank's progress that ends a run which hangs, and a probe that finds slow ranks.

Each rank has a thread, ``Watch``, that publishes every two seconds where its main thread is; the main thread must come
further within a deadline. Where it does not, every rank's thread reads what the others last said, names the rank and
host that is silent (killed, stopped, its node gone) or behind, and ends the process. So a rank that hangs costs one
deadline, and the message says which one it was, whatever it hung in: a collective, a file system, a GPU.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from halny.model.durable import replacing
from halny.model.exits import FAILED
from halny.model.run.ranks import LONG_PHASE, World

PERIOD = 2.0  # seconds between two lines of a rank in the store
DYING = 10.0  # seconds after a stop was asked for in which the main thread must come further, if a rank is gone


class Watch:
    """A thread on each rank that ends the process if the main thread does not come further, and says whose fault it is.

    The main thread calls ``at(phase)`` whenever it gets somewhere and sets ``done``, the last step that is complete.
    ``probe`` takes the duration of work that no other rank can slow down, by which rank 0 finds the slowest.
    ``on_failure(reason)`` is called on the first rank that still answers, before all exit with FAILED; it must not need
    the main thread.
    """

    def __init__(self, world: World, deadline: float, folder: Path, on_failure: Callable[[str], None]):
        self.world, self.deadline, self.folder, self.on_failure = world, deadline, folder, on_failure
        self.done = 0
        self.writes_heartbeat = False  # set when the run has begun: one that is refused writes nothing
        self.stop_asked_at: float | None = None
        self.slowest: dict | None = None  # on rank 0: the last comparison of probes
        self._me = {"rank": world.rank, "host": socket.gethostname(), "pid": os.getpid()}
        self._beat = 0
        self._probes: list[float] = []
        self._store = self._connect()
        self.at("start-up", long=True)
        threading.Thread(target=self._run, daemon=True, name="watch").start()

    def _connect(self) -> dist.Store | None:
        """A connection of its own to torchrun's store, since the main thread may be waiting in the other; or None."""
        if self.world.size == 1:
            return None
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30))
        return dist.PrefixStore(f"watch/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)

    def at(self, phase: str, step: int | None = None, long: bool = False) -> None:
        """The main thread begins ``phase`` (of a step), and must begin another within the deadline."""
        limit = self.deadline * (LONG_PHASE if long else 1)
        step = self.done if step is None else step
        self._place = {"phase": phase, "step": step, "since": time.monotonic(), "limit": limit}

    @property
    def phase(self) -> str:
        return self._place["phase"]

    def probe(self, seconds: float | None) -> None:
        if seconds is not None:
            self._probes = [*self._probes[-31:], seconds]

    def verdict(self, what: str) -> tuple[str, bool]:
        """(what happened, where, and which ranks are to blame; whether this rank is the one to say it). Takes 6 s."""
        place = self._place
        try:
            silent, lines = self._silent(), self._lines()
        except RuntimeError:
            silent, lines = [], {self.world.rank: self._me | place}
            what += "; the store of the rendezvous does not answer, its host may be gone"
        gone = {line["rank"] for line in silent}
        alive = [line for rank, line in lines.items() if rank not in gone]
        blamed, how = (
            (silent, "silent since {phase} {step}") if silent else (_behind(alive), "behind, in {phase} {step}")
        )
        if not blamed:
            blamed, how = _rarest(alive, "where"), "in {where}"
        at_fault = [f"rank {o['rank']} on {o['host']} is {how.format(**o)}" for o in blamed]
        whose = "; ".join(at_fault[:8]) or "all ranks are in the same place"
        speaks = self.world.rank == min((line["rank"] for line in alive), default=self.world.rank)
        return f"{what} in {place['phase']} {place['step']}: {whose}", speaks

    # --- the thread

    def _run(self) -> None:
        slept_until = time.monotonic()
        while True:
            now = time.monotonic()
            if (stopped := now - slept_until) > PERIOD:  # this whole process was: its clock stood still
                self._place = self._place | {"since": self._place["since"] + stopped}
            place = self._place
            if now - place["since"] > place["limit"]:
                self._end(f"no progress for {now - place['since']:.0f} s")
            # When a rank has died torchrun asks the others to stop; under NCCL they would wait for it until killed.
            asked = self.stop_asked_at
            if asked is not None and place["since"] < asked and now - asked > DYING and self._silent():
                self._end("asked to stop")
            self._publish()
            slept_until = time.monotonic() + PERIOD
            time.sleep(PERIOD)

    def _publish(self) -> None:
        self._beat += 1
        line = self._me | self._place | {"beat": self._beat, "where": _where_main_thread_is()}
        line["probe"] = statistics.median(self._probes) if self._probes else None
        if self._store is not None:
            try:
                self._store.set(str(self.world.rank), json.dumps(line))
            except RuntimeError:  # the store died with its host: torchrun or the deadline ends this
                return
        if self.writes_heartbeat and self._beat % 5 == 1:
            self._compare_ranks()

    def _lines(self) -> dict[int, dict]:
        """What each rank last published, by rank; those that never did are absent."""
        if self._store is None:
            return {0: self._me | self._place | {"probe": None}}
        heard = [rank for rank in range(self.world.size) if self._store.check([str(rank)])]
        return {rank: json.loads(self._store.get(str(rank))) for rank in heard}

    def _silent(self) -> list[dict]:
        """The last lines of the ranks that publish nothing over three periods."""
        if self._store is None:
            return []
        before = self._lines()
        for _ in range(3):  # publishing on, or the others would find this rank silent
            self._publish()
            time.sleep(PERIOD)
        after = self._lines()
        never = {"host": "a host that never reported", "phase": "start-up", "step": 0}
        others = [rank for rank in range(self.world.size) if rank != self.world.rank]
        return [never | {"rank": r} | after.get(r, {}) for r in others if before.get(r) == after.get(r)]

    def _end(self, what: str) -> NoReturn:
        self._dump_stacks()
        reason, speaks = self.verdict(what)
        if speaks:
            print(f"train.py: stopped: {reason}", file=sys.stderr, flush=True)
            self.on_failure(reason)
        else:
            time.sleep(2 * PERIOD)  # torchrun ends all when the first one exits: let that one write its reason
        os._exit(FAILED)

    def _dump_stacks(self) -> None:
        """Every thread's stack, for whoever looks for the cause."""
        try:
            folder = self.folder / "stacks"
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"rank-{self.world.rank:05d}.txt", "w") as file:
                faulthandler.dump_traceback(file)
        except OSError:
            faulthandler.dump_traceback()

    def _compare_ranks(self) -> None:
        """On rank 0: find the rank that is slowest in work of its own, and write heartbeat.json, where the run is."""
        try:
            lines = self._lines()
        except RuntimeError:
            return
        probes = {rank: line["probe"] for rank, line in lines.items() if line["probe"]}
        if probes:
            rank = max(probes, key=probes.get)
            usual = statistics.median(probes.values())
            self.slowest = {"rank": rank, "host": lines[rank]["host"], "seconds": probes[rank], "median": usual}
        place = self._place
        beat = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "phase": place["phase"],
            "step": place["step"],
            "seconds_in_phase": round(time.monotonic() - place["since"], 1),
            "ranks_heard": len(lines),
            "slowest_rank": self.slowest,
        }
        with contextlib.suppress(OSError), replacing(self.folder / "heartbeat.json") as partial:
            partial.write_text(json.dumps(beat, indent=1) + "\n")  # a full disk is for the checkpoint to report


def _behind(lines: list[dict]) -> list[dict]:
    """The ranks that the others seem to wait for: at the lowest step, in the rarest phase there; none if all agree."""
    step = min(line["step"] for line in lines)
    late = [line for line in lines if line["step"] == step]
    return _rarest(late, "phase") or (late if len(late) < len(lines) else [])


def _rarest(lines: list[dict], key: str) -> list[dict]:
    """The lines with the rarest value of a key; none if all have one value."""
    values = [line.get(key) for line in lines]
    rarest = min(map(values.count, values))
    return [line for line in lines if values.count(line.get(key)) == rarest] if len(set(values)) > 1 else []


def _where_main_thread_is() -> str:
    """Innermost Python function of the main thread, and the line of train.py it was called from."""
    frame = sys._current_frames().get(threading.main_thread().ident)
    if frame is None:
        return "nowhere"
    inner = frame.f_code
    while frame.f_back is not None and Path(frame.f_code.co_filename).name != "train.py":
        frame = frame.f_back
    return f"{inner.co_name} ({Path(inner.co_filename).name}), called from {frame.f_code.co_name}:{frame.f_lineno}"


class Probe:
    """The time that a fixed matrix product takes on this rank's device: work that no other rank can slow down.

    Begun every ``EVERY``-th step, read later, without waiting. A GPU that is throttled, or a core that another process
    takes away, shows here, and shows as itself: the step's own time is the same on all ranks, that of the slowest.
    """

    EVERY = 8

    def __init__(self, device: torch.device):
        n, dtype = self._size(device), torch.bfloat16 if device.type == "cuda" else torch.float32
        self._x = torch.randn(n, n, device=device, generator=torch.Generator(device).manual_seed(0)).to(dtype)
        self._out = torch.empty_like(self._x)
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else None
        self._seconds: float | None = None
        self._calls, self._pending = 0, False

    @staticmethod
    def _size(device: torch.device) -> int:
        return 4096 if device.type == "cuda" else 256

    @classmethod
    def flops(cls, device: torch.device) -> int:
        """Of the product."""
        return 2 * cls._size(device) ** 3

    def begin(self) -> None:
        self._calls += 1
        if self._calls % self.EVERY or self._pending:
            return
        if self._events is None:
            began = time.perf_counter()
            torch.mm(self._x, self._x, out=self._out)
            self._seconds = time.perf_counter() - began
            return
        self._events[0].record()
        torch.mm(self._x, self._x, out=self._out)
        self._events[1].record()
        self._pending = True

    def seconds(self) -> float | None:
        """The duration of the last one that is over, once; else None."""
        if self._pending and self._events[1].query():
            self._seconds, self._pending = self._events[0].elapsed_time(self._events[1]) / 1e3, False
        seconds, self._seconds = self._seconds, None
        return seconds
