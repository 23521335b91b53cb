"""A process for each case, and the machine beside it: what nvidia-smi says. Nothing is ever set."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from halny.model.durable import write_json

ROOT = Path(__file__).resolve().parents[2]
# flash-attn-4 and quack read these when they are imported. Without the first, what flash-attn-4 compiles (10 to 30 s)
# is lost with its process; quack keeps it by default, under the user's name, which a container may lack.
CACHES = Path(tempfile.gettempdir()) / f"halny-bench-{os.getuid()}"
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(CACHES / "flash-attn-4"))
os.environ.setdefault("QUACK_CACHE_DIR", str(CACHES / "quack"))


class Watch:
    """nvidia-smi beside the work, twice a second: clocks, power and temperature while it went on. Sets nothing."""

    def __enter__(self) -> Watch:
        self._file = tempfile.TemporaryFile("w+")
        self._process = None
        with contextlib.suppress(OSError):
            fields = "clocks.sm,power.draw,temperature.gpu"
            command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", "0", "-lms", "500"]
            self._process = subprocess.Popen(command, stdout=self._file, stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *_) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        self._file.seek(0)
        self.found = watched(self._file.read())
        self._file.close()


def watched(text: str) -> dict | None:
    """Medians of what nvidia-smi printed, and the hottest; None if that is nothing."""
    rows = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            sm, watts, celsius = map(float, line.split(","))
            rows.append((sm, watts, celsius))
    if not rows:
        return None
    sm, watts, celsius = zip(*rows, strict=True)
    return {"n": len(rows), "sm_mhz": statistics.median(sm), "watts": statistics.median(watts), "celsius": max(celsius)}


def nvidia_smi() -> dict | None:
    """Clocks, power and temperature now; None where there is no nvidia-smi. Nothing is ever set."""
    fields = "driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu,utilization.gpu"
    query = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", "0"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    names = ("driver", "sm_mhz", "memory_mhz", "watts", "watts_limit", "celsius", "utilisation_percent")
    return dict(zip(names, (value.strip() for value in line.strip().split(",")), strict=False))


def die_with_parent() -> None:
    """Have this process killed when the one that started it is gone, however that ended. On Linux."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def line_of(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"


def in_its_own_process(arguments: list[str], seconds: float) -> dict:
    """``python *arguments FILE``, which leaves a JSON object in FILE: that object; or why there is none, as "reason".

    So a case's memory is given back whole, and one that crashes, hangs or poisons its CUDA context loses only its row.
    What it wrote before it was ended counts. The process should be ``be_a_case``, or ``die_with_parent``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "row.json"
        process = subprocess.Popen([sys.executable, *arguments, str(path)], cwd=ROOT, start_new_session=True)
        reason = None
        try:
            code = process.wait(max(1.0, seconds))
            if code:
                reason = f"its process was ended by signal {-code}" if code < 0 else f"its process ended with {code}"
        except subprocess.TimeoutExpired:
            reason = f"was not done after {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            row = {"status": "failed", "reason": reason or "its process left nothing"}
        return row | {"reason": row.get("reason") or reason or ""}


def be_a_case(name: str, path: Path, measured: Callable[[Callable[[dict], None]], None]) -> int:
    """That process: ``measured`` is given what saves the row, whenever there is more of it. The exit code."""
    row: dict = {}

    def save(new: dict) -> None:
        row.update(new)
        write_json(path, row)

    die_with_parent()
    try:
        measured(save)
    except Exception as error:  # out of memory, say
        print(f"{name}: {line_of(error)}", flush=True)
        if row.get("status") != "ok":
            save({"status": "failed", "reason": line_of(error)})
        return 1
    return 0
