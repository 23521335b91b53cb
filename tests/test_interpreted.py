"""Runs what needs TRITON_INTERPRET=1, or needs it unset, in processes of their own: Triton reads it when imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from halny.kernels import dispatch

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(dispatch.INTERPRETED, reason="TRITON_INTERPRET=1: the kernel tests run by themselves")


def run(*command: str, interpreted: bool) -> str:
    environment = {**os.environ, "TRITON_INTERPRET": "1" if interpreted else "0"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


def test_the_row_kernels_in_the_interpreter():
    done = run("-m", "pytest", "tests/test_row_kernels.py", "-p", "no:cacheprovider", interpreted=True)
    counts = done.splitlines()[-1]
    assert " passed" in counts and "failed" not in counts, done


def test_ahead_of_time_limits_sm_90():
    """No spills, 16-byte accesses, registers and shared memory within bench/aot.py's LIMITS."""
    table = run("bench/aot.py", "--arch", "sm_90", interpreted=False)
    for kernel in ("rms_norm forward", "add_rms_norm backward", "rope backward", "swiglu backward and h"):
        assert f"\n{kernel} " in table, table


def test_ahead_of_time_compiles_for_other_generations():
    run("bench/aot.py", "--arch", "sm_80", "--arch", "sm_100", "--only", "bf16", interpreted=False)


def test_ahead_of_time_limits_can_fail():
    """The gate notices a spill, a register, a byte of shared memory, a narrow access and an unknown kernel."""
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        from aot import LIMITS, Compiled, complaints
    finally:
        sys.path.pop(0)
    name = "rms_norm forward 4096 bf16"
    registers, shared, narrow = LIMITS[name]
    fine = Compiled(registers, 0, shared, {16: 8}, {16: 4, 4: narrow})
    assert complaints(name, "sm_90", fine) == []
    for worse in (
        fine._replace(registers=registers + 1),
        fine._replace(spills=8),
        fine._replace(shared_bytes=shared + 1),
        fine._replace(loads={16: 7, 8: 1}),
    ):
        assert len(complaints(name, "sm_90", worse)) == 1
    assert complaints("another kernel", "sm_90", fine) == ["no row in LIMITS"]
