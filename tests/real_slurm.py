"""A Slurm of its own on this host, for tests: munged, slurmctld and two slurmds, all in one folder.

The nodes are called 127.0.0.1 and 127.0.0.2, so that the name of a job's first node, where the job files put the ranks'
store, is an address. Their 144 CPUs and 8 GPUs are made up, since the headers of the job files ask for them.
"""

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PATH = f"{os.environ['PATH']}:/usr/sbin"  # where Debian has daemons, and not every user looks
MISSING = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=PATH)]
NODES = ("127.0.0.1", "127.0.0.2")

# cred_expire: a requeued job waits for so long, and 6 s is the least that Slurm takes.
# FirstJobId: the port of the ranks' store follows from it, and is not to be that of other tests.
CONF = """\
ClusterName=halny
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket,cred_expire=6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
FirstJobId={first_job}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SelectType=select/cons_tres
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmdParameters=config_overrides
GresTypes=gpu
PartitionName=all Nodes=ALL Default=YES State=UP
"""
NODE = "NodeName={} NodeHostname=localhost NodeAddr=127.0.0.1 Port={} CPUs=144 RealMemory=1000 Gres=gpu:8\n"


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


def processes(conf: str) -> Iterator[tuple[int, str, dict[str, str]]]:
    """(process id, command line, environment) of all that runs under the Slurm of a slurm.conf, daemons included."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended, or is another user's
            text = (folder / "environ").read_bytes().decode(errors="replace")
            environment = dict(line.partition("=")[::2] for line in text.split("\0"))
            if environment.get("SLURM_CONF") == conf:
                yield int(folder.name), (folder / "cmdline").read_text(errors="replace"), environment


def kill_all(conf: str) -> None:
    """Ranks, steps and daemons, until nothing is left that could start more."""
    while running := [pid for pid, _, _ in processes(conf)]:
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


class Slurm:
    """The daemons, started; RuntimeError with their logs if they do not come up."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("state", "bin", *(f"spool/{node}" for node in NODES)):
            (folder / name).mkdir(parents=True)
        python = folder / "bin/python"  # what the job files start, whoever runs the tests
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)
        port, *ports = free_ports(1 + len(NODES))
        user = pwd.getpwuid(os.geteuid()).pw_name
        conf = CONF.format(port=port, user=user, folder=folder, first_job=os.getpid())
        (folder / "slurm.conf").write_text(conf + "".join(map(NODE.format, NODES, ports)))
        for gpu in range(8):
            (folder / f"gpu{gpu}").symlink_to("/dev/null")
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")

        self.conf = str(folder / "slurm.conf")
        self.environment = os.environ | {
            "SLURM_CONF": self.conf, "PATH": f"{folder}/bin:{PATH}",
            "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        self.daemons: list[subprocess.Popen] = []
        # Ends all of it as soon as this process has closed the pipe, or has ended itself, however that came.
        command = [sys.executable, __file__, self.conf]
        self.guard = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        try:
            self._start_daemons()
        except BaseException:
            self.end()
            raise

    def _start_daemons(self) -> None:
        files = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._start("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *files)
        self._wait_for("munged", (self.folder / "munge.socket").exists)
        self._start("slurmctld", "-D", "-i")
        for node in NODES:
            self._start("slurmd", "-D", "-N", node)
        both_idle = "idle\n" * len(NODES)
        self._wait_for("the nodes", lambda: self.ask("sinfo", "--noheader", "--Node", "--format=%T") == both_idle)

    def _start(self, *command: str) -> None:
        with (self.folder / f"{command[0]}-{len(self.daemons)}.out").open("wb") as out:
            streams = dict(stdout=out, stderr=out, start_new_session=True)  # which Ctrl-C does not reach
            self.daemons.append(subprocess.Popen(command, env=self.environment, **streams))

    def _wait_for(self, what: str, happened: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 30
        while not happened():
            if time.monotonic() > deadline or any(daemon.poll() is not None for daemon in self.daemons):
                raise RuntimeError(f"{what} did not come up:\n{self.logs()}")
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.out")))

    def ask(self, *command: object, cwd: Path | None = None) -> str:
        """What a command of Slurm's prints."""
        command = list(map(str, command))
        done = subprocess.run(command, cwd=cwd, env=self.environment, capture_output=True, text=True, timeout=60)
        return done.stdout or done.stderr

    def end(self) -> None:
        self.guard.stdin.close()
        self.guard.wait()
        for daemon in self.daemons:
            daemon.wait()


class Job:
    """A job file, submitted. ``poll`` and ``communicate`` are what the waiting in runs.py asks of a process."""

    def __init__(self, slurm: Slurm, cwd: Path, *arguments):
        self.slurm, self.cwd = slurm, cwd
        self.number = int(slurm.ask("sbatch", "--parsable", *arguments, cwd=cwd))
        self.log = cwd / f"logs/{self.number}/0.txt"  # rank 0's, over all starts
        self.state, self.asked = "", 0.0

    def facts(self) -> dict[str, str]:
        """JobState, Restarts, ExitCode and so on, as Slurm has them now."""
        return dict(re.findall(r"(\w+)=(\S*)", self.slurm.ask("scontrol", "show", "job", self.number)))

    def poll(self) -> str | None:
        """How the job ended; None while it waits, runs, or is being ended. Slurm is asked twice a second at most."""
        if time.monotonic() - self.asked > 0.5:
            self.state, self.asked = self.facts()["JobState"], time.monotonic()
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")
        return self.state if self.state in ended else None

    def ended(self, timeout_s: float = 120) -> dict[str, str]:
        """Its facts once it has ended."""
        deadline = time.monotonic() + timeout_s
        while self.poll() is None:
            assert time.monotonic() < deadline, self.communicate()
            time.sleep(0.1)
        return self.facts()

    @property
    def out(self) -> str:
        """What the job file has said, over all starts."""
        return (self.cwd / f"slurm-{self.number}.txt").read_text()

    def communicate(self) -> str:
        """All there is to read where something went wrong."""
        paths = [self.cwd / f"slurm-{self.number}.txt", *sorted(self.log.parent.glob("*.txt"))]
        texts = [f"--- {path.name}\n{path.read_text()}" for path in paths if path.exists()]
        return "\n".join([str(self.facts()), *texts, self.slurm.logs()])

    def pid(self, rank: int) -> int:
        """The process of a rank."""
        mine = {"SLURM_JOB_ID": str(self.number), "RANK": str(rank)}
        found = [
            pid for pid, line, env in processes(self.slurm.conf) if "train.py" in line and mine.items() <= env.items()
        ]
        return min(found)  # those it started itself come after it


if __name__ == "__main__":  # the guard
    sys.stdin.read()
    kill_all(sys.argv[1])
