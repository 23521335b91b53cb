"""A soak: kill a run with SIGKILL at random moments, over and over, and see that nothing was lost.

    python tests/soak.py [--kills 200] [--ranks 1] [--seed 0]        some minutes; exits 1 at the first loss

Each time the ranks are killed all at once, at a moment drawn anew: while they start, train, save, or finish. Then:

- the newest checkpoint that was complete before the kill is there and sound, and the next start resumes from it or from
  a newer one (0 steps lost beyond the last save);
- at the end the losses of all steps equal, to the bit, those of a run that nobody disturbed.
"""

import argparse
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))  # as pytest's configuration does: train.py is no package

from runs import SMALL, Ranks, saved_steps

from halny.model.data.writer import write_dataset
from halny.model.record.run_folder import RunFolder
from halny.model.run import checkpoint


def soak(cwd: Path, kills: int, n_ranks: int, seed: int) -> str:
    """The summary; AssertionError, saying what was lost, otherwise."""
    rng = np.random.default_rng(0)
    ids = [(np.arange(2000) * 7 % 40 + rng.integers(0, 3, 2000)).astype(np.int64)]
    write_dataset(ids, cwd / "data", vocab_size=256)
    command = [*SMALL, "--data", cwd / "data", "--steps", 10**6, "--schedule", "constant", "--warmup-steps", 0]
    command += ["--eval-every", 0, "--save-every", 10, "--lr", "1e-4"]
    folder, moments = cwd / "killed/checkpoints", random.Random(seed)
    resumed, delays, began = [], [], time.monotonic()
    for kill in range(1, kills + 1):
        ranks = Ranks(*command, "--run-dir", "killed", ranks=n_ranks, cwd=cwd)
        started, lines = time.monotonic(), len(RunFolder(cwd / "killed").lines())
        while kill % 2 and len(RunFolder(cwd / "killed").lines()) == lines:  # every other one is left to train first
            assert ranks.poll() is None, ranks.communicate()
            time.sleep(0.02)
        time.sleep(moments.uniform(0.02, 2.0))
        delays.append(time.monotonic() - started)
        before = max(saved_steps(cwd / "killed"), default=0)
        ranks.kill()
        ranks.codes()
        resumed += [int(line.split()[3]) for line in ranks.out.splitlines() if line.startswith("resuming after step")]
        damaged = {path.name: problem for path in checkpoint.complete(folder) if (problem := checkpoint.damage(path))}
        assert not damaged, f"kill {kill}: {damaged}"
        newest = max(saved_steps(cwd / "killed"), default=0)
        assert newest >= before, f"kill {kill}: step {before} was saved and is gone, the newest is {newest}"
        assert resumed == sorted(resumed) and (not resumed or resumed[-1] <= newest), f"kill {kill}: {resumed[-2:]}"
        if kill % 20 == 0:
            print(f"{kill} kills, {newest} steps", file=sys.stderr)

    whole = Ranks(*command, "--run-dir", "whole", ranks=n_ranks, cwd=cwd)
    while len(RunFolder(cwd / "whole").lines()) < newest:
        assert whole.poll() is None, whole.communicate()
        time.sleep(0.5)
    whole.kill()
    ours, theirs = (
        [(line["step"], line["loss"], line["grad_norm"]) for line in RunFolder(cwd / name).lines()[:newest]]
        for name in ("killed", "whole")
    )
    assert len(ours) == newest > 0 and ours == theirs, "the losses differ from an undisturbed run's"
    return (
        f"soak: {kills} kills of {n_ranks} rank(s), on average {statistics.mean(delays):.1f} s after the start: "
        f"{len(resumed)} resumes, 0 steps lost beyond the last save, 0 unusable run folders, {newest} steps equal "
        f"those of an undisturbed run to the bit; {time.monotonic() - began:.0f} s"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(soak(Path(folder), options.kills, options.ranks, options.seed))
