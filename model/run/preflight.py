"""``train.py PRESET --preflight``: what these machines do, before a run is trusted to them. A minute; nothing is kept.

Measured on every rank, at the run's own sizes: the matrix product that most of a step is made of, held for some seconds
so that a GPU that throttles shows; copies in its memory and from the host's; all-gather and reduce-scatter of a layer,
inside each node and over the ranks that share a model; the links between nodes, each node with two neighbours, so that
a slow one shows as itself. Then what is either right or wrong: collectives of known numbers, versions, memory, the data
folder, and a file written as a checkpoint is. A rank or node is named with its host where it is slower than the median.

Last come the tokens/s that a GPU will train at, from the rates of the slowest, and go or no-go with the reasons.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import platform
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from halny.model.durable import folder_above, in_words
from halny.model.estimate import machines, memory, sizes, step_time
from halny.model.estimate.work import Layout, Work
from halny.model.exits import Failed
from halny.model.run.ranks import World, all_gather, check_collectives, everywhere, reduce_scatter

ROOT = Path(__file__).resolve().parents[2]  # that holds kernels/, model/ and train.py


@dataclass(frozen=True)
class Job:
    """The run that is asked about."""

    work: Work  # of a rank
    layout: Layout
    dtype: torch.dtype
    folder: Path  # the run's
    checkpoints: int  # kept at once


@dataclass(frozen=True)
class Effort:
    """How long and how large, for a device."""

    seconds: float  # of matrix products
    repeats: int  # of a collective
    copy_bytes: int
    file_bytes: int  # at most, a rank
    slow: float  # below so much of the median a rank is slow


GPU = Effort(seconds=4.0, repeats=20, copy_bytes=2**28, file_bytes=2**30, slow=0.9)
CPU = Effort(seconds=0.3, repeats=3, copy_bytes=2**23, file_bytes=2**22, slow=0.1)  # ranks share their cores

RATES = {  # name -> what it is, unit, what a unit is
    "matmul": ("matrix product, gate and up of a layer", "TFLOP/s", 1e12),
    "copy": ("copy in memory, read + written", "GB/s", 1e9),
    "from_host": ("copy from pinned host memory", "GB/s", 1e9),
    "node_gather": ("all-gather of a layer in the node", "GB/s", 1e9),
    "node_reduce": ("reduce-scatter of a layer in the node", "GB/s", 1e9),
    "link": ("to and from a neighbouring node", "GB/s", 1e9),
    "gather": ("all-gather of a layer over its shards", "GB/s", 1e9),
    "reduce": ("reduce-scatter of a layer over its shards", "GB/s", 1e9),
}


def preflight(job: Job, world: World, open_data: Callable | None, say: Callable, stage: Callable) -> bool:
    """Measure, compare, check, predict, and say so; True for go. A collective.

    open_data  opens the run's data on this rank, or raises; None where the run makes its own
    stage      is told what comes next, and may raise Failed on all ranks alike
    """
    effort = GPU if world.device.type == "cuda" else CPU
    hosts = everywhere(socket.gethostname())
    nodes = world.size // world.node_size
    say(f"preflight  {world.size} rank(s) on {nodes} node(s), {len(set(hosts))} host(s)")

    stage("measuring this device")
    rates, kept = device_rates(job, world, effort)
    stage("measuring collectives")
    rates |= collective_rates(job, world, effort)
    measured = everywhere(rates)

    against = [*slow_ranks(measured, hosts, effort), *throttled(everywhere(kept), hosts)]
    for name, (what, unit, scale) in RATES.items():
        values = [rank[name] for rank in measured if name in rank]
        if values:
            low = min(values)
            where = next(r for r, rank in enumerate(measured) if rank.get(name) == low)
            of_slowest = f", the least {low / scale:.4g} on rank {where} ({hosts[where]})" if world.size > 1 else ""
            say(f"measured   {what}: {statistics.median(values) / scale:.4g} {unit}{of_slowest}")

    for check in (wrong_collectives, other_versions, too_little_memory):
        stage(check.__name__.replace("_", " "))
        against += check(job, world, hosts, say)
    stage("reading the data")
    against += unreadable_data(open_data, world, hosts, say)
    stage("writing a file")
    against += poor_disk(job, world, hosts, effort, say)

    rate, parts = predict(job, {name: min(r[name] for r in measured if name in r) for name in measured[0]}, world)
    shares = ", ".join(f"{name} {seconds * 1e3:,.1f}" for name, seconds in parts.items())
    say(f"predicted  {rate:,.0f} tokens/s a rank, by step_time.py at the slowest rank's rates; ms a step: {shares}")
    if against:
        say("no-go\n" + "\n".join(f"  - {reason}" for reason in against))
    else:
        say("go")
    return not against


# --------------------------------------------------------------------------------------------------------- measurements


def seconds_of(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds a call of ``action``, from so many in a row; the device is waited for before and after."""
    sync = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sync()
    began = time.perf_counter()
    for _ in range(repeats):
        action()
    sync()
    return (time.perf_counter() - began) / repeats


def device_rates(job: Job, world: World, effort: Effort) -> tuple[dict[str, float], float]:
    """(this device's rates in FLOP/s and bytes/s; what the last matrix products reached, as a share of the best)."""
    device = world.device
    m, k, n = (max(256, x) for x in (job.work.tokens, job.work.config.dim, 2 * job.work.config.hidden_dim))
    a, b = (torch.randn(shape, device=device).to(job.dtype) for shape in ((m, k), (k, n)))  # not zeros: they cost less
    out = torch.empty(m, n, device=device, dtype=job.dtype)

    def multiply() -> None:
        torch.mm(a, b, out=out)

    seconds_of(multiply, device, 2)  # the first call sets up
    burst = max(1, int(effort.seconds / 20 / seconds_of(multiply, device, 2)))
    bursts = []
    began = time.perf_counter()
    while len(bursts) < 5 or time.perf_counter() - began < effort.seconds:
        bursts.append(seconds_of(multiply, device, burst))
    rates = {"matmul": 2 * m * k * n / statistics.median(bursts[len(bursts) // 2 :])}
    kept = statistics.median(bursts[:3]) / statistics.median(bursts[-3:])

    source = torch.randn(effort.copy_bytes // 4, device=device)
    target = torch.empty_like(source)
    seconds_of(lambda: target.copy_(source), device, 2)
    rates["copy"] = 2 * effort.copy_bytes / seconds_of(lambda: target.copy_(source), device, 20)
    if device.type == "cuda":
        pinned = torch.empty(effort.copy_bytes // 4, pin_memory=True)
        target.copy_(pinned, non_blocking=True)
        seconds = seconds_of(lambda: target.copy_(pinned, non_blocking=True), device, 5)
        rates["from_host"] = effort.copy_bytes / seconds
    return rates, kept


def collective_rates(job: Job, world: World, effort: Effort) -> dict[str, float]:
    """Bytes/s as nccl-tests counts them ("bus bandwidth"): a rank sends (n - 1) / n of the whole, whatever n is."""
    rates = {}
    if world.size % world.node_size == 0 and 1 < world.node_size:
        rates["node_gather"], rates["node_reduce"] = _layer_rates(job, world, effort, world.node_size)
    if world.size % world.node_size == 0 and world.size > world.node_size:
        rates["link"] = _link_rate(job, world, effort)
    if job.layout.shard == world.node_size and "node_gather" in rates:
        rates["gather"], rates["reduce"] = rates["node_gather"], rates["node_reduce"]
    elif job.layout.shard > 1:
        rates["gather"], rates["reduce"] = _layer_rates(job, world, effort, job.layout.shard)
    return rates


def _layer_rates(job: Job, world: World, effort: Effort, n: int) -> tuple[float, float]:
    """(all-gather of a layer in the compute dtype, reduce-scatter of its fp32 gradients) in groups of n neighbours."""
    group, _ = dist.new_subgroups(n) if n < world.size else (None, None)
    each = -(-sizes.layer_parameters(job.work.config) // n)
    rates = []
    for dtype, collective, out, into in (
        (job.dtype, all_gather, each * n, each),
        (torch.float32, reduce_scatter, each, each * n),
    ):
        target, source = (torch.zeros(numel, dtype=dtype, device=world.device) for numel in (out, into))

        def action(collective=collective, target=target, source=source) -> None:
            collective(target, source, group=group)

        action()  # the first makes the connections
        dist.barrier()
        seconds = seconds_of(action, world.device, effort.repeats)
        rates.append(each * (n - 1) * dtype.itemsize / seconds)
    if group is not None:
        dist.destroy_process_group(group)
    return rates[0], rates[1]


def _link_rate(job: Job, world: World, effort: Effort) -> float:
    """The better of this rank's exchanges with its counterparts on the nodes before and after: one slow node spoils
    both of its own, but only one of each neighbour's."""
    nodes, node = world.size // world.node_size, world.rank // world.node_size
    numel = sizes.layer_parameters(job.work.config)
    ours, theirs = (torch.zeros(numel, dtype=job.dtype, device=world.device) for _ in range(2))
    best = 0.0
    for first in (0, 1):
        # Pairs (0, 1), (2, 3) .., then (1, 2), (3, 4) .. and, of an even number, (last, 0); of an odd one rests.
        other = node + 1 if node % 2 == first else node - 1
        other = other % nodes if nodes % 2 == 0 else other
        dist.barrier()
        if not 0 <= other < nodes:
            continue
        peer = other * world.node_size + world.rank % world.node_size

        def exchange(peer=peer) -> None:
            ways = [dist.P2POp(dist.isend, ours, peer), dist.P2POp(dist.irecv, theirs, peer)]
            for work in dist.batch_isend_irecv(ways):
                work.wait()

        exchange()
        seconds = seconds_of(exchange, world.device, effort.repeats)
        best = max(best, numel * job.dtype.itemsize / seconds)
    return best


def slow_ranks(measured: list[dict[str, float]], hosts: list[str], effort: Effort) -> list[str]:
    """The ranks whose own rates are below their median; all of a group are as slow as its slowest, so not those."""
    reasons = []
    for name in ("matmul", "copy", "from_host", "node_gather", "node_reduce", "link"):
        what, unit, scale = RATES[name]
        values = {rank: rates[name] for rank, rates in enumerate(measured) if rates.get(name)}
        usual = statistics.median_high(values.values()) if values else 0.0
        slow = [rank for rank, value in values.items() if value < effort.slow * usual]
        for rank in slow[:8]:
            reasons.append(f"rank {rank} on {hosts[rank]} is slow: {what} {values[rank] / scale:.4g} {unit}, "
                f"the median is {usual / scale:.4g}")  # fmt: skip
        if len(slow) > 8:
            reasons.append(f"and {len(slow) - 8} more are slow in that")
    return reasons


def throttled(kept: list[float], hosts: list[str]) -> list[str]:
    """Ranks whose last matrix products were clearly slower than their first."""
    limit = 0.85 if torch.cuda.is_available() else 0.0  # a core that others use too is no throttled one
    return [
        f"rank {rank} on {hosts[rank]} throttles: within seconds its matrix products fall to {share:.0%}"
        for rank, share in enumerate(kept)
        if share < limit
    ]


# ------------------------------------------------------------------------------------------------------- right or wrong


def wrong_collectives(_job: Job, world: World, _hosts: list[str], say: Callable) -> list[str]:
    try:
        check_collectives(world)
    except Failed as failure:
        return [str(failure)]
    say("checked    all-reduce, all-gather and reduce-scatter of known numbers are right")
    return []


def other_versions(_job: Job, _world: World, hosts: list[str], say: Callable) -> list[str]:
    """What differs between ranks of the software, or of the kind of device."""
    everyone = everywhere(versions())
    reasons = []
    for name in everyone[0]:
        values = [one.get(name) for one in everyone]
        usual = statistics.mode(values)
        if odd := [rank for rank, value in enumerate(values) if value != usual]:
            named = ", ".join(f"rank {rank} ({hosts[rank]}) {values[rank]}" for rank in odd[:4])
            reasons.append(f"{name} is {usual}, but on {named}" + (" and others" if len(odd) > 4 else ""))
    if not reasons:
        say("checked    versions: " + ", ".join(f"{name} {value}" for name, value in everyone[0].items()))
    return reasons


def versions() -> dict[str, str]:
    """Of what a rank's numbers and speed depend on; "code" is a checksum of this repository's own."""
    found = {"Python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    with contextlib.suppress(ImportError):
        import triton

        found["triton"] = triton.__version__
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        found["device"] = torch.cuda.get_device_name().replace(" ", "_")
    found["code"] = hashlib.sha256(b"".join(path.read_bytes() for path in sources(ROOT))).hexdigest()[:12]
    return found


def sources(root: Path) -> list[Path]:
    """Every file of ours that a run may execute, whatever its folder, in one order on all machines."""
    return sorted([*(root / "kernels").rglob("*.py"), *(root / "model").rglob("*.py"), *root.glob("train.py")])


def too_little_memory(job: Job, world: World, hosts: list[str], say: Callable) -> list[str]:
    needed = sum(memory.rank_memory(job.work, job.layout).values())
    free = None
    if world.device.type == "cuda":
        torch.cuda.empty_cache()  # what the measurements used
        free = torch.cuda.mem_get_info(world.device)[0]
    free = everywhere(free)
    if free[0] is None:
        say(f"checked    memory: about {in_words(needed)} a rank; that of a CPU is not looked at")
        return []
    least = min(range(world.size), key=lambda rank: free[rank])
    room = memory.room(free[least])
    say(f"checked    memory: about {in_words(needed)} a rank of {in_words(free[least])} free")
    if needed <= room:
        return []
    return [f"the step needs about {in_words(needed)}, and rank {least} on {hosts[least]} has {in_words(room)} for it; "
        "lower --micro-batch, or use more ranks"
        + (", or --moments 8bit" if world.size == 1 and job.work.moments != "8bit" else "")]  # fmt: skip


def unreadable_data(open_data: Callable | None, world: World, hosts: list[str], say: Callable) -> list[str]:
    """Every rank opens the data; together they read all of it and compare checksums."""
    if open_data is None:
        say("checked    data: none named, the run would prepare its own")
        return []
    began, problem, corpus = time.perf_counter(), None, None
    try:
        corpus = open_data()
    except Exception as error:
        problem = f"cannot open the data: {' '.join(str(error).split())}"
    if not any(everywhere(problem)):
        try:
            corpus.verify(world.rank, world.size)
        except Exception as error:
            problem = f"cannot read the data: {' '.join(str(error).split())}"
    problems = everywhere(problem)
    reasons = [f"rank {rank} on {hosts[rank]} {text}" for rank, text in enumerate(problems) if text]
    if not reasons:
        say(f"checked    data: opened on all ranks, every checksum right, in {time.perf_counter() - began:.1f} s")
    return reasons[:8]


def poor_disk(job: Job, world: World, hosts: list[str], effort: Effort, say: Callable) -> list[str]:
    """Every rank writes and syncs a file where the run's checkpoints will lie; rank 0 must find them all."""
    total = memory.checkpoint_bytes(job.work.config, job.work.moments)
    export = 2 * sizes.parameters(job.work.config)
    existing = folder_above(job.folder)
    folder, problem = None, None
    if world.is_main:
        try:
            folder = Path(tempfile.mkdtemp(prefix=".preflight-", dir=existing))
        except OSError as error:
            problem = f"cannot write to {existing}: {error.strerror}"
    folder, problem = everywhere((folder, problem))[0]
    if problem:
        return [f"rank 0 on {hosts[0]} {problem}"]
    size = min(effort.file_bytes, -(-total // world.size))
    began, written, block = time.perf_counter(), 0, os.urandom(min(size, 2**22))  # noise: some file systems compress
    try:
        with open(folder / str(world.rank), "wb") as file:
            while written < size:
                written += file.write(block[: size - written])
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        problem = f"cannot write to {folder}, which rank 0 made: {error.strerror}"
    seconds = max(everywhere(time.perf_counter() - began))
    problems = everywhere(problem)
    missing = []
    if world.is_main:
        missing = [r for r in range(world.size) if problems[r] is None and not (folder / str(r)).exists()]
        shutil.rmtree(folder, ignore_errors=True)
    missing = everywhere(missing)[0]
    if not world.is_main and folder.exists() and world.rank in missing:
        shutil.rmtree(folder, ignore_errors=True)  # a folder of this host alone
    reasons = [f"rank {rank} on {hosts[rank]} {text}" for rank, text in enumerate(problems) if text]
    reasons += [f"rank {rank} on {hosts[rank]} writes to another {existing} than rank 0" for rank in missing]

    rate = size * world.size / seconds
    free = everywhere(shutil.disk_usage(existing).free)[0]
    needed = (job.checkpoints + 1) * total + export  # those kept and the one being written
    if not reasons:
        say(f"checked    disk: {rate / 1e9:,.2f} GB/s from all ranks, {total / rate:,.1f} s for a checkpoint of "
            f"{in_words(total)}; {in_words(free)} free, {in_words(needed)} needed")  # fmt: skip
    if free < needed:
        reasons.append(f"{existing} has {in_words(free)} free, and {job.checkpoints} checkpoints kept, one being "
            f"written and the export take {in_words(needed)}")  # fmt: skip
    return reasons[:8]


# ----------------------------------------------------------------------------------------------------------- prediction


def predict(job: Job, rates: dict[str, float], world: World) -> tuple[float, dict[str, float]]:
    """(tokens/s a rank, seconds of a step by part): step_time.py's step, with measured rates for data sheets.

    Measured are matrix products, memory and the network; attention is taken to be as much slower than the products, and
    gaps and straggling as large, as in the rates that step_time.py calls good. Where nothing overlaps, as on a CPU, all
    communication counts.
    """
    good, n = step_time.RATES["good"], job.layout.shard
    node = world.node_size if world.size % world.node_size == 0 else 1
    nvlink = rates.get("node_gather", math.inf)
    nic = rates.get("link", math.inf)
    if n > node and "gather" in rates:
        nic = rates["gather"] / node  # a ring over nodes leaves each by one GPU, and all NICs of a node share it
    gpu = machines.GPU(rates["matmul"], rates["copy"], 0)
    cluster = step_time.Cluster(gpu, world.size, node, nvlink / step_time.NVLINK_SHARE, nic / step_time.NIC_SHARE)
    work = job.work
    reached = replace(good, matmul=1.0, attention=good.attention / good.matmul, memory=1.0)
    step = step_time.step(work, cluster, job.layout, reached)
    parts = {name.replace("_", " "): seconds for name, seconds in asdict(step).items()}
    hidden = parts.pop("hidden")
    if world.device.type == "cpu":
        parts["exposed"] += hidden
    return work.accumulation * work.tokens / sum(parts.values()), parts
