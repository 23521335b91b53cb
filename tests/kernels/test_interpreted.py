"""Runs what needs TRITON_INTERPRET=1, or needs it unset, in processes of their own: Triton reads it when imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.aot import LIMITS, Compiled, Issue, complaints
from halny.kernels import dispatch
from halny.model.data.writer import write_dataset

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(dispatch.INTERPRETED, reason="TRITON_INTERPRET=1: the kernel tests run by themselves")


def run(*command: str, interpreted: bool) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("kernels", ["row_kernels", "chunk_cat"])
def test_kernels_in_the_interpreter(kernels):
    done = run("-m", "pytest", f"tests/kernels/test_{kernels}.py", "-p", "no:cacheprovider", interpreted=True)
    counts = done.splitlines()[-1]
    assert " passed" in counts and "failed" not in counts, done


def test_ahead_of_time_limits_sm_90():
    """No spills, 16-byte accesses, registers and shared memory within bench/aot.py's LIMITS."""
    table = run("bench/aot.py", "--arch", "sm_90", interpreted=False)
    for kernel in (
        "rms_norm forward",
        "add_rms_norm backward",
        "rope backward",
        "swiglu backward and h",
        "cross_entropy",
        "chunk_cat",
    ):
        assert f"\n{kernel} " in table, table


def test_ahead_of_time_compiles_for_other_generations():
    run("bench/aot.py", "--arch", "sm_80", "--arch", "sm_100", "--only", "bf16", interpreted=False)


def test_what_is_issued_is_a_table():
    *_, head, row, last = run("bench/aot.py", "--issue", "--only", "rope out of place", interpreted=False).splitlines()
    assert [head.split()[0], row.split()[0]] == ["rope", "rope"] and last == "2 kernels compiled, 0 beyond their limits"
    assert row.split()[-1].isdigit() and row.count("%") == 4


def test_ahead_of_time_limits_can_fail():
    """The gate notices a spill, a register, a byte of shared memory, a narrow access, instructions, another kernel."""
    name = "rms_norm forward 4096 bf16"
    registers, shared, narrow, percent = LIMITS[name]
    fine = Compiled(registers, 0, shared, {16: 8}, {16: 4, 4: narrow})
    issue = Issue(16384, 0, 0, issue=percent / 100, alu=0, special=0, early=1)
    assert complaints(name, "sm_90", fine, issue) == []
    for unit in ("issue", "alu", "special"):
        assert len(complaints(name, "sm_90", fine, issue._replace(**{unit: (percent + 1) / 100}))) == 1
    for worse in (
        fine._replace(registers=registers + 1),
        fine._replace(spills=8),
        fine._replace(shared_bytes=shared + 1),
        fine._replace(loads={16: 7, 8: 1}),
    ):
        assert len(complaints(name, "sm_90", worse)) == 1
    assert complaints("another kernel", "sm_90", fine) == ["no row in LIMITS"]


def train(run_dir: Path, *flags: str) -> list[dict]:
    run(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py", "tiny", "--model", "test",
        "--steps", "20", "--seq-len", "8", "--batch-tokens", "16", "--eval-every", "0", "--save-every", "20",
        "--dtype", "fp32", "--run-dir", str(run_dir), *flags,
        interpreted=True,
    )  # fmt: skip
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_twenty_steps_of_training_equal_the_reference_run(tmp_path):
    """The recipe of tiny on the test model, two ranks under FSDP2: interpreted kernels against --kernels reference."""
    tokens = np.arange(600) * np.arange(600) % 256
    write_dataset([tokens], tmp_path / "data", vocab_size=256, val_documents=[tokens[:50]])
    data = ("--data", str(tmp_path / "data"))
    kernels = train(tmp_path / "kernels", *data)
    reference = train(tmp_path / "reference", *data, "--kernels", "reference")
    assert [line["step"] for line in kernels] == list(range(1, 21))
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        ours, theirs = ([line[name] for line in lines] for lines in (kernels, reference))
        assert ours != theirs  # bit for bit equal over 20 steps would mean that no kernel ran
        print(
            f"{name}: largest relative difference {max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True)):.1e}"
        )
        assert all(abs(a - b) <= tolerance * abs(b) for a, b in zip(ours, theirs, strict=True)), (name, ours, theirs)
    assert kernels[-1]["loss"] < kernels[0]["loss"] - 0.1  # the weights were updated
