"""One rank in bf16: no FSDP, weights split into bf16 and the 16 bits beneath, moments in fp32, bf16 or 8bit.

The run of two ranks under FSDP is the definition; a run of one rank is held to it, and to itself across kills.
"""

import itertools
import json
import math
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import SMALL, checkpoint, column, equal, lines, ranks_run, status

import train
from halny.kernels import stochastic_rounding
from halny.kernels.adamw import MOMENTS
from halny.model import export
from halny.model.exits import FAILED, REFUSED
from halny.model.mistral import PRESETS, Mistral
from halny.model.run.checkpoint import checksum_line
from halny.model.run.optimizer import ShardedAdamW, SplitAdamW
from halny.model.run.ranks import World
from halny.model.run.recipe import command_line
from halny.model.run.resolve import resolve

STEPS = 12
COMMAND = [*SMALL, "--dtype", "bf16", "--batch-tokens", 512, "--micro-batch", 2, "--steps", STEPS, "--save-every", 4]
COMMAND += ["--lr", "3e-3", "--warmup-steps", 2, "--eval-every", 4, "--keep", 9, "--run-dir", "r"]


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory) -> dict[str, Path]:
    """moments -> the run of one rank, four micro batches a step; "sharded": of two ranks, two micro batches a step."""
    found = {}
    for name in (*MOMENTS, "sharded"):
        cwd = tmp_path_factory.mktemp(name)
        flags, ranks = ([], 2) if name == "sharded" else (["--moments", name], 1)
        said = ranks_run(*COMMAND, "--data", small, *flags, ranks=ranks, cwd=cwd).out
        assert ("sharding   none: bf16 weights" in said) == (name != "sharded")
        found[name] = cwd / "r"
    return found


def losses(run_dir: Path) -> np.ndarray:
    return np.array(column(run_dir, "loss"))


def test_fp32_moments_are_the_sharded_run(runs):
    """Not to the bit: four micro batches' gradients are summed in another order than two ranks' two."""
    ours, theirs = runs["fp32"], runs["sharded"]
    np.testing.assert_allclose(losses(ours), losses(theirs), rtol=2e-4)
    np.testing.assert_allclose(column(ours, "grad_norm"), column(theirs, "grad_norm"), rtol=5e-3)
    ours, theirs = checkpoint(ours, STEPS), checkpoint(theirs, STEPS)
    assert {(n, x.dtype, x.shape) for n, x in ours.items()} == {(n, x.dtype, x.shape) for n, x in theirs.items()}
    start = Mistral(PRESETS["test"])
    start.init_weights(0)
    for name, p in start.named_parameters():  # against how far the run has moved them
        moved = (theirs[f"model.{name}"] - p).norm()
        assert (ours[f"model.{name}"] - theirs[f"model.{name}"]).norm() < 0.1 * moved, name


@pytest.mark.parametrize("moments", ["bf16", "8bit"])
def test_narrow_moments_learn_the_same(runs, moments):
    ours, theirs = losses(runs[moments]), losses(runs["fp32"])
    fall = theirs[0] - theirs[-1]
    assert fall > 1.0 and np.abs(ours - theirs).max() < 0.02 * fall
    assert not np.array_equal(ours, theirs)


@pytest.mark.parametrize("moments", MOMENTS)
def test_masters_are_fp32(runs, moments):
    """They hold more than the bf16 the model computes with, and moments are stored as they are used."""
    held = checkpoint(runs[moments], STEPS)
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}[moments]
    for name, x in held.items():
        if name.startswith("model."):
            assert x.dtype == torch.float32
            assert name.endswith("norm.weight") or (x != x.bfloat16().float()).float().mean() > 0.9, name
        else:
            assert x.dtype == expected, name
    exponents = {name for name in held if "_exponents." in name}
    assert bool(exponents) == (moments == "8bit")


@pytest.mark.parametrize("moments", MOMENTS)
def test_resumes_to_the_bit(runs, moments, small, tmp_path):
    shutil.copytree(runs[moments], tmp_path / "r")
    for step in (8, 12):
        shutil.rmtree(tmp_path / f"r/checkpoints/step-{step:08d}")
    shutil.rmtree(tmp_path / "r/export")
    again = ranks_run(*COMMAND, "--data", small, "--moments", moments, cwd=tmp_path)
    assert "resuming after step 4" in again.out and "rounded by other random bits" not in again.out
    assert column(tmp_path / "r", "loss", "grad_norm") == column(runs[moments], "loss", "grad_norm")
    assert equal(checkpoint(tmp_path / "r", STEPS), checkpoint(runs[moments], STEPS))


@pytest.mark.parametrize("moments", MOMENTS)
def test_a_checkpoint_of_before_the_random_bits_changed_says_so(runs, moments, small, tmp_path):
    """It goes on all the same: what is stored means what it did."""
    shutil.copytree(runs[moments], tmp_path / "r")
    shutil.rmtree(tmp_path / "r/checkpoints/step-00000012")
    manifest = tmp_path / "r/checkpoints/step-00000008/manifest.json"
    facts = json.loads(manifest.read_text())
    assert facts["config"].pop("rounding") == stochastic_rounding.VERSION > 1
    content = json.dumps(facts).encode()
    manifest.write_bytes(content)
    manifest.with_name("manifest.json.sha256").write_bytes(checksum_line(content))
    again = ranks_run(*COMMAND, "--data", small, "--moments", moments, cwd=tmp_path)
    assert "resuming after step 8" in again.out
    assert ("rounded by other random bits than before the checkpoint" in again.out) == (moments != "fp32")


@pytest.mark.parametrize("first, then", [("fp32", 2), ("sharded", 1)])
def test_goes_on_under_fsdp_and_back(runs, first, then, small, tmp_path):
    """A checkpoint of one rank with fp32 moments is that of any number of ranks."""
    shutil.copytree(runs[first], tmp_path / "r")
    for step in (8, 12):
        shutil.rmtree(tmp_path / f"r/checkpoints/step-{step:08d}")
    again = ranks_run(*COMMAND, "--data", small, ranks=then, cwd=tmp_path)
    assert "resuming after step 4" in again.out
    np.testing.assert_allclose(losses(tmp_path / "r"), losses(runs[first]), rtol=2e-4)


def test_other_moments_are_another_run(runs, small, tmp_path):
    shutil.copytree(runs["bf16"], tmp_path / "r")
    refused = ranks_run(*COMMAND, "--data", small, "--moments", "8bit", cwd=tmp_path, codes=[REFUSED])
    assert "--moments was bf16" in refused.err


@pytest.mark.parametrize(
    "flags, ranks, says",
    [
        (["--moments", "8bit"], 2, "--moments 8bit is for one rank in bf16, and this is bf16 on 2 rank(s)"),
        (["--moments", "bf16", "--dtype", "fp32"], 1, "add --dtype bf16"),
        (["--moments", "fp8"], 1, "--moments"),
    ],
)
def test_moments_that_cannot_be(flags, ranks, says, small, tmp_path):
    refused = ranks_run(*COMMAND, "--data", small, *flags, ranks=ranks, cwd=tmp_path, codes=[REFUSED] * ranks)
    assert says in refused.err and not (tmp_path / "r").exists()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_export_is_of_the_masters(runs, dtype, small, tmp_path):
    """The trainer's and export.py's, to the bit."""
    shutil.copytree(runs["8bit"], tmp_path / "r")
    shutil.rmtree(tmp_path / "r/export")
    ranks_run(*COMMAND, "--data", small, "--moments", "8bit", "--export-dtype", dtype, cwd=tmp_path)
    assert export.main([str(runs["8bit"]), str(tmp_path / "out"), "--dtype", dtype]) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "r/export" / name).read_bytes()


def test_evaluates_and_replays(runs, small, tmp_path):
    shutil.copytree(runs["8bit"], tmp_path / "r")
    command = [*COMMAND, "--data", small, "--moments", "8bit"]
    ranks_run(*command, "--eval-only", cwd=tmp_path)
    evaluated = json.loads((tmp_path / "r/evaluation.json").read_text())
    logged = [line["val_loss"] for line in lines(tmp_path / "r") if "val_loss" in line]
    assert evaluated["val_loss"] == logged[-1]
    before = status(tmp_path / "r")
    said = ranks_run(*command, "--replay-step", 7, cwd=tmp_path).out
    assert "replaying step 7, after steps 5 to 6" in said and said.count("gradient norm") == 8
    assert status(tmp_path / "r") == before


def test_frozen_weights_stay_to_the_bit(small, tmp_path):
    frozen = r"embed|layers\.0\."
    command = [*COMMAND, "--data", small, "--moments", "8bit", "--steps", 4, "--freeze", frozen]
    ranks_run(*command, cwd=tmp_path)
    start, held = Mistral(PRESETS["test"]), checkpoint(tmp_path / "r", 4)
    start.init_weights(0)
    for name, p in start.named_parameters():
        stays = name.startswith(("embed", "layers.0."))
        assert torch.equal(held[f"model.{name}"], p) == stays, name
        assert (f"exp_avg.{name}" in held) == (not stays)


@pytest.mark.parametrize("moments", MOMENTS)
def test_a_skipped_update_changes_nothing(moments, small, tmp_path):
    command = [*COMMAND, "--data", small, "--moments", moments, "--steps", 6, "--save-every", 1, "--eval-every", 0]
    ranks_run(*command, cwd=tmp_path, fault=("loss_times", "nan", "0", "14"))  # in the second micro batch of step 4
    skipped = [line["step"] for line in lines(tmp_path / "r") if line.get("skipped")]
    assert skipped == [4]
    held = [checkpoint(tmp_path / "r", step) for step in range(3, 7)]
    assert [equal(a, b) for a, b in itertools.pairwise(held)] == [True, False, False]
    assert all(x.isfinite().all() for x in held[-1].values() if x.is_floating_point())


def test_out_of_memory_says_what_to_change(small, tmp_path):
    command = [*COMMAND, "--data", small, "--eval-every", 0, "--seq-len", 64]
    failed = ranks_run(*command, cwd=tmp_path, fault=("out_of_memory", "0", "10"), codes=[FAILED])
    assert "train.py: stopped: rank 0 on " in failed.err and "Traceback" not in failed.err
    assert "out of GPU memory: 234.9 MB were asked for" in failed.err
    assert "--micro-batch 1 instead of 2" in failed.err and "--moments bf16" in failed.err
    assert status(tmp_path / "r")["state"] == "failed" and "--micro-batch 1" in status(tmp_path / "r")["reason"]
    ranks_run(*command, "--micro-batch", 1, cwd=tmp_path)  # as it says
    assert len(losses(tmp_path / "r")) == STEPS


class Plain(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.a = torch.nn.Parameter(torch.linspace(-1, 1, 300))
        self.b = torch.nn.Parameter(torch.ones(7, 5))


@pytest.mark.parametrize("moments", MOMENTS)
def test_gradients_of_micro_batches_are_summed_and_clipped(moments):
    """1,000 small gradients after a large one: a plain bf16 sum would not move."""
    model = Plain()
    optimizer = SplitAdamW(model, [{"params": list(model.parameters()), "weight_decay": 0.0}], (0.9, 0.95), 1e-8,
        moments, seed=3)  # fmt: skip
    optimizer.take_weights()
    optimizer.begin(1, 1e-3)
    for size in (1.0, *[1e-3] * 1000):
        loss = (model.a.sum() + model.b.sum()) * size
        loss.backward()
        assert model.a.grad is None  # taken as soon as it was there
    norm, expected = optimizer.clip_gradients(0.5).item(), 2.0 * math.sqrt(335)
    assert abs(norm / expected - 1) < (0.02 if moments == "8bit" else 2e-3)
    before = model.a.detach().clone()
    optimizer.step()
    optimizer.zero_grad()
    assert not torch.equal(model.a, before) and optimizer.updates == 1
    assert not optimizer._sums


def test_a_graph_from_before_the_update_is_not_gone_through_again():
    """As with PyTorch's optimizers: it would take the gradient of some weights at the values of others."""
    model = Plain()
    groups = [{"params": list(model.parameters()), "weight_decay": 0.0}]
    optimizer = SplitAdamW(model, groups, (0.9, 0.95), 1e-8, "8bit", seed=3)
    optimizer.take_weights()
    optimizer.begin(1, 1e-3)
    loss = model.a.square().sum()
    loss.backward(retain_graph=True)
    optimizer.clip_gradients(1.0)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_optimizers_do_not_do_they_refuse():
    model = Plain()
    a = {"params": [model.a], "weight_decay": 0.1}
    for wrong, key in ((a | {"lr": 1e-3}, "lr"), (a | {"betas": (0.9, 0.99)}, "betas"),
                       ({"params": [model.a]}, "weight_decay")):  # fmt: skip
        for optimizer in (partial(ShardedAdamW, [wrong], (0.9, 0.95), 1e-8),
                          partial(SplitAdamW, model, [wrong], (0.9, 0.95), 1e-8, "8bit", seed=3)):  # fmt: skip
            with pytest.raises(TypeError, match=f"missing or too much: {key} "):
                optimizer()
    model = Plain()
    groups = [{"params": [p], "weight_decay": 0.1} for p in model.parameters()]
    optimizer = SplitAdamW(model, groups, (0.9, 0.95), 1e-8, "8bit", seed=3)
    optimizer.take_weights()
    optimizer.begin(1, 1e-3)
    with pytest.raises(NotImplementedError, match="training_state"):
        optimizer.state_dict()
    with pytest.raises(NotImplementedError, match="training_state"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    with pytest.raises(NotImplementedError, match="groups"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3))], "weight_decay": 0.0})
    (model.a.sum() + model.b.sum()).backward()
    before = model.a.detach().clone()
    with pytest.raises(RuntimeError, match="clip_gradients"):
        optimizer.step()
    optimizer.clip_gradients(1.0)
    optimizer.param_groups[1]["lr"] = 1e-2
    with pytest.raises(ValueError, match=r"lr must be one .*0\.001, 0\.01"):
        optimizer.step()
    assert torch.equal(model.a, before) and optimizer.updates == 0
    optimizer.param_groups[1]["lr"] = 1e-3
    optimizer.step()
    assert not torch.equal(model.a, before)
    with pytest.raises(RuntimeError, match="clip_gradients"):
        optimizer.step()  # not by the scale of the step before


def test_one_rank_under_fp32_is_sharded_as_ever(tmp_path):
    world = World(0, 1, torch.device("cpu"), mesh=None)
    specs = {dtype: resolve(train.Recipe(run_dir=tmp_path, dtype=dtype), world) for dtype in ("fp32", "bf16")}
    assert [specs[dtype].layout.fsdp for dtype in ("fp32", "bf16")] == [True, False]


@dataclass(frozen=True)
class Card(World):
    """One rank on a GPU of so many MiB, which is not here."""

    mib: int = 0

    @property
    def memory_bytes(self) -> int:
        return self.mib * 2**20


@pytest.mark.parametrize("mib, micro_batch, keeps", [(81_559, 1, True), (97_871, 2, False), (143_771, 4, True)])
def test_the_7b_fits_one_card(mib, micro_batch, keeps, tmp_path, monkeypatch):
    """The preset on an H100 of 80 GB, a GH200 of 96 and an H200: as many sequences at once as fit, then activations."""
    monkeypatch.setattr("halny.model.run.resolve.INTERPRETED", True)  # as where kernels run
    recipe = replace(command_line(["mistral-7b-1gpu"]), run_dir=tmp_path, dtype="bf16")
    card = Card(0, 1, torch.device("cpu"), mesh=None, mib=mib)
    spec = resolve(recipe, card)
    assert spec.work.recompute != keeps and train.build_model(spec, card).layers[0].mlp.recompute != keeps
    assert (
        "room for" if keeps else "keeping them takes 11.8 GB more, and 10.7 GB are left"
    ) in spec.decision.recompute_why
    for asked in ("always", "never"):
        other = resolve(replace(recipe, recompute=asked), card)
        assert (other.work.recompute, other.decision.recompute_why) == (asked == "always", "as asked for")
        assert other.recipe.micro_batch == micro_batch - (asked == "never" and not keeps)
    assert not spec.layout.fsdp and spec.recipe.micro_batch == micro_batch and spec.accumulation == 16 // micro_batch
    assert spec.n_parameters == 7_241_732_096
    gb = sum(spec.decision.memory.values()) / 2**30
    assert 0.6 * mib / 1024 < gb < 0.92 * mib / 1024
