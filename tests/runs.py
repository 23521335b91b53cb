"""Whole runs of train.py for tests: started as a user would, or by the dozen, and with a fault if one is wanted.

``run`` and ``start`` are the user's way: a process, or torchrun and its ranks, some six seconds of which are imports.
``Ranks`` forks them from a server that has imported torch once, which takes one: as many real processes, each with its
own signals, files and exit code, that meet over TCP as torchrun's do, but without the launcher. Both take a fault, the
name of a function in faults.py that breaks something inside the ranks before they start.
"""

import json
import multiprocessing
import multiprocessing.forkserver
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

import train
from halny.model.exits import REFUSED

TESTS = Path(__file__).parent
REPO = TESTS.parent

SMALL = ["--model", "test", "--seq-len", "64", "--batch-tokens", "256", "--dtype", "fp32", "--export-dtype", "fp32"]
LONG = [*SMALL, "--steps", "150", "--save-every", "20", "--lr", "1e-3", "--eval-every", "0"]


# ------------------------------------------------------------------------------------------------------- the user's way


def start(*arguments, ranks: int | None = None, cwd: Path, fault=(), launcher=(), **options) -> subprocess.Popen:
    """train.py as a user starts it: under torchrun with so many ranks, or (None) as a plain process."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), *launcher]
    program = [TESTS / "faults.py", *fault, "--"] if fault else [REPO / "train.py"]
    command = [sys.executable, *(torchrun if ranks else []), *map(str, [*program, *arguments])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | options.pop("env", {})
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=cwd, env=environment, **pipes, **options)


def run(*arguments, code: int | None = 0, **options) -> subprocess.CompletedProcess:
    process = start(*arguments, **options)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert code is None or process.returncode == code, out + err
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def ranks_of(process: subprocess.Popen) -> list[int]:
    """Process ids of the ranks below a torchrun, in order of rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_bytes() for pid in children}
    return sorted(environments, key=lambda pid: int(re.search(rb"\0RANK=(\d+)", environments[pid])[1]))


# --------------------------------------------------------------------------------------------------------- by the dozen

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["train", "faults"])


def _start_server() -> None:
    """With the paths to what it is to import, which Python 3.11 does not hand it; a second call does nothing."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), str(TESTS), before]))
    multiprocessing.forkserver.ensure_running()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


def _be_a_rank(rank: int, size: int, port: int, cwd: Path, arguments: list[str], fault: tuple, env: dict) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(cwd / f"{name}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.chdir(cwd)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)} | env
    torch.set_num_threads(1)
    recipe = train.begin(arguments)
    if fault:
        import faults

        faults.install(*fault)
    code = train.run_to_exit_code(recipe)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


class Ranks:
    """The ranks of one run, started; ``codes`` waits for their exit codes (minus the signal that killed one)."""

    def __init__(self, *arguments, ranks: int = 1, cwd: Path, fault: tuple = (), env: dict | None = None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        _start_server()
        texts = list(map(str, arguments))
        self.cwd = cwd
        self.processes = [
            _server.Process(target=_be_a_rank, args=(rank, ranks, port, cwd, texts, fault, env or {}))
            for rank in range(ranks)
        ]
        for process in self.processes:
            process.start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self.processes]

    def poll(self) -> int | None:
        """As Popen's: None while any rank lives."""
        return (
            None if any(process.is_alive() for process in self.processes) else max(p.exitcode for p in self.processes)
        )

    def kill(self) -> None:
        """SIGKILL to all, at once, as a dying launcher or node does."""
        for process in self.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)

    def codes(self, timeout: float = 120) -> list[int]:
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
            if process.exitcode == REFUSED:  # torchrun then ends the others, who wait for it
                for other in self.processes:
                    other.terminate()
        alive = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        self.kill()
        assert not alive, f"ranks {alive} still ran after {timeout} s: {self.communicate()}"
        return [process.exitcode for process in self.processes]

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """(stdout, stderr) of all ranks so far."""
        text = {n: [self.cwd / f"{n}-{rank}.txt" for rank in range(len(self.processes))] for n in ("out", "err")}
        return tuple("".join(p.read_text() for p in paths if p.exists()) for paths in text.values())

    @property
    def out(self) -> str:
        return self.communicate()[0]

    @property
    def err(self) -> str:
        return self.communicate()[1]


def ranks_run(*arguments, codes: list[int] | None = None, **options) -> Ranks:
    """``Ranks`` that have ended, with these exit codes (all 0)."""
    ranks = Ranks(*arguments, **options)
    expected = [0] * len(ranks.processes) if codes is None else codes
    assert (got := ranks.codes()) == expected, (got, ranks.communicate())
    return ranks


# ----------------------------------------------------------------------------------------------- what a run left behind


def lines(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def metrics(run_dir: Path) -> list[dict]:
    """The lines of training steps."""
    return [line for line in lines(run_dir) if "loss" in line]


def column(run_dir: Path, *names: str) -> list[tuple]:
    return [tuple(line[name] for name in names) for line in metrics(run_dir)]


def status(run_dir: Path) -> dict:
    return json.loads((run_dir / "status.json").read_text())


def saved_steps(run_dir: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run_dir / "checkpoints").glob("step-*"))


def checkpoint(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, put together by hand from the safetensors files of all ranks."""
    from safetensors import safe_open

    parts: dict[str, list] = {}
    for path in (run_dir / f"checkpoints/step-{step:08d}").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():  # noqa: SIM118  (not a dictionary)
                parts.setdefault(name, []).append((offsets[name]["saved_offsets"], file.get_tensor(name)))
    return {name: torch.cat([x for _, x in sorted(p, key=lambda part: part[0])]) for name, p in parts.items()}


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether two checkpoints hold the same tensors, to the bit."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --------------------------------------------------------------------------------------------------- moments and damage


def wait_until(process, happened) -> None:
    deadline = time.time() + 120
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.time() < deadline, "nothing for two minutes"
        time.sleep(0.005)


def wait_for_step(process, run_dir: Path, step: int) -> None:
    written = run_dir / "metrics.jsonl"
    wait_until(process, lambda: written.exists() and written.read_text().count("\n") >= step)


def flip_a_bit(path: Path, offset: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1 << bit
    path.write_bytes(content)


def largest_shard(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
