"""The host under a rank: what is arranged on it before the steps, and what is refused before it costs a night.

    keep_caches_here   compiled kernels on this node's own disk, not on a home that hundreds of ranks share
    check_gpu          a GPU that torch cannot use, or that a rank has none of, in one line
    check_nccl         an NCCL that may hang on Arm
    bind_to_numa_node  the process on the cores next to its GPU

Tests put other values in place of DRIVER and SYS.
"""

from __future__ import annotations

import os
import platform
import re
import tempfile
import warnings
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from halny.model.exits import Refused

if TYPE_CHECKING:
    import torch

DRIVER = Path("/proc/driver/nvidia/version")
SYS = Path("/sys")

# --------------------------------------------------------------------------------------------------------------- caches

CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "CUDA_CACHE_PATH": "cuda"}


def keep_caches_here() -> None:
    """Compiled code into this node's temporary folder, where the user has not said where. Before Triton is imported.

    The defaults of Triton and of CUDA lie in the home: there hundreds of ranks wait for each other on a network file
    system, and a home that is full or read-only would end the run.
    """
    named = set(os.environ)
    if "TRITON_HOME" in named:
        named.add("TRITON_CACHE_DIR")  # which lies in it
    with suppress(OSError):  # no temporary folder at all: the defaults are as good
        folder = _own_folder()
        os.environ |= {name: str(folder / cache) for name, cache in CACHES.items() if name not in named}


def _own_folder() -> Path:
    """Of this user alone, as whoever can write there can have a run execute anything."""
    folder = Path(tempfile.gettempdir()) / f"halny-{os.getuid()}"
    with suppress(OSError):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
        if found.st_uid == os.getuid() and not found.st_mode & 0o022 and not folder.is_symlink():
            return folder
    return Path(tempfile.mkdtemp(prefix="halny-"))


# ----------------------------------------------------------------------------------------------------------------- GPUs

NEEDS_DRIVER = {12: 525, 13: 580}  # CUDA -> NVIDIA's driver (https://docs.nvidia.com/deploy/cuda-compatibility)
NCCL_FOR_ARM = 2, 29, 3


def has_gpu() -> bool:
    """Whether torch can use a GPU; it warns of a driver that is too old, which ``check_gpu`` says better."""
    import torch

    with warnings.catch_warnings(action="ignore"):
        return torch.cuda.is_available()


def check_gpu(local_rank: int) -> None:
    """Refuse a rank without a GPU of its own, and a GPU that torch cannot use: it would train on the CPU instead."""
    import torch

    if has_gpu():
        if local_rank >= (visible := torch.cuda.device_count()):
            raise Refused(
                f"local rank {local_rank} has no GPU, {visible} can be seen here; start as many ranks on a node as it "
                "has GPUs, and let each of them see all (no --gpus-per-task, no CUDA_VISIBLE_DEVICES)"
            )
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")  # the user wants the CPU
    if hidden or torch.version.cuda is None or not (driver := driver_version()):
        return
    needed = NEEDS_DRIVER.get(int(torch.version.cuda.partition(".")[0]), 0)
    if int(driver.partition(".")[0]) < needed:
        raise Refused(f"torch {torch.__version__} is built for CUDA {torch.version.cuda}, which needs NVIDIA's driver "
            f"{needed} or later, and this host has {driver}; update the driver, or install a torch built for an older "
            "CUDA")  # fmt: skip
    try:
        torch.cuda.init()
        reason = "no device is there"
    except RuntimeError as error:
        reason = " ".join(str(error).split())
    raise Refused(f"torch cannot use the GPU of this host, which has driver {driver}: {reason}; with "
        "CUDA_VISIBLE_DEVICES=-1 the run is on the CPU")  # fmt: skip


def driver_version() -> str:
    """Of the NVIDIA driver that the kernel has loaded, "580.65.06"; "" without one."""
    with suppress(OSError):
        if found := re.search(r"Kernel Module(?: for \w+)?\s+(\d+\.[\d.]+)", DRIVER.read_text()):
            return found[1]
    return ""


def check_nccl(allowed: bool) -> str | None:
    """Refuse an NCCL that may hang on Arm, on more than one GPU; if that is ``allowed``, the line to warn with.

    Before 2.29.3, a compare-and-swap that fails for no reason, as it may on Arm, is not tried again. The release notes
    (https://github.com/NVIDIA/nccl/releases/tag/v2.29.3-1) say so of what a gcc before 10 has compiled; the wheels of
    2.28.9 and 2.29.2 were seen to hang (https://github.com/NVIDIA/nccl/issues/2353).
    """
    import torch

    version = torch.cuda.nccl.version()
    if platform.machine() not in ("aarch64", "arm64") or version >= NCCL_FOR_ARM:
        return None
    found = f"NCCL {'.'.join(map(str, version))} may hang on Arm, without a word"
    if allowed:
        return f"{found}; started all the same, as --allow-old-nccl says"
    raise Refused(f"{found}; take torch 2.12 or later, or NCCL {'.'.join(map(str, NCCL_FOR_ARM))} or later "
        "(nvidia-nccl-cu13); with --allow-old-nccl the run starts all the same")  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- NUMA


def cores_of(text: str) -> set[int]:
    """{0, 1, 2, 8} of the kernel's "0-2,8"."""
    ranges = (part.partition("-") for part in text.split(",") if part.strip())
    return {core for first, _, last in ranges for core in range(int(first), int(last or first) + 1)}


def bind_to_numa_node(device: torch.device, wanted: bool) -> str | None:
    """Keep this process, all its threads, on the cores of its GPU's NUMA node, unless its launcher has bound it.

    Its memory follows: Linux takes a page from the node of the core that touches it first. Returns what was done in
    words; None on a CPU, and on a host with one node. (torchrun's --numa-binding does the same, if numactl is there.)
    """
    nodes = {int(path.parent.name[4:]): cores_of(path.read_text())
        for path in SYS.glob("devices/system/node/node[0-9]*/cpulist")}  # fmt: skip
    nodes = {node: cores for node, cores in nodes.items() if cores}  # a GH200's GPU memory is a node without cores
    if device.type != "cuda" or len(nodes) < 2:
        return None
    home, allowed = _numa_node_of(device), os.sched_getaffinity(0)
    on = sorted(node for node, cores in nodes.items() if cores & allowed)
    if len(on) == 1:
        beside = "" if home in (*on, None) else f", while its GPU is on node {home}"
        return f"was bound to NUMA node {on[0]} by its launcher{beside}"
    if not wanted:
        return "not bound to a NUMA node (--no-numa)"
    cores = nodes.get(home, set()) & allowed
    if not cores:
        return "not bound: the NUMA node of its GPU is not known, or none of its cores is allowed"
    for thread in os.listdir("/proc/self/task"):  # torch has started some by now; later ones inherit it
        with suppress(OSError):  # one that has just ended
            os.sched_setaffinity(int(thread), cores)
    return f"bound to NUMA node {home}, that of its GPU"


def _numa_node_of(device: torch.device) -> int | None:
    import torch

    gpu = torch.cuda.get_device_properties(device)
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}.0"
    with suppress(OSError, ValueError):
        if (node := int((SYS / "bus/pci/devices" / address / "numa_node").read_text())) >= 0:
            return node
    return None
