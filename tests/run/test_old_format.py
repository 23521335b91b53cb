"""What an earlier halny wrote is read by this one: old_format/ holds a data folder and a run, made at commit 8451835.

    write_dataset(four documents of 123 to 400 tokens below 64, "data", vocab_size=64, val_documents=the first of them)
    train.py --model model --data data --run-dir run --seq-len 32 --batch-tokens 128 --steps 8 --save-every 4
        --eval-every 4 --keep 2 --dtype fp32

The checkpoint of step 8, the export and the curves were left out; metrics.jsonl is whole, to compare with.
"""

import shutil
from pathlib import Path

import numpy as np
from runs import checkpoint, column, ranks_run, saved_steps, status

from halny.model.data.check import check

OLD = Path(__file__).parent / "old_format"
COMMAND = ["--model", "model", "--data", "data", "--run-dir", "run", "--seq-len", 32, "--batch-tokens", 128,
    "--steps", 8, "--save-every", 4, "--eval-every", 4, "--keep", 2, "--dtype", "fp32"]  # fmt: skip


def test_a_run_goes_on_from_its_checkpoint(tmp_path):
    """The same command resumes after step 4; the steps that follow lose what they lost then."""
    shutil.copytree(OLD, tmp_path, dirs_exist_ok=True)
    before = column(OLD / "run", "loss")
    again = ranks_run(*COMMAND, cwd=tmp_path)
    assert "resuming after step 4 from run/checkpoints/step-00000004" in again.out
    after = column(tmp_path / "run", "loss")
    assert after[:4] == before[:4]
    np.testing.assert_allclose(after, before, rtol=1e-5)  # another processor may round otherwise
    assert status(tmp_path / "run")["state"] == "finished" and saved_steps(tmp_path / "run") == [4, 8]
    old, new = checkpoint(OLD / "run", 4), checkpoint(tmp_path / "run", 8)
    assert new.keys() == old.keys() and all(x.dtype == old[name].dtype for name, x in new.items())


def test_a_data_folder_is_clean(capsys):
    assert check(OLD / "data") and "NOT CLEAN" not in capsys.readouterr().out
