"""What the ranks of a run do together on the CPU: join, agree, and test the wires.

Whatever all ranks must do alike (refuse, load, save, stop) is agreed over gloo, never over the GPU: a queue of kernels
is no place to wait in. And no wait is for ever: watch.py sees to that.
"""

from __future__ import annotations

import contextlib
import functools
import os
import secrets
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from tqdm import tqdm

from halny.model.durable import in_its_words
from halny.model.exits import DataLost, Failed, Refused
from halny.model.run.host import bind_to_numa_node, check_gpu, check_nccl, has_gpu

PATIENCE_S = 10.0  # in which a network file system must show what another host has written
LONG_PHASE = 6  # reading, writing and verifying whole models may take so many deadlines


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh  # of one dimension, all ranks
    node_size: int = 1  # ranks on this host

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def device_name(self) -> str:
        """As its driver calls the GPU."""
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"

    @property
    def memory_bytes(self) -> int | None:
        """The whole memory of this GPU; None on a CPU."""
        return torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else None


def start_distributed(deadline: float) -> World:
    """NCCL for tensors on GPUs and gloo for the rest; without torchrun, a world of one process.

    The back ends' own timeouts lie beyond the longest deadline of ``Watch``, which can say more than they can.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device, backend = torch.device("cpu"), "gloo"
    if has_gpu():
        device, backend = torch.device("cuda", local_rank), "cpu:gloo,cuda:nccl"
        if local_rank < torch.cuda.device_count():
            torch.cuda.set_device(device)
    timeout = timedelta(seconds=LONG_PHASE * deadline + 120)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout, store=dist.HashStore(), rank=0, world_size=1)
    agreed(check_gpu, local_rank)  # now that all ranks hear of it
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    node_size = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return World(dist.get_rank(), dist.get_world_size(), device, mesh, node_size)


def settle_on_host(world: World, numa: bool, allow_old_nccl: bool) -> list[str]:
    """What host.py checks and arranges once a rank knows its GPU, and the lines to say of it. A collective."""
    if world.device.type != "cuda":
        return []
    warning = agreed(check_nccl, allow_old_nccl) if world.size > 1 else None
    bound = Counter(filter(None, everywhere(bind_to_numa_node(world.device, numa))))
    return [
        *([f"warning    {warning}"] if warning else []),
        *(f"numa       {n} rank(s) {done}" for done, n in sorted(bound.items())),
        f"caches     compiled kernels in {os.environ.get('TRITON_CACHE_DIR', 'their default folder')} of each node",
    ]


# ------------------------------------------------------------------------------------------------------------ agreement


def everywhere(value, group: dist.ProcessGroup | None = None) -> list:
    """Every rank's ``value``, in order of rank (any small Python object)."""
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def anywhere(value):
    """The first rank's ``value`` that is none of None, 0 and empty; None where no rank has one. A collective."""
    return next(filter(None, everywhere(value)), None)


def ask_everywhere(*questions: bool) -> tuple[Tensor, dist.Work]:
    """Ask, on the CPU and without waiting, whether any rank says yes: int32, one 0 or 1 a question."""
    answers = torch.tensor(questions, dtype=torch.int32)
    return answers, dist.all_reduce(answers, dist.ReduceOp.MAX, async_op=True)


def first_missed(problem: Exception | None) -> DataLost:
    """What all ranks raise where some could not read their data: the ``problem`` of the first. A collective."""
    where = f"rank {dist.get_rank()} on {socket.gethostname()}"
    return DataLost(anywhere(problem and f"{where}: {problem}"))


def agreed(check: Callable, *arguments):
    """``check(*arguments)`` on every rank; if it refuses on any, all ranks refuse, with the first one's message.

    Where it is not the same on all, as of a folder that one node lacks, that rank and its host are named.
    """
    result, problem = _tried(check, *arguments)
    problems = everywhere(problem)
    if not any(problems):
        return result
    if len(set(problems)) == 1:
        raise Refused(problem)
    hosts, refusing = everywhere(socket.gethostname()), [rank for rank, text in enumerate(problems) if text]
    others = f" and {len(refusing) - 1} other(s) of {len(problems)}" if len(refusing) > 1 else ""
    raise Refused(f"rank {refusing[0]} on {hosts[refusing[0]]}{others}: {problems[refusing[0]]}")


def on_main(world: World, action: Callable, *arguments):
    """``action(*arguments)`` on rank 0 while the others wait; its result, or its refusal, on all of them."""
    result, problem = everywhere(_tried(action, *arguments) if world.is_main else None)[0]
    if problem is not None:
        raise Refused(problem)
    return result


def _tried(check: Callable, *arguments) -> tuple[object, str | None]:
    """Its result, or why it refuses."""
    result = problem = None
    try:
        result = check(*arguments)
    except (Refused, ValueError) as error:
        problem = str(error)
    except OSError as error:
        problem = f"{error.filename or 'input'}: {in_its_words(error)}"
    return result, problem


# -------------------------------------------------------------------------------------------------------- known answers

# torch 2.13 renamed them and warns of the old names; 2.11 has only those.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def check_collectives(world: World, numel: int = 2**20) -> None:
    """All-reduce, all-gather and reduce-scatter of numbers whose results are known, on the device that trains.

    Whole numbers small enough to be exact in fp32 in any order. Raises Failed, naming collective and rank: wrong bytes
    from a network library have been seen (NCCL on Slingshot, https://github.com/NVIDIA/nccl/issues/2001), and nothing
    later would notice.
    """
    rank, size = world.rank, world.size
    each = -(-numel // size)

    def pattern(of_rank: int, length: int) -> Tensor:
        return (torch.arange(length, device=world.device) % 251 + of_rank % 16).float()

    reduced = pattern(rank, numel)
    dist.all_reduce(reduced)
    offsets = sum(r % 16 for r in range(size))
    sums = pattern(0, each * size) * size + offsets

    gathered = torch.empty(each * size, device=world.device)
    all_gather(gathered, pattern(rank, each))
    scattered = torch.empty(each, device=world.device)
    reduce_scatter(scattered, pattern(rank, each * size))

    right = {
        "all-reduce": torch.equal(reduced, sums[:numel]),
        "all-gather": torch.equal(gathered, torch.cat([pattern(r, each) for r in range(size)])),
        "reduce-scatter": torch.equal(scattered, sums[rank * each : (rank + 1) * each]),
    }
    wrong = [(name, at) for name, fine in right.items() for at, good in enumerate(everywhere(fine)) if not good]
    if wrong:
        name, at = wrong[0]
        raise Failed(f"{name} of known numbers came out wrong on rank {at} ({everywhere(socket.gethostname())[at]}); "
            "change the network library or its settings, or leave that node out")  # fmt: skip


def check_shared_folder(folder: Path, world: World) -> None:
    """Refuse a --run-dir that is another folder for some rank than for rank 0, naming rank and host; a collective.

    Every rank writes a token into it and reads that of rank 0, and rank 0 reads all. A disk of each node, or a mount
    that one of them lacks, would only be found out by the first checkpoint, some hundred steps later.
    """
    if world.size == 1:
        return
    token = everywhere(secrets.token_hex(8))[0]
    files = [folder / f".token-{rank}-{token}" for rank in range(world.size)]
    deadline = time.monotonic() + PATIENCE_S

    def why_not(action: Callable) -> str | None:
        """Why ``action`` fails, however often it is tried; None where it does not."""
        while True:
            try:
                return action()
            except OSError as error:
                if time.monotonic() > deadline:
                    return in_its_words(error)
            with contextlib.suppress(OSError):
                os.listdir(folder.parent)  # NFS asks its server anew
            time.sleep(0.1)

    def write() -> None:
        files[world.rank].write_text(token)

    def read(rank: int) -> None:
        if files[rank].read_text() != token:
            raise OSError(f"{files[rank].name} holds something else")

    lost = everywhere(why_not(write))
    lost = everywhere(lost[world.rank] or why_not(functools.partial(read, 0)))
    if world.is_main:
        lost = [reason or why_not(functools.partial(read, rank)) for rank, reason in enumerate(lost)]
    lost = {rank: reason for rank, reason in enumerate(everywhere(lost)[0]) if reason}
    with contextlib.suppress(OSError):
        files[world.rank].unlink()
    if lost:
        hosts, rank = everywhere(socket.gethostname()), min(lost)
        others = f" and {len(lost) - 1} other(s)" if len(lost) > 1 else ""
        raise Refused(f"--run-dir {folder}: rank {rank} on {hosts[rank]}{others} does not see there what rank 0 on "
            f"{hosts[0]} does ({lost[rank]}); name a folder on a file system that all nodes share")  # fmt: skip


def check_same_weights(module: nn.Module, name: str, world: World) -> None:
    """Gather an FSDP2 module and compare a checksum of its weights over the ranks: all must hold the same bits.

    Raises Failed, naming the ranks in the minority: a wrong all-gather, or replicas that drifted apart.
    """
    module.unshard()
    total = torch.zeros((), dtype=torch.int64, device=world.device)
    for p in module.parameters():
        bits = p.detach().view({2: torch.int16, 4: torch.int32}[p.element_size()])
        rows = bits.view(len(bits), -1).sum(1, dtype=torch.int64)
        total += (rows * torch.arange(1, len(rows) + 1, device=world.device)).sum()  # weighted: order matters
    module.reshard()
    sums = everywhere(int(total))
    usual = statistics.mode(sums)
    if odd := [rank for rank, value in enumerate(sums) if value != usual]:
        hosts = everywhere(socket.gethostname())
        named = ", ".join(f"rank {rank} ({hosts[rank]})" for rank in odd[:8])
        raise Failed(f"the gathered weights of {name} differ between ranks: {named} against the rest")


def say(world: World, text: str) -> None:
    """A line of the log, from rank 0, above the bar if there is one."""
    if world.is_main:
        with contextlib.suppress(OSError):  # a reader that left ("| head"), a full disk: no reason to stop training
            tqdm.write(text)
            sys.stdout.flush()
