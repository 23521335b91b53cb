"""A stand-in for Slurm on this host: sbatch, srun, scontrol, squeue, with real processes and real signals.

    python tests/slurm.py sbatch FILE.sbatch [ARGUMENT ...]     runs it, and again as long as it requeues itself

Known is what bench/slurm/ uses. ``--ntasks`` and ``--nodes`` may come before the file. As in Slurm, SIGUSR1 to the
controller (here: to the sbatch process) is delivered as the script's --signal line says: to every task of the running
step or, with "B:", to the batch shell alone. srun passes a signal on to its tasks.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

STATE = Path(os.environ.get("FAKE_SLURM", "fake-slurm"))  # what the commands know of each other


def sbatch(arguments: list[str]) -> int:
    script = next(argument for argument in arguments if argument.endswith(".sbatch"))
    place = arguments.index(script)
    header = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", Path(script).read_text(), re.MULTILINE))
    header |= dict(zip([name.removeprefix("--") for name in arguments[:place:2]], arguments[1:place:2], strict=True))
    nodes = int(header["nodes"])
    tasks = int(header.get("ntasks") or nodes * int(header["ntasks-per-node"]))
    STATE.mkdir(exist_ok=True)
    bin_folder = STATE.absolute() / "bin"
    bin_folder.mkdir(exist_ok=True)
    here = Path(__file__).resolve()
    commands = {name: f'"{here}" {name}' for name in ("srun", "scontrol", "squeue")}
    for name, program in (commands | {"python": ""}).items():
        command = bin_folder / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" {program} "$@"\n')
        command.chmod(0o755)

    shell = None

    def deliver(number, _frame) -> None:
        told = [shell.pid] if header["signal"].startswith("B:") else map(int, (STATE / "tasks").read_text().split())
        for pid in told:
            os.kill(pid, number)

    signal.signal(signal.SIGUSR1, deliver)
    for start in range(10):
        environment = os.environ | {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "FAKE_SLURM": str(STATE.absolute()), "SLURM_JOB_ID": str(os.getpid()), "SLURM_NTASKS": str(tasks),
            "SLURM_CPUS_PER_TASK": header["cpus-per-task"],
            "SLURM_NNODES": str(nodes), "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_RESTART_COUNT": str(start),
        }  # fmt: skip
        shell = subprocess.Popen(["bash", script, *arguments[place + 1 :]], env=environment)
        code = shell.wait()
        if not (STATE / "requeue").exists():
            return code
        if "requeue" not in header:
            raise SystemExit("the job asked to be requeued, but its script does not allow it")
        (STATE / "requeue").unlink()
    raise SystemExit("requeued ten times")


def srun(arguments: list[str]) -> int:
    options = {}
    while arguments[0].startswith("--"):
        name, _, value = arguments.pop(0)[2:].partition("=")
        options[name] = value
    tasks, nodes = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_NNODES"])
    processes = []
    for rank in range(tasks):
        numbers = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % (tasks // nodes))}
        mode = "ab" if options["open-mode"] == "append" else "wb"
        with open(options["output"].replace("%t", str(rank)), mode) as log:
            processes.append(subprocess.Popen(arguments, env=os.environ | numbers, stdout=log, stderr=log))
    (STATE / "tasks").write_text(" ".join(str(process.pid) for process in processes))
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: [p.send_signal(number) for p in processes if p.poll() is None])
    ended = None
    while any(process.poll() is None for process in processes):
        if ended is None and any(process.poll() is not None for process in processes):
            ended = time.monotonic()
        if ended and time.monotonic() - ended > int(options["wait"]):
            for process in processes:
                process.kill()
        time.sleep(0.05)
    return max(code if (code := process.returncode) >= 0 else 128 - code for process in processes)


def scontrol(arguments: list[str]) -> int:
    if arguments[0] == "requeue":
        assert arguments[1] == os.environ["SLURM_JOB_ID"]
        (STATE / "requeue").touch()
        return 0
    assert arguments[:2] == ["show", "hostnames"] and arguments[2]
    os.write(1, b"localhost\nnode2\n")  # at once: "head -n 1" does not wait for the rest
    return 0


def squeue(_arguments: list[str]) -> int:
    print("RUNNING None")
    return 0


if __name__ == "__main__":
    sys.exit({"sbatch": sbatch, "srun": srun, "scontrol": scontrol, "squeue": squeue}[sys.argv[1]](sys.argv[2:]))
