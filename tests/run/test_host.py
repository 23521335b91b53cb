"""The host under a rank, faked: old drivers and libraries, caches, NUMA nodes, pages of 64 kB, folders of one node.

``python -m pytest tests/run/test_host.py -s -k table`` prints the line that each platform gives.
"""

import mmap
import os
import shutil
import signal
import socket
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from runs import REPO, SMALL, ranks_run, run

from halny.model.data.stream import FileArray
from halny.model.data.writer import write_dataset
from halny.model.exits import REFUSED, Refused
from halny.model.run import host, rank_process

HOST = socket.gethostname()
COMMAND = [*SMALL, "--steps", 2, "--eval-every", 0, "--run-dir", "r"]
MODULES = {
    "570.124.06": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb 26 02:13:52 UTC 2025\n",
    "580.65.06": "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  580.65.06  Release Build  (dvs@builder)\n",
}


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A host of that architecture, with GPUs, a CUDA build of torch, an NCCL and a driver; returns what tells more."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def pretend(arch="x86_64", nccl=(2, 29, 7), driver="580.65.06", usable=True, gpus=4, numa_node=1):
        monkeypatch.setattr(host.platform, "machine", lambda: arch)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch, "__version__", "2.11.0+cu130")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus if usable else 0)
        monkeypatch.setattr(torch.cuda.nccl, "version", lambda: nccl)
        gpu = types.SimpleNamespace(pci_domain_id=9, pci_bus_id=1, pci_device_id=0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
        monkeypatch.setattr(host, "DRIVER", tmp_path / "version")
        host.DRIVER.write_text(MODULES[driver])
        address = tmp_path / "bus/pci/devices/0009:01:00.0"
        address.mkdir(parents=True, exist_ok=True)
        (address / "numa_node").write_text(f"{numa_node}\n")
        monkeypatch.setattr(host, "SYS", tmp_path)

    return pretend


def refusal(check, *arguments) -> str:
    with pytest.raises(Refused) as refused:
        check(*arguments)
    return str(refused.value)


# ------------------------------------------------------------------------------------------------------------ the table


def test_the_table_of_platforms(machine, small, tmp_path):
    """What each gives, in one line that names the value and the remedy."""
    table = {}
    machine(arch="aarch64", nccl=(2, 28, 9))
    table["aarch64, NCCL 2.28.9"] = refusal(host.check_nccl, False)
    table["the same, --allow-old-nccl"] = host.check_nccl(True)
    machine(driver="570.124.06", usable=False)
    table["driver 570, torch for CUDA 13"] = refusal(host.check_gpu, 0)
    machine(gpus=4)
    table["a fifth rank on four GPUs"] = refusal(host.check_gpu, 4)
    read_only = run(*COMMAND, "--data", small, cwd=tmp_path, env={"HOME": "/proc/self"})
    table["HOME read-only"] = read_only.stdout.splitlines()[-1]
    shutil.rmtree(tmp_path / "r")
    fault = ("another_folder", "1", "0.3")
    apart = ranks_run(*COMMAND, "--data", small, ranks=2, cwd=tmp_path, fault=fault, codes=[2, 2])
    table["a run folder of rank 1's own"] = apart.err.strip()
    print(*(f"\n{platform}\n    {line}" for platform, line in table.items()), sep="")

    for platform, words in {
        "aarch64, NCCL 2.28.9": ("2.28.9", "torch 2.12", "2.29.3", "--allow-old-nccl"),
        "the same, --allow-old-nccl": ("2.28.9", "may hang"),
        "driver 570, torch for CUDA 13": ("2.11.0+cu130", "580 or later", "570.124.06", "update the driver"),
        "a fifth rank on four GPUs": ("local rank 4", "4 can be seen"),
        "HOME read-only": ("time ", "since this start"),
        "a run folder of rank 1's own": (f"rank 1 on {HOST}", f"rank 0 on {HOST}", "--run-dir r", "all nodes share"),
    }.items():
        for word in words:
            assert word in table[platform], (platform, table[platform])
        assert "\n" not in table[platform]


# ----------------------------------------------------------------------------------------------------- drivers and NCCL


def test_a_new_nccl_and_any_on_x86_are_fine(machine):
    for arch, nccl in (("aarch64", (2, 29, 3)), ("aarch64", (2, 30, 0)), ("x86_64", (2, 28, 9))):
        machine(arch=arch, nccl=nccl)
        assert host.check_nccl(False) is None


def test_a_new_driver_whose_gpu_does_not_start_says_why(machine, monkeypatch):
    machine(usable=False)

    def init():
        raise RuntimeError("Unexpected error from cudaGetDeviceCount(). Error 802:\n system not yet initialized")

    monkeypatch.setattr(torch.cuda, "init", init)
    text = refusal(host.check_gpu, 0)
    assert "580.65.06" in text and "802: system not yet initialized" in text and "CUDA_VISIBLE_DEVICES=-1" in text


def test_the_cpu_is_used_where_it_is_wanted(machine, monkeypatch):
    machine(driver="570.124.06", usable=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    host.check_gpu(0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    host.DRIVER.unlink()
    host.check_gpu(0)


@pytest.mark.parametrize("version", MODULES)
def test_both_kinds_of_kernel_modules_tell_their_version(machine, version):
    machine(driver=version)
    assert host.driver_version() == version


# --------------------------------------------------------------------------------------------------------------- caches


def caches(**environment) -> list[str]:
    """The folders of Triton, as it sees it itself, Inductor and CUDA in a process that begins so."""
    program = (
        "from halny.model.run.host import keep_caches_here\nkeep_caches_here()\nimport os, triton\n"
        "print(triton.knobs.cache.dir, os.environ.get('TORCHINDUCTOR_CACHE_DIR'), os.environ['CUDA_CACHE_PATH'])"
    )
    cleared = {k: v for k, v in os.environ.items() if k not in (*host.CACHES, "TRITON_HOME")}
    command = [sys.executable, "-c", program]
    out = subprocess.run(command, env=cleared | environment, cwd=REPO, capture_output=True, text=True, check=True)
    return out.stdout.split()


def test_compiled_kernels_stay_on_the_node(tmp_path):
    folder = tmp_path / f"halny-{os.getuid()}"
    found = caches(TMPDIR=str(tmp_path), HOME="/proc/self")
    assert found == [str(folder / name) for name in ("triton", "inductor", "cuda")]
    assert folder.stat().st_mode & 0o777 == 0o700


def test_what_the_user_has_set_is_kept(tmp_path):
    found = caches(TMPDIR=str(tmp_path), TRITON_CACHE_DIR="/mine", CUDA_CACHE_PATH="/too")
    assert found == ["/mine", str(tmp_path / f"halny-{os.getuid()}/inductor"), "/too"]
    assert caches(TMPDIR=str(tmp_path), TRITON_HOME="/home-of-triton")[0] == "/home-of-triton/.triton/cache"


def test_a_folder_that_others_can_write_is_not_trusted(tmp_path):
    (tmp_path / f"halny-{os.getuid()}").mkdir(mode=0o777)
    (tmp_path / f"halny-{os.getuid()}").chmod(0o777)
    [triton, *_] = caches(TMPDIR=str(tmp_path))
    assert triton.startswith(f"{tmp_path}/halny-") and not triton.startswith(f"{tmp_path}/halny-{os.getuid()}/")


# ----------------------------------------------------------------------------------------------------------------- NUMA


@pytest.fixture
def nodes(machine, monkeypatch, tmp_path):
    """Nodes with these cores, a GPU on the second; ``bind`` returns what is said and the cores that the process has."""

    def bind(*cores: str, allowed: set[int], wanted=True, gpu=1, kind="cuda"):
        machine(numa_node=gpu)
        for node, text in enumerate(cores):
            folder = tmp_path / f"devices/system/node/node{node}"
            folder.mkdir(parents=True)
            (folder / "cpulist").write_text(text + "\n")
        bound = {"now": allowed}
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: bound["now"])
        monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: bound.update(now=cores))
        return host.bind_to_numa_node(torch.device(kind, 0), wanted), bound["now"]

    return bind


def test_a_rank_is_bound_to_the_cores_beside_its_gpu(nodes):
    said, cores = nodes("0-3", "4-7", "", allowed=set(range(8)))  # the third is a GPU's memory, as on a GH200
    assert said == "bound to NUMA node 1, that of its GPU" and cores == {4, 5, 6, 7}


def test_only_cores_that_the_launcher_allows_are_taken(nodes):
    said, cores = nodes("0-1,8-9", "2-3,10-11", allowed={0, 1, 2, 10})
    assert said.startswith("bound to NUMA node 1") and cores == {2, 10}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (dict(allowed={4, 5}), "was bound to NUMA node 1 by its launcher"),
        (dict(allowed={0, 1}), "was bound to NUMA node 0 by its launcher, while its GPU is on node 1"),
        (dict(allowed={0, 4}, wanted=False), "not bound to a NUMA node (--no-numa)"),
        (dict(allowed={0, 4}, gpu=-1), "not bound: the NUMA node of its GPU is not known"),
        (dict(allowed={0, 4}, kind="cpu"), None),
    ],
)
def test_what_is_left_as_it_is(nodes, arguments, words):
    said, cores = nodes("0-3", "4-7", **arguments)
    assert cores == arguments["allowed"] and (said == words if words is None else said.startswith(words))


def test_a_host_of_one_node_is_not_spoken_of(nodes):
    assert nodes("0-7", allowed=set(range(8))) == (None, set(range(8)))


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_all_threads_of_a_process_are_bound(tmp_path):
    """By the real system: also one that is there already, as torch's are."""
    first, *others = sorted(os.sched_getaffinity(0))
    for node, cores in enumerate(([first], others)):
        folder = tmp_path / f"devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(",".join(map(str, cores)))
    program = f"""
import os, pathlib, threading, torch
from halny.model.run import host
stop = threading.Event()
thread = threading.Thread(target=stop.wait)
thread.start()
host._numa_node_of, host.SYS = lambda device: 0, pathlib.Path({str(tmp_path)!r})
print(host.bind_to_numa_node(torch.device("cuda", 0), True))
print(os.sched_getaffinity(0) == os.sched_getaffinity(thread.native_id) == {{{first}}})
stop.set()
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["bound to NUMA node 0, that of its GPU", "True"]


# ------------------------------------------------------------------------------------------------------- pages of 64 kB


def test_data_is_read_at_any_offset_where_pages_have_64_kb(monkeypatch, tmp_path):
    """A map must begin at a multiple of the page: what lies behind a header is reached from there."""
    monkeypatch.setattr(mmap, "ALLOCATIONGRANULARITY", 65_536)
    numbers = np.arange(200_000, dtype=np.uint16)
    (tmp_path / "a.bin").write_bytes(b"x" * 70_000 + numbers.tobytes())
    array = FileArray(str(tmp_path / "a.bin"), np.dtype(np.uint16), 70_000, len(numbers))
    assert np.array_equal(np.asarray(array), numbers)
    assert np.array_equal(array[40_000:40_010], numbers[40_000:40_010])


@pytest.mark.parametrize("page, huge", [(4096, "1"), (65_536, None)])
def test_huge_pages_are_asked_for_only_where_they_have_2_mib(monkeypatch, page, huge):
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"})
    monkeypatch.setattr(mmap, "PAGESIZE", page)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    rank_process.RankProcess().begin([])
    assert os.environ.get("THP_MEM_ALLOC_ENABLE") == huge


# -------------------------------------------------------------------------------------------------- folders of one node


def test_a_path_that_one_node_lacks_is_named_with_its_host(small, tmp_path):
    shutil.copytree(small, tmp_path / "data")
    fault = ("another_folder", "1", "0.3")
    run = ranks_run(*COMMAND, "--data", "data", ranks=2, cwd=tmp_path, fault=fault, codes=[2, 2])
    assert run.err.startswith(f"train.py: rank 1 on {HOST}: --data data") and run.err.count("\n") == 1


def test_what_all_ranks_refuse_names_none_of_them(tmp_path):
    run = ranks_run(*COMMAND, "--data", "nowhere", ranks=2, cwd=tmp_path, codes=[2, 2])
    assert run.err.startswith("train.py: --data nowhere")


def test_an_older_copy_of_the_data_on_one_node_is_refused(small, tmp_path):
    shutil.copytree(small, tmp_path / "data")
    older = [np.arange(3 * 64 + 10) % 40]
    write_dataset(older, tmp_path / "elsewhere/data", vocab_size=256, val_documents=[np.arange(150) % 40])
    fault = ("another_folder", "1", "0.3")
    run = ranks_run(*COMMAND, "--data", "data", ranks=2, cwd=tmp_path, fault=fault, codes=[2, 2])
    assert f"--data data is another for rank 1 on {HOST} than for rank 0 on {HOST}" in run.err, run.err
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    "rank, local_rank, said",
    [("0", "0", "train.py: no"), ("4", "0", f"train.py: rank 4 on {HOST}: no"), ("5", "1", "")],
)
def test_where_rank_0_refuses_nothing_the_first_rank_of_a_host_speaks(monkeypatch, capsys, rank, local_rank, said):
    """A recipe file that one node lacks, say. Had rank 0 spoken, torchrun would have ended the others in these 10 s."""

    def leave(code):
        raise SystemExit(code)

    waited = []
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(rank_process.time, "sleep", waited.append)
    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(SystemExit) as left:
        rank_process.refuse("no", alone=True)
    assert left.value.code == REFUSED and capsys.readouterr().err.strip() == said
    assert waited == ([] if rank == "0" else [10])
